"""The event loop's clock, moved by a test: a limit of minutes passes now, and nothing that was to end before it can be late.

A test of what happens at a limit has to reach it. A short limit is reached by real time, but on a busy machine it also passes before what
was meant to happen first. So: a limit that no machine reaches, an event that says that all is in place, then `pass_time`.

    running = asyncio.create_task(rollout(timeout_s=200))
    await asked.wait()
    pass_time(200)
"""

import asyncio


def pass_time(seconds: float) -> None:
    """Move the running loop's clock on: timers that are due by then fire next, in their order. Only loops of asyncio's own kind."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds
