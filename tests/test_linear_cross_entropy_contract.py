"""Linear cross-entropy's contract against `torch.nn.functional.linear_cross_entropy` (torch 2.13):
values, types, shapes, exceptions and warnings; the module, `drop_in`, `explain` and autocast.
"""

import copy
import inspect
import io
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import REDUCTIONS, composition, random_problem
from oracle import DTYPES, REDUCED_DTYPES, half_ulp, random_like, random_weight
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt
from fastgpt import dispatch

# What torch's own is where torch is too old to have it.
TORCHS = getattr(F, "linear_cross_entropy", composition)
needs_torchs = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch.nn.functional.linear_cross_entropy: 2.13"
)


def random(*shape, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


def compare(x, W, target, bias=None, tol=1e-12, ours=fastgpt.linear_cross_entropy, **options):
    """Loss, its type and shape, and the gradients of all that torch differentiates."""
    results = []
    for function in (ours, TORCHS):
        leaves = [a.detach().clone().requires_grad_() for a in (x, W)]
        t, b = target, bias
        if target.is_floating_point():
            t = target.detach().clone().requires_grad_()
            leaves.append(t)
        if bias is not None:
            b = bias.detach().clone().requires_grad_()
            leaves.append(b)
        loss = function(*leaves[:2], t, linear_bias=b, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves, random_like(loss))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tol, atol=tol, equal_nan=True)
    return results[0]


# ---- signature ----


@needs_torchs
def test_the_signature_differs_from_torchs():
    ours, torchs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (fastgpt.linear_cross_entropy, F.linear_cross_entropy)
    )
    assert ours[: len(torchs)] == torchs
    extras = {
        "z_loss": 0.0, "softcap": None, "return_lse": False, "process_group": None, "shift": False,
        "filter_eps": None, "recompute": False,
    }  # fmt: skip
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert ours[len(torchs) :] == [(name, keyword, default) for name, default in extras.items()]


@needs_torchs
def test_the_modules_signature_or_state_differs_from_torchs():
    ours, torchs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(m).parameters.values()]
        for m in (fastgpt.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss)
    )
    assert ours[: len(torchs)] == torchs
    function = list(inspect.signature(fastgpt.linear_cross_entropy).parameters.values())[9:]
    assert ours[len(torchs) :] == [(p.name, p.kind, p.default) for p in function]
    for options in (
        {},
        {"bias": True, "weight": torch.ones(7)},
        {"out_features": (2, 3), "bias": True},
    ):
        modules = [m(5, 7, **options) for m in (fastgpt.LinearCrossEntropyLoss,
                                                nn.LinearCrossEntropyLoss)]  # fmt: skip
        states = [m.state_dict() for m in modules]
        assert [(k, v.shape) for k, v in states[0].items()] == [
            (k, v.shape) for k, v in states[1].items()
        ]
        modules[0].load_state_dict(states[1])
        modules[1].load_state_dict(states[0])


# ---- values ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("x", "W", "target"),
    [
        ((4,), (5, 4), ()),
        ((4,), (1, 4), ()),
        ((1, 4), (5, 4), (1,)),
        ((6, 4), (5, 4), (6,)),
        ((0, 4), (5, 4), (0,)),
        ((6, 4), (5, 3, 4), (6, 3)),
        ((6, 4), (5, 2, 3, 4), (6, 2, 3)),
        ((6, 4), (5, 1, 4), (6, 1)),
        ((6, 4), (5, 0, 4), (6, 0)),
        ((0, 4), (5, 3, 4), (0, 3)),
        ((6, 0), (5, 0), (6,)),
        ((0,), (5, 0), ()),
    ],
    ids=str,
)
def test_a_shape_gives_another_result_than_in_torch(linear_one_isa, x, W, target, reduction):
    classes = W[0]
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(classes, target, generator=generator)
    arguments = random(*x), random(*W, seed=4)
    kind = {"reduction": reduction}
    for bias in (None, random(*W[:-1], seed=5)):
        compare(*arguments, t, bias, **kind)
        compare(*arguments, t, bias, weight=random(classes) + 0.5, label_smoothing=0.1, **kind)
        soft = random(*x[:-1], *W[:-1], seed=6)
        if not (reduction == "mean" and 0 in W[1:-1]):  # torch divides by the batch all the same
            compare(*arguments, soft, bias, **kind)
            compare(*arguments, soft, bias, weight=random(classes), label_smoothing=0.3, **kind)
    if not target:
        compare(*arguments, torch.tensor(-100), **kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["classes", "probabilities", "weighted probabilities"])
