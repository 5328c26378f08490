"""Derivatives of attention in every mode that torch's composite form has: reverse, forward, nested,
batched, compiled, and of the raw operators.
"""

import functools

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from oracle import (
    additive,
    attention_gradients,
    gradient_of,
    random_like,
    random_mask,
    random_qkv,
    upstream_for,
)
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt
from fastgpt.ops.attention import LAUNCHERS
from fastgpt.ops.attention_forms import UNLIMITED, Inputs, Options

attention = fastgpt.scaled_dot_product_attention


def torchs(*args, **kwargs):
    """torch's composite form: its fused kernel has a first derivative only."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def small(B=1, Hq=2, H=2, L=3, S=4, D=2, Dv=3, **kwargs):
    return random_qkv(B, Hq, H, L, S, D, Dv, **kwargs)


def leaves(inputs):
    return tuple(x.clone().requires_grad_() for x in inputs)


def close(got, want, tol=1e-11):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)


def one_query_empty():
    """(3, 4) bool, the second query without a key."""
    allowed = random_mask(3, 4)
    allowed[1] = False
    return allowed


CALLS = {
    "full": (small(), {}),
    "causal": (small(), {"is_causal": True}),
    "causal, more queries": (small(L=4, S=2), {"is_causal": True}),
    "grouped": (small(H=1), {"enable_gqa": True, "scale": 0.8}),
    "bool": (small(), {"attn_mask": one_query_empty()}),
    "additive": (small(), {"attn_mask": additive(one_query_empty())}),
    "mask per head": (small(), {"attn_mask": additive(random_mask(2, 1, 4))}),
}


@pytest.fixture(params=CALLS)
def call(request):
    """Inputs and options of a small call of each kind."""
    inputs, options = CALLS[request.param]
    return [x.clone() for x in inputs], options


# ---- numerical derivatives ----


def test_first_derivatives_disagree_with_finite_differences(backend, call):
    inputs, options = call
    assert torch.autograd.gradcheck(
        functools.partial(backend.attention, **options),
        leaves(inputs),
        fast_mode=backend.interpreted,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


def test_second_derivatives_disagree_with_finite_differences(one_isa, call):
    inputs, options = call
    assert torch.autograd.gradgradcheck(
        functools.partial(one_isa.attention, **options),
        leaves(inputs),
        fast_mode=one_isa.interpreted,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_third_derivatives_disagree_with_finite_differences(one_isa, is_causal):
    inputs = small(1, 1, 1, 2, 2, 2, 1)
    directions = [random_like(x, 5) for x in inputs]

    def slopes(*inputs):
        out = one_isa.attention(*inputs, is_causal=is_causal)
        return torch.autograd.grad(out.pow(2).sum(), inputs, create_graph=True)

    def curvatures(*inputs):
        along = sum((g * v).sum() for g, v in zip(slopes(*inputs), directions, strict=True))
        return torch.autograd.grad(along, inputs, create_graph=True)

    fast = one_isa.interpreted
    assert torch.autograd.gradgradcheck(slopes, leaves(inputs), fast_mode=fast)
    assert torch.autograd.gradcheck(curvatures, leaves(inputs), fast_mode=fast)


# ---- create_graph ----


def gradient_penalty(function, inputs, **options):
    """The gradients of sum(out^2) + 0.1 (the squared norm of its gradients)."""
    inputs = leaves(inputs)
    loss = function(*inputs, **options).pow(2).sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(x.requires_grad for x in first), "a gradient under create_graph has no graph"
    penalty = sum(x.pow(2).sum() for x in first)
    return torch.autograd.grad(loss + 0.1 * penalty, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_penalty_vanishes(backend, call, dtype):
    inputs, options = call
    inputs = [x.to(dtype) for x in inputs]
    if options.get("attn_mask") is not None and options["attn_mask"].dtype != torch.bool:
        options = {**options, "attn_mask": options["attn_mask"].to(dtype)}
    got = gradient_penalty(backend.attention, inputs, **options)
    wide = {k: v.double() if k == "attn_mask" and v.dtype == dtype else v
            for k, v in options.items()}  # fmt: skip
    want = gradient_penalty(torchs, [x.double() for x in inputs], **wide)
    plain = attention_gradients(
        lambda *x, **o: torchs(*x, **o).pow(2).sum(),
        [x.double() for x in inputs],
        torch.tensor(1.0, dtype=torch.float64),
        **wide,
    )[1:]
    tol = 8 * torch.finfo(dtype).eps + 32 * torch.finfo(accumulator(dtype)).eps
    for ours, expected, without in zip(got, want, plain, strict=True):
        close(ours.double(), expected, tol)
        assert (expected - without).abs().max() > 1e-3, "the penalty has no gradient"


@pytest.mark.parametrize("L", [70, 130])
def test_a_gradient_penalty_over_several_tiles_is_wrong(one_isa, L):
    inputs = random_qkv(1, 4, 2, L, 130 if one_isa.interpreted else 200, 8, 5)
    S = inputs[1].shape[2]
    for options in ({}, {"is_causal": True}, {"attn_mask": additive(random_mask(L, S))}):
        got, want = (
            gradient_penalty(f, inputs, enable_gqa=True, **options)
            for f in (one_isa.attention, torchs)
        )
        close(got, want)


def test_a_second_derivative_allocates_the_scores(best_native):
    """It is made of torch operations for every kernel."""
    length = 2048
    inputs = leaves(random_qkv(1, 1, 1, length, length, 16, 16, dtype=torch.float32))

    def second():
        out = best_native.attention(*inputs, is_causal=True)
        first = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in first), inputs)

    assert best_native.peak_bytes(second) < length * length * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_second_backward_doubles_or_loses_the_gradient(backend, dtype):
    """A backward that overwrites what it saved is right once only."""
    inputs = leaves(random_qkv(L=70, S=70, dtype=dtype))
    out = backend.attention(*inputs, is_causal=True)
    for seed in (1, 2, 1):
        upstream = random_like(out, seed)
        got = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        want = attention_gradients(backend.attention, inputs, upstream, is_causal=True)[1:]
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_a_frozen_input_changes_the_gradients_of_the_others(backend, needed):
    inputs = random_qkv(L=9, S=70)
    upstream = upstream_for(inputs[0], inputs[2])
    want = attention_gradients(backend.attention, inputs, upstream)[1:]
    found = [x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)]
    backend.attention(*found).backward(upstream)
    for i, (x, gradient) in enumerate(zip(found, want, strict=True)):
        if i in needed:
            close(x.grad, gradient)
        else:
            assert x.grad is None


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["query", "key", "value"])
def test_a_change_between_forward_and_backward_goes_unnoticed(backend, changed):
    inputs = [x * 1 for x in leaves(random_qkv())]
    out = backend.attention(*inputs)
    with torch.no_grad():
        inputs[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("changed", ["bool", "additive", "output"])
def test_a_changed_mask_or_output_goes_unnoticed(kernel, changed):
    """Eager saves neither, and its gradient stays right."""
    mask = random_mask(5, 7) if changed == "bool" else additive(random_mask(5, 7))
    inputs, mask = kernel.placed((random_qkv(), mask))
    out = attention(*leaves(inputs), attn_mask=mask)
    with torch.no_grad():
        (out if changed == "output" else mask).zero_()
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        out.sum().backward()


def test_no_grad_or_frozen_inputs_build_a_graph(one_isa):
    inputs = random_qkv()
    assert not one_isa.attention(*inputs).requires_grad
    with torch.no_grad():
        assert not one_isa.attention(*leaves(inputs)).requires_grad
    with torch.inference_mode():
        close(one_isa.attention(*inputs), torchs(*inputs))


def test_the_gradient_of_a_mask_is_lost(best_kernel):
    """In reverse and in a transform, beside the inputs and alone."""
    inputs = small()
    mask = random_like(torch.empty(3, 4, dtype=torch.float64))
    upstream = upstream_for(inputs[0], inputs[2])
    got, want = (
        gradient_of(lambda m, f=f: f(*inputs, attn_mask=m), mask, upstream)
        for f in (best_kernel.attention, torchs)
    )
    close(got, want)
    ours = best_kernel.on_device(attention)
    got, want = (
        grad(lambda *x, f=f: f(*x).pow(2).sum(), (0, 1, 2, 3))(*inputs, mask)
        for f in (ours, torchs)
    )
    close(got, want)


# ---- torch.func ----


def squares(function, **options):
    """A scalar function of query, key and value."""
    return lambda *inputs: function(*inputs, **options).pow(2).sum()


def test_func_grad_or_vjp_is_wrong(backend, call):
    inputs, options = call
    upstream = upstream_for(inputs[0], inputs[2])
    for argnums in (0, 1, 2, (0, 1, 2)):
        got, want = (
            grad(squares(f, **options), argnums)(*inputs) for f in (backend.attention, torchs)
        )
        close(got, want)
    got, want = (
        vjp(functools.partial(f, **options), *inputs)[1](upstream)
        for f in (backend.attention, torchs)
    )
    close(got, want)


def test_jvp_is_wrong(backend, call):
    """Along each input alone, and along all."""
    inputs, options = call
    tangents = [random_like(x, 3) for x in inputs]
    for moved in ((0,), (1,), (2,), (0, 1, 2)):

        def along(function, moved=moved):
            def of_moved(*values):
                full = list(inputs)
                for i, value in zip(moved, values, strict=True):
                    full[i] = value
                return function(*full, **options)

            return jvp(of_moved, *(tuple(x[i] for i in moved) for x in (inputs, tangents)))

        close(along(backend.attention), along(torchs))


IN_DIMS = [
    (0, None, None, None),
    (None, 0, None, None),
    (None, None, 0, None),
    (None, None, None, 0),
    (0, 0, 0, None),
    (0, 0, 0, 0),
    (1, 2, 3, 1),
    (-1, -1, -1, -1),
]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "grouped"])
def test_vmap_mixes_its_batch(backend, in_dims, kind):
    """Any place of the batch dimension, in each input alone and in all; and in the mask."""
    n, batch, group = 3, 1 if backend.interpreted else 2, 2 if kind == "grouped" else 1
    Hq = 2 if backend.interpreted else 4
    inputs = random_qkv(n * batch, Hq, Hq // group, 5, 7, 4, 6)
    mask = random_mask(n, 1, 5, 7)
    tensors = [x.unflatten(0, (n, batch)) for x in inputs]
    tensors.append(mask if kind == "bool" else additive(mask))
    samples = [
        [x[0 if dim is None else i] for x, dim in zip(tensors, in_dims, strict=True)]
        for i in range(n)
    ]
    arguments = [
        x[0] if dim is None else x.movedim(0, dim).contiguous()
        for x, dim in zip(tensors, in_dims, strict=True)
    ]

    def of(function):
        return lambda *x: function(*x, enable_gqa=kind == "grouped")

    got = vmap(of(backend.attention), in_dims)(*arguments)
    close(got, torch.stack([of(torchs)(*sample) for sample in samples]))
    gradient = grad(lambda *x: of(backend.attention)(*x).pow(2).sum(), (0, 1, 2))
    want = [grad(lambda *x: of(torchs)(*x).pow(2).sum(), (0, 1, 2))(*sample) for sample in samples]
    close(vmap(gradient, in_dims)(*arguments), tuple(map(torch.stack, zip(*want, strict=True))))


@pytest.mark.parametrize("in_dims", IN_DIMS[4:5] + IN_DIMS[:3], ids=str)
def test_the_reverse_pass_through_vmap_raises_or_is_wrong(backend, in_dims):
    inputs = [
        x.unflatten(0, (3, 2)) if dim == 0 else x[:2]
        for x, dim in zip(random_qkv(6), in_dims, strict=False)
    ]

    def batched(function):
        return lambda *x: vmap(functools.partial(function, is_causal=True), in_dims[:3])(*x)

    upstream = random_like(batched(torchs)(*inputs))
    got, want = (
        attention_gradients(batched(f), inputs, upstream) for f in (backend.attention, torchs)
    )
    close(got, want)


def test_nested_vmap_is_wrong(backend):
    inputs = [x.unflatten(0, (2, 3)) for x in random_qkv(6)]
    close(vmap(vmap(backend.attention))(*inputs), torchs(*inputs))


def of_one(function, **options):
    """A scalar function of one tensor, which is query, key and value in three ways."""
    return lambda x: function(x, x.sin(), x.cos(), **options).pow(2).sum()


TRANSFORMS = {
    "hessian": hessian,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f)),
    "jacfwd(hessian)": lambda f: jacfwd(hessian(f)),
    "jacrev(hessian)": lambda f: jacrev(hessian(f)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
    "jvp(jvp)": lambda f: lambda x: jvp(lambda y: jvp(f, (y,), (x.sin(),))[1], (x,), (x.cos(),))[1],
    "grad(jvp)": lambda f: grad(lambda x: jvp(f, (x,), (x.cos(),))[1]),
    "jvp(grad)": lambda f: lambda x: jvp(grad(f), (x,), (x.cos(),))[1],
    "grad(jacfwd)": lambda f: grad(lambda x: (jacfwd(f)(x) ** 2).sum()),
    "vmap(hessian)": lambda f: lambda x: vmap(hessian(f))(torch.stack([x, x.flip(2)])),
}


def of_vmap(function, **options):
    """`of_one`, over a batch of its own."""
    return lambda x: vmap(of_one(function, **options))(torch.stack([x, 2 * x])).sum()


@pytest.mark.parametrize("scalar", [of_one, of_vmap])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nested_transforms_are_zero_or_wrong(one_isa, transform, is_causal, scalar):
    x = random_qkv(1, 1, 1, 3, 3, 2)[0]
    got, want = (
        TRANSFORMS[transform](scalar(f, is_causal=is_causal))(x)
        for f in (one_isa.on_device(attention), torchs)
    )
    close(got, want, 1e-9)
    assert want.abs().max() > 1e-3


def test_two_forward_levels_are_not_sent_to_eager(best_kernel):
    """torch loses a custom Function's second tangent, so the rule must see the second level."""
    x = best_kernel.placed(random_qkv(1, 1, 1, 3, 3, 2)[0])
    seen = []

    def loss(x):
        seen.append(fastgpt.explain(attention, x, x, x))
        return attention(x, x, x).sum()

    jacfwd(loss)(x)
    jacfwd(jacfwd(loss))(x)
    assert [e.backend for e in seen] == [best_kernel.name, "eager"]
    assert f"{best_kernel.name}: nested forward-mode levels" in str(seen[1])


