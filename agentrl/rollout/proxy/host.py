"""Runs black-box agents: the endpoint they talk to, one session and one process each, and what their end means.

Waits for: the agent (``agent``), under the rollout's deadline, which ends its process group. What the agent waits for
itself (``server``) is bounded by the turn's deadline.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeAlias

import uvicorn

from agentrl.errors import AgentError
from agentrl.process import KEEP_ALIVE_S
from agentrl.rollout.agent_loop import AgentHost, RolloutState
from agentrl.rollout.proxy.agent_process import AgentCommand, AgentExit, run_agent
from agentrl.rollout.proxy.app import Sessions, create_app
from agentrl.rollout.proxy.session import Session
from agentrl.supervise import deadline, running
from agentrl.types import Score, Stop

logger = logging.getLogger(__name__)

RewardSource: TypeAlias = Literal["score", "api", "exit_code"]

START_LIMIT_S = 30.0
SHUTDOWN_GRACE_S = 2
_TAIL_CHARS = 800


class ProxyHost(AgentHost):
    """See the module's docstring; made by `proxy_host`.

    Args:
        command: started for each rollout.
        reward: ``score`` asks the run's Env or reward function, ``api`` takes what the agent posts, ``exit_code`` gives 1
            for 0 and 0 for any other.
        model: the name agents see.
        follows_request: see `Session`.
    """

    def __init__(
        self,
        command: AgentCommand,
        *,
        reward: RewardSource = "score",
        model: str = "policy",
        follows_request: bool = False,
    ) -> None:
        self._command = command
        self._reward: RewardSource = reward
        self._model = model
        self._follows_request = follows_request
        self.sessions = Sessions()
        self.app = create_app(self.sessions, model=model)
        self.url = ""

    @contextlib.contextmanager
    def session(self, state: RolloutState) -> Generator[Session]:
        """A session that is open for as long as the block."""
        session = Session(state=state, key=f"sk-{secrets.token_urlsafe(32)}", dumps=_dumps, follows_request=self._follows_request)
        self.sessions.add(session)
        try:
            yield session
        finally:
            self.sessions.end(session)

    def variables(self, session: Session) -> dict[str, str]:
        """The environment that leads an unmodified OpenAI client to this session."""
        base = f"{self.url}/s/{session.id}"
        return {
            "OPENAI_BASE_URL": f"{base}/v1",
            "OPENAI_API_BASE": f"{base}/v1",
            "OPENAI_API_KEY": session.key,
            "OPENAI_MODEL": self._model,
            "AGENTRL_SESSION_URL": base,
            "AGENTRL_MODEL": self._model,
        }

    async def play(self, state: RolloutState) -> Stop:
        """Run one agent to its end.

        Raises:
            AgentError: it could not be started, crashed, never asked the model, or owed a reward and gave none.
            GenerationError, DeadlineExceeded: it crashed because the engines had failed it.
        """
        with self.session(state) as session:
            ended = await run_agent(self._command, state.task, variables=self.variables(session))
        return self._judge(state, session, ended)

    def _judge(self, state: RolloutState, session: Session, ended: AgentExit) -> Stop:
        if ended.code != 0 and session.failure is not None:
            raise session.failure
        is_verdict = self._reward == "exit_code" and ended.code >= 0 and ended.was_started
        if ended.code != 0 and session.limit is None and not is_verdict:
            raise AgentError(f"the agent ended with {_how(ended.code)}.{_said(ended)}")
        if not state.builder.num_sampled:
            raise AgentError(
                f"the agent ended with {_how(ended.code)} without asking the model once: it must use OPENAI_BASE_URL and "
                f"OPENAI_API_KEY.{_said(ended)}"
            )
        if self._reward == "exit_code":
            state.score = Score(correct=float(ended.code == 0))
        elif self._reward == "api":
            if session.given is None:
                raise AgentError(
                    f"the agent ended without a reward although agent.reward=api: POST it to $AGENTRL_SESSION_URL/reward.{_said(ended)}"
                )
            state.score = session.given
        return session.limit if session.limit is not None and ended.code != 0 else "answered"

    def stats(self) -> dict[str, Any]:
        """For the status: open sessions, and how often a conversation was rewritten."""
        return {"sessions": len(self.sessions), "branches": self.sessions.num_branches}


@asynccontextmanager
async def proxy_host(host: ProxyHost, *, bind: str = "127.0.0.1", port: int = 0) -> AsyncGenerator[ProxyHost]:
    """The endpoint, up for as long as the block; ``port`` 0 takes a free one."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bind, port))
        host.url = f"http://{bind}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            host.app,
            http="h11",
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        )
        server = _Server(config)
        async with running(endpoint=_serve(server, listener)):
            async with deadline(START_LIMIT_S, "endpoint start"):
                while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
                    await asyncio.sleep(0.01)
            logger.info("agent_endpoint url=%s", host.url)
            yield host


class _Server(uvicorn.Server):
    """uvicorn beside other things in one process: signals are the process's, not its."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        await server.serve(sockets=[listener])
    except asyncio.CancelledError:
        server.force_exit = True
        await server.shutdown(sockets=[listener])
        raise


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _said(ended: AgentExit) -> str:
    return f" The end of its output:\n{ended.tail[-_TAIL_CHARS:]}" if ended.tail else " It printed nothing."


def _dumps(arguments: Mapping[str, Any]) -> str:
    return json.dumps(dict(arguments), ensure_ascii=False)
