"""The tiles of the attention kernels on each chip, and what a tile needs of it.

Imports no Triton: the rules of coverage ask it for the largest head_dim.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from fastgpt.backends.triton.chips import Chip

KERNELS = ("forward", "query gradient", "key gradient", "mask gradient")


class Config(NamedTuple):
    """How one kernel is cut up: queries and keys of a tile, warps of a program, and how many tiles
    are under way between memory and multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# What a call asks for beside a mask: nothing, but for a last key that each query sees; that each
# query sees a span of keys; or work for each score, of softcap, ALiBi or dropout, and spans.
PLAIN, SPANS, SCORES = range(3)


class Problem(NamedTuple):
    """What the choice of a tile depends on."""

    kernel: str  # one of KERNELS
    itemsize: int  # bytes of an element of query, key and value
    width: int  # `padded` of the longer of head_dim and value_dim
    masked: bool  # by a tensor
    options: int  # PLAIN, SPANS or SCORES


# Small enough for the tests to have several, large enough for them to end.
INTERPRETED = {
    "forward": Config(64, 64, 4, 1),
    "query gradient": Config(32, 64, 4, 1),
    "key gradient": Config(32, 64, 4, 1),
    "mask gradient": Config(32, 64, 4, 1),
}
INTERPRETED_HEAD_DIM = 512

SMALLEST = 16  # of a matrix instruction's sizes, and of the widths of tiles


def padded(columns: int) -> int:
    """The width of a tile of so many columns: a power of two."""
    return max(SMALLEST, 1 << (columns - 1).bit_length())


_Tile = tuple[int, int, int, int]

# Chosen by compiling: on each chip the largest that spills no register, in any variant of the
# kernel. First of 16 bits, by width, of PLAIN calls: without a mask tensor, and with one.
_OF_16_BITS: dict[tuple[str, str], dict[int, tuple[_Tile, _Tile]]] = {
    ("sm_80", "forward"): {
        64: ((128, 64, 8, 3), (128, 64, 8, 3)),
        128: ((128, 64, 8, 3), (64, 64, 8, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2)),
    },
    ("sm_80", "query gradient"): {
        64: ((128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((64, 64, 8, 2), (64, 64, 8, 2)),
        256: ((32, 32, 8, 2), (64, 32, 8, 2)),
    },
    ("sm_80", "key gradient"): {
        64: ((64, 128, 8, 2), (64, 128, 8, 2)),
        128: ((32, 64, 4, 2), (32, 64, 4, 2)),
        256: ((32, 64, 8, 1), (32, 32, 8, 1)),
    },
    ("sm_90", "forward"): {
        64: ((128, 128, 8, 2), (128, 64, 8, 3)),
        128: ((128, 128, 8, 2), (128, 64, 8, 3)),
        256: ((64, 64, 8, 2), (64, 64, 8, 2)),
    },
    ("sm_90", "query gradient"): {
        64: ((128, 128, 8, 2), (128, 64, 8, 3)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2)),
        256: ((64, 64, 8, 2), (64, 64, 8, 2)),
    },
    ("sm_90", "key gradient"): {
        64: ((64, 128, 8, 2), (64, 128, 8, 2)),
        128: ((32, 128, 8, 2), (32, 128, 8, 2)),
        256: ((32, 32, 8, 2), (32, 32, 8, 2)),
    },
    ("sm_100", "forward"): {
        64: ((128, 128, 8, 2), (128, 64, 8, 3)),
        128: ((128, 128, 8, 2), (128, 64, 8, 3)),
        256: ((64, 64, 8, 2), (64, 64, 8, 2)),
    },
    ("sm_100", "query gradient"): {
        64: ((128, 128, 8, 2), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2)),
    },
    ("sm_100", "key gradient"): {
        64: ((64, 128, 8, 2), (64, 64, 8, 2)),
        128: ((64, 128, 8, 2), (32, 128, 8, 2)),
        256: ((32, 64, 8, 2), (32, 64, 8, 2)),
    },
    ("gfx942", "forward"): {
        64: ((128, 32, 4, 1), (128, 32, 4, 1)),
        128: ((64, 32, 4, 1), (64, 32, 4, 1)),
        256: ((64, 32, 8, 1), (32, 32, 8, 1)),
    },
    ("gfx942", "query gradient"): {
        64: ((64, 32, 4, 1), (128, 64, 8, 1)),
        128: ((64, 32, 4, 1), (64, 32, 8, 1)),
        256: ((16, 32, 4, 1), (32, 32, 4, 1)),
    },
    ("gfx942", "key gradient"): {
        64: ((32, 64, 4, 1), (32, 32, 4, 1)),
        128: ((32, 32, 4, 1), (16, 32, 4, 1)),
        256: ((16, 32, 8, 1), (16, 32, 8, 1)),
    },
}

