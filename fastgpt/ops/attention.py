"""Scaled dot-product attention: the call, the raw operators and the Functions.

What they compute, and their derivatives in torch operations: attention_forms.py. The raw operators
run in kernels that hold tiles of the scores only. A query that may look at nothing has output and
gradient 0, and an lse of -inf.

`Attention` and `AttentionBackward` are two Functions because the first one's backward is
differentiable only if it is made of differentiable pieces, and a kernel is not one.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.ops.attention_forms import (
    Inputs,
    Options,
    Tangents,
    backward_tangents,
    forward_tangents,
    second_order,
    sum_to,
)
from fastgpt.ops.dropout import seeds_of
from fastgpt.ops.raw import Launcher, accumulator_dtype, fold

# ---- the call ----


class AttentionCall(NamedTuple):
    """A checked call of `scaled_dot_product_attention`."""

    query: Tensor  # (..., Hq, L, D)
    key: Tensor  # (..., H, S, D)
    value: Tensor  # (..., H, S, Dv)
    attn_mask: Tensor | None  # broadcastable with (..., Hq, L, S), bool or floating
    dropout_p: float
    scale: float | None
    enable_gqa: bool
    bottom_right: bool
    window: tuple[int, int]  # UNLIMITED for a side without an end; is_causal is in it
    softcap: float  # 0: none
    alibi_slopes: Tensor | None  # (Hq,) or (B, Hq)
    sinks: Tensor | None  # (Hq,)
    return_lse: bool
    cu_seqlens: tuple[Tensor, Tensor] | None  # (documents + 1,), of queries and of keys
    scores_shape: torch.Size  # (..., Hq, L, S)


class FourDimensional(NamedTuple):
    """A call in the form of the raw operators, and the shape to give to the output."""

    inputs: Inputs
    options: Options
    output_shape: torch.Size


def scores_shape(
    query: torch.Size, key: torch.Size, value: torch.Size, enable_gqa: bool
) -> torch.Size:
    """(..., Hq, L, S). Raises RuntimeError if the batch dimensions do not broadcast."""
    last = -3 if enable_gqa else -2
    batch, others = query[:last], (key[:last], value[:last])
    if not batch == others[0] == others[1]:
        batch = torch.broadcast_shapes(batch, *others)
    return torch.Size((*batch, *query[last:-1], key[-2]))


def four_dimensional(call: AttentionCall, seed: Tensor | None) -> FourDimensional:
    """Batch dimensions broadcast and folded into one, by views wherever strides allow. `seed`: of
    the dropout, if there is any.
    """
    q, k, v, mask = call[:4]
    scores = call.scores_shape
    L, S = scores[-2:]
    last = -3 if call.enable_gqa else -2
    # Most calls have the form already.
    if len(scores) != 4 or not q.shape[:last] == k.shape[:last] == v.shape[:last]:
        q, k, v = (_fold_batch(x, scores[:-2], call.enable_gqa) for x in (q, k, v))
    if mask is not None:
        mask = _fold_mask(mask, q.dtype, scores)
    slopes = None if call.alibi_slopes is None else _of_heads(call.alibi_slopes, q.dtype)
    sinks = None if call.sinks is None else _of_heads(call.sinks, q.dtype)
    spans = None
    if call.cu_seqlens is not None:
        spans = document_spans(*call.cu_seqlens, L, S, call.window, call.bottom_right)
    seeds = None if seed is None else seeds_of(seed, q.shape[0])
    return FourDimensional(
        Inputs(q, k, v, mask, slopes, sinks, spans, seeds),
        Options(
            *call.window,
            S - L if call.bottom_right else 0,
            1 / math.sqrt(q.shape[-1]) if call.scale is None else float(call.scale),
            call.softcap,
            call.dropout_p,
        ),
        torch.Size((*scores[:-1], v.shape[-1])),
    )


def _fold_batch(x: Tensor, batch: torch.Size, enable_gqa: bool) -> Tensor:
    """(..., heads, N, columns) as (B, heads, N, columns); `batch`: of the scores, with heads."""
    heads = x.shape[-3] if enable_gqa else (batch[-1] if batch else None)
    if x.dim() == 4 and x.shape[:2] == (*batch[:-1], heads):
        return x
    x = x.expand(*batch[:-1], heads, *x.shape[-2:]) if heads else x
    return x.reshape(-1, *x.shape[-3:]) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def _fold_mask(mask: Tensor, dtype: torch.dtype, scores: torch.Size) -> Tensor:
    """A mask that broadcasts with (B, Hq, L, S)."""
    if mask.is_floating_point() and mask.dtype != dtype:
        mask = _convert(mask, accumulator_dtype(dtype))
    missing = max(len(scores), 4) - mask.dim()
    mask = mask[(None,) * missing] if missing else mask
    if mask.dim() > 4:
        one = all(size == 1 for size in mask.shape[:-3])
        mask = mask if one else mask.expand(*scores[:-3], *mask.shape[-3:])
        mask = mask.reshape(-1, *mask.shape[-3:])
    return mask


def _of_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A number for each head, (B or 1, Hq), in the accumulator type."""
    return x.to(accumulator_dtype(dtype)).reshape(-1, x.shape[-1])


