"""``agentrl``: every command. Exit code 0 only when all is well, 2 for a wrong setting, 128 + the signal for a run that a signal
ended early (130 after Ctrl-C), 1 for anything else."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from agentrl.cli.tools import tools_app
from agentrl.config import Config, dump_config, load_config, parse_config
from agentrl.errors import AgentRLError, ConfigError, DataError
from agentrl.process import end_process

app = typer.Typer(
    name="agentrl",
    help="Asynchronous reinforcement learning for tool-using language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Prepare and check task files.", no_args_is_help=True)
app.add_typer(data_app, name="data")
config_app = typer.Typer(help="Look at a run's settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
servers_app = typer.Typer(help="Look at a running serve's generation servers, and change them.", no_args_is_help=True)
app.add_typer(servers_app, name="servers")
app.add_typer(tools_app, name="tools")

agent_app = typer.Typer(help="Black-box agents behind the OpenAI-compatible endpoint.", no_args_is_help=True)
app.add_typer(agent_app, name="agent")

ConfigFile = Annotated[str, typer.Option("--config", "-c", help="YAML file of the run, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value …", show_default=False)]
ServerUrl = Annotated[str, typer.Argument(help="Base url of the server, http://host:port.")]
RunPath = Annotated[Path, typer.Argument(help="Run directory, for example runs/quickstart.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

console = Console()


def main() -> None:
    """Entry point: errors of the user's making are one message, ours keep their traceback."""
    code = _exit_code(lambda: app(standalone_mode=False))
    if "agentrl.learner.distributed" in sys.modules:
        end_process(code)
    sys.exit(code)


def _exit_code(command: Callable[[], Any]) -> int:
    import click

    try:
        result = command()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return 130
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AgentRLError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    except Exception:  # noqa: BLE001 - the process's edge
        traceback.print_exc()
        return 1


def _load(file: str, overrides: Sequence[str] | None, section: str | None = None) -> Config:
    return load_config(file, overrides or (), section=section)


def _log_to_stderr(role: str, config: Config) -> None:
    from agentrl.telemetry.logs import setup_logging

    setup_logging(role, config.log.level)


@app.command()
def quickstart(
    overrides: Overrides = None,
    config: ConfigFile = "quickstart",
) -> None:
    """Train a small tool-calling model on this machine, in minutes, and show what it learned."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: two threads on shared cores are slower than one
    from agentrl.cli.quickstart import run_quickstart

    loaded = _load(config, overrides)
    run_quickstart(loaded, console=console)


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Supervise sandbox, stream, serve and learn on this machine until the learner is done. Ctrl-C drains and exits with 130."""
    from agentrl.assembly.run import run as supervise
    from agentrl.cli.view import RunView

    loaded = _load(config, overrides)
    _log_to_stderr("run", loaded)
    with RunView(steps=loaded.learn.steps, console=console, title=loaded.run.name) as view:
        directory = supervise(loaded, ["-c", config, *(overrides or [])], tick=view.tick)
    console.print(f"run directory: {directory.root}")


@app.command()
def serve(config: ConfigFile, overrides: Overrides = None) -> None:
    """Turn tasks into trajectories on the stream, until stopped."""
    from agentrl.assembly.serve import main as serve_main

    loaded = _load(config, overrides, "serve")
    _log_to_stderr("serve", loaded)
    serve_main(loaded)


@app.command()
def learn(config: ConfigFile, overrides: Overrides = None) -> None:
    """Turn trajectories from the stream into new weights."""
    from agentrl.assembly.learn import main as learn_main

    loaded = _load(config, overrides, "learn")
    _log_to_stderr("learn", loaded)
    learn_main(loaded, ["-c", config, *(overrides or [])])


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None) -> None:
    """Cold start: supervised steps on conversations, before reinforcement learning."""
    from agentrl.assembly.sft import run_sft_from_config

    loaded = _load(config, overrides, "sft")
    _log_to_stderr("sft", loaded)
    out = run_sft_from_config(loaded)
    console.print(f"model: {out}")


