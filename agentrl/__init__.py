"""agentrl trains tool-using language models with reinforcement learning, asynchronously. The data path, top to bottom:

1. ``data``       reads task rows and deals them out by ordinal, so a resume needs one number.
2. ``rollout``    decides when a group may start, plays its rollouts, calls tools, scores what the assistant wrote.
3. ``serving``    samples tokens: balances engines, keeps partial work when one dies, brings each to the announced weights.
4. ``stream``     carries each trajectory, once, over a durable Redis stream; a full stream stops generation.
5. ``learner``    takes whole groups, refuses what is too stale, packs, computes ``algorithms``, steps FSDP2 ranks,
6.                checkpoints, acknowledges only behind the checkpoint, and writes the new weights.
7. ``serving``    updates every engine in place while it generates; each token records the version that sampled it.
8. ``sandbox``    runs the model's code where it can harm nothing; ``tools`` call it over HTTP.
9. ``assembly``   wires these into ``agentrl serve`` and ``agentrl learn``; ``config`` is one YAML; ``telemetry`` is the run directory.
10. ``cli audit`` proves afterwards that what was trained is what was sampled, each trajectory once.
"""

from agentrl.errors import AgentRLError, ConfigError, ToolBusy, ToolError
from agentrl.plugins import tool
from agentrl.protocols import Env, Reply, Tool, ToolContext, ToolResult
from agentrl.types import Episode, Message, Score, Task, Trajectory

__all__ = [
    "AgentRLError",
    "ConfigError",
    "Env",
    "Episode",
    "Message",
    "Reply",
    "Score",
    "Task",
    "Tool",
    "ToolBusy",
    "ToolContext",
    "ToolError",
    "ToolResult",
    "Trajectory",
    "tool",
]
