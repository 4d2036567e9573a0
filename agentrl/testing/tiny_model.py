"""A tiny Qwen2 and its tokenizer, made on the spot: no download, the same bytes for the same arguments, under three seconds.

The tokenizer is a byte-level BPE with Qwen2.5's special tokens and a Hermes tool template (tools in the system message,
``<tool_call>`` blocks from the assistant, tool results inside a user message as ``<tool_response>``). Numbers up to 200
are one token each, so a model this small can learn to copy them. The weights are random: good for plumbing and exactness
tests, not for answers.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""Ids 0 to 6 of the tokenizer, in this order. ``<|im_end|>`` (2) ends a turn, ``<|endoftext|>`` (0) pads."""

EOS_TOKEN_ID = SPECIAL_TOKENS.index("<|im_end|>")
PAD_TOKEN_ID = SPECIAL_TOKENS.index("<|endoftext|>")

# Qwen2's own expression, NFC included. It has to be: AutoTokenizer rebuilds the tokenizer of any qwen2 checkpoint with it,
# whatever tokenizer.json says. Multi-digit numbers are therefore added tokens, which survive every loader.
PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- set first = 0 %}
{%- set system = '' %}
{%- if messages and messages[0].role == 'system' %}
    {%- set first = 1 %}
    {%- set system = messages[0].content %}
{%- endif %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if system %}{{- system + '\\n\\n' }}{%- endif %}
    {{- 'You may call these functions:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\nCall one with its name and arguments as JSON:\\n<tool_call>\\n' }}
    {{- '{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif first %}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages[first:] %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- set function = call.function if call.function else call %}
            {{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {{- (function.arguments if function.arguments is string else function.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

_SENTENCES = (
    "You are a helpful assistant. Use the calculator and end with #### answer.",
    '{"type": "function", "function": {"name": "calculator", "description": "Compute an expression.", "parameters": '
    '{"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}}}',
    '{"name": "calculator", "arguments": {"expression": "2*(8+9)"}}',
    "You may call these functions:\nCall one with its name and arguments as JSON:\n",
    "system\nuser\nassistant\ntool\n#### 34\n",
    "Anna has 12 apples and buys 7 more. How many apples does she have now?",
    "There are 5 boxes with 6 marbles in each and Tom finds 3 more. How many marbles are there together?",
    "Each of 4 friends has 2 red and 3 blue pencils. How many pencils do they have?",
    "Maria shares 24 cookies equally among 6 children. How many does each child get? He gives some to her and has left.",
    "The answer is wrong, try again: error, missing argument, unknown function, result, output, code, print, return, def.",
)
_SYLLABLES = ("ba", "con", "der", "el", "fo", "gar", "hin", "ing", "lo", "ment", "nor", "pre", "qui", "ra", "ster", "tion", "um")


def tokenizer_corpus(*, seed: int = 0) -> Iterator[str]:
    """Text for the tokenizer: the words of arithmetic dialogues, and filler words for the rest of the vocabulary."""
    rng = random.Random(seed)
    for sentence in _SENTENCES:
        yield from [sentence] * 20
    words = [" " + a + b for a in _SYLLABLES for b in _SYLLABLES]
    for _ in range(400):
        yield "".join(rng.choices(words, k=12))


def make_tiny_tokenizer(*, vocab_size: int = 1024, corpus: Iterable[str] | None = None, max_number: int = 200) -> Any:
    """Train the tokenizer; returns a ``PreTrainedTokenizerFast`` of exactly ``vocab_size`` tokens.

    Args:
        vocab_size: at least 263 (256 bytes and the special tokens).
        corpus: training text; None takes `tokenizer_corpus`. Where it runs out of merges, unused ``<|extra_N|>`` tokens
            fill the vocabulary, so that every id a model can sample also decodes.
        max_number: 0 to this number are one token each, wherever they stand (as many of them as the vocabulary holds).

    Raises:
        ValueError: the vocabulary cannot hold all bytes.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} cannot hold 256 bytes and {len(SPECIAL_TOKENS)} special tokens: use at least {smallest}"
        )
    numbers = [str(n) for n in range(10, max_number + 1)][: vocab_size - smallest]
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(numbers),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus() if corpus is None else corpus, trainer)
    tokenizer.add_tokens([AddedToken(number, normalized=False) for number in numbers])
    tokenizer.add_special_tokens([f"<|extra_{n}|>" for n in range(vocab_size - tokenizer.get_vocab_size())])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_tiny_model(
    dir: str | Path,
    *,
    seed: int = 0,
    vocab_size: int = 1024,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 4096,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.08,
    corpus: Iterable[str] | None = None,
    max_number: int = 200,
) -> Path:
    """Write a Hugging Face directory with a random Qwen2 (fp32) and its tokenizer; returns the directory.

    Args:
        dir: created if missing; its files are replaced.
        seed: of the weights. Directories that differ only in ``seed`` fit into the same server.
        initializer_range: 0.08 lets width 64-128 learn copying about twice as fast as the usual 0.02.
        corpus, max_number: see `make_tiny_tokenizer`.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = Path(dir)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(vocab_size=vocab_size, corpus=corpus, max_number=max_number)
    config: Any = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size if intermediate_size is not None else 3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
        dtype="float32",
    )
    # The caller's random state is not ours to move: tests seed their own generators.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen2ForCausalLM(config).float()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
