"""The further keywords of linear cross-entropy, and weights and smoothing: softcap, z-loss, lse,
shift, filter_eps, recompute. Values and gradients, arguments, and what must not change.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from linear_cases import (
    GRADIENTS,
    REDUCTIONS,
    composition,
    exact_linear,
    linear_results,
    random_problem,
    same_bits,
    without_rows,
)
from oracle import (
    DTYPES,
    FULL_DTYPES,
    REDUCED_DTYPES,
    half_ulp,
    random_like,
    random_probabilities,
    random_weight,
    relative_error,
)
from torch.func import hessian

import fastgpt

NAN = math.nan
SHARES = {
    "class": {},
    "weight": {"weight": random_weight(17)},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"weight": random_weight(17), "label_smoothing": 0.1},
}
KINDS = ("loss", "lse", *GRADIENTS)


def of_type(options, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def upstreams(n, reduction, dtype):
    return random_like(torch.empty(n if reduction == "none" else (), dtype=dtype)), random_like(
        torch.empty(n), 2
    )


def truth_of(problem, upstream, upstream_lse, *, reduction, weight=None, label_smoothing=0.0,
             softcap=None, z_loss=0.0):  # fmt: skip
    """By the names of `linear_results`, of rows that all count; the z-loss is written out: its mean
    is over the rows, whatever the weights.
    """
    target, n = problem.target, len(problem.input)
    options = {"weight": weight, "smoothing": label_smoothing, "softcap": softcap}
    g, z_mean, mean = upstream.double().expand(n), 1.0, 1.0
    if reduction == "mean":
        mean = z_mean = n
        if weight is not None and not target.is_floating_point():
            mean = float(weight.double()[target].sum())
    lse = torch.from_numpy(exact_linear(problem, torch.ones(n), **options).lse.astype(float))
    g_lse = upstream_lse.double() + 2 * z_loss * lse * g / z_mean
    truth = exact_linear(problem, g / mean, g_lse, **options)
    loss = truth.loss / mean + z_loss * truth.lse**2 / z_mean
    found = {"loss": loss if reduction == "none" else loss.sum(keepdims=True)}
    return found | {name: getattr(truth, name) for name in (*KINDS[1:], "grad_target")}


# ---- accuracy ----


def agrees_with_the_truth(backend, dtype, of_probabilities, reduction, **options):
    problem = random_problem(23, 17, 9, dtype=dtype, scale=3)
    if of_probabilities:
        kept = torch.ones(23, dtype=torch.bool)
        q = random_probabilities(torch.empty(23, 17), dtype)
        problem = problem._replace(target=q)
    else:
        problem.target[::5] = -100
        kept = problem.target != -100
        problem.input[~kept] = NAN
    upstream, upstream_lse = upstreams(23, reduction, dtype)
    found = linear_results(
        backend.linear_cross_entropy, problem, upstream, upstream_lse,
        reduction=reduction, **options,
    )  # fmt: skip
    assert found["lse"].dtype == torch.promote_types(dtype, torch.float32)
    assert not found["lse"][~kept].any()
    assert not found["grad_input"][~kept].any()
    g = upstream if upstream.dim() == 0 else upstream[kept]
    want = truth_of(
        without_rows(problem, kept), g, upstream_lse[kept], reduction=reduction, **options
    )
    u = 64 * half_ulp(torch.promote_types(dtype, torch.float32))
    for name in (*KINDS, *(("grad_target",) if of_probabilities else ())):
        got = found[name]
        if name in ("lse", "grad_input") or (name == "loss" and reduction == "none"):
            got = got[kept]
        # Its own rounding, and that of S before it is multiplied.
        rounded = (2 if name.startswith("grad") else 1) * half_ulp(dtype)
        rounded = 0.0 if dtype in FULL_DTYPES or name == "lse" else rounded
        assert relative_error(got.reshape(want[name].shape), want[name]) <= rounded + u, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("of", ["classes", "probabilities"])
def test_a_combination_of_options_and_ignored_rows_is_wrong(native_backend, of, reduction, dtype):
    """Ignored rows hold NaN: their loss and lse are 0 and their gradient is exactly 0."""
    for shares in SHARES.values():
        for extras in ({}, {"softcap": 4.0}, {"z_loss": 0.3}, {"softcap": 4.0, "z_loss": 0.3}):
            options = {**of_type(shares, dtype), **extras}
            agrees_with_the_truth(
                native_backend, dtype, of == "probabilities", reduction, **options
            )


@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("of", ["classes", "probabilities"])
def test_a_combination_of_options_is_wrong_in_eager(eager, of, reduction, dtype):
    for shares in SHARES.values():
        for extras in ({}, {"softcap": 4.0, "z_loss": 0.3}):
            options = {**of_type(shares, dtype), **extras}
            agrees_with_the_truth(eager, dtype, of == "probabilities", reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [10, 50])
@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"label_smoothing": 0.1, "weight": True}])
def test_an_error_exceeds_twice_torchs(native_backend, options, scale, dtype):
    """Where tanh is off by its last bit, so is the logit by that of the softcap; and smoothing and
    weights have roundings of their own, four of the accumulator's.
    """
    options = {**options, "reduction": "none"}
    if "weight" in options:
        options["weight"] = random_weight(97, dtype)
    softcap = options.get("softcap", 0.0)
    problem = random_problem(40, 97, 24, dtype=dtype, scale=scale)
    g, g_lse = upstreams(40, "none", dtype)
    truth = truth_of(problem, g, g_lse, **options)
    ours, torchs = (
        linear_results(f, problem, g, g_lse, **options)
        for f in (native_backend.linear_cross_entropy, composition)
    )
    u = half_ulp(torch.promote_types(dtype, torch.float32))
    for name in KINDS:
        error, allowed = (relative_error(x[name], truth[name]) for x in (ours, torchs))
        assert error <= 2 * allowed + (4 + softcap / 2) * u, name


# ---- lse ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_lse_has_another_shape_than_the_unreduced_loss(linear_one_isa, reduction):
    x, W, b, t = random_problem(6, 5, 3, dtype=torch.bfloat16)
    several = torch.stack([W, W * 2], 1)
    options = {"return_lse": True, "reduction": reduction}
    for arguments, shape in (
        ((x, W, t), (6,)),
        ((x[0], W, t[0]), ()),
        ((x, several, torch.stack([t, t], 1)), (6, 2)),
        ((x.view(2, 3, 3), W, t.view(2, 3)), (2, 2)),
    ):
        shift = {"shift": True} if arguments[0].dim() == 3 else {}
        loss, lse = linear_one_isa.linear_cross_entropy(*arguments, **options, **shift)
        assert lse.shape == shape
        assert lse.dtype == torch.float32
        assert loss.shape == (shape if reduction == "none" else ())
        assert loss.dtype == torch.bfloat16
    _, lse = linear_one_isa.linear_cross_entropy(x, W, t, linear_bias=b, return_lse=True)
    want = torch.logsumexp(F.linear(x.double(), W.double(), b.double()), 1)
    u = 1e-6 if linear_one_isa.name == "native" else half_ulp(torch.bfloat16)
    torch.testing.assert_close(lse.double(), want, rtol=u, atol=u)


# ---- recompute ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_recomputing_changes_the_result(native_backend, reduction, dtype):
    """To the bits with an upstream gradient of 1, and else by the rounding of a product."""
    problem = random_problem(23, 37, 9, dtype=dtype)
    problem.target[4] = -100
    for options in ({}, {"z_loss": 0.1, "label_smoothing": 0.1}):
        for value in (1.0, 1.7):
            upstream = torch.full((23,) if reduction == "none" else (), value, dtype=dtype)
            plain, again = (
                linear_results(
                    native_backend.linear_cross_entropy, problem, upstream,
                    reduction=reduction, recompute=recompute, **options,
                )
                for recompute in (False, True)
            )  # fmt: skip
            assert torch.equal(plain["loss"], again["loss"])
            u = 8 * half_ulp(torch.promote_types(dtype, torch.float32))
            u += 2 * half_ulp(dtype) if dtype in REDUCED_DTYPES else 0.0
            for name in GRADIENTS:
                size = float(again[name].abs().max())
                torch.testing.assert_close(plain[name], again[name], rtol=u, atol=u * size)


def test_the_forward_forms_gradients_that_nobody_wants(best_native):
    """Only where one is asked for: not under no_grad, and not of frozen tensors."""
    x, W, b, t = random_problem(8, 9, 3)
    with torch.profiler.profile() as profile:
        fastgpt.linear_cross_entropy(x, W, t, linear_bias=b)
        W.requires_grad_()
        with torch.no_grad():
            fastgpt.linear_cross_entropy(x, W, t, linear_bias=b)
        fastgpt.linear_cross_entropy(x, W, t, linear_bias=b, recompute=True)
    names = [event.name for event in profile.events()]
    assert names.count("fastgpt::linear_cross_entropy_forward") == 3
    assert "fastgpt::linear_cross_entropy_backward" not in names
    with torch.profiler.profile() as profile:
        loss = fastgpt.linear_cross_entropy(x, W, t, linear_bias=b)
        loss.backward()
    names = [event.name for event in profile.events()]
    assert names.count("fastgpt::linear_cross_entropy_backward") == 1
    assert "fastgpt::linear_cross_entropy_forward" not in names


# ---- shift ----

SEQUENCES = [(2, 5), (1, 1), (3, 1), (0, 4), (2, 0), (0, 0), (1, 2), (4, 3)]


def sequences(B, T, classes=6, features=3, dtype=torch.float64, of="classes"):
    x, W, b, t = random_problem(B * T, classes, features, dtype=dtype)
    if of == "probabilities":
        t = random_probabilities(torch.empty(B * T, classes), dtype).view(B, T, classes)
    else:
        t = t.view(B, T)
    return x.view(B, T, features), W, t, b


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("of", ["classes", "bytes", "probabilities"])
@pytest.mark.parametrize("shape", SEQUENCES, ids=str)
def test_next_tokens_are_others(linear_one_isa, shape, of, reduction):
    """Those of the same sequence: against the composition that slices inputs and targets."""
    x, W, t, b = sequences(*shape, of=of)
    t = t.to(torch.uint8) if of == "bytes" else t
    indices = [None, -1, 2] if of == "classes" else [None]
    for ignore_index in indices:
        for options in ({}, {"weight": random_weight(6), "z_loss": 0.1, "label_smoothing": 0.1}):
            options = {**options, "reduction": reduction, "ignore_index": ignore_index}
            found = []
            for function in (linear_one_isa.linear_cross_entropy, composition):
                leaves = [a.clone().requires_grad_() for a in (x, W, b)]
                target = t.clone().requires_grad_() if t.is_floating_point() else t
                if of == "bytes" and function is composition:
                    target = t.long()  # torch's mean with weights takes no bytes
                leaves += [target] if t.is_floating_point() else []
                loss, lse = function(
                    leaves[0], leaves[1], target, linear_bias=leaves[2], shift=True,
                    return_lse=True, **options,
                )  # fmt: skip
                gradients = torch.autograd.grad(
                    (loss, lse), leaves, (random_like(loss), random_like(lse, 2))
                )
                found.append([loss, lse, *gradients])
            torch.testing.assert_close(*found, equal_nan=True)
            if reduction == "none":
                assert found[0][0].shape == (shape[0], max(0, shape[1] - 1))


def test_a_shift_crosses_a_row(linear_backend):
    """Each sequence has the loss that it has alone; what the last position holds, and what the
    first target is, reach nothing.
    """
    x, W, t, b = sequences(3, 4, dtype=torch.float32)
    x[:, -1] = NAN
    t[:, 0] = 10**9

    def loss(x, t):
        return linear_backend.linear_cross_entropy(
            x, W, t, linear_bias=b, shift=True, reduction="none"
        )

    leaf = x.clone().requires_grad_()
    together = loss(leaf, t)
    assert together.isfinite().all()
    (gradient,) = torch.autograd.grad(together.sum(), leaf)
    assert torch.equal(gradient[:, -1], torch.zeros(3, 3))
    assert gradient.isfinite().all()
    for i in range(3):
        torch.testing.assert_close(loss(x[i : i + 1], t[i : i + 1]), together[i : i + 1])
        want = F.cross_entropy(F.linear(x[i, :-1], W, b), t[i, 1:], reduction="none")
        torch.testing.assert_close(together[i], want)


@pytest.mark.parametrize("of", ["classes", "probabilities"])
def test_a_shift_of_strided_sequences_is_wrong(linear_one_isa, of):
    x, W, t, b = sequences(5, 4, of=of)
    options = {"linear_bias": b, "shift": True, "reduction": "none"}
    want = composition(x, W, t, **options)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    targets = t.transpose(0, 1).contiguous().transpose(0, 1)
    got = linear_one_isa.linear_cross_entropy(strided, W, targets, **options)
    torch.testing.assert_close(got, want)
    longer = torch.cat([x, x], 1)[:, :4]
    torch.testing.assert_close(linear_one_isa.linear_cross_entropy(longer, W, t, **options), want)


@pytest.mark.parametrize("of", ["classes", "probabilities"])
def test_a_shift_under_a_transform_is_wrong(linear_one_isa, of):
    x, W, t, b = sequences(2, 3, of=of)
    got, want = (
        hessian(lambda W, f=f: f(x, W, t, linear_bias=b, shift=True, z_loss=0.1))(W)
        for f in (fastgpt.linear_cross_entropy, composition)
    )
    torch.testing.assert_close(got, want)


# ---- filter_eps ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.05, 0.3])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
def test_a_filter_drops_more_than_it_says(native_backend, options, eps, dtype):
    """With the identity for a matrix, the input's gradient is that of the logits: off by at most
    filter_eps times the row's upstream gradient. The loss is exact.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(29, 40, generator=generator)).to(dtype)
    target = torch.randint(40, (29,), generator=generator)
    target[3] = -100
    upstream = random_like(logits[:, 0])
    found = []
    for filter_eps in (None, eps):
        leaf = logits.clone().requires_grad_()
        loss, lse = native_backend.linear_cross_entropy(
            leaf, torch.eye(40, dtype=dtype), target, reduction="none", filter_eps=filter_eps,
            return_lse=True, **options,
        )  # fmt: skip
        found.append((loss, lse, *torch.autograd.grad(loss, leaf, upstream)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    error = (found[1][2].double() - found[0][2].double()).abs()
    rounded = 2 * half_ulp(dtype) * found[0][2].double().abs()
    assert (error <= eps * upstream.double().abs().unsqueeze(1) + rounded).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_filter_drops_nothing(native_backend, reduction, recompute):
    """Classes that are improbable in every row get no gradient at all; the others what they had."""
    x, W, b, t = random_problem(33, 400, 8, dtype=torch.float32)
    b[200:] = -30.0
    problem = (x, W, b, t % 200)

    def gradients(**options):
        leaves = [a.clone().requires_grad_() for a in problem[:3]]
        loss = native_backend.linear_cross_entropy(
            leaves[0], leaves[1], problem[3], linear_bias=leaves[2], reduction=reduction,
            recompute=recompute, **options,
        )  # fmt: skip
        return torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    exact, filtered = gradients(), gradients(filter_eps=1e-7)
    assert exact[1][200:].any()
    assert not filtered[1][200:].any()
    assert not filtered[2][200:].any()
    scale = 33 if reduction == "mean" else 1
    for got, want in zip(filtered, exact, strict=True):
        torch.testing.assert_close(got * scale, want * scale, rtol=1e-5, atol=1e-4)


def test_a_filter_changes_what_must_be_exact(linear_one_isa):
    """Second derivatives, and eager."""
    x, W, _, t = random_problem(5, 6, 2)
    got, want = (
        hessian(lambda W, o=o: fastgpt.linear_cross_entropy(x, W, t, **o))(W)
        for o in ({"filter_eps": 0.2}, {})
    )
    assert torch.equal(got, want)
    if linear_one_isa.name == "eager":
        problem, one = random_problem(5, 6, 2), torch.tensor(1.0, dtype=torch.float64)
        assert same_bits(
            linear_results(linear_one_isa.linear_cross_entropy, problem, one, filter_eps=0.2),
            linear_results(linear_one_isa.linear_cross_entropy, problem, one),
        )


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"z_loss": -1e-4}, ValueError, "z_loss >= 0, got -0.0001"),
        ({"z_loss": NAN}, ValueError, "finite z_loss"),
        ({"z_loss": "1"}, TypeError, "z_loss must be a float, got '1'"),
        ({"softcap": -3.0}, ValueError, "softcap >= 0, got -3"),
        ({"softcap": math.inf}, ValueError, "finite softcap"),
        ({"softcap": "30"}, TypeError, "softcap must be a float, got '30'"),
        ({"return_lse": 1}, TypeError, "return_lse must be a bool, got 1"),
        ({"process_group": "world"}, TypeError, "process_group must be a torch.distributed"),
        ({"shift": 1}, TypeError, "shift must be a bool, got 1"),
        ({"recompute": "yes"}, TypeError, "recompute must be a bool, got 'yes'"),
        ({"filter_eps": "auto"}, TypeError, "filter_eps must be a float or None, got 'auto'"),
        ({"filter_eps": -0.1}, ValueError, "0 <= filter_eps < 1, got -0.1"),
        ({"filter_eps": 1.0}, ValueError, "0 <= filter_eps < 1, got 1"),
        ({"filter_eps": NAN}, ValueError, "0 <= filter_eps < 1, got nan"),
    ],
    ids=str,
)
def test_a_bad_option_is_accepted(linear_one_isa, options, error, text):
    x, W, _, t = random_problem(4, 5, 3)
    with pytest.raises(error, match=text) as raised:
        fastgpt.linear_cross_entropy(x, W, t, **options)
    assert str(raised.value).startswith("linear_cross_entropy: ")


