"""A tool that is an HTTP service: one request per call, described in the tool list, without any Python.

Whose fault an answer is goes by its status. What the model asked for wrongly (400, 404, 422 …) becomes text for it. What it cannot
help is infrastructure: no connection, 5xx, 3xx, and the statuses about our credentials or our haste (401, 403, 407, 408, 425, 429).
"""

import asyncio
import contextlib
import email.utils
import json
import re
import time
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import aiohttp
from pydantic import BaseModel, ConfigDict, Field

from agentrl.errors import ToolBusy, ToolError, ToolInfraError
from agentrl.process import REUSED_WITHIN_S
from agentrl.protocols import ToolContext, ToolResult
from agentrl.rollout.env_values import EnvValues

NOT_THE_MODELS_ERROR = frozenset({401, 402, 403, 407, 408, 425, 429})
"""4xx that say something about this client: its credentials, its bill, its pace."""
CONNECT_TIMEOUT_S = 10.0
_ERROR_CHARS = 2000
"""Of an error's body, for the model."""
_PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")


class HttpSpec(BaseModel):
    """The ``http:`` part of an entry."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    url: str
    """Where to ask. ``{argument}`` in it is replaced by that argument, percent-encoded."""
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    """HTTP method."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Headers of every request; ``${env:NAME}`` keeps secrets out of the file."""
    arguments: Literal["json", "query"] | None = None
    """Where arguments go that are not in the url; by default ``query`` for GET and DELETE, else ``json``."""
    body: dict[str, Any] = Field(default_factory=dict)
    """Constant members of the JSON body."""
    query: dict[str, str] = Field(default_factory=dict)
    """Constant parameters of the query."""
    text: str | None = None
    """JSON pointer (RFC 6901) to the part of the answer that the model reads; None shows the body."""
    error_text: str | None = None
    """The same for answers that are the model's error."""
    model_errors: list[int] | None = None
    """Statuses that are the model's error; by default every 4xx but those about credentials and pace."""
    max_bytes: int = Field(default=1_000_000, ge=1)
    """Bytes of an answer that are read; longer text is cut there, longer JSON is the model's error."""
    name: str | None = None
    """What the model calls; ``name`` of the entry does the same."""
    description: str = ""
    """What the model is told."""
    schema_: str | dict[str, Any] | None = Field(default=None, alias="schema")
    """JSON Schema of the arguments, or a JSON file that holds it."""

    @property
    def carries(self) -> Literal["json", "query"]:
        return self.arguments or ("query" if self.method in ("GET", "DELETE") else "json")

    @property
    def path_arguments(self) -> list[str]:
        """Arguments that the url takes."""
        return _PLACEHOLDER.findall(self.url)

    def is_models_error(self, status: int) -> bool:
        if self.model_errors is not None:
            return status in self.model_errors
        return 400 <= status < 500 and status not in NOT_THE_MODELS_ERROR


