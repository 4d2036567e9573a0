"""Does each algorithm learn the quickstart's task? Short runs from one cold start, one version stale, with the real learner.

python bench/algorithms.py run --out runs/algorithms      # resumable: one JSON line per finished run
python bench/algorithms.py show --out runs/algorithms
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

NO_PARAMETERS = "~learn.advantage_params"
"""The quickstart's are grpo's."""
ALGORITHMS: Mapping[str, list[str]] = {
    "GRPO": [],
    "RLOO": [NO_PARAMETERS, "learn.advantage=rloo"],
    "REINFORCE++": [NO_PARAMETERS, "learn.advantage=reinforce_plus_plus", "learn.zero_spread=keep"],
    "CISPO": ["learn.loss=cispo"],
    # Greedy answers are better than sampled ones, so ReMax's advantages are negative on average: at the others' rate it collapses.
    "ReMax": [NO_PARAMETERS, "learn.advantage=remax", "learn.zero_spread=keep", "learn.lr=3.0e-4"],
    "PPO with critic": [
        NO_PARAMETERS, "+learn.advantage_params={gamma: 1.0, lam: 1.0}", "learn.advantage=gae", "learn.zero_spread=keep",
        "learn.critic={lr: 1.0e-3, warmup_steps: 2}",
    ],
}  # fmt: skip
STALENESS = 1


def run(o: argparse.Namespace) -> None:
    o.out.mkdir(parents=True, exist_ok=True)
    results = o.out / "results.jsonl"
    done = {r["algorithm"] for r in read(o.out)}
    team = start_team(device="cpu")
    model = cold_start(o.models, seed=o.seed, team=team)
    for name, settings in ALGORITHMS.items():
        if name in done:
            continue
        config = quickstart_config(model, [f"learn.groups={o.groups}", "learn.schedule=constant", *settings], seed=o.seed)
        found = train(config, team=team, staleness=STALENESS, steps=o.steps, eval_every=o.eval_every)
        with results.open("a") as file:
            file.write(json.dumps({"algorithm": name, "groups": o.groups, "steps": o.steps} | asdict(found)) + "\n")
        print(f"{name}: {found.sampled[0]:.3f} -> {found.sampled[-1]:.3f}, {found.cpu_seconds:.0f} CPU-s", flush=True)
    stop_team()


def read(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def show(o: argparse.Namespace) -> None:
    print("| algorithm | training reward, first 2 → last 4 steps | held out, T=1 | held out, greedy | steps | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for r in read(o.out):
        first, last = statistics.mean(r["rewards"][:2]), statistics.mean(r["rewards"][-4:])
        print(
            f"| {r['algorithm']} | {first:.2f} → {last:.2f} | {r['sampled'][0]:.2f} → {r['sampled'][-1]:.2f} | "
            f"{r['greedy'][0]:.2f} → {r['greedy'][-1]:.2f} | {r['steps']} | {r['cpu_seconds']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "show"), default="run")
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--models", type=Path, default=Path("runs/cold_starts"), help="where the cold starts are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--eval-every", type=int, default=16)
    o = parser.parse_args()
    (run if o.what == "run" else show)(o)


if __name__ == "__main__":
    main()
