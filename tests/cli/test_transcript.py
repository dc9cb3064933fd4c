"""The transcript of the tour: two sides step by step, and docs/tour.md, which was made so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def pmcore(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pmcore.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


TRANSCRIPT = Path(__file__).resolve().parents[2] / "docs" / "tour.md"


def blocks(text):
    """The fenced blocks of a transcript: (title, lines)."""
    found, title, lines = [], None, []
    for line in text.splitlines():
        if line.startswith("```"):
            if title is not None:
                found.append((title, lines))
            title, lines = (line.removeprefix("```text ") if title is None else None), []
        elif title is not None:
            lines.append(line)
    return found


def test_the_transcript_in_docs_is_what_the_simulator_says_today():
    """docs/tour.md without its live blocks, made again from the kernel that it names."""
    text = TRANSCRIPT.read_text(encoding="utf-8")
    done = pmcore("tour", "--no-live", "--like", str(TRANSCRIPT), "--transcript", "-")
    assert done.returncode == 0, done.stderr
    simulated = re.sub(r"```text Linux [^`]*```\n\n?", "", text)
    assert done.stdout.split() == simulated.split()
    assert [title for title, _ in blocks(done.stdout)] == ["simulated"] * 21


def test_the_transcript_in_docs_shows_two_sides_that_agree():
    """Each step has both; they are the same line for line, and the six operations are among the steps."""
    text = TRANSCRIPT.read_text(encoding="utf-8")
    found = blocks(text)
    assert len(found) == 42
    for (left, here), (right, there) in zip(found[::2], found[1::2], strict=True):
        assert left == "simulated"
        assert right.startswith("Linux 6.18")
        assert here == there
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    for words in (" map area=", " fork ", " write ", " advice=PAGEOUT", " advice=COLLAPSE", " scan "):
        assert any(words in line for line in headings), words
    assert "swapped  S1" in text
    assert "uffd_wp  F" in text
    assert "COMPOUND_HEAD|THP" in text


def test_transcripts_of_other_files_are_refused(tmp_path):
    missing, other = str(tmp_path / "missing"), str(tmp_path / "other.md")
    Path(other).write_text("# nothing\n")
    for arguments in (
        ["--like", missing],
        ["--like", other],
        ["--like", str(TRANSCRIPT), "--kernel", "6.12"],
    ):
        assert pmcore("tour", "--no-live", "--transcript", "-", *arguments).returncode == 2
