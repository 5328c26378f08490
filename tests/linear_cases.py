"""Linear cross-entropy in the tests: problems, the truth in a wider type, torch's composition."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from oracle import exact_options, torchs_composition, wide

import fastgpt

REDUCTIONS = ("none", "mean", "sum")
GRADIENTS = ("grad_input", "grad_weight", "grad_bias")


class LinearProblem(NamedTuple):
    """What a call is made of, all classes and one matrix."""

    input: torch.Tensor  # (N, D)
    linear_weight: torch.Tensor  # (C, D)
    linear_bias: torch.Tensor | None  # (C,)
    target: torch.Tensor  # (N,)


def random_problem(
    n, classes, features, *, dtype=torch.float64, scale=1.0, bias=True, seed=0
) -> LinearProblem:
    """Inputs, a matrix and a bias whose logits are normal times `scale`, and targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, W = normal(n, features), normal(classes, features) * scale / max(1, features) ** 0.5
    b = normal(classes) if bias else None
    target = torch.randint(classes, (n,), generator=generator)
    return LinearProblem(x.to(dtype), W.to(dtype), None if b is None else b.to(dtype), target)


class ExactLinear(NamedTuple):
    """Unreduced, as NumPy arrays of a type wider than the input's."""

    loss: np.ndarray
    lse: np.ndarray
    grad_input: np.ndarray
    grad_weight: np.ndarray
    grad_bias: np.ndarray
    grad_target: np.ndarray | None  # of probabilities
    of_logits: np.ndarray  # the gradient of the logits, S


def exact_linear(
    problem: LinearProblem, upstream, upstream_lse=None, *, weight=None, smoothing=0.0, softcap=None
) -> ExactLinear:
    """Loss and lse of the rows, and the gradients for `upstream` and `upstream_lse` (N,).

    z = x W^T + b, and with S the gradient of z as in `exact_options`: S W, S^T x and S^T 1.
    """
    x, W = wide(problem.input), wide(problem.linear_weight)
    z = x @ W.T
    if problem.linear_bias is not None:
        z = z + wide(problem.linear_bias)
    truth = exact_options(z, problem.target, upstream, upstream_lse, weight, smoothing, softcap)
    S = truth.gradient
    return ExactLinear(truth.loss, truth.lse, S @ W, S.T @ x, S.sum(0), truth.target_gradient, S)


def without_rows(problem: LinearProblem, kept: torch.Tensor) -> LinearProblem:
    """Only the rows that count."""
    x, W, b, target = problem
    return LinearProblem(x[kept], W, b, target[kept])


def composition(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean",
    ignore_index=None, label_smoothing=0.0, z_loss=0.0, softcap=None, return_lse=False, shift=False,
    recompute=False,
):  # fmt: skip
    """`fastgpt.linear_cross_entropy` in torch's own functions, in which torch has every derivative.
    What rows of one matrix hold that are ignored reaches nothing.
    """
    if shift:
        B, T = input.shape[0], max(0, input.shape[1] - 1)
        input, target = input[:, :-1].flatten(0, 1), target[:, 1:].flatten(0, 1)
    ignore_index = -100 if ignore_index is None else ignore_index
    of_rows = input.dim() == 2 and target.dim() == 1
    if of_rows and not target.is_floating_point():
        input = input.masked_fill((target == ignore_index).unsqueeze(1), 0)
    shape = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.reshape(-1, linear_weight.shape[-1]), bias)
    found = torchs_composition(
        logits.reshape(*input.shape[:-1], *shape), target, weight, reduction=reduction,
        label_smoothing=label_smoothing, ignore_index=ignore_index, softcap=softcap, z_loss=z_loss,
        return_lse=return_lse,
    )  # fmt: skip
    if not shift:
        return found
    loss, lse = found if return_lse else (found, None)
    loss = loss.view(B, T) if reduction == "none" else loss
    return (loss, lse.view(B, T)) if return_lse else loss


def linear_results(
    function, problem: LinearProblem, upstream, upstream_lse=None, **options
) -> dict[str, torch.Tensor]:
    """By the names of `ExactLinear`: loss, lse if it has an upstream gradient, and the gradients of
    all that is floating-point, for these upstream gradients.
    """
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in problem._asdict().items()
        if x is not None and x.is_floating_point()
    }
    arguments = {**problem._asdict(), **leaves}
    if upstream_lse is None:
        outputs, upstreams = (function(**arguments, **options),), (upstream,)
    else:
        outputs = function(**arguments, **options, return_lse=True)
        upstreams = upstream, upstream_lse.to(outputs[1].dtype)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstreams)
    found = dict(zip(("loss", "lse"), (x.detach() for x in outputs), strict=False))
    names = {"input": "input", "linear_weight": "weight", "linear_bias": "bias", "target": "target"}
    for name, gradient in zip(leaves, gradients, strict=True):
        found[f"grad_{names[name]}"] = gradient
    return found


def same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def runs_on(backend, *args, **options) -> bool:
    """Whether the call runs on the backend, by `explain`."""
    explanation = fastgpt.explain(fastgpt.linear_cross_entropy, *args, **options)
    return explanation.backend == backend.name