def test_a_type_gives_another_result_than_in_torch(linear_backend, kind, dtype):
    x, W, b, t = random_problem(12, 17, 9, dtype=dtype)
    if kind != "classes":
        t = random(12, 17, dtype=dtype)
    weight = random_weight(17, dtype) if "weighted" in kind else None
    tol = 64 * half_ulp(dtype) if dtype in REDUCED_DTYPES else 32 * half_ulp(dtype)
    for reduction in REDUCTIONS:
        compare(x, W, t, b, tol, weight=weight, reduction=reduction)


@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_probabilities_of_another_type_change_the_result_type(input_dtype, target_dtype):
    x, W, b, _ = random_problem(5, 4, 3, dtype=input_dtype)
    target = random(5, 4, dtype=target_dtype)
    got, want = (f(x, W, target, linear_bias=b) for f in (fastgpt.linear_cross_entropy, TORCHS))
    assert got.dtype == want.dtype
    worst = max(half_ulp(input_dtype), half_ulp(target_dtype))
    assert float(got) == pytest.approx(float(want), rel=16 * worst)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_positions_of_a_row_spoil_the_others(linear_one_isa, reduction):
    """With one matrix for each position, a row may be ignored at some of them."""
    x, W = random(6, 4), random(5, 3, 4, seed=4)
    target = torch.randint(5, (6, 3), generator=torch.Generator().manual_seed(0))
    target[1, 2] = target[2, 0] = target[2, 1] = -100
    target[4] = -100
    for options in ({}, {"weight": random(5)}, {"label_smoothing": 0.2}):
        found = compare(x, W, target, random(5, 3), reduction=reduction, **options)
        assert not found[1][4].any()


@pytest.mark.parametrize("requires", ["x", "W", "b", "xW", "xb", "Wb", "q", "xq", ""])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_requires_no_gradient_gets_one_or_spoils_the_rest(linear_backend, reduction, requires):
    x, W, b, t = random_problem(6, 9, 4)
    if "q" in requires:
        t = random(6, 9)
    found = []
    for function in (linear_backend.linear_cross_entropy, composition):
        tensors = {"x": x, "W": W, "b": b, "q": t}
        tensors = {k: v.clone().requires_grad_(k in requires) for k, v in tensors.items()}
        loss = function(
            tensors["x"], tensors["W"], tensors["q"], linear_bias=tensors["b"], reduction=reduction
        )
        assert loss.requires_grad == bool(requires)
        if requires:
            loss.backward(random_like(loss))
        assert [k for k, v in tensors.items() if v.grad is not None] == [
            k for k in tensors if k in requires
        ]
        found.append([v.grad for v in tensors.values() if v.grad is not None])
    torch.testing.assert_close(*found)


def test_a_weight_that_requires_grad_differs_from_torch(linear_one_isa):
    x, W, _, _ = random_problem(6, 9, 4)
    weight = torch.ones(9, dtype=torch.float64, requires_grad=True)
    found = [
        torch.autograd.grad(f(x, W, random(6, 9), weight=weight), weight)
        for f in (fastgpt.linear_cross_entropy, TORCHS)
    ]
    torch.testing.assert_close(*found)


@needs_torchs
def test_torchs_options_warn_or_change_the_result(linear_one_isa):
    """Chunks are nothing to choose here: no warning where torch falls back, and the same bits."""
    x, W, b, t = random_problem(20, 9, 4, dtype=torch.float32)
    W = W.requires_grad_()
    for options in (
        nn.LinearCrossEntropyOptions(),
        nn.LinearCrossEntropyOptions(allow_retain_graph=True),
        None,
    ):
        for call in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                got, want = (
                    linear_one_isa.linear_cross_entropy(x, W, t, linear_bias=b, **call, **o)
                    for o in ({"options": options}, {})
                )
            assert torch.equal(got, want)
    module = fastgpt.LinearCrossEntropyLoss(4, 9, options=nn.LinearCrossEntropyOptions())
    assert module(x, t).isfinite()
    for wrong in ({"batch_chunk_size": 4}, "auto", 4):
        with pytest.raises(TypeError, match="options must be a torch"):
            fastgpt.linear_cross_entropy(x, W, t, options=wrong)


# ---- calls that must raise as torch does ----

