"""Cross-entropy over classes in the slices of several processes, against that of one process.

For each number of processes all cases run in one start of them; the tests look at the results.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from oracle import exact, random_like, random_logits, within_half_ulp
from ranks import OPTIONS, SPLITS, Exchanged, Ranks

import fastgpt

N, C, L = 6, 50, 3
NAN, INF = math.nan, math.inf


class Case(NamedTuple):
    """A call. `inputs`: "usual" has two ignored rows, with NaN and infinities in them; "confident"
    has p_t near 1; "dead" has -inf in the whole first slice of two rows; "ignored" no row that
    counts; "columns" and "transposed" are (N, C, L).
    """

    backend: str
    split: tuple[int, ...]
    options: str = "plain"
    probabilities: bool = False
    dtype: torch.dtype = torch.float64
    reduction: str = "none"
    inputs: str = "usual"
    inplace: bool = False
    return_lse: bool = True

    def __str__(self) -> str:
        words = [*map(str, self[:3]), "probability" if self.probabilities else "classes"]
        words += [str(self.dtype).removeprefix("torch."), self.reduction, self.inputs]
        return "-".join(words + ["inplace"] * self.inplace + ["loss alone"] * (not self.return_lse))


def cases() -> list[Case]:
    found: dict[Case, None] = {}
    for backend in ("native", "eager"):
        for splits in SPLITS.values():
            even, uneven = splits
            for options in OPTIONS:
                for p in (False, True):
                    usual = Case(backend, uneven, options, p)
                    for dtype in (torch.float64, torch.float32, torch.bfloat16):
                        found[usual._replace(dtype=dtype)] = None
                        if dtype == torch.float32 or options in ("plain", "everything"):
                            found[usual._replace(dtype=dtype, inplace=True)] = None
                    if options in ("plain", "everything"):
                        found[usual._replace(split=even)] = None
                        for reduction in ("mean", "sum"):
                            found[usual._replace(reduction=reduction)] = None
                        found[usual._replace(return_lse=False, reduction="mean")] = None
                        for inputs in ("columns", "transposed"):
                            found[usual._replace(inputs=inputs)] = None
            for split in splits:
                for dtype in (torch.float64, torch.float32, torch.bfloat16):
                    found[
                        Case(backend, split, dtype=dtype, inputs="confident", return_lse=False)
                    ] = None
                for options in ("plain", "weights", "z_loss"):
                    for p in (False, True):
                        found[Case(backend, split, options, p, inputs="dead")] = None
            for reduction in ("none", "mean", "sum"):
                for options in ("plain", "everything"):
                    found[Case(backend, uneven, options, reduction=reduction, inputs="ignored")] = (
                        None
                    )
    return list(found)


def problem(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logits, target and weight of all classes."""
    columns = case.inputs in ("columns", "transposed")
    logits, target = random_logits(N * L if columns else N, C, dtype=torch.float64, scale=3)
    if case.inputs == "confident":
        target[:2] = torch.tensor([0, C - 1])
        rows = torch.arange(N)
        logits[rows, target] = logits.amax(1) + 15
    if columns:
        logits, target = logits.view(N, L, C).mT, target.view(N, L)
        logits = logits.contiguous() if case.inputs == "columns" else logits
    first = case.split[0]
    if case.inputs == "dead":
        logits[2:4, :first] = -INF
        target[2:4] = C - 1
    logits = logits.to(case.dtype)
    if case.probabilities:
        target = random_like(logits).float().softmax(1)
        if case.inputs == "dead":
            target[2:4, :first] = 0
        target = target.to(case.dtype)
    elif case.inputs == "ignored":
        target.fill_(-100)
        logits[1] = NAN
    elif case.inputs not in ("confident", "dead"):
        target[1], target[4] = -100, -100
        logits[1], logits[4] = NAN, -INF
    weight = None
    if "weight" in OPTIONS[case.options]:
        weight = torch.linspace(0.5, 1.5, C, dtype=torch.float64)
        weight[3::7] = 0
        weight = weight.to(case.dtype)
    return logits, target, weight