def document_spans(
    cu_q: Tensor, cu_k: Tensor, L: int, S: int, window: tuple[int, int], bottom_right: bool
) -> Tensor:
    """`Inputs.spans` of packed documents: the window within a query's own document.

    Queries and keys behind the last document see, and are seen by, nothing. Wherever the boundaries
    are, no span leaves the keys that there are.
    """
    i = torch.arange(L, device=cu_q.device)
    cu_q, cu_k = cu_q.to(torch.int64), cu_k.to(torch.int64).clamp(0, S)
    outside = i >= cu_q[-1]
    document = torch.bucketize(i, cu_q[1:].contiguous(), right=True).clamp(max=cu_q.shape[0] - 2)
    first, last = cu_k[document], cu_k[document + 1]
    place = i - cu_q[document] + first
    if bottom_right:
        place = place + (last - first) - (cu_q[document + 1] - cu_q[document])
    begin = (place - window[0]).clamp(first, last)
    end = torch.maximum((place + window[1] + 1).clamp(first, last), begin)
    begin, end = begin.masked_fill(outside, S), end.masked_fill(outside, S)
    return torch.stack([begin, end, place])


def _convert(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """In another type; what is expanded stays one copy."""
    if mask.dtype == dtype:
        return mask
    for dim, stride in enumerate(mask.stride()):
        mask = mask.narrow(dim, 0, 1) if stride == 0 and mask.shape[dim] > 1 else mask
    return mask.to(dtype)


# ---- the raw operators ----


def _new_heads(heads: Tensor, columns: int) -> Tensor:
    """(B, H, N, columns), in memory (B, N, H, columns), as the kernels write it."""
    B, H, N = heads.shape[:3]
    return heads.new_empty_strided((B, H, N, columns), (N * H * columns, columns, H * columns, 1))


def _laid_out(x: Tensor) -> Tensor:
    """In that order: the compiler insists on a tangent with the strides of its primal."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def new_outputs(
    query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward's results, not yet written: output, lse, rounding, row_max and row_sum."""
    dtype = accumulator_dtype(query.dtype)
    columns = value.shape[3]
    output = _new_heads(query, columns)
    rounding = _new_heads(query, columns if dtype != query.dtype else 0)
    lse, row_max, row_sum = (query.new_empty(query.shape[:3], dtype=dtype) for _ in range(3))
    return output, lse, rounding, row_max, row_sum


def new_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    of_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward's results, not yet written; see `attention_forms.Gradients`."""
    dtype = accumulator_dtype(query.dtype)
    gradients = [_new_heads(x, x.shape[3]) for x in (query, key, value)]
    B = query.shape[0]
    of_rows = (B, 0, 0) if sinks is None else query.shape[:3]
    shape = attn_mask.shape if of_mask and attn_mask is not None else (B, 0)
    grad_mask, grad_sinks = (query.new_empty(s, dtype=dtype) for s in (shape, of_rows))
    return gradients[0], gradients[1], gradients[2], grad_mask, grad_sinks


def _fold_broadcast(info: Any, dim: int | None, x: Tensor | None, batch: int) -> Tensor | None:
    """A tensor (batch or 1, ...) of a batch of problems, each of `batch` sequences."""
    if x is None or (dim is None and x.shape[0] == 1):
        return x
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x.expand(info.batch_size, batch, *x.shape[2:]).flatten(0, 1)


def _fold_inputs(info: Any, in_dims: tuple[int | None, ...], inputs: Inputs) -> Inputs:
    query, key, value = fold(info, in_dims[:3], inputs[:3])
    batch = query.shape[0] // info.batch_size
    mask, slopes, sinks = (
        _fold_broadcast(info, dim, x, batch)
        for dim, x in zip(in_dims[3:6], inputs[3:6], strict=True)
    )
    if in_dims[6] is not None:
        raise RuntimeError(
            "scaled_dot_product_attention: expected the same cu_seqlens for the whole batch of a "
            "vmap; call it once for each"
        )
    seeds = inputs.seeds
    if seeds is not None:
        seeds = fold(info, (in_dims[7],), (seeds,))[0]
    return Inputs(query, key, value, mask, slopes, sinks, inputs.spans, seeds)


def _unfold(info: Any, x: Tensor) -> Tensor:
    return x.reshape(info.batch_size, x.shape[0] // info.batch_size, *x.shape[1:])


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes,"
    " Tensor? sinks, Tensor? spans, Tensor? seeds"
)
_OPTIONS = "int left, int right, int offset, float scale, float softcap, float dropout_p"


def define(namespace: str) -> Launcher:
    """Define a backend's raw operators in `namespace`; its kernels are registered elsewhere.

    forward(*Inputs, *Options) -> what `Attention` returns
    backward(grad_output, grad_lse, *Inputs, output, rounding, row_max, row_sum, *Options, of_mask)
        -> attention_forms.Gradients
    """
    forward, backward = f"{namespace}::attention_forward", f"{namespace}::attention_backward"
    torch.library.define(
        forward,
        f"({_INPUTS}, {_OPTIONS})"
        " -> (Tensor output, Tensor lse, Tensor rounding, Tensor row_max, Tensor row_sum)",
    )
    torch.library.define(
        backward,
        f"(Tensor grad_output, Tensor? grad_lse, {_INPUTS}, Tensor output, Tensor rounding,"
        f" Tensor row_max, Tensor row_sum, {_OPTIONS}, bool of_mask)"
        " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask,"
        " Tensor grad_sinks)",
    )
    operators = getattr(torch.ops, namespace)
    launcher = Launcher(operators.attention_forward.default, operators.attention_backward.default)
    torch.library.register_fake(forward, new_outputs)

    def backward_fake(*x):  # type: ignore[no-untyped-def]
        inputs = Inputs(*x[2:10])
        return new_gradients(*inputs[:4], inputs.sinks, x[20])

    torch.library.register_fake(backward, backward_fake)

    def forward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        folded = _fold_inputs(info, in_dims[:8], Inputs(*inputs[:8]))
        outputs = launcher.forward(*folded, *inputs[8:])
        return tuple(_unfold(info, x) for x in outputs), (0,) * 5

    def backward_vmap(info, in_dims, *x):  # type: ignore[no-untyped-def]
        upstream = fold(info, in_dims[:2], x[:2])
        inputs, of_mask = Inputs(*x[2:10]), x[20]
        folded = _fold_inputs(info, in_dims[2:10], inputs)
        saved = fold(info, in_dims[10:14], x[10:14])
        mask, shared = folded.attn_mask, False
        if of_mask and mask is not None and inputs.attn_mask is not None:
            # A gradient for each problem, and for each of its sequences.
            shared = inputs.attn_mask.shape[in_dims[5] == 0] == 1
            mask = mask.expand(folded.query.shape[0], *mask.shape[1:])
        outputs = launcher.backward(*upstream, *folded._replace(attn_mask=mask), *saved, *x[14:])
        *others, grad_mask, grad_sinks = (_unfold(info, x) for x in outputs)
        if shared:
            grad_mask = grad_mask.sum(1, keepdim=True)
        return (*others, grad_mask, grad_sinks), (0,) * 5

    torch.library.register_vmap(forward, forward_vmap)
    torch.library.register_vmap(backward, backward_vmap)

    # For whoever calls the operators themselves, and for graphs that hold them.
    def forward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options = Options(*inputs[8:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8], output[0], *output[2:])

    def forward_backward(ctx, grad_output, grad_lse, *_):  # type: ignore[no-untyped-def]
        return _gradients(ctx, grad_output, grad_lse, launcher.backward)

    def backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options, ctx.of_mask = Options(*inputs[14:20]), inputs[20]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:10])

    def backward_backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        return *_adjoints(ctx, cotangents), *(None,) * 11

    torch.library.register_autograd(forward, forward_backward, setup_context=forward_setup)
    torch.library.register_autograd(backward, backward_backward, setup_context=backward_setup)
    return launcher


