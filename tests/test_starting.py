"""Imports without garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from mergecore.starting import importing


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    gc.enable() if was_on else gc.disable()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_rests_inside_and_is_afterwards_as_it_was(was_on: bool) -> None:
    gc.enable() if was_on else gc.disable()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled() == was_on


def test_the_collector_is_on_again_after_an_import_that_failed() -> None:
    gc.enable()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_what_was_made_inside_is_not_looked_at_again_and_what_comes_later_is() -> None:
    with importing():
        kept = [[]]  # type: list[list[object]]
    assert not any(one is kept for one in gc.get_objects())
    later: list[list[object]] = [[]]
    assert any(one is later for one in gc.get_objects())