def run(case: Case, group: Any = None) -> dict[str, Any]:
    """The values and the derivatives of the case: of this rank's classes, or without a group of all
    of them.
    """
    logits, target, weight = problem(case)
    tangents = [random_like(logits, 7), random_like(logits, 8)]
    factor = random_like(logits, 9)
    if group is not None:
        rank, sizes = group.rank(), case.split
        here = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        logits, factor = logits[:, here], factor[:, here]
        tangents = [t[:, here] for t in tangents]
        target = target[:, here] if case.probabilities else target
        weight = None if weight is None else weight[here]
    options = {**OPTIONS[case.options], "reduction": case.reduction, "return_lse": case.return_lse}
    options["weight"] = weight

    def function(x, t=target, **flag):
        values = fastgpt.cross_entropy(x, t, process_group=group, **options, **flag)
        return values if case.return_lse else (values,)

    with fastgpt.backend(case.backend):
        explanation = fastgpt.explain(
            fastgpt.cross_entropy, logits, target, process_group=group, **options
        )
        assert explanation.backend == case.backend, str(explanation)
        inputs = [logits.clone().requires_grad_()]
        if case.probabilities and not case.inplace:
            inputs.append(target.clone().requires_grad_())
        found: dict[str, Any] = {}
        with Exchanged() as forward:
            flag = {"inplace_backward": True} if case.inplace and group is not None else {}
            values = function(*inputs, **flag)
        upstream = [random_like(v, seed) for seed, v in enumerate(values, 1)]
        found["loss"] = values[0].detach()
        found["lse"] = values[1].detach() if case.return_lse else None
        with Exchanged() as backward:
            gradients = torch.autograd.grad(values, inputs, upstream, create_graph=not case.inplace)
        found["gradients"] = [g.detach().clone() for g in gradients]
        found["exchanged"] = forward.sizes, backward.sizes
        if case.inplace:
            return found
        # Of a function of all gradients: the sum over the ranks.
        total = sum((g.square() * factor.to(g.dtype)).sum() for g in gradients)
        found["second"] = list(torch.autograd.grad(total, inputs))
        tangents = tuple(tangents[: len(inputs)])
        inputs = tuple(x.detach() for x in inputs)
        found["along"] = list(torch.func.jvp(function, inputs, tangents)[1])
        return found


def out_of_range(backend: str, target: int, group: Any) -> str:
    logits, t = random_logits(N, 5)
    t[2], t[3] = target, -100
    try:
        with fastgpt.backend(backend):
            fastgpt.cross_entropy(logits, t, process_group=group)
    except IndexError as error:
        return str(error)
    return "nothing was raised"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks(tmp_path_factory, cases, run, out_of_range)


def close(got, want, dtype, ulps, least=0.0):
    """To some ulp of the largest number; a 16-bit number is one ulp of its own off at most.

    `least`: as though there were a number as large.
    """
    assert got.dtype == want.dtype
    finite = want[want.isfinite()].double()
    size = max(float(finite.abs().max()) if finite.numel() else 0.0, least)
    if dtype == torch.float64:
        tol = {"rtol": 1e-12, "atol": 1e-12 * max(size, 1)}
    else:
        own = torch.finfo(got.dtype).eps if got.dtype.itemsize < 4 else 0.0
        tol = {"rtol": own, "atol": ulps * torch.finfo(torch.float32).eps * size}
    torch.testing.assert_close(got.double(), want.double(), equal_nan=True, **tol)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_classes_of_several_processes_give_another_result(ranks, case):
    found = [of_rank[str(case)] for of_rank in ranks(len(case.split))]
    for result in found:
        assert isinstance(result, dict), result
    want, least = run(case), 0.0
    if case.inputs == "dead" and case.probabilities:  # 0 * inf in one process
        want, *found = (without_rows(result, [0, 1, 4, 5]) for result in (want, *found))
    if case.inputs == "confident":  # one process loses more of these, except of the gradient
        least = 1.0
    for name in ("loss", "lse"):
        if want[name] is not None:
            assert len({r[name].double().numpy().tobytes() for r in found}) == 1
            close(found[0][name], want[name], case.dtype, 8, least)
    for i, gradient in enumerate(want["gradients"]):
        close(torch.cat([r["gradients"][i] for r in found], 1), gradient, case.dtype, 8, least)
    if case.inplace:
        return
    for i, gradient in enumerate(want["second"]):
        got = torch.cat([r["second"][i] for r in found], 1)
        if case.dtype == torch.bfloat16:  # of gradients that were rounded, one ulp apart
            close(got.float(), gradient.float(), torch.float32, 1 << 17, least)
        else:
            close(got, gradient, case.dtype, 64, least)
    for i, tangent in enumerate(want["along"]):
        for result in found:
            close(result["along"][i], tangent, case.dtype, 64, max(least, 1))


