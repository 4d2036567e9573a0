"""Every setting, with its unit, default and reason. One file drives ``serve``, ``learn``, ``eval`` and ``inspect``.

The text under a field is its help. Impossible combinations are refused here, before anything is started.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class RunConfig(Section):
    """Where the run lives and what makes it repeatable."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: its folder and its Redis prefix."""
    dir: str = "runs"
    """Folder that holds run folders."""
    seed: int = 0
    """Seeds task order, routing ties, initial weights and the learner."""
    stall_warn_s: PositiveFloat = 180.0
    """Without progress for this long, every process prints which stage waits, for what and what to change. Set it above the
    longest step and the longest rollout."""
    max_restarts: PositiveInt = 20
    """Restarts of one process within ten minutes before ``run`` gives up."""


class ModelConfig(Section):
    """The policy."""

    path: str = ""
    """Hugging Face directory or hub name of the starting weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the engines' and the learner's weights."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's."""
    template_rewrites: Literal["refuse", "keep"] = "refuse"
    """A template that changes earlier turns when messages follow: ``keep`` trains on the turns as they were sampled, although a
    server that renders the history shows the model another one."""


class DataConfig(Section):
    """Tasks: parquet or JSONL rows in verl's schema."""

    train: str = ""
    """File of training tasks."""
    val: str = ""
    """File of held-out tasks, read by ``eval`` only."""
    sft: str | None = None
    """JSONL of cold-start conversations, read by ``sft`` only."""
    shuffle: bool = True
    """Shuffle each epoch by ``run.seed``."""


class RewardConfig(Section):
    """Scoring by a verl-style function, where no ``env`` is given."""

    fn: str | None = None
    """``path/to/file.py:compute_score`` or ``package.module:function``."""
    solution: Literal["assistant", "transcript"] = "assistant"
    """What ``solution_str`` holds: what the policy wrote (tool output earns nothing), or everything, as verl passes it."""


class ContextConfig(Section):
    """What happens to a context that grows too long. The rollout goes on in a new segment; nothing sampled is lost or changed."""

    policy: Literal["drop_oldest_tool_results"] = "drop_oldest_tool_results"
    """Replace the oldest tool results by a note."""
    at_tokens: PositiveInt
    """Context length, prompt included, above which it is rewritten before the next turn."""
    to_tokens: PositiveInt | None = None
    """How short it shall become; default half of ``at_tokens``. Each rewrite costs the engines the prefix cache of what follows it."""
    keep: NonNegativeInt = 1
    """The latest turns whose results are never dropped."""

    @model_validator(mode="after")
    def _check(self) -> "ContextConfig":
        if self.to_tokens is not None and self.to_tokens > self.at_tokens:
            raise ValueError(f"serve.context.to_tokens={self.to_tokens} exceeds at_tokens={self.at_tokens}. Lower to_tokens")
        return self


