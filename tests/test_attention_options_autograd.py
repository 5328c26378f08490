"""Derivatives of attention with its further options, in every mode, to second order, batched and
under torch.compile.
"""

import functools

import pytest
import torch
from attention_cases import Sizes, kept
from oracle import composed_attention, random_like, random_mask, random_qkv
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt.ops import attention_forms

attention = fastgpt.scaled_dot_product_attention
SEED = 11


def normal(*shape, seed=5):
    return random_like(torch.empty(shape, dtype=torch.float64), seed)


BLIND = {"is_causal": True, "causal_alignment": "bottom_right"}
SLOPES = torch.tensor([0.3, 0.05], dtype=torch.float64)
DOCUMENTS = {"cu_seqlens_q": torch.tensor([0, 1, 1, 3]), "cu_seqlens_k": torch.tensor([0, 2, 2, 4])}

# Name: (L, S, options). What is added to the scores, and the sinks, are differentiated, too.
CASES = {
    "window": (3, 4, {"window": (1, 0)}),
    "queries that see nothing": (4, 2, {**BLIND, "window": (1, -1)}),
    "documents": (3, 4, {**DOCUMENTS, "is_causal": True}),
    "softcap": (3, 4, {"softcap": 1.5}),
    "alibi": (3, 4, {"alibi_slopes": SLOPES, "causal_alignment": "bottom_right"}),
    "sinks": (3, 4, {"sinks": normal(2), "is_causal": True}),
    "mask of keys": (3, 4, {"attn_mask": normal(1, 2, 1, 4)}),
    "mask of pairs": (3, 4, {"attn_mask": normal(3, 4).masked_fill(~random_mask(3, 4), -torch.inf),
                             "softcap": 2.0}),
    "dropout": (3, 4, {"dropout_p": 0.4}),
    "everything": (3, 4, {
        **DOCUMENTS, "causal_alignment": "bottom_right", "window": (1, 1), "softcap": 2.0,
        "alibi_slopes": SLOPES[None], "sinks": normal(2), "attn_mask": normal(2, 3, 1),
        "dropout_p": 0.3,
    }),
}  # fmt: skip


class Case:
    """Inputs that are differentiated, and functions of them: a scalar of every output."""

    def __init__(self, name: str):
        L, S, self.options = CASES[name]
        self.options = dict(self.options)
        self.sizes = Sizes(1, 2, L, S)
        self.inputs = random_qkv(1, 2, 1, L, S, 2, 2)
        self.learnt = [k for k in ("attn_mask", "sinks") if k in self.options]
        self.inputs += [self.options.pop(k) for k in self.learnt]

    def keep(self, backend):
        """Among torch's functions, what a call of the package drops."""
        p = self.options.get("dropout_p")
        return {"keep": kept(backend.device, self.sizes, p, SEED)} if p else {}

    def function(self, of, **keep):
        """Of the inputs: output and lse, which is 0 for queries that see nothing."""

        def run(query, key, value, *learnt):
            # Made where the call is, so that it is on the device of the query.
            options = {
                k: v.to(query.device) if isinstance(v, torch.Tensor) else v
                for k, v in self.options.items()
            }
            options.update(zip(self.learnt, learnt, strict=True))
            if not torch.compiler.is_compiling():
                torch.manual_seed(SEED)
            output, lse = of(query, key, value, **options, **keep, enable_gqa=True, return_lse=True)
            return output, lse.masked_fill(lse == -torch.inf, 0)

        return run

    def scalar(self, of, **keep):
        """No linear function of any output, so that each upstream gradient has derivatives."""
        outputs_of = self.function(of, **keep)

        def run(*inputs):
            output, lse = outputs_of(*inputs)
            return output.square().sum() + (output.sum(-1) * lse.sin()).sum()

        return run

    def leaves(self):
        return [x.clone().requires_grad_() for x in self.inputs]


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def close(got, want, tol=1e-10):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# ---- finite differences ----


