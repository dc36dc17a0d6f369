"""Which files this process reads and where it writes: below given folders, whatever links and races there are.

A name proves nothing: between a look and an open somebody may put a link in its place. So everything is opened first
and judged by its descriptor, whose real path the kernel tells (/proc/self/fd). What lies elsewhere is not read, and
nothing is made there. Links that stay below the folders work. Not for finding models (references.py, the worker).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from mergecore.errors import CheckpointError, OutputError

_inputs: tuple[str, ...] = ()
_outputs: tuple[str, ...] = ()


@contextmanager
def confined(inputs: Sequence[Path], outputs: Sequence[Path]) -> Iterator[None]:
    """From now on input files must lie below one of `inputs`, and folders of outputs below one of `outputs`.

    None given: anywhere. These are real paths, without links; they need not exist yet. Holds for the whole process.
    """
    global _inputs, _outputs
    before = _inputs, _outputs
    _inputs, _outputs = (tuple(map(str, roots)) for roots in (inputs, outputs))
    try:
        yield
    finally:
        _inputs, _outputs = before


def open_input(path: str | os.PathLike[str]) -> int:
    """A descriptor to read a regular file with.

    Raises OSError as os.open does; CheckpointError for what is no regular file (it is not opened: a FIFO or a device
    would notice) or does not lie below the folders of inputs.
    """
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            _check_input(place, path)
            return os.open(_link(place), os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(place)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    except ValueError as error:  # a null byte, a lone surrogate
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from None


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """The sorted names in a folder. Raises OSError, and CheckpointError if it does not lie below those of inputs."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_input(descriptor, folder)
        return sorted(os.listdir(descriptor))
    finally:
        os.close(descriptor)


class OutputFolder:
    """A folder that results are written into, by its descriptor: wherever names lead now, this is the folder.

    Names in it are plain; a link of such a name is never followed. Raises OSError, and OutputError for a folder that
    does not lie below those of outputs.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        """For messages."""
        self.descriptor = descriptor

    @classmethod
    def at(cls, path: Path, made: list[tuple[OutputFolder, str]]) -> OutputFolder:
        """The folder at an absolute path, made with its parents where missing: `made` tells what and where."""
        here = cls(Path("/"), os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            for name in path.parts[1:]:
                descriptor = here._step(name)
                if descriptor is None:
                    here._check()
                    with suppress(FileExistsError):
                        os.mkdir(name, dir_fd=here.descriptor)
                        made.append((here._again(), name))
                        made[-1][0].sync()
                    descriptor = here._step(name)
                if descriptor is None:
                    raise FileNotFoundError(errno.ENOENT, "a link to nothing is in its place", str(here.path / name))
                here.close()
                here = cls(here.path / name, descriptor)
            here._check()
            return here._again()
        finally:
            here.close()

    def enter(self, name: str) -> OutputFolder:
        """The folder `name` in this one, which must be there."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return OutputFolder(self.path / name, os.open(name, flags, dir_fd=self.descriptor))

    def open(self, name: str, flags: int) -> int:
        """A descriptor of a regular file that has no other name: a hard link could lead to anybody's file."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o666, dir_fd=self.descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(descriptor)
            raise OSError(errno.EMLINK, f"{name} is no plain file, or has several names (hard links)")
        return descriptor

    def status(self, name: str) -> os.stat_result:
        """What lies at `name`; a link is looked at itself."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Whether anything lies at `name`."""
        try:
            self.status(name)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        """The sorted names in it."""
        return sorted(os.listdir(self.descriptor))

    def remove(self, names: Iterable[str]) -> None:
        """Removes files and folders as far as possible. Raises nothing."""
        for name in names:
            try:
                os.unlink(name, dir_fd=self.descriptor)
            except IsADirectoryError:
                shutil.rmtree(name, ignore_errors=True, dir_fd=self.descriptor)
            except OSError:
                pass

    def sync(self) -> None:
        """Makes its entries durable."""
        os.fsync(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _step(self, name: str) -> int | None:
        with suppress(FileNotFoundError):
            return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.descriptor)
        return None

    def _again(self) -> OutputFolder:
        """Opened for reading, which syncing and listing need."""
        return OutputFolder(
            self.path, os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.descriptor)
        )

    def _check(self) -> None:
        if not _below(self.descriptor, _outputs):
            raise OutputError(f"{self.path} leads out of the outputs folder {', '.join(_outputs)}")


def _check_input(descriptor: int, path: str | os.PathLike[str]) -> None:
    if not _below(descriptor, _inputs):
        raise CheckpointError(
            f"{os.fspath(path)} does not lie below a model folder of this server ({', '.join(_inputs)}): a link leads "
            "out of them"
        )


def _below(descriptor: int, roots: Sequence[str]) -> bool:
    real = Path(os.readlink(_link(descriptor)))
    return not roots or any(real.is_relative_to(root) for root in roots)


def _link(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"
