"""A disk that fails as a test wants it: power loss, I/O errors, and what a file system in memory allows (FUSE).

What it keeps and loses is in faulty_filesystem.py, its server.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import faulty_filesystem
from tests.conftest import require_tool
from tests.faulty_filesystem import CONTROL


class FaultyDisk:
    """The mounted file system, as a test steers it."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount

    def format(self) -> None:
        """Start anew, empty."""
        self._tell(format=True)

    def cut_power(self, after: int, survives: int | None = None) -> None:
        """Let `after` more operations that change or sync something happen; then nothing works until `reboot`.

        `survives`: a seed for the chance by which what was not synced survives; None: nothing of it does.
        """
        self._tell(cut=after, survives=survives)

    def reboot(self) -> None:
        """Go on from what was durable; cuts the power first if that has not happened."""
        self._tell(reboot=True)

    def fail(self, operation: str, path: str, *, after: int = 0, beyond: int = 0) -> None:
        """From now on such operations on such paths (regular expressions) fail with EIO, but for the first `after`;
        reads and writes only if they go beyond this offset."""
        self._tell(fail={"operation": operation, "path": path, "code": errno.EIO, "after": after, "beyond": beyond})

    def mend(self) -> None:
        """No operation fails any more."""
        self._tell(mend=True)

    @property
    def operations(self) -> int:
        """How many operations changed or synced something since the last `format`, `cut_power` or `reboot`."""
        return int(json.loads(os.getxattr(self.mount, CONTROL))["operations"])

    @property
    def failures(self) -> int:
        """How many operations failed because they were to, since the last `mend` or `format`."""
        return int(json.loads(os.getxattr(self.mount, CONTROL))["failures"])

    @property
    def is_off(self) -> bool:
        """Whether the power is cut."""
        return bool(json.loads(os.getxattr(self.mount, CONTROL))["off"])

    def _tell(self, **command: Any) -> None:
        os.setxattr(self.mount, CONTROL, json.dumps(command).encode())


@contextmanager
def faulty_disk(mount: Path) -> Iterator[FaultyDisk]:
    """The file system mounted at `mount`; skips the test where the kernel or the libraries have no FUSE."""
    require_tool("fusermount3", "fuse3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("this kernel gives us no /dev/fuse")
    mount.mkdir(parents=True)
    server = subprocess.Popen(
        [sys.executable, "-P", faulty_filesystem.__file__, str(mount)], stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 60
        while not os.path.ismount(mount):
            if server.poll() is not None:
                assert server.stderr is not None
                reason = server.stderr.read()
                if "mount failed" in reason or "Operation not permitted" in reason:
                    pytest.skip(f"FUSE cannot be mounted here: {reason.strip()}")
                pytest.fail(f"the file system did not start: {reason}")
            assert time.monotonic() < end, "the file system is not mounted after 60 s"
            time.sleep(0.02)
        yield FaultyDisk(mount)
    finally:
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
        server.kill()
        server.wait()
        assert server.stderr is not None
        server.stderr.close()
