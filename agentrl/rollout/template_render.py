"""A tokenizer's chat template as a function of messages, exactly as ``apply_chat_template`` fills it, at a part of its price.

``transformers`` prepares everything anew at every call: it collects the special tokens, copies the tools and the template's
settings into plain types, and looks the template up. All of that is the same for the life of a run, so it is done once here,
and the compiled template is filled directly. So are the tools' JSON and the template's globals; a message's field is looked up as
what it is, and what the sandbox found harmless is not examined again. This is taken only where probes at construction give the text that ``apply_chat_template`` gives, only for messages
that it would pass on as they are, and left for good otherwise.
"""

import inspect
import json
from collections.abc import Sequence
from typing import Any

from jinja2.runtime import LoopContext

from agentrl.types import Message

_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "a <b> é"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "said"}, {"role": "user", "content": "again"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "said"}, {"role": "tool", "name": "f", "content": "r"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "t", "reasoning_content": "t"}],
)

_TEXT_ONLY = {str}
_DICT_ATTRIBUTES = frozenset(dir(dict))
_LOOP_ATTRIBUTES = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem"})
_JSON_PROBES = ({"é": "<&'\u2028\n\\", "b": [1, 2.5, True, None, {}, []], "a": {"c": "日本"}}, "é <b>", [], 1e22)


class TemplateRender:
    """The tokenizer's chat template for one set of tools.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template. Neither may change any more.
        tools: function schemas shown to the model; None shows none.
        template_kwargs: passed on to the template.
    """

    def __init__(self, tokenizer: Any, *, tools: list[dict[str, Any]] | None, template_kwargs: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self._kwargs = template_kwargs
        self._compiled: Any = None
        self._given: dict[str, Any] = {}
        compiled = _compiled_template(tokenizer, tools)
        # A setting that `apply_chat_template` itself takes changes more than what the template sees.
        is_its_own = template_kwargs.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys()
        if compiled is not None and not is_its_own and _is_plain(tools) and _is_plain(template_kwargs):
            given = {"documents": None, **tokenizer.special_tokens_map, **template_kwargs, "tools": tools}
            if all(self._agree(compiled, given, probe, prompt) for probe in _PROBES for prompt in (False, True)):
                self._compiled, self._given = compiled, given

    def __call__(self, messages: Sequence[Message], *, generation_prompt: bool, num_known: int = 0) -> str:
        """Text of the messages, the first ``num_known`` of which are known to be `is_direct`. Raises what the template raises."""
        if self._compiled is None or not self.is_direct(messages[num_known:] if num_known else messages):
            return self._slowly(messages, generation_prompt)
        text: str = self._compiled.render(messages=messages, add_generation_prompt=generation_prompt, **self._given)
        return text

    def is_direct(self, messages: Sequence[Message]) -> bool:
        """``transformers`` would hand these messages to the template as they are."""
        return all(map(_is_passed_on, messages))

    def _slowly(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, tokenize=False, add_generation_prompt=generation_prompt, **self._kwargs
            )
        )

    def _agree(self, compiled: Any, given: dict[str, Any], messages: list[Message], generation_prompt: bool) -> bool:
        """Both give the same text, or both refuse the messages."""
        try:
            wanted = self._slowly(messages, generation_prompt)
        except Exception:  # noqa: BLE001  # a template is a program: it raises what it likes
            wanted = None
        try:
            return compiled.render(messages=messages, add_generation_prompt=generation_prompt, **given) == wanted
        except Exception:  # noqa: BLE001
            return wanted is None


def _compiled_template(tokenizer: Any, tools: list[dict[str, Any]] | None) -> Any:
    """The template as ``transformers`` compiles it, sandboxed, in an environment of its own; None where this version has no such
    function."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template  # pyright: ignore[reportPrivateUsage]

        source = tokenizer.get_chat_template(None, tools)
        environment = _own_environment(_compile_jinja_template(source).environment, tools)
        template = environment.from_string(source)
        template.globals = dict(template.globals)  # a chain of maps, which is slow to copy into each fill's context
        return template
    except (ImportError, AttributeError, TypeError, ValueError, KeyError):
        return None


def _own_environment(shared: Any, tools: list[dict[str, Any]] | None) -> Any:
    """The environment without what costs the most and gives the same each time."""
    environment = shared.overlay()
    look_up, to_json = shared.getattr, shared.filters["tojson"]
    # What the sandbox gives as it is, for any text: all but its own `format`, and what has an underscore.
    harmless: dict[Any, frozenset[str]] = {
        str: frozenset(name for name in dir("") if name[0] != "_" and look_up("", name) == getattr("", name)),
        LoopContext: _LOOP_ATTRIBUTES,
    }
    encoded = json.JSONEncoder(ensure_ascii=False).encode
    if any(to_json(probe) != encoded(probe) for probe in _JSON_PROBES):
        encoded = to_json
    printed: dict[int, str] = {}
    if _is_plain(tools):
        printed = {id(value): to_json(value) for value in (tools, *(tools or ()))}

    def field_of(value: Any, name: str) -> Any:
        # The sandbox tries an attribute first and pays for the exception. A dict has few, and is asked for what it holds.
        kind = type(value)
        if kind is dict and name in value and name not in _DICT_ATTRIBUTES:
            return value[name]
        return getattr(value, name) if name in harmless.get(kind, ()) else look_up(value, name)

    def as_json(value: Any, *args: Any, **options: Any) -> Any:
        if args or options:
            return to_json(value, *args, **options)
        known = printed.get(id(value))
        return encoded(value) if known is None else known

    environment.getattr = field_of
    environment.filters = {**shared.filters, "tojson": as_json}
    return environment


def _is_passed_on(message: Message) -> bool:
    """``transformers`` would hand this message to the template as it is: it leaves out what is None, and copies reasoning
    under each of the names that templates know."""
    if "reasoning" in message or message.get("thinking") != message.get("reasoning_content"):
        return False
    return set(map(type, message.values())) == _TEXT_ONLY or (None not in message.values() and _is_plain(message))


def _is_plain(value: Any) -> bool:
    """Made of JSON's own types only, so that copying it into plain types changes nothing."""
    kind = type(value)
    if kind is dict:
        return all(type(key) is str and (type(item) is str or _is_plain(item)) for key, item in value.items())
    if kind is list:
        return all(map(_is_plain, value))
    return value is None or kind in (str, int, float, bool)
