"""Values and gradients of cross-entropy: accuracy, extremes, strides, determinism, memory."""

import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    FULL_DTYPES,
    REDUCED_DTYPES,
    Errors,
    errors,
    exact,
    gradient_of,
    half_ulp,
    random_like,
    random_logits,
    within_half_ulp,
)
from torch.profiler import ProfilerActivity, profile

import fastgpt
from fastgpt.backends.eager.cross_entropy import naive_cross_entropy
from fastgpt.ops.cross_entropy import Options, class_rows

pytestmark = pytest.mark.cuda_on_host

CLASSES = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 1023, 1024, 1025, 2049, 4099, 50257)
NAN, INF = math.nan, math.inf


def rows_for(classes: int, backend) -> int:
    return max(3, min(20000 // classes, 640 if backend.interpreted else 20000))


# ---- accuracy ----


@functools.cache
def problems(n: int, classes: int, dtype: torch.dtype):
    """Logits times 1, 10 and 50, with targets, random upstream gradients, and the exact answer."""
    found = []
    for scale in (1, 10, 50):
        for seed in (0, 1):
            logits, target = random_logits(n, classes, dtype=dtype, scale=scale, seed=seed)
            upstream = random_like(logits[:, 0], seed + 2)
            found.append((logits, target, upstream, exact(logits, target, upstream)))
    return found


def pooled_errors(function, *problem) -> Errors:
    """The largest errors over the problems (n, classes, dtype)."""
    worst = Errors()
    for logits, target, upstream, truth in problems(*problem):
        loss, gradient = gradient_of(
            lambda x, t=target: function(x, t, reduction="none"), logits, upstream
        )
        assert loss.dtype == gradient.dtype == logits.dtype
        worst = worst.pooled(errors(loss, gradient, target, truth))
    return worst


@functools.cache
def torchs_errors(*problem) -> Errors:
    return pooled_errors(F.cross_entropy, *problem)


@pytest.fixture(scope="module", autouse=True)
def _forget_problems():
    yield
    problems.cache_clear()


@pytest.mark.interpreted(dtype=FULL_DTYPES, classes=CLASSES[:-1])
@pytest.mark.interpreted(dtype=REDUCED_DTYPES, classes=(2, 17, 65, 1024, 1025, 50257))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_a_kernels_error_exceeds_torchs(kernel, classes, dtype):
    """Beyond torch's own error on the same input, half an ulp: the one more rounding of an output
    that torch happened to round well.
    """
    problem = rows_for(classes, kernel), classes, dtype
    ours = pooled_errors(kernel.cross_entropy, *problem)
    torchs = torchs_errors(*problem)
    for kind, error, allowed in zip(Errors._fields, ours, torchs, strict=True):
        assert error <= allowed + half_ulp(dtype), kind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_eager_error_exceeds_torchs_by_more_than_its_own_roundings(eager, classes, dtype):
    """Eager's bound: its target gradient is p - 1 by subtraction, as torch's, and autograd of the
    written-out formula rounds at each of its four steps. It must stay within four roundings of the
    accumulator's type more than torch, and one of the output's.
    """
    accumulator = torch.promote_types(dtype, torch.float32)
    problem = rows_for(classes, eager), classes, dtype
    ours = pooled_errors(eager.cross_entropy, *problem)
    torchs = torchs_errors(*problem)
    for kind, error, allowed in zip(Errors._fields, ours, torchs, strict=True):
        assert error <= allowed + 4 * half_ulp(accumulator) + half_ulp(dtype), kind


@pytest.mark.parametrize("dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("classes", [2, 17, 1023, 4099])
def test_sixteen_bit_results_are_rounded_more_than_once(kernel, classes, reduction, dtype):
    """Loss and gradient are formed in float32: one rounding to 16 bits, wherever p lies."""
    for scale in (1, 10, 50):
        n = rows_for(classes, kernel)
        logits, target = random_logits(n, classes, dtype=dtype, scale=scale)
        target[::5] = -100
        kept = target != -100
        upstream = torch.tensor(1.375, dtype=dtype)
        rows = torch.full((len(target),), 1.375)
        if reduction == "none":
            upstream = random_like(logits[:, 0])
            rows = upstream
        if reduction == "mean":
            rows = rows.double() / kept.sum()
        loss, gradient = gradient_of(
            lambda x, t=target: kernel.cross_entropy(x, t, reduction=reduction),
            logits,
            upstream,
        )
        truth = exact(logits[kept], target[kept], rows[kept])
        # The difference x - m is rounded to float32, so exp's relative error grows with it.
        slack = 8 * half_ulp(torch.float32) * max(1.0, float(logits.max() - logits.min()) / 8)
        # Subnormal gradients by the instruction that rounds to bfloat16 there, and subnormal
        # exponentials by that of 2^x on NVIDIA's GPUs.
        subnormal = torch.finfo(dtype).smallest_normal if dtype == torch.bfloat16 else 0.0
        flushed_loss = subnormal if kernel.is_cuda else 0.0
        flushed = subnormal if kernel.isa == "avx512_bf16" else 0.0
        if kernel.is_cuda:
            flushed = subnormal * float(rows.abs().max())
        assert within_half_ulp(gradient[kept], truth.gradient, slack, flushed)
        assert not gradient[~kept].any()
        if reduction == "none":
            assert within_half_ulp(loss[kept], truth.loss, slack, flushed_loss)
        else:
            total = truth.loss.sum() / (kept.sum().item() if reduction == "mean" else 1)
            if total > torch.finfo(dtype).max:
                assert loss == INF
            else:
                assert within_half_ulp(loss, np.array(total), slack)


@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [1, 2, 5, 33, 5001])
def test_reduced_loss_or_its_gradient_is_wrong(backend, n, reduction, dtype):
    logits, target = random_logits(n, 17, dtype=dtype, scale=3)
    upstream = random_like(logits[0, 0])
    loss, gradient = gradient_of(
        lambda x: backend.cross_entropy(x, target, reduction=reduction), logits, upstream
    )
    count = n if reduction == "mean" else 1
    truth = exact(logits, target, upstream.double().expand(n) / count)
    assert float(loss) == pytest.approx(
        float(truth.loss.sum()) / count, rel=8 * half_ulp(dtype) * math.log2(n + 2)
    )
    scale = abs(truth.gradient).max()
    assert abs(gradient.double().numpy() - truth.gradient).max() <= 16 * half_ulp(dtype) * scale


@pytest.mark.parametrize("scale", [1, 10, 50])
@pytest.mark.parametrize("classes", [1, 2, 17, 1023])
def test_differs_from_the_textbook_formula(backend, classes, scale):
    """exp / sum / log as it is taught, in float64, which holds logits of this size."""
    logits, target = random_logits(33, classes, dtype=torch.float64, scale=scale)
    upstream = random_like(logits[0, 0])
    want = gradient_of(lambda x: naive_cross_entropy(x, target), logits, upstream)
    got = gradient_of(lambda x: backend.cross_entropy(x, target), logits, upstream)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 15, 33, 2049])
