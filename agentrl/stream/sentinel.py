"""Redis behind Sentinel: which server is the master is asked for whenever a connection is made."""

from dataclasses import dataclass
from typing import Any, Final, Self
from urllib.parse import unquote, urlsplit

from redis.connection import parse_url

from agentrl.errors import ConfigError

SCHEMES: Final = ("redis+sentinel://", "rediss+sentinel://")
DEFAULT_PORT: Final = 26379


@dataclass(frozen=True, slots=True, kw_only=True)
class SentinelUrl:
    """``redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/db][?option=value&...]``, taken apart.

    User, password and options are those of the Redis servers, as in ``redis://`` urls; ``sentinel_username`` and
    ``sentinel_password`` are the sentinels' own. ``rediss+sentinel://`` speaks TLS with both.
    """

    sentinels: tuple[tuple[str, int], ...]
    service: str
    """The name under which the sentinels know the master."""
    server_options: dict[str, Any]
    """Keyword arguments of redis-py's connections to the master."""
    sentinel_options: dict[str, Any]
    """Those of its connections to the sentinels."""

    @classmethod
    def parse(cls, url: str, *, shown: str) -> Self:
        """Take a url apart; errors name it as ``shown``.

        Raises:
            ConfigError: a host or the service is missing, or a number is none.
        """
        scheme, _, rest = url.partition("+sentinel://")
        located, _, query = rest.partition("?")
        authority, _, path = located.partition("/")
        credentials, at, hosts = authority.rpartition("@")
        service, _, db = path.partition("/")
        try:
            if db and not db.isdecimal():
                raise ValueError(f"{db!r} is no number of a database")
            options: dict[str, Any] = parse_url(f"{scheme}://{credentials}{at}master/{db or 0}?{query}")
            sentinels = tuple(_address(host) for host in hosts.split(","))
            if not service:
                raise ValueError("the service's name is missing")
        except ValueError as error:
            raise ConfigError(f"stream url {shown!r}: {error}: use redis+sentinel://host:26379,host:26379/service") from error
        own = {name: options.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in options}
        del options["host"]
        if options.pop("connection_class", None) is not None:  # what parse_url makes of rediss://
            options["ssl"] = True
        tls = {name: value for name, value in options.items() if name.startswith("ssl")}
        return cls(sentinels=sentinels, service=unquote(service), server_options=options, sentinel_options=own | tls)


def _address(host: str) -> tuple[str, int]:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise ValueError("a sentinel's host is missing")
    return parts.hostname, parts.port or DEFAULT_PORT
