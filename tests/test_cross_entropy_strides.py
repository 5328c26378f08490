"""Strides of cross-entropy's logits: what the native kernels read and write without a copy."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    half_ulp,
    random_like,
    random_probabilities,
    random_weight,
    relative_error,
    torchs_composition,
)

import fastgpt

pytestmark = pytest.mark.cuda_on_host

NAN = math.nan
REDUCTIONS = ["none", "mean", "sum"]


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def surrounded(shape, place, dtype):
    """Logits at `place` in a larger tensor that holds NaN elsewhere."""
    larger = torch.full(shape, NAN, dtype=dtype)
    larger[place] = normal(*larger[place].shape, dtype=dtype)
    return larger[place]


WHOLE = slice(None)
LAYOUTS = {
    "contiguous": lambda d: normal(3, 37, 11, dtype=d),
    "transposed": lambda d: normal(3, 11, 37, dtype=d).transpose(1, 2),
    "next token": lambda d: normal(3, 12, 37, dtype=d)[:, :-1].transpose(1, 2),
    "4 dimensions": lambda d: normal(2, 37, 5, 7, dtype=d),
    "channels last": lambda d: normal(2, 37, 5, 7, dtype=d).to(memory_format=torch.channels_last),
    "sliced along C": lambda d: surrounded((3, 45, 11), (WHOLE, slice(3, 40)), d),
    "sliced along L": lambda d: surrounded((3, 37, 19), (WHOLE, WHOLE, slice(3, 14)), d),
    "every second position": lambda d: surrounded((3, 37, 22), (WHOLE, WHOLE, slice(0, 22, 2)), d),
    "every second class": lambda d: surrounded((3, 74, 11), (WHOLE, slice(0, 74, 2)), d),
    "every second class of rows": lambda d: surrounded((9, 74), (WHOLE, slice(0, 74, 2)), d),
    "columns": lambda d: normal(37, 9, dtype=d).t(),
    "batch last": lambda d: normal(37, 11, 3, dtype=d).movedim(2, 0),
    "expanded batch": lambda d: normal(1, 37, 11, dtype=d).expand(3, 37, 11),
    "many positions": lambda d: normal(2, 5, 1031, dtype=d),
    "one class": lambda d: normal(2, 1, 70, dtype=d),
    "one position": lambda d: normal(3, 37, 1, dtype=d),
    "many classes": lambda d: normal(1, 2049, 9, dtype=d),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def targets_of(logits, seed=3):
    """Classes with some ignored."""
    shape = logits.shape[:1] + logits.shape[2:]
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(logits.shape[1], shape, generator=generator)
    target.view(-1)[1::5] = -100
    return target


def results(function, logits, target, **options):
    """The outputs and gradients for random upstream gradients, in float64.

    The leaf has the strides of the logits.
    """
    leaf = logits.detach().requires_grad_()
    leaves = [leaf]
    if target.is_floating_point():
        target = target.detach().requires_grad_()
        leaves.append(target)
    outputs = function(leaf, target, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Of 8 bits, so that they are the same in every type.
    random = [random_like(x.double(), seed) for seed, x in enumerate(outputs)]
    upstream = [(g * 16).round().to(x.dtype) / 16 for g, x in zip(random, outputs, strict=True)]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, upstream))]


def reference(logits, target, **options):
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if target.is_floating_point():
        target = target.double()
    return results(torchs_composition, logits.double().contiguous(), target, **wide)


def compare(function, logits, target, **options):
    got = results(function, logits, target, **options)
    want = reference(logits, target, **options)
    # torch's own sum of thousands of smoothed classes is off by 100 roundings of float64.
    u = 256 * half_ulp(torch.promote_types(logits.dtype, torch.float32))
    for ours, torchs in zip(got, want, strict=True):
        if not torchs.any():  # one class
            assert ours.abs().max() <= u
            continue
        assert relative_error(ours, torchs.numpy()) <= 2 * half_ulp(ours.dtype) + u
    return got


# ---- values and gradients ----


def options_of(logits):
    weight = random_weight(logits.shape[1], logits.dtype)
    return {
        "plain": {},
        "weight": {"weight": weight},
        "smoothing": {"label_smoothing": 0.1},
        "softcap": {"softcap": 4.0},
        "all": {
            "weight": weight, "label_smoothing": 0.1, "softcap": 4.0, "z_loss": 0.1,
            "return_lse": True,
        },
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "weight", "smoothing", "softcap", "all"])
def test_the_native_kernel_misreads_a_layout(native_backend, options, layout, dtype):
    logits = layout(dtype)
    target = targets_of(logits)
    options = options_of(logits)[options]
    for reduction in ("none", "mean"):
        compare(native_backend.cross_entropy, logits, target, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_native_kernel_misreads_a_layout_of_probabilities(
    native_backend, wide, options, layout, dtype
):
    """In the strides of the logits, and in those of a contiguous tensor."""
    logits = layout(dtype)
    of_target = torch.promote_types(dtype, torch.float32) if wide else dtype
    q = random_probabilities(logits, of_target)
    options = options_of(logits)[options]
    compare(native_backend.cross_entropy, logits, q, reduction="none", **options)
    same = layout(of_target).detach().abs() / logits.shape[1]
    compare(native_backend.cross_entropy, logits, same, reduction="none", **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_layout_is_wrong_on_some_backend(one_isa, layout, reduction):
    """Through the public function, which may choose eager, against torch's own function."""
    logits = layout(torch.float64)
    target = targets_of(logits)
    run = one_isa.on_device(fastgpt.cross_entropy)
    got, want = (results(f, logits, target, reduction=reduction) for f in (run, F.cross_entropy))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_in_an_ignored_position_reaches_its_neighbours(native_backend, dtype):
    """Neighbours in memory: the positions of a class lie side by side."""
    logits = normal(2, 37, 70, dtype=dtype)
    target = targets_of(logits)
    clean = results(native_backend.cross_entropy, logits, target, reduction="none")
    ignored = target == -100
    logits = logits.masked_fill(ignored.unsqueeze(1), NAN)
    got = results(native_backend.cross_entropy, logits, target, reduction="none")
    assert all(map(torch.equal, got, clean))
    assert not got[1].masked_select(ignored.unsqueeze(1)).any()


