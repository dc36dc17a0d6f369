"""Shared helpers of the tests: real external tools, and small real checkpoints."""

from __future__ import annotations

import os
import shutil

import pytest
from hypothesis import settings

# Timing never decides a test: machines are shared.
settings.register_profile("mergecore", deadline=None)
settings.load_profile("mergecore")


def require_tool(command: str, package: str) -> str:
    """The path of a real program that a test runs; skips the test where it is absent.

    With MERGECORE_REQUIRE_ALL=1 (continuous integration installs everything) absence is a failure.
    """
    path = shutil.which(command)
    if path is None:
        message = f"{command} is not installed (Debian package {package})"
        if os.environ.get("MERGECORE_REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path
