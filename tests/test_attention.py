"""Values and gradients of attention: accuracy, masks, strides, determinism, memory."""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    REDUCED_DTYPES,
    TENSORS,
    additive,
    attention_gradients,
    exact_attention,
    gradient_of,
    gradients_of,
    half_ulp,
    random_like,
    random_mask,
    random_qkv,
    relative_errors,
    upstream_for,
)

import fastgpt
from fastgpt.ops.attention import LAUNCHERS
from fastgpt.ops.attention_forms import UNLIMITED, Inputs, Options

NAN, INF = math.nan, math.inf


def assert_same(backend, got, want):
    """The same bits from a kernel; from torch's matmul, which may sum in another order for other
    strides or sizes, the same values.
    """
    for name, ours, expected in zip(TENSORS, got, want, strict=True):
        if backend.name != "eager":
            assert torch.equal(ours, expected), name
        else:
            u = 128 * half_ulp(ours.dtype)
            torch.testing.assert_close(ours, expected, rtol=u, atol=u)


def assert_exact(backend, inputs, *, slack=64, **options):
    """Output and gradients within `slack` half ulps of the type in which they are summed and six of
    their own, relative to the largest magnitude.
    """
    upstream = upstream_for(inputs[0], inputs[2])
    grouped = {"enable_gqa": True} if inputs[0].shape[1] != inputs[1].shape[1] else {}
    got = attention_gradients(backend.attention, inputs, upstream, **options, **grouped)
    truth = exact_attention(*inputs, upstream, **options)
    dtype = inputs[0].dtype
    tol = slack * half_ulp(torch.promote_types(dtype, torch.float32)) + 6 * half_ulp(dtype)
    for name, ours, want in zip(TENSORS, got, truth, strict=True):
        assert ours.dtype == dtype, name
        error = abs(ours.double().numpy() - want).max()
        assert error <= tol * max(1.0, abs(want).max()), name
    return got


def assert_unreached(kernel, got, want):
    """What a hidden number must not change. Triton's kernels go another way where a tile of results
    is not finite, whose sums have another order; so within their roundings.
    """
    if kernel.name != "triton":
        assert_same(kernel, got, want)
        return
    for name, ours, expected in zip(TENSORS, got, want, strict=True):
        accumulator = torch.promote_types(ours.dtype, torch.float32)
        u = 2 * half_ulp(ours.dtype) + 16 * half_ulp(accumulator)
        error = (ours.double() - expected.double()).abs().max()
        assert error <= u * expected.abs().max(), name


def causal_mask(L, S):
    return torch.ones(L, S, dtype=torch.bool).tril()


def few_heads(backend):
    """One where the kernels are interpreted and nothing is about batches or heads."""
    return {"B": 1, "Hq": 1, "H": 1} if backend.interpreted else {}


# ---- accuracy ----


class Problem(NamedTuple):
    """A kind of input whose error is compared with torch's, on several seeds."""

    L: int
    S: int
    D: int = 20
    Dv: int = 20
    is_causal: bool = False
    scale: float | None = None
    size: float = 1.0  # of the inputs
    offset: float = 0.0  # added to all of them: correlated inputs, with large norms
    seeds: int = 3
    heads: int = 2  # and as many batches


def reordered(query, key, value, *, is_causal=False, scale=None):
    """torch's attention with its sums in reverse: over head_dim, and over the keys where they have
    no order. Its fused kernel takes one head_dim for all, so the shorter is padded with zeros.
    """
    D, Dv = query.shape[-1], value.shape[-1]
    scale = 1 / math.sqrt(D) if scale is None else scale
    query, key, value = (
        F.pad(x, (0, max(D, Dv) - x.shape[-1])).flip(-1) for x in (query, key, value)
    )
    if not is_causal:
        key, value = key.flip(-2), value.flip(-2)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    return out.flip(-1)[..., :Dv]


@functools.cache
def solve(problem: Problem, dtype: torch.dtype):
    """Inputs, upstream gradient and exact answer for each seed; and the largest errors of torch, of
    two orders of summation, since in one of them it may be lucky.
    """
    options = {"is_causal": problem.is_causal, "scale": problem.scale}
    found = []
    for seed in range(problem.seeds):
        sizes = {"size": problem.size, "offset": problem.offset, "seed": seed}
        inputs = random_qkv(*[problem.heads] * 3, *problem[:4], dtype=dtype, **sizes)
        upstream = upstream_for(inputs[0], inputs[2], seed + 100)
        found.append((inputs, upstream, exact_attention(*inputs, upstream, **options)))
    in_order = worst_errors(F.scaled_dot_product_attention, found, options)
    return found, list(map(max, in_order, worst_errors(reordered, found, options)))