X, W = random(4, 3, dtype=torch.float32), random(5, 3, dtype=torch.float32, seed=4)
T = torch.tensor([0, 3, 1, 4])
SOFT = random(4, 5, dtype=torch.float32)
WK, TK = random(5, 2, 3, dtype=torch.float32), torch.zeros(4, 2, dtype=torch.int64)
B = torch.zeros(5)
BAD_CALLS = {
    "three-dimensional input": ((X.view(2, 2, 3), W, T), {}, "1 or 2"),
    "scalar input": ((X[0, 0], W, T[0]), {}, "1 or 2"),
    "vector for a matrix": ((X, W[0], T), {}, "at least 2"),
    "other features": ((X, W[:, :2], T), {}, "3 and 2"),
    "short bias": ((X, W, T), {"linear_bias": B[:4]}, "linear_bias"),
    "bias of two dimensions": ((X, W, T), {"linear_bias": B.view(5, 1)}, "linear_bias"),
    "bias without positions": ((X, WK, TK), {"linear_bias": B}, "linear_bias"),
    "unbatched input for positions": ((X[0], WK, TK[0]), {}, "K-dim|needs input"),
    "ignore_index with probabilities": ((X, W, SOFT), {"ignore_index": -100}, "ignore_index"),
    "and with K-dimensional ones": (
        (X, WK, torch.ones(4, 5, 2)), {"ignore_index": 2}, "ignore_index",
    ),
    "int32 target": ((X, W, T.int()), {}, "dtype|Int"),
    "bool target": ((X, W, T.bool()), {}, "dtype|Bool"),
    "float class indices": ((X, W, T.float()), {}, "dtype|Float|size|target"),
    "fewer targets": ((X, W, T[:3]), {}, r"batch_size \(4\)"),
    "more targets": ((X[:2], W, T), {}, r"batch_size \(2\)"),
    "scalar target for a batch": ((X, W, T[0]), {}, "batch_size"),
    "target of another K": ((X, WK, TK[:, :1]), {}, "size"),
    "target without K": ((X, WK, T), {}, "size|dim"),
    "target with a dimension too many": ((X, W, T.view(4, 1)), {}, "size|dim|multi"),
    "probabilities of another shape": ((X, W, SOFT[:, :4]), {}, "dtype|size|dim|target"),
    "integers shaped like probabilities": ((X, W, SOFT.long()), {}, "class probabilities"),
    "unbatched with two targets": ((X[0], W, T[:2]), {}, "1D"),
    "short weight": ((X, W, T), {"weight": B[:4]}, "weight tensor"),
    "weight of two dimensions": ((X, W, T), {"weight": B.view(5, 1)}, "weight tensor"),
    "weight of another type": ((X, W, T), {"weight": B.double()}, "type|dtype"),
    "weight that requires grad": (
        (X, W, T), {"weight": torch.ones(5, requires_grad=True)}, "not differentiable|derivative",
    ),
    "smoothing above one": ((X, W, T), {"label_smoothing": 1.5}, "label_smoothing"),
    "unknown reduction": ((X, W, T), {"reduction": "average"}, "average"),
    "no reduction": ((X, W, T), {"reduction": None}, "None"),
    "target out of range": ((X, W, T + 1), {}, "out of bounds"),
    "negative target": ((X, W, T - 1), {}, "out of bounds"),
    "ignore_index elsewhere": ((X, W, T * 0 - 100), {"ignore_index": -1}, "out of bounds"),
    "matrix of another type": ((X, W.double(), T), {}, "type|dtype"),
    "bias of another type": ((X, W, T), {"linear_bias": B.double()}, "type|dtype"),
    "float16 matrix": ((X, W.half(), T), {}, "type|dtype"),
    "positional bias": ((X, W, T, B), {}, "positional"),
    "no target": ((X, W), {}, "target"),
    "unknown argument": ((X, W, T), {"smoothing": 0.1}, "smoothing"),
    "text ignore_index": ((X, W, T), {"ignore_index": "1"}, "ignore_index|int"),
    "float ignore_index": ((X, W, T), {"ignore_index": 1.5}, "ignore_index|int"),
    "target elsewhere": ((X, W, T.to("meta")), {}, "device|meta"),
}  # fmt: skip


@needs_torchs
@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_accepted_or_raises_another_type(name):
    args, options, text = BAD_CALLS[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever torch raises)
        F.linear_cross_entropy(*args, **options)
    with pytest.raises(type(expected.value), match=re.compile(text, re.IGNORECASE)) as raised:
        fastgpt.linear_cross_entropy(*args, **options)
    assert raised.type is expected.type
    assert raised.type is not AssertionError


