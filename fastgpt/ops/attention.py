"""Scaled dot-product attention: the raw operators and their derivatives.

For queries q_i, keys k_j and values v_j of one head, with x the scores, p their softmax and g the
upstream gradient of the output o:

    x = scale q k^T + mask          p = softmax(x)            o = p v
    dp = g v^T                      ds = p * (dp - <p, dp>)   <p, dp> is <g, o>, row by row
    dq = scale ds k                 dk = scale ds^T q         dv = p^T g

These run in kernels that hold tiles of x, p and ds only. The jvp and the second-order forms, below,
are torch operations on the inputs, so that they can be differentiated again, to any order; they
take the queries in chunks, so that their memory is linear in the sequence, too, unless autograd
records them for a third order. A query that may look at nothing has output and gradient 0.

`Attention` and `AttentionBackward` are two Functions because the first one's backward is
differentiable only if it is made of differentiable pieces, and a kernel is not one.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.ops.raw import Launcher, accumulator_dtype, fold

# ---- the call ----


class AttentionCall(NamedTuple):
    """A checked call of `scaled_dot_product_attention`."""

    query: Tensor  # (..., Hq, L, D)
    key: Tensor  # (..., H, S, D)
    value: Tensor  # (..., H, S, Dv)
    attn_mask: Tensor | None  # broadcastable with (..., Hq, L, S), bool or floating
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


class FourDimensional(NamedTuple):
    """A call in the form of the raw operators, and the shape to give to the output."""

    query: Tensor  # (B, Hq, L, D)
    key: Tensor  # (B, H, S, D), Hq a multiple of H
    value: Tensor  # (B, H, S, Dv)
    attn_mask: Tensor | None  # (B or 1, Hq or 1, L or 1, S or 1)
    scale: float
    output_shape: torch.Size


def scores_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> torch.Size:
    """(..., Hq, L, S). Raises RuntimeError if the batch dimensions do not broadcast."""
    last = -3 if enable_gqa else -2
    batch = torch.broadcast_shapes(*(x.shape[:last] for x in (query, key, value)))
    return torch.Size((*batch, *query.shape[last:-1], key.shape[-2]))


def four_dimensional(call: AttentionCall) -> FourDimensional:
    """Batch dimensions broadcast and folded into one, by views wherever strides allow."""
    q, k, v, mask = call[:4]
    scores = scores_shape(q, k, v, call.enable_gqa)
    batch = scores[:-2]

    def fold_batch(x: Tensor, heads: int | None) -> Tensor:
        x = x.expand(*batch[:-1], heads, *x.shape[-2:]) if heads else x
        return x.reshape(-1, *x.shape[-3:]) if x.dim() > 4 else x[(None,) * (4 - x.dim())]

    heads = [x.shape[-3] if call.enable_gqa else (batch[-1] if batch else None) for x in (q, k, v)]
    if mask is not None:
        if mask.is_floating_point() and mask.dtype != q.dtype:
            mask = _convert(mask, accumulator_dtype(q.dtype))
        mask = mask[(None,) * (max(len(scores), 4) - mask.dim())]
        if mask.dim() > 4:
            one = all(size == 1 for size in mask.shape[:-3])
            mask = mask if one else mask.expand(*batch[:-1], *mask.shape[-3:])
            mask = mask.reshape(-1, *mask.shape[-3:])
    q, k, v = (fold_batch(x, n) for x, n in zip((q, k, v), heads, strict=True))
    return FourDimensional(
        q,
        k,
        v,
        mask,
        1 / math.sqrt(q.shape[-1]) if call.scale is None else float(call.scale),
        torch.Size((*scores[:-1], v.shape[-1])),
    )


def _convert(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """In another type; what is expanded stays one copy."""
    if mask.dtype == dtype:
        return mask
    for dim, stride in enumerate(mask.stride()):
        mask = mask.narrow(dim, 0, 1) if stride == 0 and mask.shape[dim] > 1 else mask
    return mask.to(dtype)


# ---- the closed forms in torch operations ----

# Elements of the scores that are in memory at once, or one query's if that is more.
_CHUNK = 1 << 18


class _Problem:
    """One call in the accumulator type, its queries grouped by the key head that serves them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ):
        self.dtype = query.dtype
        self.work = accumulator_dtype(query.dtype)
        self.B, self.Hq, self.L, _ = query.shape
        self.H, self.S = key.shape[1:3]
        self.is_causal, self.scale = is_causal, scale
        self.q, self.k, self.v = self.grouped(query), key.to(self.work), value.to(self.work)
        self.mask = mask

    def grouped(self, x: Tensor) -> Tensor:
        """(B, Hq, L, columns) as (B, H, Hq / H, L, columns)."""
        return x.to(self.work).reshape(self.B, self.H, self.Hq // self.H, self.L, x.shape[-1])

    def ungrouped(self, chunks: list[Tensor]) -> Tensor:
        """The inverse, of chunks of queries (B, H, Hq / H, l, columns), in the caller's type."""
        x = torch.cat(chunks, 3).to(self.dtype)
        return x.reshape(self.B, self.Hq, self.L, x.shape[-1])

    def chunks(self) -> Iterator[slice]:
        """Ranges of the queries."""
        step = max(1, _CHUNK // (self.B * self.Hq * self.S))
        return (slice(start, min(start + step, self.L)) for start in range(0, self.L, step))

    def mask_rows(self, mask: Tensor, rows: slice) -> Tensor:
        """Those rows of a mask, broadcastable to (B, H, Hq / H, l, S)."""
        if mask.shape[2] != 1:
            mask = mask.narrow(2, rows.start, rows.stop - rows.start)
        if mask.shape[1] == 1:
            return mask.unsqueeze(2)
        return mask.reshape(mask.shape[0], self.H, self.Hq // self.H, *mask.shape[2:])

    def weights(self, rows: slice) -> Tensor:
        """p (B, H, Hq / H, l, S), zeros for a query that may look at nothing."""
        x = _outer(_take(self.q, rows), self.k) * self.scale
        if self.mask is not None:
            mask = self.mask_rows(self.mask, rows)
            if mask.dtype == torch.bool:
                x = x.masked_fill(~mask, -math.inf)
            else:
                x = (x + mask.to(x.dtype)).masked_fill(mask == -math.inf, -math.inf)
        if self.is_causal:
            i = torch.arange(rows.start, rows.stop, device=x.device).unsqueeze(1)
            x = x.masked_fill(torch.arange(self.S, device=x.device) > i, -math.inf)
        if self.mask is None:
            return torch.softmax(x, -1)
        empty = (x == -math.inf).all(-1, keepdim=True)
        return torch.softmax(x.masked_fill(empty, 0), -1).masked_fill(empty, 0)

    def score_tangent(
        self, rows: slice, dq: Tensor | None, dk: Tensor | None, dmask: Tensor | None = None
    ) -> Tensor | float:
        """How the scores x move with the queries, the keys and the mask; 0 if with none."""
        x: Tensor | float = 0.0
        if dq is not None:
            x = x + _outer(_take(dq, rows), self.k) * self.scale
        if dk is not None:
            x = x + _outer(_take(self.q, rows), dk) * self.scale
        if dmask is not None:
            x = x + self.mask_rows(dmask, rows).to(self.work)
        return x


# narrow, not [:]; and reshape, not flatten and unflatten: those have rules in torch's older vmap.


def _take(x: Tensor, rows: slice) -> Tensor:
    """Some queries of (B, H, G, L, columns)."""
    return x.narrow(3, rows.start, rows.stop - rows.start)


def _rows(x: Tensor) -> Tensor:
    """(B, H, G, l, columns) as (B, H, G l, columns)."""
    B, H, G, n, columns = x.shape
    return x.reshape(B, H, G * n, columns)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, G, l, D) times the transpose of y (B, H, S, D): (B, H, G, l, S)."""
    return (_rows(x) @ y.transpose(2, 3)).reshape(*x.shape[:4], y.shape[2])


def _along_keys(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, G, l, S) times y (B, H, S, D): (B, H, G, l, D)."""
    return (_rows(x) @ y).reshape(*x.shape[:4], y.shape[3])


def _along_queries(x: Tensor, y: Tensor) -> Tensor:
    """The transpose of x (B, H, G, l, S) times y (B, H, G, l, D): (B, H, S, D), over the group."""
    return _rows(x).transpose(2, 3) @ _rows(y)


def _through_softmax(p: Tensor, dx: Tensor | float) -> Tensor:
    """p * (dx - <p, dx>): the softmax's derivative along dx, and its adjoint, too."""
    return p * (dx - (p * dx).sum(-1, keepdim=True))


def _optional(x: Tensor | None, function: Any) -> Tensor | None:
    return None if x is None else function(x)


def _jvp(tangents: tuple[Tensor | None, ...], inputs: tuple[Any, ...]) -> Tensor:
    """The output's tangent for those of query, key, value and mask."""
    problem = _Problem(*inputs)
    dq = _optional(tangents[0], problem.grouped)
    dk, dv = (_optional(x, lambda x: x.to(problem.work)) for x in tangents[1:3])
    output = []
    for rows in problem.chunks():
        p = problem.weights(rows)
        dx = problem.score_tangent(rows, dq, dk, tangents[3])
        tangent = _along_keys(_through_softmax(p, dx), problem.v)
        if dv is not None:
            tangent = tangent + _along_keys(p, dv)
        output.append(tangent)
    return problem.ungrouped(output)


def _backward_jvp(
    tangents: tuple[Tensor | None, ...], grad_output: Tensor, inputs: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of dq, dk and dv for those of g, query, key, value and mask."""
    problem = _Problem(*inputs)
    scale = problem.scale
    g = problem.grouped(grad_output)
    dg, dq = (_optional(x, problem.grouped) for x in tangents[:2])
    dk, dv = (_optional(x, lambda x: x.to(problem.work)) for x in tangents[2:4])
    query, key, value = [], torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    for rows in problem.chunks():
        q_rows, g_rows = _take(problem.q, rows), _take(g, rows)
        p = problem.weights(rows)
        dp = _outer(g_rows, problem.v)
        ds = _through_softmax(p, dp)
        p_tangent = _through_softmax(p, problem.score_tangent(rows, dq, dk, tangents[4]))
        dp_tangent: Tensor | float = 0.0
        if dg is not None:
            dp_tangent = dp_tangent + _outer(_take(dg, rows), problem.v)
        if dv is not None:
            dp_tangent = dp_tangent + _outer(g_rows, dv)
        centred = dp - (p * dp).sum(-1, keepdim=True)
        shift = (p_tangent * dp + p * dp_tangent).sum(-1, keepdim=True)
        ds_tangent = p_tangent * centred + p * (dp_tangent - shift)
        row = _along_keys(ds_tangent, problem.k)
        key = key + scale * _along_queries(ds_tangent, q_rows)
        value = value + _along_queries(p_tangent, g_rows)
        if dk is not None:
            row = row + _along_keys(ds, dk)
        if dq is not None:
            key = key + scale * _along_queries(ds, _take(dq, rows))
        if dg is not None:
            value = value + _along_queries(p, _take(dg, rows))
        query.append(scale * row)
    return problem.ungrouped(query), key.to(problem.dtype), value.to(problem.dtype)


def _second_order(
    cotangents: tuple[Tensor, Tensor, Tensor], grad_output: Tensor, inputs: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adjoints of g, query, key and value for the cotangents of dq, dk and dv.

    <a, dq> + <b, dk> + <c, dv> = <ds, t> + <p, u> with t = scale (a k^T + q b^T) and u = g c^T. Of
    this sum, w = p * (t - <p, t>) is the adjoint of dp, and that of the scores is p * (e - <p, e>)
    with e = (t - <p, t>) * (dp - <p, dp>) + u.
    """
    problem = _Problem(*inputs)
    scale = problem.scale
    g, a = problem.grouped(grad_output), problem.grouped(cotangents[0])
    b, c = (x.to(problem.work) for x in cotangents[1:])
    grad, query = [], []
    key, value = torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    for rows in problem.chunks():
        q_rows, g_rows = _take(problem.q, rows), _take(g, rows)
        p = problem.weights(rows)
        dp = _outer(g_rows, problem.v)
        t = problem.score_tangent(rows, a, b)
        t_centred = t - (p * t).sum(-1, keepdim=True)
        dp_centred = dp - (p * dp).sum(-1, keepdim=True)
        ds, w = p * dp_centred, p * t_centred
        dx = _through_softmax(p, t_centred * dp_centred + _outer(g_rows, c))
        grad.append(_along_keys(w, problem.v) + _along_keys(p, c))
        query.append(scale * (_along_keys(ds, b) + _along_keys(dx, problem.k)))
        key = key + scale * (_along_queries(ds, _take(a, rows)) + _along_queries(dx, q_rows))
        value = value + _along_queries(w, g_rows)
    return (
        problem.ungrouped(grad),
        problem.ungrouped(query),
        key.to(problem.dtype),
        value.to(problem.dtype),
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward's results, not yet written: output, rounding, row_max and row_sum."""
    dtype = accumulator_dtype(query.dtype)
    columns = value.shape[3]
    output = _new_heads(query, columns)
    rounding = _new_heads(query, columns if dtype != query.dtype else 0)
    row_max, row_sum = (query.new_empty(query.shape[:3], dtype=dtype) for _ in range(2))
    return output, rounding, row_max, row_sum


def new_gradients(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward's results, not yet written."""
    grad_query, grad_key, grad_value = (_new_heads(x, x.shape[3]) for x in (query, key, value))
    return grad_query, grad_key, grad_value


def _fold_mask(info: Any, dim: int | None, mask: Tensor | None, batch: int) -> Tensor | None:
    """The mask of a batch of problems, each of `batch` sequences."""
    if mask is None:
        return None
    rank = mask.dim() - (dim is not None)
    assert rank == 4
    if dim is None and mask.shape[0] == 1:
        return mask
    mask = mask.unsqueeze(0) if dim is None else mask.movedim(dim, 0)
    return mask.expand(info.batch_size, batch, *mask.shape[2:]).flatten(0, 1)


def define(namespace: str) -> Launcher:
    """Define a backend's raw operators in `namespace`; its kernels are registered elsewhere."""
    forward, backward = f"{namespace}::attention_forward", f"{namespace}::attention_backward"
    torch.library.define(
        forward,
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale)"
        " -> (Tensor output, Tensor rounding, Tensor row_max, Tensor row_sum)",
    )
    torch.library.define(
        backward,
        "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask,"
        " Tensor output, Tensor rounding, Tensor row_max, Tensor row_sum, bool is_causal,"
        " float scale)"
        " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    )
    operators = getattr(torch.ops, namespace)
    launcher = Launcher(operators.attention_forward.default, operators.attention_backward.default)
    torch.library.register_fake(forward, new_outputs)
    torch.library.register_fake(backward, new_gradients)

    def forward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        folded = fold(info, in_dims[:3], inputs[:3])
        batch = folded[0].shape[0] // info.batch_size
        mask = _fold_mask(info, in_dims[3], inputs[3], batch)
        outputs = launcher.forward(*folded, mask, *inputs[4:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0, 0, 0)

    def backward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        tensors = (*inputs[:4], *inputs[5:9])
        folded = fold(info, (*in_dims[:4], *in_dims[5:9]), tensors)
        batch = folded[0].shape[0] // info.batch_size
        mask = _fold_mask(info, in_dims[4], inputs[4], batch)
        outputs = launcher.backward(*folded[:4], mask, *folded[4:], *inputs[9:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0, 0)

    torch.library.register_vmap(forward, forward_vmap)
    torch.library.register_vmap(backward, backward_vmap)

    # For whoever calls the operators themselves, and for graphs that hold them.
    def forward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        query, key, value, mask, ctx.is_causal, ctx.scale = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(query, key, value, mask, *output)

    def forward_backward(ctx, grad_output, *_):  # type: ignore[no-untyped-def]
        _refuse_mask_gradient(ctx.needs_input_grad[3])
        gradients = launcher.backward(grad_output, *ctx.saved_tensors, ctx.is_causal, ctx.scale)
        return *gradients, None, None, None

    def backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options = inputs[9:]
        ctx.save_for_backward(*inputs[:5])

    def backward_backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        grad_output, *tensors = ctx.saved_tensors
        adjoints = _second_order(cotangents, grad_output, (*tensors, *ctx.options))
        return *adjoints, *(None,) * 7

    torch.library.register_autograd(forward, forward_backward, setup_context=forward_setup)
    torch.library.register_autograd(backward, backward_backward, setup_context=backward_setup)
    return launcher


LAUNCHERS = {"native": define("fastgpt")}


def _refuse_mask_gradient(wanted: bool) -> None:
    # The public function sends such a call to eager; torch.func hides some from it.
    if wanted:
        raise RuntimeError(
            "scaled_dot_product_attention: the fused kernel has no gradient of attn_mask; use it "
            'inside `with fastgpt.backend("eager"):`'
        )


# ---- the Functions ----


class AttentionBackward(Function):
    """The gradient of `Attention` as an op of its own, so that it has derivatives too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        output: Tensor,
        rounding: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        is_causal: bool,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics = (output, rounding, row_max, row_sum)
        return LAUNCHERS[backend].backward(
            grad_output, query, key, value, attn_mask, *statistics, is_causal, scale
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[9:11]
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        _refuse_mask_gradient(ctx.needs_input_grad[4])
        grad_output, *tensors = ctx.saved_tensors
        adjoints = _second_order(cotangents, grad_output, (*tensors, *ctx.options))  # type: ignore[arg-type]
        return *adjoints, *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        grad_output, *tensors = ctx.saved_tensors
        found = _backward_jvp(tangents[:5], grad_output, (*tensors, *ctx.options))
        return tuple(map(_laid_out, found))


class Attention(Function):
    """Attention of (B, H, N, D) tensors by a backend's kernels.

    apply(query (B, Hq, L, D), key (B, H, S, D), value (B, H, S, Dv), attn_mask (B|1, Hq|1, L|1,
    S|1) or None, is_causal, scale, backend) -> (output (B, Hq, L, Dv), rounding, row_max, row_sum).

    The last three are for the backward and have no gradient. `rounding` is what a 16-bit output
    lost when it was rounded, again in 16 bits (and has no columns for other types): <p, dp> is
    taken as <g, o>, and where the weights are all but certain, ds is smaller than o's rounding. The
    statistics (B, Hq, L), in the accumulator type, are each query's largest score, in units that
    are the backend's own, and the sum over j of exp(x_ij - max x_i); both 0 for a query that may
    look at nothing.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return LAUNCHERS[backend].forward(query, key, value, attn_mask, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[4:]
        # The same tensors for both: torch's vmap rule keeps the batch dimensions of one list only.
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.save_for_forward(*inputs[:4], *output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
        _refuse_mask_gradient(ctx.needs_input_grad[3])
        gradients = AttentionBackward.apply(grad_output, *ctx.saved_tensors, *ctx.options)
        return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        tangent = _laid_out(_jvp(tangents[:4], (*saved[:4], *ctx.options[:2])))
        # Zeros, not None: see CrossEntropy.jvp.
        return tangent, *(torch.zeros_like(x) for x in saved[5:])


# See ops/cross_entropy.py.
torch._dynamo.allow_in_graph(Attention)
torch._dynamo.allow_in_graph(AttentionBackward)
