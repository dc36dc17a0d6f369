"""Where the models of a sweep grow together: folders in one staging folder, which get the output's name all at once.

Each model has a staging folder of its own in there, as if it were merged alone (writer.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mergecore.errors import Interrupted, OutputError, OutputExistsError
from mergecore.output.staging import Staging, reporting
from mergecore.output.verify import MANIFEST_NAME

CARD = "README.md"


class SweepFolder:
    """The folder of the models while they are made, as a context manager. What is complete stays for `resume` if the
    merge was interrupted. Raises OutputError, and OutputExistsError for a taken name."""

    def __init__(self, out: Path, identity: str, *, resume: bool) -> None:
        self.resumed = False
        self._staging = Staging(out)
        self._identity, self._resume = identity, resume

    def __enter__(self) -> SweepFolder:
        staging = self._staging
        staging.enter()
        try:
            head = {"sweep": self._identity}
            self.resumed = self._resume and staging.journal.read()[:1] == [head] and self._is_there()
            with reporting("prepare", staging.folder):
                if not self.resumed:
                    staging.begin()
                    staging.journal.start(head)
                staging.output.sync()
                staging.sync()
        except BaseException:
            staging.leave(keep=self.resumed)
            raise
        return self

    def _is_there(self) -> bool:
        with suppress(OSError):
            self._staging.go_on()
            return True
        return False

    def path(self, name: str) -> Path:
        """Where a model is to be published."""
        return self._staging.output.path / name

    def is_done(self, name: str, identity: str) -> bool:
        """Whether an interrupted attempt has published this model."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            folder = self._staging.output.enter(name)
            try:
                with os.fdopen(folder.open(MANIFEST_NAME, os.O_RDONLY), "rb") as file:
                    return bool(json.load(file)["identity"] == identity)
            finally:
                folder.close()
        return False

    def check_room(self, nbytes: int) -> None:
        """OutputError unless all models fit the disk together."""
        free = shutil.disk_usage(self._staging.output.descriptor).free
        if free < nbytes:
            out = self._staging.out
            raise OutputError(
                f"not enough disk space for {out}: the models of this sweep need {nbytes:,} bytes together, {free:,} "
                f"are free on the file system of {out.parent}; free some, or try fewer points"
            )

    def publish(self, names: Sequence[str], manifest: dict[str, Any], card: str) -> None:
        """Adds the table of the models, which are complete, and gives everything its name."""
        output = self._staging.output
        with reporting("write", output.path):
            output.remove(set(output.names()) - set(names))
            for name, content in ((CARD, card), (MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")):
                with os.fdopen(output.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                    file.write(content.encode(errors="replace"))
                    file.flush()
                    os.fsync(file.fileno())
        self._staging.publish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staging.leave(keep=isinstance(error, Interrupted | OutputExistsError))