def test_dual_numbers_lose_their_tangent(backend, call):
    inputs, options = call

    def tangent(function):
        with fwAD.dual_level():
            duals = [fwAD.make_dual(x, random_like(x, 3)) for x in inputs]
            return fwAD.unpack_dual(function(*duals, **options)).tangent

    close(tangent(backend.attention), tangent(torchs))


def test_forward_over_reverse_with_dual_numbers_is_wrong(backend):
    inputs = small()

    def hessian_product(function):
        with fwAD.dual_level():
            duals = [fwAD.make_dual(x, random_like(x, 3)) for x in leaves(inputs)]
            loss = squares(function)(*duals)
            first = torch.autograd.grad(loss, duals, create_graph=True)
            return [fwAD.unpack_dual(x).tangent.detach() for x in first]

    close(hessian_product(backend.attention), hessian_product(torchs))


def test_a_backward_alone_loses_the_tangent_of_its_upstream_gradient(backend):
    inputs = leaves(small())

    def tangents(function):
        output = function(*inputs)
        with fwAD.dual_level():
            upstream = fwAD.make_dual(random_like(output, 1), random_like(output, 2))
            found = torch.autograd.grad(output, inputs, upstream)
            return [fwAD.unpack_dual(x).tangent for x in found]

    close(tangents(backend.attention), tangents(torchs))