@pytest.mark.interpreted(case=["everything"])
def test_derivatives_disagree_with_finite_differences(one_isa, case):
    function = case.function(one_isa.attention)
    assert torch.autograd.gradcheck(
        function,
        case.leaves(),
        fast_mode=True,
        check_forward_ad=True,
        check_batched_grad=True,
        check_undefined_grad=True,
    )
    if one_isa.interpreted:  # the second order is made of torch operations for every kernel
        return
    assert torch.autograd.gradgradcheck(
        function,
        case.leaves(),
        fast_mode=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("name", ["softcap", "everything"])
def test_third_derivatives_disagree_with_finite_differences(best_native, name):
    """They are made of torch operations for every kernel."""
    case = Case(name)
    scalar = case.scalar(best_native.attention)
    directions = [random_like(x, 9) for x in case.inputs]

    def curvature(*inputs):
        slopes = torch.autograd.grad(scalar(*inputs), inputs, create_graph=True)
        along = sum((g * v).sum() for g, v in zip(slopes, directions, strict=True))
        return torch.autograd.grad(along, inputs, create_graph=True)

    assert torch.autograd.gradcheck(curvature, case.leaves(), fast_mode=True)


# ---- transforms ----


def every(x):
    return tuple(range(len(x)))


def tangents(x):
    return tuple(random_like(y, 3) for y in x)


TRANSFORMS = {
    "grad": lambda f, x: grad(f, every(x))(*x),
    "jvp": lambda f, x: jvp(f, tuple(x), tangents(x)),
    "jacfwd": lambda f, x: jacfwd(f, every(x), randomness="same")(*x),
    "hessian": lambda f, x: jacfwd(jacrev(f, every(x)), every(x), randomness="same")(*x),
    "jacrev(jacrev)": lambda f, x: jacrev(jacrev(f, every(x)), every(x))(*x),
    "grad(jvp)": lambda f, x: grad(lambda *y: jvp(f, y, tangents(x))[1], every(x))(*x),
    "vmap(grad)": lambda f, x: vmap(grad(f, every(x)), randomness="same")(
        *(torch.stack([y, y.flip(-1), y / 2]) for y in x)
    ),
    "vmap(hessian)": lambda f, x: vmap(
        jacfwd(jacrev(f, every(x)), every(x), randomness="same"), randomness="same"
    )(*(torch.stack([y, y / 2]) for y in x)),
}  # fmt: skip


@pytest.mark.interpreted(case=["everything"])
@pytest.mark.interpreted(
    case=["queries that see nothing", "mask of keys"], transform=["grad", "jvp", "vmap(grad)"]
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_an_option_is_zero_or_wrong(one_isa, case, transform):
    run = TRANSFORMS[transform]
    keep = case.keep(one_isa)
    got = one_isa.on_device(lambda *x: run(case.scalar(attention), x))(*case.inputs)
    close(got, run(case.scalar(composed_attention, **keep), case.inputs), 1e-9)


NAMES = "query", "key", "value", "attn_mask", "sinks"


def everything_of(function):
    """Gradients, output and lse of all five, for masks and sinks beside other options."""
    options = {"softcap": 2.0, "window": (2, 0), "causal_alignment": "bottom_right"}

    def both(query, key, value, mask, sinks):
        return function(
            query, key, value, mask, sinks=sinks, enable_gqa=True, return_lse=True, **options
        )

    def scalar(*inputs):
        output, lse = both(*inputs)
        return output.square().sum() + (output.sum(-1) * lse.sin()).sum()

    return lambda *inputs: (*grad(scalar, every(inputs))(*inputs), *both(*inputs))


@pytest.mark.interpreted(dim=[0], moved=[("query",), ("attn_mask",), NAMES])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("moved", [*((name,) for name in NAMES), NAMES[3:], NAMES], ids=str)
def test_vmap_over_one_input_mixes_its_batch(one_isa, moved, dim):
    """Output, lse and all gradients, of the ones without a batch, too; for sequences of a batch
    beside vmap's own, and masks for each of them or for all.
    """
    shapes = [(2, 1, 3, 4), (1, 2, 1, 4), (3, 1)]
    for shape in shapes[:1] if one_isa.interpreted else shapes:
        inputs = [*random_qkv(2, 2, 1, 3, 4, 2, 2), normal(*shape), normal(2)]
        in_dims = tuple(dim if name in moved else None for name in NAMES)
        batched = [
            torch.stack([x, x.sin(), x / 2]).movedim(0, dim).contiguous() if name in moved else x
            for name, x in zip(NAMES, inputs, strict=True)
        ]
        got = one_isa.on_device(vmap(everything_of(attention), in_dims))(*batched)
        for i in range(3):
            sample = [
                x.select(dim, i) if name in moved else x
                for name, x in zip(NAMES, batched, strict=True)
            ]
            close(tuple(x[i] for x in got), everything_of(composed_attention)(*sample))


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # before it is refused
def test_vmap_over_slopes_or_documents_is_wrong(best_kernel):
    """Slopes have a batch without a gradient; boundaries cannot, and say so."""
    query, key, value = random_qkv(2, 2, 2, 5, 5)
    slopes = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    run = best_kernel.on_device(vmap(lambda s: attention(query_, key_, value_, alibi_slopes=s)))
    query_, key_, value_ = best_kernel.placed((query, key, value))
    want = [composed_attention(query, key, value, alibi_slopes=s) for s in slopes]
    close(run(slopes), torch.stack(want))
    close(run(slopes[:, 0]), torch.stack([
        composed_attention(query, key, value, alibi_slopes=s) for s in slopes[:, 0]
    ]))  # fmt: skip
    several = best_kernel.placed(torch.tensor([[0, 2, 5], [0, 4, 5]]))
    with pytest.raises(RuntimeError, match="same cu_seqlens for the whole batch"):
        vmap(lambda cu: attention(query_, key_, value_, cu_seqlens_q=cu))(several)
    cu = best_kernel.placed(torch.tensor([0, 2, 5]))
    got = best_kernel.on_device(vmap(lambda q: attention(q, key_, value_, cu_seqlens_q=cu)))(
        torch.stack([query, 2 * query])
    )
    want = [composed_attention(q, key, value, cu_seqlens_q=cu.cpu()) for q in (query, 2 * query)]
    close(got, torch.stack(want))


# ---- dropout under vmap ----


def weights_of(inputs):
    """A function of a batch of queries whose result is what dropout leaves of the weights."""
    _, key, _ = inputs
    identity = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:3], -1)

    def run(query):
        value = identity.to(query.device)
        return attention(query, key.to(query.device), value, dropout_p=0.4)

    return run


