"""The compiled kernels: loads the extension, or finds out why there is none, and fills the
table.
"""

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastgpt.dispatch import NOT_IMPLEMENTED, Cell, nested_forward_levels, register
from fastgpt.ops.attention import AttentionCall
from fastgpt.ops.cross_entropy import CrossEntropyCall, class_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
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
    if call.target.is_floating_point():
        return "probability targets"
    if call.weight is not None:
        return "class weights"
    if call.label_smoothing > 0:
        return "label smoothing"
    reason = _covers_tensor("logits", call.logits)
    if reason:
        return reason
    if call.logits.shape[1] == 0:
        return "no classes"
    if class_rows(call.logits) is None:
        return "strides: the classes of a row do not lie together, or the rows at no one distance"
    return _covers_transforms()


def _covers_attention(call: AttentionCall) -> str:
    if call.dropout_p > 0:
        return "dropout"
    for name, x in (("query", call.query), ("key", call.key), ("value", call.value)):
        reason = _covers_tensor(name, x)
        if reason:
            return reason
        if x.numel() == 0:
            return f"an empty {name}"
        if x.shape[-1] > MAX_HEAD_DIM:
            return f"a head_dim of {x.shape[-1]} in {name}, above {MAX_HEAD_DIM}"
    if call.enable_gqa and call.key.shape[-3] != call.value.shape[-3]:
        return "key and value heads that differ"
    mask = call.attn_mask
    if mask is not None:
        if mask.requires_grad and torch.is_grad_enabled():
            return "a gradient of attn_mask"
        if is_traceable_wrapper_subclass(mask):
            return f"a tensor subclass, {type(mask).__name__}"
    return _covers_transforms()


def _covers_tensor(name: str, x: torch.Tensor) -> str:
    if x.dtype not in DTYPES:
        return f"{name} of type {x.dtype}"
    if is_traceable_wrapper_subclass(x):
        return f"a tensor subclass, {type(x).__name__}"
    if x.layout != torch.strided:
        return f"{name} of layout {x.layout}"
    return ""


def _covers_transforms() -> str:
    if nested_forward_levels() > 1:
        return "nested forward-mode levels, in which torch loses a custom function's second tangent"
    return ""


register(Cell("cross_entropy", "native", "cpu", _reason, _covers_cross_entropy))
register(Cell("cross_entropy", "native", "cuda", NOT_IMPLEMENTED))
register(Cell("scaled_dot_product_attention", "native", "cpu", _reason, _covers_attention))
register(Cell("scaled_dot_product_attention", "native", "cuda", NOT_IMPLEMENTED))
