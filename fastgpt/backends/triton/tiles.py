"""The tiles of the attention kernels on each chip, and what a tile needs of it.

Imports no Triton: the rules of coverage ask it for the largest head_dim.
"""

from collections.abc import Iterator
from typing import NamedTuple

from fastgpt.backends.triton.chips import Chip

KERNELS = ("forward", "query gradient", "key gradient")


class Config(NamedTuple):
    """How one kernel is cut up: queries and keys of a tile, warps of a program, and how many tiles
    are under way between memory and multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Problem(NamedTuple):
    """What the choice of a tile depends on."""

    kernel: str  # one of KERNELS
    itemsize: int  # bytes of an element of query, key and value
    width: int  # `padded` of the longer of head_dim and value_dim
    masked: bool  # by a tensor


# Small enough for the tests to have several, large enough for them to end.
INTERPRETED = {
    "forward": Config(64, 64, 4, 1),
    "query gradient": Config(32, 64, 4, 1),
    "key gradient": Config(32, 64, 4, 1),
}
INTERPRETED_HEAD_DIM = 512

SMALLEST = 16  # of a matrix instruction's sizes, and of the widths of tiles


def padded(columns: int) -> int:
    """The width of a tile of so many columns: a power of two."""
    return max(SMALLEST, 1 << (columns - 1).bit_length())


# Chosen by compiling: on each chip the largest that spills no register, in any variant of the
# kernel. Without a mask tensor, and with one.
_STORED: dict[tuple[str, str, int], dict[int, tuple[Config, Config]]] = {
    (chip, kernel, itemsize): {
        width: (Config(*plain), Config(*masked)) for width, (plain, masked) in widths.items()
    }
    for (chip, kernel, itemsize), widths in {
        ("sm_80", "forward", 2): {
            64: ((128, 64, 8, 3), (128, 64, 8, 3)),
            128: ((128, 64, 8, 3), (64, 64, 8, 2)),
            256: ((64, 64, 8, 2), (64, 32, 8, 2)),
        },
        ("sm_80", "query gradient", 2): {
            64: ((128, 64, 8, 2), (128, 64, 8, 2)),
            128: ((64, 64, 8, 2), (64, 64, 8, 2)),
            256: ((32, 32, 8, 2), (64, 32, 8, 2)),
        },
        ("sm_80", "key gradient", 2): {
            64: ((64, 128, 8, 2), (64, 128, 8, 2)),
            128: ((32, 64, 4, 2), (32, 64, 4, 2)),
            256: ((32, 64, 8, 1), (32, 64, 8, 1)),
        },
        ("sm_90", "forward", 2): {
            64: ((128, 128, 8, 2), (128, 64, 8, 3)),
            128: ((128, 128, 8, 2), (128, 64, 8, 3)),
            256: ((64, 64, 8, 2), (64, 64, 8, 2)),
        },
        ("sm_90", "query gradient", 2): {
            64: ((128, 128, 8, 2), (128, 64, 8, 3)),
            128: ((128, 64, 8, 2), (128, 64, 8, 2)),
            256: ((64, 64, 8, 2), (64, 64, 8, 2)),
        },
        ("sm_90", "key gradient", 2): {
            64: ((64, 128, 8, 2), (64, 128, 8, 2)),
            128: ((32, 128, 8, 2), (32, 128, 8, 2)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2)),
        },
        ("sm_100", "forward", 2): {
            64: ((128, 128, 8, 2), (128, 64, 8, 3)),
            128: ((128, 128, 8, 2), (128, 64, 8, 3)),
            256: ((64, 64, 8, 2), (64, 64, 8, 2)),
        },
        ("sm_100", "query gradient", 2): {
            64: ((128, 128, 8, 2), (64, 64, 4, 3)),
            128: ((128, 64, 8, 2), (128, 64, 8, 2)),
            256: ((64, 64, 8, 2), (64, 32, 8, 2)),
        },
        ("sm_100", "key gradient", 2): {
            64: ((64, 128, 8, 2), (64, 64, 8, 2)),
            128: ((64, 128, 8, 2), (32, 128, 8, 2)),
            256: ((32, 64, 8, 2), (32, 64, 8, 2)),
        },
        ("gfx942", "forward", 2): {
            64: ((128, 32, 4, 1), (128, 32, 4, 1)),
            128: ((64, 32, 4, 1), (64, 32, 4, 1)),
            256: ((64, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("gfx942", "query gradient", 2): {
            64: ((64, 32, 4, 1), (128, 64, 8, 1)),
            128: ((64, 32, 4, 1), (64, 32, 8, 1)),
            256: ((16, 32, 4, 1), (32, 32, 4, 1)),
        },
        ("gfx942", "key gradient", 2): {
            64: ((32, 64, 4, 1), (32, 32, 4, 1)),
            128: ((32, 32, 4, 1), (16, 32, 4, 1)),
            256: ((16, 32, 8, 1), (16, 32, 8, 1)),
        },
        ("sm_80", "forward", 4): {
            64: ((64, 32, 8, 1), (64, 32, 8, 1)),
            128: ((16, 16, 8, 1), (16, 16, 8, 1)),
        },
        ("sm_80", "query gradient", 4): {
            64: ((32, 32, 8, 1), (32, 32, 8, 1)),
            128: ((16, 16, 8, 1), (16, 16, 8, 1)),
        },
        ("sm_80", "key gradient", 4): {
            64: ((64, 16, 8, 1), (64, 16, 8, 1)),
            128: ((32, 16, 8, 1), (32, 16, 8, 1)),
        },
        ("sm_80", "forward", 8): {
            32: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("sm_80", "query gradient", 8): {
            32: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("sm_80", "key gradient", 8): {
            32: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("sm_90", "forward", 4): {
            64: ((64, 32, 8, 1), (64, 32, 8, 1)),
            128: ((16, 16, 8, 1), (16, 16, 8, 1)),
        },
        ("sm_90", "query gradient", 4): {
            64: ((32, 32, 8, 1), (32, 32, 8, 1)),
            128: ((16, 16, 8, 1), (16, 16, 8, 1)),
        },
        ("sm_90", "key gradient", 4): {
            64: ((64, 32, 8, 1), (64, 32, 8, 1)),
            128: ((32, 16, 8, 1), (32, 16, 8, 1)),
        },
        ("sm_90", "forward", 8): {
            32: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("sm_90", "query gradient", 8): {
            32: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("sm_90", "key gradient", 8): {
            32: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("sm_100", "forward", 4): {
            64: ((64, 32, 8, 1), (64, 32, 8, 1)),
            128: ((16, 16, 8, 1), (16, 16, 8, 1)),
        },
        ("sm_100", "query gradient", 4): {
            64: ((32, 32, 8, 1), (32, 32, 8, 1)),
            128: ((16, 16, 8, 1), (16, 16, 8, 1)),
        },
        ("sm_100", "key gradient", 4): {
            64: ((64, 32, 8, 1), (64, 32, 8, 1)),
            128: ((32, 16, 8, 1), (32, 16, 8, 1)),
        },
        ("sm_100", "forward", 8): {
            32: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("sm_100", "query gradient", 8): {
            32: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("sm_100", "key gradient", 8): {
            32: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("gfx942", "forward", 4): {
            64: ((32, 32, 4, 1), (32, 32, 4, 1)),
            128: ((32, 32, 4, 1), (32, 32, 4, 1)),
        },
        ("gfx942", "query gradient", 4): {
            64: ((32, 32, 4, 1), (32, 32, 4, 1)),
            128: ((32, 32, 4, 1), (32, 32, 4, 1)),
        },
        ("gfx942", "key gradient", 4): {
            64: ((32, 32, 4, 1), (32, 32, 4, 1)),
            128: ((16, 32, 4, 1), (16, 32, 4, 1)),
        },
        ("gfx942", "forward", 8): {
            64: ((32, 32, 4, 1), (32, 32, 4, 1)),
        },
        ("gfx942", "query gradient", 8): {
            64: ((32, 32, 4, 1), (32, 32, 4, 1)),
        },
        ("gfx942", "key gradient", 8): {
            64: ((32, 32, 4, 1), (32, 32, 4, 1)),
        },
    }.items()
}


def _entry(problem: Problem, chip: Chip) -> Config | None:
    """The stored tile of the narrowest width that holds the problem's."""
    widths = _STORED.get((chip.name, problem.kernel, problem.itemsize), {})
    width = min((w for w in widths if w >= problem.width), default=None)
    return None if width is None else widths[width][problem.masked]


