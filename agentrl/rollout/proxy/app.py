"""The OpenAI-compatible endpoint: routes, bearer keys, errors in OpenAI's shape. A session is named by the path or by its key.

``/s/{session}/v1/…`` and ``/v1/…`` serve the same routes; both want ``Authorization: Bearer KEY``, and the key is one
session's own. Closed or unknown sessions answer 410 or 401, which the ``openai`` SDK does not retry; what the engines failed
at answers 503 or 504, which it does.
"""

import hashlib
import hmac
import logging
import math
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from agentrl.errors import DeadlineExceeded, RolloutError, TemplateError
from agentrl.rollout.proxy import chat, responses
from agentrl.rollout.proxy.messages import MessageError
from agentrl.rollout.proxy.session import Answer, LimitReached, Session, SessionClosed, Show
from agentrl.rollout.proxy.streaming import Refused, StreamedAnswer
from agentrl.types import Score

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 20

_Body = TypeVar("_Body", bound=BaseModel)


class RewardRequest(BaseModel):
    """``POST /s/{session}/reward``; the last one counts."""

    model_config = ConfigDict(extra="forbid")

    reward: float
    terms: dict[str, float] = {}
    """Named terms that are added to it."""


class Sessions:
    """The open sessions, and those that ended, so that a late request is told so."""

    def __init__(self, *, remembered: int = 10_000) -> None:
        self._open: dict[str, Session] = {}
        self._by_key: dict[bytes, str] = {}
        self._closed: dict[str, None] = {}
        self._remembered = remembered
        self.num_branches = 0
        """Of the sessions that ended."""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, session: Session) -> None:
        self._open[session.id] = session
        self._by_key[_digest(session.key)] = session.id

    def end(self, session: Session) -> None:
        """Close it and forget all but its name."""
        session.close()
        self._open.pop(session.id, None)
        self.num_branches += session.branches
        self._closed[session.id] = None
        while len(self._closed) > self._remembered:
            oldest = next(iter(self._closed))
            del self._closed[oldest]
            self._by_key = {k: s for k, s in self._by_key.items() if s != oldest}

    def find(self, request: Request) -> Session:
        """The session that the path or the key names.

        Raises:
            Refused: no key, a wrong one, or a session that ended.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Refused(401, "a bearer key is wanted: use the OPENAI_API_KEY that the agent was started with", code="no_key")
        named = self._by_key.get(_digest(key))
        in_path = request.path_params.get("session")
        if named is None or (in_path is not None and in_path != named):
            raise Refused(401, "this key opens no session, or another one than the path names", code="invalid_api_key")
        session = self._open.get(named)
        if session is None or not hmac.compare_digest(session.key.encode(), key.encode()):
            raise Refused(410, "this rollout is over; its endpoint takes no more requests", code="session_closed")
        return session


def create_app(sessions: Sessions, *, model: str) -> FastAPI:
    """The application over these sessions; ``model`` is the name it gives the policy."""
    app = FastAPI(title="agentrl policy", docs_url=None, redoc_url=None, openapi_url=None)

    async def chat_completions(request: Request) -> Response:
        session = sessions.find(request)
        body = await _parsed(request, chat.ChatRequest)
        ask, n, name = body.ask(), body.n or 1, body.model or model
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            template = session.state.template if body.logprobs else None
            writer = chat.Chunks(model=name, template=template, with_usage=wants_usage)
            return StreamedAnswer(lambda show: session.answer(ask, n=n, show=show), writer, refusal=_refusal)
        answers = await session.answer(ask, n=n)
        return JSONResponse(
            chat.completion(answers, model=name, template=session.state.template, with_logprobs=bool(body.logprobs))
        )

    async def create_response(request: Request) -> Response:
        session = sessions.find(request)
        body = await _parsed(request, responses.ResponsesRequest)
        ask, base = body.ask(session.responses), responses.opened(body, model=body.model or model)

        async def answered(show: Show | None) -> list[Answer]:
            answers = await session.answer(ask, show=show)
            session.responses[base["id"]] = body.kept(ask, answers[0])
            return answers

        if body.stream:
            return StreamedAnswer(answered, responses.Events(base), refusal=_refusal)
        (answer,) = await answered(None)
        return JSONResponse(responses.response(base, answer))

    async def models(request: Request) -> Response:
        sessions.find(request)
        return JSONResponse({"object": "list", "data": [_model(model)]})

    async def one_model(request: Request) -> Response:
        sessions.find(request)
        return JSONResponse(_model(str(request.path_params["name"])))

    async def reward(request: Request) -> Response:
        session = sessions.find(request)
        body = await _parsed(request, RewardRequest)
        if not all(math.isfinite(x) for x in (body.reward, *body.terms.values())):
            raise Refused(400, "a reward must be finite", param="reward")
        session.given = Score(correct=body.reward, terms=body.terms)
        return JSONResponse({"ok": True, "reward": session.given.reward})

    async def status(request: Request) -> Response:
        session = sessions.find(request)
        state = session.state
        left = state.limits.max_turns - state.num_turns
        return JSONResponse(
            {"session": session.id, "turns": state.num_turns, "turns_left": left, "tokens_left": state.tokens_left,
             "branches": session.branches, "reward": session.given.reward if session.given else None}
        )  # fmt: skip

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "sessions": len(sessions)})

    for prefix in ("", "/s/{session}"):
        app.add_route(f"{prefix}/v1/chat/completions", _guarded(chat_completions), methods=["POST"])
        app.add_route(f"{prefix}/v1/responses", _guarded(create_response), methods=["POST"])
        app.add_route(f"{prefix}/v1/models", _guarded(models), methods=["GET"])
        app.add_route(prefix + "/v1/models/{name:path}", _guarded(one_model), methods=["GET"])
        app.add_route(f"{prefix or '/v1'}/reward", _guarded(reward), methods=["POST"])
    app.add_route("/s/{session}", _guarded(status), methods=["GET"])
    app.add_route("/health", health, methods=["GET"])

    async def not_found(request: Request, _: Exception) -> Response:
        refused = Refused(404, f"there is no {request.method} {request.url.path} here", code="unknown_url")
        return JSONResponse(refused.body, status_code=404)

    app.add_exception_handler(404, not_found)
    app.add_exception_handler(405, not_found)
    return app


def _guarded(route: Any) -> Any:
    """The route with what it raises turned into OpenAI's error shape."""

    async def handler(request: Request) -> Response:
        try:
            return await route(request)
        except Exception as error:
            refused = _refusal(error)
            if refused is None:
                raise
        return JSONResponse(refused.body, status_code=refused.status)

    return handler


def _refusal(error: Exception) -> Refused | None:
    """What an error is to a client; None where it is none of ours."""
    match error:
        case Refused():
            return error
        case MessageError():
            return Refused(400, str(error), param=error.param)
        case TemplateError():
            return Refused(400, f"the model's chat template cannot print this conversation: {error}", code="template_error")
        case SessionClosed():
            return Refused(410, str(error), code="session_closed")
        case LimitReached():
            code = "context_length_exceeded" if error.stop == "max_tokens" else "turn_limit_reached"
            return Refused(400, str(error), code=code)
        case DeadlineExceeded():
            return Refused(504, str(error), code="deadline")
        case RolloutError():
            return Refused(503, str(error), code=error.kind)
        case _:
            return None


async def _parsed(request: Request, kind: type[_Body]) -> _Body:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise Refused(413, f"the body exceeds {MAX_BODY_BYTES} bytes", code="body_too_large")
    try:
        return kind.model_validate_json(bytes(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise Refused(400, f"{param or 'body'}: {first['msg']}", param=param) from error


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "agentrl"}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