@pytest.mark.parametrize("options", [{}, {"attn_mask": one_query_empty()}], ids=["", "bool"])
def test_without_gradients_a_transform_is_lost(backend, options):
    """Such a call goes below autograd, unless a transform surrounds it."""
    inputs, tangents = leaves(small()), tuple(random_like(x, 3) for x in small())

    def found(function):
        function = functools.partial(function, **options)
        with torch.no_grad():
            mapped = vmap(function)(*(torch.stack([x, 2 * x]) for x in inputs))
            forward = jvp(function, inputs, tangents)
            with fwAD.dual_level():
                duals = [fwAD.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
                dual = fwAD.unpack_dual(function(*duals)).tangent
            reverse = grad(lambda *x: function(*x).square().sum(), (0, 1, 2))(*inputs)
        return mapped, *forward, dual, reverse

    close(found(backend.attention), found(torchs))


def test_batched_backward_is_wrong(backend):
    inputs = leaves(small())
    upstream = torch.eye(18, dtype=torch.float64).view(18, 1, 2, 3, 3)
    got, want = (
        torch.autograd.grad(f(*inputs), inputs, upstream, is_grads_batched=True)
        for f in (backend.attention, torchs)
    )
    close(got, want)


# ---- the raw operators ----

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


RAW_CALLS = {
    "causal": (None, True),
    "bool": (one_query_empty()[None, None], False),
    "additive": (additive(random_mask(1, 4, 1, 4)), True),
    "everything": (additive(random_mask(2, 1, 3, 4)), False),
}


@pytest.fixture(params=RAW_CALLS)
def raw(request):
    """Inputs of a type with grouped queries, and options: (Inputs, Options, whether the mask's
    gradient is asked for).
    """
    mask, is_causal = RAW_CALLS[request.param]
    everything = request.param == "everything"

    def make(backend, dtype):
        added = mask is not None and mask.dtype != torch.bool
        wide = accumulator(dtype)
        tensors = (
            *small(2, 4, 2, dtype=dtype),
            mask.to(wide) if added else mask,
            torch.tensor([[0.1, 0.2, 0.3, 0.0]], dtype=wide) if everything else None,
            torch.tensor([[0.5, -1.0, 2.0, 0.0]], dtype=wide) if everything else None,
            torch.tensor([[0, 0, 1], [2, 3, 4], [1, 1, 3]]) if everything else None,
            torch.tensor([5, -7]) if everything else None,
        )
        right = 0 if is_causal else UNLIMITED
        options = Options(UNLIMITED, right, 0, 0.6, *((1.5, 0.3) if everything else (0.0, 0.0)))
        return Inputs(*backend.placed(tensors)), options, added

    return make


def raw_backward(kernel, upstream, upstream_lse, inputs, saved, options, of_mask):
    output, _, *statistics = saved
    arguments = upstream, upstream_lse, *inputs, output, *statistics, *options, of_mask
    return LAUNCHERS[kernel.name].backward(*arguments)


def differentiable(inputs):
    """Those of a call of the raw operators that have a gradient, as leaves of a graph."""
    return inputs._replace(
        **{
            name: x.clone().requires_grad_()
            for name, x in inputs._asdict().items()
            if x is not None and x.is_floating_point() and name != "alibi_slopes"
        }
    )


@pytest.mark.interpreted(raw=["everything"])
def test_opcheck_finds_fault_with_a_raw_operator(best_kernel, raw):
    inputs, options, of_mask = raw(best_kernel, torch.float32)
    forward, backward = LAUNCHERS[best_kernel.name]
    saved = forward(*inputs, *options)
    upstream, upstream_lse = (random_like(x).requires_grad_() for x in saved[:2])
    inputs = differentiable(inputs)
    torch.library.opcheck(forward, (*inputs, *options), test_utils=OPCHECKS)
    output, _, *statistics = saved
    h = upstream_lse if of_mask else None
    torch.library.opcheck(
        backward,
        (upstream, h, *inputs, output, *statistics, *options, of_mask),
        test_utils=OPCHECKS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "(B, L, H, D)"])
