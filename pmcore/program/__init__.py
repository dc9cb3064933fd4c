"""Page-table programs: what tasks do to memory, written once, run on any workbench.

A program is a value: a tuple of steps that name areas, descriptors and tasks by words. It can be saved as JSON, and run
by `run` on real or simulated memory with the same virtual addresses.
"""

from pmcore.program.program import Program, load_program, program_from_json, program_to_json, save_program
from pmcore.program.run import Outcome, Run, run
from pmcore.program.steps import STEPS, Step

__all__ = [
    "STEPS",
    "Outcome",
    "Program",
    "Run",
    "Step",
    "load_program",
    "program_from_json",
    "program_to_json",
    "run",
    "save_program",
]
