"""Derivatives of cross-entropy with its further options, in every mode, to second order and under
torch.compile.
"""

import pytest
import torch
from oracle import random_like, random_probabilities, random_weight, torchs_composition
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fastgpt

pytestmark = pytest.mark.cuda_on_host

BOTH = {"weight": random_weight(5), "label_smoothing": 0.2}
EVERYTHING = {"softcap": 3.0, "z_loss": 0.1, "return_lse": True}

# Name: (shape of the logits, whether the target is probabilities, options)
CASES = {
    "softcap": ((4, 5), False, {"softcap": 3.0}),
    "softcap+weight+smoothing": ((4, 5), False, {"softcap": 3.0, **BOTH}),
    "z_loss": ((4, 5), False, {"z_loss": 0.1}),
    "return_lse": ((4, 5), False, {"return_lse": True}),
    "everything": ((4, 5), False, {**EVERYTHING, **BOTH}),
    "probabilities": ((4, 5), True, {}),
    "probabilities+weight+smoothing": ((4, 5), True, BOTH),
    "probabilities+everything": ((4, 5), True, {**EVERYTHING, **BOTH}),
    "K-dim": ((2, 5, 3), False, {}),
    "K-dim+everything": ((2, 5, 3), False, {**EVERYTHING, **BOTH}),
    "K-dim probabilities": ((2, 5, 3), True, {"label_smoothing": 0.2, **EVERYTHING}),
}
PROBABILITIES = [name for name, (_, of_probabilities, _) in CASES.items() if of_probabilities]


class Case:
    """Inputs that are differentiated, and functions of them: a scalar of every output."""

    def __init__(self, name: str):
        self.shape, self.of_probabilities, self.options = CASES[name]
        generator = torch.Generator().manual_seed(0)
        # The classes last in memory, which Triton's kernels cover, too.
        shape = self.shape[:1] + self.shape[2:] + self.shape[1:2]
        logits = torch.randn(shape, generator=generator, dtype=torch.float64).movedim(-1, 1)
        rows = self.shape[:1] + self.shape[2:]
        self.target = torch.randint(5, rows, generator=generator)
        self.target.view(-1)[1] = -100
        self.inputs = [logits]
        if self.of_probabilities:
            q = random_probabilities(logits.movedim(1, -1).contiguous()).movedim(-1, 1)
            self.inputs.append(q)

    def function(self, of, reduction="mean"):
        """Of the inputs: the outputs of `of`, that is the loss or (loss, lse)."""

        def run(logits, target=None):
            # Made where the call is, so that it is on the device of the logits.
            target = self.target.to(logits.device) if target is None else target
            options = {
                k: v.to(logits) if isinstance(v, torch.Tensor) else v
                for k, v in self.options.items()
            }
            return of(logits, target, reduction=reduction, **options)

        return run

    def scalar(self, of, reduction="mean"):
        """No linear function of any output, so that each upstream gradient has derivatives."""
        outputs_of = self.function(of, reduction)

        def run(*inputs):
            outputs = outputs_of(*inputs)
            if not isinstance(outputs, tuple):
                return outputs.square().sum()
            loss, lse = outputs
            return loss.square().sum() + (loss.sum() * lse.sin()).sum()

        return run


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def close(got, want, tol=1e-9):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def leaves_of(case):
    return [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in case.inputs]


def test_the_cases_run_elsewhere(one_isa, case):
    case.function(one_isa.cross_entropy)(*case.inputs)


