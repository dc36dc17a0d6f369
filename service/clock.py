"""The date, for what is decided by dates: how long ended jobs are kept. Waiting and watching use the monotonic clock.

Somebody sets the wall clock a day ahead, or back; later it is set right. Nothing must be removed by such a mistake.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

log = logging.getLogger("mergecore.service")

JUMP = 60.0
"""Seconds by which the wall clock may run away from the monotonic one between two looks: it is being corrected."""
DOUBT = 86_400.0
"""Seconds for which a clock that has jumped is not believed."""


class SteadyDate:
    """The wall clock without its jumps: after one, time goes on as before until the new time has held for a day."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall_clock, self._monotonic = wall, monotonic
        self._wall, self._seen = wall(), monotonic()
        self._jumped: float | None = None

    def now(self) -> datetime:
        """The date in UTC. Small corrections are followed if it is asked for regularly."""
        wall, seen = self._wall_clock(), self._monotonic()
        expected = self._wall + (seen - self._seen)
        if abs(wall - expected) <= JUMP:
            self._jumped = None
        elif self._jumped is None:
            self._jumped = seen
            log.warning("the clock jumped by %.0f s; no job is removed by the new time for a day", wall - expected)
        if self._jumped is not None and seen - self._jumped < DOUBT:
            wall = expected
        else:
            self._jumped = None
        self._wall, self._seen = wall, seen
        return datetime.fromtimestamp(wall, UTC)
