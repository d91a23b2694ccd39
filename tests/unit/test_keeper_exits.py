"""The keeper's memory of exits."""

from __future__ import annotations

from unisandbox.host.keeper.exits import KEPT, Exits


def test_the_last_exits_are_known_and_what_is_forgotten_can_be_seen() -> None:
    exits = Exits()
    assert (exits.first, exits.last, exits.after(0, 10)) == (1, 0, [])
    for number in range(1, KEPT + 4):
        exits.add(number, 7, 0, 0.5)
    assert (exits.first, exits.last) == (4, KEPT + 3)
    assert [record[0] for record in exits.after(0, 3)] == [4, 5, 6]
    assert [record[0] for record in exits.after(KEPT + 1, 3)] == [KEPT + 2, KEPT + 3]
    assert exits.find(3, 7) is None
    assert exits.find(4, 7) == (4, 4, 7, 0, 0.5)


def test_of_two_processes_with_one_id_and_clock_tick_the_younger_is_found() -> None:
    exits = Exits()
    exits.add(5, 7, 0, 1.0)
    exits.add(5, 7, 9, 2.0)
    assert exits.find(5, 7) == (2, 5, 7, 9, 2.0)
