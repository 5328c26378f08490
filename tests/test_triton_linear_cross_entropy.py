"""Linear cross-entropy in Triton: chunks of all classes, and slices of them.

What every backend must do is in test_linear_cross_entropy.py; here it is done in more chunks than
problems of a test's size would have.
"""

import math
from typing import NamedTuple

import pytest
import torch
from backends import TRITON, activate
from oracle import DTYPES, half_ulp, random_like

import fastgpt
from fastgpt.ops.cross_entropy import Options
from fastgpt.ops.linear_cross_entropy import LAUNCHERS, Problem

MIB = 1 << 20
NAN, INF = math.nan, math.inf
MODES = ("one chunk", "rows", "slices")
of_modes = pytest.mark.parametrize("mode", MODES)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def triton():
    yield from activate(TRITON)


@pytest.fixture
def op(triton):
    """The module of the launches, which imports Triton."""
    from fastgpt.backends.triton import linear_cross_entropy

    return linear_cross_entropy


@pytest.fixture
def divide(op, monkeypatch):
    """Give the calls of a test so little memory that they take several chunks of such a kind."""
    found = []
    whole = op.chunks

    def recorded(N, C, *rest):
        found.append(((N, C), whole(N, C, *rest)))
        return found[-1][1]

    def to(mode, budget=None):
        budgets = {"one chunk": op.BUDGET, "rows": 16 * 1024, "slices": 24 * 1024}
        enough = {"one chunk": 1, "rows": 1, "slices": 1 << 40}[mode]
        monkeypatch.setattr(op, "BUDGET", budget or budgets[mode])
        monkeypatch.setattr(op, "ENOUGH", dict.fromkeys((2, 4, 8), enough))
        monkeypatch.setattr(op, "chunks", recorded)
        return found

    return to


def is_of(mode, found):
    """Whether every call was divided as it was to be."""
    kinds = {
        "one chunk": lambda N, C, size: size == (N, C),
        "rows": lambda N, C, size: size.rows < N and size.classes == C,
        "slices": lambda N, C, size: size.classes < C,
    }
    return bool(found) and all(kinds[mode](*shape, size) for shape, size in found)


# ---- the truth ----


def accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)


def problem(n=21, classes=301, features=24, dtype=torch.float32, probabilities=False, seed=0):
    """Inputs and a matrix of normal logits times 2, a bias and targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, W, b = normal(n, features), 2 * normal(classes, features) / features**0.5, normal(classes)
    target = torch.randint(classes, (n,), generator=generator)
    if probabilities:
        target = normal(n, classes).softmax(1).to(dtype)
    return Problem(x.to(dtype), W.to(dtype), b.to(dtype), target, None)


class Truth(NamedTuple):
    """In float64: of each row, of each logit, and what the rounding of each logit's part adds."""

    loss: torch.Tensor
    lse: torch.Tensor
    S: torch.Tensor
    terms: torch.Tensor  # of the sum that a number of S is, without their signs


def truth(problem, options, g=None, g_lse=None, h=None) -> Truth:
    x, W, b, target, weight = problem
    kept = torch.ones(len(x), dtype=torch.bool)
    if not target.is_floating_point():
        kept = target != options.ignore_index
    column = kept.unsqueeze(1)
    z = torch.where(column, x.double(), 0) @ W.double().t()
    z = z if b is None else z + b.double()
    slope, y = torch.ones_like(z), z
    if options.softcap:
        y = options.softcap * torch.tanh(z / options.softcap)
        slope = 1 - (y / options.softcap) ** 2
    if target.is_floating_point():
        c = options.hard * target.double() + options.spread
    else:
        classes = torch.arange(len(W))
        c = options.hard * (target.unsqueeze(1) == classes).double() + options.spread
    c = c if weight is None else c * weight.double()
    lse = torch.logsumexp(y, 1)
    loss = torch.where(c == 0, 0, c * (lse.unsqueeze(1) - y)).sum(1)
    zero = torch.zeros(len(x), dtype=torch.float64)
    g, g_lse, h = (zero if v is None else v.double() for v in (g, g_lse, h))
    B = g * c.sum(1) + g_lse + 2 * h * lse
    p = (y - lse.unsqueeze(1)).exp()
    S = slope * (B.unsqueeze(1) * p - g.unsqueeze(1) * c)
    terms = slope * (B.abs().unsqueeze(1) * p + g.abs().unsqueeze(1) * c)
    loss, lse = loss.where(kept, 0), lse.where(kept, 0)
    return Truth(loss, lse, S.where(column, 0), terms.where(column, 0))