@pytest.mark.parametrize(
    ("x", "W", "target", "error", "text"),
    [
        ((4, 3), (5, 3), (4,), RuntimeError, r"input \(B, T, D\) .*\[4, 3\]"),
        ((3,), (5, 3), (), RuntimeError, r"input \(B, T, D\)"),
        ((2, 4, 3), (5, 2, 3), (2, 4, 2), RuntimeError, r"linear_weight \(C, D\)"),
        ((2, 4, 3), (5, 3), (2, 3), ValueError, r"target \[2, 4\] or \[2, 4, 5\]"),
        ((2, 4, 3), (5, 3), (8,), ValueError, r"target \[2, 4\]"),
        ((2, 4, 3), (5, 2), (2, 4), RuntimeError, "3 and 2"),
    ],
    ids=str,
)
def test_a_shift_of_other_shapes_is_accepted(x, W, target, error, text):
    with pytest.raises(error, match=text):
        fastgpt.linear_cross_entropy(
            torch.zeros(x), torch.zeros(W), torch.zeros(target).long(), shift=True
        )


def test_a_shifted_target_out_of_range_is_accepted(linear_backend):
    x, W, t, _ = sequences(2, 4)
    t[1, 2] = 6
    with pytest.raises(IndexError, match="Target 6 is out of bounds"):
        linear_backend.linear_cross_entropy(x, W, t, shift=True)
    with pytest.raises(RuntimeError, match=r"Long|dtype"):
        linear_backend.linear_cross_entropy(x, W, t.int(), shift=True)