def worst_errors(function, problems, options) -> list[float]:
    found = [
        relative_errors(attention_gradients(function, inputs, upstream, **options), truth)
        for inputs, upstream, truth in problems
    ]
    return np.max(found, axis=0).tolist()


@pytest.fixture(scope="module", autouse=True)
def _forget_problems():
    yield
    solve.cache_clear()


def assert_error_within_twice_torchs(backend, problem, dtype):
    """Beyond twice torch's own error on the same inputs, half an ulp: the one rounding of an output
    that torch happened to round well.
    """
    problem = problem._replace(D=backend.columns(problem.D), Dv=backend.columns(problem.Dv))
    problems, torchs = solve(problem, dtype)
    options = {"is_causal": problem.is_causal, "scale": problem.scale}
    ours = worst_errors(backend.attention, problems, options)
    for name, error, allowed in zip(TENSORS, ours, torchs, strict=True):
        assert error <= 2 * allowed + half_ulp(dtype), name


# Around the sizes of registers, of query blocks and of key tiles. Each is paired with the one
# eleven places further, so that each is a number of queries and a number of keys.
LENGTHS = (
    2, 5, 6, 7, 15, 16, 17, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 129, 191, 193, 255, 257, 300,
)  # fmt: skip
LENGTH_PAIRS = list(zip(LENGTHS, LENGTHS[11:] + LENGTHS[:11], strict=True))
HEAD_DIMS = (
    1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 80, 96, 127, 128, 129, 192, 256, 511, 512,
)  # fmt: skip
HEAD_DIM_PAIRS = list(zip(HEAD_DIMS, HEAD_DIMS[7:] + HEAD_DIMS[:7], strict=True))


