"""Agents that are coroutines of a test, for the proxy."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agentrl.rollout.agent_loop import RolloutState
from agentrl.rollout.proxy.host import ProxyHost
from agentrl.rollout.proxy.session import Session
from agentrl.types import Stop

openai = pytest.importorskip("openai")

Agent = Callable[[Any, Session], Awaitable[None]]


class Inline:
    """A host whose agent is a coroutine of the test instead of a process."""

    def __init__(self, host: ProxyHost, agent: Agent) -> None:
        self.host, self.agent = host, agent

    async def play(self, state: RolloutState) -> Stop:
        with self.host.session(state) as session:
            variables = self.host.variables(session)
            async with openai.AsyncOpenAI(
                base_url=variables["OPENAI_BASE_URL"], api_key=variables["OPENAI_API_KEY"], max_retries=0
            ) as client:
                await self.agent(client, session)
        if session.given is not None:
            state.score = session.given
        return "answered"