def test_a_fake_kernel_promises_another_layout(best_kernel, raw, layout, dtype):
    """Shapes, types and strides, which compiled code relies on."""
    inputs, options, of_mask = raw(best_kernel, dtype)
    forward = LAUNCHERS[best_kernel.name].forward
    if layout != "contiguous":
        heads = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3])
        inputs = Inputs(*heads, *inputs[3:])

    def both(inputs):
        saved = forward(*inputs, *options)
        upstream, upstream_lse = (torch.ones_like(x) for x in saved[:2])
        return *saved, *raw_backward(
            best_kernel, upstream, upstream_lse, inputs, saved, options, of_mask
        )

    real = both(inputs)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = both(Inputs(*(None if x is None else mode.from_tensor(x) for x in inputs)))
    for got, promised in zip(real, fake, strict=True):
        assert got.shape == promised.shape
        assert got.stride() == promised.stride()
        assert got.dtype == promised.dtype
    wide = accumulator(dtype)
    assert [x.dtype for x in real[:5]] == [dtype, wide, dtype, wide, wide]
    assert [x.dtype for x in real[5:]] == [dtype, dtype, dtype, wide, wide]
    assert real[1].shape == real[3].shape == real[4].shape == (2, 4, 3)
    assert real[2].shape == (*real[0].shape[:3], real[0].shape[3] * (dtype != wide))
    assert real[8].shape == (inputs.attn_mask.shape if of_mask else (2, 0))
    assert real[9].shape == ((2, 4, 3) if inputs.sinks is not None else (2, 0, 0))


