"""Latency and throughput of every sandbox backend on this machine, both sides in one run; prints a Markdown table.

python bench/sandbox.py                       # each backend that works here, sessions, and a plain subprocess
python bench/sandbox.py --tiers zygote --runs 500 --preload numpy --preload sympy
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from agentrl.errors import SandboxError
from agentrl.sandbox.job import MIB, Job, Limits
from agentrl.sandbox.pool import Pool, TierChoice

PROGRAMS = {
    "trivial": "print(6 * 7)",
    "numpy": "import numpy as np\nprint(round(float(np.linalg.det(2 * np.eye(3)))))",
    "sympy": "import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - 2, x))",
}
TIERS: tuple[TierChoice, ...] = ("unsafe", "bubblewrap", "nsjail", "zygote-landlock", "zygote")
LIMITS = Limits(wall_s=10.0, memory_bytes=512 * MIB, cpu_s=3600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    backend: str
    program: str
    p50_ms: float
    p99_ms: float
    per_s: float

    def markdown(self) -> str:
        return f"| {self.backend} | {self.program} | {self.p50_ms:.1f} | {self.p99_ms:.1f} | {self.per_s:.0f} |"


async def measure(backend: str, program: str, once: Callable[[int], Awaitable[None]], runs: int, at_once: int) -> Row:
    """``runs`` one after the other for the percentiles, then as many, ``at_once`` in flight, for the throughput."""
    for _ in range(3):
        await once(0)
    seconds: list[float] = []
    for _ in range(runs):
        started = time.perf_counter()
        await once(0)
        seconds.append(time.perf_counter() - started)
    seconds.sort()
    left = iter(range(runs))

    async def worker(slot: int) -> None:
        for _ in left:
            await once(slot)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for slot in range(at_once):
            group.create_task(worker(slot))
    elapsed = time.perf_counter() - started
    return Row(
        backend=backend,
        program=program,
        p50_ms=1000 * seconds[len(seconds) // 2],
        p99_ms=1000 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        per_s=runs / elapsed,
    )


async def bench_tier(tier: TierChoice, preload: Sequence[str], runs: int, at_once: int) -> list[Row]:
    pool = Pool(tier=tier, workers=min(2, os.cpu_count() or 1), preload=preload, allow_unsafe=tier == "unsafe")
    rows: list[Row] = []
    name = "plain subprocess (no isolation)" if tier == "unsafe" else tier
    async with pool.running():
        for program, code in PROGRAMS.items():

            async def once(slot: int, code: str = code, program: str = program) -> None:
                outcome = await pool.run(Job(code=code, limits=LIMITS), slot)
                if outcome.code != 0:
                    raise SandboxError(f"{program} failed on {tier}: {outcome.stderr[-500:]}")

            slow = program != "trivial" and not (tier.startswith("zygote") and program in preload)
            rows.append(await measure(name, program, once, max(10, runs // 10) if slow else runs, at_once))
        if tier == "zygote":
            rows.append(await bench_sessions(pool, runs, at_once))
    return rows


async def bench_sessions(pool: Pool, runs: int, at_once: int) -> Row:
    kernels = [await pool.open_session(LIMITS, 100 + index) for index in range(at_once)]
    try:

        async def cell(slot: int) -> None:
            await kernels[slot].run("print(6 * 7)", wall_s=5.0, echo=True, rich=False)

        return await measure("session cell (zygote)", "trivial", cell, 4 * runs, at_once)
    finally:
        for kernel in kernels:
            await kernel.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiers", nargs="*", default=list(TIERS), choices=TIERS)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--preload", action="append", default=None)
    given = parser.parse_args()
    preload = given.preload if given.preload is not None else ["numpy", "sympy"]
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, preload {preload}\n")
    print(f"| backend | program | p50 ms | p99 ms | per s, {given.at_once} at once |\n|---|---|---:|---:|---:|")
    for tier in given.tiers:
        try:
            for row in asyncio.run(bench_tier(tier, preload, given.runs, given.at_once)):
                print(row.markdown(), flush=True)
        except SandboxError as error:
            print(f"| {tier} | not available here: {str(error)[:120]} | | | |", flush=True)


if __name__ == "__main__":
    import logging

    logging.disable(logging.WARNING)  # the unsafe backend warns on every run
    main()
