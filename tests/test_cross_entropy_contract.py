"""Cross-entropy's contract against `torch.nn.functional.cross_entropy`: values, types, shapes,
exceptions and warnings, over every kind of call.
"""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracle import DTYPES, REDUCED_DTYPES, half_ulp, random_like, random_logits

import fastgpt

pytestmark = pytest.mark.cuda_on_host


def probabilities(shape, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


def compare(logits, target, upstream=None, tol=1e-12, ours=fastgpt.cross_entropy, **options):
    """Loss, its type and shape, and the gradients of logits and of a probability target."""
    results = []
    for function in (ours, F.cross_entropy):
        leaves = [logits.detach().clone().requires_grad_()]
        t = target
        if target.is_floating_point():
            t = target.detach().clone().requires_grad_()
            leaves.append(t)
        loss = function(leaves[0], t, **options)
        g = random_like(loss) if upstream is None else upstream
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves, g)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tol, atol=tol, equal_nan=True)
    return results[0]


# ---- calls that have a rule ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_differ_from_torch(weighted, smoothing, reduction, dtype):
    """Class indices are in test_cross_entropy_weights.py."""
    logits, _ = random_logits(12, 7, dtype=dtype, scale=2)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = probabilities((7,), dtype) + 0.5
    target = probabilities((12, 7), dtype)
    tol = 64 * half_ulp(dtype) if dtype in REDUCED_DTYPES else 16 * half_ulp(dtype)
    compare(logits, target, tol=tol, **options)


def test_a_rule_that_sends_a_call_to_eager_is_not_told(best_kernel):
    logits, target = best_kernel.placed((torch.zeros(3, 5), torch.full((3, 5), 0.2).double()))
    explanation = fastgpt.explain(fastgpt.cross_entropy, logits, target)
    assert explanation.backend == "eager"
    reason = "probabilities of type torch.float64 for logits of type torch.float32"
    assert f"{best_kernel.name}: {reason}" in str(explanation)


@pytest.mark.parametrize("weighted", [False, True])
def test_unnormalised_probabilities_or_their_gradient_are_wrong(weighted):
    logits, _ = random_logits(6, 4, dtype=torch.float64)
    weight = probabilities((4,)) + 0.1 if weighted else None
    _, gradient, _ = compare(logits, 5 * probabilities((6, 4)), weight=weight, reduction="sum")
    if not weighted:
        q, p = 5 * probabilities((6, 4)), logits.softmax(1)
        want = (q.sum(1, keepdim=True) * p - q) * random_like(logits[0, 0])
        torch.testing.assert_close(gradient, want)


def test_a_probability_target_loses_a_second_derivative():
    logits, _ = random_logits(3, 4, dtype=torch.float64)
    inputs = logits.requires_grad_(), probabilities((3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(fastgpt.cross_entropy, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fastgpt.cross_entropy, inputs)


@pytest.mark.parametrize("logits_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_probabilities_of_another_type_change_the_result_type(logits_dtype, target_dtype):
    logits, _ = random_logits(4, 3, dtype=logits_dtype)
    target = probabilities((4, 3), target_dtype)
    got, want = fastgpt.cross_entropy(logits, target), F.cross_entropy(logits, target)
    assert got.dtype == want.dtype
    worst = max(half_ulp(logits_dtype), half_ulp(target_dtype))
    assert float(got) == pytest.approx(float(want), rel=16 * worst)


# ---- shapes ----


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [
        ((5,), ()),
        ((1,), ()),
        ((0, 5), (0,)),
        ((3, 5, 0), (3, 0)),
        ((0, 5, 2), (0, 2)),
        ((3, 5, 2, 4), (3, 2, 4)),
        ((1, 1), (1,)),
    ],
)
def test_a_shape_gives_another_result_than_in_torch(one_isa, shape, target_shape, reduction):
    classes = shape[1] if len(shape) > 1 else shape[0]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, target_shape, generator=generator)
    ours = one_isa.on_device(fastgpt.cross_entropy)
    compare(logits, target, ours=ours, reduction=reduction)
    if logits.dim() == 1:
        compare(logits, torch.full_like(target, -100), ours=ours, reduction=reduction)
    if shape == (5,):  # a target (1,) too, though torch's own backward fails on it
        got = ours(logits, target.view(1), reduction=reduction)
        want = F.cross_entropy(logits, target.view(1), reduction=reduction)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 5, 2), (3, 5, 0)])