# Of SCORES, without and with a mask tensor. It has the tiles of SPANS with a mask, too.
_OF_SCORES: dict[tuple[str, str], dict[int, tuple[_Tile, _Tile]]] = {
    ("sm_80", "forward"): {
        64: ((128, 64, 8, 3), (128, 64, 8, 3)),
        128: ((128, 32, 8, 3), (64, 64, 8, 1)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2)),
    },
    ("sm_80", "query gradient"): {
        64: ((128, 32, 8, 2), (128, 32, 8, 2)),
        128: ((64, 32, 8, 2), (64, 32, 8, 2)),
        256: ((32, 16, 8, 2), (32, 16, 8, 2)),
    },
    ("sm_80", "key gradient"): {
        64: ((32, 128, 8, 2), (32, 128, 8, 2)),
        128: ((16, 64, 4, 2), (16, 64, 8, 2)),
        256: ((16, 64, 8, 1), (16, 32, 8, 1)),
    },
    ("sm_90", "forward"): {
        64: ((128, 128, 8, 2), (128, 64, 8, 3)),
        128: ((128, 64, 8, 2), (128, 64, 8, 3)),
        256: ((64, 64, 8, 2), (64, 64, 8, 2)),
    },
    ("sm_90", "query gradient"): {
        64: ((128, 64, 8, 2), (128, 64, 8, 3)),
        128: ((128, 32, 8, 2), (128, 32, 8, 2)),
        256: ((64, 16, 8, 2), (64, 32, 8, 2)),
    },
    ("sm_90", "key gradient"): {
        64: ((32, 128, 8, 2), (32, 128, 8, 2)),
        128: ((16, 64, 8, 2), (16, 128, 8, 2)),
        256: ((32, 32, 8, 2), (32, 32, 8, 2)),
    },
    ("sm_100", "forward"): {
        64: ((128, 128, 8, 2), (128, 64, 8, 3)),
        128: ((128, 64, 8, 2), (128, 64, 8, 3)),
        256: ((64, 32, 8, 2), (64, 64, 8, 2)),
    },
    ("sm_100", "query gradient"): {
        64: ((128, 64, 8, 2), (64, 32, 4, 3)),
        128: ((128, 32, 8, 2), (128, 32, 8, 2)),
        256: ((64, 32, 8, 2), (64, 16, 8, 2)),
    },
    ("sm_100", "key gradient"): {
        64: ((32, 128, 8, 2), (32, 64, 8, 2)),
        128: ((32, 128, 8, 2), (16, 128, 8, 2)),
        256: ((16, 64, 8, 1), (16, 32, 8, 2)),
    },
    ("gfx942", "forward"): {
        64: ((128, 32, 4, 1), (128, 32, 4, 1)),
        128: ((64, 16, 4, 1), (64, 32, 4, 1)),
        256: ((64, 16, 8, 1), (32, 16, 8, 1)),
    },
    ("gfx942", "query gradient"): {
        64: ((64, 16, 4, 1), (128, 16, 8, 1)),
        128: ((64, 16, 4, 1), (64, 16, 8, 1)),
        256: ((16, 16, 4, 1), (32, 16, 4, 1)),
    },
    ("gfx942", "key gradient"): {
        64: ((16, 64, 4, 1), (16, 32, 4, 1)),
        128: ((16, 32, 4, 1), (16, 32, 4, 1)),
        256: ((16, 16, 8, 1), (16, 16, 4, 1)),
    },
}

