"""serve and learn must agree on model, tokenizer, template, tools and limits: compare them through Redis at start-up."""

import json
from collections.abc import Mapping
from typing import Any, cast

import redis

from agentrl.errors import ConfigError
from agentrl.stream import scripts
from agentrl.stream.connection import retry
from agentrl.stream.keys import Keys


def check_fingerprint(client: redis.Redis, keys: Keys, role: str, values: Mapping[str, str]) -> None:
    """Record ``values`` for this run, or compare them with what an earlier process recorded.

    The first writer of a field sets it; fields that only one role knows are not compared.

    Raises:
        ConfigError: a field differs; the message shows every such field, both values and who set the first.
        StreamError: the server stayed away.
    """
    if not values:
        return
    script = client.register_script(scripts.FINGERPRINT)
    fields = sorted(values)
    args = [part for name in fields for part in (name, json.dumps({"role": role, "value": values[name]}))]
    stored = retry(lambda: script(keys=[keys.fingerprint], args=args), "comparing the fingerprint", patience_s=60.0)
    lines: list[str] = []
    for name, text in zip(fields, cast("list[bytes]", stored), strict=True):
        first: dict[str, Any] = json.loads(text)
        if first["value"] != values[name]:
            lines.append(f"  {name}: {first['role']} has {first['value']!r}, {role} has {values[name]!r}")
    if lines:
        raise ConfigError(
            f"{len(lines)} of {len(fields)} settings of run {keys.run!r} differ from those it started with:\n"
            + "\n".join(lines)
            + "\nUse the same config for serve and learn, or start a new run."
        )


def clear_fingerprint(client: redis.Redis, keys: Keys) -> None:
    """Forget what was recorded, for a run whose settings were changed on purpose while nothing of it was running."""
    retry(lambda: client.delete(keys.fingerprint), "clearing the fingerprint", patience_s=60.0)
