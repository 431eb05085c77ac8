"""Copies and all-to-alls on the same wires, by hand; and what holds whatever meets whatever."""

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.sim.contention import Wires
from moesim.sim.execution import Execution
from moesim.traces import InputError


def ends(contention, work):
    """Seconds at which each (kind, begin, seconds) is done."""
    env = simpy.Environment()
    wires, done = Wires(env, contention), [0.0] * len(work)

    def one(i, kind, begin, seconds):
        yield env.timeout(begin)
        yield from getattr(wires, kind)(seconds)
        done[i] = env.now

    for i, (kind, begin, seconds) in enumerate(work):
        env.process(one(i, kind, begin, seconds))
    env.run()
    return done


MEETING = [("copy", 0, 4), ("exchange", 1, 2)]


@pytest.mark.parametrize(
    ("contention", "work", "expected"),
    [
        ("none", MEETING, [4, 3]),
        ("pause", MEETING, [6, 3]),
        ("share", MEETING, [6, 5]),
        ("share", [("exchange", 0, 4), ("copy", 1, 1)], [5, 3]),
        ("pause", [("exchange", 0, 4), ("copy", 1, 1)], [4, 5]),
        ("share", [("copy", 0, 4), ("copy", 0, 6)], [4, 6]),
        ("share", [("copy", 0, 2), ("copy", 0, 1), ("exchange", 0, 2)], [4, 2, 4]),
        ("pause", [("copy", 0, 3), ("exchange", 1, 1), ("exchange", 3, 1)], [5, 2, 4]),
    ],
)
def test_by_hand(contention, work, expected):
    assert ends(contention, work) == expected


@given(
    copies=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), max_size=5),
    exchanges=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=4),
)
@settings(max_examples=80, deadline=None)
def test_nobody_is_faster_than_alone_and_all_work_is_done(copies, exchanges):
    work, begin = [("copy", b, s) for b, s in copies], 0
    for gap, seconds in exchanges:  # collectives of one server follow each other, however much they are slowed
        begin += gap + 20 * seconds
        work.append(("exchange", begin, seconds))
        begin += 20 * seconds
    together = sum(seconds for kind, _, seconds in work if kind == "exchange")
    alone = ends("none", work)
    for contention in ("pause", "share"):
        for (kind, _, seconds), end, least in zip(work, ends(contention, work), alone, strict=True):
            assert least <= end + 1e-9
            if kind == "copy":
                # Pausing costs a copy at most all collectives; sharing at most doubles it.
                assert end <= least + (together if contention == "pause" else seconds) + 1e-9
            else:
                assert end <= least + (0 if contention == "pause" else seconds) + 1e-9


def test_unknown_kinds_are_named():
    with pytest.raises(InputError, match="unknown contention 'some'; known: none, pause, share"):
        Execution(contention="some")
