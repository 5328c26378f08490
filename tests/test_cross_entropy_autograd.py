"""Derivatives of cross-entropy in every mode that torch's own has: reverse, forward, nested,
batched, compiled, and of the raw operators.
"""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from oracle import gradient_of, random_like, random_logits
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fastgpt
from fastgpt.backends import native
from fastgpt.ops.cross_entropy import LAUNCHERS, Options

pytestmark = pytest.mark.cuda_on_host


def small(n=4, classes=5, seed=0):
    """float64 logits of moderate size, with an ignored row in the middle."""
    logits, target = random_logits(n, classes, dtype=torch.float64, seed=seed)
    if n > 2:
        target[1] = -100
    return logits, target


def reductions(function, target):
    return [lambda x, r=r: function(x, target, reduction=r) for r in ("none", "mean", "sum")]


def close(got, want, tol=1e-11):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# ---- numerical derivatives ----


def test_first_derivatives_disagree_with_finite_differences(backend):
    logits, target = small()
    for loss in reductions(backend.cross_entropy, target):
        assert torch.autograd.gradcheck(
            loss,
            logits.clone().requires_grad_(),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
        )


def test_second_derivatives_disagree_with_finite_differences(backend):
    logits, target = small(3, 4)
    for loss in reductions(backend.cross_entropy, target):
        assert torch.autograd.gradgradcheck(
            loss,
            logits.clone().requires_grad_(),
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            check_batched_grad=True,
        )


def test_third_derivatives_disagree_with_finite_differences(backend):
    logits, target = small(3, 3)
    v = random_like(logits)

    def curvature(x):
        (first,) = torch.autograd.grad(backend.cross_entropy(x, target), x, create_graph=True)
        (second,) = torch.autograd.grad((first * v).sum(), x, create_graph=True)
        return second

    assert torch.autograd.gradgradcheck(
        lambda x: backend.cross_entropy(x, target), logits.clone().requires_grad_()
    )
    assert torch.autograd.gradcheck(curvature, logits.clone().requires_grad_())


# ---- create_graph ----