def test_a_shape_of_probabilities_gives_another_result_than_in_torch(shape, reduction):
    logits = probabilities(shape, seed=4)
    compare(logits, probabilities(shape), reduction=reduction)


@pytest.mark.parametrize("shape", [(0, 0), (0, 0, 3), (2, 0, 0)])
def test_no_classes_differ_from_torch(one_isa, shape):
    logits = torch.zeros(shape, dtype=torch.float64)
    target = torch.full(shape[:1] + shape[2:], -100)
    for reduction in ("none", "sum", "mean"):
        compare(logits, target, ours=one_isa.on_device(fastgpt.cross_entropy), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_result_has_another_type_or_a_copy_of_it(backend, reduction, dtype):
    logits, target = random_logits(6, 9, dtype=dtype)
    loss = backend.cross_entropy(logits, target, reduction=reduction)
    assert loss.dtype == dtype
    assert loss.shape == F.cross_entropy(logits, target, reduction=reduction).shape


# ---- legacy arguments ----


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments_mean_something_else_or_do_not_warn(size_average, reduce):
    logits, target = random_logits(4, 3)
    options = {"size_average": size_average, "reduce": reduce}
    found = []
    for function in (fastgpt.cross_entropy, F.cross_entropy):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append((function(logits, target, **options), [w.category for w in caught]))
    (got, got_warnings), (want, want_warnings) = found
    torch.testing.assert_close(got, want)
    assert got_warnings == want_warnings
    assert bool(want_warnings) == (size_average is not None or reduce is not None)


def test_the_signature_differs_from_torchs():
    import inspect

    ours, torchs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (fastgpt.cross_entropy, F.cross_entropy)
    )
    assert ours[: len(torchs)] == torchs
    extras = {
        "z_loss": 0.0, "softcap": None, "inplace_backward": False, "return_lse": False,
        "process_group": None,
    }  # fmt: skip
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert ours[len(torchs) :] == [(name, keyword, default) for name, default in extras.items()]
    logits, target = random_logits(4, 3)
    positional = (logits, target, None, None, 2, None, "sum", 0.0)
    torch.testing.assert_close(fastgpt.cross_entropy(*positional), F.cross_entropy(*positional))


# ---- calls that must raise as torch does ----

