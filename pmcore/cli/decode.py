"""`pmcore decode`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import click

from pmcore.cli.output import say
from pmcore.errors import FormatError
from pmcore.explain import Explanation, explain_categories
from pmcore.pageflags import FrameFlags
from pmcore.pagemap import PagemapEntry
from pmcore.profile import REFERENCE_VERSION, preset


@click.command(name="decode")
@click.argument("values", nargs=-1, required=True, metavar="VALUE...")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["pagemap", "kpageflags", "categories"]),
    default="pagemap",
    show_default=True,
    help="What the words are.",
)
@click.option("--kernel", default=REFERENCE_VERSION, show_default=True, help="The kernel that wrote them.")
@click.option("--soft-dirty-cleared", is_flag=True, help="On 3.11 to 4.1: soft-dirty was cleared since boot.")
@click.option(
    "--format", "form", type=click.Choice(["table", "json", "ndjson"]), default="table", show_default=True
)
def command(values: tuple[str, ...], kind: str, kernel: str, soft_dirty_cleared: bool, form: str) -> None:
    """Explain raw 64-bit words, bit by bit, with the rule that states each meaning.

    VALUE is decimal, 0x... or 0b...; "-" reads values from standard input, one a line. Needs no Linux.
    """
    profile = preset(kernel)

    def explained(value: int) -> Explanation:
        if kind == "kpageflags":
            return FrameFlags(value, profile=profile).explain()
        if kind == "categories":
            return explain_categories(value, profile=profile)
        return PagemapEntry(value, profile=profile, soft_dirty_cleared=soft_dirty_cleared).explain()

    found = (explained(value) for value in _numbers(values))
    if form == "json":
        say(json.dumps([one.as_dict() for one in found], indent=1))
    else:
        for number, one in enumerate(found):
            if form == "ndjson":
                say(json.dumps(one.as_dict()))
            else:
                say(("\n" if number else "") + str(one))


def _numbers(values: tuple[str, ...]) -> Iterator[int]:
    for value in values:
        texts = (line.strip() for line in sys.stdin) if value == "-" else iter([value])
        for text in texts:
            if not text:
                continue
            try:
                number = int(text, 0)
            except ValueError:
                raise FormatError(f"{text[:40]!r} is no number", remedy="write 0x... for hex") from None
            if not 0 <= number < 1 << 64:
                raise FormatError(f"{text[:40]} does not fit 64 bits")
            yield number
