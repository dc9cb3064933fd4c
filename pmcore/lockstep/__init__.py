"""Lockstep: the same page-table program on two workbenches, everything visible compared after every step."""

from pmcore.lockstep.compare import Comparer, Difference
from pmcore.lockstep.look import Look, TaskLook, take
from pmcore.lockstep.run import Result, lockstep

__all__ = ["Comparer", "Difference", "Look", "Result", "TaskLook", "lockstep", "take"]
