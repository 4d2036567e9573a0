"""``agentrl learn``: trajectories from the stream in, new weights out; one process per FSDP2 rank."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import FrameType

from agentrl.algorithms.losses import POLICY_LOSSES, policy_loss_parameters
from agentrl.assembly.best import check_best, keep_best
from agentrl.assembly.parts import (
    LEARNER_DTYPE,
    fingerprint,
    load_tokenizer,
    release_stream_server,
    run_dir_of,
    stream_url,
    tool_schemas,
)
from agentrl.assembly.run import refuse_if_active
from agentrl.assembly.tool_meter import ToolMeter
from agentrl.assembly.watchdog import LearnStatus, Watchdog
from agentrl.config import Config, dump_config
from agentrl.errors import ConfigError, StalledError
from agentrl.learner.batching import BatchBuilder
from agentrl.learner.checkpoint import Checkpoints
from agentrl.learner.distributed import Team, start_team, stop_team
from agentrl.learner.learner import Learner
from agentrl.learner.loop import run_learning
from agentrl.learner.lora import LoraSettings
from agentrl.learner.lost_ranks import explaining_lost_ranks
from agentrl.learner.optim import OptimizerSettings
from agentrl.learner.sequence_parallel import group_ranks
from agentrl.learner.settings import (
    BASELINE_ADVANTAGES,
    GROUPLESS_ADVANTAGES,
    CriticSettings,
    KLSettings,
    LossSettings,
    Overlong,
    check_settings,
)
from agentrl.learner.weight_publisher import WeightPublisher
from agentrl.process import die_with_parent
from agentrl.stream.connection import check_server, connect
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.fingerprint import check_fingerprint
from agentrl.stream.keys import Keys
from agentrl.telemetry.run_dir import RunDir
from agentrl.telemetry.trackers import Tracker, open_trackers
from agentrl.types import PolicyRecord, TrajectoryGroup

log = logging.getLogger(__name__)

PLACEHOLDER_URL = "http://127.0.0.1:9"
"""The learner reads the tools' schemas and calls none."""


def main(config: Config, arguments: Sequence[str]) -> None:
    """Learn until ``learn.steps`` or SIGTERM. With ``learn.ranks`` above 1, become the parent of a torchrun, or a Ray driver."""
    check_learning(config)
    on_ray = config.learn.launcher == "ray"
    if on_ray and "RANK" in os.environ:
        raise ConfigError("learn.launcher=ray starts the ranks itself: give `agentrl learn` to Ray or to torchrun, not to both")
    if config.learn.ranks > 1 and not on_ray and "RANK" not in os.environ:
        sys.exit(_torchrun(config.learn.ranks, arguments))
    directory = run_dir_of(config).create()
    if int(os.environ.get("RANK", "0")) == 0:
        refuse_if_active(directory, ("learn",))
        if not directory.config.is_file():
            directory.write_config(dump_config(config))
        directory.register("learn")
    try:
        if on_ray:
            from agentrl.assembly.learn_on_ray import learn_with_ray

            learn_with_ray(config, directory)
        else:
            stop = StopFlag()
            learn_as_rank(config, directory, should_stop=lambda: stop.requested)
    finally:
        if int(os.environ.get("RANK", "0")) == 0:
            directory.deregister("learn")
            release_stream_server(config, directory)


def _torchrun(ranks: int, arguments: Sequence[str]) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen([*command, "-m", "agentrl", "learn", *arguments], preexec_fn=die_with_parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: process.send_signal(n))
    return process.wait()


