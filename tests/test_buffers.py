"""Memory for results: parts of a ring that overlap nowhere and lie in their page as they will lie in the file."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mergecore.output.buffers import PAGE, Ring, address_of, ring_bytes

REQUESTS = st.lists(st.tuples(st.integers(1, 3 * PAGE), st.integers(0, 1 << 40), st.integers(0, 3)), max_size=60)
"""Bytes and place of a part, and how many are given back, if there are so many, before it is asked for."""


@given(st.integers(0, 8 * PAGE), REQUESTS)
def test_parts_overlap_nowhere_and_there_is_room_again_once_others_are_back(
    nbytes: int, requests: list[tuple[int, int, int]]
) -> None:
    ring = Ring(nbytes)
    lent: list[memoryview] = []
    for number, (size, place, back) in enumerate(requests):
        for _ in range(min(back, len(lent))):
            ring.give_back(lent.pop(0))
        while (part := ring.lend(size, place)) is None:
            assert lent, "nothing is lent, and there is no room"
            ring.give_back(lent.pop(0))
        assert len(part) == size
        assert address_of(part) % PAGE == place % PAGE
        part[:] = bytes([number % 256]) * size
        lent.append(part)
        first = number - len(lent) + 1
        for n, each in enumerate(lent):
            assert each == bytes([(first + n) % 256]) * len(each), "another part lies over it"
    assert ring.nbytes <= max([nbytes, *(size + place % PAGE for size, place, _ in requests)])


def test_parts_may_be_given_back_in_any_order_and_only_their_first_bytes_be_used() -> None:
    ring = Ring(4 * PAGE)
    parts = [ring.lend(PAGE, 0) for _ in range(4)]
    assert ring.lend(1, 0) is None
    for n in (2, 0, 3, 1):
        part = parts[n]
        assert part is not None
        ring.give_back(part[:7])
    assert ring.lend(4 * PAGE, 0) is not None


@given(st.integers(0, 3), st.integers(1, 3 * PAGE), st.data())
def test_a_device_that_holds_some_results_gets_room_for_the_next(held: int, largest: int, data: st.DataObject) -> None:
    ring = Ring(ring_bytes(held + 2, largest))
    lent: list[memoryview] = []
    for _ in range(12):
        part = ring.lend(data.draw(st.integers(1, largest)), data.draw(st.integers(0, PAGE - 1)))
        assert part is not None
        lent.append(part)
        if len(lent) > held:
            ring.give_back(lent.pop(0))
    assert ring.nbytes == ring_bytes(held + 2, largest), "it did not have to grow"
