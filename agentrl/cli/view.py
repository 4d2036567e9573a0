"""The live terminal view of a run: reward curve, staleness, queue, tokens/s, engines. Reads the run directory only."""

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agentrl.telemetry.run_dir import RunDir

BLOCKS = " ▁▂▃▄▅▆▇█"
REFRESH_S = 0.5


class RunView:
    """Redraws on a terminal; elsewhere prints one line per step, so that logs stay readable."""

    def __init__(self, *, steps: int, console: Console, title: str = "agentrl") -> None:
        self._steps = steps
        self._console = console
        self._title = title
        self._started = time.monotonic()
        self._drawn = 0.0
        self._printed = 0
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None

    def __enter__(self) -> "RunView":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tick(self, run: RunDir) -> None:
        """Redraw when it is time; cheap to call often."""
        now = time.monotonic()
        if now - self._drawn < REFRESH_S:
            return
        self._drawn = now
        metrics = run.read_metrics()
        if self._live is not None:
            self._live.update(self._render(metrics, run.read_status("serve"), run.read_status("learn")))
        else:
            self._print_new(metrics)

    def _print_new(self, metrics: Sequence[dict[str, Any]]) -> None:
        if len(metrics) < self._printed:  # the learner went back to a checkpoint and set later steps aside
            self._printed = len(metrics)
        for m in metrics[self._printed :]:
            self._console.print(
                f"step {m['step']:>4}/{self._steps}  reward {m.get('reward/mean', math.nan):.3f}  "
                f"staleness {m.get('training/off_policy/trajectory_staleness/mean', math.nan):.2f}  "
                f"grad norm {m.get('actor/grad_norm', math.nan):.3f}  {m.get('perf/throughput', math.nan):.0f} tok/s trained",
                highlight=False,
            )
        self._printed = len(metrics)

    def _render(self, metrics: Sequence[dict[str, Any]], serve: dict[str, Any], learn: dict[str, Any]) -> Panel:
        step = int(metrics[-1]["step"]) if metrics else 0
        head = Table.grid(padding=(0, 1))
        elapsed = time.monotonic() - self._started
        head.add_row(
            "steps", ProgressBar(total=self._steps, completed=step, width=40), f"{step}/{self._steps}", f"{elapsed:.0f} s"
        )
        figures = Table.grid(padding=(0, 2))
        last = metrics[-1] if metrics else {}
        figures.add_row(
            Text(f"reward {last.get('reward/mean', math.nan):.3f}", style="bold green"),
            f"staleness {last.get('training/off_policy/trajectory_staleness/mean', math.nan):.2f}",
            f"queue {serve.get('queue_items', 0)} entries",
            f"sampled {serve.get('tokens_per_s', 0):.0f} tok/s",
            f"trained {last.get('perf/throughput', 0):.0f} tok/s",
        )
        rewards = [float(m.get("reward/mean", math.nan)) for m in metrics]
        curve = Text(f"reward  {sparkline(rewards, width=60)}", style="green")
        lines: list[Any] = [head, curve, figures]
        engines = serve.get("engines") or []
        if engines:
            table = Table(box=None, padding=(0, 2), header_style="dim")
            for column in ("engine", "version", "running", "cached", "p50 ms"):
                table.add_column(column)
            for e in engines:
                table.add_row(
                    str(e["url"]),
                    str(e["version"] or e["state"]),
                    str(e["requests_in_flight"]),
                    f"{e['cached_token_ratio']:.0%}",
                    f"{e['p50_ms'] or 0:.0f}",
                )
            lines.append(table)
        waits = [f"{name} waits for {s['wait']}" for name, s in (("serve", serve), ("learn", learn)) if s.get("wait")]
        lines.append(Text(" · ".join(waits) or "everything moves", style="dim"))
        return Panel(Group(*lines), title=self._title, border_style="blue")


def sparkline(values: Sequence[float], *, width: int, low: float = 0.0, high: float = 1.0) -> str:
    """The last ``width`` values as block characters between ``low`` and ``high``."""
    shown = [v for v in values if not math.isnan(v)][-width:]
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[max(0, min(top, round((v - low) / (high - low) * top)))] for v in shown)
