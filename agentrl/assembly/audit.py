"""``agentrl audit`` and ``agentrl ledger``: proofs from the run directory and the stream, not from what the run says of itself."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import redis
import yaml

from agentrl.assembly.parts import stream_url
from agentrl.config import Config, parse_config
from agentrl.errors import ConfigError, DataError
from agentrl.stream.connection import connect
from agentrl.stream.dead_letters import original_id
from agentrl.stream.keys import Keys
from agentrl.stream.ledger import Books, Ledger, read_books, read_ledger
from agentrl.stream.put_ids import put_name
from agentrl.stream.server import EmbeddedServer
from agentrl.telemetry.run_dir import RunDir, read_jsonl
from agentrl.telemetry.trajectory_log import from_record, read_records
from agentrl.types import REQUEUED, Trajectory, content_digest

T = TypeVar("T")

MAX_SHOWN = 5


@dataclass
class Check:
    """One property, how often it was looked at, and where it is broken."""

    name: str
    checked: int = 0
    breaches: list[str] = field(default_factory=list[str])

    def expect(self, holds: bool, breach: str) -> None:
        self.checked += 1
        if not holds:
            self.breaches.append(breach)


@dataclass
class AuditReport:
    """Every check; clean when none is broken."""

    run: str
    step: int
    trained: int
    checks: list[Check]

    @property
    def clean(self) -> bool:
        return not any(c.breaches for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "clean": self.clean,
            "step": self.step,
            "trained": self.trained,
            "checks": [{"name": c.name, "checked": c.checked, "breaches": c.breaches} for c in self.checks],
        }

    def text(self) -> str:
        lines = [f"audit of {self.run}: checkpoint step {self.step}, {self.trained} trained trajectories"]
        for c in self.checks:
            lines.append(f"  {'ok    ' if not c.breaches else 'BREACH'} {c.name} ({c.checked} checked)")
            lines += [f"         {b}" for b in c.breaches[:MAX_SHOWN]]
            if len(c.breaches) > MAX_SHOWN:
                lines.append(f"         … and {len(c.breaches) - MAX_SHOWN} more")
        lines.append("clean: nothing lost, nothing twice, what was trained is what was sampled" if self.clean else "NOT clean")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Trained:
    """A line of ``trained_ids.jsonl``."""

    step: int
    id: str
    digest: str


@dataclass(frozen=True, slots=True)
class Consumed:
    """A line of ``ledger.jsonl``."""

    step: int
    id: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a checkpoint says of the steps that led to it."""

    checkpoint: str
    """Its name."""
    step: int
    """Its last."""
    trained: list[Trained]
    consumed: list[Consumed]


def audit_run(root: Path) -> AuditReport:
    """Check a run.

    Raises:
        ConfigError: it is no run directory, or has no checkpoint yet.
        DataError: a file of the run is not what it should be, with file and line.
    """
    run = RunDir.open(root)
    config = _config_of(run)
    newest_checkpoint(run)  # says so before the stream is asked when there is nothing to audit
    # In this order, so that a run may go on meanwhile: what is acknowledged now is in any later checkpoint, and what that one
    # contains was sampled, and logged, before.
    with stream_of(root) as (client, keys):
        books = read_books(client, keys)
    lineage = read_lineage(run)
    trained, decided = lineage.trained, {entry.id: entry.outcome for entry in lineage.consumed}
    sampled = _sampled_by_id(run)
    checks = [
        _once_each(trained),
        _as_sampled(trained, sampled),
        _well_formed(sampled),
        _fresh_enough(trained, sampled, config),
        *_acknowledged(books, config, trained, decided),
    ]
    return AuditReport(run=str(root), step=lineage.step, trained=len(trained), checks=checks)


def ledger_of(root: Path) -> Ledger:
    """The stream's book of the run; its own server is started for the look when it is not up."""
    with stream_of(root) as (client, keys):
        return read_ledger(client, keys)