def gradient_penalty(function, logits, target, reduction="mean"):
    logits = logits.clone().requires_grad_()
    loss = function(logits, target, reduction=reduction)
    (first,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    assert first.requires_grad, "the gradient under create_graph is not differentiable"
    (second,) = torch.autograd.grad(loss.sum() + 0.1 * (first**2).sum(), logits)
    return second


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_gradient_penalty_vanishes(backend, reduction, dtype):
    """PEERS: silently zero under create_graph in every fused kernel."""
    logits, target = random_logits(6, 9, dtype=dtype)
    target[2] = -100
    got = gradient_penalty(backend.cross_entropy, logits, target, reduction)
    want = gradient_penalty(F.cross_entropy, logits.double(), target, reduction)
    tol = 8 * torch.finfo(dtype).eps
    close(got.double(), want, tol)
    plain = gradient_of(
        lambda x: F.cross_entropy(x, target, reduction=reduction).sum(),
        logits.double(),
        torch.tensor(1.0, dtype=torch.float64),
    )[1]
    assert (got.double() - plain).abs().max() > 1e-3, "the penalty has no gradient"


def test_nan_in_an_ignored_row_reaches_a_second_derivative(backend):
    logits, target = small()
    poisoned = logits.clone()
    poisoned[1] = float("nan")
    got = gradient_penalty(backend.cross_entropy, poisoned, target)
    close(got, gradient_penalty(backend.cross_entropy, logits, target))
    assert torch.equal(got[1], torch.zeros(5, dtype=torch.float64))

    def tangent(x):
        return jvp(lambda x: grad(lambda x: backend.cross_entropy(x, target))(x), (x,), (logits,))[
            1
        ]

    close(tangent(poisoned), tangent(logits))

    # And in the derivatives of those, which torch takes through the closed forms.
    def slope(x):
        return grad(lambda x: jvp(lambda x: backend.cross_entropy(x, target), (x,), (logits,))[1])(
            x
        )

    def third(x):
        first = grad(lambda x: backend.cross_entropy(x, target))
        second = grad(lambda x: (first(x) * logits.cos()).sum())
        return grad(lambda x: (second(x) * logits.sin()).sum())(x)

    close(slope(poisoned), slope(logits))
    close(third(poisoned), third(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_second_backward_doubles_or_loses_the_gradient(backend, dtype):
    """PEERS: a backward that overwrites what it saved is right once only (Liger, TE)."""
    logits, target = random_logits(7, 33, dtype=dtype)
    first, second = random_like(logits[:, 0], 1), random_like(logits[:, 0], 2)
    x = logits.clone().requires_grad_()
    loss = backend.cross_entropy(x, target, reduction="none")
    got = [
        torch.autograd.grad(loss, x, upstream, retain_graph=True)[0]
        for upstream in (first, second, first)
    ]
    for upstream, gradient in zip((first, second, first), got, strict=True):
        fresh = gradient_of(
            lambda x: backend.cross_entropy(x, target, reduction="none"), logits, upstream
        )[1]
        assert torch.equal(gradient, fresh)


@pytest.mark.parametrize("changed", ["logits", "target"])
def test_a_change_between_forward_and_backward_goes_unnoticed(backend, changed):
    if backend.name == "eager" and changed == "logits":
        pytest.skip("eager saves the shifted logits, a tensor of its own")
    logits, target = random_logits(7, 33)
    x = logits.clone().requires_grad_()
    y = x * 1
    loss = backend.cross_entropy(y, target)
    with torch.no_grad():
        (y if changed == "logits" else target).zero_()
    if backend.name == "eager":
        loss.backward()  # it gathered with a masked copy of the target
        close(
            x.grad,
            gradient_of(
                lambda x: F.cross_entropy(x, random_logits(7, 33)[1]), logits, torch.tensor(1.0)
            )[1],
            1e-6,
        )
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_grad_or_frozen_logits_build_a_graph(one_isa):
    logits, target = small()
    assert not one_isa.cross_entropy(logits, target).requires_grad
    logits.requires_grad_()
    with torch.no_grad():
        assert not one_isa.cross_entropy(logits, target).requires_grad
    with torch.inference_mode():
        close(one_isa.cross_entropy(logits, target), F.cross_entropy(logits, target))


# ---- torch.func ----


def test_func_grad_and_vjp_are_wrong(backend):
    logits, target = small()
    close(
        grad(lambda x: backend.cross_entropy(x, target))(logits),
        grad(lambda x: F.cross_entropy(x, target))(logits),
    )
    cotangent = random_like(logits[:, 0])
    (got,), (want,) = (
        vjp(lambda x, f=f: f(x, target, reduction="none"), logits)[1](cotangent)
        for f in (backend.cross_entropy, F.cross_entropy)
    )
    close(got, want)


def test_jvp_is_wrong(backend):
    logits, target = small()
    v = random_like(logits)
    for ours, torchs in zip(
        reductions(backend.cross_entropy, target), reductions(F.cross_entropy, target), strict=True
    ):
        close(jvp(ours, (logits,), (v,)), jvp(torchs, (logits,), (v,)))


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 1), (2, 0), (0, None), (None, 0), (-1, -1)])
def test_vmap_mixes_its_batch(backend, in_dims):
    """Any place of the batch dimension, and logits or targets that have none. The last place turns
    the classes' stride around, which the operator must survive.
    """
    logits, _ = random_logits(6 * 4, 5, dtype=torch.float64)
    logits = logits.view(6, 4, 5)
    target = torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(1))
    target[2, 1] = -100
    arguments = [
        tensor[0] if dim is None else tensor.movedim(0, dim).contiguous()
        for tensor, dim in zip((logits, target), in_dims, strict=True)
    ]
    for reduction in ("none", "mean"):

        def of(function, reduction=reduction):
            return lambda x, t: function(x, t, reduction=reduction)

        got = backend.on_device(vmap(of(fastgpt.cross_entropy), in_dims))(*arguments)
        want = torch.stack(
            [
                F.cross_entropy(
                    logits[0 if in_dims[0] is None else i],
                    target[0 if in_dims[1] is None else i],
                    reduction=reduction,
                )
                for i in range(6)
            ]
        )
        close(got, want)
        got = backend.on_device(vmap(grad(fastgpt.cross_entropy), in_dims))(*arguments)
        want = vmap(grad(F.cross_entropy), in_dims)(*arguments)
        close(got, want)


