"""Scaled dot-product attention: the eager form against torch's and against the formula."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import gradient_of, half_ulp, random_like

import fastgpt

attention = fastgpt.scaled_dot_product_attention


def qkv(B=2, Hq=4, H=4, L=5, S=7, D=8, Dv=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, Hq, L, D), (B, H, S, D), (B, H, S, Dv)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def formula(q, k, v, allowed=None, bias=None, scale=None):
    """softmax(QK^T / sqrt(D) + bias) V in float64, one query at a time; zeros where nothing is
    allowed.
    """
    q, k, v = q.double(), k.double(), v.double()
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = k[b, h // group] @ q[b, h, i] * scale
                if bias is not None:
                    scores = scores + bias[..., i, :].double()
                keys = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed[i]
                if keys.any():
                    weights = torch.softmax(scores[keys], 0)
                    out[b, h, i] = weights @ v[b, h // group][keys]
    return out


def run(function, inputs, upstream, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def compare_with_torch(inputs, tol=1e-12, **options):
    upstream = random_like(torch.empty(*inputs[0].shape[:-1], inputs[2].shape[-1],
                                       dtype=inputs[0].dtype))  # fmt: skip
    got = run(attention, inputs, upstream, **options)
    want = run(F.scaled_dot_product_attention, inputs, upstream, **options)
    for ours, torchs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=tol, atol=tol)
    return got


def mask(L=5, S=7, seed=1):
    """bool, at least one key for each query."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(L, S, generator=generator) < 0.6
    found[:, 0] = True
    return found


# ---- values and gradients ----


def test_differs_from_the_formula():
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v), formula(q, k, v))
    causal = torch.ones(5, 7).tril().bool()
    torch.testing.assert_close(attention(q, k, v, is_causal=True), formula(q, k, v, causal))
    torch.testing.assert_close(attention(q, k, v, attn_mask=mask()), formula(q, k, v, mask()))
    bias = random_like(torch.empty(5, 7, dtype=torch.float64))
    torch.testing.assert_close(attention(q, k, v, attn_mask=bias), formula(q, k, v, bias=bias))
    torch.testing.assert_close(attention(q, k, v, scale=0.3), formula(q, k, v, scale=0.3))


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 6), (6, 1), (6, 6)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths_that_differ_are_aligned_otherwise_than_in_torch(shape, is_causal):
    """Causal is top-left: query i sees keys j <= i, whatever L and S."""
    L, S = shape
    compare_with_torch(qkv(L=L, S=S), is_causal=is_causal)
    if is_causal:
        q, k, v = qkv(L=L, S=S)
        first = attention(q, k, v, is_causal=True)[:, :, 0]
        torch.testing.assert_close(first, v[:, :, 0])


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": mask()},
        {"attn_mask": mask().expand(2, 4, 5, 7)},
        {"attn_mask": mask().view(1, 1, 5, 7)},
        {"attn_mask": mask(1, 7)},
        {"attn_mask": random_like(torch.empty(5, 7, dtype=torch.float64))},
        {"attn_mask": random_like(torch.empty(4, 5, 7, dtype=torch.float64))},
        {"attn_mask": torch.zeros(5, 7).double().masked_fill(~mask(), -math.inf)},
        {"scale": 0.05},
        {"scale": 1.0, "is_causal": True},
    ],
    ids=["bool", "bool expanded", "bool broadcast", "bool row", "additive", "additive heads",
         "-inf", "scale", "scale causal"],
)  # fmt: skip
def test_an_option_gives_another_result_than_torchs(options):
    compare_with_torch(qkv(), **options)


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (6, 3), (4, 4)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_queries_use_another_groups_keys(heads, is_causal):
    Hq, H = heads
    inputs = qkv(Hq=Hq, H=H)
    compare_with_torch(inputs, enable_gqa=True, is_causal=is_causal)
    if not is_causal:
        torch.testing.assert_close(attention(*inputs, enable_gqa=True), formula(*inputs))


