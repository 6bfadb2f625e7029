"""Random numbers that are the same on every machine and with every version of numpy.

``numpy.random`` promises neither, and importing it costs 6.5 MB. The generator is SplitMix64 (Steele, Lea, Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 16): a counter and a bijective mix of it.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEP = 0x9E3779B97F4A7C15
_MASK = 0xFFFF_FFFF_FFFF_FFFF


class Stream:
    """One stream of random numbers; ``seed`` may be any integer, ``purpose`` makes streams of one seed independent."""

    def __init__(self, seed: int, purpose: str = "") -> None:
        self._counter = int.from_bytes(blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")

    def bits(self, count: int) -> NDArray[np.uint64]:
        """uint64 ``[count]``, all different, uniform over all values."""
        z = np.arange(1, count + 1, dtype=np.uint64)
        z *= np.uint64(_STEP)
        z += np.uint64(self._counter)
        self._counter = (self._counter + count * _STEP) & _MASK
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
        return mixed

    def permutation(self, count: int) -> NDArray[np.intp]:
        """The numbers 0 to ``count - 1`` in random order."""
        return np.argsort(self.bits(count))  # no two are equal, so every sort gives the same

    def uniform(self, count: int) -> NDArray[np.float64]:
        """float64 ``[count]`` in [0, 1)."""
        numbers: NDArray[np.float64] = (self.bits(count) >> np.uint64(11)) * 2.0**-53
        return numbers

    def integer(self, bound: int) -> int:
        """One integer in ``[0, bound)``; ``bound`` up to 2 ** 32."""
        return (int(self.bits(1)[0]) >> 32) * bound >> 32
