"""``agentrl quickstart``: from nothing to a policy that has learned to use a tool, through the real ``serve`` and ``learn``.

1. tasks, tokenizer, a 0.5 M-parameter model with random weights
2. cold start: supervised steps on noisy traces, until it has the format and makes mistakes
3. evaluation before
4. asynchronous GRPO: two engine processes, a durable stream, a learner, weights back while they generate
5. evaluation after, the audit, and where everything is
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from agentrl.assembly.audit import audit_run, newest_checkpoint
from agentrl.assembly.evaluate import EvalMode, evaluate_model
from agentrl.assembly.parts import load_tokenizer
from agentrl.assembly.run import run as supervise
from agentrl.assembly.sft import run_sft_from_config
from agentrl.cli.rollout_view import runs
from agentrl.cli.view import RunView
from agentrl.config import Config
from agentrl.errors import AgentRLError
from agentrl.plugins import load_object
from agentrl.telemetry.logs import setup_logging
from agentrl.telemetry.run_dir import RunDir, write_json

MODES = (EvalMode(temperature=0.0), EvalMode(temperature=1.0))
MIN_SAMPLED_SUCCESS = 0.25
"""Below this the cold start has not learned to copy the tool's answer, and GRPO would stall: more supervised steps first."""
EXTRA_SFT_STEPS = 300
MAX_COLD_STARTS = 3
SFT_CONVERSATIONS_PER_STEP = 16