def without_rows(result, rows):
    """Only these rows of the results."""
    lists = {name: [x[rows] for x in result[name]] for name in ("gradients", "second", "along")}
    return {name: result[name][rows] for name in ("loss", "lse")} | lists


def of_case(**fields):
    """The cases with these fields."""
    chosen = [c for c in cases() if all(getattr(c, k) == v for k, v in fields.items())]
    return pytest.mark.parametrize("case", chosen, ids=str)


@of_case(inputs="confident")
def test_confident_rows_lose_their_loss_or_target_gradient(ranks, case):
    """To a few ulp of itself where p_t -> 1, whichever rank has the target."""
    found = [of_rank[str(case)] for of_rank in ranks(len(case.split))]
    logits, target, _ = problem(case)
    loss, gradient = found[0]["loss"], torch.cat([r["gradients"][0] for r in found], 1)
    truth = exact(logits, target, random_like(loss))
    rows, slack = torch.arange(N), 1e-8 if case.dtype == torch.float64 else 1e-6
    assert within_half_ulp(loss, truth.loss, slack)
    want = truth.gradient[rows, target.numpy()]
    assert within_half_ulp(gradient[rows, target], want, slack)


@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probability"])
@pytest.mark.parametrize("size", SPLITS)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_slice_without_a_finite_logit_spoils_the_loss(ranks, backend, size, probabilities):
    """As though its classes had no probability and no share of the target, which they have not."""
    for case in cases():
        mine = case.backend == backend and len(case.split) == size
        if mine and case.inputs == "dead" and case.probabilities == probabilities:
            found = [of_rank[str(case)] for of_rank in ranks(size)]
            gradient = torch.cat([r["gradients"][0] for r in found], 1)
            assert found[0]["loss"].isfinite().all(), case
            assert found[0]["lse"].isfinite().all(), case
            assert gradient.isfinite().all(), case
            assert not gradient[2:4, : case.split[0]].any(), case


@pytest.mark.parametrize("size", SPLITS)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_class_out_of_range_is_no_index_error_on_every_rank(ranks, backend, size):
    for target in (-1, 5 * size, 1 << 40):
        for of_rank in ranks(size):
            message = of_rank[backend, target]
            assert f"Target {target} is out of bounds" in message
            assert f"target < {5 * size}" in message


@pytest.mark.parametrize("size", SPLITS)
def test_more_is_exchanged_than_two_small_tensors_forward(ranks, size):
    for case in cases():
        if len(case.split) == size:
            for of_rank in ranks(size):
                forward, backward = of_rank[str(case)]["exchanged"]
                assert len(forward) == 2, case
                assert sum(forward) <= 4 * N * L + 1, case
                assert backward == [], case


def test_something_else_than_a_process_group_is_taken(one_isa):
    logits, target = one_isa.placed(random_logits(N, C))
    for group in ("world", 0, [0, 1], object()):
        with pytest.raises(TypeError, match="process_group must be"):
            fastgpt.cross_entropy(logits, target, process_group=group)
