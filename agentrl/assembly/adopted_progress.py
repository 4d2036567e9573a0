"""Admission counts on what the servers sample: the stream's progress, as far as serve has followed the learner."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.stream.policy import Progress


class AdoptedProgress:
    """The stream's progress, with room for new groups only once the servers are being brought to that policy.

    The learner's announcement frees places a moment before any server has the new weights. A group started in between would be
    sampled by the old ones: one version staler than admission counted on. A policy that no server could load is different:
    the previous one goes on sampling, as long as what it samples stays within ``max_behind`` versions.
    """

    def __init__(self, read: Callable[[], Awaitable[Progress]], reconciler: WeightReconciler, *, max_behind: int) -> None:
        self._read, self._reconciler, self._max_behind = read, reconciler, max_behind
        self._adopted: Progress | None = None

    async def __call__(self) -> Progress:
        progress = await self._read()
        target, problem = self._reconciler.announced, self._reconciler.problem
        if problem is not None and problem.behind > self._max_behind:
            target = self._reconciler.target
        if target is not None and (target.run_epoch, target.version) >= (progress.run_epoch, progress.version):
            self._adopted = progress
        if self._adopted is None or self._adopted is progress:
            return progress
        return replace(progress, consumed_groups=min(progress.consumed_groups, self._adopted.consumed_groups))
