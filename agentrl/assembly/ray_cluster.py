"""Joining a Ray cluster, or starting one on this machine, and making its processes like the one that asked for them.

Ray is an extra: nothing here or in the modules that use this imports it before a config asks for it.
"""

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from agentrl.errors import ConfigError

OBJECT_STORE_BYTES = 128 << 20
"""Of a Ray that is started here: trajectories and weights do not go through it."""


@contextmanager
def joined_ray(launcher: str, *, address: str | None, num_cpus: int, modules: Sequence[str] = ()) -> Generator[Any]:
    """The module ``ray``, connected for as long as the block; a connection that this process has already is used and kept.

    Args:
        launcher: the setting that asks for Ray, for errors (``serve.launcher``).
        address: of the cluster; None takes ``RAY_ADDRESS``, and without that starts a Ray of its own on this machine.
        num_cpus: that such a Ray offers at least.
        modules: parts of Ray that are wanted besides its core.

    Raises:
        ConfigError: Ray is not installed or cannot be reached.
    """
    ray = import_ray(launcher, modules)
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Without "local" Ray would join whichever cluster was last started on this machine, by whomever.
    own = {"address": "local", "num_cpus": max(os.cpu_count() or 1, num_cpus), "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(include_dashboard=False, logging_level=logging.WARNING, **({"address": address} if address else own))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{launcher}=ray: no Ray at {address or 'this machine'}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def import_ray(launcher: str, modules: Sequence[str] = ()) -> Any:
    """The module ``ray``, once these parts of it are there too.

    Raises:
        ConfigError: one is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        for name in modules:
            importlib.import_module(name)
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"{launcher}=ray needs Ray, which is not installed here, or not all of it ({error}): pip install 'agentrl[ray]', or "
            f"set {launcher}=local"
        ) from error


def surroundings() -> dict[str, Any]:
    """What a process on the cluster needs to be like this one, for its `settle`."""
    return {"path": [p for p in sys.path if p], "cwd": os.getcwd()}


def settle(given: Mapping[str, Any]) -> None:
    """Find the modules, and relative paths, of the process that made this one."""
    sys.path.extend(p for p in given["path"] if p not in sys.path)
    with contextlib.suppress(OSError):  # another machine may lack the folder; relative paths are then the user's to avoid
        os.chdir(given["cwd"])


def last_line(error: BaseException) -> str:
    """What an error of Ray's comes down to: the end of the traceback that it carries as text."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