@pytest.mark.parametrize("value", [37, -1, 10**12])
@pytest.mark.cuda_on_host(native_backend=())
def test_an_out_of_range_target_among_columns_is_accepted(native_backend, value):
    if native_backend.device != "cpu":
        pytest.skip("on a GPU it is an assertion of the device's, which ends the process")
    logits = normal(2, 37, 11)
    target = targets_of(logits)
    target[1, 7] = value
    with pytest.raises(IndexError, match=f"Target {value} is out of bounds"):
        native_backend.cross_entropy(logits, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_position_depends_on_the_positions_beside_it(native_backend, dtype):
    logits = normal(1, 37, 70, dtype=dtype)
    target = targets_of(logits)
    options = {"reduction": "none", "softcap": 4.0, "return_lse": True}
    whole = native_backend.cross_entropy(logits, target, **options)
    for start, stop in ((0, 1), (3, 20), (69, 70), (5, 70)):
        part = native_backend.cross_entropy(
            logits[:, :, start:stop], target[:, start:stop], **options
        )
        for one, all_of_them in zip(part, whole, strict=True):
            assert torch.equal(one, all_of_them[:, start:stop])


# ---- memory ----


def order(x):
    """The dimensions of more than one element, outermost in memory first."""
    return sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=lambda d: -x.stride(d))


@pytest.mark.parametrize(
    "name", ["contiguous", "transposed", "next token", "4 dimensions", "channels last"]
)
def test_the_gradient_has_other_strides_than_the_logits(native_backend, name):
    """Classes that are last in memory stay last, so that what produced the logits gets its own
    layout back.
    """
    logits = LAYOUTS[name](torch.float32)
    _, gradient = results(native_backend.cross_entropy, logits, targets_of(logits))
    assert order(gradient) == order(logits)
    if name != "next token":
        assert gradient.stride() == logits.stride()


@pytest.mark.parametrize("options", ["plain", "softcap", "all"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: normal(4, 1000, 128, dtype=torch.float32),
        lambda: normal(4, 128, 1000, dtype=torch.float32).transpose(1, 2),
        lambda: normal(4, 129, 1000, dtype=torch.float32)[:, :-1].transpose(1, 2),
        lambda: normal(4, 1000, 8, 16, dtype=torch.float32),
        lambda: normal(4, 1000, 8, 16, dtype=torch.float32).to(memory_format=torch.channels_last),
    ],
    ids=["contiguous", "transposed", "next token", "4 dimensions", "channels last"],
)
def test_the_logits_are_copied(native_backend, build, options):
    logits = build()
    target = targets_of(logits)
    size = logits.numel() * 4
    leaf = logits.detach().requires_grad_()
    options = options_of(logits)[options]
    native_backend.cross_entropy(leaf, target, **options)  # warm

    def forward():
        outputs = native_backend.cross_entropy(leaf, target, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    assert native_backend.peak_bytes(forward) <= 0.1 * size
    loss = sum(x.sum() for x in forward())
    assert native_backend.peak_bytes(lambda: torch.autograd.grad(loss, leaf)) <= 1.1 * size


# ---- which backend ----


def test_explain_names_another_backend_or_no_reason(layout):
    logits = layout(torch.float32)
    target = targets_of(logits)
    with fastgpt.backend("native"):
        for of in (target, random_probabilities(logits)):
            explanation = fastgpt.explain(fastgpt.cross_entropy, logits, of)
            assert explanation.backend == "native", str(explanation)


def test_positions_at_no_one_distance_are_copied_or_have_no_reason(native_backend):
    logits = normal(2, 5, 6, 8)[:, :, :, ::2][:, :, 1:].transpose(2, 3)
    target = targets_of(logits)
    explanation = fastgpt.explain(fastgpt.cross_entropy, logits, target)
    assert explanation.backend == "eager"
    reasons = [d.reason for d in explanation.decisions if d.backend == "native"]
    assert reasons == ["strides: the positions of a row lie at no one distance"]
    compare(fastgpt.cross_entropy, logits, target)


@pytest.mark.parametrize(
    "name", ["contiguous", "4 dimensions", "every second class", "columns", "batch last"]
)
def test_triton_accepts_classes_that_lie_apart(best_kernel, name):
    if best_kernel.name != "triton":
        pytest.skip("the native kernels read them")
    logits = LAYOUTS[name](torch.float32)
    arguments = best_kernel.placed((logits, targets_of(logits)))
    explanation = fastgpt.explain(fastgpt.cross_entropy, *arguments)
    assert explanation.backend == "eager"
    reasons = [d.reason for d in explanation.decisions if d.backend == "triton"]
    assert reasons[0].startswith("strides: the classes of a row do not lie together")


@pytest.mark.parametrize("name", ["transposed", "next token", "channels last"])
def test_triton_leaves_classes_that_lie_together(best_kernel, name):
    logits = LAYOUTS[name](torch.float32)
    if name == "next token" and best_kernel.name == "triton":
        logits = logits[:1]  # of several sequences, the rows are at no one distance
    target = targets_of(logits)
    for options in options_of(logits).values():
        compare(best_kernel.cross_entropy, logits, target, **options)
