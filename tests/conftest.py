"""The order of the suite, and the examples that hypothesis draws in it."""

import os

import pytest
from hypothesis import HealthCheck, settings


def pytest_configure(config: pytest.Config) -> None:
    """Every run draws the same examples unless it is told to look for others, and none is refused for being slow: a test that
    fails does so again, on any machine."""
    explores = "AGENTRL_FUZZ" in os.environ or config.getoption("--hypothesis-seed") is not None
    settings.register_profile(
        "agentrl", derandomize=not explores, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
    if config.getoption("--hypothesis-profile") is None:
        settings.load_profile("agentrl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end no worker is left alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