class ServeConfig(Section):
    """Turns tasks into trajectories."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """``embedded`` runs everywhere; ``sglang`` uses your SGLang install."""
    replicas: PositiveInt = 2
    """Engine processes to start."""
    urls: list[str] = []
    """Attach to these running servers instead of starting any."""
    router_url: str | None = None
    """Attach to the servers that this SGLang router lists, and follow them as they come and go. Generations go to them directly."""
    api_key: str | None = Field(default=None, repr=False)
    """Bearer key of attached servers (data endpoints), or for those that are started; embedded engines get a random one."""
    admin_key: str | None = Field(default=None, repr=False)
    """Bearer key of attached servers (control endpoints)."""
    sglang_command: list[str] = ["python", "-m", "sglang.launch_server"]
    """How to start SGLang; give the interpreter of the environment that holds it."""
    sglang_args: list[str] = []
    """Further flags for SGLang."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where embedded engines run."""
    engine_requests: PositiveInt = 32
    """Requests an embedded engine batches at once; more are queued. CPU attention cost grows with its square."""
    engine_blocks: PositiveInt = 512
    """KV-cache blocks (of 16 tokens) of an embedded engine."""
    engine_threads: PositiveInt = 1
    """OpenMP threads per engine process. Two on shared cores are slower than one."""
    engine_auth: bool = False
    """Ask a bearer key, made up for the run, of embedded engines too. They bind to loopback only."""
    agent: str = "tool_agent"
    """Agent loop for rows that name none: ``tool_agent``, ``single_turn``, ``env`` (the Env replies) or ``proxy`` (the command under
    ``agent``)."""
    parser: str = "auto"
    """Tool-call format of the model: ``hermes``, ``qwen3_coder``, ``llama3_json``, ``mistral``, ``gpt_oss``, ``glm``, ``deepseek`` or
    ``pythonic``; ``auto`` takes the one in which the chat template prints calls."""
    n: PositiveInt = 8
    """Rollouts per task: the group size."""
    turns: PositiveInt = 4
    """Generations per rollout, at most."""
    tokens: PositiveInt = 1024
    """Response tokens per rollout, tool results included, at most."""
    tokens_per_turn: PositiveInt = 512
    """Sampled tokens per generation, at most."""
    tool_tokens: PositiveInt = 256
    """Tokens of one tool result; longer ones are cut, and say so."""
    calls_per_turn: PositiveInt = 4
    """Tool calls executed per turn, at most."""
    invalid_calls: PositiveInt = 4
    """Malformed or unknown calls after which a rollout stops with ``tool_limit``."""
    reply_tokens: PositiveInt = 512
    """Tokens of one reply of the Env (loop ``env``); longer ones are cut, and say so."""
    in_flight: PositiveInt = 256
    """Rollouts running at once, at most, over all workers."""
    workers: PositiveInt = 1
    """Processes that play rollouts, over the same servers. More than one pays when one core cannot keep the servers busy."""
    launcher: Literal["local", "ray"] = "local"
    """``local``: engines and workers are processes of this machine. ``ray``: actors of a Ray cluster (needs the extra ``ray``)."""
    ray_address: str | None = None
    """Cluster that ``launcher=ray`` joins; default ``RAY_ADDRESS``, else a Ray of its own on this machine."""
    ray_timeout_s: PositiveFloat = 300.0
    """How long ``launcher=ray`` waits for room for an engine, and for the report of one that was placed before it is made again."""
    engine_gpus: NonNegativeInt = 0
    """GPUs of one engine under ``launcher=ray``; all on one machine. For SGLang, give ``--tp`` in ``sglang_args`` too."""
    engine_cpus: PositiveInt = 1
    """CPUs of one engine under ``launcher=ray``."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; the learner divides logits by the same value."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Below 1 the recorded logprobs are still those of the full distribution."""
    top_k: int = -1
    """Top-k sampling; -1 keeps all."""
    turn_timeout_s: PositiveFloat = 300.0
    """Deadline of one generation."""
    env_timeout_s: PositiveFloat = 60.0
    """Deadline of one reply of the Env (loop ``env``)."""
    rollout_timeout_s: PositiveFloat = 1200.0
    """Deadline of one rollout, tools included."""
    group_timeout_s: PositiveFloat = 3600.0
    """Deadline of a group: members still running then are recorded as failed."""
    min_group: PositiveInt = 1
    """A group with fewer finished rollouts is closed as failed."""
    attempts: PositiveInt = 2
    """Tries per rollout when the failure is not the model's."""
    failure_budget_s: PositiveFloat | None = 1800.0
    """While nearly every rollout fails, one group per 10 s probes. After so long without a rollout that finished, serve (and run) ends with
    what failed; time spent waiting for the learner does not count. null probes for ever."""
    concurrency: PositiveInt | Literal["auto"] | None = None
    """Requests in flight per engine; the rest wait in serve, evaluation and begun rollouts first. ``auto`` follows each engine's own
    queue and cache; null leaves queueing to the engines."""
    resume_partial: bool = True
    """Keep completed turns of unfinished rollouts in Redis, so that a restarted ``serve`` goes on from them (loops ``tool_agent`` and
    ``env``, where no tool holds state and the Env saves its own)."""
    context: ContextConfig | None = None
    """Rewrite long contexts; none by default."""
    weight_sync: Literal["in_place", "retract", "abort", "rolling"] = "in_place"
    """How running generations meet new weights; per-token versions record it in every mode."""
    weight_transport: Literal["disk", "broadcast"] = "disk"
    """``disk``: every engine reads the published files. ``broadcast``: serve's machine reads them and sends them to SGLang engines, one
    sender process per engine; for engines that share no disk with the learner."""
    broadcast_backend: Literal["gloo", "nccl"] = "gloo"
    """``gloo`` sends from host memory over TCP; ``nccl`` from the first GPU that serve sees."""
    broadcast_bucket_mb: PositiveInt = 512
    """MiB per broadcast, at most, unless one tensor is larger; an engine needs this much free memory for it."""

    @property
    def starts_engines(self) -> bool:
        """Otherwise it attaches to servers that others started, which serve what they serve."""
        return not self.urls and self.router_url is None

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        if self.tokens_per_turn > self.tokens:
            raise ValueError(
                f"serve.tokens_per_turn={self.tokens_per_turn} exceeds serve.tokens={self.tokens}: one turn would outgrow the "
                "whole rollout. Lower tokens_per_turn or raise tokens"
            )
        if self.turn_timeout_s > self.rollout_timeout_s or self.rollout_timeout_s > self.group_timeout_s:
            raise ValueError(
                f"deadlines must nest: turn {self.turn_timeout_s:g} s <= rollout {self.rollout_timeout_s:g} s <= group "
                f"{self.group_timeout_s:g} s. Raise the outer ones"
            )
        if self.urls and self.router_url is not None:
            raise ValueError("serve.urls and serve.router_url are two lists of servers. Give one of them")
        if self.weight_transport == "broadcast" and self.engine == "embedded" and not self.urls:
            raise ValueError(
                "serve.weight_transport=broadcast sends weights to SGLang, and serve.engine=embedded starts engines that read files. "
                "Set serve.engine=sglang or serve.weight_transport=disk"
            )
        if self.min_group > self.n:
            raise ValueError(f"serve.min_group={self.min_group} exceeds the group size serve.n={self.n}. Lower min_group")
        return self