def run_quickstart(config: Config, *, console: Console) -> RunDir:
    """Run the five stages and print what came of them; returns the run directory."""
    setup_logging("quickstart", "WARNING")
    started = time.monotonic()
    directory = RunDir(fresh_folder(Path(config.run.dir) / config.run.name)).create()
    timings: dict[str, float] = {}
    console.print(f"agentrl quickstart: everything goes to [bold]{directory.root}[/bold]")

    with _timed(timings, "tasks and model"):
        config = prepare(config, directory)
    with _timed(timings, "cold start and evaluation"):
        before = cold_start(config, directory, console)
    config = _with_model(config, directory.root / "sft")

    console.print("\n[bold]Asynchronous GRPO[/bold]: two engines sample while the learner trains")
    with _timed(timings, "training"), RunView(steps=config.learn.steps, console=console, title="agentrl quickstart") as view:
        supervise(config, ["-c", str(directory.root / "run.yaml")], tick=view.tick)
    with _timed(timings, "evaluation after"):
        after = evaluate_model(config, directory, model_path=str(newest_checkpoint(directory)), modes=MODES)
    report = audit_run(directory.root)
    for name, results in (("before", before), ("after", after)):
        for result in results:
            kind = "greedy" if result["greedy"] else "sampled"
            write_json(directory.evals / f"{name}-{kind}.json", {k: v for k, v in result.items() if k != "records"})

    console.print()
    show_result(console, before, after)
    show_trajectories(console, load_tokenizer(config), before[0], after[0])
    curve = plot_curve(directory)
    console.print(report.text(), highlight=False, soft_wrap=True)
    total = time.monotonic() - started
    lines = [
        "  ".join(f"{name} {seconds:.0f} s" for name, seconds in timings.items()) + f"  total {total:.0f} s",
        f"curve: {curve}",
        f"model: {newest_checkpoint(directory)}",
        f"look:  agentrl audit {directory.root} · agentrl ledger {directory.root}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if not report.clean:
        raise AgentRLError(f"the audit of {directory.root} found a breach; see above")
    return directory


def fresh_folder(wanted: Path) -> Path:
    """The folder itself, or with the next free number behind its name: a quickstart never continues an older one."""
    candidates = (wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}") for n in range(1, 10_000))
    return next(c for c in candidates if not c.exists())


def prepare(config: Config, directory: RunDir) -> Config:
    """Tasks, cold-start conversations, tokenizer and random weights, from ``envs.arithmetic``; writes the run's YAML."""
    conversations = (config.sft.steps + (MAX_COLD_STARTS - 1) * EXTRA_SFT_STEPS) * SFT_CONVERSATIONS_PER_STEP
    seed = config.run.seed
    data = directory.root / "data"
    load_object("envs.arithmetic:prepare")(data, seed=seed, sft=True, sft_rows=conversations, val=config.eval.n)
    load_object("envs.arithmetic_model:make_scratch_model")(directory.root / "scratch", seed=seed)
    values = config.model_dump(mode="json")
    values["run"].update(name=directory.root.name, dir=str(directory.root.parent))
    values["data"].update(train=str(data / "train.parquet"), val=str(data / "val.parquet"), sft=str(data / "sft.jsonl"))
    values["model"]["path"] = str(directory.root / "scratch")
    return Config.model_validate(values)


def cold_start(config: Config, directory: RunDir, console: Console) -> list[dict[str, Any]]:
    """Supervised steps until sampling succeeds often enough for GRPO to have something to sharpen; returns the evaluation."""
    steps = config.sft.steps
    success = 0.0
    for _ in range(MAX_COLD_STARTS):
        with _progress(console) as progress:
            task = progress.add_task("cold start", total=steps)
            out = run_sft_from_config(config, steps=steps, on_step=lambda m, t=task, p=progress: p.update(t, completed=m["step"]))
        results = evaluate_model(config, directory, model_path=str(out), modes=MODES)
        success = results[1]["success"]
        if success >= MIN_SAMPLED_SUCCESS:
            return results
        console.print(f"cold start is weak (sampled success {success:.2f}): once more with {EXTRA_SFT_STEPS} more steps")
        steps += EXTRA_SFT_STEPS
    raise AgentRLError(
        f"after {steps - EXTRA_SFT_STEPS} supervised steps sampled success is {success:.2f}, below {MIN_SAMPLED_SUCCESS}; "
        "GRPO would have no positive samples. Try another seed: agentrl quickstart run.seed=1"
    )


def show_result(console: Console, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Success on held-out tasks (95 % interval)", title_style="bold")
    for column in ("decoding", "before", "after", "called the tool"):
        table.add_column(column)
    for b, a in zip(before, after, strict=True):
        name = "greedy" if b["greedy"] else f"sampled, T={b['temperature']:g}"
        table.add_row(
            name, _rate(b), f"[bold green]{_rate(a)}[/bold green]", f"{b['called_a_tool']:.0%} → {a['called_a_tool']:.0%}"
        )
    console.print(table)


def show_trajectories(console: Console, tokenizer: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """One task that was answered wrongly before and rightly after; sampled tokens in green, everything else plain."""
    pairs = zip(before["records"], after["records"], strict=True)
    old, new = next(((b, a) for b, a in pairs if b["reward"] < 1 <= a["reward"]), (before["records"][0], after["records"][0]))
    for title, record in (("before", old), ("after", new)):
        segment = record["segments"][0]
        text = ""
        for sampled, ids in runs(segment["ids"], segment["mask"]):
            piece = tokenizer.decode(ids).replace("[", r"\[")
            text += f"[green]{piece}[/green]" if sampled else piece
        console.print(
            Panel(text, title=f"{title}: reward {record['reward']:.0f} (green was sampled by the policy)", border_style="dim")
        )


def plot_curve(directory: RunDir) -> Path:
    """``curve.png``: reward per step, and the staleness of what was trained."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    metrics = directory.read_metrics()
    steps = [m["step"] for m in metrics]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[3, 1])
    top.plot(steps, [m["reward/mean"] for m in metrics], marker=".")
    top.set(ylabel="mean training reward", ylim=(0, 1), title=directory.root.name)
    top.grid(alpha=0.3)
    bottom.bar(steps, [m["training/off_policy/trajectory_staleness/mean"] for m in metrics], color="tab:gray")
    bottom.set(xlabel="optimizer step", ylabel="staleness")
    figure.tight_layout()
    path = directory.root / "curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _with_model(config: Config, model: Path) -> Config:
    values = config.model_dump(mode="json")
    values["model"]["path"] = str(model)
    directory = Path(values["run"]["dir"]) / values["run"]["name"]
    (directory / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return Config.model_validate(values)


def _rate(result: Mapping[str, Any]) -> str:
    low, high = result["ci95"]
    return f"{result['success']:.3f} ({low:.2f} to {high:.2f})"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Generator[None]:
    started = time.monotonic()
    yield
    timings[name] = time.monotonic() - started