def test_a_row_depends_on_the_rows_beside_it(backend, classes, dtype):
    """So that a small batch has the accuracy that is measured on large ones."""
    logits, target = random_logits(33, classes, dtype=dtype, scale=5)
    upstream = random_like(logits[:, 0])
    whole = gradient_of(
        lambda x: backend.cross_entropy(x, target, reduction="none"), logits, upstream
    )
    for n in (0, 1, 2, 5):
        part = gradient_of(
            lambda x, n=n: backend.cross_entropy(x, target[:n], reduction="none"),
            logits[:n],
            upstream[:n],
        )
        if backend.name != "eager":
            assert torch.equal(part[0], whole[0][:n])
            assert torch.equal(part[1], whole[1][:n])
        else:  # torch's own softmax and sum may choose another order for another shape
            torch.testing.assert_close(part, (whole[0][:n], whole[1][:n]))


# ---- p -> 1 ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("margin", [5, 8, 15, 30])
@pytest.mark.parametrize("classes", [2, 17, 1023])
def test_confident_rows_lose_their_loss_or_target_gradient(kernel, classes, margin, dtype):
    """Where p_t -> 1 the loss is log1p(rest) and the target's gradient -sum of the others': to a
    few ulp of itself, where 1 + rest and p - 1 would have lost them.
    """
    logits, target = random_logits(9, classes, dtype=torch.float64, seed=margin)
    logits = logits / 4
    rows = torch.arange(9)
    logits[rows, target] = logits.amax(1) + margin
    logits = logits.to(dtype)
    upstream = random_like(logits[:, 0])
    loss, gradient = gradient_of(
        lambda x: kernel.cross_entropy(x, target, reduction="none"), logits, upstream
    )
    truth = exact(logits, target, upstream)
    slack = 1e-6 if dtype != torch.float64 else 1e-14
    assert within_half_ulp(loss, truth.loss, slack)
    assert within_half_ulp(gradient[rows, target], truth.gradient[rows, target.numpy()], slack)
    assert gradient[rows, target].any() or (dtype == torch.float16 and margin == 30)
    if dtype in FULL_DTYPES:
        others = gradient.double().sum(1) - gradient[rows, target].double()
        torch.testing.assert_close(
            gradient[rows, target].double(), -others, rtol=slack, atol=0, check_dtype=False
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("margin", [5, 15, 30])
def test_confident_rows_in_eager_are_worse_than_torchs(eager, margin, dtype):
    """Eager's bound at p -> 1 is torch's: an absolute error of a few ulp of 1."""
    logits, target = random_logits(9, 17, dtype=torch.float64, seed=margin)
    rows = torch.arange(9)
    logits[rows, target] = logits.amax(1) + margin
    logits = logits.to(dtype)
    upstream = random_like(logits[:, 0])
    loss, gradient = gradient_of(
        lambda x: eager.cross_entropy(x, target, reduction="none"), logits, upstream
    )
    truth = exact(logits, target, upstream)
    ulp = 2 * half_ulp(torch.promote_types(dtype, torch.float32))
    bound = half_ulp(dtype) * abs(truth.loss) + 2 * ulp
    assert (abs(loss.double().numpy() - truth.loss) <= bound + 2 * ulp * margin).all()
    bound = half_ulp(dtype) * abs(truth.gradient) + 4 * ulp * float(upstream.abs().max())
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (abs(gradient.double().numpy() - truth.gradient) <= bound + tiny).all()


# ---- extremes ----


def compare_with_torch(
    backend, logits, target, *, reduction="none", ignore_index=-100, upstream=None
):
    """Loss and gradient against torch's on the float64 of the input, NaN and infinities alike.

    In float64, because torch's own 16-bit results carry its own error.
    """

    def of_torch(x):
        return F.cross_entropy(x, target, reduction=reduction, ignore_index=ignore_index)

    def of_ours(x):
        return backend.cross_entropy(x, target, reduction=reduction, ignore_index=ignore_index)

    if upstream is None:
        upstream = random_like(torch.empty(target.shape if reduction == "none" else ()))
    upstream = upstream.to(logits.dtype)
    want = gradient_of(of_torch, logits.double(), upstream.double())
    got = gradient_of(of_ours, logits, upstream)
    u = half_ulp(logits.dtype)
    for ours, torchs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), torchs, rtol=32 * u, atol=32 * u, equal_nan=True)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 33, 2050])
