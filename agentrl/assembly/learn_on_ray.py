"""``agentrl learn`` with ``learn.launcher=ray``: the learner's ranks as workers of Ray Train's TorchTrainer.

Ray places the ranks and, when one dies, starts all of them again, up to ``learn.max_failures`` times. What they resume from is our
own checkpoint, which alone knows what was acknowledged; nothing is reported to Ray, and it ships a worker nothing but the name of
`_rank` and JSON.

Waits for: the ranks (a thread sits in ``fit``); a signal, which is passed on to rank 0 as a file in the run folder.
"""

import logging
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentrl.assembly.learn import StopFlag, learn_as_rank
from agentrl.assembly.parts import REDIS_URL_VARIABLE, run_dir_of, stream_url
from agentrl.assembly.ray_cluster import joined_ray, last_line, settle, surroundings
from agentrl.config import Config
from agentrl.errors import AgentRLError, ConfigError
from agentrl.telemetry.logs import setup_logging
from agentrl.telemetry.run_dir import RunDir

log = logging.getLogger(__name__)

RANK_ROLE = "learn-rank-"
POLL_S = 0.2


class RanksFailed(AgentRLError):
    """The ranks failed more often than ``learn.max_failures``."""


def learn_with_ray(config: Config, directory: RunDir) -> None:
    """Train on ``learn.ranks`` Ray Train workers until done or asked to stop.

    Raises:
        ConfigError: Ray is not installed, cannot be reached, or has too little for the ranks.
        RanksFailed: a rank failed once more than ``learn.max_failures``.
    """
    stop_file, started_file = _stop_file(directory), _started_file(directory)
    stop_file.unlink(missing_ok=True)
    started_file.parent.mkdir(parents=True, exist_ok=True)
    started_file.touch()
    url = stream_url(config, directory)
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths in a config are relative to where the command was given
    learn = config.learn
    needed = learn.ranks * learn.threads
    with joined_ray("learn.launcher", address=learn.ray_address, num_cpus=needed, modules=["ray.train.torch"]) as ray:
        trainer = _trainer(config, directory, url, ray.cluster_resources())
        outcome: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
                outcome.append(error)

        stop = StopFlag()  # behind ray.init, which takes SIGTERM for itself
        # Not in the main thread: there `fit` would turn Ctrl-C into an abort without a checkpoint.
        fitting = threading.Thread(target=fit, name="ray-train", daemon=True)
        fitting.start()
        while fitting.is_alive():
            fitting.join(POLL_S)
            if stop.requested and not stop_file.exists():
                stop_file.touch()
        stop_file.unlink(missing_ok=True)
    directory.update_processes(drop_prefix=RANK_ROLE)
    if outcome:
        raise RanksFailed(
            f"the learner's {config.learn.ranks} ranks failed for good after learn.max_failures={config.learn.max_failures} "
            f"restarts: {_cause(outcome[0])}. Nothing behind the last checkpoint was acknowledged: repair the cause and start "
            f"`agentrl learn` again."
        ) from outcome[0]


def _rank(settings: Mapping[str, Any]) -> None:
    """One rank, inside a Ray Train worker whose process group is up."""
    settle(settings)
    os.environ[REDIS_URL_VARIABLE] = settings["url"]
    config = Config.model_validate_json(settings["config"])
    setup_logging("learn", config.log.level)
    directory = run_dir_of(config)
    rank = int(os.environ["RANK"])
    is_here = socket.gethostname() == settings["host"]  # a pid says something on its own machine only
    if is_here:
        directory.register(f"{RANK_ROLE}{rank}")
    if rank == 0:
        directory.event("learn_ranks_started", ranks=int(os.environ["WORLD_SIZE"]))
    try:
        learn_as_rank(_resuming(config, directory), directory, should_stop=_stop_file(directory).exists)
    finally:
        if is_here:
            directory.deregister(f"{RANK_ROLE}{rank}")


def _resuming(config: Config, directory: RunDir) -> Config:
    """``learn.resume`` is for the first start: once this job has written a checkpoint, its ranks come back from that."""
    latest = directory.checkpoints / "latest"
    if not latest.exists() or latest.stat().st_mtime_ns < _started_file(directory).stat().st_mtime_ns:
        return config
    return config.model_copy(update={"learn": config.learn.model_copy(update={"resume": "auto"})})


def _trainer(config: Config, directory: RunDir, url: str, resources: Mapping[str, float]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    learn = config.learn
    use_gpu = resources.get("GPU", 0) >= learn.ranks
    if resources.get("CPU", 0) < learn.ranks * learn.threads:
        raise ConfigError(
            f"learn.ranks={learn.ranks} with learn.threads={learn.threads} need {learn.ranks * learn.threads} CPUs but Ray offers "
            f"{resources.get('CPU', 0):g}: lower them, or join a larger cluster with learn.ray_address"
        )
    settings = {
        "config": config.model_dump_json(), "url": url, "host": socket.gethostname(), **surroundings(),
    }  # fmt: skip
    return TorchTrainer(
        _rank,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=learn.ranks,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": learn.threads, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=str((directory.root / "ray").absolute()),
            failure_config=FailureConfig(max_failures=learn.max_failures),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(learn.threads), "TOKENIZERS_PARALLELISM": "false"}},
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=max(1, int(learn.rank_timeout_s))
        ),
    )


def _stop_file(directory: RunDir) -> Path:
    return directory.status / "learn.stop"


def _started_file(directory: RunDir) -> Path:
    return directory.status / "learn.started"


def _cause(error: BaseException) -> str:
    """What the first failing rank said, in one line."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    if failures:
        rank, first = min(failures.items())
        return f"rank {rank}: {last_line(first)}"
    return last_line(error)