X, T = random_logits(4, 3)
SOFT = probabilities((4, 3))
LEARNT = torch.ones(3, requires_grad=True)
BAD_CALLS = {
    "int32 target": ((X, T.int()), {}, "dtype|Int"),
    "bool target": ((X, T.bool()), {}, "dtype|Bool"),
    "int16 target": ((X, T.short()), {}, "dtype|Short"),
    "integer logits": ((T.view(2, 2), T[:2]), {}, "not implemented"),
    "fewer targets": ((X, T[:3]), {}, r"batch_size \(4\)"),
    "more targets": ((X[:2], T), {}, r"batch_size \(2\)"),
    "scalar target for a batch": ((X, T[0]), {}, "batch_size"),
    "target of another K": ((X.view(2, 3, 2), T.view(2, 2)[:, :1]), {}, "size"),
    "target with one more dimension": ((X, T.view(4, 1)), {}, "size|dim|multi"),
    "target missing a dimension": ((X.view(2, 3, 2), T[:2]), {}, "size|dim"),
    "probabilities of another shape": ((X, probabilities((4, 2))), {}, "dtype|size|dim|target"),
    "integer target shaped like the logits": ((X, X.long()), {}, "class probabilities"),
    "unbatched integer target shaped like the logits": ((X[0], T[:3]), {}, "class probabilities"),
    "one class and an integer target like it": ((X[0, :1], T[:1]), {}, "class probabilities"),
    "unbatched with two targets": ((X[0], T[:2]), {}, "1D"),
    "unbatched with none": ((X[0], T[:0]), {}, "1D|size"),
    "float class index": ((X, T.float()), {}, "dtype|Float|size|target"),
    "weight too short": ((X, T, torch.ones(2)), {}, "weight tensor"),
    "weight too long": ((X, T, torch.ones(4)), {}, "weight tensor"),
    "weight of two dimensions": ((X, T, torch.ones(3, 1)), {}, "weight tensor"),
    "weight of another type": ((X, T, torch.ones(3).double()), {}, "type|dtype"),
    "weight that requires grad": ((X, T, LEARNT), {}, "not differentiable|derivative"),
    "short weight for probabilities": ((X, SOFT, torch.ones(2)), {}, "weight tensor"),
    "smoothing above one": ((X, T), {"label_smoothing": 1.5}, "label_smoothing"),
    "ignore_index with probabilities": ((X, SOFT), {"ignore_index": 1}, "ignore_index"),
    "unknown reduction": ((X, T), {"reduction": "average"}, "average"),
    "no reduction": ((X, T), {"reduction": None}, "None"),
    "target out of range": ((X, T + 3), {}, "out of bounds"),
    "negative target": ((X, T - 4), {}, "out of bounds"),
    "default ignore_index among uint8": ((X, T.to(torch.uint8) + 150), {}, "out of bounds"),
    "ignore_index elsewhere": ((X, T * 0 - 100), {"ignore_index": -1}, "out of bounds"),
    "list target": ((X, T.tolist()), {}, "Tensor"),
    "list logits": ((X.tolist(), T), {}, "Tensor"),
    "no logits": ((None, T), {}, "Tensor"),
    "list weight": ((X, T, [1.0, 1, 1]), {}, "Tensor"),
    "text ignore_index": ((X, T), {"ignore_index": "1"}, "ignore_index|int"),
    "float ignore_index": ((X, T), {"ignore_index": 1.5}, "ignore_index|int"),
    "scalar logits": ((X[0, 0], T[0]), {}, "scalar|dim|size|index|input"),
    "target on another device": ((X, T.to("meta")), {}, "device|meta"),
    "logits on another device": ((X.to("meta"), T), {}, "device|meta"),
    "weight on another device": ((X, T, torch.ones(3, device="meta")), {}, "device|meta"),
    "unknown argument": ((X, T), {"smoothing": 0.1}, "smoothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_accepted_or_raises_another_type(name):
    args, options, text = BAD_CALLS[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever torch raises)
        F.cross_entropy(*args, **options)
    with pytest.raises(type(expected.value), match=re.compile(text, re.IGNORECASE)) as raised:
        fastgpt.cross_entropy(*args, **options)
    assert raised.type is expected.type
    assert raised.type is not AssertionError


@pytest.mark.parametrize("value", [3, -1, 10**12])
@pytest.mark.cuda_on_host(backend=())
def test_an_out_of_range_target_is_not_named(backend, value):
    if backend.device != "cpu":
        pytest.skip("on a GPU it is an assertion of the device's, which ends the process")
    target = T.clone()
    target[2] = value
    with pytest.raises(IndexError) as raised:
        backend.cross_entropy(X, target)
    for part in (f"Target {value} is out of bounds", "target < 3"):
        assert part in str(raised.value)
    if backend.name == "native":
        assert "Row 2" in str(raised.value)


def test_rows_without_classes_are_accepted():
    for function in (fastgpt.cross_entropy, F.cross_entropy):
        with pytest.raises(IndexError, match="Target 0 is out of bounds"):
            function(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))


def test_ignored_rows_without_classes_are_refused():
    logits, target = torch.zeros(2, 0, dtype=torch.float64), torch.full((2,), -100)
    for reduction in ("none", "mean", "sum"):
        compare(logits, target, reduction=reduction)


def test_negative_smoothing_differs_from_torch():
    logits, target = random_logits(4, 3, dtype=torch.float64)
    compare(logits, target, label_smoothing=-0.5)


def test_a_weight_that_requires_grad_is_refused_without_a_graph():
    weight = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(
            fastgpt.cross_entropy(X, T, weight), F.cross_entropy(X, T, weight)
        )


# ---- the module ----


def test_the_module_differs_from_torchs(one_isa):
    logits, target = random_logits(8, 5)
    weight = torch.linspace(0.5, 1.5, 5)
    for options in (
        {},
        {"reduction": "sum"},
        {"weight": weight, "label_smoothing": 0.1, "ignore_index": 2},
    ):
        ours, torchs = fastgpt.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
        run = one_isa.on_device(ours.to(one_isa.device))
        torch.testing.assert_close(run(logits, target), torchs(logits, target))
        assert ours.state_dict().keys() == torchs.state_dict().keys()
        assert isinstance(ours, torch.nn.CrossEntropyLoss)


# ---- autocast ----


@pytest.mark.parametrize("autocast_dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_gives_another_type_than_torchs(backend, reduction, dtype, autocast_dtype):
    """16-bit logits give a float32 loss and a 16-bit gradient; others stay what they are."""
    logits, target = random_logits(9, 33, dtype=dtype, scale=2)
    results = []
    devices = backend.device, "cpu"
    for function, device in zip((backend.cross_entropy, F.cross_entropy), devices, strict=True):
        x = logits.clone().requires_grad_()
        with torch.autocast(device, autocast_dtype):
            loss = function(x, target, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, x, random_like(loss))
        results.append((loss.detach(), gradient))
    (loss, gradient), want = results
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=1e-6)
    # Both form it in float32 and round it once.
    torch.testing.assert_close(gradient, want[1], rtol=2 * half_ulp(dtype), atol=1e-7)


def test_autocast_of_weights_smoothing_or_probabilities_differs_from_torch(one_isa):
    for dtype in (torch.bfloat16, torch.float32):
        logits, target = random_logits(9, 5, dtype=dtype)
        soft = probabilities((9, 5), dtype)
        calls = [
            (target, {"weight": torch.linspace(0.5, 1.5, 5)}),
            (target, {"weight": torch.linspace(0.5, 1.5, 5).bfloat16()}),
            (target, {"label_smoothing": 0.1}),
            (soft, {}),
            (soft, {"weight": torch.linspace(0.5, 1.5, 5)}),
        ]
        for t, options in calls:
            ours = one_isa.on_device(fastgpt.cross_entropy)
            with torch.autocast(one_isa.device, torch.bfloat16):
                got = ours(logits, t, **options)
            with torch.autocast("cpu", torch.bfloat16):
                want = F.cross_entropy(logits, t, **options)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ---- random calls ----


@st.composite
def calls(draw):
    """Any valid call: shape, layout, kind of target, weight, ignore_index, reduction, smoothing."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    classes = draw(st.integers(1, 9))
    extra = draw(st.lists(st.integers(0, 3), max_size=2))
    batch = [draw(st.integers(0, 4))] if extra or draw(st.booleans()) else []
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    last = torch.randn(*batch, *extra, classes, generator=generator, dtype=torch.float64) * scale
    logits = last.movedim(-1, 1) if batch else last
    if draw(st.booleans()):
        logits = logits.contiguous()
    options = {
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.7, 1.0])),
    }
    if draw(st.booleans()):
        options["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64)
    if draw(st.integers(0, 3)) == 0:
        target = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    else:
        target = torch.randint(classes, batch + extra, generator=generator)
        ignore_index = draw(st.sampled_from([-100, -1, 0, 2]))
        options["ignore_index"] = ignore_index
        if draw(st.booleans()):
            dropped = torch.rand(target.shape, generator=generator) < draw(
                st.sampled_from([0.3, 1.0])
            )
            target = target.masked_fill(dropped, ignore_index)
        # torch takes uint8 for (N, C) logits only; here it may stand in any place.
        if ignore_index >= 0 and not extra and draw(st.booleans()):
            target = target.to(torch.uint8)
    return logits, target, options


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(calls())
@example((torch.zeros(0, 1, 0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.int64), {}))
def test_a_random_call_differs_from_torch(best_kernel, call):
    logits, target, options = call
    compare(logits, target, ours=best_kernel.on_device(fastgpt.cross_entropy), **options)
