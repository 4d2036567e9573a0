"""The servers that the contract suite runs against. To add one, add a factory to `SERVERS`."""

import contextlib
import os
import select
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agentrl.process import ClaimedPort

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 250.0
FAKE_VOCAB_SIZE = 1024
"""As many tokens as the tiny models have."""


class Unavailable(Exception):
    """This machine cannot run the server; the message says what is missing."""


@dataclass(frozen=True)
class Server:
    name: str
    url: str


@dataclass(frozen=True)
class Models:
    """Checkpoints of one shape (a, b), and ones that must be refused."""

    a: Path
    b: Path
    wide: Path
    nan: Path


@contextmanager
def process(command: list[str], *, log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a server for the length of the block, its stderr in ``log``, and end it by its own process group."""
    with log.open("w") as stderr:
        child = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 15)
        try:
            child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()
        if child.stdout is not None:
            child.stdout.close()


@contextmanager
def embedded(model: Path, folder: Path) -> Iterator[Server]:
    """The embedded engine in a process of its own, as `serve` starts it."""
    log = folder / "embedded.log"
    command = [sys.executable, "-m", "agentrl.serving.embedded_engine", "--model-path", str(model), "--port", "0"]
    command += ["--weight-version", "v0", "--seed", "0", "--parent-pid", str(os.getpid())]
    with process(command, log=log, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
        yield Server("embedded", _url_it_says(child, log))


@contextmanager
def sglang(model: Path, folder: Path) -> Iterator[Server]:
    """A real SGLang from the rig's environment, named by ``AGENTRL_SGLANG_VENV``."""
    venv = os.environ.get("AGENTRL_SGLANG_VENV")
    if not venv:
        raise Unavailable("AGENTRL_SGLANG_VENV is not set; tests/rigs/sglang/install.sh makes the environment")
    log = folder / "sglang.log"
    # With the overlap scheduler the first token of a new version span is still the old weights' (see DIFFERENCES).
    flags = ["--weight-version", "v0", "--skip-tokenizer-init", "--disable-overlap-schedule", "--log-level", "warning"]
    with ClaimedPort("127.0.0.1") as port:
        command = [str(ROOT / "tests/rigs/sglang/serve.sh"), str(Path(venv).resolve()), str(model), str(port), *flags]
        with process(command, log=log, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
            yield Server("sglang", _url_once_ready(child, port, log))


@contextmanager
def fake(model: Path, folder: Path) -> Iterator[Server]:
    """The scripted SGLang in a process of its own, sampling from a function in place of a model."""
    log = folder / "fake.log"
    command = [sys.executable, "-m", "agentrl.testing.fake_sglang", "--port", "0", "--weight-version", "v0"]
    command += ["--sample-vocab-size", str(FAKE_VOCAB_SIZE), "--context-length", "4096", "--token-latency-s", "0.002"]
    command += ["--no-incremental-streaming-output"]
    with process(command, log=log, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
        yield Server("fake", _url_it_says(child, log))


def _url_it_says(child: subprocess.Popen[str], log: Path) -> str:
    assert child.stdout is not None
    readable, _, _ = select.select([child.stdout], [], [], START_TIMEOUT_S)
    line = child.stdout.readline() if readable else ""
    if not line.startswith("LISTENING "):
        raise AssertionError(f"the server said {line!r} instead of LISTENING:\n{log.read_text()[-3000:]}")
    return line.split()[1]


def _url_once_ready(child: subprocess.Popen[str], port: int, log: Path) -> str:
    url = f"http://127.0.0.1:{port}"
    give_up = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(url):
        if child.poll() is not None or time.monotonic() > give_up:
            raise AssertionError(f"the server did not start (exit code {child.poll()}):\n{log.read_text()[-3000:]}")
        time.sleep(0.5)
    return url


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


SERVERS: dict[str, Callable[[Path, Path], AbstractContextManager[Server]]] = {
    "embedded": embedded,
    "sglang": sglang,
    "fake": fake,
}
"""Name -> factory(model directory, folder for logs). A factory may raise `Unavailable`."""


@dataclass(frozen=True)
class Difference:
    """Where a server is known to behave otherwise, and what follows for its clients."""

    what: str
    handling: Literal["asserted", "not run", "avoided"]
    """The row asserts the other behaviour; or is not run, because it would kill or wedge the server; or runs as for every
    server, because the factory's flags avoid the difference."""


DIFFERENCES: dict[tuple[str, str], Difference] = {
    ("test_id_outside_the_vocabulary_is_refused", "sglang"): Difference(
        "the server process dies (IndexError in the embedding): clients check ids", handling="not run"
    ),
    ("test_checkpoint_of_another_shape_is_refused_and_the_old_weights_serve_on", "sglang"): Difference(
        "the server process dies: check shapes before an update", handling="not run"
    ),
    ("test_checkpoint_with_nan_is_refused_and_the_old_weights_serve_on", "sglang"): Difference(
        "it loads NaN and answers id 0 with logprob null from then on: check before an update", handling="asserted"
    ),
    ("test_adapter_directory_is_merged_into_the_starting_weights", "sglang"): Difference(
        "an adapter is no checkpoint there: it is loaded by name with /load_lora_adapter (tests/integration/test_serving_sglang.py)",
        handling="not run",
    ),
    ("test_abort_reaches_a_request_that_a_pause_holds", "sglang"): Difference(
        "the abort is lost and later ones are ignored: close the connection instead", handling="not run"
    ),
    ("test_digest_of_the_weights_is_reported_and_a_wrong_one_refused", "sglang"): Difference(
        "no digest in /model_info, expected_digest is ignored: compare /weights_checker", handling="asserted"
    ),
    ("test_no_request_reuses_cache_of_older_weights_after_an_update_in_place", "sglang"): Difference(
        "its prefix cache keeps the old weights' keys and values, and new requests and next turns use them: "
        "send extra_key=<weight version>, or update under a retract pause, which flushes",
        handling="asserted",
    ),
    ("test_update_that_must_flush_under_in_place_is_answered_400", "sglang"): Difference(
        "answers 400 although the weights have changed: always send flush_cache=false in place", handling="asserted"
    ),
    ("test_update_in_place_keeps_the_request_and_marks_the_token_where_versions_change", "sglang"): Difference(
        "with the overlap scheduler (its default) the boundary is one token early; the suite turns it off", handling="avoided"
    ),
    ("test_update_without_a_pause_keeps_every_token_true_to_its_version", "sglang"): Difference(
        "waits until running requests have finished (one span each), then may answer 400, not flushed, in a race with the last: "
        "repeat the call; the embedded engine re-prefills them instead",
        handling="asserted",
    ),
    ("test_adapter_directory_is_merged_into_the_starting_weights", "fake"): Difference(
        "it reads no weight files: a label is its weights, so an adapter's label serves weights of its own", handling="asserted"
    ),
    ("test_checkpoint_of_another_shape_is_refused_and_the_old_weights_serve_on", "fake"): Difference(
        "it reads no weight files and takes any directory; `refused_paths` scripts a refusal", handling="asserted"
    ),
    ("test_checkpoint_with_nan_is_refused_and_the_old_weights_serve_on", "fake"): Difference(
        "it reads no weight files and takes any directory; `refused_paths` scripts a refusal", handling="asserted"
    ),
    ("test_digest_of_the_weights_is_reported_and_a_wrong_one_refused", "fake"): Difference(
        "as SGLang: no digest in /model_info, expected_digest is ignored", handling="asserted"
    ),
    ("test_abort_reaches_a_request_that_a_pause_holds", "fake"): Difference(
        "as SGLang: the abort is lost (but later ones work)", handling="asserted"
    ),
    ("test_update_that_must_flush_under_in_place_is_answered_400", "fake"): Difference(
        "as SGLang: answers 400 although the weights have changed", handling="asserted"
    ),
    ("test_update_without_a_pause_keeps_every_token_true_to_its_version", "fake"): Difference(
        "as SGLang: waits until running requests have finished", handling="asserted"
    ),
}