def test_a_value_dimension_of_its_own_is_wrong():
    compare_with_torch(qkv(D=8, Dv=3))
    compare_with_torch(qkv(D=3, Dv=9), is_causal=True)


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_other_numbers_of_batch_dimensions_fail(dims):
    q, k, v = qkv()
    if dims == 5:
        inputs = [torch.stack([x, x + 1]) for x in (q, k, v)]
    else:
        inputs = [x[(0,) * (4 - dims)] for x in (q, k, v)]
    compare_with_torch(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_less_accurate_than_torchs(dtype):
    """Computed in float32: the error is at most torch's, and one rounding of the output."""
    inputs = qkv(L=33, S=40, D=16, Dv=16, dtype=dtype)
    upstream = random_like(inputs[0])
    wide = [x.double() for x in inputs]
    truth = run(F.scaled_dot_product_attention, wide, upstream.double(), is_causal=True)
    ours = run(attention, inputs, upstream, is_causal=True)
    torchs = run(F.scaled_dot_product_attention, inputs, upstream, is_causal=True)
    for got, other, want in zip(ours, torchs, truth, strict=True):
        assert got.dtype == dtype
        size = want.abs().max()
        error, allowed = ((x.double() - want).abs().max() / size for x in (got, other))
        assert error <= allowed + 2 * half_ulp(dtype)


def test_strided_views_are_read_wrongly():
    """The (B, L, H, D) -> (B, H, L, D) view of every GPT."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(L=6, S=6))
    compare_with_torch((q, k, v), is_causal=True)


# ---- masked queries ----


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_fully_masked_query_is_not_zero(kind):
    allowed = mask()
    allowed[2] = False
    given = (
        allowed if kind == "bool" else torch.zeros(5, 7).double().masked_fill(~allowed, -math.inf)
    )
    inputs = qkv()
    upstream = random_like(inputs[0])
    out, dq, dk, dv = run(attention, inputs, upstream, attn_mask=given)
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    assert torch.equal(dq[:, :, 2], torch.zeros_like(dq[:, :, 2]))
    for gradient in (dq, dk, dv):
        assert gradient.isfinite().all()
    # The other queries give what they give without it.
    kept = [0, 1, 3, 4]
    part = run(
        attention, (inputs[0][:, :, kept], *inputs[1:]), upstream[:, :, kept],
        attn_mask=given[kept],
    )  # fmt: skip
    torch.testing.assert_close(out[:, :, kept], part[0])
    torch.testing.assert_close((dk, dv), part[2:])


def test_an_additive_mask_has_another_gradient_than_in_torch():
    q, k, v = qkv()
    bias = random_like(torch.empty(5, 7, dtype=torch.float64))
    upstream = random_like(q)
    got, want = (
        gradient_of(lambda b, f=f: f(q, k, v, attn_mask=b), bias, upstream)
        for f in (attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(got, want)


def test_a_float32_mask_is_refused_beside_sixteen_bit_inputs():
    inputs = qkv(dtype=torch.bfloat16)
    bias = random_like(torch.empty(5, 7))
    compare_with_torch(inputs, tol=2e-2, attn_mask=bias.bfloat16())
    wide = attention(*(x.float() for x in inputs), attn_mask=bias)
    torch.testing.assert_close(
        attention(*inputs, attn_mask=bias).float(), wide, rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("kind", ["bool", "additive", "bias", "a row of keys"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
def test_a_mask_and_is_causal_are_not_combined(kind, shape):
    """Both must allow a position, as in torch's CPU kernel; its math backend refuses the pair."""
    L, S = shape
    allowed = mask(L, S)
    allowed[1:, 0] = False
    allowed[2, :3] = False
    given = {
        "bool": allowed,
        "additive": torch.zeros(L, S).double().masked_fill(~allowed, -math.inf),
        "bias": random_like(torch.empty(L, S, dtype=torch.float64)),
        "a row of keys": allowed[-1:],
    }[kind]
    inputs = qkv(L=L, S=S)
    out, *gradients = compare_with_torch(inputs, attn_mask=given, is_causal=True)
    if kind != "bias":
        both = allowed[-1:] if kind == "a row of keys" else allowed
        both = both.expand(L, S) & torch.ones(L, S).tril().bool()
        torch.testing.assert_close(out, formula(*inputs, both))
        empty = ~both.any(-1)
        assert empty.any()
        for x in (out, gradients[0]):
            assert not x[:, :, empty].any()


# ---- dropout ----


def test_dropout_is_biased_or_not_reproducible():
    q, k, v = qkv(B=1, Hq=2, H=2, L=8, S=32)
    want = attention(q, k, v)

    def sample(seed):
        torch.manual_seed(seed)
        return attention(q, k, v, dropout_p=0.3)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert not torch.equal(sample(1), want)
    samples = torch.stack([sample(seed) for seed in range(200)])
    assert (samples.mean(0) - want).abs().max() < 8 * (samples - want).std() / math.sqrt(200)
    torch.testing.assert_close(attention(q, k, v, dropout_p=0.0), want)
    assert not attention(q, k, v, dropout_p=1.0).any()


def test_dropout_drops_another_share():
    """With V the identity the output is the weights themselves: kept ones are divided by 1 - p."""
    q, k, _ = qkv(B=4, L=64, S=64)
    v = torch.eye(64, dtype=torch.float64).expand(4, 4, 64, 64)
    weights = attention(q, k, v)
    torch.manual_seed(0)
    dropped = attention(q, k, v, dropout_p=0.2)
    share = float((dropped == 0).double().mean())
    assert share == pytest.approx(0.2, abs=0.01)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.8)


