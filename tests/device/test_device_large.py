"""Offsets and sizes above 2^31 elements on a GPU: nothing may be counted in 32 bits."""

import pytest
import torch
from device_oracle import (
    TENSORS,
    assert_close,
    attention,
    attention_tolerance,
    both,
    check_attention,
    check_cross_entropy,
    cross_entropy,
    exact_attention,
    normal,
    targets,
)

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
STEP = 1 << 24  # elements; 2^31 is 128 of them


def test_rows_beyond_two_gigaelements_are_wrong(free_memory):
    """43,000 x 50,304 logits: checked are the first and last rows and those around 2^31."""
    N, classes = 43_000, 50_304
    free_memory(11)
    x = torch.empty(N, classes, dtype=BF16, device="cuda")
    x.normal_(generator=torch.Generator("cuda").manual_seed(0)).requires_grad_()
    t, g = targets(N, classes), normal(N, dtype=BF16, seed=1)
    loss, gradient = both(lambda x: cross_entropy(x, t, reduction="none"), (x,), g)
    middle = (1 << 31) // classes
    rows = torch.tensor([0, 1, middle - 1, middle, middle + 1, N - 2, N - 1], device="cuda")
    got = loss[rows], gradient[rows]
    check_cross_entropy(got, x.detach()[rows], t[rows], g[rows])


def test_rows_two_gigaelements_apart_are_wrong(free_memory):
    free_memory(5)
    buffer = torch.empty(129 * STEP + 5003, dtype=BF16, device="cuda")
    x = torch.as_strided(buffer, (130, 5003), (STEP, 1))
    x.copy_(normal(130, 5003))
    x = x.detach().requires_grad_()
    t, g = targets(130, 5003), normal(130, dtype=BF16, seed=1)
    got = both(lambda x: cross_entropy(x, t, reduction="none"), (x,), g)
    check_cross_entropy(got, x, t, g)


@pytest.mark.parametrize("far", ["batch", "head", "sequence"])
def test_attention_over_strides_of_two_gigaelements_is_wrong(free_memory, far):
    """One of the dimensions has 130 places, 2^24 elements apart, in all of query, key, value and
    the upstream gradient, which lie in one buffer.
    """
    free_memory(6)
    buffer = torch.empty(130 * STEP, dtype=BF16, device="cuda")
    B, H, L, D = {"batch": (130, 1, 33, 64), "head": (1, 130, 33, 64), "sequence": (1, 2, 130, 64)}[
        far
    ]
    strides = {
        "batch": (STEP, D * L, D, 1),
        "head": (D, STEP, D, 1),
        "sequence": (D, D, STEP, 1),
    }[far]
    views = []
    for i in range(4):
        x = torch.as_strided(buffer, (B, H, L, D), strides, i << 20)
        x.copy_(normal(B, H, L, D, seed=i))
        views.append(x.detach())
    *leaves, upstream = views
    leaves = [x.requires_grad_() for x in leaves]
    got = both(lambda *x: attention(*x, is_causal=True), leaves, upstream)
    check_attention(got, exact_attention(*leaves, upstream, is_causal=True), BF16)


def test_more_than_four_gigascores_are_wrong(free_memory):
    """65,536 queries and keys: the first and last rows, and the keys that only those look at."""
    free_memory(4)
    L, few = 1 << 16, 8
    leaves = [normal(1, 1, L, 64, dtype=BF16, seed=i).requires_grad_() for i in range(3)]
    upstream = normal(1, 1, L, 64, dtype=BF16, seed=9)
    got = both(lambda *x: attention(*x, is_causal=True), leaves, upstream)
    for rows in (slice(0, few), slice(L - few, L)):
        truth = exact_attention(*leaves, upstream, is_causal=True, rows=rows)
        output, grad_query, grad_key, grad_value = truth
        tolerance = attention_tolerance(BF16)
        assert_close(got[0][:, :, rows], output, tolerance, TENSORS[0])
        assert_close(got[1][:, :, rows], grad_query[:, :, rows], tolerance, TENSORS[1])
    # The last keys are seen by the last queries alone, whose weights are spread thin.
    for name, ours, want in zip(TENSORS[2:], got[2:], (grad_key, grad_value), strict=True):
        last = slice(L - few, L)
        error = (ours[:, :, last] - want[:, :, last]).abs().max().item()
        assert error <= 2**-7 * want[:, :, last].abs().max().item(), name
