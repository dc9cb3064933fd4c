"""Random page-table programs: one generator, fed by a seed or by Hypothesis."""

from pmcore.lockstep.generator.draw import Draw, Seeded
from pmcore.lockstep.generator.mix import FOCUSES, random_program, random_thp
from pmcore.lockstep.generator.state import KEPT

__all__ = ["FOCUSES", "KEPT", "Draw", "Seeded", "random_program", "random_thp"]