# torch has an AttributeError for some of these, and no error for others.
WORSE_IN_TORCH = {
    "list input": ((X.tolist(), W, T), {}, TypeError, "input must be a Tensor, got list"),
    "no matrix": ((X, None, T), {}, TypeError, "linear_weight must be a Tensor, got NoneType"),
    "list target": ((X, W, T.tolist()), {}, TypeError, "target must be a Tensor, got list"),
    "list bias": ((X, W, T), {"linear_bias": [0.0] * 5}, TypeError, "linear_bias must be a Tensor"),
    "integer input": ((T.view(4, 1), W[:, :1], T), {}, NotImplementedError, "floating-point type"),
    "matrix elsewhere": ((X, W.to("meta"), T), {}, RuntimeError, "linear_weight on the device of"),
    "text options": ((X, W, T), {"options": "auto"}, TypeError, "options must be"),
}


@pytest.mark.parametrize("name", WORSE_IN_TORCH)
def test_a_bad_call_is_not_explained(name):
    args, options, error, text = WORSE_IN_TORCH[name]
    with pytest.raises(error, match=text):
        fastgpt.linear_cross_entropy(*args, **options)


@pytest.mark.parametrize("value", [5, -1, 10**12])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_out_of_range_target_is_not_named(linear_backend, reduction, value):
    """With gradients, where the loss's forward forms them, and without."""
    target = T.clone()
    target[2] = value
    for matrix in (W, W.clone().requires_grad_()):
        with pytest.raises(IndexError) as raised:
            linear_backend.linear_cross_entropy(X, matrix, target, reduction=reduction)
        for part in (f"Target {value} is out of bounds", "target < 5"):
            assert part in str(raised.value)


def test_rows_without_classes_are_accepted():
    none = torch.zeros(0, 3)
    with pytest.raises(IndexError, match="Target 0 is out of bounds"):
        fastgpt.linear_cross_entropy(X, none, torch.zeros(4, dtype=torch.int64))
    loss = fastgpt.linear_cross_entropy(X, none, torch.full((4,), -100), reduction="sum")
    assert loss == 0


# ---- the module ----


MODULES = {
    "plain": {},
    "bias": {"bias": True},
    "K-dim": {"out_features": (2, 3), "bias": True},
    "weights": {"weight": torch.linspace(0.5, 1.5, 7), "label_smoothing": 0.1},
    "sum": {"reduction": "sum", "ignore_index": 3},
}


@needs_torchs
@pytest.mark.parametrize("name", MODULES)
def test_the_module_differs_from_torchs(linear_one_isa, name):
    options = MODULES[name]
    ours, torchs = (
        m(5, 7, **options) for m in (fastgpt.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss)
    )
    ours.load_state_dict(torchs.state_dict())
    x = random(6, 5, dtype=torch.float32)
    shape = (6, *options.get("out_features", ()))
    target = torch.randint(7, shape, generator=torch.Generator().manual_seed(0))
    assert fastgpt.explain(ours, x, target).backend == linear_one_isa.name
    losses = ours(x, target), torchs(x, target)
    torch.testing.assert_close(*losses)
    gradients = [
        torch.autograd.grad(loss, list(m.parameters()))
        for loss, m in zip(losses, (ours, torchs), strict=True)
    ]
    torch.testing.assert_close(*gradients)
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in torchs.named_parameters()]


def test_the_module_cannot_be_copied_or_saved():
    module = fastgpt.LinearCrossEntropyLoss(5, 7, bias=True, z_loss=0.1, softcap=5.0)
    x, target = random(6, 5, dtype=torch.float32), torch.arange(6)
    want = module(x, target)
    assert torch.equal(copy.deepcopy(module)(x, target), want)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, target), want)
    assert module.double()(x.double(), target).dtype == torch.float64
    assert "in_features=5, num_classes=7" in repr(module)


def test_a_tied_matrix_loses_a_gradient():
    embedding = nn.Embedding(7, 5)
    module = fastgpt.LinearCrossEntropyLoss(5, 7)
    module.linear.weight = embedding.weight
    tokens = torch.arange(7)
    module(embedding(tokens), tokens.roll(1)).backward()
    x = embedding.weight.detach().clone().requires_grad_()
    composition(x[tokens], x, tokens.roll(1)).backward()
    torch.testing.assert_close(embedding.weight.grad, x.grad)