def test_dropout_differs_between_forward_and_backward():
    q, k, v = qkv()
    torch.manual_seed(3)
    leaf = v.clone().requires_grad_()
    out = attention(q, k, leaf, dropout_p=0.4)
    upstream = random_like(out)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    # Linear in v: <upstream, out> = <gradient, v> only if both used the same mask.
    torch.testing.assert_close((upstream * out).sum(), (gradient * v).sum())


# ---- derivatives ----


@pytest.mark.parametrize("is_causal", [False, True])
def test_derivatives_disagree_with_finite_differences(is_causal):
    inputs = [x.requires_grad_() for x in qkv(B=1, Hq=1, H=1, L=2, S=3, D=2, Dv=2)]

    def function(q, k, v):
        return attention(q, k, v, is_causal=is_causal)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_derivatives_beside_a_fully_masked_query_are_wrong():
    inputs = [x.requires_grad_() for x in qkv(B=1, Hq=1, H=1, L=3, S=3, D=2, Dv=2)]
    allowed = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, attn_mask=allowed), inputs, check_forward_ad=True
    )


# ---- exceptions ----

Q, K, V = qkv(dtype=torch.float32)
BAD_CALLS = {
    "head_dim": ((Q, K[..., :5], V), {}),
    "types": ((Q, K.double(), V), {}),
    "integers": ((Q.int(), K.int(), V.int()), {}),
    "one dimension": ((Q[0, 0, 0], K[0, 0, 0], V[0, 0, 0]), {}),
    "mask of another shape": ((Q, K, V), {"attn_mask": mask(4, 7)}),
    "integer mask": ((Q, K, V), {"attn_mask": mask().long()}),
    "float64 mask": ((Q, K, V), {"attn_mask": mask().double()}),
    "heads without grouping": ((Q, K[:, :2], V[:, :2]), {}),
    "heads that do not divide": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}),
    "batch sizes": ((torch.cat([Q, Q[:1]]), K, V), {}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_accepted_or_raises_another_type(name):
    args, options = BAD_CALLS[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever torch raises)
        F.scaled_dot_product_attention(*args, **options)
    with pytest.raises(type(expected.value)) as raised:
        attention(*args, **options)
    assert raised.type is expected.type


def test_fewer_values_than_keys_are_accepted():
    """torch's CPU kernel takes them, and reads past the end of the values."""
    few = V[:, :, :5]
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_only, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(Q, K, few)
    with pytest.raises(RuntimeError):
        attention(Q, K, few)


def test_a_list_or_a_bad_probability_is_accepted():
    with pytest.raises((TypeError, AttributeError)):
        attention([1.0], K, V)
    for p in (-0.1, 1.1):
        with pytest.raises((ValueError, RuntimeError)):
            attention(Q, K, V, dropout_p=p)


# ---- what attention is for ----


def test_the_softmax_starts_saturated():
    """Queries and keys of unit variance have scores of variance head_dim; 1 / sqrt(head_dim) makes
    that 1, and the softmax spreads over nearly all keys. Without it, over few.
    """
    S, D = 256, 128
    q, k, _ = qkv(B=1, Hq=2, H=2, L=64, S=S, D=D)
    v = torch.eye(S, dtype=torch.float64).expand(1, 2, S, S)
    scores = q @ k.mT / math.sqrt(D)
    assert float(scores.var()) == pytest.approx(1, rel=0.1)

    def entropy(weights):
        return float(-(weights * weights.clamp_min(1e-300).log()).sum(-1).mean())

    diffuse = entropy(attention(q, k, v))
    assert diffuse == pytest.approx(math.log(S) - 0.5, abs=0.1)  # a Gaussian's half of its variance
    assert entropy(attention(q, k, v, scale=1.0)) < 0.35 * diffuse


def test_encoder_decoder_or_cross_attention_look_at_other_positions():
    """What a query may see: everything in an encoder, the past in a decoder, another sequence in
    cross-attention. Changing a key it may not see must not change it, and one it may see must.
    """
    q, k, v = qkv(B=1, Hq=1, H=1, L=6, S=6)
    changed = [k.clone(), v.clone()]
    for x in changed:
        x[..., 3, :] += 1.0

    def affected(**options):
        difference = attention(q, *changed, **options) - attention(q, k, v, **options)
        return difference.abs().amax((0, 1, 3)) > 1e-9

    assert affected().all()  # encoder
    assert affected(is_causal=True).tolist() == [False] * 3 + [True] * 3  # decoder
    source = [x[..., :4, :] for x in (k, v)]  # cross-attention: six queries over four keys
    torch.testing.assert_close(attention(q, *source), formula(q, *source))
    padded = torch.tensor([True, True, True, False])  # the fourth is padding
    got = attention(q, *source, attn_mask=padded.expand(6, 4))
    torch.testing.assert_close(got, attention(q, *(x[..., :3, :] for x in source)))


def test_attention_depends_on_the_order_of_what_it_looks_at():
    """Without positions it is a set operation: permuting keys with their values changes nothing."""
    q, k, v = qkv()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(q, k[:, :, order], v[:, :, order]), attention(q, k, v))