class AgentConfig(Section):
    """A black-box agent that plays rollouts through the OpenAI-compatible endpoint (``serve.agent=proxy``)."""

    command: list[str] = []
    """Program and arguments, started once per rollout with ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY`` of its own."""
    env: dict[str, str] = {}
    """Further variables of its environment. They are recorded with the config: keep secrets in the environment of ``serve``."""
    cwd: str | None = None
    """Its working directory; default this process's."""
    reward: Literal["score", "api", "exit_code"] = "score"
    """``score``: the run's env or reward.fn. ``api``: what the agent posts. ``exit_code``: 1 where it exits with 0, else 0."""
    extra_info: list[str] = []
    """Keys of a row's ``extra_info`` that the agent is told. Many data sets keep the answer there, so the default tells none."""
    sampling: Literal["policy", "request"] = "policy"
    """``policy``: temperature and top_p are the run's, whatever a request says; training needs that. ``request`` follows requests."""
    model_name: str = "policy"
    """The model's name as agents see it."""
    host: str = "127.0.0.1"
    """Address the endpoint binds to."""
    port: NonNegativeInt = 0
    """0 takes a free port."""
    grace_s: PositiveFloat = 5.0
    """Between asking an agent past its deadline to end and killing its process group."""


class QueueConfig(Section):
    """The durable stream between ``serve`` and ``learn``."""

    url: str = Field(default="embedded", repr=False)
    """``embedded`` starts a real server inside the run folder; or ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://``."""
    max_items: PositiveInt | None = None
    """Entries that may wait for the learner; a full stream stops generation. Default: the pipeline's size."""
    max_bytes: PositiveInt = 1 << 30
    """Bytes the stream may hold, entries that wait for a checkpoint included."""
    ack_at: Literal["checkpoint", "step"] = "checkpoint"
    """``checkpoint``: exactly once for the weights that survive. ``step``: a crash forgets what was trained since the last one."""


