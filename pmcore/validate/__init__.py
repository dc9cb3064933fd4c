"""A tool that reads page tables, held against the truth: over simulated machines each made to show one thing.

    report = validate(FunctionTool(my_reader))                     # my_reader(pid) says what is where, in this process
    report = validate(CommandTool(["./my-tool", "{pid}"]))         # a command, unchanged, run inside the machine
    report.well, report.results[0].findings[0].rule

Each *case* is a program that puts a task into a state, a kernel version, and the mistake that the state shows
(`cases`). The tool is run on it, what it says is read by an *adapter* (`ADAPTERS`; the protocol of others is in
docs/validate.md), and compared page by page with what is true (`truth`). A finding names the rule that is broken.
"""

from __future__ import annotations

from pmcore.validate.adapters import (
    ADAPTERS,
    Adapter,
    JsonAdapter,
    PageTypesAdapter,
    PageTypesSummaryAdapter,
    ThpmapsAdapter,
)
from pmcore.validate.case import Case, Scene, cases
from pmcore.validate.report import Finding, Report, Result
from pmcore.validate.run import CommandTool, FunctionTool, Tool, validate
from pmcore.validate.truth import Truth

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Case",
    "CommandTool",
    "Finding",
    "FunctionTool",
    "JsonAdapter",
    "PageTypesAdapter",
    "PageTypesSummaryAdapter",
    "Report",
    "Result",
    "Scene",
    "ThpmapsAdapter",
    "Tool",
    "Truth",
    "cases",
    "validate",
]
