"""cross_entropy with inplace_backward=True: the backward writes the gradient over the logits."""

import math

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from oracle import gradient_of, gradients_of, random_like, random_logits

import fastgpt

pytestmark = pytest.mark.cuda_on_host

N, C, L = 6, 35, 4
REDUCTIONS = ["none", "mean", "sum"]
OPTIONS = {
    "plain": {},
    "weights": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 4.0},
    "z_loss": {"z_loss": 0.01},
    "everything": {"weight": True, "label_smoothing": 0.1, "softcap": 4.0, "z_loss": 0.01},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LAYOUTS = ["rows", "padded", "columns", "transposed", "padded columns"]

of_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
of_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probability"])


def with_weight(options, dtype, classes=C):
    """The options, and weights of `dtype` where they have some."""
    weight = torch.linspace(0.5, 1.5, classes, dtype=torch.float64)
    weight[3::7] = 0
    return {k: weight.to(dtype) if k == "weight" else v for k, v in options.items()}


def problem(probabilities=False, dtype=torch.float32, layout="rows", ignored=True):
    """Logits and target. Two rows of classes are ignored, and hold NaN and infinities."""
    logits, target = random_logits(N, C, dtype=dtype, scale=3)
    if layout not in ("rows", "padded"):
        logits, target = random_logits(N * L, C, dtype=dtype, scale=3)
        logits, target = logits.view(N, L, C).mT.contiguous(), target.view(N, L)
    if probabilities:
        return logits, random_like(logits).float().softmax(1).to(dtype)
    if ignored:
        target[1], target[4] = -100, -100
        logits[1], logits[4] = math.nan, -math.inf
    return logits, target


def laid_out(x, layout):
    """A copy of `x` in the layout, and what lies between its rows, which is 7."""
    if layout == "padded":
        memory = x.new_full((N, C + 5), 7)
        view, between = memory[:, :C], memory[:, C:]
    elif layout == "padded columns":
        memory = x.new_full((N, C, L + 3), 7)
        view, between = memory[:, :, :L], memory[:, :, L:]
    elif layout == "columns":
        view = between = x.new_full((N, C, L), 7)
    else:
        view, between = x.new_full((N, L, C), 7).mT, x.new_full((0,), 7)
    view.copy_(x)
    return view, between if layout != "columns" else between[:0]


def both_gradients(backend, logits, target, **options):
    """The values and the gradient, ordinary and in place."""

    def run(inplace):
        leaf = logits.detach().clone().requires_grad_()
        values = backend.cross_entropy(leaf, target, inplace_backward=inplace, **options)
        values = values if isinstance(values, tuple) else (values,)
        upstream = [random_like(v, seed) for seed, v in enumerate(values, 1)]
        return *(v.detach() for v in values), *torch.autograd.grad(values, leaf, upstream)

    return run(False), run(True)


def assert_same(got, want, bitwise=True):
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        if bitwise:
            assert torch.equal(x, y)
        else:
            tol = 4 * torch.finfo(x.dtype).eps
            torch.testing.assert_close(x, y, rtol=tol, atol=tol)


# ---- the gradient ----


@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@of_targets
@of_options
def test_the_gradient_in_place_is_another_one(backend, options, probabilities, reduction, dtype):
    logits, target = problem(probabilities, dtype)
    options = with_weight(options, dtype)
    want, got = both_gradients(backend, logits, target, reduction=reduction, **options)
    # The native kernel takes a sum into itself, but not in place: other roundings.
    assert_same(got, want, bitwise=backend.name != "native" or reduction == "none")
    assert got[-1].isfinite().all()
    assert got[-1].any()
    if not probabilities:
        assert not got[-1][[1, 4]].any()