# Of SPANS without a mask tensor, where those of PLAIN calls would spill.
_OF_SPANS: dict[tuple[str, str], dict[int, _Tile]] = {
    ("sm_80", "query gradient"): {64: (128, 32, 8, 2)},
    ("sm_90", "query gradient"): {256: (64, 32, 8, 2)},
    ("sm_90", "key gradient"): {128: (16, 128, 8, 2), 256: (32, 16, 8, 2)},
}

# The mask's gradient, of PLAIN calls and of the others.
_OF_MASKS: dict[str, dict[int, tuple[_Tile, _Tile]]] = {
    "sm_80": {
        64: ((128, 32, 8, 2), (128, 32, 8, 2)),
        128: ((64, 32, 8, 2), (64, 32, 8, 2)),
        256: ((64, 32, 8, 2), (64, 16, 8, 2)),
    },
    "sm_90": {
        64: ((128, 64, 8, 3), (128, 32, 8, 3)),
        128: ((128, 32, 8, 2), (128, 32, 8, 2)),
        256: ((64, 64, 8, 1), (64, 32, 8, 1)),
    },
    "sm_100": {
        64: ((64, 64, 8, 3), (64, 64, 8, 3)),
        128: ((128, 32, 8, 2), (128, 32, 8, 1)),
        256: ((64, 16, 8, 2), (64, 16, 8, 2)),
    },
    "gfx942": {
        64: ((128, 64, 8, 1), (64, 64, 8, 1)),
        128: ((64, 32, 8, 1), (64, 16, 8, 1)),
        256: ((32, 32, 4, 1), (32, 32, 4, 1)),
    },
}