def learn_as_rank(config: Config, directory: RunDir, *, should_stop: Callable[[], bool]) -> None:
    """Learn as one rank, whoever started it.

    Args:
        should_stop: asked on rank 0, between steps and while waiting; True ends the run with a checkpoint.

    Raises:
        RankLost: another rank died or did not come within ``learn.rank_timeout_s``.
        StalledError: learning ended before ``learn.steps`` although nobody asked for it.
    """
    team = start_team(timeout_s=config.learn.rank_timeout_s, sequence_parallel=config.learn.sequence_parallel)
    with ExitStack() as stack:
        stack.callback(stop_team)
        stack.enter_context(explaining_lost_ranks(team, timeout_s=config.learn.rank_timeout_s))
        status: LearnStatus | None = None
        if team.is_main:
            status = stack.enter_context(LearnStatus(directory, watchdog=Watchdog(directory, config)))
        learner = build_learner(config, team=team)
        # A save in the background is nothing that the loop does.
        on_stage = None if status is None or config.learn.async_save else lambda _: status.does("checkpoint")
        checkpoints = Checkpoints(
            directory.checkpoints, keep=config.learn.keep, best=keep_best(config, directory), on_stage=on_stage
        )
        publisher = WeightPublisher(
            directory.weights,
            full_every=config.learn.publish_full_every if config.learn.publish == "delta" else 1,
            scratch=config.learn.publish_scratch,
            adapters_only=config.learn.lora is not None and config.learn.lora.publish == "adapter",
        )
        batches = BatchBuilder(
            groups_per_step=config.learn.groups,
            max_staleness=config.learn.max_staleness,
            staleness_policy=config.learn.on_stale,
            max_requeues=config.learn.max_requeues,
            zero_spread=config.learn.zero_spread,
            min_group_size=1 if config.learn.advantage in GROUPLESS_ADVANTAGES else min(2, config.serve.n),
            needs_baseline=config.learn.advantage in BASELINE_ADVANTAGES,
        )
        loop = partial(
            run_learning, batches=batches, learner=learner, checkpoints=checkpoints, publisher=publisher,
            num_steps=config.learn.steps, save_every=config.learn.save_every, ack_at=config.queue.ack_at,
            prefetch=config.learn.prefetch, async_save=config.learn.async_save, should_stop=should_stop, stall_timeout_s=config.learn.stall_timeout_s, resume=config.learn.resume,
        )  # fmt: skip
        if status is None:
            loop(None, announce=lambda record, consumed: None)
            return
        with connect(stream_url(config, directory), role="learn") as client:
            check_server(client)
            keys = Keys(config.run.name)
            tokenizer = load_tokenizer(config)
            schemas = tool_schemas(config, tokenizer, sandbox_url=PLACEHOLDER_URL)
            check_fingerprint(client, keys, "learn", fingerprint(config, tokenizer, schemas))
            source = _Source(TrajectoryConsumer(client, keys), status)
            report = _Report(config, directory, status)
            version = loop(source, announce=source.announce, on_step=report.step, on_wait=source.wait)
            report.close()
            directory.event("learn_ended", version=version, complete=version >= config.learn.steps)
        if version < config.learn.steps and not should_stop():
            raise StalledError(f"learning ended at version {version} of {config.learn.steps}")


def check_learning(config: Config) -> None:
    """Refuse unknown estimators, losses, rules, metrics and parameters, and options out of range, before anything is started.

    Raises:
        ConfigError: naming the nearest known name.
    """
    critic = critic_settings(config)
    check_settings(loss_settings(config), temperature=config.serve.temperature, has_critic=critic is not None)
    check_best(config)
    if "RANK" not in os.environ:  # a launcher of ranks may start more than this machine's
        group_ranks(config.learn.ranks, config.learn.sequence_parallel)
    if config.learn.advantage in GROUPLESS_ADVANTAGES and config.learn.zero_spread != "keep":
        log.warning(
            "learn.zero_spread=%s drops groups whose rewards are all equal, from which learn.advantage=%s would learn: set it to keep",
            config.learn.zero_spread, config.learn.advantage,
        )  # fmt: skip


def build_learner(config: Config, *, team: Team) -> Learner:
    """The policy with its optimizer and loss, as the config describes them."""
    learn = config.learn
    return Learner(
        config.model.path,
        team=team,
        optimizer=OptimizerSettings(
            lr=learn.lr,
            betas=(learn.betas[0], learn.betas[1]),
            weight_decay=learn.weight_decay,
            schedule=learn.schedule,
            warmup_steps=learn.warmup_steps,
            num_steps=learn.steps * learn.epochs * learn.minibatches,
            max_grad_norm=learn.grad_clip,
        ),
        loss=loss_settings(config),
        critic=critic_settings(config),
        lora=lora_settings(config),
        micro_batch_tokens=learn.micro_tokens,
        temperature=config.serve.temperature,
        dtype=LEARNER_DTYPE[config.model.dtype],
        chunk_size=learn.logit_chunk,
        gradient_checkpointing=learn.gradient_checkpointing,
        offload=learn.offload,
        compiled=learn.compile,
        grad_sync=learn.grad_sync,
    )


def loss_settings(config: Config) -> LossSettings:
    """What the learner minimises, as the config describes it."""
    learn, correction = config.learn, config.learn.correction
    loss_params = {**learn.loss_params}
    if learn.loss in POLICY_LOSSES and "clip_ratio_low" in policy_loss_parameters(learn.loss):
        loss_params = {"clip_ratio_low": learn.clip[0], "clip_ratio_high": learn.clip[1], **loss_params}
    overlong = learn.overlong
    return LossSettings(
        advantage=learn.advantage,
        advantage_params=learn.advantage_params,
        policy_loss=learn.loss,
        policy_params=loss_params,
        loss_agg_mode=learn.loss_agg,
        old_logprobs="recompute" if learn.off_policy_mode == "decoupled" else learn.old_logprobs,
        is_level="token" if learn.tis_cap is not None else correction.weights,
        is_threshold=learn.tis_cap if learn.tis_cap is not None else correction.threshold,
        is_batch_normalize=correction.batch_normalize,
        rejection_rules=correction.reject,
        rejection_thresholds=correction.reject_threshold,
        kl=KLSettings(
            coef=learn.kl_coef,
            place=learn.kl.place,
            estimator=learn.kl.estimator,
            controller=learn.kl.controller,
            target=learn.kl.target,
            horizon=learn.kl.horizon,
        ),
        entropy_coef=learn.entropy_coef,
        use_turn_rewards=learn.turn_rewards,
        overlong=None
        if overlong is None
        else Overlong(max_length=overlong.max_length or config.serve.tokens, buffer=overlong.buffer, penalty=overlong.penalty),
        horizon=config.serve.tokens,
        num_epochs=learn.epochs,
        num_minibatches=learn.minibatches,
    )


