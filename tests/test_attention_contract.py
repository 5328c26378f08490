"""The contract of torch's attention: shapes, dropout, exceptions; and which calls a kernel runs."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, Sizes
from oracle import (
    DTYPES,
    additive,
    attention_gradients,
    composed_attention,
    gradient_of,
    random_like,
    random_mask,
    random_qkv,
)
from torch.testing._internal.two_tensor import TwoTensor

import fastgpt

attention = fastgpt.scaled_dot_product_attention


def compare_with_torch(backend, inputs, **options):
    got, want = (
        attention_gradients(f, inputs, **options)
        for f in (backend.attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- shapes and masks ----


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_other_numbers_of_batch_dimensions_fail(backend, batch):
    inputs = [
        random_like(torch.empty(*batch, n, d, dtype=torch.float64), seed)
        for seed, (n, d) in enumerate([(5, 4), (7, 4), (7, 6)])
    ]
    compare_with_torch(backend, inputs)
    compare_with_torch(backend, inputs, is_causal=True, scale=0.3)
    compare_with_torch(backend, inputs, attn_mask=random_mask(5, 7))
    compare_with_torch(backend, inputs, attn_mask=additive(random_mask(*batch, 5, 7)))


@pytest.mark.parametrize("kind", ["bool", "additive", "bias", "a row of keys"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
def test_a_mask_and_is_causal_are_not_combined(backend, kind, shape):
    """Both must allow a position, as in torch's CPU kernel; its math backend refuses the pair."""
    allowed = random_mask(*shape)
    allowed[1:, 0] = False
    allowed[2, :3] = False
    mask = {
        "bool": allowed,
        "additive": additive(allowed),
        "bias": random_like(torch.empty(shape, dtype=torch.float64)),
        "a row of keys": allowed[-1:],
    }[kind]
    inputs = random_qkv(L=shape[0], S=shape[1])
    compare_with_torch(backend, inputs, attn_mask=mask, is_causal=True)


