"""The loop ``proxy``: a black-box agent plays the rollout through the OpenAI-compatible endpoint."""

from agentrl.errors import ConfigError
from agentrl.rollout.agent_loop import RolloutState, agent_loop
from agentrl.types import Stop


@agent_loop("proxy")
async def proxy(state: RolloutState) -> Stop:
    """Let the host run one agent to its end.

    Raises:
        ConfigError: this process has no host, because no command is configured.
    """
    if state.host is None:
        raise ConfigError("the loop `proxy` needs a command to run: set agent.command, for example [python, my_agent.py]")
    return await state.host.play(state)
