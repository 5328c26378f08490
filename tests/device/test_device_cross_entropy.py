"""Cross-entropy on the GPU: values and gradients against float64."""

import math

import pytest
import torch
from device_oracle import (
    both,
    check_against_eager,
    check_cross_entropy,
    cross_entropy,
    normal,
    targets,
)

import fastgpt

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
N = 37


@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize("classes", [1, 2, 65, 1000, 1024, 1025, 4099, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loss_or_gradient_is_not_exact_to_one_rounding(device, kernels, dtype, classes, scale):
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
    device, kernels, dtype, classes, weighted, smoothing, reduction
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
def test_strides_lead_to_the_wrong_numbers(device, kernels, dtype, kind):
    x = view_of_rows(kind, dtype, device).detach().requires_grad_()
    t, g = targets(36, 1031, device), normal(36, dtype=dtype, device=device, seed=1)
    shape = (4, 9) if x.dim() == 3 else (36,)
    loss, gradient = both(
        lambda x: cross_entropy(x, t.view(shape), reduction="none"), (x,), g.view(shape)
    )
    rows, gradient = (y.movedim(1, -1).reshape(36, 1031) for y in (x, gradient))
    check_cross_entropy((loss.flatten(), gradient), rows, t, g)


def test_an_ignored_row_or_infinite_logit_leaks(device, kernels):
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


def test_two_runs_give_different_bits(gpu, kernels):
    x = normal(512, 5003, dtype=torch.bfloat16).requires_grad_()
    t, g = targets(512, 5003), torch.tensor(1.375, dtype=torch.bfloat16, device=gpu)
    runs = [both(lambda x: cross_entropy(x, t, label_smoothing=0.1), (x,), g) for _ in range(4)]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


# What reaches past the plain loss: held against eager in float64.
OPTIONS = {
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 4.0},
    "smoothing": {"label_smoothing": 0.2},
    "all": {"z_loss": 1e-2, "softcap": 4.0, "label_smoothing": 0.2},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("target", ["classes", "probabilities", "wide probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_option_is_forgotten(device, kernels, dtype, target, options, weighted):
    """The loss together with lse; probabilities of the logits' type and of float32."""
    classes = 1003
    x = normal(N, classes, dtype=dtype, device=device, scale=3).requires_grad_()
    leaves = (x,)
    t = targets(N, classes, device)
    t[::5] = -100
    if target != "classes":
        q = torch.softmax(normal(N, classes, device=device, seed=2), 1)
        leaves = (x, (q if "wide" in target else q.to(dtype)).requires_grad_())
    weight = normal(classes, device=device, seed=3).abs().to(dtype) + 0.5 if weighted else None

    def function(x, target=t):
        w = weight if weight is None else weight.to(x.dtype)
        loss, lse = _public(x)(x, target, w, reduction="none", return_lse=True, **options)
        return loss.to(lse.dtype) + 0.1 * lse

    # Of numbers that the loss's type has, to which its gradient is rounded.
    upstream = normal(N, dtype=dtype, device=device, seed=1).float()
    check_against_eager(function, leaves, upstream)


def _public(x):
    """The reference of a float32 call in float64 is not held to the kernels' backend."""
    return fastgpt.cross_entropy if x.dtype == torch.float64 else cross_entropy


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_in_place_is_another_or_elsewhere(device, kernels, dtype, options):
    x = normal(N, 1003, dtype=dtype, device=device, scale=3).requires_grad_()
    t = targets(N, 1003, device)

    def function(x):
        in_place = x.dtype == dtype
        return _public(x)(x, t, reduction="none", inplace_backward=in_place, **options)

    upstream = normal(N, dtype=dtype, device=device, seed=1)
    _, gradient = check_against_eager(function, (x,), upstream)
    assert gradient.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("classes", [100_003, 131_072, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_no_multiprocessor_holds_is_wrong(gpu, kernels, dtype, classes):
    x = normal(5, classes, dtype=dtype, scale=3).requires_grad_()
    t, g = targets(5, classes), normal(5, dtype=dtype, seed=1)
    t[0], t[1] = 0, classes - 1  # in the first part of a row and in the last
    got = both(lambda x: cross_entropy(x, t, reduction="none"), (x,), g)
    check_cross_entropy(got, x, t, g, range_of=30)


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("classes", [65, 4099, 50257, 131_075])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_off_alignment_are_read_beside(gpu, kernels, dtype, classes, offset):
    """The elements around the logits are NaN."""
    buffer = torch.full((5 * classes + offset + 9,), math.nan, dtype=dtype, device=gpu)
    x = buffer[offset : offset + 5 * classes].view(5, classes)
    x.copy_(normal(5, classes))
    x = x.detach().requires_grad_()
    t, g = targets(5, classes), normal(5, dtype=dtype, seed=1)
    got = both(lambda x: cross_entropy(x, t, reduction="none"), (x,), g)
    check_cross_entropy(got, x, t, g, range_of=16)


def by_columns(kind, classes, dtype):
    """Logits (B, C, L) or (N, C) whose classes lie apart, those of one place of all classes side by
    side.
    """
    if kind == "sequence":
        return normal(3, classes, 37, dtype=dtype)
    if kind == "part of a sequence":  # off alignment
        return normal(3, classes, 50, dtype=dtype)[:, :, 3:40]
    return normal(classes, 111, dtype=dtype).t()


@pytest.mark.parametrize("kind", ["sequence", "part of a sequence", "matrix"])
@pytest.mark.parametrize("classes", [2, 65, 1031, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_lead_to_the_wrong_numbers(native, dtype, classes, kind):
    x = by_columns(kind, classes, dtype).detach().requires_grad_()
    t, g = targets(111, classes), normal(111, dtype=dtype, seed=1)
    shape = (3, 37) if x.dim() == 3 else (111,)
    loss, gradient = both(
        lambda x: cross_entropy(x, t.view(shape), reduction="none"), (x,), g.view(shape)
    )
    rows, gradient = (y.movedim(1, -1).reshape(111, classes) for y in (x, gradient))
    check_cross_entropy((loss.flatten(), gradient), rows.detach(), t, g, range_of=16)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_option_of_columns_is_forgotten(native, dtype, options):
    x = normal(3, 700, 37, dtype=dtype, scale=3).requires_grad_()
    q = torch.softmax(normal(3, 700, 37, seed=2), 1).to(dtype).requires_grad_()
    weight = normal(700, seed=3).abs().to(dtype) + 0.5

    def function(x, q):
        w = weight.to(x.dtype)
        return _public(x)(x, q, w, reduction="none", **options)

    check_against_eager(function, (x, q), normal(3, 37, dtype=dtype, seed=1))