@contextmanager
def stream_of(root: Path) -> Generator[tuple[redis.Redis, Keys]]:
    """A client of the run's stream; the run's own server is started for the block when it is not up.

    Raises:
        ConfigError: it is no run directory.
    """
    run = RunDir.open(root)
    config = _config_of(run)
    was_up = EmbeddedServer(run.redis).is_running()
    url = stream_url(config, run)
    try:
        with connect(url, role="audit") as client:
            yield client, Keys(config.run.name)
    finally:
        # Others may have started to use it meanwhile: `release` stops it only when nobody is connected.
        if (
            not was_up
            and not any(e["role"] in ("run", "serve", "learn") for e in run.processes())
            and EmbeddedServer(run.redis).release()
        ):
            run.deregister("redis")


def newest_checkpoint(run: RunDir) -> Path:
    """The checkpoint that ``latest`` names.

    Raises:
        ConfigError: there is none.
    """
    latest = run.checkpoints / "latest"
    folder = (
        latest.resolve() if latest.is_symlink() else run.checkpoints / latest.read_text().strip() if latest.is_file() else None
    )
    if folder is None or not folder.is_dir():
        raise ConfigError(f"{run.checkpoints} holds no checkpoint yet; there is nothing to audit before the first one")
    return folder


def read_lineage(run: RunDir) -> Lineage:
    """The newest checkpoint's lineage; read again when a newer one replaced it meanwhile.

    Raises:
        ConfigError: there is no checkpoint.
        DataError: a line is not what it should be, with file and line.
    """
    for attempt in range(5):
        checkpoint = newest_checkpoint(run)
        try:
            lineage = Lineage(
                checkpoint=checkpoint.name,
                step=int(json.loads((checkpoint / "state.json").read_text())["policy_version"]),
                trained=list(_entries(checkpoint / "trained_ids.jsonl", _trained, what="trained trajectory")),
                consumed=list(_entries(checkpoint / "ledger.jsonl", _consumed, what="entry with step and outcome")),
            )
        except FileNotFoundError:
            if attempt == 4:
                raise
            continue
        if checkpoint.is_dir():
            return lineage
    raise DataError(f"{run.checkpoints}: checkpoints are replaced faster than they can be read. Audit when the run pauses")


def _config_of(run: RunDir) -> Config:
    return parse_config(yaml.safe_load(run.config.read_text()), place=str(run.config))


def _trained(line: Mapping[str, Any]) -> Trained:
    return Trained(int(line["step"]), str(line["id"]), str(line["digest"]))


def _consumed(line: Mapping[str, Any]) -> Consumed:
    return Consumed(int(line["step"]), str(line["id"]), str(line["outcome"]))


def _entries(path: Path, read: Callable[[Mapping[str, Any]], T], *, what: str) -> Iterator[T]:
    for number, line in enumerate(read_jsonl(path), 1):
        try:
            yield read(line)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number} is no {what}: {error!r}") from error


def _sampled_by_id(run: RunDir) -> Mapping[str, list[Trajectory]]:
    found: dict[str, list[Trajectory]] = defaultdict(list)
    for record in read_records(run.trajectories):
        trajectory = from_record(record)
        found[trajectory.id].append(trajectory)
    return found


def _once_each(trained: Iterable[Trained]) -> Check:
    check = Check("each trained id exactly once in the checkpoint's lineage (I3)")
    for name, count in Counter(t.id for t in trained).items():
        check.expect(count == 1, f"{name} was trained {count} times")
    return check


def _as_sampled(trained: Iterable[Trained], sampled: Mapping[str, list[Trajectory]]) -> Check:
    check = Check("trained ids, mask, logprobs and versions equal the sampled ones (I1)")
    for entry in trained:
        candidates = sampled.get(original_id(entry.id), [])
        check.expect(bool(candidates), f"{entry.id} was trained at step {entry.step} but is not in trajectories/")
        if candidates:
            same = any(content_digest(t) == entry.digest for t in candidates)
            check.expect(same, f"{entry.id}: what was trained at step {entry.step} differs from what was sampled")
    return check


