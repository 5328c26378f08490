"""Cross-entropy with probabilities for targets: values, both gradients, types, and what runs it."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    FULL_DTYPES,
    REDUCED_DTYPES,
    exact_options,
    gradients_of,
    half_ulp,
    random_like,
    random_logits,
    random_probabilities,
    random_weight,
    relative_error,
    torchs_composition,
)

import fastgpt

pytestmark = pytest.mark.cuda_on_host

NAN, INF = math.nan, math.inf
REDUCTIONS = ["none", "mean", "sum"]
SMOOTHING = [0.0, 0.1, 1.0]

# Logits and probabilities: of one type, or the probabilities of the accumulator's.
TYPES = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in REDUCED_DTYPES]
TYPE_NAMES = [f"{str(a)[6:]},{str(b)[6:]}" for a, b in TYPES]


def upstream_of(logits, reduction, dtype):
    """A random upstream gradient of the loss."""
    shape = logits.shape[:1] + logits.shape[2:] if reduction == "none" else ()
    return random_like(torch.empty(shape, dtype=dtype))


# ---- accuracy ----

CLASSES = (1, 2, 17, 65, 97, 1025, 4099, 50257)


@pytest.mark.interpreted(types=TYPES[:2], classes=(1, 2, 17, 1025, 4099))
@pytest.mark.interpreted(types=TYPES[2:], classes=(17, 1025))
@pytest.mark.parametrize("types", TYPES, ids=TYPE_NAMES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("shares", ["plain", "weight", "weight+smoothing"])
def test_a_kernels_error_exceeds_torchs(kernel, shares, classes, types):
    """Beyond torch's own error on the same input, half an ulp of the output and the four roundings
    of the accumulator's that weights and smoothing have with classes, too. A row's sums of many
    numbers are double: what that costs shows in float64 alone.
    """
    dtype, of_target = types
    weight = None if shares == "plain" else random_weight(classes, dtype)
    smoothing = 0.1 if shares == "weight+smoothing" else 0.0
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    accumulator = half_ulp(torch.promote_types(dtype, torch.float32))
    own = 16 if dtype == torch.float64 and classes > 1000 else 4
    for scale in (1, 10, 50):
        n = max(3, min(2000 // classes, 40))
        logits, _ = random_logits(n, classes, dtype=dtype, scale=scale)
        q = random_probabilities(logits, of_target)
        loss_dtype = torch.promote_types(dtype, of_target)
        upstream = random_like(torch.empty(n, dtype=loss_dtype))
        truth = exact_options(logits, q, upstream, None, weight, smoothing)
        ours, torchs = (
            gradients_of(lambda x, q, f=f: f(x, q, **options), [logits, q], upstream)
            for f in (kernel.cross_entropy, F.cross_entropy)
        )
        assert [x.dtype for x in ours] == [loss_dtype, dtype, of_target]
        wants = truth.loss, truth.gradient, truth.target_gradient
        if classes == 1:  # zeros, in which torch loses nothing
            assert not ours[0].any()
            assert ours[1].abs().max() <= 4 * accumulator * (q * upstream[:, None]).abs().max()
            continue
        for name, got, torchs_own, want in zip(
            ("loss", "gradient", "of the probabilities"), ours, torchs, wants, strict=True
        ):
            error, allowed = relative_error(got, want), relative_error(torchs_own, want)
            assert error <= allowed + half_ulp(got.dtype) + own * accumulator, (name, scale)


@pytest.mark.parametrize("types", TYPES, ids=TYPE_NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(17,), (9, 17), (3, 17, 4), (2, 5, 3, 2)], ids=str)
def test_a_combination_of_shape_weight_smoothing_and_reduction_is_wrong(
    backend, shape, weighted, smoothing, reduction, types
):
    """Against torch on the float64 of the same input; the probabilities are of no sum in
    particular.
    """
    dtype, of_target = types
    classes = shape[min(1, len(shape) - 1)]
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
    q = random_probabilities(logits, of_target)
    if backend.name == "triton" and len(shape) > 2:  # the strides that it covers
        logits, q = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (logits, q))
    weight = random_weight(classes, dtype) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    loss_dtype = torch.promote_types(dtype, of_target)
    upstream = upstream_of(logits if logits.dim() > 1 else logits[None], reduction, loss_dtype)
    if logits.dim() == 1:
        upstream = upstream.reshape(())
    got = gradients_of(
        lambda x, q: backend.cross_entropy(x, q, weight, **options), [logits, q], upstream
    )
    assert [x.dtype for x in got] == [loss_dtype, dtype, of_target]
    wide = None if weight is None else weight.double()
    want = gradients_of(
        lambda x, q: F.cross_entropy(x, q, wide, **options),
        [logits.double(), q.double()], upstream.double(),
    )  # fmt: skip
    u = 32 * half_ulp(torch.promote_types(dtype, torch.float32))
    for ours, torchs in zip(got, want, strict=True):
        assert relative_error(ours, torchs.numpy()) <= half_ulp(ours.dtype) + u


@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [17, 1025])
def test_softcap_z_loss_or_lse_of_probabilities_is_wrong(backend, classes, reduction, dtype):
    """The mean's z-loss is that of all rows: none is ignored."""
    logits, _ = random_logits(7, classes, dtype=dtype, scale=3)
    q = random_probabilities(logits)
    options = {
        "weight": random_weight(classes, dtype), "label_smoothing": 0.1, "softcap": 4.0,
        "z_loss": 0.1, "reduction": reduction, "return_lse": True,
    }  # fmt: skip
    wide = options | {"weight": options["weight"].double()}

    def gradients(function, *inputs, **options):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves, **options)
        upstream = [random_like(x, seed) for seed, x in enumerate(outputs)]
        return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

    got = gradients(backend.cross_entropy, logits, q, **options)
    want = gradients(torchs_composition, logits.double(), q.double(), **wide)
    for ours, torchs in zip(got, want, strict=True):
        # The upstream gradients are rounded to float32.
        assert relative_error(ours.detach(), torchs.detach().numpy()) <= 64 * half_ulp(dtype)


