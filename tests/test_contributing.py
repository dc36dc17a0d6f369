"""The code that CONTRIBUTING.md walks through is the repository's."""

from __future__ import annotations

import re

import pytest

from tests.test_dialect import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
QUOTED = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SOURCES = [path.read_text() for folder in ("mergecore", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_function_value_registry_and_test_are_quoted() -> None:
    assert len(QUOTED) == 4


@pytest.mark.parametrize("code", QUOTED, ids=lambda code: code.partition("\n")[0])
def test_quoted_code_is_in_the_repository(code: str) -> None:
    assert any(code in source for source in SOURCES)


def test_named_files_are_there() -> None:
    for name in re.findall(r"`((?:mergecore|tests|csrc|docs)/[\w/.]+)`", TEXT):
        assert (ROOT / name).exists(), name