def test_zero_or_none_is_not_the_default(linear_one_isa):
    x, W, _, t = random_problem(4, 5, 3)
    want = linear_one_isa.linear_cross_entropy(x, W, t)
    for options in (
        {"softcap": 0.0}, {"softcap": None}, {"z_loss": 0}, {"return_lse": False},
        {"filter_eps": 0}, {"filter_eps": None}, {"shift": False}, {"ignore_index": -100},
    ):  # fmt: skip
        assert torch.equal(linear_one_isa.linear_cross_entropy(x, W, t, **options), want)


def test_the_module_loses_a_keyword(linear_one_isa):
    x, W, t, b = sequences(2, 4)
    options = {
        "weight": random_weight(6), "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0,
        "return_lse": True, "shift": True, "recompute": True, "ignore_index": 2,
        "reduction": "none",
    }  # fmt: skip
    module = fastgpt.LinearCrossEntropyLoss(3, 6, bias=True, dtype=torch.float64, **options)
    with torch.no_grad():
        module.linear.weight.copy_(W)
        module.linear.bias.copy_(b)
    assert fastgpt.explain(module, x, t).backend == linear_one_isa.name
    torch.testing.assert_close(module(x, t), composition(x, W, t, linear_bias=b, **options))
    filtered = fastgpt.LinearCrossEntropyLoss(3, 6, filter_eps=1.5)
    with pytest.raises(ValueError, match="filter_eps"):
        filtered(x.float(), t)
