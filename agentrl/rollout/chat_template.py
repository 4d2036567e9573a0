"""Token ids from messages, and only ever from messages nobody sampled: prompts and observations.

What is asserted, and what is not. A conversation grows as ``prompt | sampled | observation | sampled | …``. Sampled ids
come from an engine and are never touched. Observation ids are the *difference* of two renders of a small synthetic
dialogue, without and with the new messages:

- the shorter render must be a prefix of the longer one, or `TemplateError` (checked at every append);
- control tokens in the observation are exactly those of the template itself: text from a tool cannot forge one (checked
  at every append);
- ``self_test`` in `template_self_test` builds dialogues piece by piece and compares the ids with one render of the whole,
  which also catches templates that rewrite earlier turns (Qwen3 drops ``<think>`` once a user message follows).

Where a turn ends, by family: most templates close it with a token (``<|im_end|>``, ``</s>``), some with another one after a
call (``<|call|>``, ``<|eom_id|>``) or in the last turn (``<|return|>``), and GLM's with the token that opens the next message
(``<|observation|>``). All of them are found by rendering and are stop tokens. Exactly one stands between a turn and what
follows: the sampled one, or, where a length limit cut the turn, the template's as part of the observation.

Not asserted: that the template would print an assistant turn exactly as it was sampled. Many strip whitespace, drop
reasoning or re-serialise the JSON of a call. Training uses the sampled ids, so this cannot corrupt it; but a server that
re-renders the history would show the model something else than it was trained on, so the self-test returns it as notes.
"""

import contextlib
import json
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from agentrl.errors import TemplateError
from agentrl.rollout.template_render import TemplateRender
from agentrl.rollout.template_self_test import WHAT_TO_DO, TemplateReport, self_test
from agentrl.rollout.token_diff import show_difference
from agentrl.rollout.token_text import GrowingText, TokenText
from agentrl.types import Message

_SPLIT = "\ufdd0"
"""A noncharacter: never in text, so it can mark where a forged control token is cut in two before encoding."""

_MARKER = "qzmarkerzq"
"""Content of the synthetic assistant turn; what follows it is what the template adds after a turn."""

_MARKUP = re.compile(r"[<\[｜].*[>\]｜]", re.DOTALL)
"""Looks of tokens like ``<tool_call>`` or ``[TOOL_RESULTS]``, which many tokenizers add without calling them special."""

_TURN_ENDS = ("<|eom_id|>", "<|eom|>", "<|call|>", "<|return|>")
"""Ends of turns that a model may sample although its template prints them in some modes only (Llama, gpt-oss)."""

_PROBE = "qzresultzq"
"""Content of a synthetic result; a template that does not print it would hide the tools' answers from the model."""

_PROMPTS_KEPT = 128
"""Prompts whose ids are remembered: the members of a group share theirs."""
_BASES_KEPT = 256
"""Synthetic dialogues whose text is remembered: what is rendered at every append is the whole that must continue them."""

_PLAIN_NAME = re.compile(r"[\w.\-]{1,64}", re.ASCII)
_PLAIN_ID = re.compile(r"[A-Za-z0-9]{9}")


class _Kind(NamedTuple):
    """What a synthetic assistant turn holds."""

    calls: Literal["all", "one", "none"]
    """A call per result; one, for templates that refuse several; or only text."""
    has_reasoning: bool
    # Qwen3 prints an empty <think> block for the last turn only; with reasoning of its own the turn prints the same in
    # both places.


_TOOL_KINDS = tuple(_Kind(calls, reasoning) for calls in ("all", "one", "none") for reasoning in (False, True))
_USER_KINDS = (_Kind("none", False), _Kind("none", True))


class _Base(NamedTuple):
    """A dialogue that ends with a synthetic assistant turn: what everything that follows must continue."""

    opening: list[Message]
    num_known: int
    """Messages of it that the template is handed as they are: not to be looked at again."""
    text: str
    split: int
    """Position behind the marker in ``text``."""
    closing: list[int]
    """Ids of the text from there on."""
    end: int
    """Position in ``closing`` of the token that ends the turn; -1 where the opening token of the next message ends it."""


class _Ends(NamedTuple):
    """How the template ends an assistant turn."""

    closers: frozenset[int]
    """Tokens that close a turn, one as good as the other; empty where the next message's opening token ends it."""
    stop_ids: tuple[int, ...]


