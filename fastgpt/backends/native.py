"""The compiled CPU kernels: loads the extension, or finds out why there is none, and fills the
table. Those for GPUs are in cuda.py.
"""

import os
from types import ModuleType

from fastgpt.backends import coverage, extensions
from fastgpt.dispatch import Cell, register
from fastgpt.ops.attention import AttentionCall
from fastgpt.ops.cross_entropy import CrossEntropyCall

MAX_HEAD_DIM = 512  # a tile of it and its gradients still fits the caches


def _load() -> tuple[ModuleType | None, str]:
    """The extension, set to the instruction set asked for; or the reason why it is not there."""
    extension, reason = extensions.load("_C", "C")
    if extension is None:
        return None, reason
    isa = os.environ.get("FASTGPT_CPU_ISA")
    if isa:
        if isa not in extension.isas():
            choices = ", ".join(map(repr, extension.isas()))
            raise ValueError(
                f"FASTGPT_CPU_ISA: expected one of {choices} on this processor, got {isa!r}"
            )
        extension.set_isa(isa)
    return extension, ""


extension, _reason = _load()


def isas() -> tuple[str, ...]:
    """The instruction sets this processor can run, slowest first; empty without the extension."""
    return extension.isas() if extension else ()


def isa() -> str | None:
    """The instruction set that runs; None without the extension."""
    return extension.isa() if extension else None


def _covers_cross_entropy(call: CrossEntropyCall) -> str:
    return coverage.cross_entropy(call, rows=False)


def _covers_attention(call: AttentionCall) -> str:
    return coverage.attention(call, MAX_HEAD_DIM)


register(Cell("cross_entropy", "native", "cpu", _reason, _covers_cross_entropy))
register(Cell("linear_cross_entropy", "native", "cpu", _reason, coverage.linear_cross_entropy))
register(Cell("scaled_dot_product_attention", "native", "cpu", _reason, _covers_attention))
