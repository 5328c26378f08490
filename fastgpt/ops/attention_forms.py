"""The derivatives of attention in torch operations, so that they can be differentiated again.

With y = scale q k^T the products, C the softcap (or nothing) and b the mask and ALiBi's bias, of
one head:

    x = C(y) + b, -inf where a key is hidden    p = softmax([x, sink])    lse = logsumexp([x, sink])
    o = (R * p) v                               R = kept / (1 - dropout_p), or 1

The sink is one more column, with p_s of the weight and no value. For the upstream gradients g of o
and h of lse, with sums over the keys and, where it says so, over the sink's column too:

    D = R * (g v^T)       delta = sum p D - h       ds = p * (D - delta)    dy = ds * C'(y)
    dq = scale dy k       dk = scale dy^T q         dv = (R * p)^T g
    dmask = ds            dsink = -p_s delta

These run in kernels; here are their tangents, and the adjoints of their inputs for cotangents of
them. They take the queries in chunks, so that their memory is linear in the sequence, too, unless
autograd records them for another order.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops.dropout import keep_mask, rescale
from fastgpt.ops.raw import accumulator_dtype

UNLIMITED = 1 << 30  # a side of a window without an end; no sequence is as long


class Options(NamedTuple):
    """What the raw operators take beside tensors.

    Query i stands at the key position p = i + offset and sees the keys p - left ... p + right;
    where there are documents, `spans` says all of that instead.
    """

    left: int
    right: int
    offset: int
    scale: float
    softcap: float  # 0: none
    dropout_p: float


class Inputs(NamedTuple):
    """The tensors of a call in the form of the raw operators."""

    query: Tensor  # (B, Hq, L, D)
    key: Tensor  # (B, H, S, D), Hq a multiple of H
    value: Tensor  # (B, H, S, Dv)
    attn_mask: Tensor | None  # (B or 1, Hq or 1, L or 1, S or 1), bool or floating
    alibi_slopes: Tensor | None  # (B or 1, Hq), the accumulator type
    sinks: Tensor | None  # the same
    spans: Tensor | None  # (3, L) int64: the first key that query i sees, the one behind its last,
    # and its own place among the keys; the first two never fall
    seeds: Tensor | None  # (B,) int64, if there is dropout


class Tangents(NamedTuple):
    """Of those inputs that have any; None is zero."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    attn_mask: Tensor | None
    sinks: Tensor | None


class _Rows(NamedTuple):
    """A chunk of queries (B, H, Hq / H, l, ...), and what the formulas above make of it."""

    rows: slice
    q: Tensor
    p: Tensor
    p_sink: Tensor | None  # (..., 1)
    kept: Tensor | None  # R
    slope: Tensor | None  # C'(y); None is 1
    bend: Tensor | None  # C''(y); None is 0


