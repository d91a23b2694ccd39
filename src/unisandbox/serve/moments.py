"""Times as messages have them."""

from __future__ import annotations

import datetime


def moment(seconds: float) -> datetime.datetime:
    """Seconds since the epoch."""
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