def test_large_logits_overflow(backend, classes, dtype):
    logits, target = random_logits(5, classes, dtype=dtype)
    peak = torch.finfo(dtype).max
    logits[0, 0] = peak
    logits[1, -1] = peak
    logits[2] = -peak
    logits[3, 1] = 0.9 * peak
    logits[3, 0] = -0.9 * peak  # the difference overflows to -inf in float32, which is right
    target[:] = torch.tensor([0, 0, 1, 1, 2])
    loss, gradient = gradient_of(
        lambda x: backend.cross_entropy(x, target, reduction="none"),
        logits,
        torch.ones(5, dtype=dtype),
    )
    assert not loss.isnan().any()
    assert gradient.isfinite().all()
    assert loss[0] == 0
    assert loss[1] == (peak if logits[1, 0] > 0 or dtype != torch.float64 else loss[1])
    assert float(loss[2]) == pytest.approx(math.log(classes), rel=0.01)
    assert gradient[1, -1] == 1
    assert gradient[1, 0] == -1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [1, 64, 1024, 2048, 4097, 9000])
def test_leading_minus_infinity_gives_nan(backend, masked, dtype):
    """A whole block of the online softmax at -inf: exp(-inf - -inf) must not reach the sum."""
    logits, target = random_logits(4, 9100, dtype=dtype, scale=3)
    logits[:, :masked] = -INF
    target[:] = torch.tensor([masked, 9099, 0, masked + 1])
    loss, gradient = compare_with_torch(backend, logits, target)
    assert loss[[0, 1, 3]].isfinite().all()
    assert not gradient[[0, 1, 3], :masked].any()
    assert loss[2] == INF  # the third target is itself at -inf
    assert gradient[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 5, 40, 2100])
