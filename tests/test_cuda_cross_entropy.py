"""What only the CUDA kernels of cross-entropy have, in their host twin."""

import pytest
import torch
import torch.nn.functional as F
import twin
from backends import TWIN, activate


@pytest.fixture
def on_twin():
    yield from activate(TWIN)


@pytest.fixture(params=[1, 2, 8])
def clusters(request, on_twin):
    """GPUs whose largest cluster is so many blocks; 1 is one without clusters."""
    twin.launcher()
    torch.ops.fastgpt_twin_settings.largest_cluster(request.param)
    yield request.param
    torch.ops.fastgpt_twin_settings.largest_cluster(8)


def exact(logits, target, upstream, **options):
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf, target, reduction="none", **options)
    return loss.detach(), *torch.autograd.grad(loss, leaf, upstream.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_row_of_several_blocks_is_wrong(on_twin, clusters, by_columns, dtype):
    N, C, L = (2, 140_001, 1) if not by_columns else (1, 9_001, 33)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(N, C, L, generator=generator, dtype=torch.float64).to(dtype) * 4
    logits = logits if by_columns else logits.squeeze(2)
    target = torch.randint(C, logits.shape[:1] + logits.shape[2:], generator=generator)
    upstream = torch.randn(target.shape, generator=generator, dtype=torch.float64).to(dtype)
    leaf = logits.clone().requires_grad_()
    loss = on_twin.cross_entropy(leaf, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    want_loss, want = exact(logits, target, upstream)
    tolerance = (
        torch.finfo(dtype).eps + 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    )
    torch.testing.assert_close(loss.double(), want_loss, rtol=tolerance, atol=0)
    assert ((gradient - want).abs().amax() / want.abs().amax()).item() <= tolerance


@pytest.mark.parametrize("value", [3, -1, 10**12])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.ones(3)}])
def test_an_out_of_range_target_is_accepted_on_the_device(on_twin, options, value):
    target = torch.tensor([0, value, 2])
    with pytest.raises(IndexError, match="Target is out of bounds"):
        on_twin.cross_entropy(torch.randn(3, 3), target, **options)
