"""What lockstep says it has reached: every rare state, on simulated machines alone."""

from __future__ import annotations

from collections import Counter

import pytest

from pmcore.lockstep import lockstep
from pmcore.lockstep.reached import RARE
from pmcore.lockstep.session import session
from pmcore.program import Program
from pmcore.program import steps as s
from pmcore.registry import open_workbench
from pmcore.uapi import Madvise, UffdFeature


def sim():
    return open_workbench("sim", memory="64 MiB", swap="16 MiB", kernel="6.18")


def reached(*steps):
    """What a program reaches beyond steps and sorts of pages."""
    result = lockstep(Program(name="p", steps=steps), sim(), sim())
    assert result.agrees
    return {key: count for key, count in result.reached.items() if key in RARE and count}


MAP, HUGE = s.Map(area="a", pages=16), s.Map(area="a", pages=512, align=2 << 20)


@pytest.mark.rule("EV-004")
@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        (
            (MAP, s.Touch(area="a", pages=4, write=False), s.Touch(area="a", pages=3)),
            {"zero page replaced by a frame": 3},
        ),
        (
            (
                MAP,
                s.Touch(area="a", pages=4),
                s.Advise(area="a", pages=3, advice=int(Madvise.PAGEOUT)),
                s.Touch(area="a", pages=2, write=False),
            ),
            {"page swapped out": 3, "page swapped in": 2, "page in the swap cache": 2},
        ),
        (
            (
                MAP,
                s.Touch(area="a", pages=4),
                s.Fork(child="c"),
                s.Touch(task="c", area="a", pages=1),
                s.Exit(task="c"),
            ),
            {"page no longer exclusive": 4, "page copied on write": 1, "page exclusive again": 1 + 3},
        ),
        (
            (
                HUGE,
                s.Advise(area="a", pages=512, advice=int(Madvise.HUGEPAGE)),
                s.Write(area="a"),
                s.Protect(area="a", pages=1, prot=1),
                s.Advise(area="a", page=9, pages=1, advice=int(Madvise.COLD)),
            ),
            {
                "huge page mapped": 1,
                "huge page mapped by PTEs": 1,
                "huge page split": 1,
                "frame replaced by the zero page": 511,
            },
        ),
        (
            (
                HUGE,
                s.Touch(area="a", pages=3),
                s.Advise(area="a", pages=512, advice=int(Madvise.COLLAPSE)),
            ),
            {"huge page collapsed": 1},
        ),
        (
            (
                MAP,
                s.UffdOpen(features=int(UffdFeature.WP_ASYNC)),
                s.UffdRegister(area="a", pages=16),
                s.Touch(area="a", pages=2),
                s.UffdProtect(area="a", pages=8),
                s.Touch(area="a", pages=1),
                s.Scan(area="a", pages=2, flags=1, category_mask=2),
            ),
            {
                "page armed": 2 + 1,
                "marker on an empty entry": 6,
                "page written while armed": 1,
                "page re-armed": 1,
                "scan that protects": 1,
            },
        ),
        (
            (
                MAP,
                s.Advise(area="a", pages=2, advice=int(Madvise.GUARD_INSTALL)),
                s.Advise(area="a", pages=1, advice=int(Madvise.GUARD_REMOVE)),
            ),
            {"guard installed": 2, "guard removed": 1},
        ),
        (
            (
                MAP,
                s.Touch(area="a", pages=5),
                s.Lock(area="a", pages=2),
                s.UnlockAll(),
                s.Advise(area="a", page=2, pages=3, advice=int(Madvise.FREE)),
            ),
            {"page locked": 2, "page unlocked": 2, "page may be discarded": 3},
        ),
        (
            (
                MAP,
                s.Touch(area="a", pages=16, stride=2),
                s.Scan(area="a", pages=16, vec_len=8, category_mask=8),
                s.Scan(area="a", pages=16, max_pages=3, category_mask=8),
                s.Scan(area="a", pages=16, shift=1),
                s.PagemapRead(area="a", offset=1),
                s.PagemapRead(area="a", length=0),
                s.PagemapRead(area="a", from_end=True, length=16),
            ),
            {
                "scan with vec exactly full": 1,
                "scan with max_pages exactly reached": 1,
                "scan refused": 1,
                "pagemap read misaligned": 1,
                "pagemap read of nothing": 1,
                "pagemap read past the end": 1,
            },
        ),
        (
            (
                MAP,
                s.Unmap(area="a", pages=16),
                s.Map(area="b", within="a", page=12, pages=4, flags=0x132),
                s.Touch(area="a", page=5, pages=1),
            ),
            {"mapping grown downwards": 1},
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_is_counted_where_it_happens(steps, counts):
    assert reached(*steps) == counts


@pytest.mark.rule("EV-004")
def test_a_session_of_fixed_seeds_reaches_all():
    """Weights in the programs are no better than what they reach."""
    seen = Counter()
    for seed in range(1, 25):
        report = session(sim, sim, programs=60, seed=seed)
        assert not report.differences
        seen += report.reached
        missing = [what for what in RARE if not seen[what]]
        if not missing:
            break
    assert missing == []
