"""Hypothesis profiles: 1,000 machine runs in the suite, 10,000 with EDGE_FULL=1 (`scripts/test --full`)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("coordinator", max_examples=1_000, **_COMMON)
settings.register_profile("coordinator-full", max_examples=10_000, **_COMMON)
MACHINE = settings.get_profile("coordinator-full" if os.environ.get("EDGE_FULL") else "coordinator")