@pytest.mark.cuda_on_host(L=(2, 17, 63, 65, 129), dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(L=(2, 5, 17, 63, 64, 65, 97, 300), dtype=[torch.float32])
@pytest.mark.interpreted(L=(5, 64, 97), dtype=[torch.float64, *REDUCED_DTYPES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("L", "S"), LENGTH_PAIRS)
def test_the_remainder_of_a_tile_loses_accuracy(backend, L, S, is_causal, dtype):
    problem = Problem(L, S, is_causal=is_causal, heads=1 if backend.interpreted else 2)
    assert_error_within_twice_torchs(backend, problem, dtype)


@pytest.mark.cuda_on_host(D=(1, 8, 15, 17, 65), dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(dtype=[torch.float32])
@pytest.mark.interpreted(D=(1, 8, 16, 17, 80, 256), dtype=[torch.float64, *REDUCED_DTYPES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "Dv"), HEAD_DIM_PAIRS)
def test_the_remainder_of_a_head_dim_loses_accuracy(backend, D, Dv, dtype):
    assert_error_within_twice_torchs(backend, Problem(19, 37, D, Dv), dtype)


@pytest.mark.interpreted(head_dim=[80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dim", [64, pytest.param(128, marks=pytest.mark.slow), 80, 16], ids=str
)
def test_a_head_dim_of_practice_loses_accuracy(backend, head_dim, dtype):
    """Several tiles each way, causal."""
    problem = Problem(321, 321, head_dim, head_dim, is_causal=True, seeds=1)
    if backend.interpreted:
        problem = problem._replace(heads=1)
    assert_error_within_twice_torchs(backend, problem, dtype)


@pytest.mark.cuda_on_host(size=(50, 1), dtype=[torch.bfloat16])
@pytest.mark.cuda_on_host(size=[50], is_causal=[True], dtype=[torch.float16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("size", "offset"), [(0.01, 0), (10, 0), (50, 0), (1, 30)], ids=["small", "10", "50", "offset"]
)
def test_large_or_correlated_inputs_lose_accuracy(backend, size, offset, is_causal, dtype):
    """A softmax that is nearly one-hot, or scores that differ by little of themselves."""
    lengths, seeds = ((40, 70), 3) if backend.interpreted else ((129, 97), 10)
    problem = Problem(*lengths, is_causal=is_causal, size=size, offset=offset, seeds=seeds)
    assert_error_within_twice_torchs(backend, problem, dtype)


@pytest.mark.cuda_on_host(dtype=[torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.5, 1e-3, 1.0, 10.0])
def test_a_scale_loses_accuracy(backend, scale, dtype):
    L, seeds, heads = (40, 3, 1) if backend.interpreted else (66, 10, 2)
    problem = Problem(L, 70, scale=scale, seeds=seeds, heads=heads)
    assert_error_within_twice_torchs(backend, problem, dtype)


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_scale_of_zero_does_not_average(backend, is_causal, dtype):
    inputs = random_qkv(L=50, S=70, D=backend.columns(9), dtype=dtype)
    _, grad_query, grad_key, _ = assert_exact(backend, inputs, scale=0.0, is_causal=is_causal)
    assert not grad_query.any()
    assert not grad_key.any()


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("L", "S", "is_causal"), [(1, 1, False), (67, 1, False), (1, 67, True)])
def test_a_single_visible_key_does_not_weigh_one(backend, L, S, is_causal, dtype):
    """Its weight is 1: the output is the value, and the gradient of the scores nearly cancels."""
    inputs = random_qkv(Hq=4, L=L, S=S, D=40, Dv=24, dtype=dtype)
    upstream = upstream_for(inputs[0], inputs[2])
    out, grad_query, grad_key, grad_value = attention_gradients(
        backend.attention, inputs, upstream, is_causal=is_causal, enable_gqa=True
    )
    first = inputs[2][:, :, :1].repeat_interleave(2, 1).expand_as(out)
    torch.testing.assert_close(out, first, rtol=4 * half_ulp(dtype), atol=0)
    tiny = 100 * half_ulp(dtype)
    assert grad_query.abs().max() <= tiny
    assert grad_key.abs().max() <= tiny * L
    total = upstream.double().sum(2, keepdim=True).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(grad_value[:, :, :1].double(), total, rtol=tiny, atol=tiny)
    assert not grad_value[:, :, 1:].any()


# ---- lengths and groups ----


@pytest.mark.parametrize(("L", "S"), [(5, 7), (7, 5), (1, 6), (6, 1), (6, 6), (130, 40), (40, 130)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths_that_differ_are_aligned_otherwise_than_in_torch(backend, L, S, is_causal):
    """Causal is top-left: query i sees keys j <= i, whatever L and S."""
    inputs = random_qkv(L=L, S=S)
    out, _, grad_key, grad_value = assert_exact(backend, inputs, is_causal=is_causal)
    if is_causal:
        torch.testing.assert_close(out[:, :, 0], inputs[2][:, :, 0])
        assert not grad_key[:, :, L:].any()
        assert not grad_value[:, :, L:].any()


@pytest.mark.parametrize(("Hq", "H"), [(2, 2), (2, 1), (4, 2), (6, 2), (9, 3), (8, 1), (16, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_queries_use_another_groups_keys(backend, Hq, H, is_causal):
    """Groups of 1, 2, 3 and 8 queries to a key head; and all of them to one (MQA)."""
    inputs = random_qkv(B=1 if backend.interpreted else 2, Hq=Hq, H=H, L=19, S=70)
    assert_exact(backend, inputs, is_causal=is_causal)
    mask = random_mask(inputs[0].shape[0], Hq, 19, 70)
    assert_exact(backend, inputs, attn_mask=mask)
    assert_exact(backend, inputs, attn_mask=additive(mask))


# ---- masks ----

MASK_SHAPES = [
    tuple(n if kept else 1 for n, kept in zip((2, 4, 21, 70), pattern, strict=True))
    for pattern in itertools.product((False, True), repeat=4)
] + [(21, 70), (1, 70), (4, 21, 70), (4, 1, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_a_mask_is_broadcast_wrongly(backend, shape):
    """Each of its four dimensions there or 1, or absent."""
    inputs = random_qkv(Hq=4, L=21, S=70, D=9, Dv=5)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    assert_exact(backend, inputs, attn_mask=mask)
    assert_exact(backend, inputs, attn_mask=additive(mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_either_type_loses_accuracy(backend, dtype):
    """Of the inputs' type, or float32 beside 16-bit inputs, which keeps its own precision."""
    inputs = random_qkv(Hq=4, H=2, L=53, S=130, D=24, dtype=dtype)
    mask = random_mask(2, 1, 53, 130)
    assert_exact(backend, inputs, attn_mask=mask)
    for mask_dtype in {dtype, torch.float32}:
        assert_exact(backend, inputs, attn_mask=additive(mask, mask_dtype) * 3)


def test_a_float32_mask_is_rounded_to_sixteen_bits(backend):
    """1000 + 1 is 1000 in bfloat16: the two keys would weigh the same."""
    query, key = torch.zeros(1, 1, 1, 4).bfloat16(), torch.zeros(1, 1, 2, 4).bfloat16()
    value = torch.tensor([0.0, 1.0]).bfloat16().view(1, 1, 2, 1)
    out = backend.attention(query, key, value, attn_mask=torch.tensor([[1000.0, 1001.0]]))
    assert float(out) == pytest.approx(1 / (1 + math.exp(-1)), rel=half_ulp(torch.bfloat16))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "heads last", "expanded"])
def test_strides_of_a_mask_are_not_followed(backend, layout):
    inputs = random_qkv(Hq=4, H=4, L=21, S=70)
    for make in (random_mask, lambda *shape: additive(random_mask(*shape))):
        mask = {
            "transposed": lambda make=make: make(2, 4, 70, 21).transpose(2, 3),
            "sliced": lambda make=make: make(2, 4, 21, 150)[..., 3:143:2],
            "heads last": lambda make=make: make(2, 21, 70, 4).movedim(3, 1),
            "expanded": lambda make=make: make(1, 70).expand(2, 4, 21, 70),
        }[layout]()
        assert_same(
            backend,
            attention_gradients(backend.attention, inputs, attn_mask=mask),
            attention_gradients(backend.attention, inputs, attn_mask=mask.contiguous()),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "additive float32"])
def test_a_fully_masked_query_is_not_zero(backend, kind, dtype):
    allowed = random_mask(21, 300)
    empty = [0, 5, 6, 7, 8, 9, 10, 11, 20]
    allowed[empty] = False
    allowed[3, :256] = False  # and leading tiles in which there is nothing
    mask_dtype = torch.float32 if kind == "additive float32" and dtype in REDUCED_DTYPES else dtype
    mask = allowed if kind == "bool" else additive(allowed, mask_dtype)
    inputs = random_qkv(L=21, S=300, dtype=dtype, **few_heads(backend))
    out, grad_query, _, _ = assert_exact(backend, inputs, attn_mask=mask)
    assert not out[:, :, empty].any()
    assert not grad_query[:, :, empty].any()
    nothing = attention_gradients(backend.attention, inputs, attn_mask=mask[empty[:1]])
    assert not any(tensor.any() for tensor in nothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_finite_mask_hides_all_or_overflows(backend, dtype):
    """Users mask with the smallest finite number: it hides what stands beside a visible key, but
    where all keys have it they weigh the same. A factor of log2(e) on it would be an infinity.
    """
    inputs = random_qkv(L=8, S=70, dtype=dtype)
    mask_dtype = torch.promote_types(dtype, torch.float32)
    for lowest in (-1e30, torch.finfo(mask_dtype).min):
        mask = torch.zeros(8, 70, dtype=mask_dtype).masked_fill(~random_mask(8, 70), lowest)
        mask[2] = lowest
        mask[3] = -INF
        mask[3, 66:] = lowest
        out, *_ = assert_exact(backend, inputs, attn_mask=mask)
        mean = inputs[2].double().mean(2)
        tol = 16 * half_ulp(dtype)
        torch.testing.assert_close(out[:, :, 2].double(), mean, rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_additive_mask_overflows(backend, dtype):
    inputs = random_qkv(L=8, S=70, dtype=dtype)
    mask = torch.zeros(8, 70, dtype=torch.promote_types(dtype, torch.float32))
    mask[0, 69] = 1e4
    mask[1, 3] = 1e30
    mask[2, [1, 68]] = torch.finfo(mask.dtype).max
    out, *_ = assert_exact(backend, inputs, attn_mask=mask)
    assert torch.equal(out[:, :, 0], inputs[2][:, :, 69])
    assert torch.equal(out[:, :, 1], inputs[2][:, :, 3])


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_beside_the_causal_one_is_ignored(kernel, kind):
    """The kernel takes both, and a position must be allowed by both."""
    query, key, value = random_qkv(Hq=4, L=70, S=50)
    allowed = random_mask(2, 1, 70, 50)
    allowed[:, :, :9, 0] = False  # leaves a few queries nothing
    mask = allowed if kind == "bool" else additive(allowed)
    upstream = upstream_for(query, value)
    found = launch(kernel, query, key, value, upstream, mask, True, 0.3)
    truth = exact_attention(query, key, value, upstream, attn_mask=mask, is_causal=True, scale=0.3)
    for name, got, want in zip(TENSORS, found, truth, strict=True):
        assert abs(got.numpy() - want).max() <= 1e-13, name


def launch(kernel, query, key, value, upstream, mask=None, is_causal=False, scale=0.25):
    """Output and gradients by the raw operators."""
    forward, backward = LAUNCHERS[kernel.name]
    *tensors, upstream = kernel.placed((query, key, value, mask, upstream))
    inputs = Inputs(*tensors, alibi_slopes=None, sinks=None, spans=None, seeds=None)
    options = Options(UNLIMITED, 0 if is_causal else UNLIMITED, 0, scale, 0.0, 0.0)
    output, _, *saved = forward(*inputs, *options)
    gradients = backward(upstream, None, *inputs, output, *saved, *options, False)
    return kernel.returned((output, *gradients[:3]))


# ---- what a query may not look at ----


def poisoned(tensor, index, poison):
    tensor = tensor.clone()
    tensor[:, :, index] = poison
    return tensor


def test_a_hidden_value_whose_products_overflow_reaches_a_gradient(kernel):
    """Finite, as uninitialised memory may be, and infinite as soon as it is multiplied."""
    inputs = random_qkv(L=70, S=70, dtype=torch.float32)
    allowed = torch.ones(70, 70, dtype=torch.bool)
    allowed[:, 40:] = False
    query, key, value = inputs
    upstream = upstream_for(query, value)
    want = attention_gradients(kernel.attention, inputs, upstream, attn_mask=allowed)
    hidden = query, key, poisoned(value, slice(40, None), 3e38)
    got = attention_gradients(kernel.attention, hidden, upstream, attn_mask=allowed)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_single_key_is_not_zero(kernel, dtype):
    """Its weight is 1 whatever it is."""
    inputs = random_qkv(L=9, S=1, D=40, Dv=40, dtype=dtype)
    _, dq, dk, _ = attention_gradients(kernel.attention, inputs)
    assert not dq.any()
    assert not dk.any()


@pytest.mark.cuda_on_host(kind=["causal"], dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
def test_what_no_query_may_see_reaches_a_result(kernel, kind, poison, dtype):
    """Keys and values in the causal future of all queries, or hidden from each by a mask. (In
    eager, as in torch, their weight of zero is multiplied with them.)
    """
    L, S = 45, 140 if kernel.interpreted else 300  # there, two tiles of keys and a remainder
    query, key, value = random_qkv(L=L, S=S, dtype=dtype, **few_heads(kernel))
    allowed = causal_mask(L, S)
    options = {"is_causal": True}
    hidden = [45, 63, 64, 127, *([] if kernel.interpreted else [191, 200]), S - 1]
    if kind != "causal":
        allowed = random_mask(L, S)
        hidden = [1, 2, 15, 16, 44, 130, S - 1]
        allowed[:, hidden] = False
        options = {"attn_mask": allowed if kind == "bool" else additive(allowed, dtype)}
    clean = attention_gradients(kernel.attention, (query, key, value), **options)
    upstream = upstream_for(query, value)
    for bad_key, bad_value in itertools.product((False, True), repeat=2):
        inputs = (
            query,
            poisoned(key, hidden, poison) if bad_key else key,
            poisoned(value, hidden, poison) if bad_value else value,
        )
        got = attention_gradients(kernel.attention, inputs, upstream, **options)
        assert_unreached(kernel, got, clean)
    for gradient in clean[2:]:
        assert not gradient[:, :, hidden].any()


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_query_that_sees_nothing_reaches_a_result(kernel, kind, poison):
    allowed = random_mask(21, 70)
    empty = [0, 7, 20]
    allowed[empty] = False
    mask = allowed if kind == "bool" else additive(allowed)
    query, key, value = random_qkv(L=21, S=70)
    upstream = upstream_for(query, value)
    clean = attention_gradients(kernel.attention, (query, key, value), upstream, attn_mask=mask)
    got = attention_gradients(
        kernel.attention,
        (poisoned(query, empty, poison), key, value),
        poisoned(upstream, empty, poison),
        attn_mask=mask,
    )
    assert_unreached(kernel, got, clean)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_one_document_of_a_packed_sequence_reaches_another(kernel, kind, poison):
    """Two documents under a block-diagonal mask: whatever the second holds, in queries, keys,
    values or upstream gradient, the first has the same bits.
    """
    L, first = 130, 71
    document = torch.arange(L) >= first
    allowed = document[:, None] == document
    mask = allowed if kind == "bool" else additive(allowed, torch.float32)
    inputs = random_qkv(L=L, S=L, dtype=torch.float32, **few_heads(kernel))
    upstream = upstream_for(inputs[0], inputs[2])
    clean = attention_gradients(kernel.attention, inputs, upstream, attn_mask=mask)
    for which in range(4):
        tensors = [*inputs, upstream]
        tensors[which] = poisoned(tensors[which], [first, 100, L - 1], poison)
        got = attention_gradients(kernel.attention, tensors[:3], tensors[3], attn_mask=mask)
        assert_unreached(kernel, *([x[:, :, :first] for x in y] for y in (got, clean)))
        assert not all(tensor.isfinite().all() for tensor in got)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("position", [0, 5, 6, 63, 64, 100, 129])
def test_the_causal_future_reaches_the_past(kernel, position, poison):
    """Key and value j change queries i >= j only; query or upstream row i only itself and the
    gradients of keys j <= i.
    """
    inputs = random_qkv(L=130, S=130, dtype=torch.float32, **few_heads(kernel))
    upstream = upstream_for(inputs[0], inputs[2])
    before, after = slice(0, position), slice(position + 1, None)
    clean = attention_gradients(kernel.attention, inputs, upstream, is_causal=True)
    everywhere = (slice(None),)
    unchanged = {  # output, grad_query, grad_key, grad_value
        "query": ((before, after), (before, after), (after,), (after,)),
        "key": ((before,), (before,), (), ()),
        "value": ((before,), (before,), (), everywhere),
        "upstream": (everywhere, (before, after), (after,), (after,)),
    }
    for which, (changed, kept) in enumerate(unchanged.items()):
        tensors = [*inputs, upstream]
        tensors[which] = poisoned(tensors[which], position, poison)
        got = attention_gradients(kernel.attention, tensors[:3], tensors[3], is_causal=True)
        for name, ours, want, slices in zip(TENSORS, got, clean, kept, strict=True):
            for rows in slices:
                torch.testing.assert_close(
                    ours[:, :, rows],
                    want[:, :, rows],
                    rtol=1e-5,
                    atol=1e-5,  # another path may round otherwise
                    msg=lambda text, where=(changed, name): f"{where}: {text}",
                )


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_lost_or_spreads_to_another_head(backend, which, dtype):
    inputs = random_qkv(B=2, Hq=3, H=3, L=20, S=70, dtype=dtype)
    clean = attention_gradients(backend.attention, inputs)
    bad = [x.clone() for x in inputs]
    bad[which][1, 1, 13, 3] = NAN
    got = attention_gradients(backend.attention, bad, upstream_for(inputs[0], inputs[2]))
    assert got[0][1, 1, 13 if which == 0 else 5].isnan().any()
    assert got[1][1, 1, 13].isnan().any()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    assert_same(backend, [x[others] for x in got], [x[others] for x in clean])


# ---- strides ----

B, H, L, S, D = 2, 3, 50, 67, 24


def fused(order):
    """Query, key and value of L positions each, as slices of one projection's output."""

    def make(dtype):
        x = random_like(torch.empty(B, L, 3 * H * D, dtype=dtype))
        if order == "split":
            return [part.view(B, L, H, D).transpose(1, 2) for part in x.split(H * D, dim=-1)]
        return [part.transpose(1, 2) for part in x.view(B, L, H, 3, D).unbind(3)]

    return make


def each(view):
    """The same view of a query, a key and a value (B, H, L or S, D) that it makes itself."""

    def make(dtype):
        return [
            view(lambda *shape, seed=seed: random_like(torch.empty(shape, dtype=dtype), seed), n)
            for seed, n in enumerate((L, S, S))
        ]

    return make


def odd_offset(new, n):
    """Rows that begin at no address that a whole register could be aligned to."""
    return new(B * H * n * (D + 1) + 1)[1:].as_strided(
        (B, H, n, D), (H * n * (D + 1), n * (D + 1), D + 1, 1), 1
    )


VIEWS = {
    "(B, L, H, D)": each(lambda new, n: new(B, n, H, D).transpose(1, 2)),
    "(L, B, H, D)": each(lambda new, n: new(n, B, H, D).movedim(0, 2)),
    "fused and split": fused("split"),
    "fused and interleaved": fused("interleaved"),
    "expanded heads": each(lambda new, n: new(B, 1, n, D).expand(B, H, n, D)),
    "expanded batch": each(lambda new, n: new(1, H, n, D).expand(B, H, n, D)),
    "expanded positions": each(lambda new, n: new(B, H, 1, D).expand(B, H, n, D)),
    "sliced head_dim": each(lambda new, n: new(B, H, n, 2 * D + 5)[..., 3 : D + 3]),
    "sliced positions": each(lambda new, n: new(B, H, 2 * n, D)[:, :, 1::2]),
    "odd offset": each(odd_offset),
    "transposed head_dim": each(lambda new, n: new(B, H, D, n).transpose(2, 3)),
    "every other of head_dim": each(lambda new, n: new(B, H, n, 2 * D)[..., ::2]),
    "expanded head_dim": each(lambda new, n: new(B, H, n, 1).expand(B, H, n, D)),
    "overlapping": each(lambda new, n: new(9 * n + 99).as_strided((B, H, n, D), (5, 3, 7, 1))),
}


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_a_strided_view_gives_other_bits_than_its_copy(backend, view, dtype):
    inputs = VIEWS[view](dtype)
    upstream = upstream_for(inputs[0], inputs[2], 9)
    copies = [x.contiguous() for x in inputs]
    for is_causal in (True,) if backend.interpreted else (False, True):
        got, want = (
            attention_gradients(backend.attention, x, upstream, is_causal=is_causal)
            for x in (inputs, copies)
        )
        assert_same(backend, got, want)


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_the_upstream_gradient_are_not_followed(backend, dtype):
    n = backend.columns(20)
    inputs = random_qkv(B, H, H, L, S, D, n, dtype=dtype)
    new = functools.partial(torch.empty, dtype=dtype)
    for upstream in (
        random_like(new(B, L, H, n)).transpose(1, 2),
        random_like(new(B, H, n, L)).transpose(2, 3),
        random_like(new(B, H, L, 2 * n + 1))[..., 1 : 2 * n + 1 : 2],
        random_like(new(B, H, L, 1)).expand(B, H, L, n),
        random_like(new(())).expand(B, H, L, n),  # as a sum's
        random_like(new(B * H * L * n + 1))[1:].view(B, H, L, n),
    ):
        got, want = (
            attention_gradients(backend.attention, inputs, x, is_causal=True)
            for x in (upstream, upstream.contiguous())
        )
        assert_same(backend, got, want)


def test_shared_keys_lose_the_gradient_of_a_head(backend):
    """Keys and values expanded over heads and batch: their gradient is the sum over both."""
    query, key, value = random_qkv(2, 4, 1, 9, 70)
    key, value = key[:1], value[:1]
    upstream = upstream_for(query, value)

    def expanded(q, k, v):
        return backend.attention(q, k.expand(2, 4, 70, 8), v.expand(2, 4, 70, 8))

    got = gradients_of(expanded, (query, key, value), upstream)
    copies = (query, key.expand(2, 4, 70, 8), value.expand(2, 4, 70, 8))
    truth = list(exact_attention(*copies, upstream))
    truth[2:] = [x.sum((0, 1), keepdims=True) for x in truth[2:]]
    assert max(relative_errors(got, truth)) < 1e-13


def test_one_tensor_in_three_roles_loses_a_gradient(backend):
    x = random_qkv()[1]
    upstream = random_like(x)
    got = gradient_of(lambda x: backend.attention(x, x, x, is_causal=True), x, upstream)
    out, *gradients = attention_gradients(backend.attention, (x, x, x), upstream, is_causal=True)
    torch.testing.assert_close(got, (out, sum(gradients)), rtol=1e-12, atol=1e-12)


# ---- memory ----


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_cannot_be_viewed_as_positions_by_features(kernel, dtype):
    """Output and gradients lie as (B, L, H, D), so that joining the heads copies nothing."""
    inputs = random_qkv(2, 6, 3, 7, 9, kernel.columns(5), kernel.columns(4), dtype=dtype)
    upstream = upstream_for(inputs[0], inputs[2])
    for name, tensor in zip(TENSORS, launch(kernel, *inputs, upstream), strict=True):
        assert tensor.transpose(1, 2).is_contiguous(), name


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 5, 33, 97])
def test_the_kernel_reads_beyond_its_tensors(kernel, n, dtype):
    """Inputs in the middle of NaN, or of large numbers, as slices of larger tensors."""
    D, Dv, at = kernel.columns(9), kernel.columns(7), kernel.columns(17)
    clean = random_qkv(L=n, S=n + 4, D=D, Dv=Dv, dtype=dtype, **few_heads(kernel))
    upstream = upstream_for(clean[0], clean[2])
    want = attention_gradients(kernel.attention, clean, upstream, is_causal=True)
    for fill in (NAN, 1e4):
        surrounded = []
        for x in (*clean, upstream):
            larger = torch.full([m + 40 for m in x.shape], fill, dtype=dtype)
            inside = tuple(slice(at, at + m) for m in x.shape)
            larger[inside] = x
            surrounded.append(larger[inside])
        got = attention_gradients(kernel.attention, surrounded[:3], surrounded[3], is_causal=True)
        assert_same(kernel, got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_mutated(backend, dtype):
    query, key, value = random_qkv(L=70, S=70, dtype=dtype)
    for mask in (random_mask(70, 70), additive(random_mask(70, 70), dtype)):
        upstream = upstream_for(query, value)
        tensors = [x.requires_grad_() for x in (query, key, value)] + [mask, upstream]
        before = [(t.detach().clone(), t._version) for t in tensors]
        out = backend.attention(query, key, value, attn_mask=mask)
        kept = out.detach().clone()
        torch.autograd.grad(out, (query, key, value), upstream)
        for tensor, (content, version) in zip(tensors, before, strict=True):
            assert torch.equal(tensor, content)
            assert tensor._version == version
        assert torch.equal(out, kept)


def test_a_gradient_shares_memory_with_another_tensor(backend):
    leaves = [x.requires_grad_() for x in random_qkv(L=7)]
    out = backend.attention(*leaves)
    upstream = random_like(out)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(out, leaves, -3 * upstream)
    tensors = (*leaves, out, upstream, *first, *second)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(map(torch.equal, first, kept))


@pytest.mark.parametrize("options", ["full", "causal", "mask", "grouped"])
def test_scores_are_allocated(best_kernel, options):
    """L x S elements per head would be 32 MiB; inputs, output and gradients are half a MiB each.
    (In the interpreter 2 MiB, and 128 KiB each.)
    """
    Hq, length = 2, 512 if best_kernel.interpreted else 2048
    inputs = random_qkv(1, Hq, 1 if options == "grouped" else Hq, length, length, 32, 32,
                        dtype=torch.float32)  # fmt: skip
    kwargs = {
        "full": {},
        "causal": {"is_causal": True},
        "mask": {"attn_mask": random_mask(1, length)},
        "grouped": {"enable_gqa": True},
    }[options]
    inputs, kwargs = best_kernel.placed((inputs, kwargs))
    upstream = upstream_for(inputs[0], inputs[2])
    leaves = [x.requires_grad_() for x in inputs]
    scores = Hq * length * length * 4

    def forward():
        return fastgpt.scaled_dot_product_attention(*leaves, **kwargs)

    assert best_kernel.peak_bytes(forward) < scores / 4
    out = forward()
    peak = best_kernel.peak_bytes(lambda: torch.autograd.grad(out, leaves, upstream))
    assert peak < scores / 4


# ---- reproducibility ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "lengths"),
    [((1, 1, 1), (300, 257)), ((2, 6, 2), (130, 193)), ((1, 8, 1), (1, 700)), ((3, 1, 1), (5, 2))],
    ids=["one head", "grouped", "decode", "short"],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_bits_depend_on_the_number_of_threads(
    native_backend, heads, lengths, is_causal, dtype, threads
):
    """Forward and backward; and the same from run to run."""
    inputs = random_qkv(*heads, *lengths, D=40, Dv=24, dtype=dtype)
    found = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        found.append(
            attention_gradients(
                native_backend.attention, inputs, is_causal=is_causal, enable_gqa=True
            )
        )
    for again in found[1:]:
        assert_same(native_backend, again, found[0])


@pytest.mark.slow
def test_a_result_changes_from_run_to_run(kernel):
    heads, length, runs = ((1, 2, 1), 70, 2) if kernel.interpreted else ((2, 4, 2), 500, 10)
    inputs = random_qkv(*heads, length, length, 64, 64, dtype=torch.bfloat16)
    first, *others = (
        attention_gradients(kernel.attention, inputs, is_causal=True, enable_gqa=True)
        for _ in range(runs)
    )
    for again in others:
        assert_same(kernel, again, first)


# ---- random calls ----


@st.composite
def calls(draw, batches, lengths):
    """Any 4-dimensional call: sizes, layout, kind and shape of the mask, causal, scale, groups."""
    seed = draw(st.integers(0, 2**31))
    heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    batch, rows, columns = (draw(st.integers(1, n)) for n in (batches, *lengths))
    head_dims = [draw(st.integers(1, 70)) for _ in range(2)]
    inputs = random_qkv(batch, heads * group, heads, rows, columns, *head_dims, seed=seed)
    if draw(st.booleans()):
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    options = {"scale": draw(st.sampled_from([None, 0.1, -1.0, 3.0]))}
    kind = draw(st.sampled_from(["none", "causal", "bool", "additive", "float32"]))
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        full = (batch, heads * group, rows, columns)
        shape = [n if draw(st.booleans()) else 1 for n in full][draw(st.integers(0, 2)) :]
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 1.0]))
        dtype = torch.float32 if kind == "float32" else torch.float64
        options["attn_mask"] = mask if kind == "bool" else additive(mask, dtype)
    return inputs, options


def test_a_random_call_is_wrong(one_isa):
    examples, sizes = (30, (1, (70, 130))) if one_isa.interpreted else (150, (2, (130, 200)))

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(calls(*sizes))
    def check(call):
        inputs, options = call
        assert_exact(one_isa, inputs, slack=1000, **options)

    check()
