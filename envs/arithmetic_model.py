"""The quickstart's model from scratch: a byte-level BPE tokenizer trained on generated dialogues, and a 0.50 M parameter Qwen2.

Needs torch and transformers, which are imported when a function is called. The sizes are measured, not guessed: one token per
number is what lets a model this small copy a tool's result, and ``initializer_range`` 0.02 at this width doubles the time it takes.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentrl.plugins import load_object

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""One id each, but not skipped when decoding: parsers must see them."""

ONE_TOKEN_NUMBERS = range(201)
"""Each is one token wherever it stands. The multi-digit ones are added tokens: ``AutoTokenizer`` rebuilds the split of every Qwen2
tokenizer, which takes digits one by one, so merges of digits would be lost on loading; added tokens survive."""
MAX_VOCAB = 1024
"""An upper bound; the corpus has fewer distinct pieces than that."""
CORPUS_DIALOGUES = 3_000
PRE_TOKENIZER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen2.5's own split, so that every loader splits alike."""

MODEL_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}
ROPE_THETA = 10_000.0

CHAT_TEMPLATE = """\
{%- macro compact_schema(tool) -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{"name": {{ function.name | tojson }}, "parameters": {
{%- for name, schema in (function.parameters.properties if function.parameters is defined and function.parameters.properties is defined \
else {}).items() -%}
{%- set type = schema.type if schema.type is defined else 'any' -%}
{{ name | tojson }}: {{ (type if type is string else type | join('|')) | tojson }}{{ '' if loop.last else ', ' }}
{%- endfor -%}
}}
{%- endmacro -%}
{%- macro call_block(call) -%}
{%- set function = call.function if call.function is defined else call -%}
{{ '<tool_call>\\n{"name": ' }}{{ function.name | tojson }}{{ ', "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endmacro -%}
{%- set offers = tools is defined and tools -%}
{%- if offers or (messages and messages[0].role == 'system') -%}
{{ '<|im_start|>system' }}
{%- if messages and messages[0].role == 'system' -%}{{ '\\n' + messages[0].content }}{%- endif -%}
{%- if offers -%}
{{ '\\n<tools>' }}{% for tool in tools %}{{ '\\n' + compact_schema(tool) }}{% endfor %}{{ '\\n</tools>' }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}
{%- generation -%}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{{ '\\n' if message.content or not loop.first else '' }}{{ call_block(call) }}
{%- endfor -%}
{{ '<|im_end|>' }}
{%- endgeneration -%}
{{ '\\n' }}
{%- elif message.role == 'tool' -%}
{{ '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif not (loop.first and message.role == 'system') -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""ChatML with Hermes tool calls and a one-line tool list. Every message renders on its own, so any prefix of the messages renders to a
prefix of the text; two tool results in a row are two user messages for the same reason."""


def make_scratch_model(out_dir: Path, *, seed: int) -> dict[str, Any]:
    """Write a Hugging Face directory with the tokenizer and the randomly initialised model.

    Args:
        out_dir: created when missing; files in it are overwritten.
        seed: of the weights. The tokenizer is always the same.

    Returns:
        ``{path, parameters, vocab_size, seed}``.
    """
    import torch
    import transformers

    lib: Any = transformers
    tokenizer = train_tokenizer(out_dir)
    config = lib.Qwen2Config(
        **MODEL_SHAPE,
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it was
        torch.manual_seed(seed)
        model = lib.Qwen2ForCausalLM(config).to(torch.float32)
    model.generation_config = lib.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    model.save_pretrained(out_dir)
    return {"path": str(out_dir), "parameters": int(model.num_parameters()), "vocab_size": len(tokenizer), "seed": seed}


def train_tokenizer(out_dir: Path) -> Any:
    """Train the tokenizer (about a second), save it with its chat template, and return it as ``AutoTokenizer`` will load it."""
    import tokenizers
    import transformers

    lib: Any = transformers
    trained = _train_bpe(tokenizers)
    tokenizer = lib.PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out_dir)
    return lib.AutoTokenizer.from_pretrained(out_dir)


def render(messages: list[Any], tools: list[Any], *, add_generation_prompt: bool = False) -> str:
    """The dialogue as text, without a tokenizer: what the template makes of it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[messages], tools=tools or None, chat_template=CHAT_TEMPLATE, add_generation_prompt=add_generation_prompt
    )
    return rendered[0]


def _train_bpe(tokenizers: Any) -> Any:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZER), behavior="isolated")
    bytes_only = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_only])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    numbers = [str(number) for number in ONE_TOKEN_NUMBERS if number > 9]  # the digits are bytes already
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=MAX_VOCAB - len(TOOL_TAGS) - len(numbers),
        special_tokens=[tokenizers.AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    bpe.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in (*TOOL_TAGS, *numbers)])
    return bpe


def _corpus() -> Iterator[str]:
    """Rendered dialogues, cut where added tokens stand: merges across or inside those could never be used."""
    generate = load_object("envs.arithmetic:generate_sft_conversations")
    cuts = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, *TOOL_TAGS))) + "|[0-9]+")
    for one in generate(CORPUS_DIALOGUES, seed=0):
        yield from filter(None, cuts.split(render(one["messages"], one["tools"])))
