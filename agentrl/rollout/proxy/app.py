"""The OpenAI-compatible endpoint: routes, bearer keys, errors in OpenAI's shape. A session is named by the path or by its key.

``/s/{session}/v1/…`` and ``/v1/…`` serve the same routes; both want ``Authorization: Bearer KEY``, and the key is one
session's own. Closed or unknown sessions answer 410 or 401, which the ``openai`` SDK does not retry; what the engines failed
at answers 503 or 504, which it does.
"""

import hashlib
import hmac
import json
import logging
import math
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from agentrl.errors import DeadlineExceeded, RolloutError, TemplateError
from agentrl.rollout.proxy import chat, responses
from agentrl.rollout.proxy.messages import MessageError
from agentrl.rollout.proxy.session import LimitReached, Session, SessionClosed
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


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 404: "not_found_error"}.get(status) or (
            "server_error" if status >= 500 else "invalid_request_error"
        )
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


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
        answers = await session.answer(body.ask(), n=body.n or 1)
        whole = chat.completion(
            answers, model=body.model or model, template=session.state.template, with_logprobs=bool(body.logprobs)
        )
        if not body.stream:
            return JSONResponse(whole)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        return _stream(chat.chunks(whole, with_usage=wants_usage), ends_with_done=True)

    async def create_response(request: Request) -> Response:
        session = sessions.find(request)
        body = await _parsed(request, responses.ResponsesRequest)
        ask = body.ask(session.responses)
        (answer,) = await session.answer(ask)
        whole = responses.response(answer, model=body.model or model, request=body)
        session.responses[whole["id"]] = body.kept(ask, answer)
        return _stream(responses.events(whole), ends_with_done=False) if body.stream else JSONResponse(whole)

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
        except Refused as error:
            refused = error
        except MessageError as error:
            refused = Refused(400, str(error), param=error.param)
        except TemplateError as error:
            refused = Refused(400, f"the model's chat template cannot print this conversation: {error}", code="template_error")
        except SessionClosed as error:
            refused = Refused(410, str(error), code="session_closed")
        except LimitReached as error:
            code = "context_length_exceeded" if error.stop == "max_tokens" else "turn_limit_reached"
            refused = Refused(400, str(error), code=code)
        except DeadlineExceeded as error:
            refused = Refused(504, str(error), code="deadline")
        except RolloutError as error:
            refused = Refused(503, str(error), code=error.kind)
        return JSONResponse(refused.body, status_code=refused.status)

    return handler


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


def _stream(items: Iterable[Mapping[str, Any]], *, ends_with_done: bool) -> Response:
    async def lines() -> AsyncGenerator[bytes]:
        for item in items:
            name = f"event: {item['type']}\n" if "type" in item else ""
            yield f"{name}data: {json.dumps(item, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
        if ends_with_done:
            yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "agentrl"}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
