"""``${env:NAME}`` in tool lists: secrets come from the environment, and leave no trace in texts, logs or the run directory."""

import os
import re
from collections.abc import Mapping

from agentrl.errors import ConfigError

_REFERENCE = re.compile(r"\$\{env:([A-Za-z_]\w*)\}")
_HIDDEN = "<redacted>"
_MIN_SECRET = 4
"""Shorter values (a port, a flag) would blank out half of every message."""


class EnvValues:
    """Fills in ``${env:NAME}`` and remembers what it filled in, so that it can be taken out of any text again.

    Args:
        where: the place in the tool list, for errors.
        is_required: a variable that is not set is an error; else it is empty, for who only reads schemas.
    """

    def __init__(self, where: str, *, is_required: bool = True) -> None:
        self._where = where
        self._is_required = is_required
        self._secrets: set[str] = set()

    def fill(self, text: str) -> str:
        """``text`` with every reference replaced.

        Raises:
            ConfigError: a variable is not set; names it, never a value.
        """

        def value(match: re.Match[str]) -> str:
            found = os.environ.get(match[1], "")
            if not found and self._is_required:
                raise ConfigError(
                    f"{self._where}: the environment variable {match[1]} is not set. Export it before the run starts"
                )
            if found:
                self._secrets.add(found)
            return found

        return _REFERENCE.sub(value, text)

    def fill_all(self, values: Mapping[str, str]) -> dict[str, str]:
        """Every value of a mapping filled in."""
        return {key: self.fill(value) for key, value in values.items()}

    def hide(self, text: str) -> str:
        """``text`` without the values that were filled in."""
        for secret in sorted((s for s in self._secrets if len(s) >= _MIN_SECRET), key=len, reverse=True):
            text = text.replace(secret, _HIDDEN)
        return text
