"""Other people's mistakes on the running kernel: the same programs and the same readers, unchanged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pmcore.errors import BackendUnavailable
from pmcore.registry import open_workbench
from pmcore.validate import cases

from . import mistakes

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]
CASES = {case.name: case for case in cases()}


def needs_nothing(case):
    """Neither settings of huge pages nor hugetlb nor a disk: test_all_on_the_running_kernel has those."""
    return mistakes.needed(case) == ({}, {}, 0)


@pytest.fixture(scope="module")
def bench():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    with open_workbench("procfs", still=True, swap="64 MiB") as workbench:
        if not workbench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        yield workbench


@pytest.mark.rule(
    *(
        "AC-012",
        "KS-004",
        "PM-012",
        "PM-024",
        "SC-011",
        "SC-014",
        "SC-018",
        "SC-026",
        "SC-039",
        "VM-011",
        "VM-021",
    )
)
@pytest.mark.parametrize("name", [case.name for case in cases() if needs_nothing(case)])
def test_on_the_running_kernel(bench, name):
    """The right reader says what the kernel's interfaces say through pmcore; the wrong one does not."""
    version = ".".join(os.uname().release.split(".")[:2])
    reason = mistakes.why_not(CASES[name], version)
    if reason:
        pytest.skip(reason)
    if not all(bench.kernel.profile.has(needed) for needed in CASES[name].needs):
        pytest.skip("this kernel is configured without it")
    careful, misuses = mistakes.readers(str(Path(__file__).parent))
    try:
        outcome = mistakes.judge(CASES[name], bench, careful, misuses, version)
    except BackendUnavailable as error:
        assert CASES[name].needs
        pytest.skip(str(error))
    assert outcome in (mistakes.SHOWN, mistakes.RIGHT)


HIDDEN = """
import ctypes, json, mmap, sys
sys.path.insert(0, {folder!r})
from validate.careful import careful
from validate.misuses import WRONG
area = mmap.mmap(-1, 16 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(8):
    area[page * 4096] = 1
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
areas = [(start, start + 16 * 4096)]
readers = (careful, WRONG["hidden-frame-numbers"])
print(json.dumps([reader("self", areas)["pages"] for reader in readers]))
"""


@pytest.mark.rule("AC-003", "AC-004")
def test_hidden_frame_numbers():
    """Without CAP_SYS_ADMIN: the right reader says it does not know, the wrong one that all is in frame 0."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv, to give a capability away")
    script = HIDDEN.format(folder=str(Path(__file__).resolve().parents[1]))
    command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    right, wrong = json.loads(done.stdout)
    assert (
        [page["present"] for page in right] == [page["present"] for page in wrong] == [True] * 8 + [False] * 8
    )
    assert {page["pfn"] for page in right} == {None}
    assert {page["pfn"] for page in wrong[:8]} == {0}
