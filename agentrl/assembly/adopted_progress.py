"""Admission counts on what the servers sample: the stream's progress, as far as serve has followed the learner."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.stream.policy import Progress


def counted_on(reconciler: WeightReconciler, *, max_behind: int) -> tuple[int, int] | None:
    """Run epoch and version that admission may count on, as of the reconciler's work now.

    That is the announced policy, being loaded or loaded. One that no server could load is different: the previous one goes on
    sampling, and counts as long as what it samples stays within ``max_behind`` versions.
    """
    record, problem = reconciler.announced, reconciler.problem
    if problem is not None and problem.behind > max_behind:
        record = reconciler.target
    return (record.run_epoch, record.version) if record is not None else None


class AdoptedProgress:
    """The stream's progress, with room for new groups only once the servers are being brought to that policy.

    The learner's announcement frees places a moment before any server has the new weights. A group started in between would be
    sampled by the old ones: one version staler than admission counted on.

    Args:
        read: the stream's progress.
        served: run epoch and version that admission may count on; None before the first policy.
    """

    def __init__(self, read: Callable[[], Awaitable[Progress]], served: Callable[[], tuple[int, int] | None]) -> None:
        self._read, self._served = read, served
        self._adopted: Progress | None = None

    async def __call__(self) -> Progress:
        progress = await self._read()
        served = self._served()
        if served is not None and served >= (progress.run_epoch, progress.version):
            self._adopted = progress
        if self._adopted is None or self._adopted is progress:
            return progress
        return replace(progress, consumed_groups=min(progress.consumed_groups, self._adopted.consumed_groups))
