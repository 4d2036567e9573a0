"""``agentrl servers``: a run's generation servers, seen and changed from outside through serve's ``/servers`` API."""

from pathlib import Path
from typing import Any, Literal

import httpx

from agentrl.assembly.parts import run_secret
from agentrl.errors import AgentRLError, ConfigError
from agentrl.telemetry.run_dir import RunDir

SERVERS_TOKEN = "servers_token"
TIMEOUT_S = 30.0


class ServersApiError(AgentRLError):
    """serve refused the change, or did not answer."""


def call_servers(
    root: Path, method: Literal["GET", "POST", "DELETE"], action: Literal["", "/drain", "/undrain"] = "", **body: Any
) -> dict[str, Any]:
    """One call to the running serve of a run directory.

    Raises:
        ConfigError: the run has no serve that runs.
        ServersApiError: it refused, or did not answer.
    """
    run = RunDir.open(root)
    url = run.url_of("serve")
    if url is None:
        raise ConfigError(f"{root} has no running serve: its servers can only be listed or changed while it runs")
    given = {key: value for key, value in body.items() if value is not None}
    try:
        answer = httpx.request(
            method,
            f"{url}/servers{action}",
            json=given or None,
            headers={"Authorization": f"Bearer {run_secret(run, SERVERS_TOKEN)}"},
            timeout=TIMEOUT_S + float(given.get("wait_s", 0.0)),
            trust_env=False,
        )
    except httpx.HTTPError as error:
        raise ServersApiError(f"serve at {url} did not answer ({error!r}); see logs/serve.log") from error
    if answer.status_code != 200:
        raise ServersApiError(f"serve at {url} answered {answer.status_code}: {answer.text[:500]}")
    return answer.json()


def servers_table(listing: dict[str, Any]) -> str:
    """One line per server: what it does, at which weights, how busy, and why it is out."""
    lines = [f"{'url':32} {'state':12} {'version':10} {'in flight':>9} {'limit':>6} {'served':>8} {'errors':>6}  reason"]
    for server in listing["servers"]:
        limit = "-" if server["limit"] is None else server["limit"]
        lines.append(
            f"{server['url']:32} {server['state']:12} {server['version'] or '-':10} {server['requests_in_flight']:>9} {limit:>6} "
            f"{server['requests_served']:>8} {server['errors']:>6}  {server['reason']}".rstrip()
        )
    return "\n".join([*lines, f"required {listing['required']}, parked requests {listing['parked']}"])
