"""A short fuzzing of every reader of what strangers wrote; `python -m tests.fuzz TARGET` goes on for longer."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS, seeds

EXECUTIONS = 150


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_accepted_or_refused_with_a_clear_error(name: str) -> None:
    assert len(seeds(name)) > 1
    for data in seeds(name):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_every_mutation_is_accepted_or_refused_with_a_clear_error(name: str) -> None:
    chance = random.Random(name)
    start = seeds(name)
    for number in range(EXECUTIONS):
        data = mutated(chance.choice(start), chance)
        try:
            TARGETS[name](data)
        except BaseException as error:
            pytest.fail(f"execution {number}, {type(error).__name__}: {error}\n{data[:2000]!r}")
