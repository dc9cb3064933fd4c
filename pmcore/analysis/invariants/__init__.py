"""Whether what a machine shows agrees with itself: the rules IN-001 to IN-020, on any backend.

`check(kernel)` reads every frame and every process once, and looks again at whatever disagrees before it says so:
a machine changes while it is read.
"""

from pmcore.analysis.invariants.check import check
from pmcore.analysis.invariants.finding import Finding, Health

__all__ = ["Finding", "Health", "check"]