def max_head_dim(chip: Chip, itemsize: int) -> int:
    """The longest head_dim, and value_dim, for which all kernels have tiles; 0 if there is none."""
    return min(max(_STORED.get((chip.name, k, itemsize), {0: None})) for k in KERNELS)


def stored(chip: Chip) -> Iterator[tuple[Problem, Config]]:
    """The table."""
    for (name, kernel, itemsize), widths in _STORED.items():
        if name == chip.name:
            for width, configs in widths.items():
                for masked in (False, True):
                    yield Problem(kernel, itemsize, width, masked), configs[masked]


def shared_memory(problem: Problem, config: Config) -> int:
    """Bytes: the tile that a program keeps, and the stages of those it walks through, with the
    mask's, of at most 32 bits.
    """
    m, n, _, stages = config
    row = problem.width * problem.itemsize
    kept, walked = {
        "forward": (m, 2 * n),
        "query gradient": (2 * m, 2 * n),
        "key gradient": (2 * n, 2 * m),
    }[problem.kernel]
    return (kept + stages * walked) * row + problem.masked * stages * m * n * 4


def registers(problem: Problem, config: Config, chip: Chip) -> int:
    """32-bit ones of a thread, about: the sums, the tile of scores, in the backward that of dp, and
    both as operands of the next product; and addresses and the statistics of rows.
    """
    m, n, warps, _ = config
    words = max(problem.itemsize // 4, 1)
    sums, pairs = {
        "forward": (m * problem.width, 1),
        "query gradient": (m * problem.width, 2),
        "key gradient": (2 * n * problem.width, 2),
    }[problem.kernel]
    operands = pairs * m * n * problem.itemsize // 4
    return 40 + (words * (sums + pairs * m * n) + operands) // (warps * chip.warp_size)


def fits(problem: Problem, config: Config, chip: Chip) -> bool:
    """Whether a chip can run a tile without spilling, by the two estimates above."""
    return (
        shared_memory(problem, config) <= chip.shared_memory
        and registers(problem, config, chip) <= chip.registers_per_thread
        and config.num_warps * chip.warp_size <= 1024
    )


def best(problem: Problem, chip: Chip) -> Config:
    """The stored tile; on a relative with less shared memory, with fewer stages or rows."""
    config = _entry(problem, chip)
    if config is None:
        raise RuntimeError(
            f"no tiles are stored for a head_dim of {problem.width} in {8 * problem.itemsize} bits"
            f" on {chip.name}, only up to {max_head_dim(chip, problem.itemsize)}"
        )
    while shared_memory(problem, config) > chip.shared_memory:
        smaller = _smaller(config)
        if smaller == config:
            break
        config = smaller
    return config


def _smaller(config: Config) -> Config:
    if config.num_stages > 1:
        return config._replace(num_stages=config.num_stages - 1)
    side = "block_m" if config.block_m > config.block_n else "block_n"
    return config._replace(**{side: max(getattr(config, side) // 2, SMALLEST)})


def candidates(problem: Problem, chip: Chip) -> list[Config]:
    """`best` and its neighbours that should fit, for the autotuner."""
    first = best(problem, chip)
    found = [first]
    for m in (first.block_m // 2, first.block_m, first.block_m * 2):
        for n in (first.block_n // 2, first.block_n, first.block_n * 2):
            for warps in (4, 8):
                for stages in (1, 2, 3, 4):
                    config = Config(m, n, warps, stages)
                    if min(m, n) >= SMALLEST and config != first and fits(problem, config, chip):
                        found.append(config)
    return found