class HttpTool:
    """One service; its connections are shared by the trajectories of this process.

    Args:
        spec: how to ask and what to make of answers.
        name: as the model calls it, for messages.
        values: fills in and hides what comes from the environment.

    Raises:
        ConfigError: a variable that the spec names is not set.
    """

    def __init__(self, spec: HttpSpec, name: str, values: EnvValues) -> None:
        self._spec = spec
        self._name = name
        self._values = values
        self._url = values.fill(spec.url)
        self._headers = values.fill_all(spec.headers)
        self._query = values.fill_all(spec.query)
        self._held: tuple[asyncio.AbstractEventLoop, aiohttp.ClientSession] | None = None

    def instance(self, context: ToolContext) -> "HttpInstance":
        """For one trajectory; it holds nothing."""
        return HttpInstance(self)

    async def ask(self, arguments: Mapping[str, Any]) -> ToolResult:
        """One request.

        Raises:
            ToolError: the answer says that the model asked for something wrong.
            ToolBusy: the service asks to come back later.
            ToolInfraError: no answer, or one that is no fault of the model.
        """
        url, query, body = self._request(arguments)
        try:
            async with self._session().request(
                self._spec.method, url, params=query, json=body, headers=self._headers, allow_redirects=False
            ) as answer:
                received = await _read(answer, self._spec.max_bytes)
                return self._result(answer, received)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            cause = self._values.hide(f"{type(error).__name__}: {error}")
            raise ToolInfraError(f"tool `{self._name}`: no answer from {self._place()}: {cause}") from None

    def _request(self, arguments: Mapping[str, Any]) -> tuple[str, dict[str, str] | None, dict[str, Any] | None]:
        left = dict(arguments)
        in_path = {name: _path_segment(name, left.pop(name, "")) for name in self._spec.path_arguments}
        url = _PLACEHOLDER.sub(lambda match: in_path.get(match[1], match[0]), self._url)
        in_query = self._spec.carries == "query"
        query = {**self._query, **({k: _plain(v) for k, v in left.items() if v is not None} if in_query else {})}
        body = {**self._spec.body, **left} if not in_query else self._spec.body or None
        return url, query or None, body

    def _result(self, answer: aiohttp.ClientResponse, received: tuple[bytes, bool]) -> ToolResult:
        body, is_cut = received
        status = answer.status
        text = _decoded(body, answer.charset)
        if 200 <= status < 300:
            if self._spec.text is None:
                return ToolResult(text=self._values.hide(text))
            if is_cut:
                raise ToolError(f"the answer is larger than {self._spec.max_bytes} bytes. Ask for less")
            return ToolResult(text=self._values.hide(self._part(text)))
        shown = self._values.hide(self._error_part(text))
        if self._spec.is_models_error(status):
            raise ToolError(shown or f"HTTP {status} {answer.reason or ''}".rstrip())
        message = f"tool `{self._name}`: {self._place()} answered {status} {answer.reason or ''}: {shown[:300]}"
        if 300 <= status < 400:
            message += (
                f". Redirects are not followed: give the final url ({self._values.hide(answer.headers.get('Location', ''))})"
            )
        if status == 429 or (status == 503 and "Retry-After" in answer.headers):
            raise ToolBusy(message, retry_after_s=retry_after_s(answer.headers.get("Retry-After", "")))
        raise ToolInfraError(message)

    def _part(self, text: str) -> str:
        """The part of a good answer that is for the model; an answer of another form is the service's failure."""
        pointer = self._spec.text or ""
        try:
            found = at_pointer(json.loads(text), pointer)
        except (ValueError, RecursionError) as error:
            raise ToolInfraError(f"tool `{self._name}`: {self._place()} answered no JSON: {error}") from None
        except KeyError as error:
            raise ToolInfraError(
                f"tool `{self._name}`: the answer of {self._place()} has no {error.args[0]!r} (text: {pointer}). It begins "
                f"{self._values.hide(text[:120])!r}"
            ) from None
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    def _error_part(self, text: str) -> str:
        if self._spec.error_text is not None:
            with contextlib.suppress(ValueError, KeyError, RecursionError):
                found = at_pointer(json.loads(text), self._spec.error_text)
                text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        return text.strip()[:_ERROR_CHARS]

    async def probe(self) -> str:
        """Whether something listens there.

        Raises:
            ToolInfraError: nothing does.
        """
        parts = urlsplit(self._url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(parts.hostname, port)
        except (OSError, TimeoutError) as error:
            raise ToolInfraError(f"tool `{self._name}`: nothing answers at {parts.hostname}:{port}: {error}") from error
        writer.close()
        return f"{parts.hostname}:{port} accepts connections"

    async def aclose(self) -> None:
        """Close the connections."""
        held, self._held = self._held, None
        if held is not None and held[0] is asyncio.get_running_loop():
            await held[1].close()

    def _session(self) -> aiohttp.ClientSession:
        """Of the running event loop: a session belongs to the loop that made it."""
        loop = asyncio.get_running_loop()
        if self._held is None or self._held[0] is not loop:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=REUSED_WITHIN_S)
            self._held = (loop, aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()))
        return self._held[1]

    def _place(self) -> str:
        parts = urlsplit(self._spec.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class HttpInstance:
    """The service in the hands of one trajectory."""

    def __init__(self, tool: HttpTool) -> None:
        self._tool = tool

    async def open(self) -> None:
        return

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        return await self._tool.ask(arguments)

    async def close(self) -> None:
        return


async def _read(answer: aiohttp.ClientResponse, max_bytes: int) -> tuple[bytes, bool]:
    """At most ``max_bytes`` of the body, and whether there was more."""
    parts: list[bytes] = []
    size = 0
    async for part in answer.content.iter_chunked(65536):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            return b"".join(parts)[:max_bytes], True
    return b"".join(parts), False


def at_pointer(value: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) names.

    Raises:
        KeyError: nothing; its argument is the member that is missing.
    """
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and name.isdigit() and int(name) < len(value):  # pyright: ignore[reportUnknownArgumentType]
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            raise KeyError(name)
    return value


def retry_after_s(header: str) -> float | None:
    """Seconds that a ``Retry-After`` asks for: a number, or a date."""
    if re.fullmatch(r"\d{1,9}", header.strip()):
        return float(header)
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except (ValueError, TypeError):
        return None
    return max(0.0, moment.timestamp() - time.time())


def _decoded(body: bytes, charset: str | None) -> str:
    try:
        return body.decode(charset or "utf-8", errors="replace")
    except LookupError:
        return body.decode("utf-8", errors="replace")


def _path_segment(name: str, value: Any) -> str:
    """An argument as one segment of a path: it must not lead to another one."""
    text = _plain(value)
    if text in ("", ".", ".."):
        raise ToolError(f"{name}: {text!r} cannot be looked up")
    return quote(text, safe="")


def _plain(value: Any) -> str:
    """An argument as it stands in a url."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
