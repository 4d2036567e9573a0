"""Which stage of a run waits, for what, since when, and what to change: from facts, not from what a stuck process says of itself.

``take_snapshot`` reads the run directory, the kernel (is that pid alive, stopped?) and the stream; ``diagnose`` is pure and
follows the data path from effect to cause: learn waits for groups because serve waits for engines because all are quarantined.
The doctor prints the result; the watchdogs of run, serve and learn print the same line by themselves.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import yaml
from redis.exceptions import RedisError

from agentrl.assembly.parts import REDIS_URL_VARIABLE
from agentrl.config import Config, parse_config
from agentrl.errors import AgentRLError
from agentrl.stream.connection import check_server, connect, redact_url
from agentrl.stream.consumer import full_age_s
from agentrl.stream.keys import Keys
from agentrl.stream.server import EmbeddedServer
from agentrl.telemetry.run_dir import RunDir, is_alive

Level = Literal["ok", "warn", "fail"]
State = Literal["finished", "stopped", "starting", "moves", "stalled"]

DISK_LOW_BYTES = 16 << 20
"""Less than this free, and neither the stream's server nor a checkpoint gets far."""
STALE_STATUS_S = 10.0
"""A status is written every second; one older than this means that its process no longer runs its loop."""
START_LIMIT_S = 120.0
"""How long a process may take until its first report: imports and loading a model."""
RESTART_LIMIT_S = 30.0
"""How long a dead process may be missing while the supervisor lives."""
PING_TIMEOUT_S = 2.0
EVENTS_READ_BYTES = 1 << 20
HEALTHY_ENGINE = ("ready", "updating", "draining")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    level: Level
    text: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        return f"{self.level:4}  {self.subject:12} {self.text}" + (f"\n{'':19}→ {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Verdict(Finding):
    """The state of the whole run, and the one stage that holds it up."""

    state: State = "moves"
    stage: str = ""
    """``learn``, ``serve``, ``engine``, ``weights``, ``tool:<name>``, ``reward``, ``sandbox``, ``stream``; empty while it moves."""
    waits_for: str = ""
    since_s: float = 0.0
    oldest_rollout: str = ""
    oldest_rollout_s: float = 0.0

    def line(self) -> str:
        if self.state != "stalled":
            return super().line()
        rollout = f"; oldest rollout {self.oldest_rollout} ({self.oldest_rollout_s:.0f} s)" if self.oldest_rollout else ""
        return f"stalled: {self.stage} waits for {self.waits_for}, for {self.since_s:.0f} s: {self.text}{rollout} → {self.fix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessView:
    """A recorded process as the kernel sees it."""

    pid: int
    alive: bool
    stopped: bool = False
    """Halted by a signal (SIGSTOP, SIGTSTP, a debugger)."""
    age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamView:
    """The stream's server as a client sees it."""

    url: str
    error: str = ""
    """Why it did not answer; empty when it did."""
    persistence: str = "unknown"
    items: int = 0
    bytes: int = 0
    full_s: float | None = None
    """Seconds since a producer last found it full; None when that never happened."""
    full_why: str = ""
    dead: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything ``diagnose`` looks at."""

    limit_s: float
    num_steps: int
    processes: Mapping[str, ProcessView]
    serve: Mapping[str, Any]
    learn: Mapping[str, Any]
    stream: StreamView
    serve_age_s: float = 0.0
    learn_age_s: float = 0.0
    last_run_event: str = ""
    """``run_started``, ``run_ended`` or ``run_failed``: what the supervisor last said."""
    complete: bool = False
    missing_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """Role -> seconds since its process was seen to exit."""
    queue_bytes: int = 1 << 30
    free_bytes: int = 1 << 40
    """Left on the file system of the run directory."""

    def is_live(self, role: str) -> bool:
        return role in self.processes and self.processes[role].alive


# -- facts ------------------------------------------------------------------------------------------------------------


def take_snapshot(run: RunDir, *, config: Config | None = None) -> Snapshot:
    """Look at a run; takes up to ``PING_TIMEOUT_S`` when its stream does not answer, a few milliseconds when it does."""
    config = config or parse_config(yaml.safe_load(run.config.read_text()), place=str(run.config))
    now = time.time()
    serve, learn = run.read_status("serve"), run.read_status("learn")
    last_run_event, complete, missing = "", False, dict[str, float]()
    for event in _latest_events(run):
        name = str(event.get("event"))
        if name in ("run_started", "run_ended", "run_failed"):
            last_run_event = name
        if name == "child_exited":
            missing[str(event.get("role"))] = now - float(event["time"])
        if name == "learn_ended":
            complete = bool(event.get("complete"))
        elif name == "run_started":
            complete = False
    return Snapshot(
        limit_s=config.run.stall_warn_s,
        num_steps=config.learn.steps,
        processes={str(e["role"]): _view(e, now) for e in run.recorded_processes()},
        serve=serve,
        learn=learn,
        serve_age_s=run.status_age_s("serve"),
        learn_age_s=run.status_age_s("learn"),
        stream=_look_at_stream(config, run),
        last_run_event=last_run_event,
        complete=complete,
        missing_s=missing,
        queue_bytes=config.queue.max_bytes,
        free_bytes=free_bytes(run.root),
    )


def free_bytes(path: Path) -> int:
    """What this user may still write where the path lies."""
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize


def _latest_events(run: RunDir) -> Iterator[dict[str, Any]]:
    """The end of events.jsonl: what is asked for is there, and watchdogs read it again and again."""
    try:
        with run.events.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - EVENTS_READ_BYTES))
            lines = file.read().splitlines()[1 if size > EVENTS_READ_BYTES else 0 :]
    except FileNotFoundError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that a killed process left unfinished
            yield json.loads(line)


def _view(entry: Mapping[str, Any], now: float) -> ProcessView:
    pid = int(entry["pid"])
    if not is_alive(entry):
        return ProcessView(pid=pid, alive=False)
    try:
        process = psutil.Process(pid)
        stopped = process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        return ProcessView(pid=pid, alive=True, stopped=stopped, age_s=now - process.create_time())
    except psutil.Error:
        return ProcessView(pid=pid, alive=False)


def _look_at_stream(config: Config, run: RunDir) -> StreamView:
    url = os.environ.get(REDIS_URL_VARIABLE) if config.queue.url == "embedded" else config.queue.url
    url = url or EmbeddedServer(run.redis).url
    shown = redact_url(url)
    keys = Keys(config.run.name)
    try:
        with connect(url, role="doctor", socket_timeout_s=PING_TIMEOUT_S) as client:
            untyped: Any = client
            full_why, size, dead = untyped.hmget(keys.stats, "full_why", "bytes", "dead")
            return StreamView(
                url=shown,
                persistence=check_server(client).persistence,
                items=int(untyped.xlen(keys.traj)),
                bytes=int(size or 0),
                full_s=full_age_s(client, keys),
                full_why=full_why.decode() if full_why else "",
                dead=int(dead or 0),
            )
    except (RedisError, OSError, AgentRLError) as error:
        return StreamView(url=shown, error=f"{type(error).__name__}: {error}".splitlines()[0])


# -- judgement --------------------------------------------------------------------------------------------------------


def diagnose(s: Snapshot) -> list[Finding]:
    """The verdict first, then one finding per part."""
    return [judge(s), *_parts(s)]


def judge(s: Snapshot) -> Verdict:
    """The state of the run and, when nothing moves, the stage that is the cause."""
    if not any(s.is_live(role) for role in ("run", "serve", "learn")):
        return _at_rest(s)
    for cause in (_stopped, _stream_down, _missing, _silent, _quiet):
        found = cause(s)
        if found is not None:
            return _disk_full(s, found) if s.free_bytes < DISK_LOW_BYTES and found.waits_for != "SIGCONT" else found
    if not s.serve or not s.learn:
        return Verdict("run", "ok", "starting: not every part has reported yet", state="starting")
    step = int(s.learn.get("policy_version", 0))
    return Verdict("run", "ok", f"moves: step {step} of {s.num_steps}; {_pace(s)}", state="moves")


def _disk_full(s: Snapshot, effect: Verdict) -> Verdict:
    """What stands still while nothing can be written stands still because of that."""
    text = f"{s.free_bytes / 2**20:.1f} MiB are left for the run; {effect.text}"
    return _stall(s, "disk", "free space", effect.since_s, text, "free space: the run goes on by itself, and nothing is lost")


def _at_rest(s: Snapshot) -> Verdict:
    step = int(s.learn.get("policy_version", 0))
    if s.complete:
        return Verdict("run", "ok", f"finished: {s.num_steps} steps", state="finished")
    again = "`agentrl run -c FILE` with the same config continues it from its newest checkpoint"
    text = f"stopped at step {step} of {s.num_steps}"
    if s.last_run_event == "run_failed":
        return Verdict(
            "run", "fail", f"failed: {text}", f"see logs/ and the last lines of events.jsonl; then {again}", state="stopped"
        )
    if s.last_run_event == "run_started":
        return Verdict("run", "fail", f"{text}: the supervisor was killed", again, state="stopped")
    return Verdict("run", "warn", text, again, state="stopped")


def _stopped(s: Snapshot) -> Verdict | None:
    """A halted process that others need."""
    for role in ("redis", "learn", "serve", "sandbox"):
        view = s.processes.get(role)
        if view is not None and view.alive and view.stopped:
            stage = "stream" if role == "redis" else role
            age = {"learn": s.learn_age_s, "serve": s.serve_age_s}.get(role, 0.0)
            return _stall(s, stage, "SIGCONT", age, f"{role} (pid {view.pid}) is stopped by a signal", f"kill -CONT {view.pid}")
    return None


def _stream_down(s: Snapshot) -> Verdict | None:
    if not s.stream.error:
        return None
    since = max(_wait_s(s.serve, "stream"), _wait_s(s.learn, "stream"))
    if s.stream.url.startswith("unix://") and s.is_live("run"):
        fix = "the supervisor starts it again; see redis/server.log if it does not come up"
    else:
        fix = "start the server again on the same data; serve and learn reconnect by themselves"
    return _stall(s, "stream", "redis", since, f"the stream's server at {s.stream.url} gives no answer ({s.stream.error})", fix)


def _missing(s: Snapshot) -> Verdict | None:
    for role in ("learn", "serve"):
        if s.is_live(role) or (role == "learn" and s.complete):
            continue
        age = s.learn_age_s if role == "learn" else s.serve_age_s
        gone_s = min(age, s.missing_s.get(role, age)) if (s.learn if role == "learn" else s.serve) else 0.0
        if s.is_live("run"):
            if max(gone_s, 0.0) <= RESTART_LIMIT_S:
                return Verdict("run", "ok", f"{role} is being started by the supervisor", state="starting")
            return _stall(s, role, "its restart", gone_s, f"{role} is not running", f"see logs/{role}.log")
        other = "serve" if role == "learn" else "learn"
        return _stall(
            s, role, "a start", gone_s, f"{role} is not running, {other} is", f"agentrl {role} -c FILE with the run's config"
        )
    return None


def _silent(s: Snapshot) -> Verdict | None:
    """Alive, and yet its loop does not turn."""
    for role, status, age in (("learn", s.learn, s.learn_age_s), ("serve", s.serve, s.serve_age_s)):
        view = s.processes.get(role)
        if view is None:
            continue
        if not status or int(status.get("pid", view.pid)) != view.pid:
            if view.age_s > max(START_LIMIT_S, s.limit_s):
                text = f"{role} (pid {view.pid}) has not reported since its start {view.age_s:.0f} s ago"
                return _stall(s, role, "its start", view.age_s, text, f"see logs/{role}.log")
        elif age > STALE_STATUS_S:
            text = f"{role} (pid {view.pid}) has not reported for {age:.0f} s: it hangs"
            return _stall(s, role, "itself", age, text, f"`py-spy dump --pid {view.pid}` shows where; see logs/{role}.log")
    return None


def _quiet(s: Snapshot) -> Verdict | None:
    """Everything runs and reports, but nothing comes of it."""
    learn_quiet, serve_quiet = float(s.learn.get("quiet_s", 0.0)), _serve_quiet(s)
    waits_on_learner = _wait_s(s.serve, "trainer") > 0 or _wait_s(s.serve, "stream") > 0
    doing = str(s.learn.get("doing", ""))
    if s.learn and doing not in ("", "group", "stream") and learn_quiet > s.limit_s:
        text = f"it is in its {doing} (after step {s.learn.get('policy_version', 0)})"
        fix = (
            "a step that long is normal only for large models (raise run.stall_warn_s); otherwise see logs/learn.log and the GPUs"
        )
        return _stall(s, "learn", doing, learn_quiet, text, fix)
    if not s.serve or serve_quiet <= s.limit_s:
        return None
    if waits_on_learner and s.learn and learn_quiet <= s.limit_s:
        return None  # the learner is the bottleneck, and it moves
    return _serve_stall(s, serve_quiet)


def _serve_stall(s: Snapshot, since: float) -> Verdict:
    """Why no rollout ends, from the most specific cause to the least."""
    engines = [cast("Mapping[str, Any]", e) for e in s.serve.get("engines", [])]
    tools: Mapping[str, Mapping[str, float]] = s.serve.get("tools") or {}
    for name, stats in tools.items():
        if stats.get("circuit_open"):
            counts = (
                f"{stats.get('infra_errors', 0):.0f} of its {stats.get('calls', 0):.0f} calls failed outside the model's control"
            )
            return _stall(s, f"tool:{name}", "the tool's service", since, f"its circuit is open: {counts}", _tool_fix(name))
    if _wait_s(s.serve, "weights") > 0 and not s.learn:
        return _stall(
            s, "weights", "a policy", since, "no learner has announced a policy", "start `agentrl learn` with the run's config"
        )
    if not any(e.get("state") in HEALTHY_ENGINE for e in engines):
        return _stall(
            s,
            "engine",
            "a usable engine",
            since,
            _fleet(engines),
            "see logs/engine-*.log; a server is used once it loads the announced policy",
        )
    if failing := str(s.serve.get("failing") or ""):
        stage = {"reward": "reward", "tool_infra": "tool", "sandbox": "sandbox"}.get(failing, "serve")
        counts = s.serve.get("failed") or {}
        text = f"nearly every rollout fails with {failing!r} (failed so far: {counts})"
        return _stall(
            s,
            stage,
            f"an end of {failing} failures",
            since,
            text,
            "the errors are in events.jsonl (rollout_failed) and logs/serve.log",
        )
    reason, oldest = _longest_wait(s)
    match reason.partition(":")[0]:
        case "tool":
            return _stall(
                s, reason, "the tool's answer", oldest, f"{_count(s, reason)} calls have no answer", _tool_fix(reason[5:])
            )
        case "reward":
            return _stall(
                s,
                "reward",
                "the scorer",
                oldest,
                f"{_count(s, reason)} rollouts wait to be scored",
                "look at the env's score or reward.fn: it hangs",
            )
        case "server" if engines and all(e.get("state") == "updating" for e in engines):
            return _stall(
                s, "weights", "an update of the engines", oldest, _fleet(engines), "see logs/serve.log for the update's error"
            )
        case "env" | "agent":
            what = f"the environment {reason[4:]}" if reason.startswith("env:") else "the black-box agents"
            text = f"{_count(s, reason)} rollouts wait for {what}"
            fix = (
                "it hangs; serve.env_timeout_s bounds a reply"
                if reason.startswith("env:")
                else "serve.rollout_timeout_s ends one"
            )
            return _stall(s, reason, what, oldest, text, fix)
        case "server":
            text = f"{_count(s, 'server')} requests are out and no token came back ({_fleet(engines)})"
            return _stall(s, "engine", "tokens", oldest, text, "see logs/engine-*.log; serve.turn_timeout_s moves requests on")
        case "weights":
            return _stall(
                s, "weights", "an update of the engines", oldest, _fleet(engines), "see logs/serve.log for the update's error"
            )
        case "stream":
            return _stall(
                s,
                "learn",
                "room on the stream",
                oldest,
                _full(s),
                "learn frees it by reading and by checkpoints (learn.save_every, queue.max_bytes)",
            )
        case "trainer":
            text = "serve is at its staleness bound and learn has no complete batch: groups were lost or are still open"
            return _stall(s, "serve", "the trainer", oldest, text, "run `agentrl audit` and `agentrl ledger` on this run")
        case _:
            text = f"no rollout ended; it waits for {reason or 'nothing it names'}"
            return _stall(s, "serve", reason or "itself", since, text, "see logs/serve.log")


def _stall(s: Snapshot, stage: str, waits_for: str, since_s: float, text: str, fix: str) -> Verdict:
    return Verdict(
        "run", "fail", text, fix,
        state="stalled", stage=stage, waits_for=waits_for, since_s=round(max(since_s, 0.0), 1),
        oldest_rollout=str(s.serve.get("oldest_rollout") or ""),
        oldest_rollout_s=round(float(s.serve.get("oldest_rollout_s") or 0.0), 1),
    )  # fmt: skip


# -- the parts --------------------------------------------------------------------------------------------------------


def _parts(s: Snapshot) -> Iterator[Finding]:
    at_rest = not any(s.is_live(role) for role in ("run", "serve", "learn"))
    live = ", ".join(f"{role} {view.pid}" for role, view in sorted(s.processes.items()) if view.alive)
    yield Finding("processes", "ok", live or "none is running")
    if at_rest:
        return
    for role, status, age in (("serve", s.serve, s.serve_age_s), ("learn", s.learn, s.learn_age_s)):
        if status:
            yield Finding(role, "ok", f"{_waits(status)} (reported {age:.0f} s ago)")
        else:
            yield Finding(role, "warn", "has not reported yet")
    yield _stream_part(s)
    for view_role, view in s.processes.items():
        if view.alive and view.stopped and view_role.startswith("engine"):
            yield Finding(view_role, "warn", f"pid {view.pid} is stopped by a signal", f"kill -CONT {view.pid}")
    for engine in s.serve.get("engines", []):
        if engine.get("state") not in HEALTHY_ENGINE:
            why = engine.get("reason") or "it has not loaded the announced policy"
            yield Finding("engine", "warn", f"{engine.get('url')} is {engine.get('state')}: {why}", "see logs/engine-*.log")
    problem: Mapping[str, Any] = (s.serve.get("policy") or {}).get("problem") or {}
    if problem:
        instead = f"{problem.get('serving')} is served instead" if problem.get("serving") else "nothing is served"
        text = f"no server could load {problem.get('label')} ({problem.get('error')}); {instead}, it is tried again by itself"
        yield Finding("weights", "warn", text, "see logs/engine-*.log and the files under weights/; the next version replaces it")
    for name, stats in (s.serve.get("tools") or {}).items():
        if stats.get("circuit_open"):
            yield Finding(f"tool:{name}", "warn", "its circuit is open: no new rollouts start", _tool_fix(name))


def _stream_part(s: Snapshot) -> Finding:
    if s.stream.error:
        return Finding("stream", "fail", f"{s.stream.url}: {s.stream.error}", "start the server again on the same data")
    text = f"{s.stream.items} entries, {s.stream.bytes / 2**20:.1f} MiB; durability {s.stream.persistence}; dead letters {s.stream.dead}"
    if s.stream.persistence != "always":
        loss = {"everysec": "up to about 2 s of acknowledged entries", "off": "everything"}.get(
            s.stream.persistence, "some entries"
        )
        fix = "CONFIG SET appendonly yes, CONFIG SET appendfsync always"
        return Finding("stream", "warn", f"{text}: a crash of the server loses {loss}", fix)
    return Finding("stream", "ok", text)


def _waits(status: Mapping[str, Any]) -> str:
    waits: Mapping[str, Mapping[str, float]] = status.get("waits") or {}
    texts = [f"waits for {reason} ({w['count']:.0f}, oldest {w['oldest_s']:.0f} s)" for reason, w in waits.items()]
    return "; ".join(texts) or "moves"


def _pace(s: Snapshot) -> str:
    if _wait_s(s.serve, "trainer") > 0:
        return "generation is ahead by the allowed staleness: the learner is the bottleneck (healthy)"
    if _wait_s(s.learn, "group") > 0:
        return "learn waits for groups: generation is the bottleneck"
    return "no stage waits long"


def _serve_quiet(s: Snapshot) -> float:
    """Seconds without progress. While everything fails, tokens that come to nothing are no progress."""
    tools: Mapping[str, Mapping[str, float]] = s.serve.get("tools") or {}
    in_vain = bool(s.serve.get("failing")) or any(stats.get("circuit_open") for stats in tools.values())
    return float(s.serve.get("finished_s" if in_vain else "quiet_s") or 0.0)


def _wait_s(status: Mapping[str, Any], reason: str) -> float:
    waits: Mapping[str, Mapping[str, float]] = status.get("waits") or {}
    return max((float(w["oldest_s"]) for name, w in waits.items() if name.partition(":")[0] == reason), default=0.0)


def _longest_wait(s: Snapshot) -> tuple[str, float]:
    """What rollouts wait for; being full or ahead (``capacity``, ``group``) is an effect of that, never the cause."""
    waits: Mapping[str, Mapping[str, float]] = s.serve.get("waits") or {}
    causes = {reason: float(w["oldest_s"]) for reason, w in waits.items() if reason not in ("capacity", "group")}
    # A tool or scorer is waited for by name; the generic "trainer" only counts when nothing in flight waits.
    in_flight = {reason: age for reason, age in causes.items() if reason != "trainer"} or causes or {"": 0.0}
    # An agent's whole life is one wait, which covers what the agent itself waits for: an engine, say.
    in_flight = {reason: age for reason, age in in_flight.items() if reason != "agent"} or in_flight
    reason = max(in_flight, key=lambda name: in_flight[name])
    return reason, in_flight[reason]


def _count(s: Snapshot, reason: str) -> int:
    return int((s.serve.get("waits") or {}).get(reason, {}).get("count", 0))


def _fleet(engines: list[Mapping[str, Any]]) -> str:
    if not engines:
        return "no engine has answered yet"
    return "; ".join(f"{e.get('url')} {e.get('state')}" + (f" ({e['reason']})" if e.get("reason") else "") for e in engines)


def _full(s: Snapshot) -> str:
    bound = f"{s.queue_bytes / 2**20:.0f} MiB" if s.stream.full_why == "bytes" else "its entries"
    return f"the stream is full by {s.stream.full_why or 'a bound'} ({bound}; {s.stream.items} entries, {s.stream.bytes / 2**20:.1f} MiB)"


def _tool_fix(name: str) -> str:
    return f"repair or restart the service behind {name!r} (logs/sandbox.log for code tools); lower its timeout_s to fail sooner"