# ---- finite differences ----


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivatives_disagree_with_finite_differences(one_isa, case, reduction):
    function = case.function(one_isa.cross_entropy, reduction)
    assert torch.autograd.gradcheck(
        function,
        leaves_of(case),
        fast_mode=True,
        check_forward_ad=True,
        check_batched_grad=True,
        check_undefined_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        function,
        leaves_of(case),
        fast_mode=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


# ---- transforms ----

TRANSFORMS = {
    "grad": grad,
    "jvp": lambda f: lambda x, *q: jvp(lambda x: f(x, *q), (x,), (x.cos(),)),
    "hessian": hessian,
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f)),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "grad(jvp)": lambda f: grad(lambda x, *q: jvp(lambda x: f(x, *q), (x,), (x.cos(),))[1]),
    "vmap(grad)": lambda f: (
        lambda x, *q: vmap(grad(f))(*(torch.stack([y, y.flip(1), 2 * y]) for y in (x, *q)))
    ),
    "vmap(grad), shared target": lambda f: (
        lambda x, *q: vmap(grad(lambda x: f(x, *q)))(torch.stack([x, x.flip(1)]))
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_is_zero_or_wrong(one_isa, case, transform):
    got, want = (
        TRANSFORMS[transform](case.scalar(f))(*case.inputs)
        if f is torchs_composition
        else one_isa.on_device(TRANSFORMS[transform](case.scalar(f)))(*case.inputs)
        for f in (fastgpt.cross_entropy, torchs_composition)
    )
    close(got, want)


OF_BOTH = {
    "grad": lambda f: grad(f, (0, 1)),
    "jvp": lambda f: lambda x, q: jvp(f, (x, q), (x.cos(), q.sin())),
    "jvp along the probabilities": lambda f: lambda x, q: jvp(lambda q: f(x, q), (q,), (q.sin(),)),
    "hessian": lambda f: hessian(f, (0, 1)),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f, (0, 1)), (0, 1)),
    "grad(jvp)": lambda f: grad(lambda x, q: jvp(f, (x, q), (x.cos(), q.sin()))[1], (0, 1)),
    "vmap(grad)": lambda f: (
        lambda x, q: vmap(grad(f, (0, 1)), (None, 0))(x, torch.stack([q, q.flip(1)]))
    ),
}


@pytest.mark.parametrize("transform", OF_BOTH)
@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_transform_of_the_probabilities_is_zero_or_wrong(one_isa, name, transform):
    case = Case(name)
    run = one_isa.on_device(OF_BOTH[transform](case.scalar(fastgpt.cross_entropy)))
    close(run(*case.inputs), OF_BOTH[transform](case.scalar(torchs_composition))(*case.inputs))


# ---- graphs ----


def test_a_second_backward_through_create_graph_is_wrong(one_isa, case):
    def second(of):
        leaves = leaves_of(case)
        first = torch.autograd.grad(case.scalar(of)(*leaves), leaves, create_graph=True)
        along = sum((g * random_like(g)).sum() for g in first)
        along.backward()
        return [*(g.detach() for g in first), *(x.grad for x in leaves)]

    close(second(one_isa.cross_entropy), second(torchs_composition))


def test_a_retained_graph_keeps_its_first_upstream_gradient(one_isa, case):
    def twice(of):
        leaves = leaves_of(case)
        outputs = case.function(of, "none")(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [
            torch.autograd.grad(
                outputs, leaves, [random_like(x, seed) for x in outputs], retain_graph=True
            )
            for seed in (1, 2, 1)
        ]

    got, want = twice(one_isa.cross_entropy), twice(torchs_composition)
    close(got, want)
    assert all(map(torch.equal, got[0], got[2]))


def test_only_one_output_is_differentiated(one_isa):
    """The loss without lse, and lse without the loss."""
    for name in ("everything", "probabilities+everything", "K-dim+everything"):
        case = Case(name)

        def each(of, case=case):
            leaves = leaves_of(case)
            loss, lse = case.function(of, "none")(*leaves)
            of_loss = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
            of_lse = torch.autograd.grad(lse.sum(), leaves[0])
            return *of_loss, *of_lse

        close(each(one_isa.cross_entropy), each(torchs_composition))


def test_nan_in_an_ignored_row_reaches_a_derivative(one_isa):
    for name in ("softcap", "everything", "K-dim+everything"):
        case = Case(name)
        (logits,) = case.inputs
        poisoned = logits.masked_fill((case.target == -100).unsqueeze(1), torch.nan)
        v = logits.cos()
        function = case.scalar(fastgpt.cross_entropy)

        def derivatives(x, function=function, v=v):
            first = grad(function)
            v = v.to(x.device)
            return first(x), grad(lambda x: (first(x) * v).sum())(x), jvp(first, (x,), (v,))

        run = one_isa.on_device(derivatives)
        close(run(poisoned), run(logits))


# ---- torch.compile ----


def test_the_compiled_function_is_wrong(one_isa, compiled, case):
    def gradients(function):
        leaves = leaves_of(case)
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    plain = case.scalar(fastgpt.cross_entropy)
    run = compiled(plain)
    close(gradients(one_isa.on_device(run)), gradients(case.scalar(torchs_composition)))


@pytest.mark.parametrize("name", ["everything", "probabilities+everything", "K-dim+everything"])
def test_a_compiled_transform_is_zero_or_wrong(one_isa, compiled, name):
    case = Case(name)
    run = compiled(lambda *inputs: grad(case.scalar(fastgpt.cross_entropy))(*inputs))
    want = grad(case.scalar(torchs_composition))(*case.inputs)
    close(one_isa.on_device(run)(*case.inputs), want)