class ChatTemplate:
    """A tokenizer's chat template, for one set of tools.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: function schemas (``{"type": "function", "function": {…}}``) shown to the model; None shows none.
        template_kwargs: passed on to the template, for example ``enable_thinking``.
        allow_rewrites: accept a template that changes earlier turns when messages follow. What follows a turn is then taken
            from where the template prints it, whatever it did to the turns before; sampled turns stay as they are.
        text: encodes and decodes for this tokenizer; made here by default.

    Raises:
        TemplateError: the tokenizer has no chat template, or nothing tells where its turns end.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: dict[str, Any] | None = None,
        allow_rewrites: bool = False,
        text: TokenText | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError("the tokenizer has no chat template; set `chat_template` in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.tools = list(tools) if tools else None
        self._tools_key = _key_of_tools(tools)
        self._kwargs = dict(template_kwargs or {})
        self.allow_rewrites = allow_rewrites
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        special = set(tokenizer.all_special_ids)
        self._special_ids = frozenset(i for i, t in added.items() if t.special or i in special)
        self._added_ids = frozenset(added)
        # Added tokens that are ordinary text (numbers, runs of spaces) carry no power and stay whole.
        self._control_ids = frozenset(i for i, t in added.items() if i in self._special_ids or _MARKUP.fullmatch(t.content))
        self._forgeable = _lookahead(added[i].content for i in self._control_ids)
        self._forgeable_special = _lookahead(added[i].content for i in self._special_ids)
        self._variants: dict[tuple[str, bool], _Kind] = {}
        self._controls: dict[tuple[str, ...], list[int]] = {}
        self._siblings: dict[str, ChatTemplate] = {}
        self._bases: OrderedDict[tuple[_Kind, tuple[tuple[str, str], ...]], _Base] = OrderedDict()
        self._prompts: OrderedDict[tuple[tuple[tuple[str, str], ...], ...], list[int]] = OrderedDict()
        self._text = text or TokenText(tokenizer)
        self._fill = TemplateRender(tokenizer, tools=self.tools, template_kwargs=self._kwargs)
        self.arguments_as_text = self._wants_text()
        """The template takes a call's arguments as JSON text (DeepSeek), not as an object."""
        prompt = self.render([{"role": "user", "content": _MARKER}], generation_prompt=True)
        prompt = prompt[prompt.rfind(_MARKER) :]
        self.opened_thinking = "<think>" if prompt.rfind("<think>") > prompt.rfind("</think>") else ""
        """What the generation prompt opens on the model's behalf; belongs before a sampled turn when calls are looked for."""
        self._ends = self._find_ends()
        self.stop_ids: tuple[int, ...] = self._ends.stop_ids
        """Ids that end an assistant turn."""

    @property
    def end_of_turn_id(self) -> int:
        """The id that ends a turn without calls."""
        return self.stop_ids[0]

    @property
    def closer_ids(self) -> frozenset[int]:
        """Ids that close a turn; none where the opening token of the next message ends it (GLM)."""
        return self._ends.closers

    def with_tools(self, tools: Sequence[dict[str, Any]] | None) -> "ChatTemplate":
        """The same template with other tools; remembered, because rows share few selections."""
        key = _key_of_tools(tools)
        if key == self._tools_key:
            return self
        if key not in self._siblings:
            self._siblings[key] = ChatTemplate(
                self.tokenizer, tools=tools, template_kwargs=self._kwargs, allow_rewrites=self.allow_rewrites, text=self._text
            )
        return self._siblings[key]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of ``messages`` with the generation prompt. Control tokens in user and tool text become plain text."""
        key = _key_of(messages)
        if key is None:
            return self._prompt_ids(messages)
        if key in self._prompts:
            self._prompts.move_to_end(key)
        else:
            self._prompts[key] = self._prompt_ids(messages)
            if len(self._prompts) > _PROMPTS_KEPT:
                self._prompts.popitem(last=False)
        return list(self._prompts[key])

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        shown = [self.neutral(self._in_form(m)) for m in messages]
        try:
            text = self.render(shown, generation_prompt=True)
        except TemplateError:
            plain = _with_plain_ids(shown)
            if plain == shown:
                raise
            text = self.render(plain, generation_prompt=True)  # Mistral's templates insist on nine letters and digits
        return self.encode(text)

    def _in_form(self, message: Message) -> Message:
        """The message with its calls' arguments as this template takes them: clients and data sets write either form."""
        calls = message.get("tool_calls")
        if not calls:
            return message
        formed: list[Any] = []
        for call in calls:
            function = call.get("function")
            if not isinstance(function, Mapping):  # the bare form, which some templates read
                formed.append(call)
                continue
            given = function.get("arguments")
            if self.arguments_as_text and isinstance(given, Mapping):
                given = json.dumps(given, ensure_ascii=False)
            elif not self.arguments_as_text and isinstance(given, str):
                with contextlib.suppress(ValueError, RecursionError):  # what is no JSON, or too deep, is shown as written
                    given = json.loads(given)
            formed.append({**call, "function": {**function, "arguments": given}})
        return {**message, "tool_calls": formed}

    def observation_ids(self, messages: Sequence[Message], *, last_sampled: int | None = None) -> list[int]:
        """Ids that follow a sampled assistant turn: its end where it lacks one, the messages, the generation prompt.

        Args:
            messages: tool results (role ``tool``), with ``name`` and ``tool_call_id`` where known, or user messages.
            last_sampled: the last sampled id. Where it ends a turn, the template's own end is not added; where it does not
                (the turn hit a length limit), the missing end is part of the returned ids, which are never trained on.

        Raises:
            TemplateError: the template rewrites earlier turns, or control tokens were forged.
        """
        ids = self._tail_ids([self.neutral(m) for m in messages])
        expected = self._expected_controls(messages)
        found = self._controls_in(ids)
        if found != expected:
            raise TemplateError(
                "observation text changed the control tokens of the template: "
                f"expected {self._named(expected)}, found {self._named(found)}"
            )
        if last_sampled is None:
            return ids
        has_ended = last_sampled == ids[0] or (last_sampled in self._ends.closers and ids[0] in self._ends.closers)
        return ids[1:] if has_ended else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, for parsing and people; a closing end-of-turn token is left out, others are kept."""
        end = len(ids)
        while end and ids[end - 1] in self.stop_ids:
            end -= 1
        return self.decode_all(ids[:end])

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of any ids, control tokens included."""
        return self._text.decode(ids)

    def growing_text(self) -> GrowingText:
        """Decodes ids that come one after the other."""
        return GrowingText(self._text)

    def self_test(
        self, *, roles: Sequence[Literal["tool", "user"]] = ("tool",), allow_rewrites: bool | None = None
    ) -> TemplateReport:
        """See `agentrl.rollout.template_self_test.self_test`; by default with what the template was made with."""
        return self_test(self, roles=roles, allow_rewrites=self.allow_rewrites if allow_rewrites is None else allow_rewrites)

    def rendered_turn(self, message: Message) -> str:
        """The text a model would sample for this assistant message, without its end, as the template prints it.

        Raises:
            TemplateError: the template refuses the message.
        """
        opening: list[Message] = [{"role": "user", "content": "q"}]
        whole = self.render([*opening, message], generation_prompt=False)
        for generation_prompt in (True, False):
            start = self.render(opening, generation_prompt=generation_prompt)
            if whole.startswith(start):
                return self.decode(self.turn_ids(self.encode(whole[len(start) :])))
        return whole

    def turn_ids(self, ids: Sequence[int]) -> list[int]:
        """The part of a rendered assistant turn that a model samples: up to and with its closing token."""
        last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in self._ends.closers), len(ids) - 1)
        return list(ids[: last + 1])

    def call(self, name: str, arguments: dict[str, Any], index: int = 0) -> dict[str, Any]:
        """One entry of ``tool_calls``, with the arguments in the form that this template takes."""
        given = json.dumps(arguments, ensure_ascii=False) if self.arguments_as_text else arguments
        return {"id": call_id(0, index), "type": "function", "function": {"name": name, "arguments": given}}

    def difference(self, pieces: Sequence[int], whole: Sequence[int]) -> str:
        """The tokens around where the two differ."""
        return show_difference(pieces, whole, self._token)

    # Rendering

    def render(self, messages: Sequence[Message], *, generation_prompt: bool, num_known: int = 0) -> str:
        """Text of messages as they are: their control tokens stay. ``num_known``: see `TemplateRender`.

        Raises:
            TemplateError: the template refuses the messages.
        """
        try:
            return self._fill(messages, generation_prompt=generation_prompt, num_known=num_known)
        except TemplateError:
            raise
        except Exception as error:  # a template is a program: it raises what it likes
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise TemplateError(f"the chat template failed on messages with roles [{roles}]: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text; tokens that `neutral` cut in two stay apart."""
        ids: list[int] = []
        for piece in text.split(_SPLIT):
            if piece:
                ids.extend(self._text.encode(piece))
        return ids

    def neutral(self, message: Message) -> Message:
        """The message with control-token strings in its text cut in two, so that no tokenizer joins them."""
        pattern = {"tool": self._forgeable, "user": self._forgeable_special}.get(str(message.get("role")))
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": _cut_tokens(_sound(content), pattern)}
        if isinstance(content, list):
            parts: list[Any] = [
                {**part, "text": _cut_tokens(_sound(part["text"]), pattern)}
                if isinstance(part, dict) and isinstance(part.get("text"), str)  # pyright: ignore[reportUnknownMemberType]
                else part
                for part in content  # pyright: ignore[reportUnknownVariableType]
            ]
            return {**message, "content": parts}
        return message

    # The difference

    def _tail_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids from the token that ends the turn before ``messages`` to the end of the generation prompt."""
        role = "tool" if messages[0]["role"] == "tool" else "user"
        key = (role, len(messages) > 1)
        failure: TemplateError | None = None
        for kind in [self._variants[key]] if key in self._variants else _TOOL_KINDS if role == "tool" else _USER_KINDS:
            try:
                ids = self._tail_after(kind, messages)
                if key not in self._variants:
                    self._require_printed(kind, messages)
            except TemplateError as error:
                failure = failure or error
                continue
            self._variants[key] = kind
            return ids
        raise failure or TemplateError("the template does not print the assistant's turns")

    def _tail_after(self, kind: _Kind, messages: Sequence[Message]) -> list[int]:
        base, numbered = self._base(kind, messages)
        full = self.render([*base.opening, *numbered], generation_prompt=True, num_known=base.num_known)
        text, split = base.text, base.split
        kept = full[:split]
        if self.allow_rewrites and not full.startswith(text[:split]):
            kept = _up_to_marker(full, text.count(_MARKER))
            full, text, split = full[len(kept) :], text[split:], 0
        if base.end < 0:
            if not full.startswith(text):
                raise self._not_preserving(messages, text, full)
            ids = self.encode(full[len(text) :])
            start = next((n for n, i in enumerate(ids) if i in self._control_ids), None)
            if start is None:
                raise TemplateError(f"no control token between an assistant turn and what follows it: {full[len(text) :]!r}")
            return ids[start:]
        ids, end = self.encode(full[split:]), base.end
        if (
            not full.startswith(text[:split])
            or not kept
            or ids[:end] != base.closing[:end]
            or end >= len(ids)
            or ids[end] not in self._added_ids
        ):
            raise self._not_preserving(messages, text, full)
        return ids[end:]

    def _base(self, kind: _Kind, messages: Sequence[Message]) -> tuple[_Base, list[Message]]:
        """The dialogue that ``messages`` continue, and the messages with the names and ids that it uses."""
        numbered = _numbered(messages)
        called = numbered if kind.calls == "all" else numbered[: kind.calls == "one"]
        key = kind, tuple((m["name"], m["tool_call_id"]) for m in called) if messages[0]["role"] == "tool" else ()
        if key in self._bases:
            self._bases.move_to_end(key)
        else:
            self._bases[key] = self._new_base(self._synthetic(kind, messages[0]["role"], called))
            if len(self._bases) > _BASES_KEPT:
                self._bases.popitem(last=False)
        return self._bases[key], numbered

    def _new_base(self, turn: Message) -> _Base:
        opening: list[Message] = [{"role": "user", "content": "q"}, turn]
        text = self.render(opening, generation_prompt=False)
        if _MARKER not in text:
            raise TemplateError("the template does not print the assistant's turns")
        split = text.rindex(_MARKER) + len(_MARKER)
        closing = self.encode(text[split:])
        num_known = len(opening) if self._fill.is_direct(opening) else 0
        return _Base(opening, num_known, text, split, closing, self._end_in(closing) if self._ends.closers else -1)

    def _require_printed(self, kind: _Kind, messages: Sequence[Message]) -> None:
        probes: list[Message] = [{**m, "content": _PROBE} for m in messages]
        printed = self.decode_all(self._tail_after(kind, probes)).count(_PROBE)
        if printed != len(probes):
            raise TemplateError(
                f"the template prints {printed} of {len(probes)} messages with the role {messages[0]['role']!r} after an assistant "
                "turn, so the model would not see them. Give a template that prints them (model.chat_template=FILE.jinja)"
            )

    def _not_preserving(self, messages: Sequence[Message], base: str, full: str) -> TemplateError:
        return TemplateError(
            f"the template is not prefix-preserving: appending {[m['role'] for m in messages]} changed what came "
            f"before. {WHAT_TO_DO}.\n" + self.difference(self.encode(base), self.encode(full))
        )

    def _end_in(self, closing: Sequence[int]) -> int:
        """Position of the token that closes the turn, among the ids that follow the turn's text."""
        for n, i in enumerate(closing):
            if i in self._ends.closers:
                return n
        raise TemplateError(
            f"no end-of-turn token {self._token(self.end_of_turn_id)!r} between an assistant turn and what follows it: "
            f"{self.decode_all(closing)!r}"
        )

    def _synthetic(self, kind: _Kind, role: str, called: Sequence[Message]) -> Message:
        """An assistant turn that messages of a role may follow; where they are results, ``called`` are those it calls for."""
        turn: Message = {"role": "assistant", "content": _MARKER if kind.calls == "none" else ""}
        if kind.has_reasoning:
            turn["reasoning_content"] = turn["thinking"] = "r"
        if role == "tool" and kind.calls != "none":
            turn["tool_calls"] = [{**self.call(m["name"], {"a": _MARKER}), "id": m["tool_call_id"]} for m in called]
        return turn

    def _controls_in(self, ids: Sequence[int]) -> list[int]:
        return sorted(filter(self._special_ids.__contains__, ids))

    def _expected_controls(self, messages: Sequence[Message]) -> list[int]:
        key = tuple(str(m["role"]) for m in messages)
        if key not in self._controls:
            plain: list[Message] = [{"role": m["role"], "content": "r"} for m in messages]
            self._controls[key] = self._controls_in(self._tail_ids(plain))
        return self._controls[key]

    # What the template is like

    def _wants_text(self) -> bool:
        """Whether arguments must be text: an object is refused, or printed as Python would."""
        if not self.tools:
            return False

        def printed(arguments: Any) -> str | None:
            call = {"id": call_id(0, 0), "type": "function", "function": {"name": "f", "arguments": arguments}}
            turn: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                return self.render([{"role": "user", "content": "q"}, turn], generation_prompt=False)
            except TemplateError:
                return None

        as_object = printed({"a": _MARKER})
        if as_object is not None and _MARKER in as_object and f"'{_MARKER}'" not in as_object:
            return False
        return _MARKER in (printed(json.dumps({"a": _MARKER})) or "")

    def _find_ends(self) -> _Ends:
        """Render turns with and without calls, last and followed by something, and look at what ends them."""
        question: Message = {"role": "user", "content": "q"}
        said: Message = {"role": "assistant", "content": _MARKER}
        text = self._after_marker([question, said], generation_prompt=False)
        if text is None:
            raise TemplateError("the template does not print the assistant's turns")
        vocabulary: dict[str, int] = self.tokenizer.get_added_vocab()
        known = [vocabulary[name] for name in _TURN_ENDS if name in vocabulary]
        eos = self.tokenizer.eos_token_id
        last = self._first_added(text)
        followed = self._first_added(self._after_marker([question, said, question], generation_prompt=True) or ())
        calls, results = self._call_ends()
        if last is None:
            opens = [i for i in (followed, results) if i is not None]
            if not opens:
                raise TemplateError(
                    f"the template ends assistant turns with {self.decode_all(text)!r}, which holds no control token, "
                    "so the end of a turn cannot be told from text. Use a template with an end-of-turn token"
                )
            return _Ends(frozenset(), _unique([*opens, *known, eos]))
        ends = [last] if calls is None or last in calls else [last, calls[-1]]
        closers = frozenset([*ends, *known] if followed is None else [*ends, *known, followed])
        return _Ends(closers, _unique([*ends, *known, eos]))

    def _call_ends(self) -> tuple[list[int] | None, int | None]:
        """Control tokens after the text of a call that ends the dialogue; the first one of a result that follows it."""
        if not self.tools:
            return None, None
        result: Message = {"role": "tool", "content": "r"}
        for kind in _TOOL_KINDS[:2]:
            numbered = _numbered([result])
            turn = self._synthetic(kind, "tool", numbered)
            opening: list[Message] = [{"role": "user", "content": "q"}, turn]
            closing = self._after_marker(opening, generation_prompt=False)
            whole = self._after_marker([*opening, *numbered], generation_prompt=True)
            if closing is None or whole is None:
                continue
            controls = [i for i in closing if i in self._control_ids]
            follows = self._first_added(whole[len(closing) :]) if whole[: len(closing)] == closing else None
            return controls or None, follows
        return None, None

    def _after_marker(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[int] | None:
        """Ids after the last marker; None where the template refuses the messages or does not print it."""
        try:
            text = self.render(messages, generation_prompt=generation_prompt)
        except TemplateError:
            return None
        return self.encode(text[text.rindex(_MARKER) + len(_MARKER) :]) if _MARKER in text else None

    def _first_added(self, ids: Sequence[int]) -> int | None:
        return next((i for i in ids if i in self._added_ids), None)

    def _token(self, i: int) -> str:
        return self.decode_all([i])

    def _named(self, ids: Sequence[int]) -> str:
        return ", ".join(f"{self._token(i)} x{n}" for i, n in sorted(Counter(ids).items())) or "none"


def call_id(turn: int, index: int) -> str:
    """An id for a call to which the model gave none; nine letters and digits, because Mistral's templates insist."""
    return f"call{turn % 1000:03d}{index % 100:02d}"


def _numbered(messages: Sequence[Message]) -> list[Message]:
    """Results with a name and an id that a template can print; other messages as they are."""
    if messages[0]["role"] != "tool":
        return list(messages)
    numbered: list[Message] = []
    for index, message in enumerate(messages):
        name, identifier = str(message.get("name") or "f"), str(message.get("tool_call_id") or "")
        numbered.append(
            {
                **message,
                # A model makes up names; what is no plain name could forge control tokens.
                "name": name if _PLAIN_NAME.fullmatch(name) else "tool",
                "tool_call_id": identifier if _PLAIN_ID.fullmatch(identifier) else call_id(0, index),
            }
        )
    return numbered


def _with_plain_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with nine letters and digits for each id of a call that is something else."""
    known: dict[Any, str] = {}

    def plain(given: Any) -> str:
        return given if _PLAIN_ID.fullmatch(str(given)) else known.setdefault(given, call_id(len(known) // 100, len(known) % 100))

    renamed: list[Message] = []
    for message in messages:
        calls = [{**call, "id": plain(call.get("id"))} for call in message.get("tool_calls") or ()]
        answers = {"tool_call_id": plain(message["tool_call_id"])} if "tool_call_id" in message else {}
        renamed.append({**message, **({"tool_calls": calls} if calls else {}), **answers})
    return renamed


def _up_to_marker(text: str, nth: int) -> str:
    """``text`` up to and with the nth marker (later ones are the messages' own); empty where there are fewer."""
    end = 0
    for _ in range(nth):
        found = text.find(_MARKER, end)
        if found < 0:
            return ""
        end = found + len(_MARKER)
    return text[:end]


def _key_of_tools(tools: Sequence[dict[str, Any]] | None) -> str:
    return json.dumps(list(tools) if tools else None, sort_keys=True)


def _unique(ids: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def _key_of(messages: Sequence[Message]) -> tuple[tuple[tuple[str, str], ...], ...] | None:
    """What the ids of plain messages depend on; None where a value is not text."""
    if not all(isinstance(value, str) for message in messages for value in message.values()):
        return None
    return tuple(tuple(message.items()) for message in messages)


def _lookahead(contents: Any) -> re.Pattern[str] | None:
    """Matches (without consuming) wherever one of the strings starts, overlaps included."""
    strings = sorted({str(c) for c in contents if len(str(c)) > 1}, key=len, reverse=True)
    return re.compile("(?=" + "|".join(re.escape(s) for s in strings) + ")") if strings else None


def _cut_tokens(text: str, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        return text
    text = text.replace(_SPLIT, "\ufffd")
    cuts = [match.start() + 1 for match in pattern.finditer(text)]
    if not cuts:
        return text
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return _SPLIT.join(pieces)


def _sound(text: str) -> str:
    """Without unpaired surrogates, which no tokenizer encodes."""
    return text.encode("utf-8", "replace").decode("utf-8")
