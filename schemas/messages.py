"""All record classes by module, and the groups that topics carry."""

from __future__ import annotations

from perdure.schemas import commands, common, events, inbox, public, reports, rows

__all__ = ["commands", "common", "events", "inbox", "public", "reports", "rows"]
