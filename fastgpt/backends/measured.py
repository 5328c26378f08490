"""On which GPUs the CUDA kernels are the default: where a stored measurement says that they are
faster than Triton's. And of attention's, which generation: see hopper.py.

The measurements are in measured.json, and none is a guess: an op that is not in it has never run on
a GPU.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Measurement(NamedTuple):
    """Two kinds of kernels on one GPU, in one run: CUDA's and Triton's, forward and backward; or of
    CUDA's own those for Hopper and for Ampere, in one pass of attention.
    """

    op: str  # or `hopper.entry`
    chip: str  # its compute capability: "sm_90"
    gpu: str  # what it calls itself: "NVIDIA H200"
    date: str  # "2026-11-24"
    commit: str
    ratio: float  # Triton's time / CUDA's, or Ampere's / Hopper's; the median over the shapes
    shapes: Sequence[Any]


def read() -> tuple[Measurement, ...]:
    """The stored measurements."""
    entries = json.loads(Path(__file__).with_name("measured.json").read_text())
    return tuple(Measurement(**entry) for entry in entries)


def latest(measurements: Sequence[Measurement], op: str) -> dict[str, Measurement]:
    """An op's last measurement on each chip."""
    found = sorted((m for m in measurements if m.op == op), key=lambda m: m.date)
    return {m.chip: m for m in found}
