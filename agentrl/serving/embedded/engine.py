"""The thread that owns the model, and the requests it works on.

Everything that touches model, cache or scheduler runs on that one thread, between steps: `Engine.submit`, `abort`,
`pause`, `update` and so on only leave it a note. It waits for notes when nothing is in flight or generation is paused;
the HTTP side unblocks it. The HTTP side waits for `Job.changed`; this thread wakes it after each step.
"""

import asyncio
import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from agentrl.errors import WeightSyncError
from agentrl.serving.embedded.checkpoint import CheckpointReader, Staged, copy_into
from agentrl.serving.embedded.continuous_batching import ContinuousBatch, SampledToken, Sampling

logger = logging.getLogger(__name__)

PauseMode = Literal["abort", "retract", "in_place"]
Result = TypeVar("Result")

_THROUGHPUT_WINDOW_S = 1.0
_IDLE_STEP_S = 0.001  # a step that could schedule nothing must not spin


class EngineFailed(RuntimeError):
    """The engine thread died; every request was ended and no new one is taken."""


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request. The engine thread appends; readers may look at any time up to ``len(logprobs)``."""

    rid: str
    prompt: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    sampling: Sampling
    score_from: int = -1
    """First prompt position whose logprob is wanted; -1 for none."""
    is_streamed: bool = False
    loop: asyncio.AbstractEventLoop
    created: float = field(default_factory=time.perf_counter)
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    spans: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """(weight version, index of its first output token), in order."""
    prompt_logprobs: list[float | None] | None = None
    cached_tokens: int = 0
    num_retractions: int = 0
    finish: dict[str, Any] | None = None
    version: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, on ``loop``, when there is something new for a reader."""

    def weight_versions(self) -> list[dict[str, Any]]:
        """SGLang's spans: ``[{version, start, end}]`` over output tokens, end exclusive."""
        spans = self.spans or [(self.version, 0)]
        ends = [start for _, start in spans[1:]] + [len(self.logprobs)]
        return [{"version": v, "start": start, "end": end} for (v, start), end in zip(spans, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is."""

    num_running: int
    num_waiting: int
    num_paused: int
    num_retracted: int
    used_tokens: int
    capacity_tokens: int
    generated_tokens: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generation_throughput: float
    """Output tokens per second over the last second or so."""


class _Note:
    """Something to do between two steps, and its outcome."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.answer: Future[Any] = Future()
        self._function = function

    def run(self) -> None:
        """Only a refused update is the caller's affair; after anything else the engine's state is unknown."""
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self._function())
        except WeightSyncError as error:
            self.answer.set_exception(error)
        except BaseException as error:
            self.answer.set_exception(error)
            raise


class Engine:
    """Generation, pauses and weight updates, in the order they were asked for.

    Args:
        model: the causal LM, in ``eval`` mode.
        batch: over the same model; from now on used by this engine's thread only.
        reader: checks checkpoints for ``model``.
        weight_version: label of the weights the model was loaded with.
        model_path: where they came from.
        weights_digest: of that directory.
        on_failure: called on the engine thread when it dies of an exception.
    """

    def __init__(
        self,
        model: Any,
        batch: ContinuousBatch,
        reader: CheckpointReader,
        *,
        weight_version: str,
        model_path: str,
        weights_digest: str,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.weight_version = weight_version
        self.model_path = model_path
        self.weights_digest = weights_digest
        self.is_paused = False
        self.failure: BaseException | None = None
        self._model = model
        self._batch = batch
        self._reader = reader
        self.on_failure = on_failure
        self._jobs: dict[str, Job] = {}
        self._notes: queue.SimpleQueue[_Note | None] = queue.SimpleQueue()
        self._woken: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        self._totals = {"generated": 0, "prompt": 0, "cached": 0, "retracted": 0}
        self._window = (time.perf_counter(), 0, 0.0)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------ any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every request with what it has, then end the thread."""
        self._notes.put(None)
        self._thread.join(timeout=30)

    @property
    def capacity_tokens(self) -> int:
        return self._batch.capacity_tokens

    def is_live(self, rid: str) -> bool:
        """Whether a request of this id is in flight."""
        return rid in self._jobs

    def submit(self, job: Job) -> None:
        """Start a request. Its rid must not be live.

        Raises:
            EngineFailed: the engine thread is dead.
        """
        self._check_alive()
        self._jobs[job.rid] = job
        self._notes.put(_Note(lambda: self._admit(job)))

    def abort(self, rid: str) -> None:
        """End one request with what it has. Unknown ids are ignored; works while paused, too."""
        if rid in self._jobs:
            self._notes.put(_Note(lambda: self._abort([rid])))

    async def abort_all(self) -> None:
        """End every request with what it has."""
        await self._call(lambda: self._abort(list(self._jobs)))

    async def pause(self, mode: PauseMode) -> None:
        """Generate nothing from the next step on; new requests are taken and held.

        ``abort`` ends what is in flight with what it has, ``retract`` drops its cache and will prefill it anew,
        ``in_place`` leaves it as it is.
        """

        def pause() -> None:
            self.is_paused = True
            if mode == "abort":
                self._abort(list(self._jobs))
            elif mode == "retract":
                self._retract()

        await self._call(pause)

    async def resume(self) -> None:
        """Go on. Harmless when not paused."""

        def resume() -> None:
            self.is_paused = False

        await self._call(resume)

    async def flush_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing done, while requests are in flight or queued."""

        def flush() -> bool:
            if self._jobs:
                return False
            self._batch.forget_cache()
            return True

        return await self._call(flush)

    async def set_weight_version(self, version: str, *, abort_all: bool) -> None:
        """Rename the weights that are loaded."""

        def rename() -> None:
            if abort_all:
                self._abort(list(self._jobs))
            self.weight_version = version

        await self._call(rename)

    async def update(
        self,
        model_path: str,
        *,
        version: str | None,
        flush_cache: bool,
        abort_all: bool,
        expected_digest: str | None,
    ) -> int:
        """Load a checkpoint between two steps.

        Without a pause, or after a ``retract`` pause, requests in flight are prefilled anew: what they generate from
        here on is exactly the new model's. Under an ``in_place`` pause they keep the cache they have.

        Args:
            model_path: Hugging Face directory.
            version: new label; None keeps the old one.
            flush_cache: refuse when an ``in_place`` pause holds requests whose cache cannot be flushed. Prefixes of the
                old weights are never reused, whatever this says.
            abort_all: end requests in flight first.
            expected_digest: refuse other weights.

        Returns:
            Requests in flight that go on.

        Raises:
            WeightSyncError: refused; the old weights serve on.
        """
        # Reading and checking happens beside generation; only the copy stops it.
        staged = await asyncio.to_thread(self._reader.stage, model_path, expected_digest=expected_digest)
        return await self._call(lambda: self._apply(staged, version=version, flush_cache=flush_cache, abort_all=abort_all))

    async def checksums(self) -> dict[str, str]:
        """A 16-digit checksum of every tensor the model serves with, by name."""

        def checksums() -> dict[str, str]:
            state: dict[str, Tensor] = self._model.state_dict()
            return {name: _checksum(tensor) for name, tensor in state.items()}

        return await self._call(checksums)

    def load(self) -> Load:
        """A snapshot, as of the last step."""
        began, at_start, rate = self._window
        idle = time.perf_counter() - began > 2 * _THROUGHPUT_WINDOW_S and self._totals["generated"] == at_start
        running = self._batch.num_active
        return Load(
            num_running=0 if self.is_paused else running,
            num_waiting=max(0, len(self._jobs) - running),
            num_paused=running if self.is_paused else 0,
            num_retracted=self._totals["retracted"],
            used_tokens=self._batch.used_tokens,
            capacity_tokens=self._batch.capacity_tokens,
            generated_tokens=self._totals["generated"],
            prompt_tokens=self._totals["prompt"],
            cached_prompt_tokens=self._totals["cached"],
            generation_throughput=0.0 if idle else rate,
        )

    async def _call(self, function: Callable[[], Result]) -> Result:
        """Run ``function`` on the engine thread between two steps."""
        self._check_alive()
        note = _Note(function)
        self._notes.put(note)
        if self.failure is not None:  # it may have died before it could see the note
            self._refuse_notes()
        return await asyncio.wrap_future(note.answer)

    def _check_alive(self) -> None:
        if self.failure is not None or not self._thread.is_alive():
            raise EngineFailed(f"the engine thread is dead ({self.failure!r}): restart the server")

    # ------------------------------------------------------------------ the engine thread

    def _run(self) -> None:
        try:
            while self._take_notes():
                if self._can_step():
                    sampled = self._batch.step()
                    self._record(sampled)
                    if not sampled and not self._batch.num_active:
                        time.sleep(_IDLE_STEP_S)
                self._deliver()
            self._abort(list(self._jobs))
        except BaseException as error:  # noqa: BLE001 (a thread's edge: whatever it was, the server must say so and stop)
            logger.exception("engine thread died in_flight=%d", len(self._jobs))
            self.failure = error
            finish = {"type": "abort", "message": f"engine failed: {error!r}", "status_code": 500, "err_type": "engine"}
            for job in list(self._jobs.values()):
                self._end(job, finish)
            self._refuse_notes()
            self.on_failure()
        finally:
            self._deliver()

    def _refuse_notes(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                note = self._notes.get_nowait()
                if note is not None:
                    note.answer.set_exception(EngineFailed(f"the engine thread died: {self.failure!r}"))

    def _can_step(self) -> bool:
        return not self.is_paused and bool(self._batch.num_active or self._batch.num_waiting)

    def _take_notes(self) -> bool:
        """Do what was asked; blocks while there is nothing else to do. False when asked to stop."""
        with contextlib.suppress(queue.Empty):
            is_idle = not self._can_step()
            while True:
                note = self._notes.get(block=is_idle)
                if note is None:
                    return False
                note.run()
                is_idle = False
        return True

    def _admit(self, job: Job) -> None:
        if job.finish is not None:
            return
        self._totals["prompt"] += len(job.prompt)
        if job.score_from >= 0:
            job.prompt_logprobs = [None, *self._batch.score(job.prompt)[job.score_from :]]
        if job.max_new_tokens == 0:
            job.version = self.weight_version
            self._end(job, {"type": "length", "length": 0})
            return
        self._batch.add(job.rid, job.prompt, max_new_tokens=job.max_new_tokens, stop_ids=job.stop_ids, sampling=job.sampling)

    def _record(self, sampled: Sequence[SampledToken]) -> None:
        version = self.weight_version
        for token in sampled:
            job = self._jobs[token.request_id]
            if not job.spans or job.spans[-1][0] != version:
                job.spans.append((version, len(job.logprobs)))
            if not job.logprobs:
                job.cached_tokens = self._batch.cached_tokens(job.rid)
                self._totals["cached"] += job.cached_tokens
            job.ids.append(token.token)
            job.logprobs.append(token.logprob)  # last: readers go by its length
            job.version = version
            if token.is_last:
                self._batch.finish(job.rid)
                self._end(job, _natural_finish(job, token.token))
            elif job.is_streamed:
                self._wake(job)
        self._totals["generated"] += len(sampled)
        self._measure()

    def _measure(self) -> None:
        began, at_start, _ = self._window
        now = time.perf_counter()
        if now - began >= _THROUGHPUT_WINDOW_S:
            generated = self._totals["generated"]
            self._window = (now, generated, (generated - at_start) / (now - began))

    def _abort(self, rids: Sequence[str]) -> None:
        jobs = [self._jobs[rid] for rid in rids if rid in self._jobs]
        self._batch.cancel([job.rid for job in jobs])
        for job in jobs:
            self._end(job, {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})

    def _retract(self) -> None:
        for rid in self._batch.retract():
            self._jobs[rid].num_retractions += 1
            self._totals["retracted"] += 1

    def _apply(self, staged: Staged, *, version: str | None, flush_cache: bool, abort_all: bool) -> int:
        if abort_all:
            self._abort(list(self._jobs))
        if not self.is_paused:
            self._retract()
        if flush_cache and self._batch.num_active:
            raise WeightSyncError(
                f"flush_cache=true, but an in_place pause holds the cache of {self._batch.num_active} requests; the old weights "
                f"({self.weight_version}) serve on. Send flush_cache=false, or pause with mode=retract."
            )
        copy_into(self._model, staged)
        self._batch.weights_changed()
        self.model_path, self.weights_digest = str(staged.path), staged.digest
        if version is not None:
            self.weight_version = version
        logger.info("weights updated version=%s path=%s in_flight=%d", self.weight_version, staged.path, len(self._jobs))
        return len(self._jobs)

    def _end(self, job: Job, finish: dict[str, Any]) -> None:
        if not job.version:
            job.version = self.weight_version
        job.finish = finish
        self._jobs.pop(job.rid, None)
        self._wake(job)

    def _wake(self, job: Job) -> None:
        self._woken.setdefault(job.loop, []).append(job)

    def _deliver(self) -> None:
        """Wake readers, once per event loop and step: a call per token would cost more than the token."""
        woken, self._woken = self._woken, {}
        for loop, jobs in woken.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(_set_all, jobs)


def _set_all(jobs: list[Job]) -> None:
    for job in jobs:
        job.changed.set()


def _natural_finish(job: Job, last: int) -> dict[str, Any]:
    if last in job.stop_ids:
        return {"type": "stop", "matched": last}
    return {"type": "length", "length": job.max_new_tokens}


def _checksum(tensor: Tensor) -> str:
    data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