@app.command(name="eval")
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model directory; default: the run's newest checkpoint, else model.path. Not with serve.urls."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the result under evals/.")] = None,
) -> None:
    """Measure a model on held-out tasks: success rate with its 95 % interval."""
    from agentrl.assembly.evaluate import evaluate_from_config

    loaded = _load(config, overrides, "eval")
    _log_to_stderr("eval", loaded)
    path, result = evaluate_from_config(loaded, model=model, name=name)
    low, high = result["ci95"]
    console.print(f"success {result['success']:.3f} (95 % {low:.3f} to {high:.3f}, n={result['n']}) -> {path}", highlight=False)


@app.command()
def rollout(
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="YAML file of a run; optional with --model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the user says.")] = None,
    row: Annotated[int | None, typer.Option(help="Instead of --prompt: this row of the run's data.")] = None,
    split: Annotated[str, typer.Option(help="Where --row looks: train or val.")] = "val",
    system: Annotated[str | None, typer.Option(help="System message before --prompt.")] = None,
    model: Annotated[str | None, typer.Option(help="Model directory or hub name, instead of the config's.")] = None,
    tools: Annotated[str | None, typer.Option(help="Tool YAML, instead of the config's.")] = None,
    server: Annotated[str | None, typer.Option(help="Ask this running engine instead of starting one.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Instead of serve.temperature; 0 is greedy.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Also list every token: id, mask, logprob, version.")] = False,
    as_json: AsJson = False,
) -> None:
    """Play one prompt by hand and show turns, tokens by who wrote them (green: sampled), tool calls and timings."""
    from agentrl.assembly.by_hand import rollout_by_hand, task_by_hand
    from agentrl.cli.rollout_view import as_json as to_json
    from agentrl.cli.rollout_view import show

    values = load_config(config, ["serve.replicas=1", *(overrides or [])]).model_dump(mode="json")
    values["model"]["path"], values["tools"] = model or values["model"]["path"], tools or values["tools"]
    values["serve"] |= {"urls": [server], "router_url": None} if server else {}
    loaded = parse_config(values, place=config or "defaults")
    _log_to_stderr("rollout", loaded)
    task = task_by_hand(loaded, prompt=prompt, system=system, row=row, split=split)
    played = rollout_by_hand(loaded, task, temperature=temperature)
    if as_json:
        print(json.dumps(to_json(played), indent=1, default=str))
    else:
        show(console, played, trace=trace)
    raise typer.Exit(1 if played.error else 0)