@pytest.mark.interpreted(raw=["everything"])
def test_a_raw_operators_own_gradient_is_wrong(kernel, raw):
    inputs, options, of_mask = raw(kernel, torch.float64)
    forward = LAUNCHERS[kernel.name].forward
    leaves_of = differentiable(inputs)
    outputs = forward(*leaves_of, *options)
    assert [x.requires_grad for x in outputs] == [True, True, False, False, False]
    names = [k for k, x in leaves_of._asdict().items() if x is not None and x.requires_grad]
    learnt = [getattr(leaves_of, k) for k in names]

    def with_values(values):
        return inputs._replace(**dict(zip(names, values, strict=True)))

    def finite(lse):
        return lse.masked_fill(lse == -torch.inf, 0)

    def both(*values):
        output, lse, *_ = forward(*with_values(values), *options)
        return output, finite(lse)

    fast = kernel.interpreted
    assert torch.autograd.gradcheck(both, learnt, fast_mode=fast)

    def gradients(upstream, upstream_lse, *values):
        x = with_values(values)
        saved = forward(*x, *options)
        found = raw_backward(kernel, upstream, upstream_lse, x, saved, options, of_mask)
        return [x for x in found if x.numel()]

    upstream = [random_like(x).requires_grad_() for x in outputs[:2]]
    assert torch.autograd.gradcheck(gradients, (*upstream, *learnt), fast_mode=fast)


