"""What all tests share: an example has no deadline, as its time says more of the machine than of the code."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it for what it starts in the background; whoever is started here is to hear of a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
