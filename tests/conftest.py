"""The order of the suite, and how long an example may take."""

import pytest
from hypothesis import HealthCheck, settings

# A machine that stands still for a moment makes an example slow, not wrong.
settings.register_profile("agentrl", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("agentrl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end no worker is left alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
