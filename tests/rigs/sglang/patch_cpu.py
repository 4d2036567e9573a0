"""Two features of SGLang 0.5.23 pin host memory whether or not there is a GPU; a CPU build of torch refuses.

LoRA (`lora/`) and returning routed experts (`mem_cache/pool_host/`) need this; nothing else does. Run it with the
environment's own interpreter; running it again changes nothing.
"""

import re
import sysconfig
from pathlib import Path

SRT = Path(sysconfig.get_paths()["purelib"]) / "sglang" / "srt"
GUARD = "    if not torch.cuda.is_available():\n        return\n"


def unpin(file: Path) -> None:
    text = file.read_text()
    file.write_text(text.replace("pin_memory=True", "pin_memory=False").replace(".pin_memory()", ""))


def guard_host_register(file: Path) -> None:
    text = file.read_text()
    head = re.search(r"def _cuda_host_register\([^)]*\)[^:]*:\n", text)
    if head is None:
        raise SystemExit(f"{file}: _cuda_host_register is gone; this patch was written for sglang 0.5.23")
    if not text.startswith(GUARD, head.end()):
        file.write_text(text[: head.end()] + GUARD + text[head.end() :])


if __name__ == "__main__":
    unpin(SRT / "lora" / "layers.py")
    unpin(SRT / "lora" / "backend" / "torch_backend.py")
    guard_host_register(SRT / "mem_cache" / "pool_host" / "common.py")
