"""Who is measured: for each op, functions that are called as torch's own is."""

import functools
import importlib
import importlib.util
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt
from benchmarks import UnavailableError
from benchmarks.gates import Function
from benchmarks.shapes import AttentionShape, CrossEntropyShape, Shape
from fastgpt.backends.eager.attention import causal_mask
from fastgpt.backends.eager.cross_entropy import naive_cross_entropy


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[..., Function]  # of a shape; may raise UnavailableError
    allowed: float | None = 2.0  # times torch's own error; None: only roughly right
    destroys: bool = False  # the input, which is put back before each call


FASTGPT = "fastgpt"
IN_PLACE = "fastgpt, in place"
EAGER = "torch eager"
COMPILED = "torch.compile"
NAIVE = "naive"
MATH = "torch math"


def _compiled_cross_entropy(shape: CrossEntropyShape) -> Function:
    """Compiled for this very shape, and warmed up on it."""
    torch._dynamo.reset()
    compiled = torch.compile(F.cross_entropy, dynamic=False, fullgraph=True)
    return _tried(shape, compiled)


def _tried(shape: Shape, function: Function) -> Function:
    """The function, once it has run on the shape; what it raises then is why it is unavailable."""
    inputs = shape.inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            inputs.gradients(inputs.value(function))
            if shape.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # of another project, which may raise anything
            raise UnavailableError(_reason(error, [str(w.message) for w in caught])) from error
    return function


def _reason(error: Exception, warned: list[str]) -> str:
    """One line. torch says in warnings why none of its attention kernels takes a call."""
    inner = getattr(error, "inner_exception", error)
    text = (str(inner).strip().splitlines() or [""])[0]
    if "No available kernel" in text:
        # "<kernel> not used because:" is followed by the reason, and others were not asked for.
        whys = [w for w in warned if not re.search("not used because|runtime disabled", w)]
        text = re.sub(r" \(Triggered internally.*", "", whys[0].splitlines()[0]) if whys else text
    return f"{type(inner).__name__}: {text}"


def _naive_cross_entropy(shape: CrossEntropyShape) -> Function:
    if shape.sequence:
        raise UnavailableError("takes (N, C) only")
    return naive_cross_entropy


def _math_attention(shape: AttentionShape) -> Function:
    _check_scores(shape)
    return math_attention


def _check_scores(shape: AttentionShape) -> None:
    most = 2048 if shape.device == "cpu" else 4096
    if most < shape.S:
        raise UnavailableError(f"L x S scores in memory: measured up to S = {most}")


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


def _in_place(shape: CrossEntropyShape) -> Function:
    if shape.sequence:
        raise UnavailableError("measured on (N, C) only")
    return functools.partial(fastgpt.cross_entropy, inplace_backward=True)


CROSS_ENTROPY = (
    Provider(FASTGPT, lambda shape: fastgpt.cross_entropy),
    Provider(IN_PLACE, _in_place, destroys=True),
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


# ---- on a GPU ----

# Another kernel's own roundings, of weights to 16 bits and of sums in whatever order: a peer may be
# that much less accurate than torch and still compute the same thing. fastgpt may not.
_ALLOWED = 4.0


def _import(package: str, module: str, name: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"{package} is not installed")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # of another project, which may raise anything
        raise UnavailableError(_reason(error, [])) from error


def _rows_only(shape: CrossEntropyShape) -> None:
    if shape.sequence:
        raise UnavailableError("takes (N, C) only")


def _liger(shape: CrossEntropyShape) -> Function:
    function = _import(
        "liger_kernel", "liger_kernel.transformers.functional", "liger_cross_entropy"
    )
    _rows_only(shape)
    return _tried(shape, function)


def _quack(shape: CrossEntropyShape) -> Function:
    function = _import("quack", "quack.cross_entropy", "cross_entropy")
    _rows_only(shape)
    return _tried(shape, function)


def _apple(shape: CrossEntropyShape) -> Function:
    _import("cut_cross_entropy", "cut_cross_entropy", "linear_cross_entropy")
    raise UnavailableError(
        "of hidden states, not of logits: for linear_cross_entropy, still to come"
    )


def _sdpa(backend: str) -> Callable[[AttentionShape], Function]:
    """torch's function, held to one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def build(shape: AttentionShape) -> Function:
        if backend == "MATH":
            _check_scores(shape)
        choice = getattr(SDPBackend, backend)

        def held(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
            with sdpa_kernel(choice):
                return F.scaled_dot_product_attention(query, key, value, **keywords)

        return _tried(shape, held)

    return build


def _flex_attention(shape: AttentionShape) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask = None
    if shape.causal:
        size = (None, None, shape.L, shape.S)
        mask = create_block_mask(lambda b, h, i, j: i >= j, *size, device=shape.device)

    def attention(
        query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool
    ) -> Tensor:
        return compiled(query, key, value, block_mask=mask, enable_gqa=enable_gqa)

    return _tried(shape, attention)


CUDA_CROSS_ENTROPY = (
    Provider(FASTGPT, lambda shape: fastgpt.cross_entropy),
    Provider(EAGER, lambda shape: F.cross_entropy),
    Provider(COMPILED, _compiled_cross_entropy, _ALLOWED),
    Provider(NAIVE, _naive_cross_entropy, allowed=None),
    Provider("Liger", _liger, _ALLOWED, destroys=True),
    Provider("quack", _quack, _ALLOWED),
    Provider("Apple CCE", _apple, _ALLOWED),
)

CUDA_ATTENTION = (
    Provider(FASTGPT, lambda shape: fastgpt.scaled_dot_product_attention),
    Provider(EAGER, lambda shape: F.scaled_dot_product_attention),
    Provider("SDPA flash", _sdpa("FLASH_ATTENTION"), _ALLOWED),
    Provider("SDPA cuDNN", _sdpa("CUDNN_ATTENTION"), _ALLOWED),
    Provider("SDPA efficient", _sdpa("EFFICIENT_ATTENTION"), _ALLOWED),
    Provider("SDPA math", _sdpa("MATH"), _ALLOWED),
    Provider("FlexAttention", _flex_attention, _ALLOWED),
)

PROVIDERS = {
    ("cross_entropy", "cpu"): CROSS_ENTROPY,
    ("attention", "cpu"): ATTENTION,
    ("cross_entropy", "cuda"): CUDA_CROSS_ENTROPY,
    ("attention", "cuda"): CUDA_ATTENTION,
}
