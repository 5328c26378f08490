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


def run_under(autocast, function, inputs, device="cpu", **options):
    """Output and gradients, or the type of what was raised."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    try:
        with torch.autocast(device, autocast):
            out = function(*leaves, **options)
    except RuntimeError as error:
        return type(error)
    return [out.detach(), *torch.autograd.grad(out, leaves, random_like(out))]


def agree(backend, autocast, inputs, **options):
    """With torch: of the same types, and as close as two roundings to the autocast type."""
    ours = backend.on_device(attention)
    got = run_under(autocast, ours, inputs, backend.device, **options)
    want = run_under(autocast, F.scaled_dot_product_attention, inputs, **options)
    if not isinstance(want, list):
        assert got is want
        return
    tol = 1e-9 if want[0].dtype == torch.float64 else 8 * half_ulp(autocast)
    for ours, torchs in zip(got, want, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=tol, atol=tol)


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
def test_attention_runs_in_another_type_than_torchs(one_isa, autocast):
    """Every mixture of types, those that torch refuses included."""
    for dtypes in itertools.product(FLOATS, repeat=3):
        inputs = [x.to(dtype) for x, dtype in zip(random_qkv(B=1), dtypes, strict=True)]
        agree(one_isa, autocast, inputs)


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_mask", [*FLOATS, torch.bool, torch.int64], ids=str)
def test_a_mask_is_cast_otherwise_than_in_torch(one_isa, autocast, dtype, of_mask):
    mask = random_mask(5, 7).to(of_mask)
    agree(one_isa, autocast, random_qkv(dtype=dtype), attn_mask=mask)


def test_attention_computes_in_sixteen_bits(backend):
    """Only its arguments are cast: the scores and weights stay in float32."""
    inputs = [4 * x for x in random_qkv(dtype=torch.bfloat16)]
    want = backend.attention(*inputs)
    with torch.autocast(backend.device, torch.bfloat16):
        assert torch.equal(backend.attention(*inputs), want)


def test_autocast_that_is_off_casts():
    inputs = random_qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert attention(*inputs).dtype == torch.float32


def test_a_device_without_autocast_fails():
    query = torch.empty(1, 2, 3, 4, device="meta")
    assert attention(query, query, query).shape == query.shape


def test_autocast_is_lost_under_compile(one_isa, compiled):
    def function(*inputs):
        with torch.autocast(one_isa.device, torch.bfloat16):
            return attention(*inputs, is_causal=True)

    inputs = random_qkv(dtype=torch.float32)
    got = one_isa.on_device(compiled(function))(*inputs)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, one_isa.on_device(function)(*inputs))
