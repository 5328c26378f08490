"""Offsets and sizes above 2^31 elements: nothing may be counted in 32 bits.

Each test also runs at a small size, at which it checks itself.
"""

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

BF16 = torch.bfloat16


def large(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("N", "classes", "gigabytes"), [(300, 1031, 0.1), large(43_000, 50_304, 11)]
)
def test_rows_beyond_two_gigaelements_are_wrong(
    device, kernels, free_memory, N, classes, gigabytes
):
    """Checked are the first and last rows, and those around 2^31."""
    free_memory(gigabytes)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(N, classes, dtype=BF16, device=device)
    x.normal_(generator=generator).requires_grad_()
    t, g = targets(N, classes, device), normal(N, dtype=BF16, device=device, seed=1)
    loss, gradient = both(lambda x: cross_entropy(x, t, reduction="none"), (x,), g)
    middle = min((1 << 31) // classes, N - 5)
    rows = torch.tensor([0, 1, middle - 1, middle, middle + 1, N - 2, N - 1], device=device)
    check_cross_entropy((loss[rows], gradient[rows]), x.detach()[rows], t[rows], g[rows])


# 2^31 elements are 128 steps of 2^24.
steps = pytest.mark.parametrize(("step", "gigabytes"), [(1 << 14, 0.1), large(1 << 24, 6)])


@steps
def test_rows_two_gigaelements_apart_are_wrong(device, kernels, free_memory, step, gigabytes):
    free_memory(gigabytes)
    buffer = torch.empty(130 * step, dtype=BF16, device=device)
    x = torch.as_strided(buffer, (130, 5003), (step, 1))
    x.copy_(normal(130, 5003, device=device))
    x = x.detach().requires_grad_()
    t, g = targets(130, 5003, device), normal(130, dtype=BF16, device=device, seed=1)
    got = both(lambda x: cross_entropy(x, t, reduction="none"), (x,), g)
    check_cross_entropy(got, x, t, g)


@steps
def test_columns_two_gigaelements_apart_are_wrong(native, free_memory, step, gigabytes):
    """Logits (1, C, L) whose classes are a step apart."""
    free_memory(gigabytes)
    buffer = torch.empty(130 * step, dtype=BF16, device="cuda")
    x = torch.as_strided(buffer, (1, 130, 300), (130 * step, step, 1))
    x.copy_(normal(1, 130, 300, device="cuda"))
    x = x.detach().requires_grad_()
    t, g = targets(300, 130), normal(300, dtype=BF16, seed=1)
    loss, gradient = both(
        lambda x: cross_entropy(x, t.view(1, 300), reduction="none"), (x,), g.view(1, 300)
    )
    check_cross_entropy((loss[0], gradient[0].t()), x.detach()[0].t(), t, g)


@pytest.mark.parametrize("far", ["batch", "head", "sequence"])
@steps
def test_attention_over_strides_of_two_gigaelements_is_wrong(
    device, free_memory, step, gigabytes, far
):
    """One of the dimensions has 130 places, a step apart, in all of query, key, value and the
    upstream gradient, which lie in one buffer.
    """
    free_memory(gigabytes)
    D = 64
    B, H, L, strides = {
        "batch": (130, 1, 33, (step, 33 * D, D, 1)),
        "head": (1, 130, 33, (130 * step, step, D, 1)),
        "sequence": (1, 2, 130, (130 * step, D, step, 1)),
    }[far]
    buffer = torch.empty(130 * step, dtype=BF16, device=device)
    views = [torch.as_strided(buffer, (B, H, L, D), strides, i * step // 4) for i in range(4)]
    for i, view in enumerate(views):
        view.copy_(normal(B, H, L, D, device=device, seed=i))
    *leaves, upstream = (view.detach() for view in views)
    leaves = [x.requires_grad_() for x in leaves]
    got = both(lambda *x: attention(*x, is_causal=True), leaves, upstream)
    check_attention(got, exact_attention(*leaves, upstream, is_causal=True), BF16)


@pytest.mark.parametrize(("L", "gigabytes"), [(300, 0.1), large(1 << 16, 4)])
def test_more_than_four_gigascores_are_wrong(device, free_memory, L, gigabytes):
    """Checked are the first and last queries, and the keys at which only the last ones look."""
    free_memory(gigabytes)
    few = 8
    *leaves, upstream = (normal(1, 1, L, 64, dtype=BF16, device=device, seed=i) for i in range(4))
    leaves = [x.requires_grad_() for x in leaves]
    got = both(lambda *x: attention(*x, is_causal=True), leaves, upstream)
    tolerance = attention_tolerance(BF16)
    for rows in (slice(0, few), slice(L - few, L)):
        truth = exact_attention(*leaves, upstream, is_causal=True, rows=rows)
        assert_close(got[0][:, :, rows], truth[0], tolerance, TENSORS[0])
        assert_close(got[1][:, :, rows], truth[1][:, :, rows], tolerance, TENSORS[1])
    for name, ours, want in zip(TENSORS[2:], got[2:], truth[2:], strict=True):
        assert_close(ours[:, :, L - few :], want[:, :, L - few :], tolerance, name)
