"""`pmcore scan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from pmcore.cli.options import Address, backend_options, format_option, open_backend, process_of
from pmcore.cli.output import Column, Report, emit
from pmcore.errors import ArgumentError
from pmcore.profile import KernelProfile
from pmcore.scan import ScanRequest, ScanResult, known_categories, scan_chunks
from pmcore.uapi import PageCategory, ScanFlag


class Categories(click.ParamType[int]):
    """Category names, comma-separated, with or without PAGE_IS_; or a number."""

    name = "categories"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The mask."""
        if isinstance(value, int):
            return value
        mask = 0
        for part in filter(None, value.split(",")):
            name = part.strip().upper().replace("-", "_").removeprefix("PAGE_IS_")
            if name in PageCategory.__members__:
                mask |= int(PageCategory[name])
            elif name == "ALL":
                mask |= int(sum(PageCategory))
            else:
                try:
                    mask |= int(part, 0)
                except ValueError:
                    names = ", ".join(name.lower() for name in PageCategory.__members__)
                    self.fail(f"{part!r} is no category; there are {names}", param, ctx)
        return mask


@click.command(name="scan")
@click.argument("pid")
@click.option("--start", type=Address(), default=0, show_default=True, help="First address.")
@click.option("--end", type=Address(), help="Address after the last (default: all of the address space).")
@click.option("--all-of", "mask", type=Categories(), default=0, help="Pages with all of these categories.")
@click.option("--any-of", "anyof", type=Categories(), default=0, help="Pages with at least one of these.")
@click.option("--inverted", type=Categories(), default=0, help="Categories that count when they are absent.")
@click.option("--report", type=Categories(), help="Categories to report (default: all the kernel knows).")
@click.option("--max-pages", type=click.IntRange(0), default=0, help="Stop after so many pages.")
@click.option(
    "--write-protect",
    is_flag=True,
    help="Write-protect what matches: this changes the process's page tables.",
)
@click.option(
    "--check-wp-async", is_flag=True, help="Fail where memory is not under asynchronous write protection."
)
@backend_options
@format_option()
def command(
    pid: str,
    start: int,
    end: int | None,
    mask: int,
    anyof: int,
    inverted: int,
    report: int | None,
    max_pages: int,
    write_protect: bool,
    check_wp_async: bool,
    backend: str,
    backend_settings: tuple[str, ...],
    form: str,
) -> int:
    """Regions of process PID ("self") whose pages match, by PAGEMAP_SCAN.

    Categories: wpallowed written file present swapped pfnzero huge soft_dirty guard.
    With no filter every page of every mapping is reported. On kernels without PAGEMAP_SCAN the answer comes from
    pagemap and smaps; the categories that cannot be known that way are named, and the exit code is 1.
    """
    with open_backend(backend, backend_settings) as kernel:
        process = process_of(kernel, pid)
        profile = kernel.profile
        limit = profile.geometry.task_size
        known = int(known_categories(profile))
        request = ScanRequest(
            start=start,
            end=limit if end is None else end,
            category_mask=mask,
            category_anyof_mask=anyof,
            category_inverted=inverted,
            return_mask=known if report is None else report,
            max_pages=max_pages,
            flags=int(
                (ScanFlag.WP_MATCHING if write_protect else ScanFlag(0))
                | (ScanFlag.CHECK_WPASYNC if check_wp_async else ScanFlag(0))
            ),
        )
        _refuse_unknown(profile, mask | anyof | inverted | request.return_mask)
        columns = [
            Column("start", "address"),
            Column("end", "address"),
            Column("pages", "int"),
            Column("bytes", "bytes", "size"),
            Column("categories", "int"),
            Column("names"),
        ]
        shift = profile.geometry.page_shift

        asked, unknown = mask | anyof | inverted | request.return_mask, 0

        def note(result: ScanResult) -> None:
            nonlocal unknown
            unknown |= int(result.unknown) & asked

        def rows() -> Iterator[tuple[int, int, int, int, int, str]]:
            for regions in scan_chunks(process, request, on_call=note):
                for low, high, categories in regions.tolist():
                    names = _names(categories)
                    yield low, high, (high - low) >> shift, high - low, categories, names

        emit(Report(columns, rows()), form)
        if unknown:
            names = _names(unknown)
            click.echo(
                f"pmcore: not known from pagemap and smaps alone, and shown as absent: {names}", err=True
            )
        return 1 if unknown else 0


def _names(categories: int) -> str:
    names = [(c.name or "").lower() for c in PageCategory if categories & c]
    rest = categories & ~int(sum(PageCategory))
    return ",".join([*names, *(f"bit_{bit}" for bit in range(64) if rest >> bit & 1)])


def _refuse_unknown(profile: KernelProfile, asked: int) -> None:
    unknown = asked & ~int(known_categories(profile)) if profile.has("scan") else 0
    if unknown:
        raise ArgumentError(
            f"this kernel does not know the categories {_names(unknown)}", remedy="leave them out"
        )
