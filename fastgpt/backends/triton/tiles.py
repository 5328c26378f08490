"""The tiles of the attention kernels on each chip.

Imports no Triton: the rules of coverage ask it for the largest head_dim.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """How one kernel is cut up: queries and keys of a tile, warps of a program, and how many tiles
    are under way between memory and multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Small enough for the tests to have several, large enough for them to end.
INTERPRETED = {
    "forward": Config(64, 64, 4, 1),
    "query gradient": Config(32, 64, 4, 1),
    "key gradient": Config(32, 64, 4, 1),
}


def padded(columns: int) -> int:
    """The width of a tile of so many columns: a matrix instruction's, times a power of two."""
    return max(16, 1 << (columns - 1).bit_length())


def best(*_) -> Config:
    return Config(64, 64, 4, 2)
