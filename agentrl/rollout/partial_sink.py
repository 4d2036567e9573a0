"""The stream's side of a worker that forgets snapshots once what they were for is decided."""

from collections.abc import Iterable, Sequence

from agentrl.rollout.group import GroupPlan, possible_ids
from agentrl.rollout.partial import PartialRollouts
from agentrl.rollout.worker import GroupSink
from agentrl.types import GroupClose, Trajectory


class PartialSink(GroupSink):
    """Passes everything on; a snapshot goes after its trajectory is put, and at the latest with its group's close."""

    def __init__(self, sink: GroupSink, partials: PartialRollouts, *, attempts: int) -> None:
        self._sink = sink
        self._partials = partials
        self._attempts = attempts

    async def put_trajectory(self, trajectory: Trajectory) -> None:
        await self._sink.put_trajectory(trajectory)
        await self._partials.delete(trajectory.id)

    async def close_group(self, close: GroupClose) -> None:
        await self._sink.close_group(close)
        plan = GroupPlan(size=close.size, attempts=self._attempts)
        await self._partials.delete(*possible_ids(close.group_id, plan))

    async def present(self, ids: Sequence[str]) -> set[str]:
        return await self._sink.present(ids)

    async def next_open_ordinal(self) -> int:
        return await self._sink.next_open_ordinal()

    async def is_closed(self, ordinals: Iterable[int]) -> set[int]:
        return await self._sink.is_closed(ordinals)