def test_infinities_and_nan_end_otherwise_than_in_torch(backend, classes, dtype):
    rows = [
        [-INF] * classes,  # all -inf: NaN
        [0.0] * (classes - 1) + [-INF],  # -inf at the target: inf
        [-INF] + [1.0] * (classes - 1),  # -inf elsewhere
        [INF] + [0.0] * (classes - 1),  # +inf elsewhere: NaN
        [0.0] * (classes - 1) + [INF],  # +inf at the target: NaN
        [INF] * classes,
        [NAN] + [0.0] * (classes - 1),
        [0.0] * (classes // 2) + [NAN] + [1e4] * (classes - classes // 2 - 1),
        [0.0] * (classes - 1) + [NAN],
        [NAN] * classes,
        [0.0] * classes,  # and one that has nothing to do with any of it
    ]
    logits = torch.tensor(rows, dtype=dtype)
    target = torch.full((len(rows),), classes - 1)
    loss, gradient = compare_with_torch(backend, logits, target)
    assert loss[-1].isfinite()
    assert gradient[-1].isfinite().all()
    if classes > 1:
        assert loss[1] == INF
        assert loss[0].isnan()
        assert loss[6:10].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 7, 31, 32, 2047, 2048, 2999])
def test_nan_is_lost_or_spreads_to_another_row(backend, column, dtype):
    """Wherever it stands in the row: in a vector, in the tail, beside a larger number."""
    logits, target = random_logits(5, 3000, dtype=dtype, scale=10)
    clean = gradient_of(
        lambda x: backend.cross_entropy(x, target, reduction="none"), logits, logits[:, 0]
    )
    upstream = logits[:, 0].clone()
    logits[2, column] = NAN
    loss, gradient = gradient_of(
        lambda x: backend.cross_entropy(x, target, reduction="none"), logits, upstream
    )
    assert loss[2].isnan()
    assert gradient[2].isnan().all()
    for row in (0, 1, 3, 4):
        assert loss[row] == clean[0][row]
        assert torch.equal(gradient[row], clean[1][row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_an_ignored_row_holds_reaches_the_result(backend, poison, reduction, dtype):
    logits, target = random_logits(6, 35, dtype=dtype)
    target[[1, 4]] = -100
    upstream = random_like(torch.empty(6 if reduction == "none" else (), dtype=dtype))

    def run(x):
        return gradient_of(
            lambda x: backend.cross_entropy(x, target, reduction=reduction), x, upstream
        )

    clean = run(logits)
    poisoned = logits.clone()
    poisoned[1] = poison
    poisoned[4, 3] = poison
    got = run(poisoned)
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[1], clean[1])
    assert torch.equal(got[1][[1, 4]], torch.zeros(2, 35, dtype=dtype))
    compare_with_torch(backend, logits, target, reduction=reduction)


def test_an_ignored_row_with_an_infinite_upstream_gradient_is_not_zero(backend):
    logits, target = random_logits(3, 9)
    target[1] = -100
    upstream = torch.tensor([1.0, INF, 1.0])
    _, gradient = gradient_of(
        lambda x: backend.cross_entropy(x, target, reduction="none"), logits, upstream
    )
    if backend.name != "eager":
        assert torch.equal(gradient[1], torch.zeros(9))
    assert gradient[[0, 2]].isfinite().all()


# ---- ignore_index ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 1000])
def test_ignored_rows_count(backend, ignore_index, dtype):
    logits, target = random_logits(40, 11, dtype=dtype, scale=2)
    target[::3] = ignore_index
    for reduction in ("none", "mean", "sum"):
        loss, gradient = compare_with_torch(
            backend, logits, target, reduction=reduction, ignore_index=ignore_index
        )
        assert not gradient[target == ignore_index].any()
        if reduction == "none":
            assert not loss[target == ignore_index].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("reduction", "value"), [("none", 0.0), ("mean", math.nan), ("sum", 0.0)])