# Wider types are multiplied by ordinary multiply-adds (float64 by DMMA or MFMA where there is one),
# for which Triton keeps whole rows in registers: hence the small tiles and narrow heads.
_WIDER: dict[tuple[str, int], dict[int, _Tile]] = {
    ("forward", 4): {64: (64, 32, 8, 1), 128: (16, 16, 8, 1)},
    ("query gradient", 4): {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
    ("key gradient", 4): {64: (16, 32, 8, 1), 128: (32, 16, 8, 1)},
    ("forward", 8): {32: (32, 16, 8, 1), 64: (16, 32, 8, 1)},
    ("query gradient", 8): {32: (32, 16, 8, 1), 64: (16, 16, 8, 1)},
    ("key gradient", 8): {32: (32, 16, 8, 1), 64: (32, 16, 8, 1)},
}
_WIDER_ON: dict[tuple[str, str, int], dict[int, _Tile]] = {
    ("sm_80", "key gradient", 4): {64: (64, 16, 8, 1), 128: (32, 16, 8, 1)},
    ("sm_90", "key gradient", 4): {64: (64, 16, 8, 1), 128: (32, 16, 8, 1)},
    ("gfx942", "key gradient", 4): {64: (16, 32, 8, 1), 128: (16, 32, 8, 1)},
    ("gfx942", "query gradient", 8): {32: (32, 16, 8, 1), 64: (32, 16, 8, 1)},
    ("gfx942", "key gradient", 8): {32: (32, 16, 8, 1), 64: (16, 16, 4, 1)},
}
# With options, and of the mask's gradient, the smallest tile. In float64 a softcap's logarithm
# spills all the same: of its SCORES nothing is compiled ahead of time.
_WIDER_OPTIONED = (16, 16, 8, 1)
_WIDER_OPTIONED_ON: dict[tuple[str, str, int], dict[int, _Tile]] = {
    ("sm_80", "mask gradient", 4): {128: (16, 32, 8, 1)},
    ("sm_100", "mask gradient", 4): {128: (16, 32, 8, 1)},
    ("gfx942", "key gradient", 4): {128: (16, 16, 4, 1)},
    ("gfx942", "key gradient", 8): {32: (16, 16, 4, 1), 64: (16, 16, 4, 1)},
    ("gfx942", "query gradient", 8): {64: (16, 16, 4, 1)},
}
_WIDEST_FLOAT64 = {"sm_80": 32, "sm_90": 32, "sm_100": 64, "gfx942": 64}


def _widths(chip: str, kernel: str, itemsize: int) -> list[int]:
    """Those of the stored tiles."""
    if itemsize == 2:
        return list(_OF_MASKS[chip] if kernel == "mask gradient" else _OF_16_BITS[chip, kernel])
    widest = _WIDEST_FLOAT64[chip] if itemsize == 8 else 128
    return [width for width in _WIDER["forward", itemsize] if width <= widest]


def _entry(problem: Problem, chip: Chip) -> Config | None:
    """The stored tile of the narrowest width that holds the problem's."""
    kernel, itemsize, _, masked, options = problem
    widths = _widths(chip.name, kernel, itemsize)
    width = min((w for w in widths if w >= problem.width), default=None)
    if width is None:
        return None
    if itemsize > 2:
        on = chip.name, kernel, itemsize
        if options != PLAIN or kernel == "mask gradient":
            return Config(*_WIDER_OPTIONED_ON.get(on, {}).get(width, _WIDER_OPTIONED))
        return Config(*(_WIDER_ON.get(on) or _WIDER[kernel, itemsize])[width])
    if kernel == "mask gradient":
        return Config(*_OF_MASKS[chip.name][width][options != PLAIN])
    where = chip.name, kernel
    plain = _OF_16_BITS[where][width][masked]
    if options == SCORES or (options == SPANS and masked):
        return Config(*_OF_SCORES[where][width][masked])
    if options == SPANS:
        return Config(*_OF_SPANS.get(where, {}).get(width, plain))
    return Config(*plain)


def max_head_dim(chip: Chip, itemsize: int) -> int:
    """The longest head_dim, and value_dim, for which all kernels have tiles."""
    return min(max(_widths(chip.name, kernel, itemsize)) for kernel in KERNELS)


def stored(chip: Chip) -> Iterator[tuple[Problem, Config]]:
    """The table."""
    for itemsize, kernel in itertools.product((2, 4, 8), KERNELS):
        for width in _widths(chip.name, kernel, itemsize):
            for masked, options in itertools.product((False, True), (PLAIN, SPANS, SCORES)):
                problem = Problem(kernel, itemsize, width, masked, options)
                if (masked and options == SPANS) or (itemsize == 8 and options == SCORES):
                    continue
                if masked or kernel != "mask gradient":
                    yield problem, best(problem, chip)


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
        "mask gradient": (2 * m, 2 * n),
    }[problem.kernel]
    return (kept + stages * walked) * row + problem.masked * stages * m * n * 4


def registers(problem: Problem, config: Config, chip: Chip) -> int:
    """32-bit ones of a thread, about: the sums, the tile of scores, in the backward that of dp, and
    both as operands of the next product; of SCORES as many more as for dp; and addresses and the
    statistics of rows.
    """
    m, n, warps, _ = config
    words = max(problem.itemsize // 4, 1)
    sums, pairs = {
        "forward": (m * problem.width, 1),
        "query gradient": (m * problem.width, 2),
        "key gradient": (2 * n * problem.width, 2),
        "mask gradient": (m * n, 2),
    }[problem.kernel]
    operands = pairs * m * n * problem.itemsize // 4
    pairs += problem.options == SCORES
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