def test_an_additive_mask_has_another_gradient_than_in_torch():
    q, k, v = random_qkv()
    bias = random_like(torch.empty(5, 7, dtype=torch.float64))
    upstream = random_like(q)
    got, want = (
        gradient_of(lambda b, f=f: f(q, k, v, attn_mask=b), bias, upstream)
        for f in (attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(got, want)


def test_no_head_dim_or_key_and_value_heads_that_differ_fail(one_isa):
    query, key, value = random_qkv(Hq=4, H=4)
    ours = one_isa.on_device(attention)
    got = ours(query[..., :0], key[..., :0], value)
    torch.testing.assert_close(got, value.mean(2, keepdim=True).expand(got.shape))
    inputs = (query, key[:, :2], value)
    for options in ({}, {"is_causal": True}):
        got, want = (
            attention_gradients(f, inputs, enable_gqa=True, **options)
            for f in (ours, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- which calls the kernel runs ----


def test_what_no_kernel_covers_goes_to_eager_unannounced(best_kernel):
    """Each with its reason."""
    query, key, value = inputs = random_qkv(dtype=torch.float32)
    slopes = torch.zeros(2, requires_grad=True)
    two = TwoTensor(torch.zeros(2), torch.zeros(2))
    calls = [
        ("a gradient of alibi_slopes", inputs, {"alibi_slopes": slopes}),
        ("subclass", inputs, {"sinks": two}),
        ("subclass", inputs, {"alibi_slopes": two}),
        ("subclass", inputs, {"attn_mask": TwoTensor(torch.zeros(5, 7), torch.zeros(5, 7))}),
        ("512", random_qkv(D=513, Dv=8), {}),
        ("512", random_qkv(D=8, Dv=513), {}),
        ("empty", (query[:, :, :0], key, value), {}),
        ("empty", (query, key[:, :, :0], value[:, :, :0]), {}),
        ("empty", (query[:0], key[:0], value[:0]), {}),
        ("empty", (query[..., :0], key[..., :0], value), {}),
        ("subclass", [TwoTensor(x, x) for x in inputs], {}),
        ("type", [x.to(torch.float8_e4m3fn) for x in inputs], {}),
    ]
    for reason, args, options in calls:
        args, options = best_kernel.placed((args, options))
        explanation = fastgpt.explain(attention, *args, **options)
        assert explanation.backend == "eager", reason
        reasons = dict(explanation.decisions)
        assert reason in reasons[best_kernel.name]


def test_empty_tensors_differ_from_torch(one_isa):
    query, key, value = random_qkv()
    for inputs in (
        (query[:, :, :0], key, value),
        (query, key[:, :, :0], value[:, :, :0]),
        (query[:0], key[:0], value[:0]),
        (query, key, value[..., :0]),
    ):
        got, want = (
            attention_gradients(f, inputs)
            for f in (one_isa.on_device(attention), F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_the_kernel_covers_goes_to_eager(kernel, dtype):
    """Its whole range, by the assertion in `attention`; the values are tested elsewhere."""
    query, key, value = random_qkv(Hq=4, dtype=dtype)
    mask = random_mask(5, 7)
    with torch.no_grad():
        for options in (
            {},
            {"is_causal": True},
            {"scale": 0.3},
            {"attn_mask": mask},
            {"attn_mask": additive(mask, dtype)},
            {"attn_mask": additive(mask, torch.promote_types(dtype, torch.float32))},
            {"dropout_p": 0.1},
            {"alibi_slopes": torch.zeros(4, requires_grad=True)},  # of no gradient here
        ):
            kernel.attention(query, key, value, enable_gqa=True, **options)
        for head_dim, value_dim in ((1, 512), (512, 1)):
            kernel.attention(*random_qkv(D=head_dim, Dv=value_dim, dtype=dtype))
        for index in ((0, 0), (0,)):
            kernel.attention(*(x[index] for x in random_qkv(dtype=dtype)))
        kernel.attention(*(x[None] for x in random_qkv(dtype=dtype)))
    leaf = additive(mask, dtype).requires_grad_()
    kernel.attention(query, key, value, enable_gqa=True, attn_mask=leaf)


@pytest.mark.parametrize("name", CASES)
def test_an_option_the_kernel_covers_goes_to_eager(best_kernel, name):
    """In the graph of its backward, too: by the assertion in `attention`."""
    leaves = [x.requires_grad_() for x in random_qkv(1, 2, 1, 5, 7, dtype=torch.float32)]
    options = CASES[name](Sizes(1, 2, 5, 7, torch.float32))
    for key in ("attn_mask", "sinks"):
        if key in options:
            options[key].requires_grad_()
    best_kernel.attention(*leaves, enable_gqa=True, return_lse=True, **options)


def test_the_gradient_of_slopes_is_zero_or_wrong(best_kernel):
    """It is eager's, where the call can see that there is one; else the kernel refuses."""
    inputs = random_qkv(1, 2, 2, 5, 7)
    slopes = torch.tensor([0.3, 0.1], dtype=torch.float64)

    def squares(function):
        return lambda s: function(*inputs, alibi_slopes=s).square().sum()

    ours, theirs = squares(best_kernel.on_device(attention)), squares(composed_attention)
    one = torch.tensor(1.0, dtype=torch.float64)
    (got, want) = (gradient_of(f, slopes, one) for f in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        got, want = (transform(f)(slopes) for f in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    hidden = (
        lambda f: torch.func.jvp(f, (slopes,), (slopes,))[1],
        lambda f: torch.func.jacfwd(f)(slopes),
        lambda f: torch.func.grad(lambda s: torch.func.vmap(f)(s).sum())(slopes.expand(3, 2)),
    )
    for transform in hidden:
        with pytest.raises(RuntimeError, match=r"no gradient of alibi_slopes.*backend\(.eager.\)"):
            transform(ours)
        with fastgpt.backend("eager"):
            got, want = transform(ours), transform(theirs)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_explain_answers_for_another_call_than_the_one_that_runs(best_kernel):
    """It takes every keyword, checks it, and draws no seed."""
    inputs = best_kernel.placed(random_qkv(1, 2, 2, 7, 7))
    options = best_kernel.placed({
        "alibi_slopes": torch.zeros(2), "sinks": torch.zeros(2), "dropout_p": 0.1, "softcap": 2.0,
        "window": (1, 2), "causal_alignment": "bottom_right", "return_lse": True,
        "cu_seqlens_q": torch.tensor([0, 3, 7]),
    })  # fmt: skip
    state = torch.get_rng_state()
    explanation = fastgpt.explain(attention, *inputs, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert explanation.backend == best_kernel.name
    options["alibi_slopes"].requires_grad_()
    explanation = fastgpt.explain(attention, *inputs, **options)
    assert explanation.backend == "eager"
    assert f"{best_kernel.name}: a gradient of alibi_slopes" in str(explanation)
    with torch.no_grad():
        explanation = fastgpt.explain(attention, *inputs, **options)
    assert explanation.backend == best_kernel.name
    with pytest.raises(ValueError, match="window"):
        fastgpt.explain(attention, *inputs, window=3)


# ---- dropout ----


def test_dropout_is_biased_or_not_reproducible():
    q, k, v = random_qkv(B=1, Hq=2, H=2, L=8, S=32)
    want = attention(q, k, v)

    def sample(seed):
        torch.manual_seed(seed)
        return attention(q, k, v, dropout_p=0.3)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert not torch.equal(sample(1), want)
    samples = torch.stack([sample(seed) for seed in range(200)])
    assert (samples.mean(0) - want).abs().max() < 8 * (samples - want).std() / math.sqrt(200)
    torch.testing.assert_close(attention(q, k, v, dropout_p=0.0), want)
    assert not attention(q, k, v, dropout_p=1.0).any()


def test_dropout_drops_another_share():
    """With V the identity the output is the weights themselves: kept ones are divided by 1 - p."""
    q, k, _ = random_qkv(B=4, L=64, S=64)
    v = torch.eye(64, dtype=torch.float64).expand(4, 2, 64, 64)
    weights = attention(q, k, v)
    torch.manual_seed(0)
    dropped = attention(q, k, v, dropout_p=0.2)
    share = float((dropped == 0).double().mean())
    assert share == pytest.approx(0.2, abs=0.01)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.8)


def test_dropout_differs_between_forward_and_backward():
    q, k, v = random_qkv()
    torch.manual_seed(3)
    leaf = v.clone().requires_grad_()
    out = attention(q, k, leaf, dropout_p=0.4)
    upstream = random_like(out)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    # Linear in v: <upstream, out> = <gradient, v> only if both used the same mask.
    torch.testing.assert_close((upstream * out).sum(), (gradient * v).sum())


# ---- exceptions ----

Q, K, V = random_qkv(Hq=4, H=4, dtype=torch.float32)
BAD_CALLS = {
    "head_dim": ((Q, K[..., :5], V), {}),
    "types": ((Q, K.double(), V), {}),
    "integers": ((Q.int(), K.int(), V.int()), {}),
    "one dimension": ((Q[0, 0, 0], K[0, 0, 0], V[0, 0, 0]), {}),
    "mask of another shape": ((Q, K, V), {"attn_mask": random_mask(4, 7)}),
    "integer mask": ((Q, K, V), {"attn_mask": random_mask(5, 7).long()}),
    "float64 mask": ((Q, K, V), {"attn_mask": random_mask(5, 7).double()}),
    "heads without grouping": ((Q, K[:, :2], V[:, :2]), {}),
    "heads that do not divide": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}),
    "batch sizes": ((torch.cat([Q, Q[:1]]), K, V), {}),
    "mask with more heads": ((Q, K, V), {"attn_mask": random_mask(2, 8, 5, 7)}),
    "a list": (([1.0], K, V), {}),
    "a list for a mask": ((Q, K, V), {"attn_mask": [True]}),
    "scale of another type": ((Q, K, V), {"scale": "2"}),
    "scale that would learn": ((Q, K, V), {"scale": torch.tensor(1.0, requires_grad=True)}),
    "is_causal of another type": ((Q, K, V), {"is_causal": None}),
    "negative dropout": ((Q, K, V), {"dropout_p": -0.1}),
    "too much dropout": ((Q, K, V), {"dropout_p": 1.1}),
    "key elsewhere": ((Q, K.to("meta"), V), {}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_accepted_or_raises_another_type(name):
    args, options = BAD_CALLS[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever torch raises)
        F.scaled_dot_product_attention(*args, **options)
    with pytest.raises(type(expected.value)) as raised:
        attention(*args, **options)
    assert raised.type is expected.type


CU = torch.tensor([0, 2, 5])
QQ, KK, VV = random_qkv(Hq=4, H=4, L=5, S=5, dtype=torch.float32)

# Keyword arguments; the exception; and what its message says: the keyword, what it expected, what
# it found.
BAD_OPTIONS = {
    "an alignment of another name": (
        {"causal_alignment": "top_right"}, ValueError,
        ["causal_alignment", "'top_left' or 'bottom_right'", "'top_right'"],
    ),
    "no alignment": (
        {"causal_alignment": None}, ValueError, ["causal_alignment", "'bottom_right'", "None"]
    ),
    "a window of one side": ({"window": 3}, ValueError, ["window (left, right)", "integers", "3"]),
    "a window of three sides": ({"window": (1, 2, 3)}, ValueError, ["window", "(1, 2, 3)"]),
    "a window below -1": ({"window": (-2, 0)}, ValueError, ["window", ">= -1", "(-2, 0)"]),
    "a window of floats": ({"window": (1.0, 0)}, ValueError, ["window", "integers", "(1.0, 0)"]),
    "a window of text": ({"window": "12"}, ValueError, ["window", "integers", "'12'"]),
    "a negative softcap": ({"softcap": -1.0}, ValueError, ["softcap", ">= 0", "-1.0"]),
    "an infinite softcap": ({"softcap": math.inf}, ValueError, ["softcap", "finite", "inf"]),
    "a softcap that is no number": ({"softcap": math.nan}, ValueError, ["softcap", "nan"]),
    "a softcap of text": ({"softcap": "5"}, TypeError, ["softcap", "float", "'5'"]),
    "a softcap that would learn": (
        {"softcap": torch.tensor(5.0)}, TypeError, ["softcap", "float", "tensor(5.)"]
    ),
    "slopes of another shape": (
        {"alibi_slopes": torch.zeros(3)}, RuntimeError,
        ["alibi_slopes", "[4] or [2, 4]", "got [3]"],
    ),
    "slopes of another batch": (
        {"alibi_slopes": torch.zeros(1, 4)}, RuntimeError,
        ["alibi_slopes", "[4] or [2, 4]", "got [1, 4]"],
    ),
    "a list of slopes": (
        {"alibi_slopes": [0.1] * 4}, TypeError, ["alibi_slopes", "floating-point Tensor", "list"]
    ),
    "integer slopes": (
        {"alibi_slopes": torch.ones(4).int()}, TypeError,
        ["alibi_slopes", "floating-point", "torch.int32"],
    ),
    "slopes elsewhere": (
        {"alibi_slopes": torch.zeros(4, device="meta")}, RuntimeError,
        ["alibi_slopes", "device of query, cpu", "got meta"],
    ),
    "sinks of another shape": (
        {"sinks": torch.zeros(2, 4)}, RuntimeError, ["sinks", "[4]", "got [2, 4]"]
    ),
    "a number for sinks": ({"sinks": 0.5}, TypeError, ["sinks", "floating-point Tensor", "float"]),
    "integer sinks": (
        {"sinks": torch.zeros(4).long()}, TypeError, ["sinks", "floating-point", "torch.int64"]
    ),
    "sinks elsewhere": (
        {"sinks": torch.zeros(4, device="meta")}, RuntimeError,
        ["sinks", "device of query, cpu", "got meta"],
    ),
    "return_lse of another type": (
        {"return_lse": 1}, TypeError, ["return_lse", "bool", "got 1"]
    ),
    "boundaries of keys alone": (
        {"cu_seqlens_k": CU}, ValueError, ["cu_seqlens_q", "cu_seqlens_k", "None"]
    ),
    "a list of boundaries": (
        {"cu_seqlens_q": [0, 5]}, TypeError, ["cu_seqlens_q", "int32 or int64 Tensor", "list"]
    ),
    "boundaries of another type": (
        {"cu_seqlens_q": CU.short()}, TypeError, ["cu_seqlens_q", "int32", "torch.int16"]
    ),
    "boundaries of floats": (
        {"cu_seqlens_q": CU, "cu_seqlens_k": CU.float()}, TypeError,
        ["cu_seqlens_k", "int32", "torch.float32"],
    ),
    "boundaries of two dimensions": (
        {"cu_seqlens_q": CU[None]}, RuntimeError, ["cu_seqlens_q", "(documents + 1,)", "[1, 3]"]
    ),
    "no document": (
        {"cu_seqlens_q": CU[:1]}, RuntimeError, ["cu_seqlens_q", "(documents + 1,)", "[1]"]
    ),
    "more documents of keys": (
        {"cu_seqlens_q": CU, "cu_seqlens_k": torch.tensor([0, 1, 2, 5])}, RuntimeError,
        ["cu_seqlens_k", "as many documents", "[4]", "[3]"],
    ),
    "boundaries elsewhere": (
        {"cu_seqlens_q": CU.to("meta")}, RuntimeError,
        ["cu_seqlens_q", "device of query, cpu", "got meta"],
    ),
    "boundaries that begin later": (
        {"cu_seqlens_q": torch.tensor([1, 5])}, ValueError,
        ["cu_seqlens_q", "from 0 to 5", "[1, 5]"],
    ),
    "boundaries that end before": (
        {"cu_seqlens_q": torch.tensor([0, 4])}, ValueError,
        ["cu_seqlens_q", "from 0 to 5", "[0, 4]"],
    ),
    "boundaries that fall": (
        {"cu_seqlens_q": torch.tensor([0, 3, 2, 5])}, ValueError,
        ["cu_seqlens_q", "rise", "[0, 3, 2, 5]"],
    ),
    "boundaries of keys that end before": (
        {"cu_seqlens_q": CU, "cu_seqlens_k": torch.tensor([0, 2, 4])}, ValueError,
        ["cu_seqlens_k", "from 0 to 5", "[0, 2, 4]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_accepted_or_its_message_says_too_little(name):
    options, error, parts = BAD_OPTIONS[name]
    with pytest.raises(error) as raised:
        attention(QQ, KK, VV, **options)
    assert raised.type is error
    for part in ("scaled_dot_product_attention", *parts):
        assert part in str(raised.value), part
    with pytest.raises(error):
        fastgpt.explain(attention, QQ, KK, VV, **options)


def test_boundaries_of_queries_that_do_not_fit_the_keys_are_accepted():
    with pytest.raises(ValueError, match=r"cu_seqlens_k.*from 0 to 7.*\[0, 2, 5\]"):
        attention(Q, K, V, cu_seqlens_q=CU)


def test_an_option_may_be_given_by_place():
    """Like torch's function, whose last argument may be given so, and no more."""
    with pytest.raises(TypeError):
        attention(Q, K, V, None, 0.0, False, None, False, "top_left")


def test_none_or_zero_is_not_the_default_of_an_option():
    want = attention(Q, K, V)
    got = attention(
        Q, K, V, causal_alignment="top_left", window=None, softcap=None, alibi_slopes=None,
        sinks=None, return_lse=False, cu_seqlens_q=None, cu_seqlens_k=None,
    )  # fmt: skip
    assert torch.equal(got, want)
    assert torch.equal(attention(Q, K, V, softcap=0), want)
    assert torch.equal(attention(Q, K, V, softcap=0.0, window=(-1, -1)), want)


def test_a_tensor_subclass_is_not_asked_for_an_option():
    """Each tensor among the keywords may have a __torch_function__, which sees all of them."""
    seen = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append((function, kwargs))
            return "asked"

    zeros = torch.zeros(4).as_subclass(Asked)
    everything = {
        "causal_alignment": "bottom_right", "window": (1, 2), "softcap": 2.0, "return_lse": True
    }  # fmt: skip
    for name in ("alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "attn_mask"):
        assert attention(QQ, KK, VV, **{name: zeros}, **everything) == "asked"
        function, kwargs = seen.pop()
        assert function is attention
        assert kwargs[name] is zeros
        assert everything.items() <= kwargs.items()


def test_fewer_values_than_keys_are_accepted():
    """torch's CPU kernel takes them, and reads past the end of the values."""
    few = V[:, :, :5]
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_only, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(Q, K, few)
    with pytest.raises(RuntimeError):
        attention(Q, K, few)
