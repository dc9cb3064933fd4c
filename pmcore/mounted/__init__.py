"""A machine's /proc and /sys as a mounted file system (Linux, FUSE), and commands run inside it.

Beside `pmcore.backends.procfs` the only room that touches the operating system. Needs the extra `fuse`.
"""

from __future__ import annotations

from pmcore.mounted.executing import execute
from pmcore.mounted.fusefs import Tree
from pmcore.mounted.mounting import mount
from pmcore.mounted.stepping import Stepper

__all__ = ["Stepper", "Tree", "execute", "mount"]