def test_all_rows_ignored_gives_a_gradient(backend, reduction, value, dtype):
    logits, _ = random_logits(4, 19, dtype=dtype)
    logits[1, 2] = NAN
    target = torch.full((4,), -100)
    loss, gradient = gradient_of(
        lambda x: backend.cross_entropy(x, target, reduction=reduction),
        logits,
        torch.ones(4 if reduction == "none" else (), dtype=dtype),
    )
    want = torch.full_like(loss, value)
    torch.testing.assert_close(loss, want, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_byte_targets_are_read_as_something_else(backend):
    logits, target = random_logits(20, 300)
    target %= 255
    target[::4] = 255
    want = gradient_of(
        lambda x: F.cross_entropy(x, target, ignore_index=255), logits, torch.tensor(1.5)
    )
    got = gradient_of(
        lambda x: backend.cross_entropy(x, target.to(torch.uint8), ignore_index=255),
        logits,
        torch.tensor(1.5),
    )
    torch.testing.assert_close(got, want)
    assert not got[1][::4].any()


# ---- strides ----


def views(dtype):
    """Name, logits (5, 33) over some storage, all with unit stride along the classes."""
    base, _ = random_logits(40, 40, dtype=dtype, scale=3)
    flat = base.flatten()
    return {
        "row slice": base[::2][:5, :33],
        "column slice": base[:5, 3:36],
        "one row expanded": base[:1, :33].expand(5, 33),
        "overlapping rows": flat.as_strided((5, 33), (7, 1)),
        "rows at odd addresses": flat[1:].as_strided((5, 33), (35, 1)),
        "contiguous from an odd address": flat[1 : 1 + 5 * 33].view(5, 33),
        "reversed batch of a larger tensor": base.view(8, 5, 40)[3, :, 7:],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", views(torch.float32))
@pytest.mark.cuda_on_host(backend=())
def test_a_strided_view_gives_other_bits_than_its_copy(backend, view, dtype):
    logits = views(dtype)[view]
    _, target = random_logits(5, 33, seed=3)
    upstream = random_like(torch.empty(5, dtype=dtype))
    got = gradient_of(
        lambda x: backend.cross_entropy(x, target, reduction="none"), logits, upstream
    )
    want = gradient_of(
        lambda x: backend.cross_entropy(x, target, reduction="none"), logits.contiguous(), upstream
    )
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequence_logits_through_a_transpose_are_copied_or_wrong(kernel, dtype):
    """(B, T, C) as (B, C, T): the kernel reads the rows where they lie."""
    flat, target = random_logits(12, 65, dtype=dtype, scale=3)
    logits, target = flat.view(3, 4, 65), target.view(3, 4)
    rows = class_rows(logits.transpose(1, 2))
    assert rows.data_ptr() == logits.data_ptr()
    assert rows.shape == (12, 65)
    upstream = random_like(target.to(dtype))
    got = gradient_of(
        lambda x: kernel.cross_entropy(x.transpose(1, 2), target, reduction="none"),
        logits,
        upstream,
    )
    want = gradient_of(
        lambda x: kernel.cross_entropy(x, target.flatten(), reduction="none"),
        flat,
        upstream.flatten(),
    )
    assert torch.equal(got[0].flatten(), want[0])
    assert torch.equal(got[1].view(12, 65), want[1])


def test_a_second_logits_sized_tensor_is_allocated(kernel):
    """Forward and backward together allocate the gradient, and nothing else of its size."""
    logits, target = kernel.placed(random_logits(64, 4099))
    sequence = logits.view(4, 16, 4099).requires_grad_()

    def forward():
        return fastgpt.cross_entropy(sequence.transpose(1, 2), target.view(4, 16))

    assert kernel.peak_bytes(forward) <= 0.1 * logits.nbytes
    loss = forward()
    assert kernel.peak_bytes(lambda: torch.autograd.grad(loss, sequence)) <= 1.1 * logits.nbytes


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 4), (0, 5, 3), (2, 1, 3)])
def test_k_dimensional_logits_give_another_loss_than_torchs(one_isa, shape):
    generator = torch.Generator().manual_seed(0)
    last = torch.randn(shape[0], *shape[2:], shape[1], generator=generator, dtype=torch.float64)
    logits = last.movedim(-1, 1)
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    for reduction in ("none", "mean", "sum"):
        compare_with_torch(one_isa, logits, target, reduction=reduction)


