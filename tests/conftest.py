"""What all tests share.

An example has no deadline, as its time says more of the machine than of the code. A test has one that only a hang comes
to, so that it fails by its name and is cleaned up after.
"""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.support.waiting import SLOWNESS

# Seconds, with what the test's fixtures take. The slowest takes a minute; some that take longer say so themselves.
HANGS = 600

settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it for what it starts in the background; whoever is started here is to hear of a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None and config.getoption("timeout") is None:
            item.add_marker(pytest.mark.timeout(HANGS * SLOWNESS))
