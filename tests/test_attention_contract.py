"""The contract of torch's attention: shapes, dropout, exceptions; and which calls a kernel runs."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    additive,
    attention_gradients,
    gradient_of,
    random_like,
    random_mask,
    random_qkv,
)
from torch.testing._internal.two_tensor import TwoTensor

import fastgpt

attention = fastgpt.scaled_dot_product_attention


def compare_with_torch(backend, inputs, **options):
    got, want = (
        attention_gradients(f, inputs, **options)
        for f in (backend.attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- shapes and masks ----


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_other_numbers_of_batch_dimensions_fail(backend, batch):
    inputs = [
        random_like(torch.empty(*batch, n, d, dtype=torch.float64), seed)
        for seed, (n, d) in enumerate([(5, 4), (7, 4), (7, 6)])
    ]
    compare_with_torch(backend, inputs)
    compare_with_torch(backend, inputs, is_causal=True, scale=0.3)
    compare_with_torch(backend, inputs, attn_mask=random_mask(5, 7))
    compare_with_torch(backend, inputs, attn_mask=additive(random_mask(*batch, 5, 7)))


@pytest.mark.parametrize("kind", ["bool", "additive", "bias", "a row of keys"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
def test_a_mask_and_is_causal_are_not_combined(backend, kind, shape):
    """Both must allow a position, as in torch's CPU kernel; its math backend refuses the pair."""
    allowed = random_mask(*shape)
    allowed[1:, 0] = False
    allowed[2, :3] = False
    mask = {
        "bool": allowed,
        "additive": additive(allowed),
        "bias": random_like(torch.empty(shape, dtype=torch.float64)),
        "a row of keys": allowed[-1:],
    }[kind]
    inputs = random_qkv(L=shape[0], S=shape[1])
    compare_with_torch(backend, inputs, attn_mask=mask, is_causal=True)