class CorrectionConfig(Section):
    """What the learner does about data that its own weights did not sample (older weights, other kernels)."""

    mode: Literal["bypass", "decoupled", "pure"] | None = None
    """``bypass``: the loss's ratio is current / rollout and corrects by itself. ``decoupled``: the ratio is around the weights before
    the step, and tokens are weighted by old / rollout. ``pure``: REINFORCE weighted by current / rollout, no clip (needs
    ``learn.loss=reinforce``). Default: what ``learn.old_logprobs`` says."""
    weights: Literal["token", "sequence"] | None = None
    """Level of the importance weights; none applies no weights."""
    threshold: float | str = 2.0
    """``2.0`` truncates the weights there (TIS); ``"0.5_5.0"`` drops what lies outside (IcePop)."""
    batch_normalize: bool = False
    """Divide the weights by their mean over the step."""
    reject: str | None = None
    """Rejection rules, comma-separated, such as ``seq_mean_k3`` or ``token_k1``; what breaks one is not trained."""
    reject_threshold: float | str | None = None
    """Their thresholds: one for all, or one per rule, comma-separated; ``k1`` rules take ratios such as ``"0.5_2.0"``."""

    @model_validator(mode="after")
    def _check(self) -> "CorrectionConfig":
        if (self.reject is None) != (self.reject_threshold is None):
            raise ValueError(
                f"learn.correction.reject={self.reject!r} and reject_threshold={self.reject_threshold!r} go together: give both or none"
            )
        return self


class KLConfig(Section):
    """How the policy is held near the frozen starting policy; ``learn.kl_coef`` switches it on."""

    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, or taken off each token's reward."""
    estimator: str | None = None
    """``k1``, ``abs``, ``k2``, ``k3``, or with a ``+`` the same value with k2's gradient. Default: k3 in the loss, k1 in the reward."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """``adaptive`` moves the coefficient so that the measured KL comes to ``target``."""
    target: PositiveFloat = 0.1
    """KL per token, in nats."""
    horizon: PositiveFloat = 10_000.0
    """Trajectories over which the adaptive controller reacts."""


class OverlongConfig(Section):
    """DAPO's soft punishment of long answers."""

    buffer: PositiveInt
    """Sampled tokens before ``max_length`` over which the penalty grows."""
    max_length: PositiveInt | None = None
    """Sampled tokens at which the penalty is full; default ``serve.tokens``."""
    penalty: PositiveFloat = 1.0
    """The full penalty, taken off the reward."""