def test_the_reverse_pass_through_vmap_raises_or_is_wrong(backend):
    """Training through a vmap: the gradient of a batch of losses, and the second derivative."""
    logits, target = random_logits(24, 5, dtype=torch.float64)
    logits, target = logits.view(4, 6, 5), target.view(4, 6)
    upstream = random_like(logits[:, 0, 0])
    for in_dims in ((0, 0), (1, 1)):
        x, t = (a.movedim(0, in_dims[0]).contiguous() for a in (logits, target))
        got, want = (
            gradient_of(lambda x, t=t, f=f: f(x, t), x, upstream)
            for f in (
                backend.on_device(vmap(fastgpt.cross_entropy, in_dims)),
                vmap(F.cross_entropy, in_dims),
            )
        )
        close(got, want)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
        lambda f: grad(lambda x: jvp(f, (x,), (x.cos(),))[1]),
        lambda f: lambda x: jvp(grad(f), (x,), (x.cos(),))[1],
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacfwd(f)),
    ],
    ids=[
        "jvp", "grad(jvp)", "jvp(grad)", "hessian", "jacrev(jacrev)", "jacrev(jacfwd)",
        "jacfwd(jacfwd)",
    ],
)  # fmt: skip
def test_a_transform_over_a_vmap_raises_or_is_wrong(backend, transform):
    logits, target = random_logits(6, 3, dtype=torch.float64)
    logits, target = logits.view(2, 3, 3), target.view(2, 3)
    got, want = (
        transform(lambda x, f=f: vmap(f)(x, target).pow(2).sum())(logits)
        for f in (backend.on_device(fastgpt.cross_entropy), F.cross_entropy)
    )
    close(got, want)


def test_unbatched_logits_with_batched_targets_share_one_gradient(backend):
    logits, _ = random_logits(1, 5, dtype=torch.float64)
    targets = torch.arange(5)
    got, want = (
        vmap(grad(f), (None, 0))(logits[0], targets)
        for f in (backend.cross_entropy, F.cross_entropy)
    )
    close(got, want)


def test_nested_vmap_is_wrong(backend):
    logits, target = random_logits(24, 5, dtype=torch.float64)
    ours = backend.on_device(fastgpt.cross_entropy)
    got = vmap(vmap(ours))(logits.view(2, 3, 4, 5), target.view(2, 3, 4))
    want = vmap(vmap(F.cross_entropy))(logits.view(2, 3, 4, 5), target.view(2, 3, 4))
    close(got, want)


def test_per_sample_gradients_of_a_layer_are_wrong(backend):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (6,), generator=generator)

    def per_sample(function):
        return vmap(
            grad(lambda w, x, t: function((w @ x).unsqueeze(0), t.unsqueeze(0))), (None, 0, 0)
        )(weight, x, target)

    ours = backend.on_device(fastgpt.cross_entropy)
    close(per_sample(ours), per_sample(F.cross_entropy))


def nested(transform, function, target):
    return transform(lambda x: function(x, target))


@pytest.mark.parametrize(
    "transform",
    [
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacrev(f)),
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacfwd(hessian(f)),
        lambda f: jacrev(hessian(f)),
        lambda f: jacfwd(jacfwd(jacfwd(f))),
        lambda f: grad(lambda x: (jacfwd(f)(x) ** 2).sum()),
        lambda f: vmap(hessian(f)),
    ],
    ids=[
        "hessian",
        "jacrev(jacrev)",
        "jacrev(jacfwd)",
        "jacfwd(jacrev)",
        "jacfwd(jacfwd)",
        "jacfwd(hessian)",
        "jacrev(hessian)",
        "jacfwd(jacfwd(jacfwd))",
        "grad(jacfwd)",
        "vmap(hessian)",
    ],
)
def test_nested_transforms_are_zero_or_wrong(backend, transform, request):
    logits, target = small(3, 3)
    if "vmap" in request.node.callspec.id:
        logits = torch.stack([logits, logits.flip(1)])
    got = nested(transform, backend.on_device(fastgpt.cross_entropy), target)(logits)
    want = nested(transform, F.cross_entropy, target)(logits)
    close(got, want, 1e-9)
    assert want.abs().max() > 1e-3


def test_two_forward_levels_are_not_sent_to_eager(best_kernel):
    """torch loses a custom Function's second tangent, so the rule must see the second level."""
    logits, target = best_kernel.placed(small(3, 3))
    seen = []

    def loss(x):
        seen.append(fastgpt.explain(fastgpt.cross_entropy, x, target))
        return fastgpt.cross_entropy(x, target)

    jacfwd(loss)(logits)
    jacfwd(jacfwd(loss))(logits)
    assert [e.backend for e in seen] == [best_kernel.name, "eager"]
    assert f"{best_kernel.name}: nested forward-mode levels" in str(seen[1])


