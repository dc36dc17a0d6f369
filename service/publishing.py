"""Where the output of a leased job grows, and how it gets its name: one rename, that only the present owner can do.

Such a job is merged in a folder of its own, OUTPUTS/.JOB@TOKEN, named like its folder in running/. A worker that slept
through the loss of its lease still has that folder open, and whatever it writes, removes or renames goes there. So the
next owner never uses it: it removes it, and only then begins in a new one. With the folder goes what the other one
could publish. What was finished there is lost, but for the journal of a search, which is copied: a copy is nobody
else's. Folders that were returned, by an owner whose worker had ended, are gone on with. Not for what is merged
(worker.py), nor for jobs that are owned through locks: these are merged in their place.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecore.confined import OutputFolder, confined
from mergecore.errors import CheckpointError, Interrupted, OutputError, OutputExistsError
from mergecore.output.locking import without_locks
from mergecore.output.stages import search_folder
from mergecore.output.staging import reporting
from mergecore.output.verify import MANIFEST_NAME
from mergecore.small_files import read_object
from service.leases import Tenancy, job_of

if TYPE_CHECKING:
    from mergecore.spec import MergeSpec

_JOURNAL = "journal.jsonl"
_TRIES = 20
"""So often a folder is removed into which somebody still writes."""


class Workplace:
    """The folder OUTPUTS/.JOB@TOKEN of the job in `folder`, running/JOB@TOKEN, whose output becomes `out`.

    `out` is a real path below `outputs`. Everything raises OutputError for what cannot be made or removed, and
    Interrupted, with nothing published, if the job may be another daemon's.
    """

    def __init__(self, folder: Path, outputs: Path, out: Path, tenancy: Tenancy) -> None:
        self._name, self._job = f".{folder.name}", job_of(folder)
        self._root_path, self._out, self._tenancy = outputs.resolve(), out, tenancy
        self.place = self._root_path / self._name / out.name
        """What is merged, before it is `out`."""

    def merge(
        self, spec: MergeSpec, former: Mapping[str, str], merge: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        """Merge in it, and publish; the figures that `merge` gives. `former` leases as in a job's status.

        Raises OutputExistsError if the name is taken, and what `merge` raises.
        """
        try:
            self.enter(former)
            if is_taken(self._out):
                raise taken(self._out)
            try:
                with without_locks():
                    result = merge(self.place)
            except OutputExistsError:  # an earlier attempt died before it published
                finished = published_by(spec, self.place)
                if finished is None:
                    raise
                result = finished
            self.publish()
        finally:
            self.leave()
        return {**result, "output": str(self._out)}

    def enter(self, former: Mapping[str, str]) -> None:
        """Make the folder, and see that those of all former leases are gone."""
        with reporting("take over", self._root_path), OutputFolder.at(self._root_path, []) as root:
            left = self._succeed(root, former)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._name, dir_fd=root.descriptor)
            with root.enter(self._name) as workplace:
                for name in left:
                    self._copy_journal(root, name, workplace)
            root.sync()
            for name in left:
                _remove(root, name)
            root.sync()
        self._check()

    def publish(self) -> None:
        """Give what was merged its name, durably. OutputExistsError if that is taken."""
        made: list[tuple[OutputFolder, str]] = []
        try:
            with (
                reporting("publish", self._out),
                OutputFolder.at(self._out.parent, made) as parent,
                OutputFolder.at(self._root_path, []) as root,
            ):
                self._rename(root, parent)
        except BaseException:
            for folder, name in reversed(made):
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(name, dir_fd=folder.descriptor)
            raise
        finally:
            for folder, _ in made:
                folder.close()

    def leave(self) -> None:
        """Remove the folder unless something is kept in it for the next attempt. Raises nothing."""
        with (
            contextlib.suppress(OSError, OutputError),
            OutputFolder.at(self._root_path, []) as root,
        ):
            os.rmdir(self._name, dir_fd=root.descriptor)

    def _check(self) -> None:
        if self._tenancy.over():
            raise Interrupted("the lease on this job has run out: nothing is published")

    def _rename(self, root: OutputFolder, parent: OutputFolder) -> None:
        name = self._out.name
        try:
            # Where the next owner has removed the folder, or does so now, nothing is in it.
            with root.enter(self._name) as inside:
                self._check()
                # Replaces an empty directory, and nothing else.
                os.rename(name, name, src_dir_fd=inside.descriptor, dst_dir_fd=parent.descriptor)
                parent.sync()
                inside.sync()
        except FileNotFoundError as error:
            raise Interrupted("another daemon has taken this job over: nothing is published") from error
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise taken(self._out) from error
            raise

    def _succeed(self, root: OutputFolder, former: Mapping[str, str]) -> list[str]:
        """Go on with the newest folder that was returned; the others that are there, newest first."""
        left = []
        for token, how in reversed(list(former.items())):
            name = f".{self._job}@{token}"
            if not root.has(name):
                continue
            if how == "returned" and not root.has(self._name):
                os.rename(name, self._name, src_dir_fd=root.descriptor, dst_dir_fd=root.descriptor)
            else:
                left.append(name)
        return left

    def _copy_journal(self, root: OutputFolder, name: str, workplace: OutputFolder) -> None:
        """Have a durable copy of the journal of a search, whose lines count one by one, unless there is one."""
        folder = search_folder(self.place).name
        try:
            with root.enter(name) as other, other.enter(folder) as search:
                content = _read(search, _JOURNAL)
        except OSError:  # no search, or somebody removes it
            return
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, dir_fd=workplace.descriptor)
        with workplace.enter(folder) as search:
            if search.has(_JOURNAL):
                return
            part = f".{_JOURNAL}.part"
            search.remove([part])
            with os.fdopen(search.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(part, _JOURNAL, src_dir_fd=search.descriptor, dst_dir_fd=search.descriptor)
            search.sync()
        workplace.sync()


def _read(folder: OutputFolder, name: str) -> bytes:
    with os.fdopen(folder.open(name, os.O_RDONLY), "rb") as file:
        return file.read()


def _remove(root: OutputFolder, name: str) -> None:
    """Remove a folder into which somebody may still write."""
    for _ in range(_TRIES):
        root.remove([name])
        if not root.has(name):
            return
    raise OutputError(f"{root.path / name} cannot be removed: its former owner could still publish it")


def taken(out: Path) -> OutputExistsError:
    """The error that something lies at `out`."""
    return OutputExistsError(f"{out} exists already and was not touched; choose another output or move it away")


def is_taken(out: Path) -> bool:
    """Whether something lies at `out` that a merge would refuse to replace."""
    try:
        return bool(os.listdir(out))
    except FileNotFoundError:
        return False
    except OSError:
        return True


def published_by(spec: MergeSpec, out: Path) -> dict[str, Any] | None:
    """The figures of a merge of this very spec that lies complete at `out`; None if something else lies there.

    Only a complete merge has a manifest: it comes with the rename.
    """
    try:
        with confined([out], []):
            manifest = read_object(out / MANIFEST_NAME)
    except CheckpointError:
        return None
    if not isinstance(manifest, dict):
        return None
    given = manifest.get("evolve", manifest)  # of a search: the spec that asked for it
    if not isinstance(given, dict) or given.get("spec") != spec.as_dict() or given.get("spec_text") != spec.text:
        return None
    return {**manifest.get("result", {}), "output": str(out)}