def _well_formed(sampled: Mapping[str, list[Trajectory]]) -> Check:
    check = Check("mask exactly on the sampled turns; logprobs and versions aligned (I1, I5)")
    for trajectories in sampled.values():
        for t in trajectories:
            check.expect(not (problem := _misaligned(t)), f"{t.id}: {problem}")
    return check


def _misaligned(t: Trajectory) -> str:
    for index, s in enumerate(t.segments):
        expected = np.zeros(len(s.ids), np.bool_)
        for turn in t.turns:
            if turn.kind == "model" and turn.segment == index:
                expected[turn.start : turn.end] = True
        if not np.array_equal(expected, s.mask):
            return f"segment {index}: the mask is on {int(s.mask.sum())} tokens, the model's turns sampled {int(expected.sum())}"
        if (s.versions[s.mask] < 0).any() or (s.versions[~s.mask] != -1).any():
            return f"segment {index}: versions do not follow the mask"
        if (s.logprobs[~s.mask] != 0).any() or (s.logprobs[s.mask] > 0).any() or not np.isfinite(s.logprobs).all():
            return f"segment {index}: logprobs do not follow the mask"
    return ""


def _fresh_enough(trained: Iterable[Trained], sampled: Mapping[str, list[Trajectory]], config: Config) -> Check:
    check = Check(f"staleness at consumption within learn.max_staleness={config.learn.max_staleness} (I4)")
    if config.learn.on_stale not in ("drop", "requeue"):
        return check
    for entry in trained:
        for t in sampled.get(original_id(entry.id), []):
            if content_digest(t) == entry.digest:
                staleness = abs(entry.step - 1 - t.min_version)
                check.expect(
                    staleness <= config.learn.max_staleness,
                    f"{entry.id}: sampled at version {t.min_version}, trained at {entry.step - 1}",
                )
                break
    return check


def _acknowledged(books: Books, config: Config, trained: list[Trained], decided: Mapping[str, str]) -> list[Check]:
    """What left the stream is in the checkpoint, and what is in neither was never put."""
    book, on_stream = books.ledger, set(books.on_stream)
    closes = Check("the ledger's sums close (I7)")
    closes.expect(book.closes, f"submitted {book.submitted} differs from the sum of the outcomes: {book.to_json()}")
    once = Check("each entry once on the stream (I3)")
    for name, count in Counter(books.on_stream).items():
        once.expect(count == 1, f"{name} is on the stream {count} times")
    if config.queue.ack_at != "checkpoint":
        return [closes, once]
    acked = Check("acknowledged outcomes equal the checkpoint's (I3)")
    lineage = {entry.id: "trained" for entry in trained}
    lineage |= {name: outcome for name, outcome in decided.items() if outcome in ("filtered", "stale", REQUEUED)}
    left = Counter(outcome for name, outcome in lineage.items() if put_name(name) in books.put and name not in on_stream)
    acknowledged = {
        "trained": book.trained,
        "filtered": book.filtered,
        "stale": book.stale - book.requeued,
        REQUEUED: book.requeued,
    }
    for outcome, seen in acknowledged.items():
        acked.expect(
            seen == left[outcome],
            f"the stream acknowledged {seen} {outcome}; of the checkpoint's, {left[outcome]} were put and have left it",
        )
    lost = Check("every trajectory put is decided in the checkpoint or still on the stream (I3)")
    gone = sorted(books.put - {put_name(name) for name in (*on_stream, *decided, *lineage)})
    explained = book.superseded + book.failed.get("dead_letter", 0)
    lost.checked = len(books.put)
    if len(gone) > explained:
        lost.breaches = [f"{name} was put, and is neither decided nor on the stream" for name in gone]
    return [closes, once, acked, lost]
