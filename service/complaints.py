"""Lasting problems are logged once: until they are over, or until the next start of the daemon."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger("mergecore.service")


class Complaints:
    """What was complained about: files that cannot be claimed, folders that cannot be read."""

    def __init__(self) -> None:
        self._about: set[Path] = set()

    def make(self, about: Path, message: str, *details: object) -> None:
        """Log a problem unless that was done."""
        if about not in self._about:
            self._about.add(about)
            log.error(message, *details)

    def over(self, about: Path) -> None:
        """It works again: the next problem with it is told."""
        self._about.discard(about)

    def forget_below(self, folder: Path, but: Iterable[Path]) -> None:
        """Nothing else in this folder is of interest any more."""
        kept = set(but)
        self._about = {about for about in self._about if about.parent != folder or about in kept}
