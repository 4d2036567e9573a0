"""An answer that is sent while it is sampled: server-sent events, and an end on both sides when either is gone.

Waits for: the session's answer, bounded by the turn's and the rollout's deadlines, and the client, who ends the generation by
hanging up. Nothing is sent before the first token, so that a request that fails until then gets a proper status, which SDKs
retry. A later failure is an event.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from agentrl.rollout.proxy.session import Answer, Show
from agentrl.rollout.proxy.turn_stream import Delta

Event: TypeAlias = Mapping[str, Any]
"""One ``data:`` line; its ``type``, where it has one, is the event's name."""


class Refused(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 404: "not_found_error"}.get(status) or (
            "server_error" if status >= 500 else "invalid_request_error"
        )
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = {"error": self.error}


class EventWriter(Protocol):
    """How one API writes an answer as events."""

    last_line: bytes
    """What follows the last event."""

    def grown(self, index: int, delta: Delta) -> Iterable[Event]:
        """The nth answer grew; the first time also what opens it."""
        ...

    def ended(self, answers: list[Answer]) -> Iterable[Event]:
        """All answers are complete, and all that they grew by was written."""
        ...

    def failed(self, error: Refused) -> Iterable[Event]:
        """The answers end here."""
        ...


class StreamedAnswer(Response):
    """See the module's docstring.

    Args:
        answer: samples, and shows what comes.
        writer: of the request's API.
        refusal: what an exception of ``answer`` is to the client; None raises it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answer: Callable[[Show], Awaitable[list[Answer]]],
        writer: EventWriter,
        *,
        refusal: Callable[[Exception], Refused | None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._answer, self._writer, self._refusal = answer, writer, refusal
        self._events: asyncio.Queue[Event | Refused | None] = asyncio.Queue()
        self._is_open = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(self._sample())
            leaving = group.create_task(_cancel_when_gone(receive, sampling))
            try:
                await self._send(scope, receive, send)
            finally:
                leaving.cancel()

    async def _sample(self) -> None:
        def show(index: int, delta: Delta) -> None:
            self._put(self._writer.grown(index, delta))

        try:
            self._put(self._writer.ended(await self._answer(show)))
        except Exception as error:
            refused = self._refusal(error)
            if refused is None:
                raise
            if self._is_open:
                self._put(self._writer.failed(refused))
            else:
                self._events.put_nowait(refused)
        finally:
            self._events.put_nowait(None)

    def _put(self, events: Iterable[Event]) -> None:
        for event in events:
            self._is_open = True
            self._events.put_nowait(event)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        event = await self._events.get()
        if isinstance(event, Refused):
            await JSONResponse(event.body, status_code=event.status)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while isinstance(event, Mapping):
            await send({"type": "http.response.body", "body": _line(event), "more_body": True})
            event = await self._events.get()
        await send({"type": "http.response.body", "body": self._writer.last_line, "more_body": False})


async def _cancel_when_gone(receive: Receive, sampling: asyncio.Task[None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    sampling.cancel()


def _line(event: Event) -> bytes:
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
