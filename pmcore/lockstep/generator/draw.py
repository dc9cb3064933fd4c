"""Where a generator's choices come from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

__all__ = ["Draw", "Seeded"]

T = TypeVar("T")


class Draw(Protocol):
    """A source of choices."""

    def of(self, among: Sequence[T]) -> T:
        """One of these."""

    def integer(self, least: int, most: int) -> int:
        """A number from `least` to `most`, both included."""

    def flip(self) -> bool:
        """Yes or no."""


class Seeded:
    """Choices by a seed: the same ones on every platform and with every version of Python."""

    def __init__(self, seed: str) -> None:
        # Of random's methods, seeding by text and random() are promised to stay what they are.
        self._random = random.Random(seed).random

    def of(self, among: Sequence[T]) -> T:
        """One of these."""
        return among[int(self._random() * len(among))]

    def integer(self, least: int, most: int) -> int:
        """A number from `least` to `most`, both included."""
        return least + int(self._random() * (most - least + 1))

    def flip(self) -> bool:
        """Yes or no."""
        return self._random() < 0.5