def assert_right(got, want: Truth, problem, options, factor=1.0):
    """Each number is off by no more than S's rounding to the inputs' type, of all terms of its sum,
    and the arithmetic of the logits, which grows with the length of the sums.
    """
    loss, lse, *gradients = got
    x, W, *_ = problem
    dtype = x.dtype
    u = factor * half_ulp(accumulator(dtype)) * (64 + 2 * x.shape[1] + W.shape[0] / 4)
    for found, exact in ((loss, want.loss), (lse, want.lse)):
        assert found.dtype == (torch.float64 if options.partial else accumulator(dtype))
        error = (found.cpu().double() - exact).abs()
        assert (error <= u * exact.abs().clamp(min=1)).all()
    of_s = half_ulp(dtype) if dtype.itemsize == 2 else 0
    rounding = of_s * want.S.abs() + u * want.terms
    if not problem.target.is_floating_point():
        x = torch.where((problem.target != options.ignore_index).unsqueeze(1), x, 0)
    x, W = x.double(), W.double()
    pairs = zip(
        gradients,
        (want.S @ W, want.S.t() @ x, want.S.sum(0)),
        (rounding @ W.abs(), rounding.t() @ x.abs(), rounding.sum(0)),
        strict=True,
    )
    for gradient, exact, bound in pairs:
        assert gradient.dtype == accumulator(dtype)
        assert ((gradient.cpu().double() - exact).abs() <= bound).all()


def run(problem, options, g, g_lse=None, h=None, eps=0.0, wanted=(True, True, True)):
    """The raw backward operator, which gives loss and lse as well."""
    arguments = TRITON.placed((g, g_lse, h, *problem))
    return TRITON.returned(LAUNCHERS["triton"].backward(*arguments, *options, eps, *wanted))


def upstream(problem, seed=1):
    return random_like(
        torch.empty(len(problem.input), dtype=accumulator(problem.input.dtype)), seed
    )


# ---- values and gradients ----

OPTIONS = {
    "plain": Options(),
    "smoothing": Options(hard=0.9, spread=0.1 / 301),
    "softcap": Options(softcap=3.0),
    "everything": Options(hard=0.9, spread=0.1 / 301, softcap=3.0),
}


def weighted(problem, options):
    if options.hard == 1:
        return problem
    weight = torch.linspace(0.5, 1.5, len(problem.linear_weight), dtype=torch.float64)
    weight[3::7] = 0
    return problem._replace(weight=weight.to(accumulator(problem.input.dtype)))


@of_modes
@of_dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_or_a_gradient_is_wrong(divide, options, dtype, mode):
    found = divide(mode)
    some = weighted(problem(dtype=dtype), options)
    if options.softcap == 0 and options.hard == 1:
        some.linear_bias[5::50] = -INF
        some.target[some.target % 50 == 5] += 1
    g, g_lse, h = (upstream(some, seed) for seed in (1, 2, 3))
    got = run(some, options, g, g_lse, h / 10)
    assert_right(got, truth(some, options, g, g_lse, h / 10), some, options)
    forward = LAUNCHERS["triton"].forward(*TRITON.placed(tuple(some)), *options)
    for value, again in zip(TRITON.returned(forward), got, strict=False):
        assert torch.equal(value, again)
    assert is_of(mode, found)


@pytest.mark.parametrize("mode", ["one chunk", "rows"])
@of_dtypes
def test_probabilities_are_wrong(divide, dtype, mode):
    found = divide(mode)
    for options in (Options(), OPTIONS["everything"]):
        some = weighted(problem(dtype=dtype, probabilities=True), options)
        g, g_lse = upstream(some, 1), upstream(some, 2)
        got = run(some, options, g, g_lse)
        assert_right(got, truth(some, options, g, g_lse), some, options)
    assert is_of(mode, found)


def test_probabilities_are_sliced(divide):
    """Where a chunk of one row is larger than it may be: they are as large themselves."""
    found = divide("slices", budget=1024)
    some = problem(n=3, probabilities=True)
    got = run(some, Options(), upstream(some))
    assert_right(got, truth(some, Options(), upstream(some)), some, Options())
    assert is_of("rows", found)


