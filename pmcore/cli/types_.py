"""`pmcore types`: page-types' counterpart."""

from __future__ import annotations

from typing import Any

import click

from pmcore.cli.options import backend_options, format_option, open_backend
from pmcore.errors import ArgumentError


@click.command(name="types")
@click.option(
    "-r", "--raw", is_flag=True, help="All bits, overloaded ones told apart (for kernel developers)."
)
@click.option("-d", "--describe", metavar="FLAGS", help="Describe FLAGS and do nothing else.")
@click.option(
    "-a", "--addr", "addrs", multiple=True, metavar="SPEC", help="Pages N, N+M, N,M, N, or ,M only."
)
@click.option(
    "-b", "--bits", multiple=True, metavar="SPEC", help="Pages with these bits only: a,b a,b=a a,~b =a,b"
)
@click.option("-c", "--cgroup", metavar="PATH|@INODE", help="Pages of this memory cgroup only.")
@click.option("-p", "--pid", metavar="PID", help="Walk a process's address space.")
@click.option("-f", "--file", "path", metavar="PATH", help="Walk the cached pages of a file or directory.")
@click.option("-i", "--mark-idle", is_flag=True, help="Mark the pages idle.")
@click.option("-l", "--list", "listing", flag_value="ranges", help="List pages in ranges.")
@click.option("-L", "--list-each", "listing", flag_value="each", help="List pages one by one.")
@click.option("-C", "--list-cgroup", is_flag=True, help="With a list: the memory cgroup's inode.")
@click.option("-M", "--list-mapcnt", is_flag=True, help="With a list: the map count.")
@click.option("-N", "--no-summary", is_flag=True, help="No summary after a list.")
@click.option("-X", "--hwpoison", is_flag=True, help="Poison the pages (needs --yes).")
@click.option("-x", "--unpoison", is_flag=True, help="Unpoison the pages (needs --yes).")
@click.option("-F", "--kpageflags", "saved", metavar="FILE", help="Read flag words from FILE instead.")
@click.option(
    "--threads", type=click.IntRange(1), help="Threads that count frames (default: as many as help)."
)
@click.option("--no-progress", is_flag=True, help="No bar, however long it takes.")
@click.option("--yes", is_flag=True, help="Yes, poison memory.")
@backend_options
@format_option("page-types")
def command(**options: Any) -> None:
    """Count the machine's page frames by their flags, or list them; of all memory, a process, a file, a cgroup.

    Takes page-types' options; --format page-types also prints as it does. docs/page-types.md has the table.
    """
    places = [name for name in ("pid", "path", "saved") if options[name] is not None]
    if len(places) > 1:
        raise ArgumentError("--pid, --file and --kpageflags are different places to look at: give one")
    if options["describe"] is not None or options["saved"] is not None:
        from pmcore.cli import types_work

        if options["describe"] is not None:
            types_work.describe(options["describe"])
        else:
            types_work.saved(options)
        return
    all_frames = not places and not options["addrs"]
    with open_backend(options["backend"], options["backend_settings"], all_frames=all_frames) as kernel:
        from pmcore.cli import types_work

        types_work.live(kernel, options)
