"""Attention under torch.autocast: torch's types, and nothing computed in fewer bits.

Cross-entropy under autocast is in test_cross_entropy_contract.py.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import half_ulp, random_like, random_mask, random_qkv

import fastgpt

attention = fastgpt.scaled_dot_product_attention
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
        inputs = [x.to(dtype) for x, dtype in zip(random_qkv(), dtypes, strict=True)]
        got, want = (
            run_under(autocast, f, inputs) for f in (attention, F.scaled_dot_product_attention)
        )
        agree(got, want, autocast)


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_mask", [*FLOATS, torch.bool, torch.int64], ids=str)
def test_a_mask_is_cast_otherwise_than_in_torch(autocast, dtype, of_mask):
    inputs = random_qkv(dtype=dtype)
    got, want = (
        run_under(autocast, f, inputs, attn_mask=random_mask(5, 7).to(of_mask))
        for f in (attention, F.scaled_dot_product_attention)
    )
    agree(got, want, autocast)


def test_eager_attention_computes_in_sixteen_bits():
    """Only its arguments are cast: the scores and weights stay in float32."""
    inputs = [4 * x for x in random_qkv(dtype=torch.bfloat16)]
    want = attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*inputs), want)


def test_autocast_that_is_off_casts():
    inputs = random_qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert attention(*inputs).dtype == torch.float32


def test_a_device_without_autocast_fails():
    query = torch.empty(1, 2, 3, 4, device="meta")
    assert attention(query, query, query).shape == query.shape


def test_autocast_is_lost_under_compile():
    def function(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return attention(*inputs, is_causal=True)

    inputs = random_qkv(dtype=torch.float32)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, function(*inputs))
    torch._dynamo.reset()
