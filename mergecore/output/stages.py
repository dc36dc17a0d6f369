"""Where the results of earlier merges of one spec lie until its last one has read them: `.NAME.stages` beside NAME."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mergecore.errors import Interrupted, OutputError, OutputExistsError
from mergecore.output.staging import reporting
from mergecore.output.verify import MANIFEST_NAME


def stages_folder(out: Path) -> Path:
    """The folder of the output `out`."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.stages"


class LockedFolder:
    """A folder that one merge at a time uses. Raises OutputError if another one has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = -1

    def __enter__(self) -> Self:
        with reporting("create", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise OutputError(f"another merge is using {self.folder}") from error
        return self

    def remove(self) -> None:
        """Removes it with all that it holds, as far as possible."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)


class Stages(LockedFolder):
    """The folder while a merge uses it. It goes when the merge is done or has failed; what is complete stays for
    `resume` if the merge was interrupted."""

    def __init__(self, out: Path, *, resume: bool) -> None:
        super().__init__(stages_folder(out))
        self._resume = resume

    def is_done(self, name: str, identity: str) -> bool:
        """Whether an interrupted attempt has finished this merge; what else lies there is removed."""
        path = self.folder / name
        if self._resume:
            with suppress(OSError, ValueError, TypeError, KeyError):
                if json.loads((path / MANIFEST_NAME).read_bytes())["identity"] == identity:
                    return True
        with reporting("remove", path):
            if path.exists():
                shutil.rmtree(path)
        return False

    def check_room(self, nbytes: int) -> None:
        """OutputError unless the results of all merges fit the disk together: the first must not be made in vain."""
        free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            raise OutputError(
                f"not enough disk space beside {self.folder}: the merges of this spec need {nbytes:,} bytes together, "
                f"{free:,} are free; free some or choose an output elsewhere"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, (Interrupted, OutputExistsError)):
            self.remove()
        super().__exit__(kind, error, trace)
