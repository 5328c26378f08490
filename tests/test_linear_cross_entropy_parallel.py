"""Linear cross-entropy over classes in the slices of several processes, against that of one.

For each number of processes all cases run in one start of them; the tests look at the results.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from linear_cases import LinearProblem, exact_linear, random_problem
from oracle import random_like, random_probabilities, random_weight, within_half_ulp
from ranks import OPTIONS, SPLITS, Exchanged, Ranks

import fastgpt

N, C, D = 6, 50, 5
EVEN = [even for even, _ in SPLITS.values()]
NAN, INF = math.nan, math.inf


class Case(NamedTuple):
    """A call. `inputs`: "usual" has two ignored rows, with NaN and infinities in them; "confident"
    has p_t near 1; "dead" has a bias of -inf in the whole first slice; "ignored" no row that
    counts; "positions" a matrix for each of two positions; "sequences" is shifted.
    """

    backend: str
    split: tuple[int, ...]
    options: str = "plain"
    probabilities: bool = False
    dtype: torch.dtype = torch.float64
    reduction: str = "none"
    inputs: str = "usual"
    return_lse: bool = True

    def __str__(self) -> str:
        words = [*map(str, self[:3]), "probability" if self.probabilities else "classes"]
        words += [str(self.dtype).removeprefix("torch."), self.reduction, self.inputs]
        return "-".join(words + ["loss alone"] * (not self.return_lse))


def cases() -> list[Case]:
    found: dict[Case, None] = {}
    for backend in ("native", "eager"):
        for even, uneven in SPLITS.values():
            for options in OPTIONS:
                for p in (False, True):
                    usual = Case(backend, uneven, options, p)
                    found[usual] = None
                    if options in ("plain", "everything"):
                        found[usual._replace(split=even)] = None
                        for dtype in (torch.float32, torch.bfloat16):
                            found[usual._replace(dtype=dtype)] = None
                        for reduction in ("mean", "sum"):
                            found[usual._replace(reduction=reduction)] = None
                        found[usual._replace(return_lse=False, reduction="mean")] = None
                        for inputs in ("positions", "sequences"):
                            found[usual._replace(inputs=inputs, reduction="mean")] = None
            for split in (even, uneven):
                for dtype in (torch.float64, torch.float32):
                    found[
                        Case(backend, split, dtype=dtype, inputs="confident", return_lse=False)
                    ] = None
            for options in ("plain", "weights"):
                found[Case(backend, uneven, options, inputs="dead")] = None
            for reduction in ("none", "mean"):
                found[Case(backend, uneven, reduction=reduction, inputs="ignored")] = None
    return list(found)


def problem(case: Case) -> tuple[LinearProblem, torch.Tensor | None]:
    """The problem of all classes, and their weight."""
    x, W, b, target = random_problem(N, C, D, scale=3)
    if case.inputs == "positions":
        W, b = torch.stack([W, W.flip(0)], 1), torch.stack([b, b.flip(0)], 1)
        target = torch.stack([target, target.roll(1)], 1)
    if case.inputs == "confident":
        # Row i has its target's bias alone, by a column of the inputs that is one in row i.
        W = torch.cat([W / 4, torch.zeros(C, N, dtype=W.dtype)], 1)
        x = torch.cat([x, torch.eye(N, dtype=x.dtype)], 1)
        target[:2] = torch.tensor([0, C - 1])
        logits = x @ W.t() + b
        for i in range(N):
            W[target[i], D + i] = logits[i].max() - logits[i, target[i]] + 15
    if case.inputs == "dead":
        b[: case.split[0]] = -INF
        target = target.clamp(min=case.split[0])
    if case.probabilities:
        q = random_probabilities(torch.empty(N, C)).double()
        target = torch.stack([q, q.flip(1)], 2) if case.inputs == "positions" else q
        target = target.to(case.dtype)
    elif case.inputs == "ignored":
        target.fill_(-100)
        x[1] = NAN
    elif case.inputs == "usual":
        target[1], target[4] = -100, -100
        x[1], x[4] = NAN, -INF
    x, W, b = (a.to(case.dtype) for a in (x, W, b))
    if case.inputs == "sequences":
        x, target = x.view(2, 3, D), target.view(2, 3, *target.shape[1:])
    weight = random_weight(C, case.dtype) if "weight" in OPTIONS[case.options] else None
    return LinearProblem(x, W, b, target), weight


def run(case: Case, group: Any = None) -> dict[str, Any]:
    """The values and the derivatives of the case: of this rank's classes, or without a group of all
    of them.
    """
    (x, W, b, target), weight = problem(case)
    tangents = [random_like(a, i) for i, a in enumerate((x, W, b, target.to(x)), 7)]
    factors = [random_like(a, i) for i, a in enumerate((x, W, b, target.to(x)), 17)]
    classes = 2 if case.inputs == "sequences" else 1  # the dimension of those of probabilities
    if group is not None:
        begin = sum(case.split[: group.rank()])
        size = case.split[group.rank()]

        def here(tensors):
            of_x, *of_matrix, of_target = tensors
            of_matrix = [a.narrow(0, begin, size) for a in of_matrix]
            if case.probabilities:
                of_target = of_target.narrow(classes, begin, size)
            return [of_x, *of_matrix, of_target]

        x, W, b, target = here([x, W, b, target])
        tangents, factors = here(tangents), here(factors)
        weight = None if weight is None else weight.narrow(0, begin, size)
    options = {**OPTIONS[case.options], "reduction": case.reduction, "return_lse": case.return_lse}
    options |= {"weight": weight, "shift": case.inputs == "sequences"}

    def function(x, W, b, t=target):
        values = fastgpt.linear_cross_entropy(
            x, W, t, linear_bias=b, process_group=group, **options
        )
        return values if case.return_lse else (values,)

    with fastgpt.backend(case.backend):
        explanation = fastgpt.explain(
            fastgpt.linear_cross_entropy, x, W, target, process_group=group, **options
        )
        assert explanation.backend == case.backend, str(explanation)
        inputs = [a.clone().requires_grad_() for a in (x, W, b)]
        if case.probabilities:
            inputs.append(target.clone().requires_grad_())
        found: dict[str, Any] = {}
        with Exchanged() as forward:
            values = function(*inputs)
        upstream = [random_like(v, seed) for seed, v in enumerate(values, 1)]
        found["loss"] = values[0].detach()
        found["lse"] = values[1].detach() if case.return_lse else None
        with Exchanged() as backward:
            gradients = torch.autograd.grad(values, inputs, upstream, create_graph=True)
        found["gradients"] = [g.detach().clone() for g in gradients]
        found["exchanged"] = forward.sizes, backward.sizes
        if case.dtype != torch.float64 or case.split in EVEN:
            return found
        # Of a function of all gradients: a sum over the ranks, but for the input's gradient, which
        # every rank has whole, as it has the loss.
        parts = [(g.square() * f).sum() for g, f in zip(gradients, factors, strict=False)]
        found["second"] = list(torch.autograd.grad(sum(parts), inputs))
        primals = tuple(a.detach() for a in inputs)
        found["along"] = list(torch.func.jvp(function, primals, tuple(tangents[: len(inputs)]))[1])
        return found


def out_of_range(backend: str, target: int, group: Any) -> str:
    x, W, _, t = random_problem(N, 5, D)
    t[2], t[3] = target, -100
    try:
        with fastgpt.backend(backend):
            fastgpt.linear_cross_entropy(x, W, t, process_group=group)
    except IndexError as error:
        return str(error)
    return "nothing was raised"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks(tmp_path_factory, cases, run, out_of_range)


def close(got, want, dtype, ulps, least=0.0):
    """To some ulp of the largest number. `least`: as though there were a number as large."""
    assert got.dtype == want.dtype
    finite = want[want.isfinite()].double()
    size = max(float(finite.abs().max()) if finite.numel() else 0.0, least)
    if dtype == torch.float64:
        tol = {"rtol": 1e-11, "atol": 1e-11 * max(size, 1)}
    elif got.dtype.itemsize < 4:
        # The input's gradient is the sum of what each rank rounded; S may be rounded, too.
        tol = {"rtol": 0.0, "atol": 4 * torch.finfo(got.dtype).eps * size}
    else:
        tol = {"rtol": 0.0, "atol": ulps * torch.finfo(torch.float32).eps * size}
    torch.testing.assert_close(got.double(), want.double(), equal_nan=True, **tol)


def whole(case, parts, i):
    """The gradient of input i: the same bits on every rank, or in slices."""
    if i == 0:
        assert all(torch.equal(p, parts[0]) for p in parts)
        return parts[0]
    return torch.cat(parts, (2 if case.inputs == "sequences" else 1) if i == 3 else 0)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_classes_of_several_processes_give_another_result(ranks, case):
    found = [of_rank[str(case)] for of_rank in ranks(len(case.split))]
    for result in found:
        assert isinstance(result, dict), result
    want = run(case)
    least = 1.0 if case.inputs == "confident" else 0.0  # one process may lose more of these
    for name in ("loss", "lse"):
        if want[name] is not None:
            assert len({r[name].double().numpy().tobytes() for r in found}) == 1
            close(found[0][name], want[name], case.dtype, 16, least)
    for i, gradient in enumerate(want["gradients"]):
        got = whole(case, [r["gradients"][i] for r in found], i)
        close(got, gradient, case.dtype, 64, least)
    if case.inputs == "usual" and not case.probabilities:
        assert not found[0]["gradients"][0][[1, 4]].any()
    for i, gradient in enumerate(want.get("second", ())):
        close(whole(case, [r["second"][i] for r in found], i), gradient, case.dtype, 64)
    for i, tangent in enumerate(want.get("along", ())):
        for result in found:
            close(result["along"][i], tangent, case.dtype, 64)


def of_case(**fields):
    """The cases with these fields."""
    chosen = [c for c in cases() if all(getattr(c, k) == v for k, v in fields.items())]
    return pytest.mark.parametrize("case", chosen, ids=str)


@of_case(inputs="confident")
def test_confident_rows_lose_their_loss(ranks, case):
    """To a few ulp of itself where p_t -> 1, whichever rank has the target."""
    loss = ranks(len(case.split))[0][str(case)]["loss"]
    truth = exact_linear(problem(case)[0], random_like(loss))
    # The logits of some 20 are off by an ulp of theirs.
    slack = 1e-8 if case.dtype == torch.float64 else 64 * torch.finfo(torch.float32).eps
    assert within_half_ulp(loss, truth.loss, slack)


@of_case(inputs="dead")
def test_a_slice_without_a_finite_logit_spoils_the_loss(ranks, case):
    """As though its classes had no probability and no share of the target, which they have not."""
    first, *others = (of_rank[str(case)] for of_rank in ranks(len(case.split)))
    assert first["loss"].isfinite().all()
    assert first["lse"].isfinite().all()
    for result in (first, *others):
        assert all(g.isfinite().all() for g in result["gradients"])
    assert not first["gradients"][1].any()
    assert not first["gradients"][2].any()


@pytest.mark.parametrize("size", SPLITS)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_class_out_of_range_is_no_index_error_on_every_rank(ranks, backend, size):
    for target in (-1, 5 * size, 1 << 40):
        for of_rank in ranks(size):
            message = of_rank[backend, target]
            assert f"Target {target} is out of bounds" in message
            assert f"target < {5 * size}" in message


@pytest.mark.parametrize("size", SPLITS)
def test_more_is_exchanged_than_rows_and_the_inputs_gradient(ranks, size):
    """Some numbers a row forward, and backward the gradient of the input, never logits."""
    for case in cases():
        if len(case.split) == size:
            x = problem(case)[0].input
            for of_rank in ranks(size):
                forward, backward = of_rank[str(case)]["exchanged"]
                assert len(forward) == 2, case
                assert sum(forward) <= 4 * 2 * N + 1, case
                assert len(backward) == 1, case
                assert backward[0] <= x.numel(), case