def test_an_additive_mask_has_another_gradient_than_in_torch():
    q, k, v = random_qkv()
    bias = random_like(torch.empty(5, 7, dtype=torch.float64))
    upstream = random_like(q)
    got, want = (
        gradient_of(lambda b, f=f: f(q, k, v, attn_mask=b), bias, upstream)
        for f in (attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(got, want)


def test_no_head_dim_or_key_and_value_heads_that_differ_fail(one_isa):
    query, key, value = random_qkv(Hq=4, H=4)
    ours = one_isa.on_device(attention)
    got = ours(query[..., :0], key[..., :0], value)
    torch.testing.assert_close(got, value.mean(2, keepdim=True).expand(got.shape))
    inputs = (query, key[:, :2], value)
    for options in ({}, {"is_causal": True}):
        got, want = (
            attention_gradients(f, inputs, enable_gqa=True, **options)
            for f in (ours, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- which calls the kernel runs ----


def test_what_no_kernel_covers_goes_to_eager_unannounced(best_kernel):
    """Each with its reason."""
    query, key, value = inputs = random_qkv(dtype=torch.float32)
    learnt = torch.zeros(5, 7, requires_grad=True)
    calls = [
        ("dropout", inputs, {"dropout_p": 0.1}),
        ("gradient", inputs, {"attn_mask": learnt}),
        ("512", random_qkv(D=513, Dv=8), {}),
        ("512", random_qkv(D=8, Dv=513), {}),
        ("empty", (query[:, :, :0], key, value), {}),
        ("empty", (query, key[:, :, :0], value[:, :, :0]), {}),
        ("empty", (query[:0], key[:0], value[:0]), {}),
        ("empty", (query[..., :0], key[..., :0], value), {}),
        ("subclass", [TwoTensor(x, x) for x in inputs], {}),
        ("type", [x.to(torch.float8_e4m3fn) for x in inputs], {}),
    ]
    for reason, args, options in calls:
        args, options = best_kernel.placed((args, options))
        explanation = fastgpt.explain(attention, *args, **options)
        assert explanation.backend == "eager", reason
        reasons = dict(explanation.decisions)
        assert reason in reasons[best_kernel.name]


def test_empty_tensors_differ_from_torch(one_isa):
    query, key, value = random_qkv()
    for inputs in (
        (query[:, :, :0], key, value),
        (query, key[:, :, :0], value[:, :, :0]),
        (query[:0], key[:0], value[:0]),
        (query, key, value[..., :0]),
    ):
        got, want = (
            attention_gradients(f, inputs)
            for f in (one_isa.on_device(attention), F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_the_kernel_covers_goes_to_eager(kernel, dtype):
    """Its whole range, by the assertion in `attention`; the values are tested elsewhere."""
    query, key, value = random_qkv(Hq=4, dtype=dtype)
    mask = random_mask(5, 7)
    with torch.no_grad():
        for options in (
            {},
            {"is_causal": True},
            {"scale": 0.3},
            {"attn_mask": mask},
            {"attn_mask": additive(mask, dtype)},
            {"attn_mask": additive(mask, torch.promote_types(dtype, torch.float32))},
        ):
            kernel.attention(query, key, value, enable_gqa=True, **options)
        for head_dim, value_dim in ((1, 512), (512, 1)):
            kernel.attention(*random_qkv(D=head_dim, Dv=value_dim, dtype=dtype))
        for index in ((0, 0), (0,)):
            kernel.attention(*(x[index] for x in random_qkv(dtype=dtype)))
        kernel.attention(*(x[None] for x in random_qkv(dtype=dtype)))


# ---- dropout ----


def test_dropout_is_biased_or_not_reproducible():
    q, k, v = random_qkv(B=1, Hq=2, H=2, L=8, S=32)
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
    q, k, _ = random_qkv(B=4, L=64, S=64)
    v = torch.eye(64, dtype=torch.float64).expand(4, 2, 64, 64)
    weights = attention(q, k, v)
    torch.manual_seed(0)
    dropped = attention(q, k, v, dropout_p=0.2)
    share = float((dropped == 0).double().mean())
    assert share == pytest.approx(0.2, abs=0.01)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.8)


def test_dropout_differs_between_forward_and_backward():
    q, k, v = random_qkv()
    torch.manual_seed(3)
    leaf = v.clone().requires_grad_()
    out = attention(q, k, leaf, dropout_p=0.4)
    upstream = random_like(out)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    # Linear in v: <upstream, out> = <gradient, v> only if both used the same mask.
    torch.testing.assert_close((upstream * out).sum(), (gradient * v).sum())


# ---- exceptions ----

Q, K, V = random_qkv(Hq=4, H=4, dtype=torch.float32)
BAD_CALLS = {
    "head_dim": ((Q, K[..., :5], V), {}),
    "types": ((Q, K.double(), V), {}),
    "integers": ((Q.int(), K.int(), V.int()), {}),
    "one dimension": ((Q[0, 0, 0], K[0, 0, 0], V[0, 0, 0]), {}),
    "mask of another shape": ((Q, K, V), {"attn_mask": random_mask(4, 7)}),
    "integer mask": ((Q, K, V), {"attn_mask": random_mask(5, 7).long()}),
    "float64 mask": ((Q, K, V), {"attn_mask": random_mask(5, 7).double()}),
    "heads without grouping": ((Q, K[:, :2], V[:, :2]), {}),
    "heads that do not divide": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}),
    "batch sizes": ((torch.cat([Q, Q[:1]]), K, V), {}),
    "mask with more heads": ((Q, K, V), {"attn_mask": random_mask(2, 8, 5, 7)}),
    "a list": (([1.0], K, V), {}),
    "a list for a mask": ((Q, K, V), {"attn_mask": [True]}),
    "scale of another type": ((Q, K, V), {"scale": "2"}),
    "scale that would learn": ((Q, K, V), {"scale": torch.tensor(1.0, requires_grad=True)}),
    "is_causal of another type": ((Q, K, V), {"is_causal": None}),
    "negative dropout": ((Q, K, V), {"dropout_p": -0.1}),
    "too much dropout": ((Q, K, V), {"dropout_p": 1.1}),
    "key elsewhere": ((Q, K.to("meta"), V), {}),
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
