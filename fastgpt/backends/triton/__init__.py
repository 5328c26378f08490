"""The Triton kernels: whether they can run here, and their cells of the table.

Neither Triton nor a kernel is imported before the first call that needs one.
"""

import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch

from fastgpt import dispatch
from fastgpt.backends import coverage
from fastgpt.backends.triton import tiles
from fastgpt.backends.triton.chips import chip_of, unserved
from fastgpt.dispatch import Cell, register
from fastgpt.ops import attention as attention_op
from fastgpt.ops import cross_entropy as cross_entropy_op
from fastgpt.ops import linear_cross_entropy as linear_cross_entropy_op
from fastgpt.ops.attention import AttentionCall
from fastgpt.ops.cross_entropy import CrossEntropyCall
from fastgpt.ops.linear_cross_entropy import LinearCrossEntropyCall

OLDEST = (3, 6)


def version() -> str | None:
    """The version of the installed Triton; None without one."""
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _missing() -> str:
    """Why Triton can run nowhere; empty where it can."""
    found = version()
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    if found is not None and tuple(map(int, found.split(".")[:2])) < OLDEST:
        return f"Triton {found} is older than 3.6: run `pip install -U triton`"
    return ""


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for Triton's interpreter, which Triton reads when imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def _cpu_reason() -> str:
    if missing := _missing():
        return missing
    if not _interpreted():
        return "Triton runs on a CPU only in its interpreter, for tests: set TRITON_INTERPRET=1"
    if importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter needs NumPy: run `pip install numpy`"
    return ""


def _cuda_reason() -> str:
    if missing := _missing():
        return missing
    if _interpreted():
        return "TRITON_INTERPRET is set, and the interpreter is slower than eager: unset it"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA and ROCm"
    return ""


def _covers_device(device: torch.device) -> str:
    # Slower than eager by orders of magnitude, so never by default.
    if device.type == "cpu" and dispatch.asked_for() != "triton":
        return "its interpreter runs only when asked for, by fastgpt.backend('triton')"
    return unserved(device)


def _covers_cross_entropy(call: CrossEntropyCall) -> str:
    return _covers_device(call.logits.device) or coverage.cross_entropy(call, rows=True)


def _covers_linear_cross_entropy(call: LinearCrossEntropyCall) -> str:
    return _covers_device(call.input.device) or coverage.linear_cross_entropy(call)


def _covers_attention(call: AttentionCall) -> str:
    query = call.query
    return _covers_device(query.device) or coverage.attention(
        call, _max_head_dim(query.device, query.dtype.itemsize)
    )


@torch.compiler.assume_constant_result
def _max_head_dim(device: torch.device, itemsize: int) -> int:
    # A device that is not there has fake tensors only.
    if device.type == "cpu" or (device.index or 0) >= torch.cuda.device_count():
        return tiles.INTERPRETED_HEAD_DIM
    return tiles.max_head_dim(chip_of(device), itemsize)


_INTERPRETED = "by fastgpt.backend('triton'): it is interpreted"
for _device, _reason, _note in (
    ("cpu", _cpu_reason(), _INTERPRETED),
    ("cuda", _cuda_reason(), ""),
):
    for _name, _covers in (
        ("cross_entropy", _covers_cross_entropy),
        ("linear_cross_entropy", _covers_linear_cross_entropy),
        ("scaled_dot_product_attention", _covers_attention),
    ):
        register(Cell(_name, "triton", _device, _reason, _covers, not _note, _note))


def _kernel(op: str, which: str) -> Any:
    """A raw operator's kernel, which is imported when it is first called."""

    def launch(*arguments: Any) -> Any:
        module = importlib.import_module(f"fastgpt.backends.triton.{op}")
        return getattr(module, which)(*arguments)

    return launch


_WHICH = {
    "cross_entropy": ("forward", "backward", "backward_in_place"),
    "linear_cross_entropy": ("forward", "backward"),
    "attention": ("forward", "backward"),
}
for _op, _module in (
    ("cross_entropy", cross_entropy_op),
    ("linear_cross_entropy", linear_cross_entropy_op),
    ("attention", attention_op),
):
    _module.LAUNCHERS["triton"] = _module.define("fastgpt_triton")
    for _which in _WHICH[_op]:
        torch.library.impl(f"fastgpt_triton::{_op}_{_which}", ("CPU", "CUDA"), _kernel(_op, _which))
