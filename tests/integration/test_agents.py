"""Black-box agents as real processes, and single rollouts by hand, on a real tiny engine."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rollout_kit import Say, ScriptedGenerator
from typer.testing import CliRunner

from agentrl.assembly.audit import _misaligned
from agentrl.cli.main import app
from agentrl.config import Config
from agentrl.data.rows import write_rows
from agentrl.errors import AgentError, RolloutError
from agentrl.plugins import load_object
from agentrl.rollout.agent_loop import Limits, Rollout, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.proxy.agent_process import AgentCommand
from agentrl.rollout.proxy.host import ProxyHost, proxy_host
from agentrl.rollout.reward import Scorer
from agentrl.rollout.toolbox import Toolbox
from agentrl.telemetry.trajectory_log import from_record, read_records
from agentrl.testing.clock import pass_time
from agentrl.testing.tiny_model import make_tiny_model, make_tiny_tokenizer
from agentrl.types import SamplingParams, Task

ROOT = Path(__file__).parents[2]
TOKENIZER = make_tiny_tokenizer()
TASK = Task(
    id="t/1",
    prompt=[{"role": "user", "content": "What is 3 + 4?"}],
    data_source="sums",
    ground_truth="7",
    extra_info={"answer": "secret 7", "level": 2},
)
ASK = """
import json, os, sys, urllib.request
def post(url, body):
    headers = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}
    return json.load(urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)))
def ask(*messages):
    return post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", {"messages": list(messages)})["choices"][0]["message"]
question = {"role": "user", "content": os.environ["AGENTRL_PROMPT"]}
"""


async def play(
    code: str, *turns: str, reward: Any = "score", limits: Limits | None = None, argv: list[str] | None = None, **command: Any
) -> Rollout:
    command = {"grace_s": 1.0, **command}
    host = ProxyHost(AgentCommand(argv=argv or [sys.executable, "-c", ASK + code], **command), reward=reward)
    async with proxy_host(host) as running:
        return await run_rollout(
            TASK, loop="proxy", template=ChatTemplate(TOKENIZER, tools=None),
            generator=ScriptedGenerator(TOKENIZER, [Say(t) for t in turns]), toolbox=Toolbox(),
            scorer=Scorer(fn=lambda solution_str, ground_truth, **_: float(solution_str.endswith(ground_truth))),
            limits=limits or Limits(), sampling=SamplingParams(max_new_tokens=64), trajectory_id="t/1/0/0/0", group_id="t/1/0",
            ordinal=0, sample_index=0, attempt=0, env_name="e", host=running,
        )  # fmt: skip


@pytest.mark.asyncio
async def test_an_agent_is_told_its_task_three_times_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTRL_REDIS_URL", "redis://:secret@host")
    code = """
told = json.loads(sys.stdin.read())
assert told == json.loads(os.environ["AGENTRL_TASK"]) == json.load(open(os.environ["AGENTRL_TASK_FILE"]))
assert told == {"id": "t/1", "data_source": "sums", "split": "train", "prompt": "What is 3 + 4?",
                "messages": [{"role": "user", "content": "What is 3 + 4?"}], "extra_info": {"level": 2}}, told