LAUNCHERS = {"native": define("fastgpt")}


def _refuse_slope_gradient(wanted: bool) -> None:
    # The public function sends such a call to eager; torch.func hides some from it.
    if wanted:
        raise RuntimeError(
            "scaled_dot_product_attention: the fused kernel has no gradient of alibi_slopes; use "
            'it inside `with fastgpt.backend("eager"):`'
        )


def _gradients(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, backward: Any, *backend: str
) -> tuple[Any, ...]:
    """The gradients of the forward's inputs and options, by one of the two backward ops."""
    wanted = ctx.needs_input_grad
    _refuse_slope_gradient(wanted[4])
    nothing = (None,) * len(wanted)
    if grad_output is None and grad_lse is None:
        return nothing
    # Once: a checkpoint recomputes at the first access, and refuses a second.
    *tensors, output, rounding, row_max, row_sum = ctx.saved_tensors
    inputs = Inputs(*tensors)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    statistics = output, rounding, row_max, row_sum
    query, key, value, mask, rows = backward(
        grad_output, grad_lse, *inputs, *statistics, *ctx.options, wanted[3], *backend
    )
    mask = mask.to(inputs.attn_mask.dtype) if wanted[3] else None  # type: ignore[union-attr]
    sinks = sum_to(rows.sum(2), inputs.sinks.shape) if wanted[5] else None  # type: ignore[union-attr]
    return query, key, value, mask, None, sinks, *nothing[6:]