def test_a_raw_operator_accepts_what_its_kernel_cannot_read(best_kernel):
    """Each argument of a wrong shape or type, in either direction."""
    forward, backward = LAUNCHERS[best_kernel.name]
    tensors = random_qkv(2, 4, 2, dtype=torch.float32)
    tensors += [random_mask(5, 7)[None, None], torch.zeros(1, 4), torch.zeros(2, 4)]
    tensors += [torch.tensor([[0] * 5, [7] * 5, [0, 1, 2, 3, 4]]), torch.tensor([1, 2])]
    good = Inputs(*best_kernel.placed(tensors))
    query, key, value, mask, slopes, sinks, spans, seeds = good
    options = Options(UNLIMITED, UNLIMITED, 0, 1.0, 0.0, 0.5)
    saved = forward(*good, *options)
    bad = {
        "dimensions": {"query": query[0], "key": key[0], "value": value[0]},
        "batch": {"query": query[:1]},
        "heads": {"query": query[:, :3]},
        "value heads": {"value": value[:, :1]},
        "head_dim": {"query": query[..., :5]},
        "lengths": {"value": value[:, :, :5]},
        "types": {"key": key.double()},
        "integers": {"query": query.int(), "key": key.int(), "value": value.int()},
        "mask's shape": {"attn_mask": mask[..., :5]},
        "mask's dimensions": {"attn_mask": mask[0]},
        "mask's type": {"attn_mask": mask.long()},
        "slopes' shape": {"alibi_slopes": slopes[:, :3]},
        "slopes' dimensions": {"alibi_slopes": slopes[0]},
        "slopes' type": {"alibi_slopes": slopes.double()},
        "sinks' shape": {"sinks": sinks[:, :2]},
        "sinks' batch": {"sinks": torch.cat([sinks, sinks])},
        "sinks' type": {"sinks": sinks.bfloat16()},
        "spans' shape": {"spans": spans[:, :4]},
        "spans' rows": {"spans": spans[:2]},
        "spans' type": {"spans": spans.int()},
        "seeds' shape": {"seeds": seeds[:1]},
        "seeds' type": {"seeds": seeds.int()},
    }
    accepted = [
        name
        for name, wrong in bad.items()
        if not refused(forward, *good._replace(**wrong), *options)
    ]
    assert not accepted
    output, lse, *statistics = saved
    upstream, upstream_lse = random_like(output), random_like(lse)
    arguments = [upstream, upstream_lse, *good, output, *statistics]
    backward(*arguments, *options, False)
    bad_backward = {
        "upstream's shape": (0, upstream[:, :, :3]),
        "upstream's type": (0, upstream.double()),
        "lse's upstream's shape": (1, upstream_lse[:, :, :3]),
        "lse's upstream's type": (1, upstream_lse.double()),
        "mask's shape": (5, mask[..., :5]),
        "sinks' shape": (7, sinks[:, :2]),
        "spans' shape": (8, spans[:, :4]),
        "seeds' shape": (9, seeds[:1]),
        "output's shape": (10, output[..., :3]),
        "statistics' shape": (12, statistics[1][:, :2]),
        "statistics' type": (13, statistics[2].double()),
    }
    accepted = [
        name
        for name, (place, wrong) in bad_backward.items()
        if not refused(
            backward, *arguments[:place], wrong, *arguments[place + 1 :], *options, False
        )
    ]
    assert not accepted