assert ":secret@" not in json.dumps(dict(os.environ)) and os.environ["MORE"] == "yes" and os.getcwd() == "/"
said = ask(question)
ask(question, said, {"role": "user", "content": "Sure?"})
"""
    rollout = await play(code, "hm", "7", extra_info=["level"], env={"MORE": "yes"}, cwd="/")
    assert (rollout.trajectory.stop, rollout.trajectory.reward, rollout.episode.num_turns) == ("answered", 1.0, 2)
    assert len(rollout.trajectory.segments) == 1


@pytest.mark.asyncio
async def test_the_exit_code_or_a_post_can_be_the_reward() -> None:
    for code, expected in ((0, 1.0), (3, 0.0)):
        rollout = await play(f"ask(question); sys.exit({code})", "x", reward="exit_code")
        assert rollout.trajectory.reward == expected
    post = "ask(question); post(os.environ['AGENTRL_SESSION_URL'] + '/reward', {'reward': 0.25})"
    assert (await play(post, "x", reward="api")).trajectory.reward == 0.25
    with pytest.raises(AgentError, match="without a reward although agent.reward=api"):
        await play("ask(question)", "x", reward="api")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("code", "argv", "match"),
    [
        ("ask(question); raise ValueError('my bug')", None, "exit code 1.*my bug"),
        ("print('hello')", None, "without asking the model once.*hello"),
        ("ask(question); os.kill(os.getpid(), 9)", None, "signal 9"),
        ("", ["/nowhere/agent"], "cannot be started"),
        ("", ["sh", "-c", "nosuchcommand"], "exit code 127"),
    ],
)
async def test_an_agent_that_fails_is_a_failure_and_never_a_reward(code: str, argv: list[str] | None, match: str) -> None:
    for reward in ("score", "exit_code") if argv or "kill" in code else ("score",):
        with pytest.raises(AgentError, match="(?s)" + match):
            await play(code, "x", argv=argv, reward=reward)


@pytest.mark.asyncio
async def test_an_agent_stopped_by_a_limit_is_scored_on_what_it_did() -> None:
    rollout = await play("ask(question); ask(question)", "7", limits=Limits(max_turns=1))
    assert (rollout.trajectory.stop, rollout.trajectory.reward) == ("max_turns", 1.0)


@pytest.mark.asyncio
async def test_past_its_deadline_an_agent_is_gone_with_everything_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
ask(question)
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
import time; time.sleep(600)
"""
    playing = asyncio.create_task(play(code, "7", limits=Limits(rollout_timeout_s=280), grace_s=0.2))
    await until_written(pids, by=playing)
    pass_time(280)
    rollout = await playing
    assert (rollout.trajectory.stop, rollout.trajectory.reward) == ("deadline", 1.0)
    assert_gone(pids)
    # The same after a normal end: what an agent leaves behind is nobody's.
    code = f"""
import subprocess
child = subprocess.Popen(["sleep", "600"])
ask(question)
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
"""
    await play(code, "7")
    assert_gone(pids)


async def until_written(pids: Path, *, by: asyncio.Task[Rollout]) -> None:
    while not pids.is_file() or not pids.read_text():
        assert not by.done(), by.result()
        await asyncio.sleep(0.01)


def assert_gone(pids: Path) -> None:
    end = time.monotonic() + 120
    for pid in map(int, pids.read_text().split()):
        while is_alive(pid):
            assert time.monotonic() < end, f"pid {pid} is still there"
            time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.asyncio