def _adjoints(ctx: Any, cotangents: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """Those of the backward's first ten inputs: the upstream gradients and `Inputs`."""
    wanted = ctx.needs_input_grad
    _refuse_slope_gradient(wanted[6])
    if all(x is None for x in cotangents):
        return (None,) * 10
    grad_output, grad_lse, *tensors = ctx.saved_tensors
    inputs = Inputs(*tensors)
    found = second_order(
        cotangents, grad_output, grad_lse, inputs, ctx.options, ctx.of_mask, wanted[5]
    )
    return (*found[:6], None, found.sinks, None, None)


# ---- the Functions ----


class AttentionBackward(Function):
    """The gradient of `Attention` as an op of its own, so that it has derivatives too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        spans: Tensor | None,
        seeds: Tensor | None,
        output: Tensor,
        rounding: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        left: int,
        right: int,
        offset: int,
        scale: float,
        softcap: float,
        dropout_p: float,
        of_mask: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return LAUNCHERS[backend].backward(
            grad_output, grad_lse, query, key, value, attn_mask, alibi_slopes, sinks, spans, seeds,
            output, rounding, row_max, row_sum,
            left, right, offset, scale, softcap, dropout_p, of_mask,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.of_mask = Options(*inputs[14:20]), inputs[20]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:10])
        ctx.save_for_forward(*inputs[:10])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        return *_adjoints(ctx, cotangents), *(None,) * 12

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        _refuse_slope_gradient(tangents[6] is not None)
        grad_output, grad_lse, *tensors = ctx.saved_tensors
        dg, dh, query, key, value, mask, _, sinks, *_ = tangents
        of_inputs = Tangents(query, key, value, mask, sinks)
        found = backward_tangents(
            grad_output, grad_lse, dg, dh, of_inputs, Inputs(*tensors), ctx.options, ctx.of_mask
        )
        return *map(_laid_out, found[:3]), *found[3:]


class Attention(Function):
    """Attention of (B, H, N, D) tensors by a backend's kernels.

    apply(*Inputs, *Options, backend) -> (output (B, Hq, L, Dv), lse, rounding, row_max, row_sum).

    The last three are for the backward and have no gradient. `rounding` is what a 16-bit output
    lost when it was rounded, again in 16 bits (and has no columns for other types): <p, dp> is
    taken as <g, o>, and where the weights are all but certain, ds is smaller than o's rounding. lse
    and the statistics are (B, Hq, L), in the accumulator type: each query's largest score, in units
    that are the backend's own, and the sum over j of exp(x_ij - max x_i), the sink among them; both
    0 for a query that may look at nothing.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        spans: Tensor | None,
        seeds: Tensor | None,
        left: int,
        right: int,
        offset: int,
        scale: float,
        softcap: float,
        dropout_p: float,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return LAUNCHERS[backend].forward(
            query, key, value, attn_mask, alibi_slopes, sinks, spans, seeds,
            left, right, offset, scale, softcap, dropout_p,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.backend = Options(*inputs[8:14]), inputs[14]
        ctx.set_materialize_grads(False)
        # The same tensors for both: torch's vmap rule keeps the batch dimensions of one list only.
        ctx.save_for_backward(*inputs[:8], output[0], *output[2:])
        ctx.save_for_forward(*inputs[:8], output[0], *output[2:])

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        return _gradients(ctx, grad_output, grad_lse, AttentionBackward.apply, ctx.backend)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        _refuse_slope_gradient(tangents[4] is not None)
        *tensors, _, rounding, row_max, row_sum = ctx.saved_tensors
        query, key, value, mask, _, sinks, *_ = tangents
        of_inputs = Tangents(query, key, value, mask, sinks)
        output, lse = forward_tangents(of_inputs, Inputs(*tensors), ctx.options)
        # Zeros, not None: see CrossEntropy.jvp.
        zeros = (torch.zeros_like(x) for x in (rounding, row_max, row_sum))
        return _laid_out(output), lse, *zeros


# See ops/cross_entropy.py.
torch._dynamo.allow_in_graph(Attention)
torch._dynamo.allow_in_graph(AttentionBackward)
