"""Attention on the GPU: values and gradients against float64."""

import math

import pytest
import torch
from device_oracle import attention, both, check_attention, exact_attention, normal

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Each is three kernels to compile, a matter of seconds. So of the other types only the accuracy is
# looked at, and the rest in bfloat16.
CASES = [
    *((dtype, D) for dtype in (BF16, FP16) for D in (64, 80, 128)),
    *((dtype, 64) for dtype in (FP32, FP64)),
]


def check(device, dtype, q, k, v, **options):
    """Normal query, key and value of these sizes."""
    leaves = [
        normal(*size, dtype=dtype, device=device, seed=seed).requires_grad_()
        for seed, size in enumerate((q, k, v))
    ]
    return check_leaves(leaves, **options)


def check_leaves(leaves, upstream=None, **options):
    query, _, value = leaves
    if upstream is None:
        size = (*query.shape[:3], value.shape[3])
        upstream = normal(*size, dtype=query.dtype, device=query.device, seed=9)
    grouped = {"enable_gqa": True} if query.shape[1] != leaves[1].shape[1] else {}
    got = both(lambda *x: attention(*x, **options, **grouped), leaves, upstream)
    truth = exact_attention(*leaves, upstream, **options)
    check_attention(got, truth, query.dtype)
    return got


@pytest.mark.parametrize(
    ("dtype", "D", "is_causal"),
    [
        *((*case, is_causal) for case in CASES for is_causal in (False, True)),
        *((dtype, D, True) for dtype in (FP32, FP64) for D in (80, 128)),
    ],
    ids=str,
)
def test_an_output_or_gradient_is_not_exact(device, dtype, D, is_causal):
    # No whole tiles, but whole vectors: the kernels that the benchmarks run.
    check(device, dtype, *3 * [(2, 3, 208, D)], is_causal=is_causal)


@pytest.mark.parametrize("D", [1, 17, 32, 192, 256])
def test_a_head_dim_is_padded_wrongly(device, D):
    check(device, BF16, *3 * [(1, 2, 70, D)], is_causal=True)


@pytest.mark.parametrize("sizes", [(1, 300), (300, 1), (129, 64), (64, 129), (257, 255)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths_that_fill_no_tile_go_wrong(device, is_causal, sizes):
    L, S = sizes
    check(device, BF16, (1, 2, L, 64), *2 * [(1, 2, S, 64)], is_causal=is_causal)


def test_a_value_of_its_own_head_dim_goes_wrong(device):
    check(device, BF16, (2, 2, 90, 64), (2, 2, 70, 64), (2, 2, 70, 40))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "additive", "keys only", "one query hidden"])
def test_a_mask_is_not_applied_as_defined(device, kind, is_causal):
    L, S = 130, 140
    mask = normal(2, 3, L, S, device=device, seed=5) > -0.5
    mask[..., 0] = True
    if kind == "additive":
        mask = normal(2, 1, L, S, dtype=BF16, device=device, seed=6).masked_fill(
            ~mask[:, :1], -math.inf
        )
    elif kind == "keys only":
        mask = mask[:1, :1, :1]
    elif kind == "one query hidden":
        mask[:, :, 33] = False
    sizes = (2, 3, L, 64), (2, 3, S, 64), (2, 3, S, 64)
    output, grad_query, *_ = check(device, BF16, *sizes, attn_mask=mask, is_causal=is_causal)
    if kind == "one query hidden":
        assert not output[:, :, 33].any()
        assert not grad_query[:, :, 33].any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_query_heads_read_another_groups_keys(device, is_causal):
    check(device, BF16, (2, 8, 150, 64), *2 * [(2, 2, 150, 64)], is_causal=is_causal)


@pytest.mark.parametrize("kind", ["fused projection", "transposed heads", "innermost not 1"])
def test_strides_lead_to_the_wrong_numbers(device, kind):
    B, H, L, D, dtype = 2, 3, 100, 64, BF16
    if kind == "fused projection":
        x = normal(B, L, 3 * H, D, dtype=dtype, device=device)
        leaves = [part.transpose(1, 2) for part in x.split(H, 2)]
    elif kind == "transposed heads":
        leaves = [
            normal(H, L, B, D + 8, dtype=dtype, device=device, seed=i)[..., :D].permute(2, 0, 1, 3)
            for i in range(3)
        ]
    else:
        leaves = [normal(B, H, D, L, dtype=dtype, device=device, seed=i).mT for i in range(3)]
    upstream = normal(B, L, H, D, dtype=dtype, device=device, seed=9).transpose(1, 2)
    check_leaves([x.detach().requires_grad_() for x in leaves], upstream, is_causal=True)


def test_nan_that_is_hidden_reaches_something(device):
    leaves = [normal(1, 2, 160, 64, dtype=BF16, device=device, seed=i) for i in range(3)]
    clean = [x.clone() for x in leaves]
    for x in leaves[1:]:
        x[:, :, 150:] = math.nan
    mask = (torch.arange(160, device=device) < 150).view(1, 1, 1, 160)
    upstream = normal(1, 2, 160, 64, dtype=BF16, device=device, seed=9)
    leaves = [x.requires_grad_() for x in leaves]
    got = both(lambda *x: attention(*x, attn_mask=mask), leaves, upstream)
    check_attention(got, exact_attention(*clean, upstream, attn_mask=mask), BF16)
    assert not any(gradient[:, :, 150:].any() for gradient in got[2:])


def test_tf32_is_used_unasked(gpu):
    """Its ten bits of mantissa would show in the fifth digit, and the first test would fail on it;
    here torch allows it, so the error may grow, and must fall again when torch does not.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    assert before != "tf32"
    check(gpu, FP32, *3 * [(1, 2, 256, 64)])
    matmul.fp32_precision = "tf32"
    try:
        leaves = [normal(1, 2, 256, 64, seed=i).requires_grad_() for i in range(3)]
        upstream = normal(1, 2, 256, 64, seed=9)
        got = both(attention, leaves, upstream)
        truth = exact_attention(*leaves, upstream)
        for ours, want in zip(got, truth, strict=True):
            assert (ours - want).abs().max() <= 2**-8 * want.abs().max()
    finally:
        matmul.fp32_precision = before
    check(gpu, FP32, *3 * [(1, 2, 256, 64)])


@pytest.mark.parametrize("heads", [4, 2])
def test_two_runs_give_different_bits(gpu, heads):
    size = (2, heads, 700, 64)
    leaves = [
        normal(*s, dtype=BF16, seed=i).requires_grad_()
        for i, s in enumerate(((2, 4, 700, 64), size, size))
    ]
    upstream = normal(2, 4, 700, 64, dtype=BF16, seed=9)
    function = lambda *x: attention(*x, is_causal=True, enable_gqa=True)  # noqa: E731
    runs = [both(function, leaves, upstream) for _ in range(4)]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
