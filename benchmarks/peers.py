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
from benchmarks.shapes import AttentionShape, CrossEntropyShape, LinearCrossEntropyShape, Shape
from fastgpt.backends import cuda, hopper, measured
from fastgpt.backends.eager.attention import causal_mask
from fastgpt.backends.eager.cross_entropy import naive_cross_entropy


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[..., Function]  # of a shape; may raise UnavailableError
    allowed: float | None = 2.0  # times torch's own error; None: only roughly right
    destroys: bool = False  # the input, which is put back before each call
    # Sums the losses of chunks in a 16-bit type. With many of them the sum is off by some percent,
    # which is known, and no reason not to measure it.
    sums_loss_in_type: bool = False


FASTGPT = "fastgpt"
CUDA = "fastgpt, CUDA"
AMPERE = "fastgpt, CUDA, Ampere"
HOPPER = "fastgpt, CUDA, Hopper"
TRITON = "fastgpt, Triton"
IN_PLACE = "fastgpt, in place"
RECOMPUTE = "fastgpt, recompute"
UNFUSED = "matmul, fastgpt"
EAGER = "torch eager"
CHUNKED = "torch chunked"
COMPILED = "torch.compile"
NAIVE = "naive"
MATH = "torch math"

# Whose gate is never to be red.
OWN = (FASTGPT, CUDA, AMPERE, HOPPER, TRITON, IN_PLACE, RECOMPUTE, UNFUSED)

# Another kernel's own roundings, of weights to 16 bits and of sums in whatever order: a peer may be
# that much less accurate than torch and still compute the same thing. fastgpt may not.
_ALLOWED = 4.0

TORCH = (EAGER, CHUNKED)  # what a user of torch has without a compiler


def _compiled_cross_entropy(shape: CrossEntropyShape) -> Function:
    return _compiled(shape, F.cross_entropy)


def _compiled(shape: Shape, function: Function) -> Function:
    """Compiled for this very shape, and warmed up on it."""
    torch._dynamo.reset()
    return _tried(shape, torch.compile(function, dynamic=False, fullgraph=True))


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


# ---- linear cross-entropy ----


def matmul_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """The logits in memory, in the input's type: what F.linear_cross_entropy does, too."""
    return F.cross_entropy(F.linear(input, linear_weight), target)