@pytest.mark.parametrize(
    ("logits", "reader"),
    [
        (random_logits(33, 5)[0].t(), "native"),
        (random_logits(5, 33)[0].repeat_interleave(2, 1)[:, ::2], "native"),
        (random_logits(5, 33)[0][:, :1].expand(5, 33), "native"),
        (random_logits(5, 33)[0].view(5, 33, 1).expand(5, 33, 2), "native"),
        (random_logits(5, 66)[0].view(5, 33, 2), "native"),
    ],
    ids=["transposed", "every other class", "expanded classes", "expanded", "contiguous (N, C, L)"],
)
def test_strides_a_kernel_cannot_read_go_elsewhere_unannounced(best_kernel, logits, reader):
    target = random_logits(5, 33)[1]
    if logits.dim() == 3:
        target = target.unsqueeze(1).expand(5, 2)
    explanation = fastgpt.explain(fastgpt.cross_entropy, *best_kernel.placed((logits, target)))
    read = best_kernel.name == reader
    assert explanation.backend == (best_kernel.name if read else "eager")
    assert (f"{best_kernel.name}: strides: " in str(explanation)) != read
    want = gradient_of(lambda x: F.cross_entropy(x, target), logits, torch.tensor(2.5))
    loss = best_kernel.on_device(fastgpt.cross_entropy)
    got = gradient_of(lambda x: loss(x, target), logits, torch.tensor(2.5))
    torch.testing.assert_close(got, want)