def test_vmaps_error_mode_lets_dropout_pass(one_isa):
    """As torch's own dropout, which raises of the same kind."""
    inputs = random_qkv(1, 2, 2, 4, 6)
    query = torch.stack([inputs[0]] * 3)
    with pytest.raises(RuntimeError, match="randomness") as expected:
        vmap(lambda x: torch.nn.functional.dropout(x, 0.4))(query)
    with pytest.raises(RuntimeError, match="randomness") as raised:
        one_isa.on_device(vmap(weights_of(inputs)))(query)
    assert raised.type is expected.type


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmaps_randomness_is_another(one_isa, randomness):
    """The same weights dropped in each sample, or others; a batch in each sample has others in
    either case. Also where the inputs have no batch, and only the seeds do.
    """
    inputs = random_qkv(2, 2, 2, 16, 24)
    query = inputs[0].expand(3, *inputs[0].shape)
    run = weights_of(inputs)
    seeds_only = vmap(
        lambda _, query: run(query), (0, None), randomness=randomness
    )  # fmt: skip
    for batched, arguments in (
        (vmap(run, randomness=randomness), (query,)),
        (seeds_only, (torch.arange(3), query[0])),
    ):
        torch.manual_seed(SEED)
        got = one_isa.on_device(batched)(*arguments)
        left = got != 0
        plain = torch.softmax(inputs[0] @ inputs[1].mT * 8**-0.5, -1).expand_as(got)
        close(got[left], plain[left] / 0.6)
        assert abs(float(left.double().mean()) - 0.6) <= 5 * (0.24 / left.numel()) ** 0.5
        assert not torch.equal(left[0, 0], left[0, 1])
        if randomness == "same":
            want = kept(one_isa.device, Sizes(2, 2, 16, 24), 0.4, SEED)
            assert torch.equal(left, want.expand_as(left))
        else:  # of independent masks as many agree as by chance
            for a, b in ((0, 1), (0, 2), (1, 2)):
                agree = float((left[a] == left[b]).double().mean())
                assert abs(agree - 0.52) <= 5 * (0.25 / left[a].numel()) ** 0.5


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_the_backward_of_vmap_drops_other_weights(one_isa, randomness):
    """The output is linear in the value: <upstream, output> = <gradient, value> if both passes
    dropped the same weights, in each sample.
    """
    query, key, value = random_qkv(6, 2, 1, 5, 7)
    batch = [x.unflatten(0, (3, 2)) for x in (query, key, value)]
    upstream = random_like(batch[0])
    leaves = [x.requires_grad_() for x in batch]
    run = vmap(functools.partial(attention, dropout_p=0.4, enable_gqa=True), randomness=randomness)
    out = one_isa.on_device(run)(*leaves)
    gradients = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    dims = (1, 2, 3, 4)
    close((upstream * out).sum(dims), (gradients[2] * leaves[2]).sum(dims))
    again = torch.autograd.grad(out, leaves, upstream)
    close(gradients, again, 0)

    def of_sample(query, key, value, upstream):
        def along(query, key, value):
            output = attention(query, key, value, dropout_p=0.4, enable_gqa=True)
            return (output * upstream).sum(), output

        first, output = grad(along, (0, 1, 2), has_aux=True)(query, key, value)
        return (output * upstream).sum(), (first[2] * value).sum()

    batch = [x.detach() for x in batch]
    both = one_isa.on_device(vmap(of_sample, randomness=randomness))(*batch, upstream)
    close(*both)


