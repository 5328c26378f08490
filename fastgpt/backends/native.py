"""The compiled kernels: loads the extension, or finds out why there is none, and fills the
table.
"""

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from fastgpt.backends import coverage
from fastgpt.dispatch import NOT_IMPLEMENTED, Cell, register
from fastgpt.ops.attention import AttentionCall
from fastgpt.ops.cross_entropy import CrossEntropyCall

MAX_HEAD_DIM = 512  # a tile of it and its gradients still fits the caches


def build_record() -> dict[str, Any]:
    """What the installation wrote about its build; empty if it wrote nothing."""
    path = Path(__file__).parent.parent / "_build.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or the reason why it is not there."""
    built = build_record().get("C", {})
    if built.get("reason"):
        return None, built["reason"]
    try:
        extension = importlib.import_module("fastgpt._C")
    except ModuleNotFoundError:
        return None, "the extension has not been built: run `pip install -e .` in the source tree"
    except ImportError as error:
        return None, (
            f"the extension does not load ({error}): it may have been built for another torch; "
            "run `pip install -e .` again"
        )
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
register(Cell("cross_entropy", "native", "cuda", NOT_IMPLEMENTED))
register(Cell("linear_cross_entropy", "native", "cpu", _reason, coverage.linear_cross_entropy))
register(Cell("linear_cross_entropy", "native", "cuda", NOT_IMPLEMENTED))
register(Cell("scaled_dot_product_attention", "native", "cpu", _reason, _covers_attention))
register(Cell("scaled_dot_product_attention", "native", "cuda", NOT_IMPLEMENTED))
