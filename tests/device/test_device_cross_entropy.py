"""Cross-entropy on the GPU: values and gradients against float64."""

import math

import pytest
import torch
from device_oracle import both, check_cross_entropy, cross_entropy, normal, targets

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
N = 37


@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize("classes", [1, 2, 65, 1000, 1024, 1025, 4099, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loss_or_gradient_is_not_exact_to_one_rounding(device, dtype, classes, scale):
    x = normal(N, classes, dtype=dtype, device=device, scale=scale).requires_grad_()
    t, g = targets(N, classes, device), normal(N, dtype=dtype, device=device, seed=1)
    got = both(lambda x: cross_entropy(x, t, reduction="none"), (x,), g)
    check_cross_entropy(got, x, t, g, range_of=10 * scale)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [130, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_option_changes_the_loss_otherwise_than_defined(
    device, dtype, classes, weighted, smoothing, reduction
):
    x = normal(N, classes, dtype=dtype, device=device, scale=3).requires_grad_()
    t = targets(N, classes, device)
    t[::5] = 7
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": 7}
    if weighted:
        options["weight"] = normal(classes, dtype=dtype, device=device, seed=2).abs() + 0.5
    size = (N,) if reduction == "none" else ()
    g = normal(*size, dtype=dtype, device=device, seed=1)
    got = both(lambda x: cross_entropy(x, t, **options), (x,), g)
    check_cross_entropy(got, x, t, g, range_of=30, **options)


def view_of_rows(kind, dtype, device):
    """Logits (N, C) or (B, C, T) whose strides are not those of a new tensor."""
    if kind == "transposed":
        return normal(4, 9, 1031, dtype=dtype, device=device).transpose(1, 2)
    if kind == "column slice":  # rows apart, and off alignment
        return normal(36, 1099, dtype=dtype, device=device)[:, 3:1034]
    return normal(72, 1031, dtype=dtype, device=device)[::2]


@pytest.mark.parametrize("kind", ["transposed", "column slice", "every second row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_lead_to_the_wrong_numbers(device, dtype, kind):
    x = view_of_rows(kind, dtype, device).detach().requires_grad_()
    t, g = targets(36, 1031, device), normal(36, dtype=dtype, device=device, seed=1)
    shape = (4, 9) if x.dim() == 3 else (36,)
    loss, gradient = both(
        lambda x: cross_entropy(x, t.view(shape), reduction="none"), (x,), g.view(shape)
    )
    rows, gradient = (y.movedim(1, -1).reshape(36, 1031) for y in (x, gradient))
    check_cross_entropy((loss.flatten(), gradient), rows, t, g)


def test_an_ignored_row_or_infinite_logit_leaks(device):
    x = normal(8, 3000, device=device)
    x[2] = math.nan
    x[3, :2000] = -math.inf
    t = targets(8, 3000, device)
    t[2], t[3] = -100, 2500
    x.requires_grad_()
    g = normal(8, device=device, seed=1)
    loss, gradient = both(lambda x: cross_entropy(x, t, reduction="none"), (x,), g)
    assert loss[2] == 0
    assert not gradient[2].any()
    assert not gradient[3, :2000].any()
    finite = x.detach().masked_fill(~x.detach().isfinite(), -1e4)
    finite[2] = 0
    check_cross_entropy((loss, gradient), finite, t, g)


def test_two_runs_give_different_bits(gpu):
    x = normal(512, 5003, dtype=torch.bfloat16).requires_grad_()
    t, g = targets(512, 5003), torch.tensor(1.375, dtype=torch.bfloat16, device=gpu)
    runs = [both(lambda x: cross_entropy(x, t, label_smoothing=0.1), (x,), g) for _ in range(4)]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
