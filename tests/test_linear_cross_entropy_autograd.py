"""Derivatives of linear cross-entropy in every mode that torch's own composition has: reverse,
forward, nested, batched, compiled, checkpointed, and of the raw operators.
"""

import gc
import weakref

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from functorch.compile import make_boxed_func
from linear_cases import REDUCTIONS, composition, linear_results, random_problem
from oracle import random_like, random_probabilities, random_weight
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt.ops import linear_cross_entropy as ops
from fastgpt.ops.cross_entropy import Options
from fastgpt.ops.linear_cross_entropy import LAUNCHERS

EVERYTHING = {
    "weight": random_weight(5), "label_smoothing": 0.2, "softcap": 3.0, "z_loss": 0.1,
    "return_lse": True,
}  # fmt: skip

# Name: (whether the target is probabilities, how many positions, options)
CASES = {
    "plain": (False, 0, {}),
    "weight+smoothing": (False, 0, {"weight": random_weight(5), "label_smoothing": 0.2}),
    "softcap": (False, 0, {"softcap": 3.0}),
    "z_loss": (False, 0, {"z_loss": 0.1}),
    "return_lse": (False, 0, {"return_lse": True}),
    "everything": (False, 0, EVERYTHING),
    "probabilities": (True, 0, {}),
    "probabilities+everything": (True, 0, EVERYTHING),
    "positions": (False, 2, {"z_loss": 0.1, "return_lse": True}),
}


class Case:
    """Inputs that are differentiated, and functions of them: a scalar of every output."""

    def __init__(self, name: str, n=4, features=3):
        self.of_probabilities, positions, self.options = CASES[name]
        problem = random_problem(n, 5, features)
        self.target = problem.target
        self.target[1] = -100
        if positions:
            self.target = torch.stack([self.target, self.target.roll(1)], 1)
        more = (positions,) if positions else ()
        generator = torch.Generator().manual_seed(1)
        W = torch.randn(5, *more, features, generator=generator, dtype=torch.float64)
        b = torch.randn(5, *more, generator=generator, dtype=torch.float64)
        self.inputs = [problem.input, W, b]
        if self.of_probabilities:
            self.inputs.append(random_probabilities(torch.empty(n, 5)).double())

    def function(self, of, **options):
        """Of the inputs: the outputs of `of`, that is the loss or (loss, lse)."""

        def run(x, W, b, target=None):
            target = self.target if target is None else target
            return of(x, W, target, linear_bias=b, **{**self.options, **options})

        return run

    def scalar(self, of, **options):
        """No linear function of any output, so that each upstream gradient has derivatives."""
        outputs_of = self.function(of, **options)

        def run(*inputs):
            outputs = outputs_of(*inputs)
            if not isinstance(outputs, tuple):
                return outputs.square().sum()
            loss, lse = outputs
            return loss.square().sum() + (loss.sum() * lse.sin()).sum()

        return run

    def leaves(self):
        return [x.clone().requires_grad_() for x in self.inputs]


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def small(n=4, classes=5, features=3):
    """A float64 problem with an ignored row in the middle."""
    problem = random_problem(n, classes, features)
    if n > 2:
        problem.target[1] = -100
    return problem


def of_tensors(function, problem, **options):
    """A function of input, matrix and bias."""
    return lambda x, W, b: function(x, W, problem.target, linear_bias=b, **options)