class CriticConfig(Section):
    """The value model that ``learn.advantage=gae`` needs."""

    path: str | None = None
    """Directory to start from; default ``model.path``."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    lr_warmup_steps: NonNegativeInt = 0
    """Updates of linear warm-up."""
    warmup_steps: NonNegativeInt = 0
    """First steps that train the critic alone."""
    clip: PositiveFloat | None = 0.5
    """How far a value may move in one step before its loss is clipped; null never clips."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    grad_clip: PositiveFloat = 1.0
    """Gradient norm bound."""


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights. Engines get merged weights; checkpoints hold the adapters too."""

    rank: PositiveInt
    """Rank of the adapters."""
    alpha: PositiveFloat | None = None
    """Scale times rank; default twice the rank."""
    targets: list[str] = []
    """Linear layers by name, such as ``q_proj``; empty: all but the LM head."""
    publish: Literal["merged", "adapter"] = "merged"
    """``merged`` publishes whole weights, which every engine loads. ``adapter`` publishes the adapter alone: SGLang (started with
    ``--enable-lora``) loads it beside the one in use without a pause, embedded engines merge it into ``model.path``."""


class KeepBestConfig(Section):
    """Which checkpoint the link ``best`` names; the rotation never removes that one."""

    metric: str
    """A step metric such as ``reward/mean``, as the mean over the steps since the checkpoint before; or ``eval/success`` or
    ``eval/reward_mean``, what ``agentrl eval`` wrote about the checkpoint by the time of the next save."""
    mode: Literal["max", "min"] = "max"
    """Whether the highest or the lowest is best."""


class LearnConfig(Section):
    """Turns trajectories into new weights."""

    steps: PositiveInt = 100
    """Optimizer steps, which is also the last policy version."""
    groups: PositiveInt = 32
    """Groups per step."""
    ranks: PositiveInt = 1
    """Learner processes (FSDP2 ranks); started as ``launcher`` says when above 1."""
    launcher: Literal["local", "ray"] = "local"
    """``local``: processes on this machine, with torchrun. ``ray``: workers of Ray Train, on this machine or a cluster, started again
    from the last checkpoint when one dies (needs the extra ``ray``)."""
    ray_address: str | None = None
    """Cluster that ``launcher=ray`` joins; default ``RAY_ADDRESS``, else a Ray of its own on this machine."""
    max_failures: NonNegativeInt = 3
    """Times that ``launcher=ray`` starts failed ranks again."""
    rank_timeout_s: PositiveFloat = 1800.0
    """How long a rank waits for the others in one exchange before it gives up; above the longest checkpoint and step."""
    sequence_parallel: PositiveInt = 1
    """Ranks that share the tokens of each row, so that ``micro_tokens`` may exceed what one of them can hold; divides ``ranks`` and the
    model's attention heads. The other factor of ``ranks`` works on rows of its own."""
    threads: PositiveInt = 1
    """OpenMP threads per rank."""
    max_staleness: NonNegativeInt = 4
    """Hard bound: learner version minus the oldest sampled token's version, at consumption."""
    pipeline_depth: NonNegativeInt = 1
    """Batches generated ahead of the one in training. Staleness sits here; ``max_staleness`` is the bound."""
    on_stale: Literal["wait", "drop", "downweight", "requeue"] = "drop"
    """What happens to work beyond the bound: train it anyway and count it, drop it, shrink its advantage, or give the whole group
    back to be sampled again by newer weights."""
    max_requeues: PositiveInt = 3
    """Times one group is given back under ``on_stale=requeue``; after that it is dropped."""
    zero_spread: Literal["keep", "drop", "refill"] = "drop"
    """Groups whose rewards are all equal: keep them, drop them from the batch, or draw others in their place (DAPO)."""
    advantage: str = "grpo"
    """Advantage estimator, see ``agentrl.algorithms.advantages``. With ``remax``, ``serve`` adds one greedy rollout to each group."""
    advantage_params: dict[str, Any] = {}
    """Its parameters."""
    loss: str = "ppo"
    """Policy loss, see ``agentrl.algorithms.losses``."""
    loss_params: dict[str, Any] = {}
    """Its parameters besides the clip range."""
    clip: list[float] = [0.2, 0.28]
    """Lower and upper clip range of the ratio."""
    loss_agg: Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"] = (
        "token-mean"
    )
    """How token losses are added up; normalised over the whole step, whatever the micro-batches."""
    old_logprobs: Literal["rollout", "recompute", "loglinear"] = "rollout"
    """The ratio's denominator: the sampler's logprobs, those of the weights before the step (decoupled), or, for
    ``loss=decoupled_ppo``, an interpolation by version that needs no forward pass."""
    tis_cap: PositiveFloat | None = None
    """Cap of the token importance weights when ``old_logprobs=recompute``; short for ``correction.weights=token`` with that
    ``correction.threshold``."""
    correction: CorrectionConfig = CorrectionConfig()
    """Off-policy mode, importance weights and rejection."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the frozen starting policy; 0 loads no reference."""
    kl: KLConfig = KLConfig()
    """Where the KL acts, how it is estimated and steered."""
    overlong: OverlongConfig | None = None
    """Penalty on long answers; none by default."""
    turn_rewards: bool = False
    """Place per-turn rewards at their turns; turn-level estimators always do."""
    epochs: PositiveInt = 1
    """Passes over each batch."""
    minibatches: PositiveInt = 1
    """Optimizer updates per pass; groups stay together."""
    critic: CriticConfig | None = None
    """Value model, for ``advantage=gae``."""
    lora: LoraConfig | None = None
    """Low-rank adapters instead of full training."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up."""
    betas: list[float] = [0.9, 0.95]
    """Adam's moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    grad_clip: PositiveFloat = 1.0
    """Gradient norm bound."""
    micro_tokens: PositiveInt = 8192
    """Tokens per forward pass; the only memory knob most runs need. With ``sequence_parallel`` each rank of a group holds its share."""
    logit_chunk: PositiveInt = 1024
    """Tokens whose logits over the vocabulary exist at a time."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: about a third more time, far less memory."""
    offload: bool = False
    """Keep shards, gradients and optimizer state in host memory; slow, for models that do not fit."""
    compile: bool = False
    """``torch.compile`` the decoder layers: a slow first step, faster ones after it; needs a C++ compiler, on CUDA triton."""
    grad_sync: Literal["last", "each"] = "last"
    """Add gradients up over ranks once per update, or after each micro-batch, which keeps shards only."""
    prefetch: bool = True
    """Read and decode the next batch's groups while this one is trained."""
    publish: Literal["full", "delta"] = "full"
    """What each new version is published as: all weights, or only the elements that changed where that is at most half as large.
    Pays with ``model.dtype=bfloat16`` and small learning rates, when serve reads the weights over a network."""
    publish_full_every: PositiveInt = 20
    """With ``publish=delta``, a full snapshot at least this often: a serve that starts reads all deltas since."""
    publish_scratch: str | None = None
    """With ``publish=delta``, a folder for the last full weights that only the learner reads; put it on a local disk. Default: beside
    the published ones."""
    save_every: PositiveInt = 20
    """Steps between checkpoints."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept."""
    keep_best: KeepBestConfig | None = None
    """One more checkpoint to keep, the best so far; none by default."""
    async_save: bool = False
    """Train on while a checkpoint is written, from a copy in host memory. Entries are still acknowledged behind it, only later."""
    resume: str = "auto"
    """``auto`` continues from the newest checkpoint, ``disable`` starts anew, anything else is a checkpoint's path."""
    stall_timeout_s: PositiveFloat = 1800.0
    """Without a complete group for this long, ``learn`` stops and names the stage it waits for."""

    @model_validator(mode="after")
    def _check(self) -> "LearnConfig":
        if len(self.clip) != 2 or min(self.clip) < 0:
            raise ValueError(f"learn.clip={self.clip} must be [low, high], both >= 0")
        if len(self.betas) != 2:
            raise ValueError(f"learn.betas={self.betas} must be two numbers")
        if self.pipeline_depth > self.max_staleness:
            raise ValueError(
                f"learn.pipeline_depth={self.pipeline_depth} exceeds learn.max_staleness={self.max_staleness}: work generated that "
                "far ahead would always be too stale. Lower pipeline_depth or raise max_staleness"
            )
        if self.tis_cap is not None and self.off_policy_mode != "decoupled":
            raise ValueError(
                "learn.tis_cap needs learn.old_logprobs=recompute: with the sampler's logprobs the ratio itself corrects"
            )
        if self.tis_cap is not None and self.correction.weights is not None:
            raise ValueError("learn.tis_cap and learn.correction.weights both set importance weights: keep one of them")
        mode, decouples = self.correction.mode, self.old_logprobs == "recompute"
        if mode is not None and mode != "decoupled" and decouples:
            raise ValueError(f"learn.correction.mode={mode} contradicts learn.old_logprobs=recompute, which is decoupled")
        if mode == "pure" and (self.loss != "reinforce" or self.correction.weights is None):
            raise ValueError(
                f"learn.correction.mode=pure is REINFORCE with importance weights: set learn.loss=reinforce (is {self.loss}) and "
                f"learn.correction.weights=token or sequence (is {self.correction.weights})"
            )
        if (
            mode != "pure"
            and self.off_policy_mode == "bypass"
            and self.correction.weights is not None
            and self.loss != "reinforce"
        ):
            raise ValueError(
                "learn.correction.weights with the rollout's logprobs would count the ratio twice: set learn.correction.mode=decoupled, "
                "or pure with learn.loss=reinforce"
            )
        if self.critic is not None and self.advantage != "gae":
            raise ValueError(f"learn.critic is of use to learn.advantage=gae only, not to {self.advantage}")
        if self.critic is None and self.advantage == "gae":
            raise ValueError("learn.advantage=gae needs values: add a `critic:` section under learn, or use grpo or rloo")
        return self

    @property
    def needs_greedy_baseline(self) -> bool:
        """Whether ``serve`` plays one greedy rollout per group, whose reward the estimator takes off."""
        return self.advantage == "remax"

    @property
    def off_policy_mode(self) -> Literal["bypass", "decoupled", "pure"]:
        """The correction's mode, which ``old_logprobs`` decides where it is not given."""
        if self.correction.mode is not None:
            return self.correction.mode
        return "decoupled" if self.old_logprobs == "recompute" else "bypass"