def refused(operator, *arguments) -> bool:
    try:
        operator(*arguments)
    except RuntimeError:
        return True
    return False


# ---- torch.compile ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_function_is_wrong(one_isa, compiled, call, dtype):
    inputs, options = call
    if options.get("attn_mask") is not None and options["attn_mask"].dtype != torch.bool:
        options = {**options, "attn_mask": options["attn_mask"].to(dtype)}
    inputs = [x.to(dtype) for x in inputs]
    one_isa.attention(*inputs, **options)

    options = one_isa.placed(options)

    def twice(q, k, v):
        return attention(q * 1, k, v, **options) * 2

    got, want = (
        attention_gradients(one_isa.on_device(f), inputs) for f in (compiled(twice), twice)
    )
    close(got, want, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.slow
def test_inductors_code_is_wrong(best_kernel):
    """A projection before it and a joining of heads after it, as in a model."""
    torch._dynamo.reset()
    x = random_like(torch.empty(2, 9, 3 * 4 * 8))

    def layer(function):
        def run(x):
            q, k, v = (p.view(2, 9, 4, 8).transpose(1, 2) for p in (x * 2).split(32, -1))
            return function(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 9, 32)

        return run

    upstream = random_like(torch.empty(2, 9, 32))
    got = gradient_of(torch.compile(layer(attention), fullgraph=True), x, upstream)
    close(got, gradient_of(layer(torchs), x, upstream), 1e-5)
    torch._dynamo.reset()


def test_the_kernel_is_not_in_the_compiled_graph(best_kernel):
    """Forward and backward hold the fused operators, not a decomposition of them."""
    graphs = []

    def keep(module, _inputs):
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    run = torch.compile(attention, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    run = best_kernel.on_device(run)
    attention_gradients(run, random_qkv(dtype=torch.float32), is_causal=True)
    torch._dynamo.reset()
    for graph, operator in zip(graphs, LAUNCHERS[best_kernel.name], strict=True):
        assert str(operator) in graph


def test_sequences_of_any_length_recompile_each_time(best_kernel):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(attention, fullgraph=True, backend=counter)
    run = best_kernel.on_device(run)
    for length in (6, 8, 11, 19, 23, 31):
        inputs = random_qkv(L=length, S=length)
        got, want = (attention_gradients(f, inputs, is_causal=True) for f in (run, torchs))
        close(got, want)
    torch._dynamo.reset()
    assert counter.frame_count <= 3


def test_a_compiled_jvp_fails_for_sequences_of_any_length(best_kernel):
    """The compiler wants a tangent with the strides of what it is the tangent of."""

    def tangents(function, *inputs):
        return jvp(lambda *x: function(*x, is_causal=True), inputs, inputs)

    torch._dynamo.reset()
    run = torch.compile(lambda *x: tangents(attention, *x), backend="aot_eager", dynamic=True)
    run = best_kernel.on_device(run)
    for length in (9, 11):
        inputs = random_qkv(L=length, S=length)
        close(run(*inputs), tangents(torchs, *inputs))
    torch._dynamo.reset()


@pytest.mark.parametrize("transform", ["hessian", "jvp", "jacfwd(jacfwd)", "jvp(grad)"])
def test_a_compiled_transform_is_zero_or_wrong(best_kernel, compiled, transform):
    x = random_qkv(1, 1, 1, 3, 3, 2)[0]
    transformed = TRANSFORMS[transform]
    # In a fresh process the compiler fails an assertion of torch's own on jacfwd(jacfwd) of
    # `(x * 0.5).sum()`, with nothing of ours, unless it has traced one level through a sum before.
    compiled(lambda x: jvp(torch.sum, (x,), (x,)))(x)
    run = compiled(lambda x: transformed(of_one(attention, is_causal=True))(x))
    got = best_kernel.on_device(run)(x)
    want = transformed(of_one(torchs, is_causal=True))(x)
    close(got, want, 1e-9)


def test_a_compiled_vmap_of_grad_is_zero_or_wrong(best_kernel, compiled):
    inputs = [x.unflatten(0, (3, 2)) for x in random_qkv(6)]
    run = compiled(lambda *x: vmap(grad(squares(attention), (0, 1, 2)))(*x))
    got = best_kernel.on_device(run)(*inputs)
    close(got, vmap(grad(squares(torchs), (0, 1, 2)))(*inputs))