# ---- extremes ----


@pytest.mark.parametrize("types", TYPES, ids=TYPE_NAMES)
@pytest.mark.parametrize("margin", [5, 8, 15, 30])
@pytest.mark.parametrize("classes", [17, 1025])
def test_a_confident_row_loses_more_than_torchs(kernel, classes, margin, types):
    """p -> 1 where q is 1: nothing is left of the loss but the tail. What cancels, in the loss
    beside 1 and in the gradient p - q, loses digits in torch, too; it may here by four roundings.
    """
    dtype, of_target = types
    logits, target = random_logits(9, classes, dtype=torch.float64, seed=margin)
    logits[torch.arange(9), target] = logits.amax(1) + margin
    logits = logits.to(dtype)
    q = F.one_hot(target, classes).to(of_target)
    upstream = random_like(torch.empty(9, dtype=torch.promote_types(dtype, of_target)))
    truth = exact_options(logits, q, upstream)
    ours, torchs = (
        gradients_of(lambda x, q, f=f: f(x, q, reduction="none"), [logits, q], upstream)
        for f in (kernel.cross_entropy, F.cross_entropy)
    )
    wants = truth.loss, truth.gradient, truth.target_gradient
    u = half_ulp(torch.promote_types(dtype, torch.float32))
    for name, got, torchs_own, want in zip(
        ("loss", "gradient", "of the probabilities"), ours, torchs, wants, strict=True
    ):
        error, allowed = relative_error(got, want), relative_error(torchs_own, want)
        if name != "of the probabilities":
            size = 1 if name == "loss" else float(upstream.abs().max())
            allowed += 4 * u * size / abs(want).max()
        assert error <= allowed + half_ulp(got.dtype) + 4 * u, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [5, 40, 1100])
def test_infinities_and_nan_end_otherwise_than_in_torch(backend, classes, smoothing, dtype):
    """-inf where q is 0 gives 0 * inf = NaN, as in torch."""
    last = classes - 1
    logits, _ = random_logits(10, classes, dtype=dtype)
    q = random_probabilities(logits)
    logits[0] = -INF
    logits[1, last] = -INF
    logits[2, 1] = -INF
    q[2, 1] = 0
    logits[3, 1] = INF
    logits[4, last] = NAN
    q[4, last] = 0
    q[5, 1] = NAN
    q[7] = 0
    q[8] = -q[8]
    upstream = random_like(logits[:, 0])
    options = {"label_smoothing": smoothing, "reduction": "none"}
    got = gradients_of(lambda x, q: backend.cross_entropy(x, q, **options), [logits, q], upstream)
    want = gradients_of(
        lambda x, q: F.cross_entropy(x, q, **options),
        [logits.double(), q.double()], upstream.double(),
    )  # fmt: skip
    tol = 64 * half_ulp(dtype)
    for ours, torchs in zip(got, want, strict=True):
        torchs = torchs.to(dtype).double()
        torch.testing.assert_close(ours.double(), torchs, rtol=tol, atol=tol, equal_nan=True)
    assert got[0][2].isinf() if smoothing else got[0][2].isnan()
    assert got[0][9].isfinite()


