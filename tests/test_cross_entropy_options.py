"""Softcap, lse and z-loss of cross-entropy: values, gradients, extremes, arguments, determinism."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    FULL_DTYPES,
    REDUCED_DTYPES,
    exact_options,
    half_ulp,
    random_like,
    random_logits,
    random_probabilities,
    random_weight,
    relative_error,
    torchs_composition,
)

import fastgpt

pytestmark = pytest.mark.cuda_on_host

NAN, INF = math.nan, math.inf
REDUCTIONS = ["none", "mean", "sum"]


def both_gradients(function, inputs, upstream, upstream_lse):
    """loss, lse and the gradients of the inputs, for upstream gradients of loss and lse."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss, lse = function(*leaves)
    outputs = (loss, lse)
    gradients = torch.autograd.grad(outputs, leaves, (upstream, upstream_lse.to(lse.dtype)))
    return [loss.detach(), lse.detach(), *gradients]


# ---- accuracy ----

CLASSES = (1, 2, 17, 65, 97, 1025, 4099, 50257)


def rows_for(classes: int) -> int:
    return max(3, min(2000 // classes, 40))


@pytest.mark.interpreted(dtype=FULL_DTYPES, classes=(1, 2, 17, 1025, 4099))
@pytest.mark.interpreted(dtype=REDUCED_DTYPES, classes=(17, 1025))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("shares", ["class", "weight+smoothing"])
def test_a_kernels_error_exceeds_that_of_torchs_composition(
    kernel, shares, softcap, classes, dtype
):
    """Beyond the error of torch's functions on the same input, half an ulp: the one more rounding
    of an output that torch happened to round well. Weights, smoothing and softcap have roundings of
    their own, four of the accumulator's; and where tanh is off by its last bit, y is by an ulp of
    up to the softcap, which p = exp(y - lse) has as a relative error.
    """
    options = {"softcap": softcap, "reduction": "none", "return_lse": True}
    weight, smoothing = None, 0.0
    if shares != "class":
        weight, smoothing = random_weight(classes, dtype), 0.1
        options |= {"weight": weight, "label_smoothing": smoothing}
    u = half_ulp(torch.promote_types(dtype, torch.float32))
    for scale in (1, 10, 50):
        logits, target = random_logits(rows_for(classes), classes, dtype=dtype, scale=scale)
        upstream, upstream_lse = random_like(logits[:, 0]), random_like(logits[:, 0], 2)
        truth = exact_options(logits, target, upstream, upstream_lse, weight, smoothing, softcap)
        ours, torchs = (
            both_gradients(
                lambda x, t=target, f=f: f(x, t, **options), [logits], upstream, upstream_lse
            )
            for f in (kernel.cross_entropy, torchs_composition)
        )
        assert ours[0].dtype == ours[2].dtype == dtype
        assert ours[1].dtype == torch.promote_types(dtype, torch.float32)
        for name, got, torchs_own, want in zip(
            ("loss", "lse", "gradient"), ours, torchs, truth[:3], strict=True
        ):
            error, allowed = relative_error(got, want), relative_error(torchs_own, want)
            own = 4 if softcap or weight is not None else 0
            if softcap and name == "gradient":
                own += softcap / 2
            assert error <= allowed + half_ulp(got.dtype) + own * u, (name, scale)


SHARES = {
    "class": {},
    "weight": {"weight": random_weight(17)},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"weight": random_weight(17), "label_smoothing": 0.1},
}


def of_type(options, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_a_combination_of_options_and_ignored_rows_is_wrong(
    backend, z_loss, softcap, shares, reduction, dtype
):
    """Ignored rows hold NaN: their loss and lse are 0 and their gradient is exactly 0. The z-loss
    is in the mean over the rows that count, whatever the weights; here it is written out.
    """
    logits, target = random_logits(23, 17, dtype=dtype, scale=3)
    target[::5] = -100
    kept = target != -100
    logits[~kept] = NAN
    options = of_type(SHARES[shares], dtype)
    weight, smoothing = options.get("weight"), options.get("label_smoothing", 0.0)
    extras = {"softcap": softcap, "z_loss": z_loss}
    upstream = random_like(torch.empty(23 if reduction == "none" else (), dtype=dtype))
    upstream_lse = random_like(torch.empty(23), 2)
    loss, lse, gradient = both_gradients(
        lambda x: backend.cross_entropy(
            x, target, reduction=reduction, return_lse=True, **options, **extras
        ),
        [logits], upstream, upstream_lse,
    )  # fmt: skip
    assert loss.dtype == gradient.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert not lse[~kept].any()
    assert not gradient[~kept].any()

    def truth_for(g, g_lse):
        return exact_options(logits[kept], target[kept], g, g_lse, weight, smoothing, softcap)

    g, z_mean, mean = upstream.double().expand(23)[kept], 1.0, 1.0
    if reduction == "mean":
        z_mean = int(kept.sum())
        mean = float(weight.double()[target[kept]].sum()) if weight is not None else z_mean
    ones = torch.ones_like(g)
    want_lse = torch.from_numpy(truth_for(ones, None).lse.astype(float))
    g_lse = upstream_lse[kept].double() + 2 * z_loss * want_lse * g / z_mean
    truth = truth_for(g / mean, g_lse)
    want_loss = truth.loss / mean + z_loss * truth.lse**2 / z_mean
    if reduction == "none":
        assert not loss[~kept].any()
        loss = loss[kept]
    else:
        want_loss = want_loss.sum(keepdims=True)
    u = 32 * half_ulp(torch.promote_types(dtype, torch.float32))
    assert relative_error(loss.reshape(-1), want_loss) <= half_ulp(dtype) + u
    assert relative_error(lse[kept], truth.lse) <= u
    assert relative_error(gradient[kept], truth.gradient) <= half_ulp(dtype) + u


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_ignoring_every_row_ends_otherwise_than_in_torch(backend, z_loss, reduction):
    """The mean of no rows is NaN, their sum is 0, and their gradient is 0."""
    logits = torch.full((5, 17), NAN)
    target = torch.full((5,), -100)
    options = {"softcap": 4.0, "z_loss": z_loss, "reduction": reduction}
    leaf = logits.clone().requires_grad_()
    loss, lse = backend.cross_entropy(leaf, target, return_lse=True, **options)
    want = F.cross_entropy(torch.ones(5, 17), target, reduction=reduction)
    torch.testing.assert_close(loss, want, rtol=0, atol=0, equal_nan=True)
    assert not lse.any()
    (gradient,) = torch.autograd.grad(loss.sum() + lse.sum(), leaf)
    assert not gradient.any()


@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [17, 1025])
def test_a_softcap_far_above_the_logits_costs_accuracy(backend, classes, dtype):
    """Where |x| << softcap, y is x to the last bits."""
    logits, target = random_logits(9, classes, dtype=dtype)
    upstream, upstream_lse = random_like(logits[:, 0]), random_like(logits[:, 0], 2)
    u = half_ulp(dtype)
    for softcap in (1e3, 1e6, 1e12, 1e30):
        truth = exact_options(logits, target, upstream, upstream_lse, softcap=softcap)
        got = both_gradients(
            lambda x, k=softcap: backend.cross_entropy(
                x, target, softcap=k, reduction="none", return_lse=True
            ),
            [logits], upstream, upstream_lse,
        )  # fmt: skip
        for tensor, want in zip(got, truth[:3], strict=True):
            assert relative_error(tensor, want) <= 32 * u, softcap


@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
def test_small_capped_logits_lose_their_relative_accuracy(kernel, dtype):
    """tanh(x / k) of a small x by the subtraction of two exponentials would lose its digits. One
    class shows it: its lse is y itself.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    logits = (x * 10.0 ** -torch.arange(200).remainder(8)[:, None]).to(dtype)
    target = torch.zeros(200, dtype=torch.long)
    ones = torch.ones(200, dtype=dtype)
    truth = exact_options(logits, target, ones, ones, softcap=3.0)
    _, lse, gradient = both_gradients(
        lambda x: kernel.cross_entropy(x, target, softcap=3.0, reduction="none", return_lse=True),
        [logits], ones, ones,
    )  # fmt: skip
    assert (abs(lse.double().numpy() / truth.lse - 1) <= 8 * half_ulp(dtype)).all()
    assert (abs(gradient.double().numpy() / truth.gradient - 1) <= 16 * half_ulp(dtype)).all()


# ---- extremes ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 40, 1100])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_infinities_and_nan_end_otherwise_than_in_torchs_composition(
    backend, softcap, classes, dtype
):
    last, largest = classes - 1, torch.finfo(dtype).max
    logits, _ = random_logits(12, classes, dtype=dtype)
    logits[0] = -INF
    logits[1, last] = -INF  # the target
    logits[2, 1] = -INF
    logits[3, 1] = INF
    logits[4, last] = INF
    logits[5, 1] = NAN
    logits[6, last] = NAN
    logits[7, :last] = -INF
    logits[8, 1] = largest
    logits[9, last] = largest
    logits[10, :last] = -largest
    target = torch.full((12,), last)
    upstream, upstream_lse = random_like(logits[:, 0]), random_like(logits[:, 0], 2)
    options = {"softcap": softcap, "reduction": "none", "return_lse": True}
    got = both_gradients(
        lambda x: backend.cross_entropy(x, target, **options), [logits], upstream, upstream_lse
    )
    want = both_gradients(
        lambda x: torchs_composition(x, target, **options),
        [logits.double()], upstream.double(), upstream_lse.double(),
    )  # fmt: skip
    tol = 64 * half_ulp(dtype)
    usual = torch.ones(12, dtype=torch.bool)
    usual[3:7] = False  # whose lse has a test of its own
    got[1], want[1] = got[1][usual], want[1][usual]
    for ours, torchs in zip(got, want, strict=True):
        torchs = torchs.to(ours.dtype).double()
        torch.testing.assert_close(ours.double(), torchs, rtol=tol, atol=tol, equal_nan=True)
    assert got[1][0] == (-INF if softcap is None else pytest.approx(math.log(classes) - 5))
    assert got[0][11].isfinite()


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("of", ["rows", "columns"])
def test_the_lse_of_infinity_or_nan_differs_from_torchs(backend, of, value):
    """A NaN among the logits must not end as an lse of -inf, nor +inf as NaN."""
    if of == "columns" and backend.name == "triton":
        pytest.skip("its kernels read rows only")
    for classes in (5, 40, 1100):
        logits, _ = random_logits(9, classes)
        last = classes - 1
        target = torch.full((9,), last)
        logits[0, 1] = value
        logits[1, last] = value  # the target
        logits[2] = value
        logits[3, :last] = -INF
        logits[3, last] = value
        for softcap in (None, 5.0):
            y = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            x, t = (logits.t().contiguous()[None], target[None])
            if of == "rows":
                x, t = logits, target
            options = {"softcap": softcap, "reduction": "none", "return_lse": True}
            _, lse = backend.cross_entropy(x, t, **options)
            torch.testing.assert_close(lse.view(-1), torch.logsumexp(y, 1), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_whole_blocks_of_minus_infinity_give_nan(backend, softcap, dtype):
    logits, target = random_logits(3, 4200, dtype=dtype)
    logits[:, :4097] = -INF
    target[:] = torch.tensor([4097, 4199, 4150])
    ones = torch.ones(3, dtype=dtype)
    loss, lse, gradient = both_gradients(
        lambda x: backend.cross_entropy(
            x, target, softcap=softcap, reduction="none", return_lse=True
        ),
        [logits], ones, ones,
    )  # fmt: skip
    y = logits.double()
    want = torch.logsumexp(y if softcap is None else softcap * torch.tanh(y / softcap), 1)
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)
    assert loss.isfinite().all()
    assert not gradient[:, :4097].any()
    assert gradient.isfinite().all()


def test_the_lse_of_minus_infinity_is_not_minus_infinity(backend):
    for classes in (1, 3, 40, 1100):
        logits = torch.full((2, classes), -INF)
        target = torch.zeros(2, dtype=torch.long)
        _, lse = backend.cross_entropy(logits, target, return_lse=True)
        assert (lse == -INF).all()


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"z_loss": -1e-4}, ValueError, "z_loss >= 0, got -0.0001"),
        ({"z_loss": NAN}, ValueError, "finite z_loss"),
        ({"z_loss": INF}, ValueError, "finite z_loss"),
        ({"z_loss": "1"}, TypeError, "z_loss must be a float, got '1'"),
        ({"softcap": -3.0}, ValueError, "softcap >= 0, got -3"),
        ({"softcap": NAN}, ValueError, "finite softcap"),
        ({"softcap": INF}, ValueError, "finite softcap"),
        ({"softcap": "30"}, TypeError, "softcap must be a float, got '30'"),
        ({"return_lse": 1}, TypeError, "return_lse must be a bool, got 1"),
        ({"return_lse": "yes"}, TypeError, "return_lse must be a bool, got 'yes'"),
    ],
    ids=str,
)
def test_a_bad_option_is_accepted(one_isa, options, error, text):
    logits, target = random_logits(4, 5)
    with pytest.raises(error, match=text):
        one_isa.cross_entropy(logits, target, **options)


def test_zero_or_none_is_not_the_default(one_isa):
    logits, target = random_logits(4, 5)
    want = one_isa.cross_entropy(logits, target)
    for options in ({"softcap": 0.0}, {"softcap": None}, {"z_loss": 0}, {"return_lse": False}):
        assert torch.equal(one_isa.cross_entropy(logits, target, **options), want)


def test_the_module_loses_a_keyword(one_isa):
    logits, target = random_logits(6, 5, dtype=torch.float64)
    target[2] = -100
    options = {
        "weight": random_weight(5), "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0,
    }  # fmt: skip
    for return_lse in (False, True):
        module = fastgpt.CrossEntropyLoss(**options, return_lse=return_lse)
        assert fastgpt.explain(module, logits, target).backend == one_isa.name or (
            one_isa.device != "cpu"
        )
        got = one_isa.returned(module.to(one_isa.device)(*one_isa.placed((logits, target))))
        want = torchs_composition(logits, target, **options, return_lse=return_lse)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("legacy", "reduction"),
    [
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
        ({"size_average": True, "reduce": True}, "mean"),
        ({"size_average": False, "reduce": False}, "none"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
def test_legacy_reductions_forget_the_options(one_isa, legacy, reduction):
    logits, target = random_logits(6, 5, dtype=torch.float64)
    options = {"z_loss": 0.1, "softcap": 3.0, "return_lse": True}
    got = one_isa.cross_entropy(logits, target, **legacy, **options)
    torch.testing.assert_close(
        got, torchs_composition(logits, target, reduction=reduction, **options)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_byte_targets_lose_an_option(one_isa, reduction):
    logits, target = random_logits(6, 5, dtype=torch.float64)
    options = {"z_loss": 0.1, "softcap": 3.0, "return_lse": True, "reduction": reduction}
    for ignore_index in (-100, 2, 156):
        target[1] = 2
        got = one_isa.cross_entropy(
            logits, target.to(torch.uint8), ignore_index=ignore_index, **options
        )
        want = torchs_composition(logits, target, ignore_index=ignore_index, **options)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("of", ["classes", "probabilities"])
def test_an_empty_batch_ends_otherwise_than_in_torch(one_isa, of, shape, reduction):
    logits = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    if of == "probabilities":
        target = torch.empty(shape, dtype=torch.float64)
    options = {"z_loss": 0.1, "softcap": 3.0, "return_lse": True, "reduction": reduction}
    got = one_isa.on_device(fastgpt.cross_entropy)(logits, target, **options)
    # torch's own mean of no probabilities divides by the batch, which is not empty in (2, 5, 0).
    plain = logits.new_zeros(shape[:1] + shape[2:])
    want = {"none": plain, "sum": plain.sum(), "mean": plain.mean()}[reduction]
    torch.testing.assert_close(got, (want, plain), equal_nan=True)
    (gradient,) = torch.autograd.grad(got[0].sum() + got[1].sum(), logits)
    assert gradient.shape == shape


def test_unbatched_logits_lose_an_option(one_isa):
    logits, target = random_logits(1, 5, dtype=torch.float64)
    for reduction in REDUCTIONS:
        options = {"z_loss": 0.1, "softcap": 3.0, "return_lse": True, "reduction": reduction}
        got = one_isa.cross_entropy(logits[0], target[0], **options)
        want = torchs_composition(logits[0], target[0], **options)
        assert got[1].shape == ()
        torch.testing.assert_close(got, want)


# ---- determinism ----

KINDS = {
    "softcap": {"softcap": 5.0},
    "z_loss": {"z_loss": 0.1},
    "return_lse": {"return_lse": True},
    "all": {"softcap": 5.0, "z_loss": 0.1, "return_lse": True, "label_smoothing": 0.1},
    "probabilities": {"label_smoothing": 0.1},
    "K-dim": {"softcap": 5.0},
    "transposed K-dim": {"softcap": 5.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_bits_depend_on_the_number_of_threads(native_backend, reduction, kind, dtype, threads):
    logits, target = random_logits(5003, 33, dtype=dtype, scale=3)
    if "K-dim" in kind:
        logits = logits[:5000].view(4, 1250, 33).transpose(1, 2)
        target = target[:5000].view(4, 1250)
        if kind == "K-dim":
            logits = logits.contiguous()
    if kind == "probabilities":
        target = random_probabilities(logits)
    options = {"reduction": reduction, "weight": random_weight(33, dtype), **KINDS[kind]}
    results = []
    for count in (1, 3) if native_backend.twin else (1, 2, 3):  # the twin has a single one
        torch.set_num_threads(count)
        leaf = logits.detach().requires_grad_()
        outputs = native_backend.cross_entropy(leaf, target, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [random_like(x) for x in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaf, upstream)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
