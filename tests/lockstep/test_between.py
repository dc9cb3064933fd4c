"""The table of what makes kernels differ: its names are real, and one of its lines is tried again."""

import re

import pytest

from pmcore import spec
from tests.lockstep.between import HERE, TABLE, _answers, _matters


def rows():
    """(capability, an example or "") of each line."""
    found = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if re.fullmatch(r"`[a-z_.0-9]+`", cells[1] if len(cells) > 1 else ""):
            found.append((cells[1].strip("`"), cells[5]))
    return found


def test_names_are_real():
    assert len(rows()) > 20
    for feature, program in rows():
        assert feature in spec.features()
        assert not program or (HERE / "kept" / f"{program}.json").is_file()


@pytest.mark.parametrize(
    ("kernel", "program", "feature"),
    [
        ("6.12", "ksm-unmerge", "mm.ksm_unshares"),
        ("6.12", "hugetlb-mincore-of-a-child", "mm.hugetlb_small_indices"),
        ("6.1", "protected-shared-memory", "quirk.swapin_error_type"),
    ],
)
def test_without_the_capability_a_machine_answers_otherwise(kernel, program, feature):
    assert _matters(_answers(kernel)[program], feature)
    assert not _matters(_answers(kernel)["hugetlb-boundaries"], feature)
