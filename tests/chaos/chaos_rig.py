"""A run with every real process but the model: scripted engines say what a policy would, quickly and always the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from agentrl.telemetry.run_dir import RunDir
from agentrl.testing.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
HEADER = "<|im_start|>assistant\n"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
CODE = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(2+3)"}}\n</tool_call><|im_end|>'
ANSWER = "The answer is 5.<|im_end|>"
USER_CODE = '''
"""What a user brings: a tool and a reward, each of which does what a file tells it."""
import time
from pathlib import Path

from agentrl.errors import ToolInfraError

HERE = Path(__file__).parent


def mode(name):
    path = HERE / f"{name}.mode"
    return path.read_text().strip() if path.is_file() else ""


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: one.
        b: the other.
    """
    while mode("tool") == "hang":
        time.sleep(0.02)
    if mode("tool") == "fail":
        raise ToolInfraError("the adder's service is away")
    return str(a + b)


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    while mode("reward") == "hang":
        time.sleep(0.02)
    if mode("reward") == "fail":
        raise RuntimeError("the scorer is broken")
    return float(ground_truth in solution_str) + 0.1 * (extra_info["index"] % 7)
'''


def write_project(folder: Path, *, num_tasks: int = 64, tool: str = "add") -> Path:
    """Model, tasks, tools, reward and the engines' script of a run; returns the folder."""
    from transformers import AutoTokenizer

    make_tiny_model(folder / "model", vocab_size=1000, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    replies = [CODE if tool == "code" else CALL, ANSWER] if tool else [ANSWER]
    script = {"header": encode(HEADER), "replies": [encode(r) for r in replies], "end": tokenizer.eos_token_id}
    (folder / "script.json").write_text(json.dumps(script))
    rows = [
        {
            "data_source": "made-up",
            "prompt": [{"role": "user", "content": f"How much is {n % 10} and {n % 7}? Question {n}."}],
            "reward_model": {"style": "rule", "ground_truth": "5"},
            "extra_info": {"index": n, "split": "train"},
        }
        for n in range(num_tasks)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "user.py").write_text(USER_CODE)
    return folder


def write_config(folder: Path, *, name: str = "run", tool: str = "add", **sections: dict[str, Any]) -> Path:
    """The run's YAML over the project in ``folder``; returns its path."""
    tools: list[dict[str, Any]] = [{"use": f"{folder}/user.py:add", "timeout_s": 60}]
    if tool == "code":
        tools = [{"class_name": "tools.code_interpreter.CodeInterpreter", "config": {"default_timeout": 5}}]
    values: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / "runs"), "seed": 0},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "tasks.jsonl")},
        "reward": {"fn": f"{folder}/user.py:compute_score"},
        "serve": {
            "engine": "sglang", "sglang_command": [sys.executable, str(HERE / "chaos_engine.py")], "replicas": 2,
            "n": 4, "turns": 3, "tokens": 160, "tokens_per_turn": 64, "tool_tokens": 32, "in_flight": 16,
            "turn_timeout_s": 60, "rollout_timeout_s": 120, "group_timeout_s": 240,
        },
        "learn": {
            "steps": 10, "groups": 4, "max_staleness": 4, "pipeline_depth": 1, "zero_spread": "keep", "lr": 1.0e-4,
            "micro_tokens": 4096, "save_every": 2, "stall_timeout_s": 120,
        },
        "log": {"trackers": ["file"]},
    }  # fmt: skip
    if tool:
        values["tools"] = tools
    for section, changed in sections.items():
        values[section] = {**values.get(section, {}), **changed}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def environment(folder: Path) -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    path = os.environ.get("CHAOS_PYTHONPATH", str(ROOT))
    return {**os.environ, **quiet, "PYTHONPATH": path, "CHAOS_SCRIPT": str(folder / "script.json")}


class Process:
    """One process that a test started, with its output in a file."""

    def __init__(self, command: Sequence[str], folder: Path, *, name: str) -> None:
        self.output = folder / f"{name}.out"
        self._sink = self.output.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment(folder),
            stdin=subprocess.DEVNULL, stdout=self._sink, stderr=self._sink,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def close(self) -> None:
        """End it by pid, asking first."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGCONT)  # one that a test halted must hear the next signal
            self.process.terminate()
            try:
                self.process.wait(200)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._sink.close()

    def text(self) -> str:
        return self.output.read_text(errors="replace")


@contextmanager
def small_disk(folder: Path, *, mib: int) -> Iterator[Path]:
    """A file system of this size, gone after the block; the test is skipped where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def survivors(folder: Path) -> list[str]:
    """Processes that a test in this folder started, or that those started, and that still live: all inherit its environment.

    What the sandbox runs is not among them: it has no environment of ours, and dies with the sandbox.
    """
    mark, found = str(folder / "script.json"), list[str]()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("CHAOS_SCRIPT") == mark:
                found.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
    return found


def agentrl(*arguments: str, folder: Path, name: str) -> Process:
    """An ``agentrl`` command."""
    return Process(["-m", "agentrl", *arguments], folder, name=name)


def kill(pid: int | None, number: int = signal.SIGKILL) -> int | None:
    """The pid that got the signal; None where there was none, or it was gone since it was looked up."""
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            return pid
    return None


def until(what: Callable[[], Any], *, seconds: float, name: str, show: Callable[[], str] = str) -> Any:
    """The first true value; an assertion with ``show()`` when none comes in time."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, f"no {name} within {seconds:g} s\n{show()}"
        time.sleep(0.05)
    return value


def logs_of(directory: RunDir, lines: int = 25) -> str:
    files = [f for f in sorted(directory.logs.glob("*.log")) if f.is_file()]
    return "\n".join(f"--- {f.name}\n" + "\n".join(f.read_text(errors="replace").splitlines()[-lines:]) for f in files)
