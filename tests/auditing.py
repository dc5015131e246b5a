"""The auditor on a log in memory."""

from __future__ import annotations

from perdure.projections.audit import TOPICS, Audit
from perdure.streams.memory_log import MemoryLog


def assert_sound(log: MemoryLog) -> Audit:
    """Hold the whole log to the rules of the audit, which shares nothing with the engine; what it has found."""
    audit = Audit()
    for topic in TOPICS:
        audit.feed(log.records(topic))
    audit.check()
    audit.check()
    assert not audit.violations, "\n".join(violation.line() for violation in audit.violations[:20])
    return audit
