"""Clients that reach Redis: urls, names, timeouts, which errors pass by themselves, and what a server must offer.

redis-py retries failed commands ten times by default, and a retried write whose first reply was lost happens twice.
Clients made here never retry: every repeated call in this package is repeated by us, and only because it is safe to.
"""

import asyncio
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError
from redis.retry import Retry

from agentrl.errors import ConfigError, StreamError
from agentrl.stream import sentinel
from agentrl.supervise import heeding_cancellation

log = logging.getLogger(__name__)

T = TypeVar("T")

SOCKET_TIMEOUT_S: Final = 30.0
"""Silence after which a connection is given up. Far above any block (<= 1 s) and any command of this package."""
CONNECT_TIMEOUT_S: Final = 5.0
CLIENT_PREFIX: Final = "agentrl-"
MIN_VERSION: Final = (7, 0)
"""Below 7.0 XAUTOCLAIM leaves deleted entries pending for ever."""

RETRY_FIRST_S: Final = 0.05
RETRY_MAX_S: Final = 2.0

_SCHEMES: Final = ("redis://", "rediss://", "unix://", *sentinel.SCHEMES)
_TRANSIENT_REPLIES: Final = ("LOADING", "TRYAGAIN", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "BUSY ")
_CREDENTIALS: Final = re.compile(r"(?P<scheme>^[a-z+]+://)[^/?#]*@")
_QUERY_SECRETS: Final = re.compile(r"(?i)([?&](?:sentinel_)?(?:password|username)=)[^&#]*")