async def test_a_cancelled_rollout_takes_its_agent_along(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"open({str(pids)!r}, 'w').write(str(os.getpid()))\nimport time; time.sleep(600)"
    task = asyncio.create_task(play(code))
    await until_written(pids, by=task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_gone(pids)


# --- on a real engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[str, Path]]:
    """(url, model directory) of an embedded engine with a random tiny model."""
    model = make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "agentrl.serving.embedded_engine", "--model-path", str(model), "--seed", "1"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("LISTENING "), line
        yield line.split()[1], model
    finally:
        process.terminate()
        process.wait(120)


def config_file(folder: Path, engine: tuple[str, Path], **sections: Any) -> Path:
    url, model = engine
    games = load_object("envs.guess_number:generate_tasks")(4, 0)
    write_rows(games, folder / "games.parquet")
    values: dict[str, Any] = {
        "run": {"name": "test", "dir": str(folder / "runs")},
        "model": {"path": str(model)},
        "data": {"train": str(folder / "games.parquet"), "val": str(folder / "games.parquet")},
        "serve": {"urls": [url], "turns": 3, "tokens": 200, "tokens_per_turn": 24},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_prompt_is_played_by_hand_with_tools_and_a_trace(tmp_path: Path, engine: tuple[str, Path]) -> None:
    url, model = engine
    arguments = [
        "rollout",
        "--model",
        str(model),
        "--server",
        url,
        "--tools",
        "configs/tools/calculator.yaml",
        "--prompt",
        "What is 3 + 4?",
    ]
    limits = ["serve.turns=2", "serve.tokens=60", "serve.tokens_per_turn=12"]
    result = CliRunner().invoke(app, [*arguments, "--json", *limits])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    trajectory = from_record(record)
    assert _misaligned(trajectory).startswith(("", "segment 0: versions"))  # a foreign engine has no policy version
    segment = trajectory.segments[0]
    tokenizer = load_tokenizer(model)
    assert '"name": "calculator"' in tokenizer.decode(segment.ids[: segment.prompt_length].tolist())
    assert (record["scored"], record["turns"][0]["kind"], segment.mask.sum()) == (False, "model", trajectory.num_sampled)
    result = CliRunner().invoke(app, [*arguments, "--trace", "--temperature", "0", *limits])
    assert result.exit_code == 0, result.output
    assert "What is 3 + 4?" in result.output
    assert "not scored" in result.output
    assert "logprob" in result.output
    refused = CliRunner().invoke(app, ["rollout", "--model", str(model)])
    assert "give --prompt TEXT, or --row N" in str(refused.exception)


def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def test_a_row_is_played_against_its_environment_by_hand(tmp_path: Path, engine: tuple[str, Path]) -> None:
    path = config_file(tmp_path, engine, env="envs.guess_number:GuessNumber", serve={"agent": "env"})
    result = CliRunner().invoke(app, ["rollout", "-c", str(path), "--row", "1", "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["agent"], record["scored"]) == ("env", True)
    kinds = [t["kind"] for t in record["turns"]]
    assert kinds[0] == "model"
    assert set(kinds) <= {"model", "env"}
    assert record["stop"] in ("max_turns", "max_tokens", "answered")
    assert len(record["turn_rewards"]) <= kinds.count("model")
    refused = CliRunner().invoke(app, ["rollout", "-c", str(path), "--row", "9"])
    assert "data.val has rows 0 to 3" in str(refused.exception)


AGENT = """
import os, sys, json
from openai import OpenAI
client = OpenAI()
task = json.loads(sys.stdin.read())
messages = list(task["messages"])
stream = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=messages, stream=True)
pieces = [piece for chunk in stream if (piece := chunk.choices[0].delta.content)]
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(pieces) + "\\n")
messages += [{"role": "assistant", "content": "".join(pieces)}, {"role": "user", "content": "Once more."}]
client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=messages)
print("done", file=sys.stderr)
"""


def test_a_program_with_the_openai_sdk_is_run_per_task_and_recorded(tmp_path: Path, engine: tuple[str, Path]) -> None:
    pytest.importorskip("openai")
    program = tmp_path / "agent.py"
    program.write_text(AGENT)
    heard = tmp_path / "heard.jsonl"
    # Greedy: what is sampled may be an end of turn at once, and then nothing is streamed.
    path = config_file(tmp_path, engine, agent={"reward": "exit_code"}, serve={"temperature": 0.0})
    arguments = ["agent", "run", "-c", str(path), "--n", "2", "--samples", "1", "--name", "mine", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--", sys.executable, str(program), str(heard), "a=b"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["finished"], report["reward_mean"], report["failed"], report["branches"]) == (2, 1.0, {}, 0)
    records = [from_record(r) for r in read_records(Path(report["out"]))]
    assert len(records) == 2
    for trajectory in records:
        (segment,) = trajectory.segments
        model_turns = [t for t in trajectory.turns if t.kind == "model"]
        assert [t.kind for t in trajectory.turns] == ["model", "env", "model"]
        assert sum(t.end - t.start for t in model_turns) == segment.mask.sum() > 0
        assert (segment.logprobs[segment.mask] < 0).all()
    streamed = [json.loads(line) for line in heard.read_text().splitlines()]
    assert sorted("".join(pieces) for pieces in streamed) == sorted(t.turns[0].text for t in records)
    assert min(len(pieces) for pieces in streamed) > 1  # the engine's tokens came one after the other
    failing = CliRunner().invoke(app, [*arguments, "--", sys.executable, "-c", "raise SystemExit('no luck')"])
    assert failing.exit_code == 1
    assert json.loads(failing.stdout)["failed"] == {"agent": 2}


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="set agent.command"):
        Config.model_validate({"serve": {"agent": "proxy"}})
    with pytest.raises(ValueError, match="would both decide the reward"):
        Config.model_validate({"env": "envs.gsm8k:Gsm8k", "agent": {"command": ["x"], "reward": "api"}})
    assert issubclass(AgentError, RolloutError)
