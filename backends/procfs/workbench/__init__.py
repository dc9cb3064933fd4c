"""A workbench of real processes: each task is a child that runs steps on real memory.

`open_workbench` gives a `pmcore.protocols.Workbench` on the running kernel.
"""

from pmcore.backends.procfs.workbench.bench import ProcfsWorkbench, open_workbench
from pmcore.backends.procfs.workbench.steady import drain_lru, steady

__all__ = ["ProcfsWorkbench", "drain_lru", "open_workbench", "steady"]