def test_jvp_of_jvp_is_wrong(backend):
    logits, target = small(3, 3)
    u, v = random_like(logits, 1), random_like(logits, 2)

    def twice(function):
        inner = lambda x: jvp(lambda x: function(x, target), (x,), (u,))[1]  # noqa: E731
        return jvp(inner, (logits,), (v,))

    close(twice(backend.on_device(fastgpt.cross_entropy)), twice(F.cross_entropy))


def test_dual_numbers_lose_their_tangent(backend):
    logits, target = small()
    v = random_like(logits)

    def tangents(function):
        with fwAD.dual_level():
            dual = fwAD.make_dual(logits, v)
            loss = function(dual, target, reduction="none")
            return fwAD.unpack_dual(loss).tangent

    close(tangents(backend.cross_entropy), tangents(F.cross_entropy))


def test_forward_over_reverse_with_dual_numbers_is_wrong(backend):
    logits, target = small()
    v = random_like(logits)

    def hessian_product(function):
        x = logits.clone().requires_grad_()
        with fwAD.dual_level():
            dual = fwAD.make_dual(x, v)
            (first,) = torch.autograd.grad(function(dual, target), dual, create_graph=True)
            return fwAD.unpack_dual(first).tangent

    close(
        hessian_product(backend.cross_entropy).detach(), hessian_product(F.cross_entropy).detach()
    )


def test_a_backward_alone_loses_the_tangent_of_its_upstream_gradient(backend):
    logits, target = small()
    x = logits.clone().requires_grad_()

    def tangent(function, reduction):
        loss = function(x, target, reduction=reduction)
        with fwAD.dual_level():
            upstream = fwAD.make_dual(random_like(loss, 1), random_like(loss, 2))
            return fwAD.unpack_dual(torch.autograd.grad(loss, x, upstream)[0]).tangent

    for reduction in ("none", "mean", "sum"):
        close(tangent(backend.cross_entropy, reduction), tangent(F.cross_entropy, reduction))


def test_batched_backward_is_wrong(backend):
    logits, target = small()
    x = logits.clone().requires_grad_()
    upstream = torch.eye(4, dtype=torch.float64)
    got, want = (
        torch.autograd.grad(f(x, target, reduction="none"), x, upstream, is_grads_batched=True)[0]
        for f in (backend.cross_entropy, F.cross_entropy)
    )
    close(got, want)


# ---- the raw operators ----

PLAIN = (None, *Options())
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_finds_fault_with_a_raw_operator(best_kernel, dtype):
    forward, backward = LAUNCHERS[best_kernel.name]
    logits, target = best_kernel.placed(random_logits(5, 7, dtype=dtype))
    target[1] = -100
    loss, lse, row_max, rest = forward(logits, target, *PLAIN)
    upstream = random_like(loss).requires_grad_()
    logits.requires_grad_()
    torch.library.opcheck(forward, (logits, target, *PLAIN), test_utils=OPCHECKS)
    torch.library.opcheck(
        backward,
        (upstream, random_like(lse, 3), logits, target, None, row_max, rest, *Options()),
        test_utils=OPCHECKS,
    )


def test_a_raw_operators_own_gradient_is_wrong(kernel):
    forward, backward = LAUNCHERS[kernel.name]
    logits, target = kernel.placed(small())
    x = logits.clone().requires_grad_()
    upstream = random_like(logits[:, 0])
    loss, _, row_max, rest = forward(x, target, *PLAIN)
    assert not row_max.requires_grad
    assert not rest.requires_grad
    (got,) = torch.autograd.grad(loss, x, upstream)
    want = gradient_of(lambda x: F.cross_entropy(x, target, reduction="none"), logits, upstream)[1]
    close(got, want)
    assert torch.autograd.gradcheck(
        lambda g, h, x: backward(
            g, h, x, target, None, *forward(x, target, *PLAIN)[2:], *Options()
        ),
        tuple(t.clone().requires_grad_() for t in (upstream, upstream.flip(0), logits)),
    )


