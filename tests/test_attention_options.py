"""Attention with its further options: values and gradients, what a query may not look at, dropout,
shapes, strides, determinism, memory.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BOTTOM_RIGHT,
    CASES,
    CAUSAL,
    Sizes,
    bias,
    kept,
    partly_hidden,
    sinks,
    slopes,
    weights_left,
)
from oracle import (
    DTYPES,
    FULL_DTYPES,
    REDUCED_DTYPES,
    attention_results,
    exact_attention_options,
    half_ulp,
    random_like,
    random_mask,
    random_qkv,
    relative_error,
    upstream_for,
    visible,
)

import fastgpt
from fastgpt.ops import dropout

NAN, INF = math.nan, math.inf
SEED = 11  # of dropout, wherever its mask is recovered
attention = fastgpt.scaled_dot_product_attention


def sizes_of(inputs) -> Sizes:
    query, key, _ = inputs
    return Sizes(*query.shape[:3], key.shape[2], query.dtype)


def results(backend, inputs, upstream=None, upstream_lse=None, **options):
    """Everything that a call gives, lse and its gradient too; the dropout always the same."""
    if upstream is None:
        upstream = upstream_for(inputs[0], inputs[2])
    if upstream_lse is None:
        upstream_lse = random_like(upstream[..., 0].to(sizes_of(inputs).accumulator), 2)
    options.setdefault("enable_gqa", inputs[0].shape[1] != inputs[1].shape[1])
    torch.manual_seed(SEED)
    return attention_results(backend.attention, inputs, upstream, upstream_lse, **options)


def truth_of(device, inputs, upstream=None, upstream_lse=None, **options):
    """The same from the oracle, given what dropout keeps."""
    n = sizes_of(inputs)
    if upstream is None:
        upstream = upstream_for(inputs[0], inputs[2])
    if upstream_lse is None:
        upstream_lse = random_like(upstream[..., 0].to(n.accumulator), 2)
    if options.get("dropout_p"):
        options["keep"] = kept(device, n, options["dropout_p"], SEED)
    return exact_attention_options(*inputs, upstream, upstream_lse, **options)


def assert_close(got, truth, *, slack=64):
    """Each result within `slack` half ulps of the type in which it is summed and six of its own or
    the inputs', to which a kernel may round the weights (but not for lse), relative to the largest
    magnitude of its truth, or to 1; as of attention without options.
    """
    dtype = got["grad_query"].dtype
    accumulator = torch.promote_types(dtype, torch.float32)
    for name, ours in got.items():
        want = getattr(truth, name)
        assert ours.shape == want.shape, name
        rounding = half_ulp(ours.dtype)
        if name != "lse":
            rounding = max(rounding, half_ulp(dtype))
        tol = slack * half_ulp(accumulator) + 6 * rounding
        found = ours.double().numpy()
        finite = np.isfinite(want)
        assert np.array_equal(found[~finite], want[~finite].astype(float)), name
        error = abs(found[finite] - want[finite]).max(initial=0)
        assert error <= tol * max(1.0, abs(want[finite]).max(initial=0)), (name, float(error))


def assert_exact(
    backend, inputs, *, slack=64, upstream=None, upstream_lse=None, truth=None, **options
):  # fmt: skip
    got = results(backend, inputs, upstream, upstream_lse, **options)
    dtype = inputs[0].dtype
    types = {"lse": sizes_of(inputs).accumulator}
    for key in ("attn_mask", "sinks"):
        if key in options:
            types[f"grad_{key.removeprefix('attn_')}"] = options[key].dtype
    assert {name: x.dtype for name, x in got.items()} == {
        name: types.get(name, dtype) for name in got
    }
    truth = truth or truth_of(backend.device, inputs, upstream, upstream_lse, **options)
    assert_close(got, truth, slack=slack)
    return got


def assert_same(backend, got, want):
    """The same bits from a kernel; from torch's matmul, which may sum in another order for other
    strides or sizes, the same values.
    """
    assert got.keys() == want.keys()
    for name, ours in got.items():
        if backend.name != "eager":
            assert torch.equal(ours, want[name]), name
        else:
            u = 128 * half_ulp(ours.dtype)
            torch.testing.assert_close(ours, want[name], rtol=u, atol=u)


def assert_unreached(kernel, got, want, bits=True):
    """What a hidden number must not change. Kernels go another way where a tile is not finite; if
    its sums have another order there (`bits` is False, or Triton), within their roundings.
    """
    if bits and kernel.name != "triton":
        assert_same(kernel, got, want)
        return
    for name, ours in got.items():
        expected = want[name]
        hidden = expected == -INF
        assert torch.equal(ours[hidden], expected[hidden]), name
        ours, expected = (x[~hidden].double() for x in (ours, expected))
        u = 2 * half_ulp(got[name].dtype) + 16 * half_ulp(torch.float32)
        if expected.numel():
            assert (ours - expected).abs().max() <= u * expected.abs().max(), name


def heads_for(backend, B=2, Hq=4, H=2):
    """One group of two where the kernels are interpreted."""
    return {"B": 1, "Hq": 2, "H": 1} if backend.interpreted else {"B": B, "Hq": Hq, "H": H}


# What the CUDA kernels, which take no mask, have in their host twin.
MASKLESS = [name for name in CASES if "mask" not in name and not name.startswith("everything")]


# ---- accuracy ----

# Around the sizes of registers, of query blocks and of key tiles, each with a stranger.
LENGTHS = [
    (1, 6), (2, 64), (5, 7), (6, 129), (7, 16), (15, 65), (16, 47), (17, 17), (48, 127), (49, 2),
    (63, 63), (64, 95), (65, 15), (96, 97), (97, 48), (127, 5), (128, 128), (129, 130),
]  # fmt: skip


@pytest.mark.cuda_on_host(name=MASKLESS, dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(dtype=[torch.float32])
@pytest.mark.interpreted(dtype=[torch.bfloat16], name=["everything", "everything but documents"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_an_option_is_wrong_at_the_remainder_of_a_tile(backend, name, dtype):
    """Each case and type with lengths of its own; together they meet them all."""
    start = list(CASES).index(name) + 4 * DTYPES.index(dtype)
    count = 2 if backend.interpreted else 4
    for step in range(count):
        L, S = LENGTHS[(start + 5 * step) % len(LENGTHS)]
        heads = tuple(heads_for(backend).values())
        columns = backend.columns(20), backend.columns(12)
        inputs, options, truth = problem(backend.device, name, heads, L, S, columns, dtype)
        assert_exact(backend, inputs, truth=truth, **options)


@functools.cache
def problem(device, name, heads, L, S, columns, dtype):
    """Inputs, options and truth, once for all instruction sets."""
    inputs = random_qkv(*heads, L, S, *columns, dtype=dtype)
    options = CASES[name](sizes_of(inputs))
    return inputs, options, truth_of(device, inputs, **options)


EXPRESSIBLE = [  # by an additive mask, without queries that see nothing
    "window", "causal window", "bottom right", "bottom right window", "documents", "alibi",
    "alibi for each batch", "mask", "mask of keys", "mask and window",
]  # fmt: skip
INPUTS = {"normal": (1, 0), "large": (10, 0), "correlated": (1, 30)}


def torchs_mask(n: Sizes, options) -> torch.Tensor:
    """The additive mask, in the accumulator type, that says the same."""
    names = "is_causal", "causal_alignment", "window", "cu_seqlens_q", "cu_seqlens_k"
    seen, distance = visible(n.L, n.S, **{k: v for k, v in options.items() if k in names})
    mask = torch.zeros(n.B, n.Hq, n.L, n.S, dtype=n.accumulator)
    if "alibi_slopes" in options:
        mask = mask - options["alibi_slopes"][..., None, None] * torch.from_numpy(distance)
    if "attn_mask" in options:
        mask = mask + options["attn_mask"]
    return mask.to(n.accumulator).masked_fill(~torch.from_numpy(seen), -INF)


def reordered(query, key, value, *, attn_mask):
    """torch's attention with its sums in reverse, over the keys and over head_dim."""
    query, key, value = (x.flip(-1) for x in (query, key, value))
    key, value, attn_mask = key.flip(-2), value.flip(-2), attn_mask.flip(-1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask).flip(-1)


