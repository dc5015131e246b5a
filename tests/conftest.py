"""What every test shares: the broker of the run, and how Hypothesis draws its examples."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.kafka_fixture", "tests.kafka_cluster"]

# A shared machine may pause a test for seconds, so neither a deadline nor slow drawing is a failure. In CI the same
# commit always sees the same examples; on a developer's machine each run sees new ones.
settings.register_profile(
    "perdure", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("perdure")

# A shell has what it runs in the background ignore SIGINT, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
