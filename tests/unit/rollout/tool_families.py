"""Small real tokenizers with the chat format of each model family: its control tokens, and a compact template of its own."""

from dataclasses import dataclass
from functools import cache
from typing import Any

QWEN_HEAD = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
"""
QWEN_TAIL = """\
    {%- elif m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
"""
# History before the last question loses its reasoning; the last turn gets a block even where it has none.
QWEN3 = (
    QWEN_HEAD
    + """\
    {%- if m.role == 'assistant' %}
        {%- set content = m.content or '' %}{%- set reasoning = m.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""
    + QWEN_TAIL
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3_CODER = (
    QWEN_HEAD
    + """\
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query %}{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}
        {{- (m.content or '') }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for key, value in call.function.arguments | items %}
                {{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""
    + QWEN_TAIL
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
# One call a turn; every result is JSON, even text; nothing says <|eom_id|>, which the model may still sample.
LLAMA3 = """\
{{- '<|begin_of_text|>' }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system }}
{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}{{- '<|eot_id|>' }}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('only single tool calls') }}{%- endif %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + m.tool_calls[0].function.name }}
        {{- '", "parameters": ' + m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
_MISTRAL_HEAD = """\
{{- '<s>' }}
{%- if messages[0].role == 'system' %}{{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}{%- set messages = messages[1:] %}{%- endif %}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
"""
_MISTRAL_IDS = """\
{%- if id is not defined or id | length != 9 %}{{- raise_exception('call ids have nine characters') }}{%- endif %}"""
MISTRAL = (
    _MISTRAL_HEAD
    + """\
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- set id = call.id %}"""
    + _MISTRAL_IDS
    + """\
            {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + ', "id": "' + id + '"}' }}
            {{- '' if loop.last else ', ' }}
        {%- endfor %}
        {{- ']</s>' }}
    {%- elif m.role == 'tool' %}
        {%- set id = m.tool_call_id %}"""
    + _MISTRAL_IDS
    + """\
        {{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + ', "call_id": "' + id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- ' ' + m.content | trim + '</s>' }}{%- endif %}
{%- endfor %}
"""
)
MISTRAL_ARGS = (
    _MISTRAL_HEAD
    + """\
    {%- elif m.role == 'tool' %}
        {%- set id = m.tool_call_id %}"""
    + _MISTRAL_IDS
    + """\
        {{- '[TOOL_RESULTS]' + id + '[TOOL_CONTENT]' + m.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' + call.function.arguments | tojson }}
        {%- endfor %}
        {{- '</s>' }}
    {%- endif %}
{%- endfor %}
"""
)
# The role of a result is the tool's name; the last turn ends with <|return|>, earlier ones with <|end|>, calls with <|call|>;
# a call's thoughts disappear once an answer follows.
GPT_OSS = """\
{{- '<|start|>system<|message|>You are a model.<|end|>' }}
{%- if messages[0].role == 'system' %}{{- '<|start|>developer<|message|>' + messages[0].content + '<|end|>' }}{%- set messages = messages[1:] %}{%- endif %}
{%- for tool in tools or [] %}{{- '<|start|>developer<|message|>' + tool.function.name + '<|end|>' }}{%- endfor %}
{%- set ns = namespace(name=none, answered=false) %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {%- set ns.answered = false %}
        {%- for later in messages[loop.index:] %}
            {%- if later.role == 'assistant' and not later.tool_calls %}{%- set ns.answered = true %}{%- endif %}
        {%- endfor %}
        {%- set thoughts = m.content or m.thinking %}
        {%- if thoughts and not ns.answered %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + thoughts + '<|end|>' }}{%- endif %}
        {%- set ns.name = m.tool_calls[0].function.name %}
        {{- '<|start|>assistant to=functions.' + ns.name + '<|channel|>commentary json<|message|>' }}
        {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {%- if ns.name is none %}{{- raise_exception('a result without a call') }}{%- endif %}
        {{- '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}
    {%- else %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
# No token closes a turn: the next message's opening token does.
GLM = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}{{- '<|system|>\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>\\n<think>' + (m.reasoning_content or '') + '</think>' }}
        {%- if m.content %}{{- '\\n' + m.content | trim }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>' + call.function.name + '\\n' }}
            {%- for key, value in call.function.arguments | items %}
                {{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' + (value if value is string else value | tojson) + '</arg_value>\\n' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
    {%- else %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
# Arguments must be text, and no generation prompt follows a result.
_DEEPSEEK = """\
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content %}{%- set messages = messages[1:] %}{%- else %}{%- set first = '' %}{%- endif %}
{{- '<｜begin▁of▁sentence｜>' + first }}
{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}
{%- set ns = namespace(is_tool=false) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set ns.is_tool = false %}{{- '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {%- if not ns.is_tool %}{{- '<｜Assistant｜></think>' }}{%- endif %}
        {%- set ns.is_tool = false %}{{- m.content }}
        {%- if m.tool_calls %}
            {{- '<｜tool▁calls▁begin｜>' }}
            {%- for call in m.tool_calls %}CALL{%- endfor %}
            {{- '<｜tool▁calls▁end｜>' }}
        {%- endif %}
        {{- '<｜end▁of▁sentence｜>' }}
    {%- else %}{%- set ns.is_tool = true %}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.is_tool %}{{- '<｜Assistant｜></think>' }}{%- endif %}
"""
DEEPSEEK_V31 = _DEEPSEEK.replace(
    "CALL",
    "{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' }}",
)
DEEPSEEK_V3 = _DEEPSEEK.replace(
    "CALL",
    "{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' + call.function.arguments"
    " + '\\n```<｜tool▁call▁end｜>' }}",
)
PYTHONIC = """\
{{- '<|begin_of_text|>' }}
{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}
{%- for m in messages %}
    {{- '<|header_start|>' + ('ipython' if m.role == 'tool' else m.role) + '<|header_end|>\\n\\n' + (m.content or '') }}
    {%- if m.tool_calls %}
        {{- '<|python_start|>[' }}
        {%- for call in m.tool_calls %}
            {{- call.function.name + '(' }}
            {%- for key, value in call.function.arguments | items %}
                {{- key + '=' + value | tojson }}{{- '' if loop.last else ', ' }}
            {%- endfor %}
            {{- ')' + ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']<|python_end|>' }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}
"""


@dataclass(frozen=True)
class Family:
    """A chat format, and what must be found in it."""

    template: str
    special: tuple[str, ...]
    """Control tokens; the first is the tokenizer's end-of-sequence token."""
    added: tuple[str, ...]
    """Tokens of their own that are not special."""
    parser: str
    stops: tuple[str, ...]
    call: str
    """A turn with the call f(a="1"), as the model samples it, up to its end."""
    end: str
    """The token that ends such a turn."""
    observation: str
    """What follows it, up to the model's next turn, for the result ``7``."""


_CHATML = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
_XML = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_QWEN_RESULT = "\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
_MISTRAL_TOKENS = (
    "</s>", "<s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[CALL_ID]", "[TOOL_CONTENT]",
)  # fmt: skip
_DEEPSEEK_TOKENS = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
_DEEPSEEK_ADDED = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<think>", "</think>",
)  # fmt: skip
_DEEPSEEK_RESULT = "<｜tool▁output▁begin｜>7<｜tool▁output▁end｜>"

FAMILIES = {
    "qwen3": Family(
        QWEN3, _CHATML, _XML, "hermes", ("<|im_end|>",),
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": "1"}}\n</tool_call>', "<|im_end|>", _QWEN_RESULT,
    ),
    "qwen3_coder": Family(
        QWEN3_CODER, _CHATML, _XML, "qwen3_coder", ("<|im_end|>",),
        "hm\n</think>\n\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", "<|im_end|>",
        _QWEN_RESULT + "<think>\n",
    ),
    "llama3": Family(
        LLAMA3, ("<|eot_id|>", "<|eom_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"), (),
        "llama3_json", ("<|eot_id|>", "<|eom_id|>"), '<|python_tag|>{"name": "f", "parameters": {"a": "1"}}', "<|eom_id|>",
        '<|start_header_id|>ipython<|end_header_id|>\n\n"7"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
    ),
    "mistral": Family(
        MISTRAL, _MISTRAL_TOKENS, (), "mistral", ("</s>",),
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "1"}, "id": "abc123XYZ"}]', "</s>",
        '[TOOL_RESULTS] {"content": "7", "call_id": "abc123XYZ"}[/TOOL_RESULTS]',
    ),
    "mistral_args": Family(
        MISTRAL_ARGS, _MISTRAL_TOKENS, (), "mistral", ("</s>",), '[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{"a": "1"}', "</s>",
        "[TOOL_RESULTS]abc123XYZ[TOOL_CONTENT]7[/TOOL_RESULTS]",
    ),
    "gpt_oss": Family(
        GPT_OSS,
        ("<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|endoftext|>"), (),
        "gpt_oss", ("<|return|>", "<|call|>"),
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
        '{"a": "1"}',
        "<|call|>", '<|start|>functions.f to=assistant<|channel|>commentary<|message|>"7"<|end|><|start|>assistant',
    ),
    "glm": Family(
        GLM, ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        (*_XML, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), "glm", ("<|user|>", "<|observation|>", "<|endoftext|>"),
        "\n<think>hm</think>\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "<|observation|>",
        "\n<tool_response>\n7\n</tool_response><|assistant|>",
    ),
    "deepseek_v3": Family(
        DEEPSEEK_V3, _DEEPSEEK_TOKENS, _DEEPSEEK_ADDED, "deepseek", ("<｜end▁of▁sentence｜>",),
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": "1"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "<｜end▁of▁sentence｜>", _DEEPSEEK_RESULT,
    ),
    "deepseek_v31": Family(
        DEEPSEEK_V31, _DEEPSEEK_TOKENS, _DEEPSEEK_ADDED, "deepseek", ("<｜end▁of▁sentence｜>",),
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "1"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "<｜end▁of▁sentence｜>", _DEEPSEEK_RESULT,
    ),
    "pythonic": Family(
        PYTHONIC,
        ("<|eot|>", "<|eom|>", "<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|python_start|>", "<|python_end|>"), (),
        "pythonic", ("<|eot|>", "<|eom|>"), "<|python_start|>[f(a='1')]<|python_end|>", "<|eot|>",
        "<|header_start|>ipython<|header_end|>\n\n7<|eot|><|header_start|>assistant<|header_end|>\n\n",
    ),
}  # fmt: skip


@cache
def family_tokenizer(name: str) -> Any:
    """A byte-level tokenizer with the family's tokens and template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = {"Ġa": ("Ġ", "a"), "is": ("i", "s"), "er": ("e", "r")}  # enough to tell a re-encoded text from a kept one
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *merged])}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merged.values())))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in family.special])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in family.added])
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=family.special[0], clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = family.template
    return wrapped