def close(got, want, tol=1e-10):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# ---- numerical derivatives ----


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_derivatives_disagree_with_finite_differences(linear_one_isa, reduction, recompute):
    problem = small()
    run = of_tensors(
        linear_one_isa.linear_cross_entropy, problem, reduction=reduction, recompute=recompute
    )
    assert torch.autograd.gradcheck(
        run,
        [x.clone().requires_grad_() for x in problem[:3]],
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivatives_disagree_with_finite_differences(linear_one_isa, reduction, recompute):
    problem = small(3, 4, 2)
    run = of_tensors(
        linear_one_isa.linear_cross_entropy, problem, reduction=reduction, recompute=recompute
    )
    assert torch.autograd.gradgradcheck(
        run,
        [x.clone().requires_grad_() for x in problem[:3]],
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


def test_derivatives_of_an_option_disagree_with_finite_differences(linear_one_isa, case):
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            case.function(linear_one_isa.linear_cross_entropy, reduction=reduction),
            case.leaves(),
            fast_mode=True,
            check_forward_ad=True,
            check_batched_grad=True,
            check_undefined_grad=True,
        )
    assert torch.autograd.gradgradcheck(
        case.function(linear_one_isa.linear_cross_entropy),
        case.leaves(),
        fast_mode=True,
        check_fwd_over_rev=True,
        check_batched_grad=True,
    )


def test_third_derivatives_disagree_with_finite_differences(linear_one_isa):
    problem = small(3, 3, 2)
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    run = of_tensors(linear_one_isa.linear_cross_entropy, problem)
    along = [random_like(x) for x in leaves]

    def curvature(*inputs):
        first = torch.autograd.grad(run(*inputs), inputs, create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(first, along, strict=True))
        return torch.autograd.grad(slope, inputs, create_graph=True)

    assert torch.autograd.gradcheck(curvature, leaves)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_depend_on_the_size_of_a_chunk(best_native, name, monkeypatch):
    """Beyond the first order it is torch operations on chunks of the rows: here of one row."""
    case = Case(name, n=7)

    def second():
        leaves = case.leaves()
        first = torch.autograd.grad(
            case.scalar(best_native.linear_cross_entropy)(*leaves), leaves, create_graph=True
        )
        total = sum((g * random_like(g, 3)).sum() for g in first)
        along = jvp(
            case.scalar(fastgpt.linear_cross_entropy), tuple(case.inputs), tuple(case.inputs)
        )
        return [*torch.autograd.grad(total, leaves), *along]

    want = second()
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", 1)
    close(second(), want, 1e-12)


# ---- create_graph ----


def gradient_penalty(function, problem, reduction="mean", **options):
    """The gradients of a loss that holds the squares of its own gradients."""
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    loss = of_tensors(function, problem, reduction=reduction, **options)(*leaves).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(g.requires_grad for g in first), "the gradient is not differentiable"
    return torch.autograd.grad(loss + 0.1 * sum((g**2).sum() for g in first), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gradient_penalty_vanishes(linear_one_isa, recompute, reduction, dtype):
    """PEERS: silently zero under create_graph in every fused kernel."""
    problem = random_problem(6, 9, 4, dtype=dtype)
    problem.target[2] = -100
    doubles = problem._replace(
        **{k: v.double() for k, v in problem._asdict().items() if k != "target"}
    )
    options = {"recompute": recompute, "reduction": reduction}
    got = gradient_penalty(linear_one_isa.linear_cross_entropy, problem, **options)
    want = gradient_penalty(composition, doubles, reduction)
    plain = linear_results(
        lambda **x: composition(**x, reduction=reduction).sum(), doubles,
        torch.tensor(1.0, dtype=torch.float64),
    )  # fmt: skip
    names = ("grad_input", "grad_weight", "grad_bias")
    for name, ours, torchs in zip(names, got, want, strict=True):
        size = float(torchs.abs().max())
        close(ours.double() / size, torchs / size, 8 * torch.finfo(dtype).eps)
        assert (ours.double() - plain[name]).abs().max() > 1e-3, "the penalty has no gradient"


def test_nan_in_an_ignored_row_reaches_a_second_derivative(linear_one_isa):
    problem = small()
    poisoned = problem._replace(input=problem.input.clone())
    poisoned.input[1] = float("nan")
    ours = linear_one_isa.linear_cross_entropy
    got = gradient_penalty(ours, poisoned)
    close(got, gradient_penalty(ours, problem))
    assert torch.equal(got[0][1], torch.zeros(3, dtype=torch.float64))

    def along(problem):
        run = of_tensors(ours, problem)
        tangents = tuple(x.nan_to_num() for x in problem[:3])
        return jvp(grad(run, (0, 1, 2)), problem[:3], tangents)

    close(along(poisoned), along(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_backward_doubles_or_loses_the_gradient(
    linear_backend, recompute, reduction, dtype
):
    """PEERS: a backward that overwrites what it saved is right once only; torch's chunked one
    raises. Here, to the same bits, whatever came before.
    """
    problem = random_problem(7, 33, 5, dtype=dtype)
    leaves = [x.requires_grad_() for x in problem[:3]]

    def forward():
        return linear_backend.linear_cross_entropy(
            **problem._asdict(), reduction=reduction, recompute=recompute, z_loss=0.01
        )

    loss = forward()
    upstreams = [torch.ones_like(loss), random_like(loss, 1), random_like(loss, 2)]
    for upstream in (*upstreams, *upstreams):
        got = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        fresh = torch.autograd.grad(forward(), leaves, upstream)
        assert all(map(torch.equal, got, fresh))
    # After a backward that could be differentiated, and of part of the inputs.
    (first,) = torch.autograd.grad(loss, leaves[0], upstreams[1], create_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(forward(), leaves, upstreams[1])[0])
    (of_weight,) = torch.autograd.grad(loss, leaves[1], upstreams[1], retain_graph=True)
    assert torch.equal(of_weight, torch.autograd.grad(forward(), leaves, upstreams[1])[1])
    loss.backward(upstreams[1])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(upstreams[1])


def test_gradients_do_not_accumulate(linear_one_isa):
    problem = random_problem(7, 33, 5)
    leaves = [x.requires_grad_() for x in problem[:3]]
    for times in (1, 2, 3):
        linear_one_isa.linear_cross_entropy(**problem._asdict()).backward()
        want = linear_results(composition, problem, torch.tensor(1.0, dtype=torch.float64))
        for leaf, name in zip(leaves, ("input", "weight", "bias"), strict=True):
            close(leaf.grad, times * want[f"grad_{name}"])


@pytest.mark.parametrize("changed", ["input", "linear_weight", "linear_bias", "target"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_change_between_forward_and_backward_goes_unnoticed(best_native, recompute, changed):
    problem = random_problem(7, 33, 5)
    tensors = {
        k: v.requires_grad_() * 1 if v.is_floating_point() else v
        for k, v in problem._asdict().items()
    }
    loss = best_native.linear_cross_entropy(**tensors, recompute=recompute)
    with torch.no_grad():
        tensors[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_grad_or_frozen_inputs_build_a_graph(linear_one_isa):
    x, W, b, t = random_problem(7, 33, 5)
    want = composition(x, W, t, linear_bias=b)
    assert not linear_one_isa.linear_cross_entropy(x, W, t, linear_bias=b).requires_grad
    W.requires_grad_()
    with torch.no_grad():
        loss = linear_one_isa.linear_cross_entropy(x, W, t, linear_bias=b)
        assert not loss.requires_grad
        close(loss, want)
    with torch.inference_mode():
        close(linear_one_isa.linear_cross_entropy(x, W, t, linear_bias=b), want)
    (gradient,) = torch.autograd.grad(linear_one_isa.linear_cross_entropy(x, W.detach(),
                                      t, linear_bias=b.requires_grad_()), b)  # fmt: skip
    close(gradient, torch.autograd.grad(composition(x, W.detach(), t, linear_bias=b), b)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_lse_is_lost(linear_one_isa, recompute):
    """lse alone, with the loss, and with a loss that nobody differentiates."""
    problem = random_problem(7, 9, 3)
    problem.target[2] = -100
    for used in ("lse", "both", "loss"):
        found = []
        for function in (linear_one_isa.linear_cross_entropy, composition):
            leaves = [x.clone().requires_grad_() for x in problem[:3]]
            loss, lse = of_tensors(
                function, problem, return_lse=True, z_loss=0.1, recompute=recompute
            )(*leaves)
            value = {"lse": lse.sin().sum(), "both": loss * lse.sin().sum(), "loss": loss}[used]
            found.append(torch.autograd.grad(value, leaves))
        close(*found)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_infinite_upstream_gradient_reaches_an_ignored_row(best_native, reduction, recompute):
    """A loss scale that overflows, say: 0 times it is NaN."""
    problem = random_problem(7, 9, 3)
    problem.target[2] = -100
    for value in (float("inf"), float("nan")):
        upstream = torch.full((7,) if reduction == "none" else (), value, dtype=torch.float64)
        found = linear_results(
            best_native.linear_cross_entropy, problem, upstream,
            reduction=reduction, recompute=recompute,
        )  # fmt: skip
        assert torch.equal(found["grad_input"][2], torch.zeros(3, dtype=torch.float64))
        assert not found["grad_input"][[0, 1, 3]].isfinite().any()
        assert not found["grad_weight"].isfinite().any()


def test_tensors_without_numbers_fail(best_native):
    """Fake ones, as estimates of memory run a model on, forward and backward."""
    with FakeTensorMode():
        module = fastgpt.LinearCrossEntropyLoss(4, 5, bias=True)
        x = torch.empty(6, 4, requires_grad=True)
        loss = module(x, torch.zeros(6, dtype=torch.int64))
        loss.backward()
        assert x.grad.shape == x.shape
        assert module.linear.weight.grad.shape == (5, 4)
    meta = torch.empty(6, 4, device="meta", requires_grad=True)
    loss = fastgpt.linear_cross_entropy(
        meta, torch.empty(5, 4, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    )
    loss.backward()
    assert meta.grad.shape == (6, 4)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_graph_outlives_the_loss_or_its_backward(best_native, recompute):
    """Without the garbage collector: the inputs go with the loss, or when a backward is done."""
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            x, W, _, t = random_problem(7, 9, 3)
            hidden = W.requires_grad_().sum() * x
            kept = weakref.ref(hidden)
            loss = best_native.linear_cross_entropy(hidden, W, t, recompute=recompute)
            del hidden
            assert kept() is not None
            if backward:
                loss.backward()
            else:
                del loss
            assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_the_gradient(linear_one_isa, use_reentrant):
    problem = random_problem(7, 9, 3, dtype=torch.float32)
    run = of_tensors(fastgpt.linear_cross_entropy, problem)
    found = []
    for wrapped in (
        run, lambda *x: checkpoint(run, *x, use_reentrant=use_reentrant),
    ):  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in problem[:3]]
        loss = wrapped(*leaves)
        loss.backward(torch.tensor(1.5))
        found.append([x.grad for x in leaves])
    assert all(map(torch.equal, *found))
    if not use_reentrant:
        with fastgpt.drop_in():
            loss = checkpoint(
                run, *leaves, use_reentrant=False, context_fn=fastgpt.checkpoint_context_fn
            )
        assert all(map(torch.equal, torch.autograd.grad(loss, leaves, torch.tensor(1.5)), found[0]))


# ---- torch.func ----

ALL = (0, 1, 2)


def test_func_grad_vjp_or_jvp_is_wrong(linear_backend):
    problem = small()
    tangents = tuple(random_like(x, 3) for x in problem[:3])
    cotangent = random_like(problem.input[:, 0])
    for options in ({}, {"reduction": "none"}):
        ours, torchs = (
            of_tensors(f, problem, **options)
            for f in (linear_backend.linear_cross_entropy, composition)
        )
        close(jvp(ours, problem[:3], tangents), jvp(torchs, problem[:3], tangents))
        if not options:
            close(grad(ours, ALL)(*problem[:3]), grad(torchs, ALL)(*problem[:3]))
        else:
            got, want = (vjp(f, *problem[:3])[1](cotangent) for f in (ours, torchs))
            close(got, want)


def test_a_case_under_grad_or_jvp_is_wrong(linear_one_isa, case):
    ours, torchs = (case.scalar(f) for f in (linear_one_isa.linear_cross_entropy, composition))
    inputs = tuple(case.inputs)
    of = tuple(range(len(inputs)))
    close(grad(ours, of)(*inputs), grad(torchs, of)(*inputs))
    tangents = tuple(random_like(x, 3) for x in inputs)
    close(jvp(ours, inputs, tangents), jvp(torchs, inputs, tangents))
    close(jvp(grad(ours, of), inputs, tangents), jvp(grad(torchs, of), inputs, tangents))


BATCHED = [
    (0, None, None, 0), (0, 0, 0, 0), (None, 0, None, None), (1, 2, 1, 1), (None, None, 0, None),
    (None, None, None, 0), (-1, None, None, 0),
]  # fmt: skip


@pytest.mark.parametrize("in_dims", BATCHED, ids=str)
def test_vmap_mixes_its_batch(linear_one_isa, in_dims):
    """Any place of the batch dimension, and tensors that have none."""
    problems = [random_problem(4, 5, 3, seed=i) for i in range(6)]
    problems[2].target[1] = -100
    stacked = [torch.stack([p[i] for p in problems]) for i in range(4)]
    arguments = [
        x[0] if dim is None else x.movedim(0, dim).contiguous()
        for x, dim in zip(stacked, in_dims, strict=True)
    ]

    def of(function, **options):
        return lambda x, W, b, t: function(x, W, t, linear_bias=b, **options)

    ours = fastgpt.linear_cross_entropy
    for options in ({"reduction": "none"}, {}, {"softcap": 3.0, "z_loss": 0.1}):
        got, want = (vmap(of(f, **options), in_dims)(*arguments) for f in (ours, composition))
        close(got, want)
    got, want = (vmap(grad(of(f), ALL), in_dims)(*arguments) for f in (ours, composition))
    close(got, want)
    # The reverse pass through a vmap, and the second derivative.
    found = []
    for function in (ours, composition):
        leaves = [x.clone().requires_grad_() for x in arguments[:3]]
        batch = vmap(of(function), in_dims)(*leaves, arguments[3])
        first = torch.autograd.grad(batch, leaves, random_like(batch), create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    close(*found)


def test_per_sample_gradients_of_a_module_are_wrong(linear_one_isa):
    module = fastgpt.LinearCrossEntropyLoss(3, 7, bias=True, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    x, _, _, t = random_problem(6, 7, 3)

    def loss(parameters, x, t):
        return functional_call(module, parameters, (x, t))

    def torchs(parameters, x, t):
        W, b = parameters["linear.weight"], parameters["linear.bias"]
        return composition(x, W, t, linear_bias=b)

    got, want = (vmap(grad(f), (None, 0, 0))(parameters, x, t) for f in (loss, torchs))
    close(got, want)


TRANSFORMS = {
    "hessian": hessian,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f)),
    "jacrev(hessian)": lambda f: jacrev(hessian(f)),
    "jacfwd(hessian)": lambda f: jacfwd(hessian(f)),
    "grad(jacfwd)": lambda f: grad(lambda x: (jacfwd(f)(x) ** 2).sum()),
    "jvp(jvp)": lambda f: lambda x: jvp(lambda y: jvp(f, (y,), (x.sin(),))[1], (x,), (x.cos(),))[1],
    "vmap(hessian)": lambda f: lambda x: vmap(hessian(f))(torch.stack([x, x.flip(0)])),
}


def of_one(function, target, **options):
    """Of one tensor, which is input, matrix and bias at once."""
    return lambda x: function(x.sin(), x, target, linear_bias=x[:, 0].cos(), **options).sum()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nested_transforms_are_zero_or_wrong(linear_one_isa, transform):
    x = random_problem(3, 3, 2).input
    target = torch.tensor([2, -100, 0])
    for options in ({}, {"softcap": 3.0, "z_loss": 0.1, "reduction": "none"}):
        got, want = (
            TRANSFORMS[transform](of_one(f, target, **options))(x)
            for f in (fastgpt.linear_cross_entropy, composition)
        )
        close(got, want, 1e-9)
        assert want.abs().max() > 1e-3


def test_two_forward_levels_are_not_sent_to_eager(best_native):
    """torch loses a custom Function's second tangent, so the rule must see the second level."""
    x, W, _, t = random_problem(3, 3, 2)
    seen = []

    def loss(x):
        seen.append(fastgpt.explain(fastgpt.linear_cross_entropy, x, W, t))
        return fastgpt.linear_cross_entropy(x, W, t)

    jacfwd(loss)(x)
    jacfwd(jacfwd(loss))(x)
    assert [e.backend for e in seen] == ["native", "eager"]
    assert "native: nested forward-mode levels" in str(seen[1])


def test_dual_numbers_lose_their_tangent(linear_backend):
    problem = small()
    tangents = [random_like(x, 3) for x in problem[:3]]

    def found(function, reduction):
        with fwAD.dual_level():
            duals = [fwAD.make_dual(x, v) for x, v in zip(problem[:3], tangents, strict=True)]
            loss = of_tensors(function, problem, reduction=reduction)(*duals)
            return fwAD.unpack_dual(loss).tangent

    for reduction in ("none", "mean"):
        close(found(linear_backend.linear_cross_entropy, reduction), found(composition, reduction))


def test_forward_over_reverse_with_dual_numbers_is_wrong(linear_one_isa):
    problem = small()
    v = random_like(problem.linear_weight, 3)

    def hessian_product(function):
        W = problem.linear_weight.clone().requires_grad_()
        with fwAD.dual_level():
            dual = fwAD.make_dual(W, v)
            loss = function(problem.input, dual, problem.target)
            (first,) = torch.autograd.grad(loss, dual, create_graph=True)
            return fwAD.unpack_dual(first).tangent.detach()

    close(hessian_product(linear_one_isa.linear_cross_entropy), hessian_product(composition))


def test_a_backward_alone_loses_the_tangent_of_its_upstream_gradient(linear_one_isa):
    problem = small()
    leaves = [x.clone().requires_grad_() for x in problem[:3]]

    def tangents(function, reduction):
        loss = of_tensors(function, problem, reduction=reduction)(*leaves)
        with fwAD.dual_level():
            upstream = fwAD.make_dual(random_like(loss, 1), random_like(loss, 2))
            found = torch.autograd.grad(loss, leaves, upstream)
            return [fwAD.unpack_dual(x).tangent for x in found]

    for reduction in ("none", "mean"):
        got = tangents(linear_one_isa.linear_cross_entropy, reduction)
        close(got, tangents(composition, reduction))


def test_batched_backward_is_wrong(linear_one_isa):
    problem = small()
    for reduction in ("none", "mean"):
        upstream = torch.eye(4, dtype=torch.float64)
        upstream = upstream if reduction == "none" else upstream[0]
        found = []
        for function in (linear_one_isa.linear_cross_entropy, composition):
            leaves = [x.clone().requires_grad_() for x in problem[:3]]
            loss = of_tensors(function, problem, reduction=reduction)(*leaves)
            found.append(torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True))
        close(*found)


# ---- the raw operators ----

PLAIN = (None, *Options())
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_finds_fault_with_a_raw_operator(best_native, dtype):
    forward, backward = LAUNCHERS["native"]
    problem = random_problem(5, 7, 3, dtype=dtype)
    problem.target[1] = -100
    loss, lse = forward(*problem, *PLAIN)
    upstream, upstream_lse = random_like(loss), random_like(lse, 3)
    plain, probabilities = problem._replace(linear_bias=None), problem._replace(
        target=random_probabilities(torch.empty(5, 7)).to(dtype)
    )  # fmt: skip
    kinds = (problem, plain, probabilities) if dtype == torch.float64 else (problem,)
    for arguments in kinds:
        leaves = [
            x.clone().requires_grad_() if x is not None and x.is_floating_point() else x
            for x in arguments
        ]
        torch.library.opcheck(forward, (*leaves, *PLAIN), test_utils=OPCHECKS)
        torch.library.opcheck(
            backward,
            (upstream, upstream_lse, None, *arguments, *PLAIN, 0.0, True, True, False),
            test_utils=OPCHECKS,
        )


def test_a_raw_operators_own_gradient_is_wrong(native_backend):
    forward, _ = LAUNCHERS["native"]
    problem = small()
    probabilities = random_probabilities(torch.empty(4, 5)).double()
    g, g_lse = random_like(problem.input[:, 0], 1), random_like(problem.input[:, 0], 2)
    for arguments in (
        problem, problem._replace(linear_bias=None), problem._replace(target=probabilities)
    ):  # fmt: skip
        found = [
            linear_results(f, arguments, g, g_lse)
            for f in (
                lambda input, linear_weight, target, linear_bias, return_lse: forward(
                    input, linear_weight, linear_bias, target, *PLAIN
                ),
                lambda **x: composition(**x, reduction="none"),
            )
        ]
        close(*found)


def test_a_raw_backward_has_a_wrong_derivative_instead_of_none(best_native):
    problem = small()
    g = random_like(problem.input[:, 0]).requires_grad_()
    found = LAUNCHERS["native"].backward(g, None, None, *problem, *PLAIN, 0.0, True, True, True)
    with pytest.raises(RuntimeError, match=r"call fastgpt\.linear_cross_entropy instead"):
        found[3].sum().backward()


def test_a_raw_operator_accepts_what_its_kernel_cannot_read(best_native):
    forward, backward = LAUNCHERS["native"]
    x, W, b, t = random_problem(4, 5, 3, dtype=torch.float32)
    weight = torch.ones(5)
    options = Options()
    for arguments in (
        (x[0], W, b, t, None),
        (x, W[0], b, t, None),
        (x, W[:, :2], b, t, None),
        (x, W.double(), b, t, None),
        (x, W, b[:4], t, None),
        (x, W, b.double(), t, None),
        (x, W, b, t[:3], None),
        (x, W, b, t.int(), None),
        (x, W, b, torch.ones(4, 4), None),
        (x, W, b, torch.ones(4, 5).double(), None),
        (x, W, b, t, weight[:4]),
        (x, W, b, t, weight.double()),
        (x.int(), W.int(), None, t, None),
        (x, W, b, t + 5, None),
        (x, W, b, t - 9, None),
    ):
        with pytest.raises(RuntimeError):
            forward(*arguments, *options)
        with pytest.raises(RuntimeError):
            backward(torch.ones(4), None, None, *arguments, *options, 0.0, True, True, True)
    ones = torch.ones(4)
    for upstreams in (
        (ones[:3], None, None),
        (ones.double(), None, None),
        (ones, ones[:3], None),
        (ones, None, ones.double()),
    ):
        with pytest.raises(RuntimeError):
            backward(*upstreams, x, W, b, t, None, *options, 0.0, True, True, True)


# ---- torch.compile ----


def test_the_compiled_function_is_wrong(linear_one_isa, compiled):
    problem = random_problem(6, 9, 4, dtype=torch.bfloat16)
    problem.target[2] = -100

    def loss(input, linear_weight, linear_bias, target, **options):
        return fastgpt.linear_cross_entropy(
            input * 1, linear_weight, target, linear_bias=linear_bias, z_loss=0.1, **options
        )

    run = compiled(loss)
    for reduction in ("none", "mean"):
        upstream = random_like(torch.empty(6 if reduction == "none" else ()).bfloat16())
        got, want = (linear_results(f, problem, upstream, reduction=reduction) for f in (run, loss))
        close(got, want, 1e-2)


@pytest.mark.slow
def test_inductors_code_is_wrong(best_native):
    torch._dynamo.reset()
    problem = random_problem(6, 9, 4, dtype=torch.float32)
    run = torch.compile(of_tensors(fastgpt.linear_cross_entropy, problem), fullgraph=True)
    leaves = [x.requires_grad_() for x in problem[:3]]
    got = torch.autograd.grad(run(*leaves), leaves, torch.tensor(1.5))
    loss = of_tensors(composition, problem)(*leaves)
    close(got, torch.autograd.grad(loss, leaves, torch.tensor(1.5)), 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_kernel_is_not_in_the_compiled_graph(best_native, recompute):
    """Forward and backward hold the fused operators, not a decomposition of them; and unless it is
    to be recomputed, what forms the gradients is in the forward, and nothing in the backward.
    """
    graphs = []

    def keep(module, _inputs):
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    problem = random_problem(6, 9, 4, dtype=torch.float32)
    run = torch.compile(
        fastgpt.linear_cross_entropy, fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )
    linear_results(lambda **x: run(**x, recompute=recompute), problem, torch.tensor(1.0))
    torch._dynamo.reset()
    forward, backward = (str(operator) for operator in LAUNCHERS["native"])
    first, second = graphs
    assert (forward in first) == recompute
    assert (backward in first) != recompute
    assert (backward in second) == recompute


def test_batches_of_any_size_recompile_each_time(best_native):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(fastgpt.linear_cross_entropy, fullgraph=True, backend=counter)
    for n in (6, 8, 11, 19, 31):
        problem = random_problem(n, 9, 4, dtype=torch.float32, seed=n)
        got, want = (
            linear_results(lambda f=f, **x: f(**x), problem, torch.tensor(2.0))
            for f in (run, composition)
        )
        close(got, want, 1e-5)
    torch._dynamo.reset()
    assert counter.frame_count <= 3


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian"])
def test_a_compiled_transform_is_zero_or_wrong(best_native, compiled, transform):
    x = random_problem(3, 3, 2).input
    target = torch.tensor([2, -100, 0])
    transformed = {
        "grad": grad,
        "jvp": lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),)),
        "hessian": hessian,
    }[transform]
    run = compiled(lambda x: transformed(of_one(fastgpt.linear_cross_entropy, target))(x))
    close(run(x), transformed(of_one(composition, target))(x), 1e-9)


def test_an_out_of_range_target_in_compiled_code_goes_unnoticed(compiled, best_native):
    problem = random_problem(6, 9, 4, dtype=torch.float32)
    problem.target[3] = 9
    with pytest.raises((RuntimeError, IndexError), match=r"Target .*out of bounds"):
        compiled(fastgpt.linear_cross_entropy)(*problem[:2], problem.target)
