"""What listens on a port wants a key, the key is not on any command line, and a body without end is refused."""

import json
import os
import shutil
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agentrl.assembly.parts import run_secret
from agentrl.serving.embedded.http import MAX_BODY_BYTES
from agentrl.serving.engine_process import EmbeddedEngineSpec
from agentrl.telemetry.run_dir import RunDir
from agentrl.testing.tiny_model import make_tiny_model

KEY = "a-secret-of-this-run"


def test_a_secret_of_a_run_is_the_same_for_all_its_processes_and_only_for_its_user(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    first = run_secret(run, "engine_key")
    assert len(first) >= 40
    assert run_secret(run, "engine_key") == first
    assert run_secret(run, "sandbox_token") != first
    assert stat.S_IMODE((tmp_path / ".engine_key").stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == [".engine_key", ".sandbox_token"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """An embedded engine as ``serve`` starts it."""
    folder = tmp_path_factory.mktemp("model")
    model = make_tiny_model(folder / "model")
    (folder / "run").mkdir()
    spec = EmbeddedEngineSpec(model_path=str(model), api_key=KEY, extra_args=["--weights-root", str(folder / "run")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", **spec.environment()}
    process = subprocess.Popen(spec.command("127.0.0.1", 0), stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("LISTENING "), line
    yield process, line.split()[1]
    process.terminate()
    process.wait(120)
    process.stdout.close()


def status_of(url: str, *, key: str | None = None, body: bytes | None = None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_engines_key_is_wanted_and_not_shown_by_ps(engine: tuple[subprocess.Popen[str], str]) -> None:
    process, url = engine
    assert not any(KEY in part for part in psutil.Process(process.pid).cmdline())
    wrong = (None, "", KEY[:-1], KEY + "x", "ключ".encode().decode("latin-1"))
    assert [status_of(url + "/model_info", key=key) for key in wrong] == [401] * len(wrong)
    assert status_of(url + "/model_info", key=KEY) == 200
    assert status_of(url + "/update_weights_from_disk", body=b"{}") == 401


def test_weights_come_from_the_run_or_the_model_and_from_nowhere_else(
    engine: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, url = engine
    command = psutil.Process(process.pid).cmdline()
    root, model = Path(command[command.index("--weights-root") + 1]), Path(command[command.index("--model-path") + 1])
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    (root / "link").symlink_to(elsewhere)
    inside = shutil.copytree(model, root / "v1")

    def update(path: object) -> int:
        body = json.dumps({"model_path": str(path), "weight_version": "e1-v1"}).encode()
        return status_of(url + "/update_weights_from_disk", key=KEY, body=body)

    for path in (elsewhere, root / ".." / "elsewhere", root / "link", f"{root}/../../..{elsewhere}", "/etc", "a\0b", ""):
        assert update(path) == 400, path
    assert [update(inside), update(model)] == [200, 200]


def test_a_body_without_end_is_refused_and_the_engine_lives_on(engine: tuple[subprocess.Popen[str], str]) -> None:
    _, url = engine
    try:
        assert status_of(url + "/generate", key=KEY, body=b"[" * (MAX_BODY_BYTES + 10)) == 413
    except OSError as error:  # the server may answer and close before it has read, or this side has written, everything
        assert isinstance(getattr(error, "reason", error), ConnectionError)  # noqa: PT017
    assert status_of(url + "/model_info", key=KEY) == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b'{"input_ids": [1e400]}', b'{"input_ids": [-1]}', b'"\\ud800"', b"\xff\xfe", b"null"]
)
def test_a_malformed_body_is_a_400(engine: tuple[subprocess.Popen[str], str], body: bytes) -> None:
    _, url = engine
    assert status_of(url + "/generate", key=KEY, body=body) == 400
    assert status_of(url + "/model_info", key=KEY) == 200