# ---- layouts ----


@pytest.mark.parametrize("types", TYPES, ids=TYPE_NAMES)
@pytest.mark.parametrize("classes", [1, 15, 33, 1024, 1025])
def test_the_kernel_reads_beyond_a_row_of_probabilities(kernel, classes, types):
    dtype, of_target = types
    logits, _ = random_logits(3, classes, dtype=dtype)
    clean = random_probabilities(logits, of_target)
    upstream = random_like(torch.empty(3, dtype=torch.promote_types(dtype, of_target)))

    def run(fill):
        larger = torch.full((3, classes + 37), fill, dtype=of_target)
        larger[:, 5 : 5 + classes] = clean
        return gradients_of(
            lambda x, q: kernel.cross_entropy(x, q, reduction="none", label_smoothing=0.1),
            [logits, larger[:, 5 : 5 + classes]],
            upstream,
        )

    want = run(0.0)
    assert all(x.isfinite().all() for x in want)
    for fill in (NAN, 1e4):
        for got, clean_one in zip(run(fill), want, strict=True):
            assert torch.equal(got, clean_one)


def test_inputs_are_mutated(backend):
    logits, _ = random_logits(9, 70)
    q, weight = random_probabilities(logits), random_weight(70, torch.float32)
    tensors = (logits.requires_grad_(), q.requires_grad_(), weight)
    before = [(t.detach().clone(), t._version) for t in tensors]
    backend.cross_entropy(logits, q, weight, label_smoothing=0.1, softcap=3.0).backward()
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


# ---- which backend ----


def reasons(best_kernel, *arguments, **options):
    """The chosen backend, and this kernel's reason."""
    explanation = fastgpt.explain(
        fastgpt.cross_entropy, *best_kernel.placed(arguments), **best_kernel.placed(options)
    )
    of_kernel = [d.reason for d in explanation.decisions if d.backend == best_kernel.name]
    return explanation.backend, *of_kernel


@pytest.mark.parametrize("types", TYPES, ids=TYPE_NAMES)
def test_a_kernel_leaves_probabilities_to_eager(best_kernel, types):
    logits, _ = random_logits(4, 5, dtype=types[0])
    q = random_probabilities(logits, types[1])
    for options in (
        {}, {"label_smoothing": 0.1}, {"weight": torch.ones(5)}, {"softcap": 3.0, "z_loss": 0.1},
    ):  # fmt: skip
        assert reasons(best_kernel, logits, q, **options)[0] == best_kernel.name
        assert reasons(best_kernel, logits, q.requires_grad_(), **options)[0] == best_kernel.name


def test_a_weight_that_requires_grad_has_none_or_no_reason(best_kernel):
    logits, _ = random_logits(4, 5, dtype=torch.float64)
    q, weight = random_probabilities(logits), random_weight(5).requires_grad_()
    assert reasons(best_kernel, logits, q, weight) == ("eager", "a gradient of weight")
    got, want = (
        torch.autograd.grad(f(logits, q, weight), weight)[0]
        for f in (best_kernel.on_device(fastgpt.cross_entropy), F.cross_entropy)
    )
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert reasons(best_kernel, logits, q, weight)[0] == best_kernel.name


@pytest.mark.parametrize(
    ("dtype", "of_target"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float64),
    ],
)
def test_mixed_types_have_no_reason_or_another_loss_than_torchs(best_kernel, dtype, of_target):
    logits, _ = random_logits(4, 5, dtype=dtype)
    q = random_probabilities(logits, of_target)
    backend, reason = reasons(best_kernel, logits, q)
    assert backend == "eager"
    assert reason == f"probabilities of type {of_target} for logits of type {dtype}"
    got = best_kernel.on_device(fastgpt.cross_entropy)(logits, q)
    want = F.cross_entropy(logits, q)
    assert got.dtype == want.dtype
    tol = 4 * half_ulp(dtype)
    torch.testing.assert_close(got.double(), want.double(), rtol=tol, atol=tol)


def test_an_ignore_index_for_probabilities_is_accepted(one_isa):
    logits, _ = random_logits(4, 5)
    with pytest.raises(RuntimeError, match="ignore_index is not supported"):
        one_isa.cross_entropy(logits, random_probabilities(logits), ignore_index=2)