@functools.cache
def torchs_errors(name, kind, n, D, dtype, seeds):
    """Of torch in two orders of summation, since in one of them it may be lucky; with the inputs
    and their truth, for each seed.
    """
    size, offset = INPUTS[kind]
    problems, errors = [], []
    for seed in range(seeds):
        inputs = random_qkv(
            n.B, n.Hq, n.Hq, n.L, n.S, D, D, dtype=dtype, size=size, offset=offset, seed=seed
        )
        options = CASES[name](n)
        upstream = upstream_for(inputs[0], inputs[2], seed + 100)
        truth = exact_attention_options(*inputs, upstream, **options)
        problems.append((inputs, options, upstream, truth))
        mask = torchs_mask(n, options)
        for function in (F.scaled_dot_product_attention, reordered):
            found = attention_results(function, inputs, upstream, learn=(), attn_mask=mask)
            errors.append({k: relative_error(x, getattr(truth, k)) for k, x in found.items()})
    return problems, {k: max(e[k] for e in errors) for k in errors[0]}


@pytest.fixture(scope="module", autouse=True)
def _forget_problems():
    yield
    torchs_errors.cache_clear()
    problem.cache_clear()


@pytest.mark.cuda_on_host(name=MASKLESS, dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(name=["causal window", "documents", "alibi"], dtype=[torch.float32])
@pytest.mark.interpreted(name=["alibi for each batch"], dtype=REDUCED_DTYPES, kind=["normal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_the_error_exceeds_that_of_torch_with_a_mask(backend, name, kind, dtype):
    """Beyond twice torch's own error on the same inputs, half an ulp: the one rounding of an output
    that torch happened to round well.
    """
    n = Sizes(1, 2, 40, 40, dtype) if backend.interpreted else Sizes(2, 2, 66, 66, dtype)
    problems, allowed = torchs_errors(name, kind, n, backend.columns(20), dtype, 3)
    for inputs, options, upstream, truth in problems:
        got = attention_results(backend.attention, inputs, upstream, learn=(), **options)
        for key, ours in got.items():
            error = relative_error(ours, getattr(truth, key))
            assert error <= 2 * allowed[key] + half_ulp(dtype), key


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [0.5, 30.0])
@pytest.mark.parametrize("kind", INPUTS)
def test_a_softcap_loses_accuracy(backend, kind, cap, dtype):
    """Where tanh is off by its last bits, y is by ulps of up to the cap, which the weights have as
    a relative error. Far above it the scores are all the cap, and their gradient vanishes.
    """
    size, offset = INPUTS[kind]
    inputs = random_qkv(
        **heads_for(backend), L=33, S=70, D=16, dtype=dtype, size=size, offset=offset
    )
    upstream = upstream_for(inputs[0], inputs[2])
    # What the products were before the cap: its slope sees their rounding.
    scale = 1.0 if kind == "normal" else 0.1
    got = assert_exact(
        backend, inputs, upstream=upstream, softcap=cap, scale=scale / 4, slack=64 + 4 * cap
    )
    assert got["grad_query"].isfinite().all()


@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
def test_a_softcap_far_above_the_scores_costs_accuracy(backend, dtype):
    """Where |x| << softcap, y is x to the last bits."""
    inputs = random_qkv(**heads_for(backend), L=9, S=17, dtype=dtype)
    for cap in (1e4, 1e12, 1e30):
        assert_exact(backend, inputs, softcap=cap)


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_lse_or_its_gradient_is_lost(backend, dtype):
    """Scores of up to 300 either way: neither exp(lse) nor exp(-lse) is a float32. The dot products
    are rounded at their own size, which the weights have as a relative error.
    """
    query, key, value = random_qkv(**heads_for(backend), L=9, S=70, D=8, dtype=dtype)
    query = torch.zeros_like(query)
    query[..., 0] = torch.linspace(-3, 3, 9).to(dtype)
    key[..., 0] = torch.linspace(50, 100, 70).to(dtype)
    got = assert_exact(backend, (query, key, value), scale=1.0, slack=64 + 2 * 300)
    assert got["lse"].max() > 100
    assert got["lse"].min() < -100
    truth = truth_of(backend.device, (query, key, value), scale=1.0)
    # One rounding of each product, of their sum, of the logarithm.
    assert relative_error(got["lse"], truth.lse) <= 4 * half_ulp(got["lse"].dtype)


def test_only_one_of_output_and_lse_is_differentiated(backend):
    inputs = random_qkv(**heads_for(backend), L=9, S=70)
    upstream = upstream_for(inputs[0], inputs[2])
    upstream_lse = random_like(upstream[..., 0], 2)
    zeros = torch.zeros_like(upstream), torch.zeros_like(upstream_lse)
    for name in ("sinks", "mask of keys", "everything"):
        options = CASES[name](sizes_of(inputs))
        learnt = [k for k in ("attn_mask", "sinks") if k in options]
        names = "query", "key", "value", *learnt
        values = *inputs, *(options[k] for k in learnt)
        for which, pair in enumerate(((upstream, zeros[1]), (zeros[0], upstream_lse))):
            truth = truth_of(backend.device, inputs, *pair, **options)
            leaves = {k: x.clone().requires_grad_() for k, x in zip(names, values, strict=True)}
            torch.manual_seed(SEED)
            found = backend.attention(
                **{**options, **leaves}, enable_gqa=True, return_lse=True
            )[which]  # fmt: skip
            gradients = torch.autograd.grad(
                found, list(leaves.values()), pair[which], allow_unused=True, materialize_grads=True
            )
            got = {f"grad_{k.removeprefix('attn_')}": g for k, g in zip(names, gradients)}  # noqa: B905
            assert_close({**got, ("output", "lse")[which]: found.detach()}, truth)


# ---- places ----

WINDOWS = [(0, 0), (-1, 0), (3, -1), (0, -1), (2, 5), (-1, -1), (30, 1), (64, 63), (999, 999)]


@pytest.mark.interpreted(window=[(0, 0), (3, -1), (2, 5), (30, 1)])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_has_another_edge(backend, window):
    """With and without causal, from either corner, with more queries than keys and with fewer."""
    lengths = [(9, 5), (33, 70)] if backend.interpreted else [(9, 5), (5, 9), (130, 70), (70, 130)]
    options = itertools.product((False, True), ("top_left", "bottom_right"))
    for is_causal, causal_alignment in options:
        for L, S in lengths:
            inputs = random_qkv(1, 2, 1, L, S, 4, 3)
            assert_exact(
                backend, inputs,
                window=window, is_causal=is_causal, causal_alignment=causal_alignment,
            )  # fmt: skip


def test_a_window_that_hides_nothing_changes_bits(kernel):
    """Wider than everything, and as wide as an int can say; causal in words and as a window."""
    inputs = random_qkv(1, 2, 1, 40, 70, 8, 8, dtype=torch.float32)
    plain = results(kernel, inputs)
    for window in [(-1, -1), (70, 70), (2**31 - 1, 2**31), (2**62, -1), [99, 2**40]]:
        assert_same(kernel, results(kernel, inputs, window=window), plain)
    causal = results(kernel, inputs, **CAUSAL)
    assert_same(kernel, results(kernel, inputs, window=(-1, 0)), causal)
    assert_same(kernel, results(kernel, inputs, **CAUSAL, window=(2**62, 5)), causal)


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16], L=[9, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("L", "S"), [(9, 5), (130, 70), (70, 1)])
def test_queries_before_the_first_key_are_not_zero(backend, L, S, dtype):
    """From the bottom right with more queries than keys the first L - S see nothing."""
    inputs = random_qkv(**heads_for(backend), L=L, S=S, dtype=dtype)
    for window in (None, (4, -1)):
        got = assert_exact(backend, inputs, **CAUSAL, **BOTTOM_RIGHT, window=window)
        blind = slice(0, L - S)
        assert not got["output"][:, :, blind].any()
        assert not got["grad_query"][:, :, blind].any()
        assert (got["lse"][:, :, blind] == -INF).all()
        assert got["lse"][:, :, L - S :].isfinite().all()


@pytest.mark.interpreted(dtype=[torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_that_sees_nothing_is_not_zero(backend, dtype):
    """For each reason that there is: its output and gradients are exactly 0, its lse is -inf."""
    n = Sizes(1, 2, 20, 9, dtype)
    inputs = random_qkv(1, 2, 1, n.L, n.S, dtype=dtype)
    rows = random_mask(n.L, n.S)
    rows[3:17] = False
    reasons = {
        "bool": {"attn_mask": rows},
        "-inf": {"attn_mask": bias(n, n.L, n.S).masked_fill(~rows, -INF)},
        "window": {"window": (2, 0)},
        "bottom right": {**BOTTOM_RIGHT, "window": (-1, 1)},
        "documents": {
            "cu_seqlens_q": torch.tensor([0, 3, 17, 20]), "cu_seqlens_k": torch.tensor([0, 4, 4, 9])
        },
    }  # fmt: skip
    for options in reasons.values():
        for extra in ({}, {"softcap": 2.0}, {"alibi_slopes": slopes(n)}, {"dropout_p": 0.3}):
            got = assert_exact(backend, inputs, **options, **extra)
            blind = truth_of(backend.device, inputs, **options, **extra).lse == -INF
            assert blind.any()
            blind = torch.from_numpy(blind)
            assert not got["output"][blind].any()
            assert not got["grad_query"][blind].any()
            if "grad_mask" in got:
                assert not got["grad_mask"][3:17].any()


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(dtype=[torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["(H,)", "(B, H)"])
def test_alibi_counts_from_another_place(backend, shape, dtype):
    """On both sides of a query, wherever it stands; for slopes of any sign and type."""
    for L, S in ((33, 70), (70, 33)):
        inputs = random_qkv(**heads_for(backend), L=L, S=S, dtype=dtype)
        n = sizes_of(inputs)
        slope = slopes(n, *([n.B] if shape == "(B, H)" else []))
        slope[..., 0] *= -0.1
        for options in ({}, BOTTOM_RIGHT, {**CAUSAL, **BOTTOM_RIGHT}):
            assert_exact(backend, inputs, alibi_slopes=slope, **options)
        other = torch.float32 if dtype == torch.float64 else dtype
        assert_exact(backend, inputs, alibi_slopes=slope.to(other))


def test_one_batch_dimension_of_alibi_slopes_is_not_the_batch(backend):
    """(B, H) of several batch dimensions, and of one sequence."""
    query, key, value = random_qkv(6, 2, 2, 5, 7)
    slope = slopes(Sizes(6, 2, 5, 7), 6)
    want = backend.attention(query, key, value, alibi_slopes=slope)
    folded = [x.unflatten(0, (2, 3)) for x in (query, key, value)]
    got = backend.attention(*folded, alibi_slopes=slope)
    torch.testing.assert_close(got.flatten(0, 1), want)
    got = backend.attention(query[4], key[4], value[4], alibi_slopes=slope[4:5])
    torch.testing.assert_close(got, want[4])


# ---- documents ----

DOCUMENTS = {
    "self": ([0, 7, 7, 8, 41, 70], None),
    "one token each": (list(range(20)), None),
    "empty ends": ([0, 0, 0, 33, 33], None),
    "one": ([0, 33], None),
    "cross": ([0, 3, 3, 20, 41], [0, 9, 30, 30, 70]),
    "few queries": ([0, 1, 2, 3], [0, 1, 70, 130]),
}


@pytest.mark.interpreted(name=["one token each", "cross"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_differs_from_a_call_for_it_alone(backend, name):
    """With every option that is counted in it."""
    of_queries, of_keys = DOCUMENTS[name]
    ends = of_keys or of_queries
    n = Sizes(1, 2, of_queries[-1], ends[-1])
    inputs = random_qkv(1, 2, 1, n.L, n.S)
    documents = {"cu_seqlens_q": torch.tensor(of_queries)}
    if of_keys:
        documents["cu_seqlens_k"] = torch.tensor(of_keys, dtype=torch.int32)
        documents["cu_seqlens_q"] = documents["cu_seqlens_q"].int()
    upstream = upstream_for(inputs[0], inputs[2])
    upstream_lse = random_like(upstream[..., 0], 2)
    combinations = [
        {}, CAUSAL, {**CAUSAL, **BOTTOM_RIGHT}, {"window": (4, 1), **BOTTOM_RIGHT},
        {**CAUSAL, "window": (9, -1), "alibi_slopes": slopes(n), "sinks": sinks(n), "softcap": 2.0},
        {**BOTTOM_RIGHT, "alibi_slopes": slopes(n)},
    ]  # fmt: skip
    for options in combinations[3:] if backend.interpreted else combinations:
        got = results(backend, inputs, upstream, upstream_lse, **documents, **options)
        want = {name: torch.zeros_like(x) for name, x in got.items()}
        want["lse"] += -INF if "sinks" not in options else sinks(n)[:, None]
        if "sinks" in options:  # what queries without keys give to it
            alone = [i for a, b, c, d in parts(of_queries, ends) if c == d for i in range(a, b)]
            want["grad_sinks"] += upstream_lse[:, :, alone].sum((0, 2))
        for a, b, c, d in parts(of_queries, ends):
            if a == b or c == d:
                continue
            part = (inputs[0][:, :, a:b], inputs[1][:, :, c:d], inputs[2][:, :, c:d])
            alone = results(backend, part, upstream[:, :, a:b], upstream_lse[:, :, a:b], **options)
            for key in ("output", "lse", "grad_query"):
                want[key][:, :, a:b] = alone[key]
            for key in ("grad_key", "grad_value"):
                want[key][:, :, c:d] = alone[key]
            if "sinks" in options:
                want["grad_sinks"] += alone["grad_sinks"]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def parts(of_queries, of_keys):
    """Begin and end of each document, among the queries and among the keys."""
    return [(*q, *k) for q, k in zip(itertools.pairwise(of_queries), itertools.pairwise(of_keys),
                                     strict=True)]  # fmt: skip


def test_boundaries_of_keys_are_not_those_of_queries_by_default(backend):
    inputs = random_qkv(1, 2, 1, 40, 40)
    cu = torch.tensor([0, 7, 7, 30, 40])
    want = results(backend, inputs, **CAUSAL, cu_seqlens_q=cu)
    for given in ({"cu_seqlens_k": cu.clone()}, {"cu_seqlens_k": cu.int()}):
        got = results(backend, inputs, **CAUSAL, cu_seqlens_q=cu.int(), **given)
        assert_same(backend, got, want)
    strided = torch.stack([cu, cu + 99], 1).view(-1)[::2]
    assert_same(backend, results(backend, inputs, **CAUSAL, cu_seqlens_q=strided), want)


@pytest.mark.cuda_on_host(options=["plain", "bottom right"], dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(dtype=[torch.float32], options=["plain", "everything"], poison=[1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [1e30, NAN])
@pytest.mark.parametrize("options", ["plain", "bottom right", "everything"])
def test_a_document_reaches_another(kernel, options, poison, dtype):
    """Whatever one holds, in queries, keys, values or upstream gradients, the ones before it have
    the same bits; the ones behind it, too, but that sums over a tile's queries may then have
    another order.
    """
    L, first, last = 100, 33, 71
    inputs = random_qkv(1, 2, 2, L, L, dtype=dtype)
    n = sizes_of(inputs)
    options = {
        "cu_seqlens_q": torch.tensor([0, first, last, L]),
        **{
            "plain": CAUSAL,
            "bottom right": {**BOTTOM_RIGHT, "window": (9, 5)},
            "everything": {
                **CAUSAL, "softcap": 2.0, "alibi_slopes": slopes(n), "dropout_p": 0.3,
                "attn_mask": bias(n, L, L),
            },
        }[options],
    }  # fmt: skip
    upstream = upstream_for(inputs[0], inputs[2])
    upstream_lse = random_like(upstream[..., 0].to(n.accumulator), 2)
    tensors = [*inputs, upstream, upstream_lse]

    def part(found, rows):
        return {
            name: x[rows, rows] if name == "grad_mask" else x[:, :, rows]
            for name, x in found.items()
        }

    clean = results(kernel, inputs, upstream, upstream_lse, **options)
    for which in range(5):
        bad = list(tensors)
        bad[which] = bad[which].clone()
        bad[which][:, :, [first, 50, last - 1]] = poison
        got = results(kernel, bad[:3], bad[3], bad[4], **options)
        assert not all(torch.equal(got[k], clean[k]) for k in got), "the poison is not read"
        for rows, bits in ((slice(first), True), (slice(last, None), False)):
            assert_unreached(kernel, part(got, rows), part(clean, rows), bits)


# ---- sinks ----


@pytest.mark.cuda_on_host(dtype=REDUCED_DTYPES)
@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sink_of_another_size_is_wrong(backend, dtype):
    """One that takes nearly all, one that takes nearly nothing, one that takes nothing."""
    inputs = random_qkv(1, 4, 2, 21, 70, dtype=dtype)
    for options in ({}, CAUSAL, {"window": (3, 2)}):
        sink = torch.tensor([60.0, -60.0, -INF, 0.5], dtype=dtype)
        got = assert_exact(backend, inputs, sinks=sink, **options)
        assert got["grad_sinks"].isfinite().all()
        assert got["grad_sinks"][2] == 0
        without = results(backend, inputs, **options)
        u = 16 * half_ulp(dtype)
        for name in ("output", "grad_query"):
            torch.testing.assert_close(got[name][:, 2], without[name][:, 2], rtol=u, atol=u)


@pytest.mark.cuda_on_host(kind=["window"], dtype=REDUCED_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["window", "bool", "-inf"])
def test_a_query_with_a_sink_only_is_not_zero(backend, kind, dtype):
    """Its output and gradients are exactly 0, its lse is the sink, which has all the gradient of
    it. With a sink of -inf it sees nothing at all.
    """
    inputs = random_qkv(1, 2, 1, 20, 9, dtype=dtype)
    rows = torch.ones(20, 9, dtype=torch.bool)
    rows[12:] = False
    options = {
        "window": {"window": (2, 0)},  # queries from 11 on
        "bool": {"attn_mask": rows},
        "-inf": {"attn_mask": torch.zeros(20, 9, dtype=dtype).masked_fill(~rows, -INF)},
    }[kind]
    sink = torch.tensor([0.75, -INF], dtype=dtype)
    got = assert_exact(backend, inputs, sinks=sink, **options)
    blind = slice(12, None)
    assert not got["output"][:, :, blind].any()
    assert not got["grad_query"][:, :, blind].any()
    u = 4 * half_ulp(torch.float32)  # to the units of the kernel's powers and back
    torch.testing.assert_close(got["lse"][:, 0, blind], torch.full((1, 8), 0.75), rtol=u, atol=0)
    assert (got["lse"][:, 1, blind] == -INF).all()


# ---- masks ----

SHAPES = [
    tuple(n if there else 1 for n, there in zip((2, 4, 21, 70), pattern, strict=True))
    for pattern in itertools.product((False, True), repeat=4)
] + [(21, 70), (1, 70), (21, 1), (4, 21, 70), (70,), ()]


@pytest.mark.interpreted(shape=[SHAPES[5], SHAPES[10], SHAPES[15], (21, 70), (21, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_of_a_mask_is_summed_wrongly(backend, shape):
    """Each of its four dimensions there or 1, or absent; with more options in a second call."""
    inputs = random_qkv(2, 4, 2, 21, 70, D=5, Dv=3)
    n = sizes_of(inputs)
    mask = random_like(torch.empty(shape, dtype=torch.float64), 5)
    assert_exact(backend, inputs, attn_mask=mask)
    assert_exact(
        backend, inputs, attn_mask=mask, window=(-1, 40), softcap=2.0, sinks=sinks(n), dropout_p=0.2
    )


@pytest.mark.interpreted(dtype=[torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_mask_loses_accuracy(backend, dtype):
    """Of the inputs' type or float32, with and without a sum, which is in the wider type. A sum of
    N weights' gradients is within the roundings of N terms, few of which are near 1.
    """
    inputs = random_qkv(1, 2, 2, 65, 129, 24, 24, dtype=dtype)
    for shape in ((65, 129), (1, 1, 1, 129), (2, 65, 1), (1, 1, 1, 1)):
        for mask_dtype in {dtype, torch.float32}:
            mask = random_like(torch.empty(shape, dtype=mask_dtype), 5)
            assert_exact(backend, inputs, attn_mask=mask, slack=256)


def test_a_hidden_entry_of_a_mask_has_a_gradient(backend):
    """Entries of -inf, whole rows of them, and what the window hides: exactly 0."""
    inputs = random_qkv(1, 2, 1, 33, 70)
    n = sizes_of(inputs)
    mask = partly_hidden(n)
    mask[[3, 32]] = -INF
    got = assert_exact(backend, inputs, attn_mask=mask, window=(40, 20), softcap=3.0)
    seen = torch.from_numpy(visible(33, 70, window=(40, 20))[0]) & (mask > -INF)
    assert not got["grad_mask"][~seen].any()
    assert got["grad_mask"][seen].all()


def test_a_learnt_mask_changes_the_other_results(backend):
    """Its gradient is one result more, whatever its shape and type."""
    inputs = random_qkv(1, 2, 1, 33, 70, dtype=torch.float32)
    n = sizes_of(inputs)
    for mask in (bias(n, 33, 70), bias(n, 1, 2, 1, 70), bias(n, 33, 1)):
        got = results(backend, inputs, attn_mask=mask)
        del got["grad_mask"]
        assert_same(backend, got, results(backend, inputs, attn_mask=mask, learn=()))
    for name in ("grad_query", "grad_key", "grad_value"):  # the mask alone

        def of_mask(mask, name=name):
            leaf = mask.detach().requires_grad_()
            backend.attention(*inputs, attn_mask=leaf, enable_gqa=True).sum().backward()
            return leaf.grad

        assert of_mask(bias(n, 33, 70)).shape == (33, 70)


@pytest.mark.interpreted(layout=["heads last", "expanded"])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "heads last", "expanded"])
def test_strides_of_a_learnt_mask_are_not_followed(backend, layout):
    inputs = random_qkv(2, 4, 2, 21, 70, dtype=torch.float32)
    n = sizes_of(inputs)
    mask = {
        "transposed": lambda: bias(n, 2, 4, 70, 21).transpose(2, 3),
        "sliced": lambda: bias(n, 2, 4, 21, 150)[..., 3:143:2],
        "heads last": lambda: bias(n, 2, 21, 70, 4).movedim(3, 1),
        "expanded": lambda: bias(n, 1, 70).expand(2, 4, 21, 70),
    }[layout]()
    got = results(backend, inputs, attn_mask=mask, **CAUSAL)
    assert_same(backend, got, results(backend, inputs, attn_mask=mask.contiguous(), **CAUSAL))


# ---- what a query may not look at ----


@pytest.mark.interpreted(
    dtype=[torch.float32],
    name=["bottom right", "softcap", "cross documents", "dropout", "everything but documents"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_no_query_may_see_reaches_a_result_of_an_option(kernel, name, dtype):
    """Keys and values that a mask hides from all queries, beside the option: in dropout, whose
    zeros are multiplied with what is there, in a softcap, whose slope there is no number. A head of
    its own for each query head has the same bits.
    """
    hidden = torch.zeros(100, dtype=torch.bool)
    hidden[[5, 31, 32, 64, 99]] = True
    poisons = [(NAN, True, True), (INF, True, True), (1e30, True, True), (NAN, True, False),
               (NAN, False, True)]  # fmt: skip
    for heads, some in ((1, poisons[:3:2]), (2, poisons)):
        if kernel.interpreted:
            some = some[:1] if heads == 1 else some[3:]
        inputs = random_qkv(1, 2, heads, L=20, S=100, dtype=dtype)
        options = CASES[name](sizes_of(inputs))
        if "attn_mask" in options:
            options["attn_mask"] = options["attn_mask"].masked_fill(hidden, -INF)
        else:
            options["attn_mask"] = ~hidden[None]
        clean = results(kernel, inputs, **options)
        for poison, keys, values in some:
            query, key, value = (x.clone() for x in inputs)
            if keys:
                key[:, :, hidden] = poison
            if values:
                value[:, :, hidden] = poison
            got = results(kernel, (query, key, value), **options)
            assert_unreached(kernel, got, clean, bits=heads == 2)
            for gradient in ("grad_key", "grad_value"):
                assert not got[gradient][:, :, hidden].any()


@pytest.mark.interpreted(poison=[NAN], name=["bottom right window", "cross documents"])
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("name", ["causal window", "bottom right", "bottom right window",
                                  "cross documents", "window"])  # fmt: skip
def test_a_key_outside_of_a_window_reaches_a_query(kernel, name, poison):
    """Key and value j change only the queries that see them."""
    inputs = random_qkv(1, 2, 2, 40, 100, dtype=torch.float32)
    options = CASES[name](sizes_of(inputs))
    names = "is_causal", "causal_alignment", "window", "cu_seqlens_q", "cu_seqlens_k"
    seen, _ = visible(40, 100, **{k: v for k, v in options.items() if k in names})
    clean = results(kernel, inputs, **options)
    for j in (0, 37, 99) if kernel.interpreted else (0, 19, 20, 37, 38, 64, 99):
        query, key, value = (x.clone() for x in inputs)
        key[:, :, j] = value[:, :, j] = poison
        got = results(kernel, (query, key, value), **options)
        blind = torch.from_numpy(~seen[:, j])
        rows = ("output", "lse", "grad_query")
        assert_unreached(kernel, *({k: x[k][:, :, blind] for k in rows} for x in (got, clean)))
        assert got["output"][:, :, ~blind].isnan().all()


# ---- dropout ----


def test_dropout_is_another_on_another_backend(kernel):
    """Beyond a tile each way, for seeds of both signs and each batch and head; the weights' own
    shares, so that what is kept is scaled, too.
    """
    n = Sizes(2, 3, 37, 150) if kernel.interpreted else Sizes(2, 3, 70, 600)
    for seed in (0, 1, SEED):
        left = weights_left(kernel.attention, n, 0.3, seed)
        assert torch.equal(left != 0, kept(kernel.device, n, 0.3, seed))
        share = torch.full_like(left, 1 / n.S / 0.7)
        torch.testing.assert_close(left[left != 0], share[left != 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dropout_p", [0.02, 0.3, 0.5, 0.95])
def test_dropout_drops_another_share_of_any_row_or_column(one_isa, dropout_p):
    """Within five standard deviations of the binomial distribution: of all, of a head, a query or a
    key. (For a few weights its tail is longer than the normal one's: one more.)
    """
    n = Sizes(2, 2, 64, 150) if one_isa.interpreted else Sizes(4, 4, 200, 300)
    left = weights_left(one_isa.attention, n, dropout_p, SEED)
    dropped = (left == 0).double()
    for dims in ((0, 1, 2, 3), (2, 3), (3,), (2,), (0, 1)):
        share = dropped.mean(dims)
        count = dropped.numel() / max(share.numel(), 1)
        deviation = math.sqrt(dropout_p * (1 - dropout_p) / count)
        assert (share - dropout_p).abs().max() <= 5 * deviation + 1 / count, dims


def test_neighbours_in_dropout_are_dependent():
    """Rows, columns, heads, batches, calls, and differences of few bits: the correlation of N
    independent pairs is within five standard deviations of 0, 1 / sqrt(N).
    """
    n = Sizes(4, 4, 256, 256)
    p = 0.5
    first, second = (kept_now(n, p, seed) for seed in (1, 2))
    x = (first.double() - p) / math.sqrt(p * (1 - p))
    pairs = {"calls": (x, (second.double() - p) / math.sqrt(p * (1 - p)))}
    for dim, name in enumerate(("batches", "heads", "queries", "keys")):
        for step in (1, 2, 64) if dim > 1 else (1, 2):
            size = x.shape[dim] - step
            pairs[name, step] = x.narrow(dim, 0, size), x.narrow(dim, step, size)
    pairs["transposed"] = x, x.mT
    pairs["diagonal"] = x[..., :-1, :-1], x[..., 1:, 1:]
    for name, (a, b) in pairs.items():
        count = a.numel() / (2 if name == "transposed" else 1)
        assert abs(float((a * b).mean())) <= 5 / math.sqrt(count), name
    # Of any four weights in a square of two rows and columns, as many kept are odd as even.
    parity = x[..., :-1, :-1] * x[..., 1:, :-1] * x[..., :-1, 1:] * x[..., 1:, 1:]
    assert abs(float(parity.mean())) <= 5 / math.sqrt(parity.numel())


def kept_now(n: Sizes, dropout_p: float, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    seeds = dropout.seeds_of(dropout.draw_seed(torch.device("cpu")), n.B)
    return dropout.keep_mask(seeds, n.Hq, 0, n.L, n.S, dropout_p)


def test_dropout_is_biased_under_an_option(one_isa):
    """The mean over calls is the output without it, within five standard deviations of the mean."""
    inputs = random_qkv(1, 2, 1, 8, 16)
    options = {"softcap": 2.0, "sinks": sinks(sizes_of(inputs)), "enable_gqa": True, **CAUSAL}
    want, calls = one_isa.attention(*inputs, **options), 40 if one_isa.interpreted else 400
    torch.manual_seed(0)
    samples = torch.stack([
        one_isa.attention(*inputs, dropout_p=0.3, **options) for _ in range(calls)
    ])  # fmt: skip
    error = (samples.mean(0) - want).abs()
    # The deviation, of which few calls give a rough estimate; of one weight p, p sqrt(.3 / .7).
    assert (error <= 5 * samples.std(0) / math.sqrt(calls) + 1e-12).double().mean() > 0.99
    assert error.mean() <= 5 * samples.std(0).mean() / math.sqrt(calls * 8)


def test_dropout_does_not_follow_torchs_generator(backend):
    inputs = random_qkv(1, 2, 1, 8, 16)

    def call(seed):
        torch.manual_seed(seed)
        return [backend.attention(*inputs, dropout_p=0.5, enable_gqa=True) for _ in range(2)]

    first, again, other = call(1), call(1), call(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_a_dropout_of_zero_or_one_is_another(backend):
    inputs = random_qkv(1, 2, 1, 20, 70)
    options = {"sinks": sinks(sizes_of(inputs)), **CAUSAL}
    plain = results(backend, inputs, **options)
    state = torch.get_rng_state()
    assert_same(backend, results(backend, inputs, dropout_p=0.0, **options), plain)
    torch.set_rng_state(state)
    zeros = torch.zeros(1, 2, 20, dtype=torch.float64)
    got = results(backend, inputs, upstream_lse=zeros, dropout_p=1.0, **options)
    torch.testing.assert_close(got.pop("lse"), plain["lse"])
    assert not any(x.any() for x in got.values())
    got = results(backend, inputs, dropout_p=1.0, **options)
    assert got["grad_query"].any()
    assert not got["grad_value"].any()


def test_a_call_without_dropout_moves_the_generator(backend):
    inputs = random_qkv(1, 2, 2, 5, 7)
    state = torch.get_rng_state()
    backend.attention(*inputs, **CAUSAL)
    assert torch.equal(torch.get_rng_state(), state)


def philox(counter, key):
    """Philox4x32-10 in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF,
             first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]  # fmt: skip
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def test_the_generator_of_dropout_is_not_philox():
    """Random123's known answers (tests/kat_vectors, philox4x32 10), for the one in this file; and
    that one's for the package's, which takes half of a counter and gives half of the words.
    """
    ones, pi = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    zero = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([0] * 4, [0] * 2) == zero
    assert philox(ones, ones[:2]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    key = [0xA4093822, 0x299F31D0]
    assert philox(pi, key) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    for seed in (0, 1, -1, -(1 << 63), (1 << 63) - 1, 0x299F31D0A4093822, -0x123456789ABCDEF):
        for i, h in ((0, 0), (1, 0), (0, 1), (12345, 67), (2**31 - 1, 2**31 - 1)):
            words = dropout._philox(torch.tensor(seed), (torch.tensor(i), torch.tensor(h)))
            want = philox([i, h, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
            assert list(map(int, words)) == want[:2]


def test_the_kept_weights_are_not_those_of_the_definition():
    """As ops/dropout.py states it, in Python's integers; of queries from a later one on."""
    seeds, heads, first, rows, keys, p = (77, -5), 2, 1000, 3, 40, 0.4
    kept = dropout.keep_mask(torch.tensor(seeds), heads, first, rows, keys, p)
    for b, h, row, j in itertools.product(range(2), range(heads), range(rows), range(keys)):
        seed = seeds[b] & 0xFFFFFFFFFFFFFFFF
        a, c, *_ = philox([first + row, h, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
        x = j ^ a
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15 ^ c) * 0x846CA68B & 0xFFFFFFFF
        x ^= x >> 16
        assert bool(kept[b, h, row, j]) == (x >= round(p * 2**32))


# ---- decoding ----


@pytest.mark.interpreted(dtype=[torch.float32], name=["everything but documents", "window",
                                                      "alibi for each batch", "sinks"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_one_query_of_each_sequence_is_wrong(backend, name, dtype):
    """32 query heads on 8 key heads, and sequences of different lengths in one batch by a mask, as
    one decodes; the last place is the query's.
    """
    heads, S = ((4, 2), 130) if backend.interpreted else ((32, 8), 300)
    inputs = random_qkv(3, *heads, 1, S, 16, 16, dtype=dtype)
    n = sizes_of(inputs)
    options = {**CASES[name](n), **BOTTOM_RIGHT}
    lengths = torch.tensor([S, 1, S // 2])
    padding = (torch.arange(S) < lengths[:, None])[:, None, None]
    mask = options.get("attn_mask")
    options["attn_mask"] = (
        padding if mask is None else torch.where(padding, mask.expand(3, -1, 1, S)
                                                 if mask.dim() == 4 else mask, -INF)
    )  # fmt: skip
    assert_exact(backend, inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_query_of_a_long_sequence_is_wrong(native_backend, dtype):
    """Where the keys are shared out among threads."""
    inputs = random_qkv(2, 8, 2, 1, 2000, 32, 32, dtype=dtype)
    n = sizes_of(inputs)
    for options in (
        {**CAUSAL, **BOTTOM_RIGHT, "window": (700, -1)},
        {"alibi_slopes": slopes(n) / 99, "sinks": sinks(n), **BOTTOM_RIGHT},
        {"attn_mask": bias(n, 1, 1, 1, 2000), "softcap": 5.0},
        {"cu_seqlens_q": torch.tensor([0, 0, 1]), "cu_seqlens_k": torch.tensor([0, 900, 2000])},
    ):
        assert_exact(native_backend, inputs, **options)


# ---- shapes and strides ----


def test_no_queries_or_keys_fail(one_isa):
    """No kernel runs; without keys the output is 0, and lse the sink or -inf."""
    inputs = random_qkv(2, 4, 2, 5, 7)
    run = one_isa.on_device(attention)
    for L, S in ((0, 7), (5, 0), (0, 0)):
        query, key, value = inputs[0][:, :, :L], inputs[1][:, :, :S], inputs[2][:, :, :S]
        n = Sizes(2, 4, L, S)
        for name, make in CASES.items():
            options = make(n)
            leaves = [x.clone().requires_grad_() for x in (query, key, value)]
            for key_ in ("attn_mask", "sinks"):
                if key_ in options:
                    options[key_] = options[key_].clone().requires_grad_()
                    leaves.append(options[key_])
            output, lse = run(*leaves[:3], **options, enable_gqa=True, return_lse=True)
            assert output.shape == (2, 4, L, 8), name
            assert not output.any(), name
            want = torch.full((2, 4, L), -INF, dtype=torch.float64)
            if "sinks" in options:
                want = sinks(n)[:, None].expand(want.shape)
            torch.testing.assert_close(lse.detach(), want)
            finite = lse.masked_fill(lse == -INF, 0)
            gradients = torch.autograd.grad(output.sum() + finite.sum(), leaves)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                assert gradient.shape == leaf.shape
                assert gradient.isfinite().all(), name
                if leaf is not options.get("sinks"):
                    assert not gradient.any(), name


@pytest.mark.interpreted(batch=[(), (2, 2, 3)], name=["everything"])
@pytest.mark.parametrize("name", ["everything", "everything but documents"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2, 3)], ids=str)
def test_an_option_fails_for_other_batch_dimensions(backend, batch, name):
    """2-, 3- and 5-dimensional inputs as the 4-dimensional call they are."""
    heads = batch[-1] if batch else 1
    rows = math.prod(batch[:-1])
    inputs = random_qkv(rows, heads, heads, 9, 20, 4, 6)
    n = sizes_of(inputs)
    options = CASES[name](n)
    options["attn_mask"] = bias(n, rows, heads, 9, 20)
    want = results(backend, inputs, **options)
    reshaped = [x.reshape(*batch, *x.shape[2:]) for x in inputs]
    upstream = upstream_for(inputs[0], inputs[2])
    upstream_lse = random_like(upstream[..., 0], 2)
    mask = options.pop("attn_mask").reshape(*batch, 9, 20)
    torch.manual_seed(SEED)
    got = attention_results(
        backend.attention, reshaped, upstream.reshape(*batch, 9, 6),
        upstream_lse.reshape(*batch, 9), attn_mask=mask, **options,
    )  # fmt: skip
    for key, x in got.items():
        assert key == "grad_sinks" or x.shape[: len(batch)] == batch
        torch.testing.assert_close(x.reshape(want[key].shape), want[key], rtol=1e-12, atol=1e-12)


@pytest.mark.interpreted(dtype=[torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["(B, L, H, D)", "sliced", "transposed", "expanded"])
def test_strides_change_a_result_of_the_options(backend, layout, dtype):
    """Of the inputs, of sinks and slopes, and of the upstream gradients."""

    def new(*shape, seed=0):
        return random_like(torch.empty(shape, dtype=dtype), seed)

    B, H, D = 2, 2, 8
    view = {
        "(B, L, H, D)": lambda n, s: new(B, n, H, D, seed=s).transpose(1, 2),
        "sliced": lambda n, s: new(B, H, 2 * n, D + 3, seed=s)[:, :, 1::2, 2 : D + 2],
        "transposed": lambda n, s: new(B, H, D, n, seed=s).transpose(2, 3),
        "expanded": lambda n, s: new(B, 1, n, D, seed=s).expand(B, H, n, D),
    }[layout]
    inputs = [view(21, 0), view(35, 1), view(35, 2)]
    n = sizes_of(inputs)
    upstream, upstream_lse = view(21, 3), random_like(torch.empty(B, 21, H), 4).transpose(1, 2)
    options = CASES["everything but documents"](n)
    options["alibi_slopes"] = options["alibi_slopes"].T.contiguous().T
    options["sinks"] = torch.stack([options["sinks"], options["sinks"]], 1)[:, 0]
    got = results(backend, inputs, upstream, upstream_lse.to(n.accumulator), **options)
    plain = {k: x.contiguous() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    want = results(
        backend, [x.contiguous() for x in inputs], upstream.contiguous(),
        upstream_lse.contiguous().to(n.accumulator), **plain,
    )  # fmt: skip
    assert_same(backend, got, want)


@pytest.mark.interpreted(name=["everything"])
@pytest.mark.parametrize("name", ["sinks", "alibi", "mask of keys", "everything"])
def test_an_option_raises_or_widens_under_autocast(one_isa, name):
    """query, key, value and the mask are cast as torch does, the numbers for each head are not."""
    inputs = random_qkv(2, 4, 2, 9, 20, dtype=torch.float32)
    n = sizes_of(inputs)
    options = CASES[name](n)
    rounded = {k: x.bfloat16() if k == "attn_mask" else x for k, x in options.items()}
    want = results(one_isa, [x.bfloat16() for x in inputs], **rounded)

    def under_autocast(*args, **kwargs):  # the forward only
        with torch.autocast(one_isa.device, torch.bfloat16):
            return one_isa.attention(*args, **kwargs)

    upstream = upstream_for(inputs[0].bfloat16(), inputs[2])
    upstream_lse = random_like(want["lse"], 2)
    torch.manual_seed(SEED)
    got = attention_results(
        under_autocast, inputs, upstream, upstream_lse, enable_gqa=True, **options
    )
    assert got["output"].dtype == torch.bfloat16
    assert got["lse"].dtype == torch.float32
    for key, x in got.items():
        assert torch.equal(x, want[key].to(x.dtype)), key


def test_inputs_of_an_option_are_mutated(backend):
    inputs = random_qkv(1, 2, 1, 40, 70, dtype=torch.float32)
    n = sizes_of(inputs)
    for name in ("everything", "everything but documents"):
        options = CASES[name](n)
        tensors = [*inputs, *(x for x in options.values() if isinstance(x, torch.Tensor))]
        before = [(x.clone(), x._version) for x in tensors]
        results(backend, inputs, **options)
        for tensor, (content, version) in zip(tensors, before, strict=True):
            assert torch.equal(tensor, content)
            assert tensor._version == version


@pytest.mark.interpreted(name=["everything"])
@pytest.mark.parametrize("name", CASES)
def test_a_call_without_a_graph_has_other_bits(best_kernel, name):
    """Where nothing asks for a derivative there may be a shorter way to the kernel."""
    inputs = random_qkv(1, 2, 2, 21, 70, dtype=torch.float32)
    options = CASES[name](sizes_of(inputs))
    want = results(best_kernel, inputs, **options)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(SEED)
            output, lse = best_kernel.attention(*inputs, **options, return_lse=True)
            assert torch.equal(output, want["output"])
            assert torch.equal(lse, want["lse"])
            torch.manual_seed(SEED)
            assert torch.equal(best_kernel.attention(*inputs, **options), want["output"])


# ---- reproducibility and memory ----


@pytest.mark.parametrize("name", CASES)
def test_bits_of_an_option_depend_on_the_number_of_threads(native_backend, name, threads):
    """Forward and backward; and the same from run to run."""
    for heads, lengths, dtype in (
        ((1, 1, 1), (130, 97), torch.float32),
        ((2, 4, 2), (33, 130), torch.bfloat16),
        ((1, 8, 2), (1, 700), torch.float32),
    ):
        inputs = random_qkv(*heads, *lengths, 24, 16, dtype=dtype)
        options = CASES[name](sizes_of(inputs))
        found = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            found.append(results(native_backend, inputs, **options))
        for again in found[1:]:
            assert_same(native_backend, again, found[0])


@pytest.mark.interpreted(name=["everything"])
@pytest.mark.parametrize("name", [*CASES, "lse"])
def test_an_option_allocates_the_scores(best_kernel, name):
    """L x S elements per head would be 32 MiB (in the interpreter 1 MiB); the mask is of one row,
    and all else is a few hundred KiB.
    """
    Hq, length = 2, 384 if best_kernel.interpreted else 2048
    inputs = random_qkv(1, Hq, Hq, length, length, 16, 16, dtype=torch.float32)
    n = sizes_of(inputs)
    options = {} if name == "lse" else CASES[name](n)
    if "attn_mask" in options:
        options["attn_mask"] = bias(n, 1, 1, 1, length)
    inputs, options = best_kernel.placed((inputs, options))
    leaves = [x.requires_grad_() for x in inputs]
    leaves += [options[k].requires_grad_() for k in ("attn_mask", "sinks") if k in options]
    scores = Hq * length * length * 4

    def forward():
        return attention(*leaves[:3], **options, return_lse=True)

    assert best_kernel.peak_bytes(forward) < scores / 4
    outputs = forward()
    upstream = [random_like(x) for x in outputs]
    peak = best_kernel.peak_bytes(lambda: torch.autograd.grad(outputs, leaves, upstream))
    assert peak < scores / 4
