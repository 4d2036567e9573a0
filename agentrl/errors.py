"""Every error agentrl raises on purpose.

    AgentRLError
    ├── ConfigError            a setting, file or command line is wrong; names the place
    ├── DataError              a row, task or data file is wrong; names file and row
    ├── StreamError            the trajectory stream refused, lost or corrupted something
    │   ├── CodecError         bytes that are not a valid entry of a known schema
    │   ├── StreamFull         the bound is reached: wait, never drop
    │   └── Fenced             a newer learner owns the stream; this one must stop
    ├── CheckpointError        a checkpoint is missing, torn or does not fit
    ├── WeightSyncError        a server could not be brought to the announced policy
    ├── TrainingDiverged       gradients stayed non-finite; the weights are the last finite ones
    ├── RankLost               another rank of the learner died or did not come in time
    ├── StalledError           nothing moved for too long; names the stage
    └── RolloutError           one rollout failed; its siblings go on
        ├── ToolError          the model's mistake: the text is shown to the model
        ├── ToolInfraError     the tool itself failed: never a negative reward
        │   └── ToolBusy       its service refused the call for now (a rate limit); nothing was done
        ├── SandboxError       the sandbox service failed
        ├── GenerationError    no server could generate
        ├── EnvError       the environment failed while it played: never a negative reward
        ├── AgentError     a black-box agent failed, or never asked the model
        ├── RewardError        the scorer raised, or returned no number
        ├── TemplateError      the chat template is not prefix-preserving
        └── DeadlineExceeded   a deadline owned by the caller passed

A message has three parts: what happened, the numbers, what to change.
"""


class AgentRLError(Exception):
    """Base of every deliberate error."""


class ConfigError(AgentRLError):
    """A setting, file or command line is wrong; the message names the place and the nearest valid key."""


class DataError(AgentRLError):
    """A task, row or data file is malformed; the message names file and row."""


class StreamError(AgentRLError):
    """The trajectory stream refused, lost or corrupted something."""


class MembersLost(StreamError):
    """A group was to close with members that the stream does not know: its server lost them, or they were never put."""


class CodecError(StreamError):
    """The bytes are not a valid entry: truncated, corrupted, or of an unknown schema."""


class StreamFull(StreamError):
    """The stream holds as much as it may; the producer must wait."""


class Fenced(StreamError):
    """A learner with a newer run epoch owns the stream; this process must stop."""


class CheckpointError(AgentRLError):
    """A checkpoint is missing, torn, or does not fit the model or the run."""


class WeightSyncError(AgentRLError):
    """A server could not be brought to the announced policy version."""


class ServerUnreachable(WeightSyncError):
    """Nobody listens at a server's address, which says nothing of the policy that it was to load."""


class TrainingDiverged(AgentRLError):
    """Gradients were not finite several updates in a row; the weights are those of the last finite update."""


class RankLost(AgentRLError):
    """A collective of the learner's ranks failed: another rank died, or did not join it in time."""


class StalledError(AgentRLError):
    """Nothing moved for longer than the limit; the message names the stage that waits."""


class RolloutError(AgentRLError):
    """One rollout failed; it is recorded and its siblings go on."""

    kind = "rollout"
    partial: object | None = None
    """What was rolled out before the failure (an ``agentrl.rollout.agent_loop.Rollout``), kept for replay."""


class ToolError(RolloutError):
    """The model's mistake. The text is shown to the model as the tool's result."""

    kind = "tool"


class ToolInfraError(RolloutError):
    """The tool itself failed (network, crash, timeout of a service). It never counts against the model."""

    kind = "tool_infra"


class ToolBusy(ToolInfraError):
    """The tool's service refused the call for now and did nothing, so that asking again is safe.

    Args:
        message: who refused, and how.
        retry_after_s: seconds after which the service wants to be asked again; None where it did not say.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SandboxError(ToolInfraError):
    """The sandbox service failed or could not be reached."""

    kind = "sandbox"


class GenerationError(RolloutError):
    """No server could produce the generation."""

    kind = "generation"


class EnvError(RolloutError):
    """The environment raised or took too long while it played. It never counts against the model."""

    kind = "env"


class AgentError(RolloutError):
    """A black-box agent (loop ``proxy``) failed, or ended without having asked the model."""

    kind = "agent"


class RewardError(RolloutError):
    """The scorer raised or returned something that is no reward; the rollout is kept for replay, never trained on."""

    kind = "reward"


class TemplateError(RolloutError):
    """The chat template changed tokens that were already fixed, so ids could not be extended."""

    kind = "template"


class DeadlineExceeded(RolloutError):
    """A deadline owned by the caller passed.

    Args:
        stage: what did not finish.
        seconds: the limit.
        silent_s: seconds since the last sign of progress, where that is known.
    """

    kind = "deadline"

    def __init__(self, stage: str, seconds: float, *, silent_s: float | None = None) -> None:
        super().__init__(f"{stage} did not finish within {seconds:g} s")
        self.stage = stage
        self.seconds = seconds
        self.silent_s = silent_s
