"""How stale may data be, and which correction holds? The quickstart's task at staleness 0, 1, 4, 8, four ways, three seeds.

    python bench/staleness.py run --out runs/staleness        # resumable: one JSON line per finished arm
    python bench/staleness.py show --out runs/staleness --picture docs/staleness.png

Every batch of step ``v`` is sampled by the weights of version ``v - staleness``, exactly. A constant learning rate, small
batches and two updates per batch are deliberately harsher than the quickstart, so that staleness bites within a few dozen steps; at
twice this rate (one seed tried) the run without any staleness already broke down, so that nothing could be told about corrections.

* ``none``: the ratio is around the learner's own recomputed logprobs; that other weights sampled the data is ignored.
* ``ppo``: the ratio is current / sampler, clipped (``correction.mode=bypass``).
* ``tis``: REINFORCE with current / sampler truncated at 2, no clip (``correction.mode=pure``).
* ``decoupled``: clipped around recomputed logprobs, each token weighted by recomputed / sampler truncated at 2.

At staleness 0 ``none``, ``ppo`` and ``decoupled`` are the same computation and run once.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from in_process import cold_start, quickstart_config, train

from agentrl.learner.distributed import start_team, stop_team

MODES: Mapping[str, list[str]] = {
    "none": ["learn.old_logprobs=recompute"],
    "ppo": [],
    "tis": ["learn.loss=reinforce", "learn.correction.mode=pure", "learn.correction.weights=token"],
    "decoupled": ["learn.old_logprobs=recompute", "learn.tis_cap=2.0"],
}
STALENESS = (0, 1, 4, 8)
SEEDS = (0, 1, 2)
SAME_AT_ZERO = ("none", "decoupled")
"""Equal to ``ppo`` where the sampler's weights are the learner's."""


def arms() -> list[tuple[int, int, str]]:
    """(seed, staleness, mode): a whole seed before the next, so that a piece of the work is already a picture."""
    return [(seed, k, mode) for seed in SEEDS for k in STALENESS for mode in MODES if k or mode not in SAME_AT_ZERO]


def run(o: argparse.Namespace) -> None:
    results = o.out / "results.jsonl"
    o.out.mkdir(parents=True, exist_ok=True)
    done = {(r["seed"], r["staleness"], r["mode"]) for r in read(o.out)}
    team = start_team(device="cpu")
    for seed, staleness, mode in arms():
        if (seed, staleness, mode) in done or (o.seed is not None and seed != o.seed):
            continue
        model = cold_start(o.models, seed=seed, team=team)
        settings = [
            f"learn.lr={o.lr}",
            "learn.schedule=constant",
            "learn.minibatches=2",
            f"learn.groups={o.groups}",
            *MODES[mode],
        ]
        config = quickstart_config(model, settings, seed=seed)
        found = train(config, team=team, staleness=staleness, steps=o.steps, eval_every=o.eval_every, log_every=o.log_every)
        with results.open("a") as file:
            arm = {"seed": seed, "staleness": staleness, "mode": mode, "lr": o.lr, "groups": o.groups, "steps": o.steps}
            file.write(json.dumps(arm | asdict(found)) + "\n")
        print(
            f"seed {seed} staleness {staleness} {mode}: {found.sampled[0]:.3f} -> {found.sampled[-1]:.3f}, {found.cpu_seconds:.0f} CPU-s",
            flush=True,
        )
    stop_team()


def read(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def show(o: argparse.Namespace) -> None:
    found = read(o.out)
    found += [r | {"mode": same} for r in found if not r["staleness"] and r["mode"] == "ppo" for same in SAME_AT_ZERO]
    cells = {(k, mode): [r for r in found if (r["staleness"], r["mode"]) == (k, mode)] for k in STALENESS for mode in MODES}
    print("| staleness | " + " | ".join(MODES) + " |\n" + "|---" * (len(MODES) + 1) + "|")
    for k in STALENESS:
        print(f"| {k} | " + " | ".join(cell(cells[k, mode]) for mode in MODES) + " |")
    print(f"seeds: {sorted({r['seed'] for r in found})}; runs: {len(read(o.out))} of {len(arms())}")
    if o.picture:
        picture(cells, o.picture)


def cell(runs: list[dict[str, Any]]) -> str:
    """Mean over seeds of the last two evaluations, the worst seed where there are several, and mean greedy success at the end."""
    if not runs:
        return "-"
    late = [statistics.mean(r["sampled"][-2:]) for r in runs]
    greedy = statistics.mean(r["greedy"][-1] for r in runs)
    worst = f" ({min(late):.2f})" if len(runs) > 1 else ""
    return f"{statistics.mean(late):.2f}{worst}, greedy {greedy:.2f}"


def picture(cells: Mapping[tuple[int, str], list[dict[str, Any]]], path: Path) -> None:
    """One panel per staleness: mean over seeds, each seed thin."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(STALENESS), figsize=(14, 3.8), sharey=True)
    for panel, k in zip(panels, STALENESS, strict=True):
        for mode, color in zip(MODES, ("tab:red", "tab:blue", "tab:green", "tab:purple"), strict=True):
            runs = cells[k, mode]
            if not runs:
                continue
            for r in runs:
                panel.plot(r["versions"], r["sampled"], color=color, alpha=0.2, linewidth=0.8)
            mean = [statistics.mean(values) for values in zip(*(r["sampled"] for r in runs), strict=True)]
            panel.plot(runs[0]["versions"], mean, color=color, label=mode, linewidth=2)
        panel.set_title(f"staleness {k}")
        panel.set_xlabel("step")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out success, sampled at T=1")
    panels[-1].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "show"), default="run")
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--models", type=Path, default=Path("runs/cold_starts"), help="where the cold starts are kept")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=4)
    parser.add_argument("--log-every", type=int, default=0)
    o = parser.parse_args()
    (run if o.what == "run" else show)(o)


if __name__ == "__main__":
    main()
