"""The loop ``env``: an environment answers the model's turns, as a user simulator, a game or a critic does.

A turn that calls tools gets their results, as in ``tool_agent``; any other turn goes to ``Env.reply``. Waits for
``env:<name>`` under ``Limits.env_timeout_s``, besides what every loop waits for.

After a restart of the process a rollout goes on where its Env can (``Env.save``, ``Env.resume``). Asking ``reply`` again for the
turns on record would do only where an environment always says the same, which a simulated user does not.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Coroutine
from typing import Any, SupportsFloat, TypeVar

from agentrl.errors import ConfigError, DeadlineExceeded, EnvError, RolloutError
from agentrl.protocols import Env, Reply
from agentrl.rollout.agent_loop import RolloutState, agent_loop
from agentrl.rollout.truncation import cut_to_tokens
from agentrl.supervise import deadline, waiting
from agentrl.types import Stop

logger = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_TIMEOUT_S = 10.0


@agent_loop("env")
async def env_agent(state: RolloutState) -> Stop:
    """Generate, call tools, let the environment reply, until it ends the conversation or a limit is reached.

    Raises:
        ConfigError: the run has no Env, or one that only scores.
        EnvError: the environment failed.
    """
    env = state.env
    if env is None or not hasattr(env, "reply"):
        raise ConfigError("the loop `env` needs an Env that replies: set env=module:Class, whose `reply` answers a turn")
    await _open(env, state)
    while True:
        turn = await state.generate()
        calls = state.find_calls(turn)
        if turn.is_cut and not calls:
            return "max_tokens"
        is_last = state.num_turns >= state.limits.max_turns or state.tokens_left == 0
        if calls:
            if is_last:
                return "max_tokens" if state.tokens_left == 0 else "max_turns"
            stop = await state.call_tools(calls)
            if stop is not None:
                return stop
            await _keep(env, state)
            continue
        started = time.monotonic()
        reply = await _reply(env, state)
        if reply.reward is not None:
            state.reward_turn(reply.reward)
        if reply.text is None:
            return "answered"
        if is_last:
            return "max_tokens" if state.tokens_left == 0 else "max_turns"
        text = cut_to_tokens(state.template.tokenizer, reply.text, state.limits.max_reply_tokens)
        ms = (time.monotonic() - started) * 1e3
        if not state.observe([{"role": "user", "content": text}], kind="env", name=_name(env), ms=ms):
            return "max_tokens"
        await _keep(env, state)


async def _open(env: Env, state: RolloutState) -> None:
    """Open the rollout's state, or bring back the one that an earlier process saved."""
    saved = await state.resume(with_env=True)
    limit_s, task, name = state.limits.env_timeout_s, state.task, state.trajectory_id
    if saved is not None:
        opened = await _guarded(env, "resume", env.resume(task, json.loads(saved), trajectory_id=name), limit_s)
    elif hasattr(env, "open"):
        opened = await _guarded(env, "open", env.open(task, trajectory_id=name), limit_s)
    else:
        return
    state.env_state = opened
    state.cleanup.push_async_callback(_close, env, opened)


async def _keep(env: Env, state: RolloutState) -> None:
    """Keep the turns so far, as far as the environment can go on from here."""
    if state.partials is None:
        return
    saved = None
    if hasattr(env, "save"):
        try:
            value = await _guarded(env, "save", env.save(state.env_state), state.limits.env_timeout_s)
            saved = None if value is None else json.dumps(dict(value), allow_nan=False)
        except (EnvError, TypeError, ValueError) as error:
            logger.warning("env_save_failed env=%s: %s. A rollout that a restart cuts starts again", _name(env), error)
    await state.keep(env_saved=saved, is_resumable=saved is not None)


async def _reply(env: Env, state: RolloutState) -> Reply:
    value: Any = await _guarded(env, "reply", env.reply(state.episode("")), state.limits.env_timeout_s)
    reply = value if isinstance(value, Reply) else Reply(text=value)
    if reply.text is not None and not isinstance(reply.text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # foreign
        raise EnvError(f"{_name(env)}.reply returned {type(reply.text).__name__}; return a string, a Reply or None")
    if reply.reward is not None and not isinstance(reply.reward, SupportsFloat):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise EnvError(f"{_name(env)}.reply gave a turn the reward {reply.reward!r}; it must be a number")
    if reply.reward is not None and not math.isfinite(reply.reward):
        raise EnvError(f"{_name(env)}.reply gave a turn the reward {reply.reward}; it must be finite")
    return reply


async def _guarded(env: Env, what: str, call: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """Await foreign code under our deadline and classify what it raises, once."""
    try:
        with waiting(f"env:{_name(env)}"):
            async with deadline(timeout_s, f"env:{_name(env)} {what}"):
                return await call
    except DeadlineExceeded as error:
        raise EnvError(f"{_name(env)}.{what} did not finish within {timeout_s:g} s; raise serve.env_timeout_s") from error
    except RolloutError:
        raise
    except Exception as error:
        raise EnvError(f"{_name(env)}.{what} raised {type(error).__name__}: {error}") from error


async def _close(env: Env, opened: Any) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await env.close(opened)
    except Exception as error:  # noqa: BLE001  # the rollout's outcome stands; a leak is worth a warning
        logger.warning("env_close_failed env=%s: %s: %s. Its resources may leak", _name(env), type(error).__name__, error)


def _name(env: Env) -> str:
    return type(env).__name__