Persistence = Literal["always", "everysec", "off", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What ``check_server`` found."""

    name: str
    """``redis`` or ``valkey``."""
    version: str
    persistence: Persistence
    """``always``: an acknowledged entry survives a crash. ``everysec``: up to about 2 s are lost. ``off``: all."""
    maxmemory: int
    """Bytes; 0 is no limit."""


def redact_url(url: str) -> str:
    """The url without its credentials, for logs and errors."""
    return _QUERY_SECRETS.sub(r"\g<1>***", _CREDENTIALS.sub(r"\g<scheme>***@", url))


def connect(url: str, *, role: str = "client", socket_timeout_s: float | None = SOCKET_TIMEOUT_S) -> redis.Redis:
    """A client named ``agentrl-<role>-<pid>`` that never retries. It connects at its first command.

    Raises:
        ConfigError: the url is not redis://, rediss://, unix:// or one of those of ``sentinel.SentinelUrl``.
    """
    options = _options(role, socket_timeout_s) | {"retry": Retry(NoBackoff(), 0)}
    return _open(url, redis.Redis, redis.sentinel.Sentinel, options)


def connect_async(url: str, *, role: str = "client", socket_timeout_s: float | None = SOCKET_TIMEOUT_S) -> redis.asyncio.Redis:
    """``connect`` for asyncio."""
    options = _options(role, socket_timeout_s) | {"retry": AsyncRetry(NoBackoff(), 0)}
    return _open(url, redis.asyncio.Redis, redis.asyncio.sentinel.Sentinel, options)


def client_name(role: str) -> str:
    """The name under which this process's connections show in ``CLIENT LIST``."""
    return f"{CLIENT_PREFIX}{role}-{os.getpid()}"


def check_server(client: redis.Redis) -> ServerInfo:
    """Refuse a server that could lose or evict entries behind our back; report how durable it is.

    Raises:
        ConfigError: eviction, cluster mode, or a version below 7.0.
        StreamError: it cannot be reached.
    """
    try:
        info: dict[str, Any] = client.info("everything")  # pyright: ignore[reportAssignmentType]  # sync client
    except (RedisError, OSError) as error:
        raise classify(error, "the server's INFO") from error
    name, version = _name_and_version(info)
    if _version_tuple(str(info.get("redis_version", version))) < MIN_VERSION and name == "redis":
        raise ConfigError(f"Redis {version} is too old: XAUTOCLAIM needs 7.0. Use Redis >= 7.0 or any Valkey")
    if int(info.get("cluster_enabled", 0)) or info.get("redis_mode") == "cluster":
        raise ConfigError("the server runs in cluster mode, which is not supported: use a standalone Redis or Valkey")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        raise ConfigError(
            f"maxmemory-policy is {policy}, which may delete trajectories: set 'CONFIG SET maxmemory-policy noeviction'"
        )
    return ServerInfo(name=name, version=version, persistence=_persistence(client, info), maxmemory=int(info.get("maxmemory", 0)))


def is_transient(error: BaseException) -> bool:
    """Whether waiting can cure it: the server is away, restarting, or loading its file."""
    if isinstance(error, AuthenticationError | AuthorizationError) or _untrusted_certificate(error):
        return False
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return True
    return isinstance(error, ResponseError) and _reply(error).startswith(_TRANSIENT_REPLIES)


def classify(error: Exception, what: str) -> StreamError | ConfigError:
    """The agentrl error for one of redis-py, raised ``from`` it by the caller."""
    text = _reply(error)
    if isinstance(error, AuthenticationError | AuthorizationError) or text.startswith(("NOAUTH", "WRONGPASS")):
        return ConfigError(f"{what}: Redis refused the credentials: check user and password of the stream's url")
    if _untrusted_certificate(error):
        return ConfigError(
            f"{what}: the server's certificate is not trusted: give '?ssl_ca_certs=FILE' in the stream's url. {text}"
        )
    if text.startswith("MISCONF"):
        return StreamError(f"{what}: Redis cannot write to its disk and refuses entries: free disk space. {text}")
    if text.startswith("NOGROUP"):
        return StreamError(
            f"{what}: the stream or its consumer group is gone, so the server lost its data (no persistence, or FLUSHALL)"
        )
    return StreamError(f"{what}: {type(error).__name__}: {text}")


def retry(call: Callable[[], T], what: str, *, patience_s: float | None) -> T:
    """Repeat an idempotent call while the server is away.

    Args:
        call: safe to repeat, also after a lost reply.
        what: named in logs and errors.
        patience_s: seconds of outage after which it gives up; None waits for ever.

    Raises:
        StreamError: the server stayed away, or answered with an error.
        ConfigError: it refused the credentials.
    """
    pauses = Pauses(what, patience_s)
    while True:
        try:
            return call()
        except (RedisError, OSError) as error:
            time.sleep(pauses.after(error))


async def retry_async(
    call: Callable[[], Awaitable[T]],
    what: str,
    *,
    patience_s: float | None,
    on_wait: Callable[[str, float], None] | None = None,
) -> T:
    """``retry`` for asyncio. ``on_wait("stream:down", seconds)`` is called before every pause."""
    pauses = Pauses(what, patience_s)
    while True:
        try:
            with heeding_cancellation():
                return await call()
        except (RedisError, OSError) as error:
            pause = pauses.after(error)
        if on_wait is not None:
            on_wait("stream:down", pauses.waited_s)
        await asyncio.sleep(pause)


class Pauses:
    """How long to wait after each failure of one call: doubling with jitter, one warning per outage, an end."""

    def __init__(self, what: str, patience_s: float | None) -> None:
        self._what = what
        self._patience_s = patience_s
        self._since: float | None = None
        self._next_s = RETRY_FIRST_S

    @property
    def waited_s(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    def after(self, error: Exception) -> float:
        """Seconds to pause after ``error``; raises its agentrl form when waiting cannot help or went on too long."""
        if not is_transient(error):
            raise classify(error, self._what) from error
        if self._since is None:
            self._since = time.monotonic()
            log.warning("stream unreachable, retrying: what=%s error=%s", self._what, type(error).__name__)
        if self._patience_s is not None and self.waited_s >= self._patience_s:
            raise StreamError(
                f"{self._what}: Redis was unreachable for {self.waited_s:.1f} s ({type(error).__name__}): is the server running?"
            ) from error
        pause, self._next_s = self._next_s, min(2 * self._next_s, RETRY_MAX_S)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311


def _untrusted_certificate(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _reply(error: Exception) -> str:
    """What the server said; redis-py puts the command in front when it came through a pipeline."""
    return str(error).rpartition("of pipeline caused error: ")[2]


def _open(url: str, client: Any, sentinels: Any, options: dict[str, Any]) -> Any:
    """A client of one of redis-py's two kinds, which are made alike."""
    if not url.startswith(_SCHEMES):
        raise ConfigError(
            f"stream url {redact_url(url)!r} is of no known kind: use redis://, rediss://, unix:// or redis+sentinel://"
        )
    if not url.startswith(sentinel.SCHEMES):
        return client.from_url(url, **options)
    parts = sentinel.SentinelUrl.parse(url, shown=redact_url(url))
    asked = parts.sentinel_options | options | {"socket_timeout": CONNECT_TIMEOUT_S}
    return sentinels(parts.sentinels, sentinel_kwargs=asked).master_for(parts.service, **parts.server_options | options)


def _options(role: str, socket_timeout_s: float | None) -> dict[str, Any]:
    # RESP2: one shape of reply on every server and client version.
    return {
        "client_name": client_name(role),
        "protocol": 2,
        "retry_on_error": [],
        "socket_timeout": socket_timeout_s,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "health_check_interval": 0,
    }


def _name_and_version(info: dict[str, Any]) -> tuple[str, str]:
    if "valkey_version" in info:
        return "valkey", str(info["valkey_version"])
    return "redis", str(info.get("redis_version", "0"))


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _persistence(client: redis.Redis, info: dict[str, Any]) -> Persistence:
    if not int(info.get("aof_enabled", 0)):
        return "off"
    try:
        answer: dict[Any, Any] = client.config_get("appendfsync")  # pyright: ignore[reportAssignmentType]  # sync client
    except RedisError:  # managed servers forbid CONFIG
        return "unknown"
    fsync = next(iter(answer.values()), b"")
    text = fsync.decode() if isinstance(fsync, bytes) else str(fsync)
    levels: dict[str, Persistence] = {"always": "always", "everysec": "everysec", "no": "off"}
    return levels.get(text, "unknown")