@pytest.mark.interpreted(options=[OPTIONS["plain"], OPTIONS["everything"]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@of_targets
@of_options
def test_the_gradient_with_lse_is_another_one(backend, options, probabilities, reduction, dtype):
    """Both values have an upstream gradient."""
    logits, target = problem(probabilities, dtype)
    options = {"return_lse": True, "reduction": reduction, **with_weight(options, dtype)}
    want, got = both_gradients(backend, logits, target, **options)
    assert_same(got, want)


@of_targets
def test_the_gradient_of_lse_alone_is_another_one(backend, probabilities):
    logits, target = problem(probabilities)

    def lse(x, **flag):
        return backend.cross_entropy(x, target, return_lse=True, softcap=4.0, **flag)[1]

    upstream = random_like(logits[:, 0])
    want = gradient_of(lse, logits, upstream)
    got = gradient_of(lambda x: lse(x, inplace_backward=True), logits.clone(), upstream)
    assert_same(got, want)


@pytest.mark.interpreted(options=[OPTIONS["plain"], OPTIONS["everything"]])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@of_targets
@of_options
def test_a_layout_is_misread_or_its_padding_written(one_isa, options, probabilities, layout):
    logits, target = problem(probabilities, layout=layout)
    options = with_weight(options, torch.float32)
    upstream = random_like(logits[:, 0])
    function = one_isa.cross_entropy
    if one_isa.name == "triton" and layout.endswith("columns"):  # eager runs these
        function = one_isa.on_device(fastgpt.cross_entropy)
    x, between = laid_out(one_isa.placed(logits), layout)
    if probabilities:
        target, _ = laid_out(target, layout)
    got = function(x.requires_grad_(), target, reduction="none", inplace_backward=True, **options)
    (gradient,) = torch.autograd.grad(got, x, upstream)
    assert gradient.stride() == x.stride()
    assert (between == 7).all()
    with fastgpt.backend("eager"):
        want = gradient_of(
            lambda x: fastgpt.cross_entropy(x, target, reduction="none", **options),
            logits,
            upstream,
        )
    for here, there in zip(one_isa.returned((got.detach(), gradient)), want, strict=True):
        torch.testing.assert_close(here, there, rtol=2e-6, atol=2e-6)


# ---- what it does to the logits ----


@pytest.fixture
def leaf(one_isa):
    """Logits on the backend's device, its gradient wanted, and their target."""
    logits, target = one_isa.placed(problem(ignored=False))
    return logits.requires_grad_(), target


def test_the_gradient_has_memory_of_its_own(one_isa, leaf):
    x, target = leaf
    loss = one_isa.cross_entropy(x, target, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.data_ptr() == x.data_ptr()
    assert torch.equal(gradient, x)


def test_the_layer_below_gets_another_gradient(one_isa):
    """The usual place: logits that a product made, which need nothing of them for its backward."""
    hidden = random_logits(N, 8)[0]
    weight, target = random_logits(C, 8, seed=1)[0].T, problem(ignored=False)[1]

    def loss(h, w, **flag):
        return one_isa.cross_entropy(h @ w, target, reduction="sum", **flag)

    inputs = [hidden, weight]
    want = gradients_of(loss, inputs, torch.tensor(1.0))
    got = gradients_of(lambda *x: loss(*x, inplace_backward=True), inputs, torch.tensor(1.0))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


def test_another_use_of_the_logits_gets_a_wrong_gradient_unannounced(one_isa, leaf):
    x, target = leaf
    other = x.square().sum()
    version = x._version
    torch.autograd.grad(one_isa.cross_entropy(x, target, inplace_backward=True), x)
    assert x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, x)


@of_targets
def test_logits_that_changed_after_the_forward_go_unnoticed(one_isa, probabilities):
    logits, target = one_isa.placed(problem(probabilities))
    x = logits.requires_grad_()
    loss = one_isa.cross_entropy(x, target, inplace_backward=True)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


@of_options
def test_a_loss_without_gradient_changes_the_logits(one_isa, options):
    logits, target = one_isa.placed(problem(ignored=False))
    options = one_isa.placed(with_weight(options, torch.float32))
    before = logits.clone()

    def loss(x):
        return one_isa.cross_entropy(x, target, inplace_backward=True, **options)

    assert not loss(logits).requires_grad
    x = logits.requires_grad_()
    with torch.no_grad():
        assert not loss(x).requires_grad
    loss(x)
    assert torch.equal(x, before)
    assert x._version == 0


class _Cut(torch.autograd.Function):
    """A function whose gradient is None."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_an_upstream_gradient_of_none_changes_the_logits(one_isa, leaf):
    x, target = leaf
    before = x.detach().clone()
    loss = one_isa.cross_entropy(x, target, inplace_backward=True)
    assert torch.autograd.grad(_Cut.apply(loss), x, allow_unused=True) == (None,)
    assert torch.equal(x, before)


# ---- what it refuses ----


@of_options
def test_a_second_backward_does_not_name_the_cause(one_isa, options, leaf):
    x, target = leaf
    options = one_isa.placed(with_weight(options, torch.float32))
    loss = one_isa.cross_entropy(x, target, inplace_backward=True, **options)
    torch.autograd.grad(loss, x, retain_graph=True)
    kept = x.detach().clone()
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss, x)
    assert torch.equal(x, kept)


def test_a_gradient_to_differentiate_does_not_name_the_cause(one_isa, leaf):
    x, target = leaf
    kept = x.detach().clone()
    loss = one_isa.cross_entropy(x, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(x, kept)


def test_the_gradient_of_probabilities_does_not_name_the_cause(one_isa):
    logits, target = one_isa.placed(problem(probabilities=True))
    inputs = logits.requires_grad_(), target.requires_grad_()
    loss = one_isa.cross_entropy(*inputs, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss, inputs)


TRANSFORMS = {
    "grad": torch.func.grad,
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x.expand(2, *x.shape).clone()),
    "vmap of grad": lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x])),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": torch.func.jacfwd,
    "jacrev": torch.func.jacrev,
    "hessian": torch.func.hessian,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_does_not_name_the_cause(one_isa, transform, leaf):
    x, target = leaf
    with pytest.raises(RuntimeError, match="inplace_backward"):
        transform(lambda x: fastgpt.cross_entropy(x, target, inplace_backward=True))(x.detach())


def test_forward_mode_does_not_name_the_cause(one_isa, leaf):
    x, target = leaf
    with fwAD.dual_level():
        dual = fwAD.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(RuntimeError, match="inplace_backward"):
            fastgpt.cross_entropy(dual, target, inplace_backward=True)


@pytest.mark.parametrize(
    "logits",
    [torch.randn(1, C).expand(N, C), torch.randn(N, 1).expand(N, C), torch.randn(C).expand(N, C)],
    ids=["rows", "classes", "from one dimension"],
)
def test_logits_that_share_memory_overwrite_each_other(one_isa, logits):
    target = random_logits(N, C)[1]
    logits, target = one_isa.placed((logits, target))
    with pytest.raises(RuntimeError, match="inplace_backward"):
        fastgpt.cross_entropy(logits.requires_grad_(), target, inplace_backward=True)


# ---- what it is for ----


@pytest.mark.interpreted(best_kernel=())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@of_targets
@of_options
def test_forward_and_backward_allocate_memory_for_logits(
    best_kernel, options, probabilities, dtype
):
    classes = 4096
    logits, target = random_logits(512, classes, dtype=dtype)
    if probabilities:
        target = torch.full_like(logits, 1 / classes)
    options = with_weight(options, dtype, classes)
    x, target, options = best_kernel.placed((logits, target, options))
    x.requires_grad_()

    def forward():
        return fastgpt.cross_entropy(x, target, inplace_backward=True, **options)

    loss = forward()
    assert best_kernel.peak_bytes(forward) < 0.01 * x.nbytes
    assert best_kernel.peak_bytes(lambda: torch.autograd.grad(loss, x)) < 0.01 * x.nbytes


@of_targets
@of_options
def test_the_compiled_gradient_is_another_one(one_isa, compiled, options, probabilities):
    logits, target = problem(probabilities)
    options = with_weight(options, torch.float32)

    def loss(x, t, **kwargs):
        return fastgpt.cross_entropy(x * 1, t, **kwargs)

    run, plain = one_isa.on_device(compiled(loss)), one_isa.on_device(loss)
    one = torch.tensor(1.0)
    want = gradient_of(lambda x: plain(x, target, **options), logits, one)
    got = gradient_of(lambda x: run(x, target, inplace_backward=True, **options), logits, one)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


# ---- without it ----


@pytest.mark.interpreted(options=[OPTIONS["plain"], OPTIONS["everything"]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("return_lse", [False, True])
@of_targets
@of_options
def test_an_input_changes_without_the_flag(one_isa, options, probabilities, return_lse, reduction):
    logits, target = problem(probabilities)
    options = with_weight(options, torch.float32)
    inputs = one_isa.placed([logits, target, *options.values()])
    before = [(x.clone(), x._version) for x in inputs if isinstance(x, torch.Tensor)]
    logits, target, *values = inputs
    options = dict(zip(options, values, strict=True))
    x = logits.requires_grad_()
    got = one_isa.cross_entropy(x, target, reduction=reduction, return_lse=return_lse, **options)
    outputs = got if return_lse else (got,)
    torch.autograd.grad(sum(y.sum() for y in outputs), x, retain_graph=True)
    (gradient,) = torch.autograd.grad(sum(y.sum() for y in outputs), x, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), x)
    after = [x for x in (logits.detach(), target, *values) if isinstance(x, torch.Tensor)]
    for now, (then, version) in zip(after, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
        assert now._version == version
