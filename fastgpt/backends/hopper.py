"""Which generation of attention's CUDA kernels runs on a GPU of Hopper's: its own, or Ampere's.

A stored measurement on that chip decides, for each pass at each width of heads; the newest kernels
run where there is none. No other GPU has code of Hopper's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastgpt.backends import measured
from fastgpt.backends.measured import Measurement

CHIP = "sm_90"
PASSES = ("forward", "backward")
WIDTHS = (64, 80, 96, 128, 256)  # the columns of heads that there are kernels for

Switch = Mapping[tuple[str, int], bool]  # pass, width -> whether Hopper's kernels run
ALL: Switch = {}  # what is not in it runs
NONE: Switch = {(which, width): False for which in PASSES for width in WIDTHS}


def width_of(columns: int) -> int:
    """Of the kernels for heads of so many columns."""
    return next(width for width in WIDTHS if columns <= width)


def entry(which: str, width: int) -> str:
    """The name in measured.json of a comparison of both generations."""
    return f"attention_{which}_hopper_{width}"


def _measurement(measurements: Sequence[Measurement], which: str, width: int) -> Measurement | None:
    return measured.latest(measurements, entry(which, width)).get(CHIP)


def chosen(measurements: Sequence[Measurement]) -> Switch:
    """By the stored measurements."""
    found = {key: _measurement(measurements, *key) for key in NONE}
    return {key: m.ratio > 1 for key, m in found.items() if m}


def switch(on: Switch, settings: Any = None) -> None:
    """Let these kernels run from now on, in all threads. What is said of the stored measurements
    stays. `settings`: the namespace of the operator, the extension's unless it is given.
    """
    settings = settings or torch.ops.fastgpt_settings
    for width in WIDTHS:
        settings.hopper_passes(width, *(on.get((which, width), True) for which in PASSES))


def _by(measurements: Sequence[Measurement], which: str, width: int) -> str:
    """Whose kernels take a pass, and why."""
    m = _measurement(measurements, which, width)
    if m is None:
        return "by Hopper's kernels (not compared with Ampere's)"
    if m.ratio > 1:
        return f"by Hopper's kernels ({m.ratio:.3g} times as fast as Ampere's, {m.date})"
    return f"by Ampere's kernels (Hopper's take {1 / m.ratio:.3g} times their time, {m.date})"


def note(measurements: Sequence[Measurement], built: bool) -> str:
    """For `fastgpt.info`. `built`: whether the extension has code of Hopper's."""
    if not built:
        return f"on {CHIP} by Ampere's kernels: built without code for 9.0a"
    parts = [
        f"{which} at width {width} {_by(measurements, which, width)}, else "
        for which, width in chosen(measurements)
    ]
    return f"on {CHIP} {''.join(parts)}by Hopper's kernels (not compared with Ampere's)"


def explain(
    measurements: Sequence[Measurement],
    built: bool,
    chip: str,
    head_dim: int,
    value_dim: int,
    plain: bool,
) -> str:
    """For `fastgpt.explain`; empty of an unknown chip. `plain`: without options that the kernels
    take beside the products (csrc/cuda/attention_hopper_tiles.cuh).
    """
    if not chip:
        return ""
    if chip != CHIP:
        return f"by Ampere's kernels, the only ones on {chip}"
    if not built:
        return "by Ampere's kernels: built without code for 9.0a"
    for columns in (head_dim, value_dim):
        if columns % 8:
            return f"by Ampere's kernels: TMA copies no rows of {columns} columns"
    width = width_of(max(head_dim, value_dim))
    forward, backward = (f"{which} {_by(measurements, which, width)}" for which in PASSES)
    if width == WIDTHS[-1] and not plain:
        backward = f"backward by Ampere's kernels (Hopper's take no options at width {width})"
    return f"{forward}, {backward}"
