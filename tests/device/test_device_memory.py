"""What the ops allocate on a GPU."""

import pytest
import torch
from device_oracle import attention, cross_entropy, normal, targets

from benchmarks.memory import cuda_peak_bytes


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_allocates_more_than_one_gradient(gpu, kernels, dtype, options):
    x = normal(1024, 5003, dtype=dtype).requires_grad_()
    t = targets(1024, 5003)
    rows = 64 * 1024 * 8  # dozens of numbers for each row: statistics, targets and their sums
    loss = cross_entropy(x, t, **options)
    torch.autograd.grad(loss, x)
    assert cuda_peak_bytes(lambda: cross_entropy(x, t, **options)) <= rows
    peak = cuda_peak_bytes(lambda: torch.autograd.grad(cross_entropy(x, t, **options), x))
    assert x.nbytes <= peak <= x.nbytes + rows


def test_columns_are_copied(native):
    """Logits (N, C, L) take one gradient, and some numbers for each of the positions."""
    x = normal(4, 5003, 256, dtype=torch.bfloat16).requires_grad_()
    t = targets(1024, 5003).view(4, 256)
    torch.autograd.grad(cross_entropy(x, t), x)
    peak = cuda_peak_bytes(lambda: torch.autograd.grad(cross_entropy(x, t), x))
    assert x.nbytes <= peak <= 1.1 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_in_place_allocates_one(gpu, kernels, dtype):
    x = normal(1024, 5003, dtype=dtype).requires_grad_()
    t = targets(1024, 5003)

    def call():
        return torch.autograd.grad(cross_entropy(x, t, inplace_backward=True), x)

    call()
    assert cuda_peak_bytes(call) <= 0.1 * x.nbytes


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_allocates_more_than_in_proportion_to_its_inputs(gpu, is_causal):
    def peak(length: int) -> float:
        x = normal(1, 2, length, 64, dtype=torch.bfloat16).requires_grad_()
        upstream = torch.ones_like(x)

        def call():
            return torch.autograd.grad(attention(x, x, x, is_causal=is_causal), x, upstream)

        call()
        return cuda_peak_bytes(call) / x.nbytes

    short, long = peak(2048), peak(8192)
    assert long <= 1.1 * short
    assert long * 8192 * 64 < 8192 * 8192 / 2  # far from L x S for each head
