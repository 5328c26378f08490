"""What the tests compare with: cross-entropy, attention and their gradients in a wider type; error
measures; and the memory that a call holds.

The formulas stand apart from both the kernels and the eager backend; the target's gradient is the
sum of the others', so that it holds at p -> 1.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL_DTYPES = (torch.float32, torch.float64)
REDUCED_DTYPES = (torch.bfloat16, torch.float16)


def half_ulp(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def random_logits(n, classes, *, dtype=torch.float32, scale=1.0, seed=0):
    """Logits (n, classes) from a normal distribution times `scale`, and targets (n,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(classes, (n,), generator=generator)
    return logits.to(dtype), target


def random_like(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """An upstream gradient: normal, of `x`'s shape and type, and no stranger to either sign."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)


def gradient_of(function, logits, upstream):
    """The value of function(logits), and the gradient of the logits for this upstream gradient."""
    return gradients_of(function, [logits], upstream)


def gradients_of(function, inputs, upstream):
    """The value of function(*inputs), and the gradient of each for this upstream gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


def wide(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """`x` as a NumPy array of a wider type: long double for float64, float64 for the rest. An array
    is one already.
    """
    if isinstance(x, np.ndarray):
        return x
    kind = np.longdouble if x.dtype == torch.float64 else np.float64
    return x.detach().double().numpy().astype(kind)


class Exact(NamedTuple):
    """Loss (N,) and gradient (N, C) of rows, as NumPy arrays of a type wider than the input's."""

    loss: np.ndarray
    gradient: np.ndarray


def exact(
    logits: torch.Tensor,
    target: torch.Tensor,
    upstream: torch.Tensor,
    weight: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> Exact:
    """Unreduced loss of (N, C) logits and the gradient for `upstream` (N,), in long double for
    float64 input and float64 for the rest.

    With class weights w and smoothing s: sum over j of c_j (-log p_j), where c_j is s / C w_j and
    at the target (1 - s) w_t more.
    """
    x = wide(logits)
    classes = x.shape[1]
    g = upstream.double().numpy().astype(x.dtype)
    w = np.ones(classes, x.dtype) if weight is None else weight.double().numpy().astype(x.dtype)
    hard, spread = (
        (1 - x.dtype.type(smoothing)) * w[target.numpy()],
        x.dtype.type(smoothing) / classes,
    )
    rows, t = np.arange(x.shape[0]), target.numpy()
    shifted = x - x.max(1, keepdims=True)
    at_target = shifted[rows, t]
    others = np.exp(shifted)
    others[rows, t] = 0
    rest = others.sum(1)
    total = rest + np.exp(at_target)
    # Where the target is the maximum, log(total) = log1p(rest) without the cancellation.
    nll = np.where(at_target == 0, np.log1p(rest), np.log(total) - at_target)
    loss = hard * nll
    gradient = (hard + spread * w.sum())[:, None] * others / total[:, None]
    gradient[rows, t] = -hard * rest / total
    if smoothing:
        loss += spread * (w * (nll[:, None] + at_target[:, None] - shifted)).sum(1)
        gradient -= spread * w
        gradient[rows, t] += spread * w.sum() * np.exp(at_target) / total
    return Exact(loss, gradient * g[:, None])


class Errors(NamedTuple):
    """The largest errors of a batch, each relative to the largest magnitude of its own kind."""

    loss: float = 0.0
    target_column: float = 0.0  # of the gradient
    other_columns: float = 0.0

    def pooled(self, other: "Errors") -> "Errors":
        return Errors(*map(max, self, other))


def errors(loss, gradient, target, truth: Exact) -> Errors:
    rows, t = np.arange(len(target)), target.numpy()

    def relative(got, want):
        difference, size = abs(got - want), abs(want)
        if difference.ndim == 2:  # the target column is a kind of its own
            difference[rows, t] = size[rows, t] = 0
        if size.max(initial=0) == 0:
            assert difference.max(initial=0) == 0, "expected zeros"
            return 0.0
        return float(difference.max() / size.max())

    got, want = gradient.double().numpy(), truth.gradient
    return Errors(
        relative(loss.double().numpy(), truth.loss),
        relative(got[rows, t], want[rows, t]),
        relative(got, want),
    )


class ExactOptions(NamedTuple):
    """Loss and lse (N,) and the gradients (N, C) of rows, as NumPy arrays of a wider type."""

    loss: np.ndarray
    lse: np.ndarray
    gradient: np.ndarray
    target_gradient: np.ndarray | None  # of probabilities


def exact_options(
    logits: torch.Tensor | np.ndarray,
    target: torch.Tensor,
    upstream: torch.Tensor,
    upstream_lse: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    smoothing: float = 0.0,
    softcap: float | None = None,
) -> ExactOptions:
    """Unreduced loss and lse of (N, C) logits, a tensor or an array of a wide type already, and the
    gradients for `upstream` and `upstream_lse` (N,), for targets that are classes (N,) or
    probabilities (N, C).

    With y = k tanh(x / k) for a softcap of k: sum over j of c_j (lse - y_j), where c_j is
    s / C w_j and (1 - s) w_j q_j more, and q_j of a class is 1 at the class.
    """
    x = wide(logits)
    kind, classes, rows = x.dtype.type, x.shape[1], np.arange(len(x))

    def as_wide(tensor):
        return tensor.detach().double().numpy().astype(x.dtype)

    slope = np.ones_like(x)
    if softcap:
        with np.errstate(over="ignore"):
            slope = 1 / np.cosh(x / kind(softcap)) ** 2
        x = kind(softcap) * np.tanh(x / kind(softcap))
    w = np.ones(classes, x.dtype) if weight is None else as_wide(weight)
    hard, spread = 1 - kind(smoothing), kind(smoothing) / classes
    g = as_wide(upstream)[:, None]
    g_lse = np.zeros_like(g) if upstream_lse is None else as_wide(upstream_lse)[:, None]

    highest = x.max(1)
    shifted = x - highest[:, None]
    powers = np.exp(shifted)
    first = x.argmax(1)
    below = powers.copy()  # all but one largest, so that their sum keeps what is small beside it
    below[rows, first] = 0
    log_total = np.log1p(below.sum(1))
    p = powers / powers.sum(1, keepdims=True)
    of_each = log_total[:, None] - shifted  # lse - y, none below zero
    lse = highest + log_total
    if target.is_floating_point():
        c = hard * w * as_wide(target) + spread * w
        gradient = slope * (g * (c.sum(1, keepdims=True) * p - c) + g_lse * p)
        return ExactOptions((c * of_each).sum(1), lse, gradient, g * hard * w * of_each)
    t = target.numpy()
    others = powers.copy()
    others[rows, t] = 0
    at_target = hard * w[t][:, None]
    smooth = spread * w
    gradient = g * (at_target * p + smooth.sum() * p - smooth) + g_lse * p
    confident = -others.sum(1) / powers.sum(1)  # p - 1
    gradient[rows, t] = (
        g[:, 0] * (at_target[:, 0] * confident + smooth.sum() * p[rows, t] - smooth[t])
        + g_lse[:, 0] * p[rows, t]
    )
    loss = at_target[:, 0] * of_each[rows, t] + (smooth * of_each).sum(1)
    return ExactOptions(loss, lse, slope * gradient, None)


def torchs_composition(
    logits, target, weight=None, *, reduction="mean", label_smoothing=0.0, ignore_index=-100,
    softcap=None, z_loss=0.0, return_lse=False,
):  # fmt: skip
    """`fastgpt.cross_entropy` with its further keywords, in torch's own functions."""
    of_classes = not target.is_floating_point()
    classes = 1 if logits.dim() > 1 else 0
    ignored = target == ignore_index
    if of_classes:
        logits = logits.masked_fill(ignored.unsqueeze(classes), 0)
    y = softcap * torch.tanh(logits / softcap) if softcap else logits
    loss = F.cross_entropy(
        y, target, weight,
        reduction=reduction, label_smoothing=label_smoothing, ignore_index=ignore_index,
    )  # fmt: skip
    lse = torch.logsumexp(y, classes)
    count = lse.numel()
    if of_classes:
        lse = lse.masked_fill(ignored, 0)
        count = (~ignored).sum()
    if z_loss:
        squares = lse.square()
        if reduction == "mean":
            loss = loss + z_loss * squares.sum() / count
        else:
            loss = loss + z_loss * (squares if reduction == "none" else squares.sum())
    return (loss, lse) if return_lse else loss


def random_weight(classes, dtype=torch.float64, seed=5):
    """(C,) between 0.5 and 1.5, and zero for every seventh class."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5
    weight[3::7] = 0
    return weight.to(dtype)


def random_probabilities(logits, dtype=None, seed=7):
    """Shaped like `logits`, positive, and not of sum 1."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    return (q / q.shape[min(1, q.dim() - 1)] * 3).to(dtype or logits.dtype)


def relative_error(got: torch.Tensor, want: np.ndarray) -> float:
    """The largest error, relative to the largest magnitude of the truth."""
    difference, size = abs(got.double().numpy() - want).max(initial=0), abs(want).max(initial=0)
    if size == 0:
        assert difference == 0, "expected zeros"
        return 0.0
    return float(difference / size)


def within_half_ulp(got: torch.Tensor, want: np.ndarray, slack: float, flushed=0.0) -> bool:
    """Whether every element is `want` rounded once to its type; `slack` is the relative error of
    the arithmetic before. Numbers up to `flushed` may be zero instead.
    """
    info = torch.finfo(got.dtype)
    tiny = max(flushed, 0.5 * info.smallest_normal * info.eps)
    bound = (half_ulp(got.dtype) + slack) * abs(want) + tiny
    return bool((abs(got.double().numpy() - want) <= bound).all())


# ---- attention ----

TENSORS = ("output", "grad_query", "grad_key", "grad_value")


def random_qkv(
    B=2, Hq=2, H=2, L=5, S=7, D=8, Dv=8, *, dtype=torch.float64, size=1.0, offset=0.0, seed=0
):
    """Query (B, Hq, L, D), key (B, H, S, D) and value (B, H, S, Dv): normal, times `size`, plus
    `offset`.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, Hq, L, D), (B, H, S, D), (B, H, S, Dv)
    return [
        (torch.randn(s, generator=generator, dtype=torch.float64) * size + offset).to(dtype)
        for s in shapes
    ]


def upstream_for(query, value, seed=1):
    """A random upstream gradient (..., Hq, L, Dv) of the output."""
    return random_like(query.new_empty(*query.shape[:-1], value.shape[-1]), seed)


def attention_gradients(function, inputs, upstream=None, **options):
    """The output and the gradients of query, key and value."""
    if upstream is None:
        upstream = upstream_for(inputs[0], inputs[2])
    return gradients_of(lambda *x: function(*x, **options), inputs, upstream)


def random_mask(*shape, seed=1):
    """bool, at least one key for each query."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(shape, generator=generator) < 0.6
    allowed[..., :1] = True
    return allowed


def additive(allowed, dtype=torch.float64):
    """A random additive mask, -inf where a boolean one is False."""
    return random_like(torch.empty(allowed.shape, dtype=dtype)).masked_fill(~allowed, -math.inf)


def exact_attention(query, key, value, upstream, **options) -> tuple[np.ndarray, ...]:
    """Output and the gradients of query, key and value, for 4-dimensional inputs in a wider type;
    the options as in `exact_attention_options`.
    """
    truth = exact_attention_options(query, key, value, upstream, **options)
    return truth.output, truth.grad_query, truth.grad_key, truth.grad_value


class ExactAttention(NamedTuple):
    """Of 4-dimensional inputs, as NumPy arrays of a wider type."""

    output: np.ndarray
    lse: np.ndarray
    grad_query: np.ndarray
    grad_key: np.ndarray
    grad_value: np.ndarray
    grad_mask: np.ndarray | None  # of the mask's own shape, if it is added
    grad_sinks: np.ndarray | None
    weights: np.ndarray  # (B, Hq, L, S), before dropout


def exact_attention_options(
    query, key, value, upstream, upstream_lse=None, *,
    attn_mask=None, is_causal=False, scale=None, enable_gqa=False, causal_alignment="top_left",
    window=None, softcap=None, alibi_slopes=None, sinks=None, cu_seqlens_q=None, cu_seqlens_k=None,
    keep=None, dropout_p=0.0,
) -> ExactAttention:  # fmt: skip
    """What `scaled_dot_product_attention` and its backward give for upstream gradients of output
    and lse, for 4-dimensional inputs in a wider type.

        Y = scale Q K^T    X = softcap tanh(Y / softcap) + mask - slope |distance|
        [P, p_sink] = softmax([X, sink])    lse = logsumexp([X, sink])    O = (R P) V
        dP = R (dO V^T)    delta = rowsum(P dP) - dlse    dX = P (dP - delta)
        dQ = scale dY K    dK = scale dY^T Q    dV = (R P)^T dO    dsink = -p_sink delta

    R is 1 / (1 - dropout_p) where `keep` (B, Hq, L, S) says so and else 0. Keys and values are
    summed over the group of query heads that share them, whether or not `enable_gqa` is said.
    """
    q, k, v, g = map(wide, (query, key, value, upstream))
    kind = q.dtype.type
    (B, Hq, L, D), (H, S) = q.shape, k.shape[1:3]
    k, v = (x.repeat(Hq // H, axis=1) for x in (k, v))
    scale = 1 / np.sqrt(kind(D)) if scale is None else kind(scale)

    def as_wide(x):
        return x.detach().double().numpy().astype(q.dtype)

    x = q @ k.mT * scale
    slope = np.ones_like(x)
    if softcap:
        with np.errstate(over="ignore"):
            slope = 1 / np.cosh(x / kind(softcap)) ** 2
        x = kind(softcap) * np.tanh(x / kind(softcap))
    seen, distance = visible(L, S, is_causal, causal_alignment, window, cu_seqlens_q, cu_seqlens_k)
    if alibi_slopes is not None:
        x = x - as_wide(alibi_slopes)[..., None, None] * distance
    added = attn_mask is not None and attn_mask.dtype != torch.bool
    if added:
        x = x + as_wide(attn_mask)
    elif attn_mask is not None:
        x = np.where(attn_mask.numpy(), x, -np.inf)
    x = np.where(seen, x, -np.inf)
    sink = np.full((Hq,), -np.inf, q.dtype) if sinks is None else as_wide(sinks)
    joined = np.concatenate([x, np.broadcast_to(sink[:, None, None], (B, Hq, L, 1))], -1)
    highest = joined.max(-1, keepdims=True)
    highest = np.where(highest == -np.inf, 0, highest)
    powers = np.exp(joined - highest)
    total = powers.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (highest + np.log(total))[..., 0]
    joined_p = powers / np.where(total == 0, 1, total)
    p, p_sink = joined_p[..., :-1], joined_p[..., -1:]
    r = np.ones_like(p)
    if keep is not None:
        r = keep.numpy() * kind(1 / (1 - dropout_p) if dropout_p < 1 else 0)
    dp = r * (g @ v.mT)
    delta = (p * dp).sum(-1, keepdims=True)
    if upstream_lse is not None:
        delta = delta - as_wide(upstream_lse)[..., None]
    dx = p * (dp - delta)
    dy = dx * slope * scale

    def of_group(gradient):
        return gradient.reshape(B, H, Hq // H, S, -1).sum(2)

    return ExactAttention(
        (r * p) @ v,
        lse,
        dy @ k,
        of_group(dy.mT @ q),
        of_group((r * p).mT @ g),
        sum_to(dx, attn_mask.shape) if added else None,
        None if sinks is None else sum_to(-p_sink * delta, (Hq, 1, 1)).reshape(Hq),
        p,
    )


def visible(
    L, S, is_causal=False, causal_alignment="top_left", window=None,
    cu_seqlens_q=None, cu_seqlens_k=None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(L, S) each: the keys that a query sees by their places, and how far they are from its own
    place. One query after the other, in each document from its own begin.
    """
    of_queries = [0, L] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    of_keys = [0, S] if cu_seqlens_q is None else (of_queries if cu_seqlens_k is None else
                                                   cu_seqlens_k.tolist())  # fmt: skip
    left, right = (-1, -1) if window is None else window
    seen, distance = np.zeros((L, S), bool), np.zeros((L, S), int)
    for document in range(len(of_queries) - 1):
        first_query, behind_queries = of_queries[document : document + 2]
        first_key, behind_keys = of_keys[document : document + 2]
        for i in range(first_query, behind_queries):
            if causal_alignment == "top_left":
                place = first_key + (i - first_query)
            else:
                place = behind_keys - (behind_queries - i)
            for j in range(first_key, behind_keys):
                seen[i, j] = (
                    (left == -1 or j >= place - left)
                    and (right == -1 or j <= place + right)
                    and (not is_causal or j <= place)
                )
                distance[i, j] = abs(place - j)
    return seen, distance


def sum_to(x: np.ndarray, shape) -> np.ndarray:
    """The sum over what broadcasting `shape` to that of `x` repeats."""
    padded = (1,) * (x.ndim - len(shape)) + tuple(shape)
    axes = tuple(i for i, n in enumerate(padded) if n == 1)
    return x.sum(axes, keepdims=True).reshape(shape)


def composed_attention(
    query, key, value, attn_mask=None, *, keep=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False, causal_alignment="top_left", window=None, softcap=None, alibi_slopes=None,
    sinks=None, return_lse=False, cu_seqlens_q=None, cu_seqlens_k=None,
):  # fmt: skip
    """`fastgpt.scaled_dot_product_attention` of (..., Hq, L, D) in torch's own functions, in which
    torch has every derivative. `keep`: what dropout leaves.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    L, S = query.shape[-2], key.shape[-2]
    x = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    seen, distance = visible(L, S, is_causal, causal_alignment, window, cu_seqlens_q, cu_seqlens_k)
    allowed = torch.from_numpy(seen).to(x.device)
    if alibi_slopes is not None:
        x = x - alibi_slopes[..., None, None] * torch.from_numpy(distance).to(x)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:
        x = x + attn_mask
    x = torch.where(allowed, x, -math.inf)
    if sinks is not None:
        x = torch.cat([x, sinks[:, None, None].expand(*x.shape[:-1], 1).to(x)], -1)
    empty = (x == -math.inf).all(-1, keepdim=True)
    x = torch.where(empty, 0.0, x)
    p = torch.where(empty, 0.0, torch.softmax(x, -1))[..., :S]
    lse = torch.where(empty.squeeze(-1), -math.inf, torch.logsumexp(x, -1))
    if keep is not None:
        p = p * keep / (1 - dropout_p)
    return (p @ value, lse) if return_lse else p @ value


def attention_results(
    function, inputs, upstream, upstream_lse=None, *, learn=("attn_mask", "sinks"), **options
) -> dict[str, torch.Tensor]:
    """By the names of `ExactAttention`: output, lse if it has an upstream gradient, and the
    gradients of the inputs and of what is to `learn` among the options.
    """
    names = ("query", "key", "value")
    leaves = {name: x.detach().requires_grad_() for name, x in zip(names, inputs, strict=True)}
    for name in learn:
        x = options.get(name)
        if x is not None and x.is_floating_point():
            leaves[name] = options.pop(name).detach().requires_grad_()
    if upstream_lse is None:
        outputs, upstreams = (function(**leaves, **options),), (upstream,)
    else:
        outputs = function(**leaves, **options, return_lse=True)
        upstreams = upstream, upstream_lse.to(outputs[1].dtype)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstreams)
    found = dict(zip(("output", "lse"), (x.detach() for x in outputs), strict=False))
    for name, gradient in zip(leaves, gradients, strict=True):
        found[f"grad_{name.removeprefix('attn_')}"] = gradient
    return found


def relative_errors(found, truth) -> list[float]:
    """The largest error of each tensor, relative to the largest magnitude of its truth."""
    return [
        float(abs(got.double().numpy() - want).max() / abs(want).max())
        for got, want in zip(found, truth, strict=True)
    ]