class Problem:
    """One call in the accumulator type, its queries grouped by the key head that serves them."""

    def __init__(self, inputs: Inputs, options: Options):
        self.inputs, self.options = inputs, options
        query, key, value = inputs[:3]
        self.dtype = query.dtype
        self.work = accumulator_dtype(query.dtype)
        self.B, self.Hq, self.L, _ = query.shape
        self.H, self.S = key.shape[1:3]
        self.q, self.k, self.v = self.grouped(query), key.to(self.work), value.to(self.work)

    # narrow, not [:]; and reshape, not flatten and unflatten: those have rules in torch's older
    # vmap.

    def grouped(self, x: Tensor) -> Tensor:
        """(B, Hq, L, ...) as (B, H, Hq / H, L, ...)."""
        return x.to(self.work).reshape(self.B, self.H, self.Hq // self.H, *x.shape[2:])

    def ungrouped(self, chunks: list[Tensor]) -> Tensor:
        """The inverse, of chunks of queries (B, H, Hq / H, l, columns), in the caller's type."""
        x = torch.cat(chunks, 3).to(self.dtype)
        return x.reshape(self.B, self.Hq, *x.shape[3:])

    def rows_of(self, chunks: list[Tensor]) -> Tensor:
        """The same of a number for each query (..., l, 1): (B, Hq, L), in the accumulator type."""
        return torch.cat(chunks, 3).reshape(self.B, self.Hq, self.L)

    def by_head(self, x: Tensor) -> Tensor:
        """(B or 1, Hq) as (B or 1, H, Hq / H, 1, 1)."""
        return x.to(self.work).reshape(x.shape[0], self.H, self.Hq // self.H, 1, 1)

    def chunks(self) -> Iterator[_Rows]:
        step = max(1, _CHUNK // (self.B * self.Hq * self.S))
        for start in range(0, self.L, step):
            yield self._rows(slice(start, min(start + step, self.L)))

    def _rows(self, rows: slice) -> _Rows:
        q = take(self.q, rows)
        y = outer(q, self.k) * self.options.scale
        slope = bend = None
        if self.options.softcap:
            t = torch.tanh(y / self.options.softcap)
            y, slope = t * self.options.softcap, 1 - t * t
            bend = -2 / self.options.softcap * t * slope
        p, p_sink = self._softmax(self._biased(y, rows))
        kept = None
        if self.inputs.seeds is not None:
            n, dropout_p = rows.stop - rows.start, self.options.dropout_p
            kept = keep_mask(self.inputs.seeds, self.Hq, rows.start, n, self.S, dropout_p)
            kept = self.grouped(kept) * rescale(dropout_p)
        return _Rows(rows, q, p, p_sink, kept, slope, bend)

    def _biased(self, x: Tensor, rows: slice) -> Tensor:
        """The scores with what is added to them, and -inf for what is hidden."""
        j = torch.arange(self.S, device=x.device)
        begin, end, place = self._spans(rows)
        if self.inputs.alibi_slopes is not None:
            distance = (place.unsqueeze(1) - j).abs()
            x = x - self.by_head(self.inputs.alibi_slopes) * distance
        mask = self.inputs.attn_mask
        if mask is not None:
            mask = self.mask_rows(mask, rows)
            if mask.dtype == torch.bool:
                x = x.masked_fill(~mask, -math.inf)
            else:
                x = (x + mask.to(x.dtype)).masked_fill(mask == -math.inf, -math.inf)
        hidden = (j < begin.unsqueeze(1)) | (j >= end.unsqueeze(1))
        return x.masked_fill(hidden, -math.inf)

    def _spans(self, rows: slice) -> tuple[Tensor, ...]:
        """The first key that each query sees, the one behind its last, and its own place."""
        spans, options = self.inputs.spans, self.options
        if spans is not None:
            return spans.narrow(1, rows.start, rows.stop - rows.start).unbind(0)
        place = torch.arange(rows.start, rows.stop, device=self.q.device) + options.offset
        return place - options.left, place + options.right + 1, place

    def _softmax(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Zeros for a query that may look at nothing."""
        if self.inputs.sinks is not None:
            sink = self.by_head(self.inputs.sinks).expand(*x.shape[:-1], 1)
            x = torch.cat([x, sink], -1)
        empty = (x == -math.inf).all(-1, keepdim=True)
        p = torch.softmax(x.masked_fill(empty, 0), -1).masked_fill(empty, 0)
        if self.inputs.sinks is None:
            return p, None
        return p.narrow(-1, 0, self.S), p.narrow(-1, self.S, 1)

    def mask_rows(self, mask: Tensor, rows: slice) -> Tensor:
        """Those rows of a mask, broadcastable to (B, H, Hq / H, l, S)."""
        if mask.shape[2] != 1:
            mask = mask.narrow(2, rows.start, rows.stop - rows.start)
        if mask.shape[1] == 1:
            return mask.unsqueeze(2)
        return mask.reshape(mask.shape[0], self.H, self.Hq // self.H, *mask.shape[2:])

    def product_tangent(self, x: _Rows, dq: Tensor | None, dk: Tensor | None) -> Tensor | float:
        """How the products y move with the queries and the keys; 0 if with neither."""
        y: Tensor | float = 0.0
        if dq is not None:
            y = y + outer(take(dq, x.rows), self.k) * self.options.scale
        if dk is not None:
            y = y + outer(x.q, dk) * self.options.scale
        return y

    def score_tangent(self, x: _Rows, moved: Tensor | float, dmask: Tensor | None) -> Any:
        """How the scores x move where the products do by `moved`, and with the mask."""
        if x.slope is not None:
            moved = moved * x.slope
        if dmask is not None:
            moved = moved + self.mask_rows(dmask, x.rows).to(self.work)
        return moved

    def weight_tangents(
        self, x: _Rows, moved: Any, dsinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Those of p, p_s and lse, for the scores'."""
        lse = (x.p * moved).sum(-1, keepdim=True)
        sink: Any = 0.0
        if dsinks is not None and x.p_sink is not None:
            sink = self.by_head(dsinks)
            lse = lse + x.p_sink * sink
        p_sink = None if x.p_sink is None else x.p_sink * (sink - lse)
        return x.p * (moved - lse), p_sink, lse

    def weight_gradient(self, x: _Rows, g_rows: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """D and delta of some queries, for their rows of g and all of h, which may be None."""
        D = times(outer(g_rows, self.v), x.kept)
        delta = (x.p * D).sum(-1, keepdim=True)
        return D, delta if h is None else delta - take(h, x.rows).unsqueeze(-1)


# Elements of the scores that are in memory at once, or one query's if that is more.
_CHUNK = 1 << 18


def take(x: Tensor, rows: slice) -> Tensor:
    """Some queries of (B, H, G, L, ...)."""
    return x.narrow(3, rows.start, rows.stop - rows.start)


def _together(x: Tensor) -> Tensor:
    """(B, H, G, l, columns) as (B, H, G l, columns)."""
    B, H, G, n, columns = x.shape
    return x.reshape(B, H, G * n, columns)


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, G, l, D) times the transpose of y (B, H, S, D): (B, H, G, l, S)."""
    return (_together(x) @ y.transpose(2, 3)).reshape(*x.shape[:4], y.shape[2])


def along_keys(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, G, l, S) times y (B, H, S, D): (B, H, G, l, D)."""
    return (_together(x) @ y).reshape(*x.shape[:4], y.shape[3])


def along_queries(x: Tensor, y: Tensor) -> Tensor:
    """The transpose of x (B, H, G, l, S) times y (B, H, G, l, D): (B, H, S, D), over the group."""
    return _together(x).transpose(2, 3) @ _together(y)


def times(x: Any, factor: Tensor | None) -> Any:
    return x if factor is None else x * factor


def sum_to(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The adjoint of broadcasting from `shape`, of as many dimensions."""
    dims = [i for i, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n == 1 and m != 1]
    return x.sum(dims, keepdim=True) if dims else x


def _optional(x: Tensor | None, function: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if x is None else function(x)


class _MaskGradient:
    """Sums chunks of the gradient of the scores to the mask's shape."""

    def __init__(self, problem: Problem, mask: Tensor):
        self.problem, self.shape = problem, mask.shape
        self.parts: list[Tensor] = []

    def add(self, ds: Tensor) -> None:
        problem = self.problem
        ds = ds.reshape(problem.B, problem.Hq, *ds.shape[3:])
        ds = sum_to(ds, (*self.shape[:2], 1 if self.shape[2] == 1 else ds.shape[2], self.shape[3]))
        if self.parts and self.shape[2] == 1:
            ds = self.parts.pop() + ds
        self.parts.append(ds)

    def result(self) -> Tensor:
        return torch.cat(self.parts, 2)


def forward_tangents(tangents: Tangents, inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Those of the output (B, Hq, L, Dv) and of lse (B, Hq, L)."""
    problem = Problem(inputs, options)
    dq = _optional(tangents.query, problem.grouped)
    dk, dv = (_optional(x, lambda x: x.to(problem.work)) for x in (tangents.key, tangents.value))
    output, lse = [], []
    for x in problem.chunks():
        moved = problem.score_tangent(x, problem.product_tangent(x, dq, dk), tangents.attn_mask)
        p_tangent, _, lse_tangent = problem.weight_tangents(x, moved, tangents.sinks)
        tangent = along_keys(times(p_tangent, x.kept), problem.v)
        if dv is not None:
            tangent = tangent + along_keys(times(x.p, x.kept), dv)
        output.append(tangent)
        lse.append(lse_tangent)
    return problem.ungrouped(output), problem.rows_of(lse)


class Gradients(NamedTuple):
    """What `AttentionBackward` returns, and cotangents of it."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor  # shaped like the mask, in the accumulator type; (B, 0) if not asked for
    sinks: Tensor  # (B, Hq, L), each query's share, in the accumulator type; (B, 0, 0) without


def backward_tangents(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    grad_output_tangent: Tensor | None,
    grad_lse_tangent: Tensor | None,
    tangents: Tangents,
    inputs: Inputs,
    options: Options,
    of_mask: bool,
) -> Gradients:
    """The tangents of the gradients for those of the upstream gradients and of the inputs."""
    problem = Problem(inputs, options)
    scale = options.scale
    g, h = problem.grouped(grad_output), _optional(grad_lse, problem.grouped)
    dg, dh, dq = (
        _optional(x, problem.grouped)
        for x in (grad_output_tangent, grad_lse_tangent, tangents.query)
    )
    dk, dv = (_optional(x, lambda x: x.to(problem.work)) for x in (tangents.key, tangents.value))
    query, sinks = [], []
    key, value = torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    mask = _MaskGradient(problem, inputs.attn_mask) if of_mask else None  # type: ignore[arg-type]
    for x in problem.chunks():
        g_rows = take(g, x.rows)
        y_tangent = problem.product_tangent(x, dq, dk)
        moved = problem.score_tangent(x, y_tangent, tangents.attn_mask)
        p_tangent, p_sink_tangent, _ = problem.weight_tangents(x, moved, tangents.sinks)
        D, delta = problem.weight_gradient(x, g_rows, h)
        D_tangent: Tensor | float = 0.0
        if dg is not None:
            D_tangent = D_tangent + outer(take(dg, x.rows), problem.v)
        if dv is not None:
            D_tangent = D_tangent + outer(g_rows, dv)
        D_tangent = times(D_tangent, x.kept)
        delta_tangent = (p_tangent * D + x.p * D_tangent).sum(-1, keepdim=True)
        if dh is not None:
            delta_tangent = delta_tangent - take(dh, x.rows).unsqueeze(-1)
        ds = x.p * (D - delta)
        ds_tangent = p_tangent * (D - delta) + x.p * (D_tangent - delta_tangent)
        if mask is not None:
            mask.add(ds_tangent)
        if x.p_sink is not None and p_sink_tangent is not None:
            sinks.append(-(p_sink_tangent * delta + x.p_sink * delta_tangent))
        dy, dy_tangent = times(ds, x.slope), times(ds_tangent, x.slope)
        if x.bend is not None:
            dy_tangent = dy_tangent + ds * x.bend * y_tangent
        row = along_keys(dy_tangent, problem.k)
        key = key + scale * along_queries(dy_tangent, x.q)
        value = value + along_queries(times(p_tangent, x.kept), g_rows)
        if dk is not None:
            row = row + along_keys(dy, dk)
        if dq is not None:
            key = key + scale * along_queries(dy, take(dq, x.rows))
        if dg is not None:
            value = value + along_queries(times(x.p, x.kept), take(dg, x.rows))
        query.append(scale * row)
    return Gradients(
        problem.ungrouped(query),
        key.to(problem.dtype),
        value.to(problem.dtype),
        key.new_empty(problem.B, 0) if mask is None else mask.result(),
        problem.rows_of(sinks) if sinks else key.new_empty(problem.B, 0, 0),
    )


class Adjoints(NamedTuple):
    """Of the upstream gradients and the inputs, for cotangents of the gradients."""

    grad_output: Tensor
    grad_lse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    sinks: Tensor | None


def second_order(
    cotangents: tuple[Tensor | None, ...],
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    options: Options,
    of_mask: bool,
    wants_mask: bool,
) -> Adjoints:
    """The adjoints for the cotangents a of dq, b of dk, c of dv, e of dmask and f of dsink.

    They pair with the gradients to

        <ds, t> + <p, u> + <ds_s, f>,  t = C'(y) T + e,  T = scale (a k^T + q b^T),  u = R * (g c^T)

    With T_ = sum p t over all columns, the sink's with t = f, the adjoint of D is w = p (t - T_),
    that of h is T_, and that of the scores p (z - sum p z) with z = (D - delta) (t - T_) + u, in
    which the sink has D = u = 0; the products get C'(y) times that, and ds C''(y) T.
    """
    problem = Problem(inputs, options)
    scale = options.scale
    g, h = problem.grouped(grad_output), _optional(grad_lse, problem.grouped)
    a = _optional(cotangents[0], problem.grouped)
    b, c = (_optional(x, lambda x: x.to(problem.work)) for x in cotangents[1:3])
    e = cotangents[3] if of_mask else None
    f = _optional(cotangents[4] if inputs.sinks is not None else None, problem.grouped)
    grad, of_lse, query, sinks = [], [], [], []
    key, value = torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    mask = _MaskGradient(problem, inputs.attn_mask) if wants_mask else None  # type: ignore[arg-type]
    for x in problem.chunks():
        g_rows = take(g, x.rows)
        D, delta = problem.weight_gradient(x, g_rows, h)
        T = problem.product_tangent(x, a, b)
        t = problem.score_tangent(x, T, e)
        mean = (x.p * t).sum(-1, keepdim=True)
        t_sink: Tensor | float = 0.0
        if f is not None and x.p_sink is not None:
            t_sink = take(f, x.rows).unsqueeze(-1)
            mean = mean + x.p_sink * t_sink
        w = x.p * (t - mean)
        z = (D - delta) * (t - mean)
        row, p_kept = along_keys(times(w, x.kept), problem.v), times(x.p, x.kept)
        if c is not None:
            z = z + times(outer(g_rows, c), x.kept)
            row = row + along_keys(p_kept, c)
        z_mean = (x.p * z).sum(-1, keepdim=True)
        if x.p_sink is not None:
            z_sink = -delta * (t_sink - mean)
            z_mean = z_mean + x.p_sink * z_sink
            sinks.append(x.p_sink * (z_sink - z_mean))
        dx = x.p * (z - z_mean)
        if mask is not None:
            mask.add(dx)
        ds = x.p * (D - delta)
        dy, dY = times(ds, x.slope), times(dx, x.slope)
        if x.bend is not None:
            dY = dY + ds * x.bend * T
        of_query = along_keys(dY, problem.k)
        key = key + scale * along_queries(dY, x.q)
        value = value + along_queries(times(w, x.kept), g_rows)
        if a is not None:
            key = key + scale * along_queries(dy, take(a, x.rows))
        if b is not None:
            of_query = of_query + along_keys(dy, b)
        grad.append(row)
        of_lse.append(mean)
        query.append(scale * of_query)
    of_sinks = None
    if inputs.sinks is not None:
        of_sinks = sum_to(problem.rows_of(sinks).sum(2), inputs.sinks.shape)
    return Adjoints(
        problem.ungrouped(grad),
        None if grad_lse is None else problem.rows_of(of_lse).to(grad_lse.dtype),
        problem.ungrouped(query),
        key.to(problem.dtype),
        value.to(problem.dtype),
        None if mask is None else mask.result().to(inputs.attn_mask.dtype),  # type: ignore[union-attr]
        of_sinks,
    )