def test_a_raw_operator_accepts_what_its_kernel_cannot_read(best_kernel):
    forward, backward = LAUNCHERS[best_kernel.name]
    logits, target = best_kernel.placed(random_logits(4, 5))
    loss, _, row_max, rest = forward(logits, target, *PLAIN)
    bad_forward = [
        (logits[0], target, *PLAIN),
        (logits, target[:3], *PLAIN),
        (logits, target.int(), *PLAIN),
        (logits.int(), target, *PLAIN),
        (logits[:, :0], target, *PLAIN),
    ]
    bad_backward = [
        (loss[:3], None, logits, target, None, row_max, rest),
        (loss.double(), None, logits, target, None, row_max, rest),
        (loss, None, logits, target, None, row_max[:1].expand(4), rest),
        (loss, None, logits, target, None, row_max, rest.bfloat16()),
    ]
    if best_kernel.device == "cpu":  # on a GPU it is an assertion of the device's
        bad_forward.append((logits, target + 5, *PLAIN))
        bad_backward.append((loss, None, logits, target - 9, None, row_max, rest))
    for arguments in bad_forward:
        with pytest.raises(RuntimeError):
            forward(*arguments)
    for arguments in bad_backward:
        with pytest.raises(RuntimeError):
            backward(*arguments, *Options())


def test_a_raw_operator_reads_other_strides_wrongly(kernel):
    forward, backward = LAUNCHERS[kernel.name]
    logits, target = kernel.placed(random_logits(4, 5))
    dense = forward(logits, target, *PLAIN)
    strided = logits.t().contiguous().t()
    for got, want in zip(forward(strided, target, *PLAIN), dense, strict=True):
        assert torch.equal(got, want)
    loss, lse, *statistics = dense
    gradient, other = (
        backward(loss, lse, x, target, None, *statistics, *Options()) for x in (logits, strided)
    )
    assert torch.equal(other, gradient)


def test_known_limit_a_raw_operator_keeps_a_dual_tangent(kernel):
    """Documented: a raw operator drops the tangent, so only the public function is promised. If
    this fails, torch has learnt it.
    """
    logits, target = kernel.placed(small())
    with fwAD.dual_level():
        dual = fwAD.make_dual(logits, random_like(logits))
        loss, *_ = LAUNCHERS[kernel.name].forward(dual, target, *PLAIN)
        assert fwAD.unpack_dual(loss).tangent is None


# ---- torch.compile ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_function_is_wrong(one_isa, compiled, dtype):
    logits, target = random_logits(6, 9, dtype=dtype)
    target[2] = -100

    def losses(x, t):
        x = x * 1
        return [fastgpt.cross_entropy(x, t, reduction=r) for r in ("none", "mean", "sum")]

    one_isa.cross_entropy(logits, target)
    for reduction in range(3):
        upstream = random_like(losses(logits, target)[reduction])
        run = one_isa.on_device(compiled(losses))
        got = gradient_of(lambda x, r=reduction, run=run: run(x, target)[r], logits, upstream)
        want = gradient_of(lambda x, r=reduction: losses(x, target)[r], logits, upstream)
        tol = 1e-6 if dtype == torch.float32 else 1e-2
        close(got, want, tol)


@pytest.mark.slow
def test_inductors_code_is_wrong(compiled):
    logits, target = random_logits(6, 9)
    run = torch.compile(lambda x: fastgpt.cross_entropy(x * 2, target), fullgraph=True)
    got = gradient_of(run, logits, torch.tensor(1.5))
    close(
        got, gradient_of(lambda x: F.cross_entropy(x * 2, target), logits, torch.tensor(1.5)), 1e-6
    )


def test_the_kernel_is_not_in_the_compiled_graph(best_kernel):
    """Forward and backward hold the fused operators, not a decomposition of them."""
    graphs = []

    def keep(module, _inputs):
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    logits, target = random_logits(6, 9)
    run = torch.compile(
        fastgpt.cross_entropy, fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )
    run = best_kernel.on_device(run)
    gradient_of(lambda x: run(x, target), logits, torch.tensor(1.0))
    torch._dynamo.reset()
    for graph, operator in zip(graphs, LAUNCHERS[best_kernel.name], strict=True):
        assert str(operator) in graph


