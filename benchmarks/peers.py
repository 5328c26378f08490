"""Who is measured: for each op, functions that are called as torch's own is."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt
from benchmarks import UnavailableError
from benchmarks.gates import Function
from benchmarks.shapes import AttentionShape, CrossEntropyShape
from fastgpt.backends.eager.attention import causal_mask
from fastgpt.backends.eager.cross_entropy import naive_cross_entropy


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[..., Function]  # of a shape; may raise UnavailableError
    allowed: float | None = 2.0  # times torch's own error; None: only roughly right


FASTGPT = "fastgpt"
EAGER = "torch eager"
COMPILED = "torch.compile"
NAIVE = "naive"
MATH = "torch math"


def _compiled_cross_entropy(shape: CrossEntropyShape) -> Function:
    """Compiled for this very shape, and warmed up on it."""
    torch._dynamo.reset()
    compiled = torch.compile(F.cross_entropy, dynamic=False, fullgraph=True)
    inputs = shape.inputs()
    try:
        inputs.gradients(inputs.value(compiled))
    except torch._dynamo.exc.BackendCompilerFailed as error:  # for example, no C++ compiler
        inner = error.inner_exception
        first = (str(inner).strip().splitlines() or [""])[0]
        raise UnavailableError(f"{type(inner).__name__}: {first}") from error
    return compiled


def _naive_cross_entropy(shape: CrossEntropyShape) -> Function:
    if shape.sequence:
        raise UnavailableError("takes (N, C) only")
    return naive_cross_entropy


def _math_attention(shape: AttentionShape) -> Function:
    if shape.S > 2048:
        raise UnavailableError("L x S scores in memory: measured up to S = 2048")
    return math_attention


def math_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V as it is written in many models, all of it in the input's type."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if is_causal:
        hidden = ~causal_mask(query.shape[-2], key.shape[-2], query.device)
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.softmax(scores, dim=-1) @ value


CROSS_ENTROPY = (
    Provider(FASTGPT, lambda shape: fastgpt.cross_entropy),
    Provider(EAGER, lambda shape: F.cross_entropy),
    Provider(COMPILED, _compiled_cross_entropy),
    Provider(NAIVE, _naive_cross_entropy, allowed=None),
)

# Without torch.compile: it has no code of its own for this op and calls the kernel of torch eager.
ATTENTION = (
    Provider(FASTGPT, lambda shape: fastgpt.scaled_dot_product_attention),
    Provider(EAGER, lambda shape: F.scaled_dot_product_attention),
    Provider(MATH, _math_attention, allowed=None),
)

PROVIDERS = {"cross_entropy": CROSS_ENTROPY, "attention": ATTENTION}
