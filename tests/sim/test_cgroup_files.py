"""The cgroup file system of a simulated machine, in all its views."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import pmcore
from pmcore.procview import Opener, ProcView
from pmcore.procview.dump import dump
from pmcore.testing.fakeproc import fake_proc
from pmcore.uapi import Madvise

PAGE = 4096


def make(version: int, **settings):
    """A machine with groups g, g/h, k, and a task in each of the last two."""
    machine = pmcore.open(
        "sim",
        memory="64 MiB",
        swap="16 MiB",
        kernel="6.18",
        config=["CONFIG_MEMCG_V1"] if version == 1 else [],
        **settings,
    )
    for path in ("g", "g/h", "k"):
        machine.make_group(path)
    for path in ("g/h", "k"):
        task = machine.spawn()
        machine.move_task(task, path)
        start = task.mmap(8 * PAGE, addr=1 << 40)
        task.touch(start, 6 * PAGE)
        task.madvise(start, 2 * PAGE, Madvise.PAGEOUT)
        fd = task.memfd_create("m")
        task.ftruncate(fd, 4 * PAGE)
        task.touch(task.mmap(4 * PAGE, flags=1, fd=fd), PAGE)
        task.pwrite(fd, b"x", 2 * PAGE)
    return machine, ("/sys/fs/cgroup/memory" if version == 1 else "/sys/fs/cgroup")


def text(view, path):
    return view.open(path).read(0, 1 << 16).decode()


def stat(view, path):
    return {name: int(value) for name, value in (line.split() for line in text(view, path).splitlines())}


@pytest.mark.rule("CG-010", "KG-003")
@pytest.mark.parametrize("version", [1, 2])
def test_a_directory_for_each_group(version):
    machine, root = make(version)
    view = ProcView(machine)
    assert {"g", "k", "cgroup.procs"} <= set(view.node(root).names())
    assert "h" in view.node(f"{root}/g").names()
    for path, inode in machine.groups().items():
        node = view.node(f"{root}/{path}".rstrip("/"))
        assert (node.inode, node.mode & 0o777, node.is_dir) == (inode, 0o755, True)
    inodes = [
        view.node(f"{root}/{g}/{f}").inode for g in ("g", "g/h", "k") for f in ("cgroup.procs", "memory.stat")
    ]
    assert len({*inodes, *machine.groups().values()}) == len(inodes) + 4
    machine.make_group("new")
    assert "new" in view.node(root).names()
    machine.remove_group("new")
    with pytest.raises(FileNotFoundError):
        view.node(f"{root}/new")
    line = "1:memory:/g/h\n0::/\n" if version == 1 else "0::/g/h\n"
    assert text(view, "/proc/1/cgroup") == line


def test_a_machine_without_groups_has_no_such_directory():
    view = ProcView(pmcore.open("sim"))
    with pytest.raises(FileNotFoundError):
        view.node("/sys/fs/cgroup")
    assert "fs" not in view.node("/sys").names()
    assert not [name for name in pmcore.open("sim").files() if "cgroup/" in name]


@pytest.mark.rule("CG-016", "CG-015")
@pytest.mark.parametrize("version", [1, 2])
def test_what_the_files_say(version):
    machine, root = make(version)
    view = ProcView(machine)
    usage, limit, none = (
        ("memory.usage_in_bytes", "memory.limit_in_bytes", "9223372036854771712")
        if version == 1
        else ("memory.current", "memory.max", "max")
    )
    assert text(view, f"{root}/g/h/cgroup.procs") == "1\n"
    assert text(view, f"{root}/g/cgroup.procs") == ""
    assert text(view, f"{root}/g/h/{limit}") == f"{none}\n"
    machine.limit_group("g/h", "1 MiB")
    assert text(view, f"{root}/g/h/{limit}") == f"{1 << 20}\n"
    assert int(text(view, f"{root}/g/{usage}")) == machine.group_usage("g") == machine.group_usage("g/h")
    found = stat(view, f"{root}/g/h/memory.stat")
    if version == 1:
        assert (found["rss"], found["cache"], found["shmem"], found["mapped_file"]) == (
            4 * PAGE,
            2 * PAGE,
            2 * PAGE,
            PAGE,
        )
        assert (found["swap"], found["inactive_anon"] + found["active_anon"]) == (2 * PAGE, 6 * PAGE)
        assert found["hierarchical_memory_limit"] == 1 << 20
        above = stat(view, f"{root}/g/memory.stat")
        assert (above["rss"], above["total_rss"], above["total_swap"]) == (0, 4 * PAGE, 2 * PAGE)
        assert int(text(view, f"{root}/memory.usage_in_bytes")) >= machine.group_usage(
            "g"
        ) + machine.group_usage("k")
    else:
        assert (found["anon"], found["file"], found["shmem"], found["file_mapped"]) == (
            4 * PAGE,
            2 * PAGE,
            2 * PAGE,
            PAGE,
        )
        assert text(view, f"{root}/g/memory.swap.current") == f"{2 * PAGE}\n"
        assert stat(view, f"{root}/g/memory.stat") == found
        assert machine.group_usage("g") == found["anon"] + found["file"] + found["pagetables"]
        assert "memory.max" not in view.node(root).names()
        assert text(view, f"{root}/g/cgroup.subtree_control") == "memory\n"
        assert text(view, f"{root}/k/cgroup.subtree_control") == "\n"
    machine.check()


@pytest.mark.rule("CG-017")
@pytest.mark.parametrize("version", [1, 2])
def test_writing(version):
    machine, root = make(version)
    view = ProcView(machine)
    limit = "memory.limit_in_bytes" if version == 1 else "memory.max"

    def write(name, data):
        return view.open(f"{root}/{name}", os.O_WRONLY).write(0, data)

    assert write("k/cgroup.procs", b"1\n") == 2
    assert text(view, f"{root}/k/cgroup.procs") == "1\n2\n"
    assert write(f"k/{limit}", b"64K") == 3
    assert text(view, f"{root}/k/{limit}") == "65536\n"
    write(f"k/{limit}", b"-1" if version == 1 else b"max\n")
    assert text(view, f"{root}/k/{limit}") in ("9223372036854771712\n", "max\n")
    before = machine.digest()
    for name, data, number in (
        ("k/cgroup.procs", b"77", errno.ESRCH),
        ("k/cgroup.procs", b"one", errno.EINVAL),
        (f"k/{limit}", b"much", errno.EINVAL),
        (f"k/{limit}", b"", errno.EINVAL),
        ("k/memory.stat", b"1", errno.EINVAL),
    ):
        with pytest.raises(OSError, match=r"write|tasks|pids") as caught:
            write(name, data)
        assert caught.value.errno == number
    with pytest.raises(OSError, match="open") as caught:
        view.open(f"{root}/k/{limit}", os.O_WRONLY, Opener.user(1000))
    assert caught.value.errno == errno.EACCES
    assert machine.digest() == before
    machine.check()


def test_dumped_and_patched_views_have_it_too(tmp_path):
    machine, root = make(2)
    dump(ProcView(machine), tmp_path / "dumped")
    assert (tmp_path / "dumped" / root[1:] / "g" / "h" / "cgroup.procs").read_text() == "1\n"
    with fake_proc(machine):
        assert Path(f"{root}/g/h").stat().st_ino == machine.groups()["g/h"]
        assert {path.name for path in Path(f"{root}/g").iterdir()} >= {"h", "memory.swap.current"}
        Path(f"{root}/k/cgroup.procs").write_text("1")
    assert machine.groups()["k"] == 193
    assert machine.process(1).pread("cgroup", 0, 99) == b"0::/k\n"