@of_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows_are_wrong(divide, dtype, mode):
    """Of more classes than stay on a chip, at an odd number; and so are their slices."""
    budgets = {"one chunk": None, "rows": 80 * 1024, "slices": 50 * 1024}
    found = divide(mode, budgets[mode])
    some = problem(n=5, classes=3001, dtype=dtype)
    some.target[2] = -100
    some.input[2] = NAN
    options = Options(hard=0.9, spread=0.1 / 3001)
    g, g_lse = upstream(some, 1), upstream(some, 2)
    got = run(some, options, g, g_lse)
    assert_right(got, truth(some, options, g, g_lse), some, options)
    assert is_of(mode, found)
    assert mode != "slices" or any(size.classes > 1024 for _, size in found)


@of_modes
def test_confident_rows_lose_their_gradient(divide, mode):
    """Where the target has all but all of the probability, S of it is minus the sum of the others'
    probability, to the last bits; also if some of those are in other slices.
    """
    found = divide(mode, 2048 if mode == "slices" else None)
    classes = 301
    x = torch.eye(2, dtype=torch.float32)
    logits = torch.zeros(2, classes)
    logits[0, 7], logits[1, 200] = 25, 30
    some = Problem(x, logits.t().contiguous(), None, torch.tensor([7, 200]), None)
    g = torch.ones(2)
    loss, _, _, of_weight, _ = run(some, Options(), g, wanted=(False, True, False))
    S = of_weight.t().double()
    for row, (t, height) in enumerate(zip(some.target, (25, 30), strict=True)):
        rest = 300 * math.exp(-height)
        assert abs(S[row, t] / (-rest / (1 + rest)) - 1) < 1e-6
        assert abs(loss[row].double() / math.log1p(rest) - 1) < 1e-6
    if mode == "slices":
        assert is_of(mode, found)


@of_modes
def test_a_small_slice_of_the_probability_is_lost(divide, mode):
    """The target's own slice may have almost nothing of it: then the part of its other classes is
    the small difference of two large numbers.
    """
    divide(mode)
    some = problem(features=16)
    some.linear_bias[:128] -= 18
    some.target[:] = torch.arange(len(some.target))
    g = upstream(some)
    *_, of_bias = run(some, Options(), g, wanted=(False, False, True))
    want = truth(some, Options(), g)
    scale = (g.abs().unsqueeze(1) * (want.S + g.unsqueeze(1) * 0).abs()).sum(0)
    others = torch.arange(301) > len(some.target)
    error = (of_bias.double() - want.S.sum(0)).abs()[others] / scale.sqrt().clamp(min=1e-30)[others]
    assert (error <= 1e-4).all()


# ---- ignored rows ----


@of_modes
@of_dtypes
@pytest.mark.parametrize("value", [NAN, INF])
def test_an_ignored_row_reaches_the_result(divide, value, dtype, mode):
    divide(mode)
    some = problem(dtype=dtype)
    some.target[::3] = -100
    g, h = upstream(some), upstream(some, 2)
    g[::3] = h[::3] = value  # of a mean over no rows it may be
    got = run(some._replace(input=some.input.clone()), Options(), g, None, h)
    some.input[::3] = value
    again = run(some, Options(), g, None, h)
    for x, y in zip(got, again, strict=True):
        assert torch.equal(x, y)
        assert x.isfinite().all()
    loss, lse, of_input, _, _ = again
    assert not loss[::3].any()
    assert not lse[::3].any()
    assert not of_input[::3].any()


@of_modes
@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_to_learn_from_gives_a_gradient(divide, dtype, n, mode):
    divide(mode)
    some = problem(n=n, dtype=dtype)
    some.target[:] = -100
    for x in run(some, Options(), upstream(some)):
        assert x.shape[0] in (n, 301)
        assert not x.any()


@of_modes
@pytest.mark.parametrize("wrong", [-1, 301, 1 << 40])
@pytest.mark.skipif(not TRITON.interpreted, reason="an assertion on a device ends the process")
def test_a_wrong_target_passes(divide, triton, wrong, mode):
    divide(mode)
    x, W, b, target, _ = problem(n=5)
    target[3] = wrong
    for recompute in (False, True):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            triton._run(
                fastgpt.linear_cross_entropy,
                x.requires_grad_(),
                W,
                target,
                linear_bias=b,
                recompute=recompute,
            )


# ---- one of several slices, as ranks have them ----