def _matmul_fastgpt(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return fastgpt.cross_entropy(F.linear(input, linear_weight), target)


def _recompute(shape: LinearCrossEntropyShape) -> Function:
    if not shape.training:
        raise UnavailableError("the same without gradients")
    return functools.partial(fastgpt.linear_cross_entropy, recompute=True)


def chunked_cross_entropy() -> Function:
    """torch's own by chunks of the rows, with the options that it chooses."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise UnavailableError(f"torch {torch.__version__} has none")
    return functools.partial(F.linear_cross_entropy, options=options())


def _chunked(shape: LinearCrossEntropyShape) -> Function:
    function = chunked_cross_entropy()
    if shape.device == "cuda":
        return _tried(shape, function)
    # Not tried: a call takes up to half a minute, and what it may raise is known.
    chunks, gradient = min(shape.N, shape.C // shape.D), 4 * shape.C * shape.D
    if shape.training and chunks * gradient > 32e9:
        raise UnavailableError(
            f"minutes: some {chunks} chunks, each of which goes over {gradient / 1e6:.0f} MB"
        )
    return function


def _compiled_linear_cross_entropy(shape: LinearCrossEntropyShape) -> Function:
    return _compiled(shape, matmul_cross_entropy)


LINEAR_CROSS_ENTROPY = (
    Provider(FASTGPT, lambda shape: fastgpt.linear_cross_entropy),
    Provider(RECOMPUTE, _recompute),
    Provider(UNFUSED, lambda shape: _matmul_fastgpt),
    Provider(EAGER, lambda shape: matmul_cross_entropy),
    Provider(CHUNKED, _chunked, _ALLOWED, sums_loss_in_type=True),
    Provider(COMPILED, _compiled_linear_cross_entropy),
)


# ---- on a GPU ----


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


def _held(function: Function, backend: str) -> Callable[[Shape], Function]:
    """fastgpt's function, held to one of its backends. The backward runs the kernels of the backend
    that its forward chose, wherever autograd calls it.
    """

    def build(shape: Shape) -> Function:
        inputs = shape.inputs()
        try:
            with fastgpt.backend(backend):
                explanation = fastgpt.explain(function, *inputs.arguments, **inputs.keywords)
        except RuntimeError as error:  # it can run nothing on this machine
            raise UnavailableError(str(error)) from error
        if explanation.backend != backend:
            raise UnavailableError(dict(explanation.decisions)[backend])

        def held(*arguments: Any, **keywords: Any) -> Tensor:
            with fastgpt.backend(backend):
                return function(*arguments, **keywords)

        return held

    return build


def _switched(function: Function, on: hopper.Switch) -> Function:
    """The function, on these of CUDA's kernels. They stay for its backward, until another one of
    these is called.
    """

    @functools.wraps(function)
    def switched(*arguments: Any, **keywords: Any) -> Tensor:
        hopper.switch(on)
        return function(*arguments, **keywords)

    return switched


def _attention_as_stored(shape: AttentionShape) -> Function:
    """What a user gets, whatever generation of kernels the row before had."""
    function = fastgpt.scaled_dot_product_attention
    return _switched(function, hopper.chosen(measured.read())) if cuda.extension else function


def _attention_of(on: hopper.Switch) -> Callable[[AttentionShape], Function]:
    """Attention on CUDA's kernels of one generation, in both passes where it has both."""

    def build(shape: AttentionShape) -> Function:
        held = _held(fastgpt.scaled_dot_product_attention, "native")(shape)
        if on is hopper.ALL:
            _check_hopper(shape, held)
        return _switched(held, on)

    return build


def _check_hopper(shape: AttentionShape, held: Function) -> None:
    """That its kernels run, which do not add up in the order of Ampere's."""
    width = hopper.width_of(shape.D)
    inputs = shape.inputs()
    for which in hopper.PASSES:
        found = []
        for on in (hopper.NONE, {**hopper.NONE, (which, width): True}):
            value = inputs.value(_switched(held, on))
            found.append((value,) if which == "forward" else inputs.gradients(value))
        if all(map(torch.equal, *found)):
            raise UnavailableError(f"its {which} has the bits of Ampere's: its kernels do not run")


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


def _liger_linear(shape: LinearCrossEntropyShape) -> Function:
    function = _import(
        "liger_kernel", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
    )
    return _tried(shape, function)


def _apple(**options: str) -> Callable[[LinearCrossEntropyShape], Function]:
    def build(shape: LinearCrossEntropyShape) -> Function:
        function = _import("cut_cross_entropy", "cut_cross_entropy", "linear_cross_entropy")
        return _tried(shape, functools.partial(function, **options))

    return build


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
    if not shape.quick:
        raise UnavailableError("its compilation takes seconds: measured on the quick shapes")
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


# The first row is what a user gets: one of the next ones, or CUDA's of both generations.
CUDA_CROSS_ENTROPY = (
    Provider(FASTGPT, lambda shape: fastgpt.cross_entropy),
    Provider(CUDA, _held(fastgpt.cross_entropy, "native")),
    Provider(TRITON, _held(fastgpt.cross_entropy, "triton")),
    Provider(EAGER, lambda shape: F.cross_entropy),
    Provider(COMPILED, _compiled_cross_entropy, _ALLOWED),
    Provider(NAIVE, _naive_cross_entropy, allowed=None),
    Provider("Liger", _liger, _ALLOWED, destroys=True),
    Provider("quack", _quack, _ALLOWED),
)

CUDA_ATTENTION = (
    Provider(FASTGPT, _attention_as_stored),
    Provider(AMPERE, _attention_of(hopper.NONE)),
    Provider(HOPPER, _attention_of(hopper.ALL)),
    Provider(TRITON, _held(fastgpt.scaled_dot_product_attention, "triton")),
    Provider(EAGER, lambda shape: F.scaled_dot_product_attention),
    Provider("SDPA flash", _sdpa("FLASH_ATTENTION"), _ALLOWED),
    Provider("SDPA cuDNN", _sdpa("CUDNN_ATTENTION"), _ALLOWED),
    Provider("SDPA efficient", _sdpa("EFFICIENT_ATTENTION"), _ALLOWED),
    Provider("SDPA math", _sdpa("MATH"), _ALLOWED),
    Provider("FlexAttention", _flex_attention, _ALLOWED),
)

# Apple's by default leaves the small probabilities out of the gradient, which of these logits are
# all but the target's: its gate says so.
CUDA_LINEAR_CROSS_ENTROPY = (
    Provider(FASTGPT, lambda shape: fastgpt.linear_cross_entropy),
    Provider(RECOMPUTE, _recompute),
    Provider(EAGER, lambda shape: matmul_cross_entropy),
    Provider(CHUNKED, _chunked, _ALLOWED, sums_loss_in_type=True),
    Provider(COMPILED, _compiled_linear_cross_entropy, _ALLOWED),
    Provider("Liger", _liger_linear, _ALLOWED),
    Provider("Apple CCE", _apple(), _ALLOWED),
    Provider("Apple CCE, exact", _apple(impl="cce_exact"), _ALLOWED),
)

PROVIDERS = {
    ("cross_entropy", "cpu"): CROSS_ENTROPY,
    ("attention", "cpu"): ATTENTION,
    ("linear_cross_entropy", "cpu"): LINEAR_CROSS_ENTROPY,
    ("cross_entropy", "cuda"): CUDA_CROSS_ENTROPY,
    ("attention", "cuda"): CUDA_ATTENTION,
    ("linear_cross_entropy", "cuda"): CUDA_LINEAR_CROSS_ENTROPY,
}