@needs_torchs
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weight": torch.ones(6)}, r"weight .*7.*6"),
        ({"weight": torch.ones(7, 1)}, "weight"),
        ({"label_smoothing": 1.5}, "label_smoothing .*1.5"),
        ({"label_smoothing": -0.5}, "label_smoothing .*-0.5"),
    ],
    ids=str,
)
def test_a_bad_module_is_made(options, text):
    for module in (fastgpt.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss):
        with pytest.raises(RuntimeError, match=text):
            module(5, 7, **options)


# ---- drop_in and explain ----


class Operators(TorchDispatchMode):
    """The names of the operators that run inside the block."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


FUSED = {
    "fastgpt.linear_cross_entropy_forward.default",
    "fastgpt.linear_cross_entropy_backward.default",
}


@needs_torchs
@pytest.mark.parametrize("of", ["function", "module"])
def test_drop_in_leaves_torchs_or_changes_the_result(best_native, of):
    torch.manual_seed(0)
    module = nn.LinearCrossEntropyLoss(3, 5, bias=True, label_smoothing=0.1)

    def loss():
        if of == "module":
            return module(X, T)
        return F.linear_cross_entropy(
            X, module.linear.weight, target=T, linear_bias=module.linear.bias, label_smoothing=0.1
        )

    found = []
    for inside in (False, True, False):
        module.zero_grad()
        with Operators() as operators:
            if inside:
                with fastgpt.drop_in():
                    value = loss()
            else:
                value = loss()
            value.backward()
        assert bool(FUSED & set(operators.names)) == inside
        found.append((value.detach(), module.linear.weight.grad, module.linear.bias.grad))
    torch.testing.assert_close(found[1], found[0])


@needs_torchs
def test_explain_knows_fewer_functions_than_it_says():
    module = fastgpt.LinearCrossEntropyLoss(3, 5, z_loss=0.1)
    torchs = nn.LinearCrossEntropyLoss(3, 5, ignore_index=2)
    for explanation in (
        fastgpt.explain(fastgpt.linear_cross_entropy, X, W, T),
        fastgpt.explain(F.linear_cross_entropy, X, linear_weight=W, target=T),
        fastgpt.explain(module, X, T),
        fastgpt.explain(module, input=X, target=T),
        fastgpt.explain(torchs, X, T),
    ):
        assert str(explanation) == "linear_cross_entropy on cpu runs on native"
    with pytest.raises(RuntimeError, match="ignore_index"):  # a module's own arguments count
        fastgpt.explain(torchs, X, SOFT)
    with pytest.raises(ValueError, match="batch_size"):
        fastgpt.explain(fastgpt.linear_cross_entropy, X, W, T[:1])
    with pytest.raises(TypeError):
        fastgpt.explain(fastgpt.linear_cross_entropy, X, W)


def test_explain_runs_something():
    with Operators() as operators:
        fastgpt.explain(fastgpt.linear_cross_entropy, X, W, T)
    assert not FUSED & set(operators.names)
    assert not any("mm" in name for name in operators.names)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((X[:, :0], W[:, :0], T), "an empty input"),
        ((X, W[:0], T), "an empty linear_weight"),
        ((X, WK[:, :0], TK[:, :0]), "an empty linear_weight"),
        ((X, W, SOFT.double()), "probabilities of type torch.float64"),
        ((X.to(torch.float8_e4m3fn), W.to(torch.float8_e4m3fn), T), "input of type torch.float8"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_rule_that_sends_a_call_to_eager_is_not_told(arguments, rule):
    explanation = fastgpt.explain(fastgpt.linear_cross_entropy, *arguments)
    assert explanation.backend == "eager"
    assert f"native: {rule}" in str(explanation)


def test_a_preferred_backend_is_ignored_or_its_absence_not_told():
    with fastgpt.backend("eager"):
        explanation = fastgpt.explain(fastgpt.linear_cross_entropy, X, W, T)
        assert explanation.backend == "eager"
        assert "native: the backend 'eager' was asked for" in str(explanation)
    if dispatch.lookup("cross_entropy", "triton", "cpu").available:
        with fastgpt.backend("triton"):
            explanation = fastgpt.explain(fastgpt.linear_cross_entropy, X, W, T)
        assert explanation.backend == "triton"
        assert "native: the backend 'triton' was asked for" in str(explanation)


@pytest.mark.parametrize(
    "arguments",
    [
        (X[:0], W, T[:0]),
        (X[0], W, T[0]),
        (X, WK, TK),
        (X.t().contiguous().t(), W.t().contiguous().t(), T),
        (X, W, SOFT),
        (X.half(), W.half(), SOFT.half()),
        (X.half(), W.half(), SOFT),
        (X[:, ::2], W[:, ::2], T),
    ],
    ids=str,
)
def test_a_call_that_the_kernels_cover_goes_to_eager(arguments):
    assert fastgpt.explain(fastgpt.linear_cross_entropy, *arguments).backend == "native"


def test_info_has_no_row_of_it():
    cells = {
        (c["backend"], c["device"]): c
        for c in fastgpt.info().cells
        if c["op"] == "linear_cross_entropy"
    }
    assert cells["native", "cpu"]["available"]
    assert cells["eager", "cpu"]["available"]
    assert all(cell["available"] or cell["reason"] for cell in cells.values())
    assert "linear_cross_entropy" in str(fastgpt.info())


# ---- autocast ----


@pytest.mark.parametrize("autocast_dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_gives_another_type_than_torchs(linear_backend, reduction, dtype, autocast_dtype):
    """The product in autocast's type, the loss in float32; float64 stays what it is."""
    problem = random_problem(9, 33, 6, dtype=dtype)
    results = []
    for function in (linear_backend.linear_cross_entropy, TORCHS):
        x, matrix, b = (a.clone().requires_grad_() for a in problem[:3])
        with torch.autocast("cpu", autocast_dtype):
            loss = function(x, matrix, problem.target, linear_bias=b, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss, (x, matrix, b), random_like(loss))))
    ours, torchs = results
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    tol = 16 * half_ulp(autocast_dtype) if dtype != torch.float64 else 1e-12
    for got, want in zip(ours, torchs, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def test_autocast_rounds_the_loss_to_sixteen_bits(best_native):
    """It is that of the inputs in autocast's type, with all digits of float32."""
    problem = random_problem(50, 33, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = best_native.linear_cross_entropy(**problem._asdict())
    rounded = {k: v.bfloat16().double() if k != "target" else v for k, v in
               problem._asdict().items()}  # fmt: skip
    assert float(loss) == pytest.approx(float(composition(**rounded)), rel=1e-6)


def test_autocast_of_mixed_types_is_refused(linear_one_isa):
    """A float32 matrix and bfloat16 activations, as a model has them."""
    x, matrix, b, t = random_problem(9, 33, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = fastgpt.linear_cross_entropy(x.bfloat16(), matrix, t, linear_bias=b)
        want = TORCHS(x.bfloat16(), matrix, t, linear_bias=b)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="input's type"):
        fastgpt.linear_cross_entropy(x.bfloat16(), matrix, t)


# ---- random calls ----


@st.composite
def calls(draw):
    """Any valid call: shapes, layouts, kind of target, bias, weight, ignore_index, reduction."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    classes, features = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    extra = draw(st.lists(st.integers(1, 3), max_size=2))
    batch = [draw(st.integers(0, 4))] if extra or draw(st.booleans()) else []
    x, W = (
        normal(*batch, features),
        normal(classes, *extra, features) * draw(st.sampled_from([0.1, 1.0, 30.0])),
    )
    if draw(st.booleans()):
        W = W.movedim(0, -1).contiguous().movedim(-1, 0)
    options = {
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.7, 1.0])),
    }
    if draw(st.booleans()):
        options["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64)
    bias = normal(classes, *extra) if draw(st.booleans()) else None
    if draw(st.integers(0, 3)) == 0:
        target = torch.rand(*batch, classes, *extra, generator=generator, dtype=torch.float64)
    else:
        target = torch.randint(classes, (*batch, *extra), generator=generator)
        options["ignore_index"] = draw(st.sampled_from([None, -100, -1, 0, 2]))
        if draw(st.booleans()):
            dropped = torch.rand(target.shape, generator=generator) < draw(
                st.sampled_from([0.3, 1.0])
            )
            target = target.masked_fill(dropped, -100 if options["ignore_index"] is None else
                                        options["ignore_index"])  # fmt: skip
    return x, W, target, bias, options


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(calls())
def test_a_random_call_differs_from_torch(best_native, call):
    *arguments, options = call
    compare(*arguments, tol=1e-11, **options)
    compare(
        *arguments, tol=1e-11,
        ours=lambda *x, **o: fastgpt.linear_cross_entropy(*x, **o, recompute=True), **options,
    )  # fmt: skip


def test_the_loss_is_no_number_of_nats():
    """Of equal logits: log C, whatever the inputs."""
    loss = fastgpt.linear_cross_entropy(X, torch.zeros(5, 3), T)
    assert float(loss) == pytest.approx(math.log(5))