def critic_settings(config: Config) -> CriticSettings | None:
    """The value model, where the config has one."""
    critic, learn = config.learn.critic, config.learn
    if critic is None:
        return None
    optimizer = OptimizerSettings(
        lr=critic.lr,
        betas=(learn.betas[0], learn.betas[1]),
        weight_decay=critic.weight_decay,
        warmup_steps=critic.lr_warmup_steps,
        max_grad_norm=critic.grad_clip,
    )
    return CriticSettings(optimizer=optimizer, path=critic.path, warmup_steps=critic.warmup_steps, cliprange_value=critic.clip)


def lora_settings(config: Config) -> LoraSettings | None:
    """The adapters, where the config has them."""
    lora = config.learn.lora
    return None if lora is None else LoraSettings(rank=lora.rank, alpha=lora.alpha, targets=tuple(lora.targets))


class _Source:
    """The stream as the loop sees it. Admission counts groups since the stream began, the loop since its lineage did."""

    def __init__(self, consumer: TrajectoryConsumer, status: LearnStatus) -> None:
        self._consumer, self._status = consumer, status
        self._other_lineages: int | None = None

    def acquire(self) -> int:
        self._other_lineages = None
        return self._consumer.acquire()

    def next_group(self, timeout_s: float) -> TrajectoryGroup | None:
        group = self._consumer.next_group(timeout_s)
        if group is not None:
            self._status.moved()
        return group

    def wait(self, reason: str, seconds: float) -> None:
        """What the loop waits for; while the server is away that is the stream, whatever the loop thinks."""
        outage_s = self._consumer.outage_s
        self._status.waits("stream" if outage_s else reason, outage_s or seconds)

    def commit(self, groups: Sequence[TrajectoryGroup], outcomes: Mapping[str, str]) -> None:
        wanted = {i for group in groups for i in (*group.close.members, *group.close.failed)}
        self._consumer.commit([group.close.id for group in groups], outcomes={i: o for i, o in outcomes.items() if i in wanted})

    def blame(self, ids: Sequence[str]) -> None:
        self._consumer.blame(ids)

    def report_progress(self, consumed_groups: int) -> None:
        self._consumer.report_progress(self._since_the_stream_began(consumed_groups))

    def announce(self, record: PolicyRecord, consumed_groups: int) -> None:
        self._consumer.publish_policy(record, consumed_groups=self._since_the_stream_began(consumed_groups))
        self._status.moved(version=record.version, doing="checkpoint or next batch")

    def _since_the_stream_began(self, consumed_groups: int) -> int:
        """Groups that left the stream but are not in this lineage (after a resume from an older checkpoint, or none) count too."""
        if self._other_lineages is None:  # the first call comes with what the checkpoint had
            self._other_lineages = max(0, self._consumer.committed_groups - consumed_groups)
        return consumed_groups + self._other_lineages


class _Report:
    """Metrics of each step into the run directory and the trackers."""

    def __init__(self, config: Config, directory: RunDir, status: LearnStatus) -> None:
        self._config, self._directory, self._learn_status = config, directory, status
        self._trackers: list[Tracker] | None = None
        self._tools = ToolMeter(directory)

    def step(self, metrics: Mapping[str, float]) -> None:
        version = int(metrics["policy_version"])
        metrics = {**metrics, **self._tools.read()}
        if self._trackers is None:
            self._trackers = open_trackers(
                self._config.log.trackers, self._directory, run_name=self._config.run.name,
                config=self._config.model_dump(mode="json", exclude={"queue"}), resumed_at=version - 1,
            )  # fmt: skip
        for tracker in self._trackers:
            tracker.record(metrics)
        self._learn_status.moved(version=version, doing="checkpoint or next batch")

    def close(self) -> None:
        for tracker in self._trackers or []:
            tracker.close()


class StopFlag:
    """SIGTERM or Ctrl-C: finish the step, checkpoint, acknowledge, leave."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        log.info("stopping after this step")
        self.requested = True