# ---- graphs ----


def test_a_second_backward_through_create_graph_is_wrong(one_isa, case):
    def second(of, **keep):
        leaves = case.leaves()
        first = torch.autograd.grad(case.scalar(of, **keep)(*leaves), leaves, create_graph=True)
        along = sum((g * random_like(g)).sum() for g in first)
        along.backward()
        return [*(g.detach() for g in first), *(x.grad for x in leaves)]

    close(second(one_isa.attention), second(composed_attention, **case.keep(one_isa)), 1e-9)


def test_a_retained_graph_keeps_its_first_upstream_gradient(one_isa, case):
    def twice(of, **keep):
        leaves = case.leaves()
        outputs = case.function(of, **keep)(*leaves)
        return [
            torch.autograd.grad(
                outputs, leaves, [random_like(x, seed) for x in outputs], retain_graph=True
            )
            for seed in (1, 2, 1)
        ]

    got = twice(one_isa.attention)
    close(got, twice(composed_attention, **case.keep(one_isa)))
    assert all(map(torch.equal, got[0], got[2]))


@pytest.mark.interpreted(case=["dropout", "everything"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_drops_other_weights(one_isa, case, use_reentrant):
    """It computes the forward again, with the generator's state of the first time."""
    leaves = case.leaves()
    outputs_of = case.function(one_isa.attention)
    plain = outputs_of(*leaves)
    upstream = [random_like(x) for x in plain]
    torch.autograd.backward(plain, upstream)
    want = [x.grad for x in leaves]
    again = case.leaves()
    seeded = functools.partial(checkpoint, outputs_of, use_reentrant=use_reentrant)
    torch.autograd.backward(seeded(*again), upstream)
    assert all(map(torch.equal, [x.grad for x in again], want))


def test_a_frozen_input_changes_the_gradients_of_the_others(one_isa):
    case = Case("everything")
    outputs_of = case.function(one_isa.attention)
    plain = case.leaves()
    upstream = [random_like(x) for x in outputs_of(*plain)]
    want = torch.autograd.grad(outputs_of(*plain), plain, upstream)
    for needed in ((0,), (1,), (2,), (3,), (4,), (3, 4), (0, 3), (1, 2, 4)):
        leaves = [x.clone().requires_grad_(i in needed) for i, x in enumerate(case.inputs)]
        outputs = [(x, g) for x, g in zip(outputs_of(*leaves), upstream) if x.requires_grad]  # noqa: B905
        torch.autograd.backward(*zip(*outputs, strict=True))
        for i, (x, gradient) in enumerate(zip(leaves, want, strict=True)):
            if i in needed:
                close(x.grad, gradient)
            else:
                assert x.grad is None


@pytest.mark.parametrize("changed", ["attn_mask", "sinks", "alibi_slopes", "lse"])
def test_a_changed_option_goes_unnoticed(best_kernel, changed):
    """Between forward and backward; lse is what the caller may change."""
    inputs = random_qkv(1, 2, 2, 5, 7)
    options = {
        "attn_mask": normal(5, 7), "sinks": normal(2), "alibi_slopes": SLOPES.clone()
    }  # fmt: skip
    inputs, options = best_kernel.placed((inputs, options))
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = attention(*leaves, **options, return_lse=True)
    want = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.no_grad():
        (lse if changed == "lse" else options[changed]).zero_()
    if changed == "lse":
        close(torch.autograd.grad(out.sum(), leaves), want, 0)
        return
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        out.sum().backward()


def test_a_second_derivative_of_an_option_allocates_the_scores(best_native, monkeypatch):
    """Its chunks have a constant size, here a small one: some thirty of 64 KiB are at once in
    memory; the scores would be 4 MiB.
    """
    monkeypatch.setattr(attention_forms, "_CHUNK", 1 << 14)
    length = 1024
    inputs = random_qkv(1, 1, 1, length, length, 8, 8, dtype=torch.float32)
    leaves = [*inputs, torch.zeros(length), torch.zeros(1)]
    leaves = [x.requires_grad_() for x in leaves]

    def second():
        out, lse = best_native.attention(
            *leaves[:4], sinks=leaves[4], softcap=3.0, dropout_p=0.1, window=(500, 0),
            return_lse=True,
        )  # fmt: skip
        first = torch.autograd.grad(out.sum() + lse.sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in first), leaves)

    assert best_native.peak_bytes(second) < length * length * 4


# ---- torch.compile ----


@pytest.mark.interpreted(case=["documents", "mask of keys", "everything"])
def test_the_compiled_function_of_an_option_is_wrong(one_isa, compiled, case):
    def gradients(function):
        leaves = case.leaves()
        torch.manual_seed(SEED)
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    run = one_isa.on_device(compiled(case.scalar(attention)))
    close(gradients(run), gradients(case.scalar(composed_attention, **case.keep(one_isa))))


@pytest.mark.interpreted(name=["mask of keys"])
@pytest.mark.parametrize("name", ["window", "documents", "sinks", "mask of keys", "alibi"])
def test_a_compiled_transform_of_an_option_is_zero_or_wrong(one_isa, compiled, name):
    case = Case(name)
    run = compiled(lambda *x: grad(case.scalar(attention), every(x))(*x))
    want = grad(case.scalar(composed_attention), every(case.inputs))(*case.inputs)
    close(one_isa.on_device(run)(*case.inputs), want)


def test_compiled_dropout_repeats_itself(best_kernel, compiled):
    """The seed is drawn at each call, not when the graph is made; as eager draws it."""
    inputs = random_qkv(1, 2, 2, 16, 24)
    plain = best_kernel.on_device(weights_of(inputs))
    run = best_kernel.on_device(compiled(weights_of(inputs)))
    for f in (plain, run):
        torch.manual_seed(SEED)
        f.first, f.second = f(inputs[0]), f(inputs[0])
    close(run.first, plain.first)
    close(run.second, plain.second)
    assert not torch.equal(run.first, run.second)


def test_documents_of_other_lengths_recompile_each_time(best_kernel):
    """The boundaries are tensors, whatever is in them."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs = random_qkv(1, 2, 2, 20, 20)
    run = torch.compile(
        lambda cu: attention(*best_kernel.placed(inputs), is_causal=True, cu_seqlens_q=cu),
        fullgraph=True,
        backend=counter,
    )
    for middle in (3, 7, 7, 19):
        cu = torch.tensor([0, middle, 20])
        got = best_kernel.on_device(run)(cu)
        close(got, composed_attention(*inputs, is_causal=True, cu_seqlens_q=cu))
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_boundaries_that_are_not_read_let_a_kernel_read_elsewhere(one_isa, compiled):
    """While a graph is made, as on a GPU, nobody looks at what is in them. Behind the last document
    a query sees nothing and a key is seen by none; whatever else is in them, no span leaves the
    keys, and nothing is read that is not there (fresh memory is NaN).
    """
    inputs = random_qkv(1, 2, 2, 9, 9)

    def call(query, key, value, cu):
        options = {"cu_seqlens_q": cu, "is_causal": True, "return_lse": True}
        return attention(query, key, value, **options)

    run = one_isa.on_device(compiled(call))
    output, lse = run(*inputs, torch.tensor([0, 4, 7]))
    want = composed_attention(
        *(x[:, :, :7] for x in inputs), is_causal=True, cu_seqlens_q=torch.tensor([0, 4, 7]),
        return_lse=True,
    )  # fmt: skip
    close((output[:, :, :7], lse[:, :, :7]), want)
    assert not output[:, :, 7:].any()
    assert (lse[:, :, 7:] == -torch.inf).all()
    if one_isa.name == "eager":
        return
    for cu in ([0, 40, 50], [0, 7, 3], [5, 2, 1], [-9, -3, 99], [3, 3, 3]):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output, lse = run(*leaves, torch.tensor(cu))
        gradients = torch.autograd.grad(output.sum(), leaves)
        assert all(x.isfinite().all() for x in (output, *gradients)), cu
        assert (output.abs() <= inputs[2].abs().max()).all(), "no mean of values"
        assert not lse.isnan().any()
