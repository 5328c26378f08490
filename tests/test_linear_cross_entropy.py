"""Values and gradients of linear cross-entropy: accuracy, tile edges, extremes, strides, bits.

What the kernels hold beside them is in test_linear_cross_entropy_memory.py.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from linear_cases import (
    GRADIENTS,
    REDUCTIONS,
    LinearProblem,
    composition,
    exact_linear,
    linear_results,
    random_problem,
    same_bits,
)
from oracle import (
    DTYPES,
    REDUCED_DTYPES,
    half_ulp,
    random_like,
    random_probabilities,
    random_weight,
    relative_error,
    within_half_ulp,
)

import fastgpt
from fastgpt.ops.cross_entropy import Options
from fastgpt.ops.linear_cross_entropy import LAUNCHERS

NAN, INF = math.nan, math.inf
CLASSES = (1, 2, 5, 6, 7, 95, 96, 97, 191, 192, 193, 400)
FEATURES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 33)
ROWS = range(1, 36)


def accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def _forget_problems():
    yield
    edges.cache_clear()
    accuracy_problems.cache_clear()
    torchs_errors.cache_clear()


# ---- every edge of a tile ----


@functools.cache
def edges(classes, dtype):
    """For each number of rows a problem of as many, of some number of features, and the truth."""
    found = []
    # Every number of rows in float32, and each other one in the other types.
    for n in ROWS if dtype == torch.float32 else ROWS[DTYPES.index(dtype) % 2 :: 2]:
        features = FEATURES[(3 * n + classes) % len(FEATURES)]
        problem = random_problem(n, classes, features, dtype=dtype, scale=2, seed=n)
        upstream = random_like(torch.empty(n, dtype=accumulator(dtype)))
        upstream_lse = random_like(upstream, 2)
        found.append(
            (problem, upstream, upstream_lse, exact_linear(problem, upstream, upstream_lse))
        )
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_a_tile_edge_is_wrong(native_backend, classes, dtype):
    """The raw operators, whose results are in the accumulator's type. Each number may be off by
    the rounding of S to the inputs' type, of all terms of its sum, and by the arithmetic of the
    logits, which a factor of their length bounds.
    """
    forward, backward = LAUNCHERS["native"]
    for problem, upstream, upstream_lse, truth in edges(classes, dtype):
        arguments = (*problem, None, *Options())
        loss, lse = forward(*arguments)
        again_loss, again_lse, *gradients = backward(
            upstream, upstream_lse, None, *arguments, 0.0, True, True, True
        )
        n, features = problem.input.shape
        where = (n, features)
        u = half_ulp(accumulator(dtype)) * (64 + 2 * features + classes / 4)
        for got, want in ((loss, truth.loss), (lse, truth.lse)):
            assert (abs(got.double().numpy() - want) <= u * np.maximum(1, abs(want))).all(), where
        for got, want in ((again_loss, loss), (again_lse, lse)):
            torch.testing.assert_close(got, want, rtol=u, atol=u)
        x, W = (v.double().numpy() for v in (problem.input, problem.linear_weight))
        S = abs(truth.of_logits)
        # An error of the logits moves S by as much of the upstream gradients, which in S itself may
        # all but cancel.
        p = np.exp(x @ W.T + problem.linear_bias.double().numpy() - truth.lse[:, None])
        moved = abs(upstream.numpy()) + abs(upstream_lse.numpy())
        arithmetic = S + moved[:, None] * p * (1 - p)

        def terms(of_logits, x=x, W=W):
            return of_logits @ abs(W), of_logits.T @ abs(x), of_logits.sum(0)

        of_s = half_ulp(dtype) if dtype in REDUCED_DTYPES else 0.0
        sizes = zip(terms(S), terms(arithmetic), strict=True)
        for name, got, (rounded, formed) in zip(GRADIENTS, gradients, sizes, strict=True):
            assert got.dtype == accumulator(dtype)
            error = abs(got.double().numpy() - getattr(truth, name))
            assert (error <= of_s * rounded + u * formed).all(), (name, where)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_depends_on_which_others_are_wanted(native_backend, dtype):
    """And one that is not is no memory: an empty tensor."""
    problem = random_problem(37, 101, 19, dtype=dtype)
    upstream = random_like(torch.empty(37, dtype=accumulator(dtype)))
    arguments = (upstream, None, None, *problem, None, *Options(), 0.0)
    backward = LAUNCHERS["native"].backward
    want = backward(*arguments, True, True, True)
    for flags in itertools.product((False, True), repeat=3):
        got = backward(*arguments, *flags)
        for all_of_it, some, asked in zip(want, got, (True, True, *flags), strict=True):
            if asked:
                assert torch.equal(some, all_of_it), flags
            else:
                assert some.numel() == 0, flags


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_upstream_gradient_of_lse_squared_is_wrong(native_backend, dtype):
    """What the raw operator takes so that a z-loss needs no second pass: 2 h lse is added to the
    upstream gradient of lse.
    """
    problem = random_problem(21, 50, 17, dtype=dtype, scale=2)
    g, g_lse, h = (random_like(torch.empty(21, dtype=accumulator(dtype)), i) for i in range(3))
    arguments = (*problem, None, *Options(), 0.0, True, True, True)
    backward = LAUNCHERS["native"].backward
    lse = exact_linear(problem, g).lse.astype(float)
    truth = exact_linear(problem, g, g_lse.double() + 2 * h.double() * torch.from_numpy(lse))
    got = backward(g, g_lse, h, *arguments)
    of_s = half_ulp(dtype) if dtype in REDUCED_DTYPES else 0.0
    for name, gradient in zip(GRADIENTS, got[2:], strict=True):
        want = getattr(truth, name)
        assert relative_error(gradient, want) <= of_s + 64 * half_ulp(accumulator(dtype)), name
    truth = exact_linear(problem, g, 2 * h.double() * torch.from_numpy(lse))
    alone = backward(g, None, h, *arguments)
    assert relative_error(alone[3], truth.grad_weight) <= of_s + 64 * half_ulp(accumulator(dtype))


# ---- accuracy ----

KINDS = ("loss", *GRADIENTS)


@functools.cache
def accuracy_problems(scale, dtype):
    found = []
    for seed in (0, 1):
        problem = random_problem(67, 257, 48, dtype=dtype, scale=scale, seed=seed)
        found.append((problem, random_like(problem.input[:, 0], seed + 2)))
    return found


def pooled_errors(function, scale, dtype, reduction) -> dict[str, float]:
    """The largest errors of loss and gradients, each relative to the largest magnitude of its own
    truth.
    """
    worst = dict.fromkeys(KINDS, 0.0)
    for problem, upstream in accuracy_problems(scale, dtype):
        g = upstream if reduction == "none" else upstream[0]
        rows = upstream if reduction == "none" else upstream[:1].double().expand(67) / 67
        truth = exact_linear(problem, rows)
        wanted = {name: getattr(truth, name) for name in KINDS}
        if reduction == "mean":
            wanted["loss"] = truth.loss.mean(keepdims=True)
        found = linear_results(function, problem, g, reduction=reduction)
        for kind, want in wanted.items():
            assert found[kind].dtype == dtype
            worst[kind] = max(worst[kind], relative_error(found[kind].reshape(want.shape), want))
    return worst


@functools.cache
def torchs_errors(*problem):
    return pooled_errors(composition, *problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, 10, 50])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_error_exceeds_twice_torchs(native_backend, reduction, scale, dtype):
    """Of torch's product and cross-entropy in the same type, on the same input. The mean loss is
    one number, which torch may happen to round well; it gets the rounding that it must have.
    """
    ours = pooled_errors(native_backend.linear_cross_entropy, scale, dtype, reduction)
    torchs = torchs_errors(scale, dtype, reduction)
    for kind, error in ours.items():
        own = 2 * half_ulp(dtype) if kind == "loss" and reduction == "mean" else 0.0
        assert error <= 2 * torchs[kind] + own, kind


@pytest.mark.parametrize("dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sixteen_bit_losses_are_rounded_more_than_once(native_backend, reduction, dtype):
    """The loss is formed in float32 from logits in float32, and rounded to 16 bits at its end."""
    for scale in (1, 10, 50):
        problem = random_problem(61, 257, 32, dtype=dtype, scale=scale)
        loss = native_backend.linear_cross_entropy(**problem._asdict(), reduction=reduction)
        truth = exact_linear(problem, torch.ones(61)).loss
        if reduction != "none":
            truth = truth.sum(keepdims=True) / (61 if reduction == "mean" else 1)
        # The logits are sums in float32 of terms that are larger than they.
        slack = 32 * half_ulp(torch.float32) * max(1, scale)
        assert abs(loss.double().numpy() - truth).max() <= (
            half_ulp(dtype) * abs(truth).max() + slack * (61 if reduction == "sum" else 1)
        )
        if scale == 1:
            assert within_half_ulp(loss.reshape(-1), truth, 1e-5)


def confident_row(margin, dtype, seed):
    """One row whose logits are exact in every type, and whose target is `margin` above the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (1, 9), generator=generator)
    W = torch.randint(-2, 3, (33, 9), generator=generator) / 4
    logits = (x @ (4 * W).long().t())[0] / 4
    t = int(torch.randint(33, (), generator=generator))
    b = torch.zeros(33)
    others = torch.cat([logits[:t], logits[t + 1 :]])
    b[t] = others.max() - logits[t] + margin
    return LinearProblem(x.to(dtype), W.to(dtype), b.to(dtype), torch.tensor([t]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_confident_rows_lose_their_loss_or_target_gradient(native_backend, reduction, dtype):
    """Where p_t -> 1 the loss is log1p(rest), and what the target's class gets -sum of the others':
    to a few ulp of itself, where 1 + rest and p - 1 would have lost them. PEERS: 20 to 100 % off.
    """
    slack = 2e-6 if dtype != torch.float64 else 1e-14
    of_s = half_ulp(dtype) if dtype in REDUCED_DTYPES else 0.0  # of S, where it multiplies x
    for margin, seed in itertools.product((5, 8, 15), range(5)):
        problem = confident_row(margin, dtype, seed)
        upstream = torch.tensor([1.375], dtype=dtype)
        found = linear_results(
            native_backend.linear_cross_entropy, problem,
            upstream if reduction == "none" else upstream[0], reduction=reduction,
        )  # fmt: skip
        truth = exact_linear(problem, upstream)
        t = int(problem.target)
        assert within_half_ulp(found["loss"].reshape(1), truth.loss, slack)
        assert within_half_ulp(found["grad_bias"][t], truth.grad_bias[t], slack)
        assert found["grad_bias"][t] < 0
        assert within_half_ulp(found["grad_weight"][t], truth.grad_weight[t], slack + of_s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("margin", [5, 15])
def test_confident_rows_in_eager_are_worse_than_torchs(eager, margin, dtype):
    """Eager's bound at p -> 1 is torch's: an absolute error of a few ulp of 1."""
    problem = confident_row(margin, dtype, 0)
    upstream = torch.ones(1, dtype=dtype)
    found = linear_results(eager.linear_cross_entropy, problem, upstream, reduction="none")
    truth = exact_linear(problem, upstream)
    bound = half_ulp(dtype) * abs(truth.grad_bias) + 8 * half_ulp(accumulator(dtype))
    assert (abs(found["grad_bias"].double().numpy() - truth.grad_bias) <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_chunks_adds_up_as_an_error(native_backend, dtype):
    """20,000 rows: a matrix gradient that was summed in 16 bits, or a loss in float32 one by one,
    drifts away with the chunks (PEERS: torch's loss by 14 % at 256 of them).
    """
    n = 20000
    problem = random_problem(n, 33, 5, dtype=dtype)
    found = linear_results(
        native_backend.linear_cross_entropy,
        problem,
        torch.tensor(1.0, dtype=dtype),
        reduction="sum",
    )
    truth = exact_linear(problem, torch.ones(n))
    u = 2e-6
    assert abs(float(found["loss"]) / truth.loss.sum() - 1) <= half_ulp(dtype) + u
    for name in ("grad_weight", "grad_bias"):
        rounded = 2 * half_ulp(dtype) if dtype in REDUCED_DTYPES else 0.0
        assert relative_error(found[name], getattr(truth, name)) <= rounded + 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_losses_of_many_rows_lose_their_sum(native_backend, dtype):
    """Where a sum one by one in float32 would be off by a factor of the rounding of its total."""
    n = 70000
    x, W = torch.ones(n, 1, dtype=dtype), torch.tensor([[1.7], [0.0], [0.0]], dtype=dtype)
    target = torch.zeros(n, dtype=torch.int64)
    want = n * math.log1p(2 * math.exp(-float(W[0, 0])))
    total = native_backend.linear_cross_entropy(x, W, target, reduction="sum")
    assert float(total) == pytest.approx(want, rel=1e-6 + 1.001 * half_ulp(dtype))
    leaf = W.clone().requires_grad_()
    formed = native_backend.linear_cross_entropy(x, leaf, target, reduction="sum")
    assert torch.equal(formed, total)
    (gradient,) = torch.autograd.grad(formed, leaf)
    p = 1 / (2 + math.exp(float(W[0, 0])))
    rounded = half_ulp(dtype) if dtype in REDUCED_DTYPES else 0.0
    for got, want in zip(gradient.flatten().tolist(), (-2 * n * p, n * p, n * p), strict=True):
        # A running sum of 70,000 in float32 may lose this much; one in bfloat16 stops at 256 terms.
        assert got == pytest.approx(want, rel=5e-4 + 2 * rounded)


# ---- extremes ----


def compare_with_torch(backend, problem, *, reduction="none", tol=None, **options):
    """Loss and gradients against torch's on the float64 of the input, NaN and infinities alike."""
    n, dtype = len(problem.input), problem.input.dtype
    upstream = random_like(torch.empty(n if reduction == "none" else (), dtype=dtype))
    options["reduction"] = reduction
    wide_options = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    x, W, b, t = problem
    doubles = LinearProblem(x.double(), W.double(), None if b is None else b.double(), t)
    got = linear_results(backend.linear_cross_entropy, problem, upstream, **options)
    want = linear_results(composition, doubles, upstream.double(), **wide_options)
    u = 64 * half_ulp(dtype) if tol is None else tol
    for name, ours in got.items():
        torch.testing.assert_close(
            ours.double(), want[name], rtol=u, atol=u, equal_nan=True, msg=lambda m, n=name: n + m
        )
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_classes_of_minus_infinity_give_nan(linear_backend, reduction, dtype):
    """A bias of -inf takes a class away: all of the first tiles, and single classes elsewhere."""
    problem = random_problem(9, 601, 7, dtype=dtype)
    problem.linear_bias[:530] = -INF
    problem.linear_bias[540::9] = -INF
    alive = (problem.linear_bias > -INF).nonzero().flatten()
    problem = problem._replace(target=alive[problem.target % len(alive)])
    found = compare_with_torch(linear_backend, problem, reduction=reduction)
    dead = problem.linear_bias == -INF
    assert all(x.isfinite().all() for x in found.values())
    assert not found["grad_weight"][dead].any()
    assert not found["grad_bias"][dead].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_of_minus_infinity_is_not_infinite(linear_backend, dtype):
    problem = random_problem(5, 40, 7, dtype=dtype)
    problem.linear_bias[3] = -INF
    problem.target[:] = torch.tensor([3, 1, 2, 3, 5])
    loss = linear_backend.linear_cross_entropy(**problem._asdict(), reduction="none")
    assert torch.equal(loss == INF, problem.target == 3)
    assert loss[[1, 2, 4]].isfinite().all()
    problem.linear_bias[:] = -INF
    loss = linear_backend.linear_cross_entropy(**problem._asdict(), reduction="none")
    assert loss.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_logits_beyond_the_type_of_the_inputs_overflow(native_backend, dtype):
    """Products of float16 numbers that no float16 holds are finite logits in float32."""
    x = torch.full((3, 16), 100.0, dtype=dtype)
    W = torch.zeros(40, 16, dtype=dtype)
    W[0], W[1], W[2] = 100.0, 99.0, -100.0
    target = torch.tensor([0, 1, 2])
    problem = LinearProblem(x, W, None, target)
    found = linear_results(
        native_backend.linear_cross_entropy, problem, torch.ones(3, dtype=dtype), reduction="none"
    )
    assert found["loss"].tolist()[:2] == [0.0, 1600.0]
    assert float(found["loss"][2]) == (320000.0 if dtype != torch.float16 else INF) or (
        dtype == torch.bfloat16 and abs(float(found["loss"][2]) / 320000 - 1) < half_ulp(dtype)
    )
    assert found["grad_input"].isfinite().all()
    assert found["grad_weight"].isfinite().all()


@pytest.mark.parametrize("where", ["input", "linear_weight", "linear_bias"])
def test_nan_is_lost_or_spreads_to_another_row(linear_backend, where):
    """NaN in an input is that row's alone; in a class it is every row's."""
    problem = random_problem(9, 131, 19, dtype=torch.float32)
    upstream = random_like(problem.input[:, 0])

    def run(problem):
        return linear_results(
            linear_backend.linear_cross_entropy, problem, upstream, reduction="none"
        )

    clean = run(problem)
    getattr(problem, where)[(4,) if where == "linear_bias" else (4, 17)] = NAN
    found = run(problem)
    others = torch.arange(9) != 4
    if where == "input":
        assert found["loss"][4].isnan()
        assert found["grad_input"][4].isnan().all()
        assert found["grad_weight"].isnan().all()
        torch.testing.assert_close(found["loss"][others], clean["loss"][others])
        torch.testing.assert_close(found["grad_input"][others], clean["grad_input"][others])
    else:
        assert found["loss"].isnan().all()
        assert found["grad_input"].isnan().all()


# ---- ignored rows ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_an_ignored_row_holds_reaches_the_result(linear_backend, recompute, reduction, dtype):
    problem = random_problem(23, 35, 6, dtype=dtype)
    ignored = torch.tensor([0, 1, 4, 11, 12, 13, 14, 22])
    problem.target[ignored] = -100
    upstream = random_like(torch.empty(23 if reduction == "none" else (), dtype=dtype))

    def run(problem):
        return linear_results(
            linear_backend.linear_cross_entropy, problem, upstream,
            reduction=reduction, recompute=recompute,
        )  # fmt: skip

    clean = run(problem)
    for poison in (NAN, INF, -INF):
        poisoned = problem.input.clone()
        poisoned[ignored[::2]] = poison
        poisoned[ignored[1::2], 3] = poison
        got = run(problem._replace(input=poisoned))
        assert same_bits(got, clean), poison
    assert torch.equal(got["grad_input"][ignored], torch.zeros(8, 6, dtype=dtype))
    compare_with_torch(linear_backend, problem, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [None, -100, -1, 0, 3, 1000])
def test_ignored_rows_count(linear_backend, ignore_index, reduction):
    problem = random_problem(40, 11, 5, scale=2)
    ignored = torch.arange(40) % 3 == 0
    problem.target[ignored] = -100 if ignore_index is None else ignore_index
    found = compare_with_torch(
        linear_backend, problem, reduction=reduction, ignore_index=ignore_index
    )
    dropped = problem.target == (-100 if ignore_index is None else ignore_index)
    assert not found["grad_input"][dropped].any()
    if reduction == "none":
        assert not found["loss"][dropped].any()


def test_a_problem_differs_from_itself_without_its_ignored_rows(native_backend):
    """Skipped rows: the sums are those of the rows that count."""
    problem = random_problem(50, 77, 12)
    kept = torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.4
    problem.target[~kept] = -100
    few = LinearProblem(problem.input[kept], *problem[1:3], problem.target[kept])
    one = torch.tensor(1.5, dtype=torch.float64)
    for reduction in ("mean", "sum"):
        got, want = (
            linear_results(native_backend.linear_cross_entropy, p, one, reduction=reduction)
            for p in (problem, few)
        )
        got["grad_input"] = got["grad_input"][kept]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_all_rows_ignored_gives_a_gradient(linear_backend, recompute, dtype):
    problem = random_problem(4, 19, 3, dtype=dtype)
    problem.input[1, 2] = NAN
    problem.target[:] = -100
    for reduction, value in {"none": 0.0, "mean": NAN, "sum": 0.0}.items():
        found = linear_results(
            linear_backend.linear_cross_entropy, problem,
            torch.ones(4 if reduction == "none" else (), dtype=dtype),
            reduction=reduction, recompute=recompute, z_loss=0.1,
        )  # fmt: skip
        want = torch.full_like(found["loss"], value)
        torch.testing.assert_close(found["loss"], want, equal_nan=True, rtol=0, atol=0)
        for name in GRADIENTS:
            assert torch.equal(found[name], torch.zeros_like(found[name])), (name, reduction)


@pytest.mark.parametrize(("reduction", "value"), [("none", None), ("mean", NAN), ("sum", 0.0)])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_rows_fail_or_have_a_gradient(linear_backend, recompute, reduction, value):
    problem = random_problem(0, 19, 3)
    found = linear_results(
        linear_backend.linear_cross_entropy, problem,
        torch.ones(0 if reduction == "none" else (), dtype=torch.float64),
        reduction=reduction, recompute=recompute,
    )  # fmt: skip
    want = torch.empty(0) if value is None else torch.tensor(value)
    torch.testing.assert_close(found["loss"], want.double(), equal_nan=True)
    assert found["grad_input"].shape == (0, 3)
    assert torch.equal(found["grad_weight"], torch.zeros(19, 3, dtype=torch.float64))
    assert torch.equal(found["grad_bias"], torch.zeros(19, dtype=torch.float64))


def test_byte_targets_are_read_as_something_else(linear_one_isa):
    problem = random_problem(20, 300, 5)
    target = problem.target % 255
    target[::4] = 255
    problem = problem._replace(target=target)
    got = linear_results(
        linear_one_isa.linear_cross_entropy, problem._replace(target=target.to(torch.uint8)),
        torch.tensor(1.5), ignore_index=255,
    )  # fmt: skip
    torch.testing.assert_close(
        got, linear_results(composition, problem, torch.tensor(1.5), ignore_index=255)
    )
    assert not got["grad_input"][::4].any()


# ---- strides ----


def layouts(n, m, dtype, seed):
    """Name, a matrix (n, m) of the same numbers in each layout, amid NaN."""
    values = random_like(torch.empty(n, m, dtype=torch.float64), seed).to(dtype)

    def amid(rows, columns, view):
        inside = view(torch.full((rows, columns), NAN, dtype=dtype))
        inside.copy_(values)
        return inside

    return {
        "contiguous": values.clone(),
        "rows apart": amid(n, m + 7, lambda x: x[:, 3 : 3 + m]),
        "every third row": amid(3 * n, m, lambda x: x[::3]),
        "every other column": amid(n, 2 * m + 1, lambda x: x[:, 1::2]),
        "transposed": amid(m, n, lambda x: x.t()),
        "transposed apart": amid(m + 1, n + 5, lambda x: x.t()[2 : 2 + n, 1 : 1 + m]),
    }


LAYOUTS = list(layouts(2, 2, torch.float32, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_input", LAYOUTS)
def test_a_layout_is_read_wrongly_or_sent_elsewhere(native_backend, of_input, dtype):
    """Of the inputs, with each of the matrix. What reads the memory beside, which is NaN, shows."""
    n, classes, features = 13, 37, 19
    bias = torch.zeros(3 * classes, dtype=dtype)[1::3]
    bias.copy_(random_like(torch.empty(classes, dtype=dtype), 8))
    weight = random_weight(classes, dtype).repeat_interleave(2)[::2]
    target = random_problem(n, classes, features).target.repeat_interleave(3)[::3]
    upstream = random_like(torch.empty(2 * n, dtype=dtype))[::2]
    x, matrices = layouts(n, features, dtype, 3)[of_input], layouts(classes, features, dtype, 4)
    dense = LinearProblem(
        *(tensor.contiguous() for tensor in (x, matrices["contiguous"], bias, target))
    )

    def run(problem, upstream, weight):
        return linear_results(
            native_backend.linear_cross_entropy, problem, upstream, weight=weight, reduction="none"
        )

    want = run(dense, upstream.contiguous(), weight.contiguous())
    u = 16 * half_ulp(dtype)
    for of_weight, W in matrices.items():
        got = run(LinearProblem(x, W, bias, target), upstream, weight)
        for name, result in got.items():
            torch.testing.assert_close(
                result, want[name], rtol=u, atol=u, msg=f"{name} for {of_weight}"
            )


def test_a_row_that_stands_for_all_is_read_wrongly(native_backend):
    """Strides of zero: one row, one class, one column, one upstream gradient."""
    problem = random_problem(9, 21, 6)
    x, W, b, t = problem
    upstream = random_like(x[0, 0])
    for strange in (
        problem._replace(input=x[:1].expand(9, 6)),
        problem._replace(input=x[:, :1].expand(9, 6)),
        problem._replace(linear_weight=W[:1].expand(21, 6)),
        problem._replace(linear_bias=b[:1].expand(21)),
        problem._replace(target=t[:1].expand(9)),
    ):
        got, want = (
            linear_results(f, strange, upstream.expand(9), reduction="none")
            for f in (native_backend.linear_cross_entropy, composition)
        )
        torch.testing.assert_close(got, want)


# ---- memory of inputs and gradients ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_inputs_are_mutated(linear_backend, recompute, dtype):
    problem = random_problem(9, 70, 5, dtype=dtype)
    weight, upstream = random_weight(70, dtype), random_like(problem.input[0, 0])
    tensors = [*problem, weight, upstream]
    for x in tensors[:3]:
        x.requires_grad_()
    before = [(x.detach().clone(), x._version) for x in tensors]
    linear_backend.linear_cross_entropy(
        **problem._asdict(), weight=weight, recompute=recompute
    ).backward(upstream)
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_share_memory_or_change_later(linear_backend, recompute, dtype):
    """Those of a first backward are the caller's: a second one neither has nor changes them."""
    problem = random_problem(9, 70, 5, dtype=dtype)
    leaves = [x.requires_grad_() for x in problem[:3]]
    loss = linear_backend.linear_cross_entropy(**problem._asdict(), recompute=recompute)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, leaves, random_like(loss), retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    addresses = {x.untyped_storage().data_ptr() for x in (*leaves, *first, *second, *third)}
    assert len(addresses) == 12
    for x, was in zip(first, kept, strict=True):
        assert torch.equal(x, was)
        x.fill_(7.0)
    for x, was in zip(third, kept, strict=True):
        assert torch.equal(x, was)


# ---- reproducibility ----

SHAPES = [(1, 3000, 17), (700, 33, 40), (3001, 5, 3), (130, 1500, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_bits_depend_on_the_number_of_threads_or_the_run(
    native_backend, reduction, shape, dtype, threads
):
    n, classes, _ = shape
    problem = random_problem(*shape, dtype=dtype, scale=3)
    problem.target[3::7] = -100
    options = {"weight": random_weight(classes, dtype), "label_smoothing": 0.1, "z_loss": 0.01}
    upstream = random_like(torch.empty(n if reduction == "none" else (), dtype=dtype))
    for call in ({}, options):
        first = None
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            found = linear_results(
                native_backend.linear_cross_entropy, problem, upstream, reduction=reduction, **call
            )
            first = found if first is None else first
            assert same_bits(found, first), count


def test_bits_for_probabilities_depend_on_the_number_of_threads(native_backend, threads):
    problem = random_problem(300, 257, 9, dtype=torch.float32)
    q = random_probabilities(torch.empty(300, 257), torch.float32)
    results = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(
            linear_results(
                native_backend.linear_cross_entropy, problem._replace(target=q), torch.tensor(1.5)
            )
        )
    assert all(same_bits(found, results[0]) for found in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_depends_on_whether_a_gradient_is_wanted(native_backend, reduction, dtype):
    """Without gradients another kernel forms the same logits."""
    problem = random_problem(77, 143, 21, dtype=dtype, scale=3)
    want = native_backend.linear_cross_entropy(**problem._asdict(), reduction=reduction)
    problem.linear_weight.requires_grad_()
    for recompute in (False, True):
        got = native_backend.linear_cross_entropy(
            **problem._asdict(), reduction=reduction, recompute=recompute
        )
        assert torch.equal(got, want)


def test_the_tests_run_elsewhere():
    problem = random_problem(4, 5, 3)
    for name in ("native", "eager"):
        with fastgpt.backend(name):
            explanation = fastgpt.explain(
                fastgpt.linear_cross_entropy, *problem[:2], problem.target
            )
            assert explanation.backend == name