def test_a_single_class_needs_a_stride(kernel):
    logits = random_logits(5, 3)[0][:, ::3]
    compare_with_torch(kernel, logits, torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_target_strides_are_not_followed(backend, reduction):
    logits, target = random_logits(6, 9)
    strided = target.repeat_interleave(3)[::3]
    assert not strided.is_contiguous()
    compare_with_torch(backend, logits, strided, reduction=reduction)
    compare_with_torch(backend, logits, target[:1].expand(6), reduction=reduction)
    compare_with_torch(backend, logits, target.flip(0)[::2].repeat(2), reduction=reduction)


def test_strides_of_the_upstream_gradient_are_not_followed(backend):
    logits, target = random_logits(6, 9)
    dense = random_like(logits[:, 0])
    for upstream in (dense[:1].expand(6), dense.repeat_interleave(2)[::2], dense[0].expand(6)):
        compare_with_torch(backend, logits, target, upstream=upstream)


def test_next_token_slice_of_a_batch_is_wrong_or_copied(backend):
    """logits[:, :-1] against tokens[:, 1:]: the rows lie at no one distance, so each is a view of
    one sequence for the kernel, or goes to eager by the rule; the values are right either way.
    """
    flat, tokens = random_logits(20, 17)
    logits, tokens = flat.view(4, 5, 17), tokens.view(4, 5)

    def loss(function):
        return gradient_of(
            lambda x: function(x[:, :-1].transpose(1, 2), tokens[:, 1:]), logits, torch.tensor(3.0)
        )

    ours = backend.on_device(fastgpt.cross_entropy)
    torch.testing.assert_close(loss(ours), loss(F.cross_entropy))

    def flattened(function):
        return gradient_of(
            lambda x: function(x[:, :-1].reshape(-1, 17), tokens[:, 1:].reshape(-1)),
            logits,
            torch.tensor(3.0),
        )

    torch.testing.assert_close(flattened(backend.cross_entropy), flattened(F.cross_entropy))


# ---- memory ----


def test_fresh_memory_is_not_poisoned_in_these_tests(native_backend):
    """In Python, where Triton's launches allocate, and in C++."""
    assert torch.empty(1000).isnan().all()
    logits, target = random_logits(8, 16)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        torch.ops.fastgpt.cross_entropy_forward.default(logits, target, None, *Options())
    names = [event.name for event in recorded.events()]
    assert names.count("aten::new_empty") == names.count("aten::fill_") == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", range(1, 70, 3))
def test_an_output_element_is_left_unwritten(kernel, classes, dtype):
    """Fresh memory is NaN here, so what the kernel skips shows."""
    logits, target = random_logits(7, classes, dtype=dtype)
    target[3] = -100
    loss, gradient = gradient_of(
        lambda x: kernel.cross_entropy(x, target, reduction="none"),
        logits,
        random_like(logits[:, 0]),
    )
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 15, 31, 33, 65, 2047, 4099])
def test_the_kernel_reads_beyond_a_row(kernel, classes, dtype):
    """Logits in the middle of NaN: reading an element more turns the result into NaN; a maximum or
    a sum over the neighbours changes it.
    """
    clean, target = random_logits(3, classes, dtype=dtype)
    upstream = random_like(clean[:, 0])

    def surrounded_by(fill):
        larger = torch.full((3, classes + 37), fill, dtype=dtype)
        larger[:, 5 : 5 + classes] = clean
        return larger[:, 5 : 5 + classes]

    want, *found = (
        gradient_of(lambda x: kernel.cross_entropy(x, target, reduction="none"), x, upstream)
        for x in map(surrounded_by, (0.0, NAN, 1e4))
    )
    assert want[0].isfinite().all()
    for got in found:
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_mutated(backend, dtype):
    """PEERS: a fused forward that overwrites the logits gives an auxiliary loss other values."""
    logits, target = random_logits(9, 70, dtype=dtype)
    upstream = random_like(logits[:, 0])
    tensors = (logits.requires_grad_(), target, upstream)
    before = [(t.detach().clone(), t._version) for t in tensors]
    backend.cross_entropy(logits, target, reduction="none").backward(upstream)
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def test_the_gradient_shares_memory_with_an_input_or_another_gradient(backend):
    logits, target = random_logits(9, 70)
    logits.requires_grad_()
    loss = backend.cross_entropy(logits, target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits, torch.tensor(-3.0))
    assert len({logits.data_ptr(), first.data_ptr(), second.data_ptr()}) == 3
    assert torch.equal(first, kept)


