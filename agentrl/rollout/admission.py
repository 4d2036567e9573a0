"""May another group start? Pure: numbers in, a number out.

Two knobs bound how far generation runs ahead of training. ``max_staleness`` is the hard bound in policy versions;
``pipeline_depth`` is how many steps' worth of groups one wants in the pipe. A group admitted now finds at most
``(min(max_staleness, pipeline_depth) + 1) * groups_per_step - 1`` unconsumed groups before it. Consumed in order, it is
therefore trained at most ``min(max_staleness, pipeline_depth)`` versions later. Groups that finish out of order can be
older; the learner checks again at consumption.
"""


def group_budget(*, groups_per_step: int, max_staleness: int, pipeline_depth: int) -> int:
    """How many groups may be open or unconsumed at once; never less than one step needs.

    Raises:
        ValueError: a negative bound, or a step of no groups.
    """
    if groups_per_step < 1 or max_staleness < 0 or pipeline_depth < 0:
        raise ValueError(
            f"groups_per_step={groups_per_step}, max_staleness={max_staleness}, pipeline_depth={pipeline_depth}: "
            "groups_per_step must be at least 1, the others at least 0"
        )
    return (min(max_staleness, pipeline_depth) + 1) * groups_per_step


def admit(
    *,
    open_groups: int,
    closed_groups: int,
    consumed_groups: int,
    groups_per_step: int,
    max_staleness: int,
    pipeline_depth: int,
    unfinished_rollouts: int = 0,
    in_flight: int | None = None,
    group_size: int = 1,
) -> int:
    """Groups that may start now.

    Args:
        open_groups: started and not closed. Counted before ``closed_groups`` is read: a group that closes in between is
            then counted twice (too careful) and never missed (too bold).
        closed_groups: closed since the run began, from the stream.
        consumed_groups: of those, how many have left for any reason: trained, filtered, stale or failed. A discarded group
            that is not counted here would hold its place for ever.
        groups_per_step: groups the learner takes per optimizer step.
        max_staleness: policy versions, the hard bound.
        pipeline_depth: steps of work wanted ahead.
        unfinished_rollouts: rollouts of open groups that run or wait for a permit.
        in_flight: rollouts that may run at once; None is no limit.
        group_size: rollouts per group.
    """
    budget = group_budget(groups_per_step=groups_per_step, max_staleness=max_staleness, pipeline_depth=pipeline_depth)
    by_staleness = budget - (open_groups + closed_groups - consumed_groups)
    if in_flight is None:
        return max(0, by_staleness)
    # The last group may be admitted for a part of its members: a permit left idle is throughput lost.
    by_load = -(-max(0, in_flight - unfinished_rollouts) // group_size)
    return max(0, min(by_staleness, by_load))