def test_a_dynamic_batch_recompiles(best_kernel):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(fastgpt.cross_entropy, fullgraph=True, backend=counter)
    run = best_kernel.on_device(run)
    for n in (6, 8, 11, 19):
        logits, target = best_kernel.placed(random_logits(n, 9, seed=n))
        torch._dynamo.mark_dynamic(logits, 0)
        torch._dynamo.mark_dynamic(target, 0)
        close(run(logits, target), F.cross_entropy(logits, target).cpu(), 1e-6)
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_batches_of_any_size_recompile_each_time(best_kernel):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(fastgpt.cross_entropy, fullgraph=True, backend=counter)
    run = best_kernel.on_device(run)
    for n in (6, 8, 11, 19, 23, 31):
        logits, target = random_logits(n, 9, seed=n)
        got = gradient_of(lambda x, t=target: run(x, t), logits, torch.tensor(2.0))
        want = gradient_of(lambda x, t=target: F.cross_entropy(x, t), logits, torch.tensor(2.0))
        close(got, want, 1e-6)
    torch._dynamo.reset()
    assert counter.frame_count <= 3


@pytest.mark.parametrize(
    "transform",
    [
        grad,
        hessian,
        lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),)),
        lambda f: jacfwd(jacfwd(f)),
        lambda f: vmap(grad(f)),
    ],
    ids=["grad", "hessian", "jvp", "jacfwd(jacfwd)", "vmap(grad)"],
)
def test_a_compiled_transform_is_zero_or_wrong(best_kernel, compiled, transform, request):
    logits, target = small(3, 3)
    if "vmap" in request.node.callspec.id:
        logits = torch.stack([logits, logits.flip(1)])
    target_there = best_kernel.placed(target)
    run = compiled(lambda x: nested(transform, fastgpt.cross_entropy, target_there)(x))
    got = best_kernel.on_device(run)(logits)
    want = nested(transform, F.cross_entropy, target)(logits)
    close(got, want, 1e-9)


@pytest.mark.slow
def test_second_order_through_a_compiled_graph_gives_zeros():
    """Where the graph's own input is what its backward saved, it must raise. (Where that is an
    intermediate result, torch cuts the second derivative off unannounced, for its own cross-entropy
    as for any operator.)
    """
    torch._dynamo.reset()
    logits, target = small()
    run = torch.compile(lambda x: fastgpt.cross_entropy(x, target), fullgraph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient_penalty(lambda x, _, reduction: run(x), logits, target)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("function", [fastgpt.cross_entropy, F.cross_entropy])
def test_known_limit_compiled_code_keeps_a_dual_tangent(function):
    """Documented: generated code called under dual_level drops tangents, torch's own operator too.
    If this fails, torch has learnt it.
    """
    torch._dynamo.reset()
    logits, target = small()
    run = torch.compile(lambda x: function(x, target), fullgraph=True)
    with fwAD.dual_level():
        loss = run(fwAD.make_dual(logits, random_like(logits)))
        assert fwAD.unpack_dual(loss).tangent is None
    torch._dynamo.reset()


def test_a_compiled_function_goes_on_with_another_backend_than_chosen(best_kernel):
    """The choice is a guard: code compiled under one backend is not reused under another."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(fastgpt.cross_entropy, fullgraph=True, backend=counter)
    logits, target = best_kernel.placed(random_logits(6, 9))

    def graph_has_kernel():
        return "autograd_apply" in counter.graphs[-1].code

    for _ in range(2):
        with fastgpt.backend("eager"):
            run(logits, target)
    assert counter.frame_count == 1
    assert not graph_has_kernel()
    run(logits, target)
    assert counter.frame_count == 2
    assert graph_has_kernel()
    with fastgpt.backend("eager"):
        run(logits, target)
    run(logits, target)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_an_instruction_set_chosen_later_changes_compiled_results():
    """The instruction set is no part of the graph: any of them may run compiled code."""
    torch._dynamo.reset()
    run = torch.compile(fastgpt.cross_entropy, fullgraph=True, backend="aot_eager")
    logits, target = random_logits(6, 9)
    previous = native.isa()
    try:
        for isa in native.isas():
            native.extension.set_isa(isa)
            close(run(logits, target), F.cross_entropy(logits, target), 1e-6)
    finally:
        native.extension.set_isa(previous)
        torch._dynamo.reset()


def test_an_out_of_range_target_in_compiled_code_goes_unnoticed(compiled, best_kernel):
    if best_kernel.device != "cpu":
        pytest.skip("on a GPU it is an assertion of the device's, which ends the process")
    logits, target = random_logits(6, 9)
    target[3] = 9
    with pytest.raises((RuntimeError, IndexError), match=r"Target .*out of bounds"):
        compiled(fastgpt.cross_entropy)(logits, target)