# ---- large gradients, which are written around the caches ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [4097, 4111, 50257])
def test_streaming_writes_other_bits_than_cached_ones(native_backend, classes, dtype):
    """From 8 MiB on the gradient is streamed, from aligned addresses within each row."""
    n = (8 << 20) // (classes * dtype.itemsize) + 2
    storage = torch.empty(n * (classes + 3) + 1, dtype=dtype)
    logits = storage[1:].as_strided((n, classes), (classes + 3, 1))
    small, pattern = random_logits(5, classes, dtype=dtype, scale=2)
    logits.copy_(small.repeat(n // 5 + 1, 1)[:n])
    target = pattern.repeat(n // 5 + 1)[:n]
    target[-1] = classes - 1
    target[-2] = -100
    upstream = random_like(torch.empty(n, dtype=dtype))
    loss, gradient = gradient_of(
        lambda x: native_backend.cross_entropy(x, target, reduction="none"), logits, upstream
    )
    for row in (0, 1, 2, 3, 4, n // 2, n - 3, n - 2, n - 1):
        want = gradient_of(
            lambda x, row=row: native_backend.cross_entropy(
                x, target[row : row + 1], reduction="none"
            ),
            logits[row : row + 1],
            upstream[row : row + 1],
        )
        assert torch.equal(loss[row], want[0][0])
        assert torch.equal(gradient[row], want[1][0])
    assert gradient.isfinite().all()


# ---- reproducibility ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "classes"), [(1, 1), (5, 50257), (1000, 33), (4097, 5), (70000, 7)])
def test_bits_depend_on_the_number_of_threads(native_backend, n, classes, dtype, threads):
    counts = (1, 3) if native_backend.twin else (1, 2, 3, 3)  # the twin has a single one
    logits, target = random_logits(n, classes, dtype=dtype, scale=3)
    target[::7] = -100
    if n == 1:
        target[0] = 0
    for reduction in ("none", "mean", "sum"):
        upstream = random_like(torch.empty(n if reduction == "none" else (), dtype=dtype))
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(
                gradient_of(
                    lambda x, r=reduction: native_backend.cross_entropy(x, target, reduction=r),
                    logits,
                    upstream,
                )
            )
        for loss, gradient in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(gradient, results[0][1])


def test_a_float32_running_sum_loses_the_loss_of_many_rows(backend):
    """70,000 equal losses: the reduced loss in the accumulator's type, not summed one by one."""
    n = 9000 if backend.interpreted else 70000
    logits = torch.zeros(n, 3)
    logits[:, 0] = 1.7
    target = torch.zeros(n, dtype=torch.int64)
    want = n * math.log1p(2 * math.exp(-float(logits[0, 0])))
    total = backend.cross_entropy(logits, target, reduction="sum")
    assert float(total) == pytest.approx(want, rel=1e-6)
    total = backend.cross_entropy(logits.bfloat16(), target, reduction="sum")
    want = n * math.log1p(2 * math.exp(-float(logits[0, 0].bfloat16())))
    assert float(total) == pytest.approx(want, rel=1.001 * half_ulp(torch.bfloat16))


@pytest.mark.slow
def test_a_result_changes_from_run_to_run(kernel):
    n, runs = (30, 2) if kernel.interpreted else (3000, 10)
    logits, target = random_logits(n, 1001, dtype=torch.bfloat16)
    upstream = random_like(logits[0, 0])
    first, *others = (
        gradient_of(lambda x: kernel.cross_entropy(x, target), logits, upstream)
        for _ in range(runs)
    )
    for loss, gradient in others:
        assert torch.equal(loss, first[0])
        assert torch.equal(gradient, first[1])


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this operating system has no transparent huge pages to ask for",
)
def test_a_large_gradient_arrives_in_small_pages(best_native):
    logits, target = random_logits(64, 50257)
    _, gradient = gradient_of(lambda x: best_native.cross_entropy(x, target), logits, None)
    middle = gradient.data_ptr() + gradient.nbytes // 2
    advised = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif line.startswith("VmFlags:") and inside:
            advised = "hg" in line.split()
    assert advised