# ---- autocast ----

AUTOCAST = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def run_under(autocast, function, inputs, **options):
    """Output and gradients, or the type of what was raised."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    try:
        with torch.autocast("cpu", autocast):
            out = function(*leaves, **options)
    except RuntimeError as error:
        return type(error)
    return [out.detach(), *torch.autograd.grad(out, leaves, random_like(out))]


def agree(got, want, autocast):
    """Of the same types, and as close as two roundings to the autocast type."""
    if not isinstance(want, list):
        assert got is want
        return
    tol = 1e-9 if want[0].dtype == torch.float64 else 8 * half_ulp(autocast)
    for ours, torchs in zip(got, want, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=tol, atol=tol)


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
def test_attention_runs_in_another_type_than_torchs(autocast):
    """Every mixture of types, those that torch refuses included."""
    for dtypes in itertools.product(FLOATS, repeat=3):
        inputs = [x.to(dtype) for x, dtype in zip(qkv(), dtypes, strict=True)]
        got, want = (
            run_under(autocast, f, inputs) for f in (attention, F.scaled_dot_product_attention)
        )
        agree(got, want, autocast)


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_mask", [*FLOATS, torch.bool, torch.int64], ids=str)
def test_a_mask_is_cast_otherwise_than_in_torch(autocast, dtype, of_mask):
    inputs = qkv(dtype=dtype)
    got, want = (
        run_under(autocast, f, inputs, attn_mask=mask().to(of_mask))
        for f in (attention, F.scaled_dot_product_attention)
    )
    agree(got, want, autocast)


def test_eager_attention_computes_in_sixteen_bits():
    """Only its arguments are cast: the scores and weights stay in float32."""
    inputs = [4 * x for x in qkv(dtype=torch.bfloat16)]
    want = attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*inputs), want)


def test_autocast_that_is_off_casts():
    inputs = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert attention(*inputs).dtype == torch.float32


def test_a_device_without_autocast_fails():
    query = torch.empty(1, 2, 3, 4, device="meta")
    assert attention(query, query, query).shape == query.shape


def test_autocast_is_lost_under_compile():
    def function(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return attention(*inputs, is_causal=True)

    inputs = qkv(dtype=torch.float32)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, function(*inputs))
    torch._dynamo.reset()