class SftConfig(Section):
    """Cold start: supervised steps on assistant tokens before reinforcement learning."""

    steps: PositiveInt = 900
    """Optimizer steps."""
    batch: PositiveInt = 16
    """Conversations per step."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    betas: list[float] = [0.9, 0.98]
    """Adam's moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    warmup_steps: NonNegativeInt = 20
    """Steps of linear warm-up."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Final share of steps over which the rate falls linearly to zero."""
    grad_clip: PositiveFloat = 1.0
    """Gradient norm bound."""
    micro_tokens: PositiveInt = 8192
    """Tokens per forward pass."""
    shuffle: bool = False
    """Shuffle the conversations; off keeps a curriculum's order."""
    out: str | None = None
    """Where the model goes; default ``<run>/sft``."""


class EvalConfig(Section):
    """Measures a checkpoint on held-out tasks."""

    n: PositiveInt = 200
    """Tasks, from the start of ``data.val``."""
    samples: PositiveInt = 1
    """Rollouts per task; greedy decoding uses one."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy."""
    every: NonNegativeInt = 0
    """During ``run``: evaluate each checkpoint whose step is a multiple of this, beside the run on engines of its own; 0 is never. Several
    behind, the oldest comes first, so ``learn.keep`` should hold as many."""
    in_flight: PositiveInt = 64
    """Rollouts running at once."""


