"""Where the results of earlier merges of one spec lie until its last one has read them: `.NAME.stages` beside NAME."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mergecore.confined import OutputFolder
from mergecore.errors import CheckpointError, Interrupted, OutputError, OutputExistsError
from mergecore.output.locking import take
from mergecore.output.staging import reporting
from mergecore.output.verify import MANIFEST_NAME
from mergecore.small_files import read_object


def stages_folder(out: Path) -> Path:
    """The folder of the output `out`."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.stages"


def search_folder(out: Path) -> Path:
    """Where a search for the parameters of the output `out` keeps its candidates and its journal."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.evolve"


class LockedFolder:
    """A folder that one merge at a time uses. Raises OutputError if another one has it."""

    inside: OutputFolder
    """The folder itself, while it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        with reporting("create", self.folder):
            made: list[tuple[OutputFolder, str]] = []
            self._parent = OutputFolder.at(self.folder.parent, made)
            for folder, _ in made:
                folder.close()
            with suppress(FileExistsError):
                os.mkdir(self.folder.name, dir_fd=self._parent.descriptor)
            self.inside = self._parent.enter(self.folder.name)
        try:
            take(self.inside.descriptor)
        except OSError as error:
            self._close()
            raise OutputError(f"another merge is using {self.folder}") from error
        return self

    def remove(self) -> None:
        """Removes it with all that it holds, as far as possible."""
        self._parent.remove([self.folder.name])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self.inside.close()
        self._parent.close()


class Stages(LockedFolder):
    """The folder while a merge uses it. It goes when the merge is done or has failed; what is complete stays for
    `resume` if the merge was interrupted."""

    def __init__(self, out: Path, *, resume: bool) -> None:
        super().__init__(stages_folder(out))
        self._resume = resume

    def is_done(self, name: str, identity: str) -> bool:
        """Whether an interrupted attempt has finished this merge; what else lies there is removed."""
        if self._resume:
            with suppress(CheckpointError, KeyError):
                if read_object(self.folder / name / MANIFEST_NAME)["identity"] == identity:
                    return True
        self.inside.remove([name])
        return False

    def check_room(self, nbytes: int) -> None:
        """OutputError unless the results of all merges fit the disk together: the first must not be made in vain."""
        free = shutil.disk_usage(self.inside.descriptor).free
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