@of_modes
@of_dtypes
def test_a_rank_has_other_numbers(divide, dtype, mode):
    """Targets outside are in another rank's classes; loss and lse are float64. One row has nothing
    but -inf here, so none of the probability.
    """
    divide(mode)
    options = Options(partial=True)
    some = problem(dtype=dtype)
    some.target[::2] = torch.arange(-11, 0)
    some.target[3] = 301
    g, g_lse = upstream(some, 1), upstream(some, 2)
    got = run(some, options, g, g_lse)
    # Their share c is 0 in the truth, too: no class is theirs.
    assert_right(got, truth(some, options, g, g_lse), some, options)
    some.linear_bias.fill_(-INF)
    loss, lse, *gradients = run(some, options, g, g_lse)
    outside = (some.target < 0) | (some.target >= 301)
    assert (lse == -INF).all()
    assert not loss[outside].any()
    for gradient in gradients[:1]:
        assert not gradient[outside].any()


# ---- what is left out ----


@pytest.mark.parametrize("mode", ["one chunk", "slices"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_or_less_than_small_probabilities_is_left_out(divide, dtype, mode):
    """Seen through an identity for the inputs, the matrix's gradient is S."""
    found = divide(mode, 20 * 1024 if mode == "slices" else None)
    eps, n = 1e-3, 16
    some = problem(n=n, features=n, dtype=dtype)
    some = some._replace(input=torch.eye(n, dtype=dtype))
    some.target[4] = int(some.linear_weight[:, 4].float().argmin())
    for options in (Options(), Options(hard=0.9, spread=0.1 / 301)):
        g, g_lse = upstream(some, 1), upstream(some, 2)
        wanted = (False, True, False)
        loss, _, _, exact, _ = run(some, options, g, g_lse, wanted=wanted)
        again, _, _, filtered, _ = run(some, options, g, g_lse, eps=eps, wanted=wanted)
        assert torch.equal(loss, again)
        exact, filtered = exact.t().double(), filtered.t().double()
        z = some.linear_weight.double().t() + some.linear_bias.double()
        p = z.softmax(1)
        at_target = torch.arange(301) == some.target.unsqueeze(1)
        near = (p / eps - 1).abs() < 1e-4  # either is right
        dropped = (p < eps) & ~at_target & ~near
        kept = ~((p < eps) & ~at_target) & ~near
        assert dropped.any()
        assert kept.any()
        assert torch.equal(filtered[kept], exact[kept])
        rest = (-g.double().unsqueeze(1) * options.spread).expand_as(p)
        ulps = 4 * half_ulp(dtype) * rest.abs()
        assert ((filtered - rest).abs() <= ulps)[dropped].all()
    if mode == "slices":
        assert is_of(mode, found)


@of_modes
def test_a_gradient_depends_on_which_others_are_wanted(divide, mode):
    divide(mode)
    some = problem()
    g = upstream(some)
    want = run(some, Options(), g)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        got = run(some, Options(), g, wanted=wanted)
        for x, y, asked in zip(got, want, (True, True, *wanted), strict=True):
            assert torch.equal(x, y) if asked else x.numel() == 0


@of_modes
def test_float16_loses_the_gradient_of_a_mean_over_many_rows(divide, mode):
    """1 / (N C) is no float16."""
    divide(mode)
    some = problem(dtype=torch.float16)
    for size in (1e-8, 1.0, 1e6):
        g, h = upstream(some) * size, upstream(some, 2) * size / 100
        got = run(some, Options(), g, None, h)
        assert_right(got, truth(some, Options(), g, None, h), some, Options())


@of_modes
def test_two_runs_differ(divide, mode):
    divide(mode)
    some = problem(dtype=torch.bfloat16)
    for x, y in zip(*(run(some, Options(), upstream(some)) for _ in range(2)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("mode", ["rows", "slices"])
def test_the_loss_drifts_with_the_number_of_chunks(op, divide, mode):
    """A row's loss is that of one chunk to the last bits."""
    some = problem(n=40, classes=1000)
    whole = run(some, Options(), upstream(some))
    divide(mode)
    for i, (x, y) in enumerate(zip(run(some, Options(), upstream(some)), whole, strict=True)):
        scale = y.abs().clamp(min=1) if i < 2 else y.abs().amax()
        assert ((x - y).abs() <= 16 * half_ulp(torch.float32) * scale).all()


# ---- how it is divided ----

SHAPES = {
    "a token": (1, 128256, 4096),
    "a small batch": (8, 50257, 768),
    "GPT-2": (8192, 50257, 768),
    "Llama 3": (8192, 128256, 4096),
    "Gemma 3": (16384, 262144, 2560),
    "short rows": (1 << 24, 2, 8),
    "wide inputs": (4096, 32000, 32768),
    "a huge vocabulary": (4096, 1 << 24, 1024),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@of_dtypes
def test_a_chunk_is_larger_than_it_may_be_or_than_it_needs(op, shape, dtype):
    N, C, D = shape
    number = accumulator(dtype).itemsize + (2 if dtype.itemsize == 2 else 0)
    row = D * dtype.itemsize
    size = op.chunks(N, C, number, row, op.ENOUGH[dtype.itemsize])
    assert 1 <= size.rows <= N
    assert 1 <= size.classes <= C
    slices = math.ceil(C / size.classes)
    padded = math.ceil(size.classes / op.PITCH) * op.PITCH
    statistics = op.ROW_BYTES + (slices > 1) * slices * op.SLICE_BYTES
    taken = size.rows * (padded * number + row + statistics) + size.classes * op.CLASS_BYTES
    assert taken <= op.BUDGET == 64 * MIB
    if N * (C + op.PITCH) * number + N * (row + op.ROW_BYTES) + C * op.CLASS_BYTES <= op.BUDGET:
        assert size == (N, C)
    else:  # neither so many chunks that launches or sums of gradients take the time
        assert size.rows * size.classes * number >= op.BUDGET / 8 or row > C * number
        assert size.classes == C or size.classes % op.GRANULE == 0
        assert min(size.rows, size.classes) >= min(N, 64, C)


@pytest.mark.skipif(not TRITON.interpreted, reason="measured on the device by the one below")
@pytest.mark.parametrize("mode", ["rows", "slices"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_takes_more_than_its_memory(op, divide, dtype, mode):
    """Beyond gradients, of which the raw operator's are in the accumulator type. (Products of
    16-bit matrices are made of copies on a CPU.)
    """
    budget = 128 * 1024
    found = divide(mode, budget)
    some = problem(n=70, classes=900, features=32, dtype=dtype)
    arguments = (upstream(some), None, None, *some, *Options(), 0.0, True, True, True)
    LAUNCHERS["triton"].backward(*arguments)  # for what is allocated once
    results = (2 * 70 + 70 * 32 + 900 * 32 + 900) * dtype.itemsize
    peak = TRITON.peak_bytes(lambda: LAUNCHERS["triton"].backward(*arguments))
    assert is_of(mode, found)
    assert peak - results <= budget


@pytest.mark.skipif(TRITON.interpreted, reason="of products on the device")
@of_dtypes
def test_it_takes_more_than_its_memory_on_a_gpu(op, dtype):
    N, C, D = 4096, 50257, 512
    x, W, b, target, _ = TRITON.placed(problem(n=N, classes=C, features=D, dtype=dtype))
    g = torch.ones(N, dtype=accumulator(dtype), device=x.device)
    arguments = (g, None, None, x, W, b, target, None, *Options(), 0.0, True, True, True)
    LAUNCHERS["triton"].backward(*arguments)  # the library takes its own memory once
    results = (2 * N + N * D + C * D + C) * accumulator(dtype).itemsize
    peak = TRITON.peak_bytes(lambda: LAUNCHERS["triton"].backward(*arguments))
    assert peak - results <= op.BUDGET


@pytest.mark.skipif(TRITON.interpreted, reason="of launches on the device")
@of_modes
def test_a_graph_cannot_hold_it_or_the_host_waits(divide, mode):
    divide(mode)
    some = TRITON.placed(tuple(problem(dtype=torch.bfloat16)))
    g = TRITON.placed(upstream(Problem(*some)))
    arguments = (g, None, None, *some, *Options(), 0.0, True, True, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = LAUNCHERS["triton"].backward(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = LAUNCHERS["triton"].backward(*arguments)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


# ---- the public function ----


@of_modes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_public_function_differs_from_eager(divide, triton, reduction, mode):
    divide(mode)
    some = problem()
    some.target[::4] = -100
    weight = torch.linspace(0.5, 1.5, 301)
    results = []
    for backend in ("triton", "eager"):
        leaves = [x.detach().requires_grad_() for x in TRITON.placed(tuple(some[:3]))]
        x, W, b = leaves
        with fastgpt.backend(backend):
            arguments = (x, W, *TRITON.placed((some.target,)))
            options = {
                "linear_bias": b,
                "weight": TRITON.placed(weight),
                "label_smoothing": 0.1,
                "z_loss": 0.01,
                "softcap": 5.0,
                "reduction": reduction,
                "return_lse": True,
            }
            explanation = fastgpt.explain(fastgpt.linear_cross_entropy, *arguments, **options)
            assert explanation.backend == backend
            loss, lse = fastgpt.linear_cross_entropy(*arguments, **options)
        gradients = torch.autograd.grad(loss, leaves, random_like(loss))
        results.append([loss.detach(), lse.detach(), *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