class SandboxConfig(Section):
    """The code-execution service that ``tools.code_interpreter`` calls."""

    url: str = "auto"
    """``auto`` starts one beside the run when a tool needs it; or the address of a running service."""
    workers: PositiveInt = 1
    """Warm fork-servers."""
    memory_mb: PositiveInt = 512
    """Memory limit of one run."""
    preload: list[str] = []
    """Modules imported once, before any run, such as ``numpy`` or ``sympy``."""


class LogConfig(Section):
    """What is recorded."""

    trackers: list[Literal["console", "file", "tensorboard", "wandb"]] = ["console", "file"]
    """Where step metrics go; ``file`` is ``metrics.jsonl`` and is always written."""
    trajectories: Literal["all", "off"] = "all"
    """Whether ``trajectories/`` keeps every trajectory with ids, mask, logprobs and versions. ``audit`` needs it."""
    level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"
    """Log level of every process."""


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: str | None = None
    """``envs.gsm8k:Gsm8k``: an Env class; or leave it out and give ``reward.fn``."""
    env_options: dict[str, Any] = {}
    """Keyword arguments of the Env class."""
    tools: str | list[dict[str, Any]] | None = None
    """A tool YAML, or its ``tools:`` list in place."""
    reward: RewardConfig = RewardConfig()
    serve: ServeConfig = ServeConfig()
    agent: AgentConfig = AgentConfig()
    queue: QueueConfig = QueueConfig()
    learn: LearnConfig = LearnConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()
    sandbox: SandboxConfig = SandboxConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.env is not None and self.reward.fn is not None:
            raise ValueError("give either env or reward.fn, not both: each would decide the reward")
        if self.serve.agent == "env" and self.env is None:
            raise ValueError("serve.agent=env lets an Env reply to the model, and no env is given: set env=module:Class")
        if self.serve.agent == "proxy" and not self.agent.command:
            raise ValueError("serve.agent=proxy runs a program, and none is given: set agent.command, say [python, my_agent.py]")
        if (self.env is not None or self.reward.fn is not None) and self.agent.reward != "score":
            raise ValueError(f"agent.reward={self.agent.reward} and env or reward.fn would both decide the reward: keep one")
        if self.agent.port and self.serve.workers > 1:
            raise ValueError(f"each of serve.workers={self.serve.workers} opens its own endpoint for agents: leave agent.port=0")
        return self

    @property
    def max_items(self) -> int:
        """The stream's bound: room for the whole pipeline, because admission already bounds what is generated ahead."""
        return self.queue.max_items or (self.learn.pipeline_depth + 2) * self.learn.groups * (self.serve.n + 1)