@app.command()
def sandbox(
    host: Annotated[str, typer.Option(help="Address to bind; other than loopback needs --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free port.")] = 8080,
    workers: Annotated[int, typer.Option(help="Warm fork-servers of each process.")] = 1,
    processes: Annotated[int, typer.Option(help="HTTP processes behind the port; the limits are shared out.")] = 1,
    tier: Annotated[
        str, typer.Option(help="auto | zygote | zygote-landlock | bubblewrap | nsjail; auto takes the first that isolates.")
    ] = "auto",
    max_sessions: Annotated[int | None, typer.Option(help="Open sessions at once; by default what memory allows.")] = None,
    memory_mb: Annotated[int, typer.Option(help="Memory limit of one run.")] = 512,
    rate_limit: Annotated[float | None, typer.Option(help="Requests per second and client; 0 is none, default 1000.")] = None,
    preload: Annotated[list[str] | None, typer.Option(help="Module imported once, before any run; repeat for more.")] = None,
    token: Annotated[
        str | None, typer.Option(envvar="AGENTRL_SANDBOX_TOKEN", help="Bearer token that clients must send.")
    ] = None,
    allow_unsafe: Annotated[bool, typer.Option(help="Run without isolation where none is available.")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory to register in.")] = None,
) -> None:
    """Serve code execution over HTTP in SandboxFusion's shape, isolated by default."""
    from agentrl.assembly.sandbox import serve_sandbox

    serve_sandbox(
        host,
        port,
        workers=workers,
        processes=processes,
        tier=tier,
        max_sessions=max_sessions,
        memory_mb=memory_mb,
        rate_limit=rate_limit,
        preload=preload or [],
        token=token,
        allow_unsafe=allow_unsafe,
        run_dir=run_dir,
    )


@app.command()
def audit(run: RunPath, as_json: AsJson = False) -> None:
    """Prove from the run directory and the stream that what was trained is what was sampled, once each."""
    from agentrl.assembly.audit import audit_run

    report = audit_run(run)
    print(json.dumps(report.to_json(), indent=1) if as_json else report.text())
    raise typer.Exit(0 if report.clean else 1)


@app.command()
def ledger(
    run: RunPath,
    step: Annotated[
        int | None, typer.Option(help="Only what this step of the learner consumed, by the newest checkpoint.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How every task ended, with sums that close."""
    from agentrl.assembly.audit import ledger_of
    from agentrl.assembly.step_ledger import step_ledger

    book = ledger_of(run) if step is None else step_ledger(run, step)
    print(book.to_json() if as_json else book.table())
    raise typer.Exit(0 if book.closes else 1)


@app.command("dead-letters")
def dead_letters(
    run: RunPath,
    replay: Annotated[list[str] | None, typer.Option(help="Put this letter back on the stream; repeat for more.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Delete this letter; it stays counted as failed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Entries that could not be trained and why; put them back, or forget them. Ids are the letter's or the trajectory's."""
    from dataclasses import asdict

    from agentrl.assembly.audit import stream_of
    from agentrl.stream.dead_letters import drop_dead_letters, list_dead_letters, replay_dead_letters

    with stream_of(run) as (client, keys):
        if replay or drop:
            replayed = replay_dead_letters(client, keys, replay) if replay else []
            dropped = drop_dead_letters(client, keys, drop) if drop else 0
            print(json.dumps({"replayed": replayed, "dropped": dropped}) if as_json else _what_became(replayed, dropped))
            return
        letters = list_dead_letters(client, keys)
    if as_json:
        print(json.dumps([asdict(letter) for letter in letters], indent=1))
        return
    for letter in letters:
        state = f"cannot be replayed: {letter.obstacle}" if letter.obstacle else "can be replayed"
        print(f"{letter.entry}  {letter.id}  {letter.num_bytes} bytes  {letter.reason}  ({state})")
    print(f"{len(letters)} dead letters")


def _what_became(replayed: Sequence[str], dropped: int) -> str:
    return "\n".join([*(f"replayed as {name}" for name in replayed), *([f"dropped {dropped}"] if dropped else [])])


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Argument(help="A run to look into; without one, this machine.")] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="Also check this run's settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the machine before a run, or say which stage of a run waits, for what, and what to change."""
    from agentrl.assembly.doctor import diagnose_machine, diagnose_run

    findings = diagnose_run(run) if run else diagnose_machine(_load(config, ()) if config else None)
    if as_json:
        print(json.dumps([f.to_json() for f in findings], indent=1))
    else:
        for f in findings:
            print(f.line())  # not the console's: it would wrap, and a line is what scripts and logs look for
    raise typer.Exit(1 if any(f.level == "fail" for f in findings) else 0)


@agent_app.command("run")
def agent_run(
    command: Annotated[list[str], typer.Argument(help="Behind --: the program and its arguments, started once per rollout.")],
    config: ConfigFile,
    override: Annotated[list[str] | None, typer.Option("--set", "-s", help="key=value; repeat for more.")] = None,
    split: Annotated[str, typer.Option(help="Tasks of data.train or data.val.")] = "train",
    n: Annotated[int | None, typer.Option(help="Tasks, from the start of the file.")] = None,
    samples: Annotated[int, typer.Option(help="Rollouts per task.")] = 1,
    name: Annotated[str, typer.Option(help="Folder under agents/ for the records.")] = "default",
    as_json: AsJson = False,
) -> None:
    """Run a program once per task against the model, and record its trajectories. Training with it: serve.agent=proxy."""
    from agentrl.assembly.agents import run_agents

    values = load_config(config, override or []).model_dump(mode="json")
    values["serve"]["agent"], values["agent"]["command"] = (
        "proxy",
        command,
    )  # not by overrides: a program's text is no Hydra grammar
    loaded = parse_config(values, place=config)
    _log_to_stderr("agent", loaded)
    out, report = run_agents(loaded, split=split, n=n, samples=samples, name=name)
    if as_json:
        print(json.dumps({"out": str(out), **report}, indent=1))
    else:
        mean = "none" if report["reward_mean"] is None else f"{report['reward_mean']:.3f}"
        console.print(
            f"{report['finished']} of {report['rollouts']} rollouts, mean reward {mean}, stops {report['stops']}, "
            f"failed {report['failed']}, {report['branches']} branches -> {out}", highlight=False, markup=False,
        )  # fmt: skip
        for error in report["first_errors"]:
            print(error, file=sys.stderr)
    raise typer.Exit(0 if report["finished"] else 1)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="arithmetic, gsm8k, or module:prepare of your own.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="key=value: options of that preparation, such as prompt=short.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default data/<name>.")] = None,
    source: Annotated[Path | None, typer.Option(help="Folder with the original files; default: the Hugging Face hub.")] = None,
    sft: Annotated[bool, typer.Option("--sft", help="Also write cold-start conversations.")] = False,
    limit: Annotated[int | None, typer.Option(help="Rows per split, at most.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of generated tasks.")] = 0,
) -> None:
    """Write a task's train and test files in verl's parquet schema."""
    from agentrl.plugins import load_object

    prepare = load_object(name if ":" in name else f"envs.{name}:prepare")
    given = {key: yaml.safe_load(value) for key, _, value in (o.partition("=") for o in options or [])}
    try:
        report = prepare(out or Path("data") / name.partition(":")[0], source=source, sft=sft, limit=limit, seed=seed, **given)
    except TypeError as error:
        raise ConfigError(f"data prepare {name} {' '.join(options or [])}: {error}") from error
    print(json.dumps(report, indent=1, default=str))


@data_app.command("check")
def data_check(path: Annotated[Path, typer.Argument(help="Task file: parquet or JSONL.")]) -> None:
    """Check a task file: schema, duplicates, lengths."""
    from agentrl.data.check import check_rows

    print(json.dumps(check_rows(path), indent=1, default=str))


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print every setting as the run would see it, defaults included."""
    print(dump_config(_load(config, overrides)), end="")


@servers_app.command("list")
def servers_list(run: RunPath, as_json: AsJson = False) -> None:
    """Every server: state, weights, load, and why it is out of rotation."""
    from agentrl.assembly.servers import call_servers, servers_table

    listing = call_servers(run, "GET")
    print(json.dumps(listing, indent=1) if as_json else servers_table(listing))


@servers_app.command("add")
def servers_add(
    run: RunPath,
    url: ServerUrl,
    capacity: Annotated[float, typer.Option(help="Relative speed.")] = 1.0,
    api_key: Annotated[str | None, typer.Option(envvar="AGENTRL_SERVER_API_KEY", help="Its bearer key.")] = None,
    admin_key: Annotated[str | None, typer.Option(envvar="AGENTRL_SERVER_ADMIN_KEY", help="Its key for control calls.")] = None,
) -> None:
    """Add a running server; it takes traffic once it serves the announced policy."""
    from agentrl.assembly.servers import call_servers, servers_table

    print(servers_table(call_servers(run, "POST", url=url, capacity=capacity, api_key=api_key, admin_key=admin_key)))


@servers_app.command("remove")
def servers_remove(run: RunPath, url: ServerUrl) -> None:
    """Forget a server; its requests continue elsewhere with the tokens they have."""
    from agentrl.assembly.servers import call_servers, servers_table

    print(servers_table(call_servers(run, "DELETE", url=url)))


@servers_app.command("drain")
def servers_drain(
    run: RunPath,
    url: ServerUrl,
    wait_s: Annotated[float, typer.Option(help="Wait this long for its requests; the rest then continues elsewhere.")] = 0.0,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back into rotation.")] = False,
) -> None:
    """Send nothing new to a server, for maintenance."""
    from agentrl.assembly.servers import call_servers, servers_table

    listing = (
        call_servers(run, "POST", "/undrain", url=url) if undo else call_servers(run, "POST", "/drain", url=url, wait_s=wait_s)
    )
    print(servers_table(listing))


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as version_of

    print(version_of("agentrl"))
