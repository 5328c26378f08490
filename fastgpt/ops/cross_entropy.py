"""Softmax-cross-entropy of class-index targets over rows: the raw operators and their derivatives.

For a row x of C logits with target t and p = softmax(x):

    loss           = logsumexp(x) - x_t
    gradient       = g (p - onehot(t))              g is the upstream gradient of the row's loss
    jvp along v    = <p, v> - v_t
    second order   = g (p * v - p <p, v>)           the Hessian times v, times g

The first two run in a kernel. The last two are torch operations on the logits, so that they can be
differentiated again, to any order. A row whose target is `ignore_index` has loss 0 and gradient 0,
whatever its logits hold.

`CrossEntropy` and `CrossEntropyBackward` are two Functions because the first one's backward is
differentiable only if it is made of differentiable pieces, and a kernel is not one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.ops.raw import Launcher, accumulator_dtype, fold

# ---- the call ----


class CrossEntropyCall(NamedTuple):
    """A checked call of `cross_entropy`, with a batch dimension in any case."""

    logits: Tensor  # (N, C, ...)
    target: Tensor  # (N, ...) int64 or uint8, or (N, C, ...) of a floating-point type
    weight: Tensor | None  # (C,)
    ignore_index: int
    reduction: str
    label_smoothing: float
    loss_shape: torch.Size  # of the unreduced loss
    loss_dtype: torch.dtype


def class_rows(logits: Tensor) -> Tensor | None:
    """Logits (N, C, ...) as rows (R, C) without a copy, or None where their strides forbid it.

    The kernels read a row with unit stride, and rows at any one distance. So (N, T, C) seen as
    (N, C, T) through a transpose is rows; a contiguous (N, C, T) is not.
    """
    x = logits.movedim(1, -1)
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return None
    for i in range(x.dim() - 2):
        if x.shape[i] != 1 and x.stride(i) != x.stride(i + 1) * x.shape[i + 1]:
            return None
    return x.flatten(0, -2)


# ---- the closed forms in torch operations ----


def _probabilities(logits: Tensor, kept: Tensor) -> Tensor:
    """softmax(logits) (N, C) in the accumulator type; uniform in the ignored rows."""
    x = logits.to(accumulator_dtype(logits.dtype))
    return torch.softmax(x.masked_fill(~kept.unsqueeze(1), 0), dim=1)


def _directional(p: Tensor, v: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """<p, v> - v_t for each row (N,), zero for the ignored rows."""
    v_t = v.gather(1, target.masked_fill(~kept, 0).unsqueeze(1)).squeeze(1)
    return ((p * v).sum(1) - v_t).masked_fill(~kept, 0)


def _gradient(p: Tensor, g: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """g (p - onehot(t)) for each row (N, C), zero for the ignored rows."""
    classes = torch.arange(p.shape[1], device=p.device)
    onehot = (classes == target.unsqueeze(1)).to(p.dtype)
    return (g.unsqueeze(1) * (p - onehot)).masked_fill(~kept.unsqueeze(1), 0)


def _hessian_product(p: Tensor, g: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """g (p * v - p <p, v>) for each row (N, C), zero for the ignored rows."""
    product = p * (v - (p * v).sum(1, keepdim=True))
    return (g.unsqueeze(1) * product).masked_fill(~kept.unsqueeze(1), 0)


def _jvp(v: Tensor, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    kept = target != ignore_index
    p = _probabilities(logits, kept)
    return _directional(p, v.to(p.dtype), target, kept)


def _second_order(
    v: Tensor, grad_loss: Tensor, logits: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The adjoint of the gradient along v (N, C), with respect to grad_loss and to logits."""
    kept = target != ignore_index
    p = _probabilities(logits, kept)
    v = v.to(p.dtype)
    along = _directional(p, v, target, kept)
    return along, _hessian_product(p, grad_loss, v, kept).to(logits.dtype)


# ---- the raw operators ----


def _forward_fake(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    dtype = accumulator_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[:1], dtype=dtype) for _ in range(3))


def _backward_fake(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    row_max: Tensor,
    rest: Tensor,
    ignore_index: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


def define(namespace: str) -> Launcher:
    """Define a backend's raw operators in `namespace`; its kernels are registered elsewhere."""
    forward, backward = (
        f"{namespace}::cross_entropy_forward",
        f"{namespace}::cross_entropy_backward",
    )
    torch.library.define(
        forward,
        "(Tensor logits, Tensor target, int ignore_index) -> "
        "(Tensor loss, Tensor row_max, Tensor rest)",
    )
    torch.library.define(
        backward,
        "(Tensor grad_loss, Tensor logits, Tensor target, Tensor row_max, Tensor rest,"
        " int ignore_index) -> Tensor",
    )
    operators = getattr(torch.ops, namespace)
    launcher = Launcher(
        operators.cross_entropy_forward.default, operators.cross_entropy_backward.default
    )
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)

    def forward_vmap(info, in_dims, logits, target, ignore_index):  # type: ignore[no-untyped-def]
        folded = fold(info, in_dims[:2], (logits, target))
        outputs = launcher.forward(*folded, ignore_index)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0, 0)

    def backward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        folded = fold(info, in_dims[:5], inputs[:5])
        return launcher.backward(*folded, inputs[5]).unflatten(0, (info.batch_size, -1)), 0

    torch.library.register_vmap(forward, forward_vmap)
    torch.library.register_vmap(backward, backward_vmap)

    # For whoever calls the operators themselves, and for graphs that hold them.
    def forward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        logits, target, ctx.ignore_index = inputs
        _, row_max, rest = output
        ctx.mark_non_differentiable(row_max, rest)
        ctx.save_for_backward(logits, target, row_max, rest)

    def forward_backward(ctx, grad_loss, _grad_row_max, _grad_rest):  # type: ignore[no-untyped-def]
        return launcher.backward(grad_loss, *ctx.saved_tensors, ctx.ignore_index), None, None

    def backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        grad_loss, logits, target, _row_max, _rest, ctx.ignore_index = inputs
        ctx.save_for_backward(grad_loss, logits, target)

    def backward_backward(ctx, v):  # type: ignore[no-untyped-def]
        grad_loss, logits, target = ctx.saved_tensors
        along, product = _second_order(v, grad_loss, logits, target, ctx.ignore_index)
        return along, product, None, None, None, None

    torch.library.register_autograd(forward, forward_backward, setup_context=forward_setup)
    torch.library.register_autograd(backward, backward_backward, setup_context=backward_setup)
    return launcher


LAUNCHERS = {"native": define("fastgpt")}


# ---- the Functions ----


def _launch(operator: Any, *arguments: Any) -> Any:
    """Call a raw operator, with torch's exception: the stable ABI knows RuntimeError only."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        text = str(error)
        if "is out of bounds" in text:
            raise IndexError(text[text.index("Target ") :].splitlines()[0]) from None
        raise


class CrossEntropyBackward(Function):
    """The gradient of `CrossEntropy` as an op of its own, so that it has derivatives too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        row_max: Tensor,
        rest: Tensor,
        ignore_index: int,
        backend: str,
    ) -> Tensor:
        return LAUNCHERS[backend].backward(grad_loss, logits, target, row_max, rest, ignore_index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_loss, logits, target, _row_max, _rest, ctx.ignore_index, _backend = inputs
        ctx.save_for_backward(grad_loss, logits, target)
        ctx.save_for_forward(grad_loss, logits, target)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        grad_loss, logits, target = ctx.saved_tensors
        along, product = _second_order(v, grad_loss, logits, target, ctx.ignore_index)
        return along, product, None, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, grad_tangent: Tensor | None, logits_tangent: Tensor | None, *_: Any
    ) -> Tensor:
        grad_loss, logits, target = ctx.saved_tensors
        kept = target != ctx.ignore_index
        p = _probabilities(logits, kept)
        tangent = torch.zeros_like(p)
        if grad_tangent is not None:
            tangent = tangent + _gradient(p, grad_tangent, target, kept)
        if logits_tangent is not None:
            tangent = tangent + _hessian_product(p, grad_loss, logits_tangent.to(p.dtype), kept)
        return tangent.to(logits.dtype)


class CrossEntropy(Function):
    """Rows of logits to rows of loss, by a backend's kernels.

    apply(logits (N, C), target (N,) int64, ignore_index, backend) -> (loss, row_max, rest), each
    (N,) in the accumulator type. `row_max` is max_j x_j and `rest` the sum over j != t of exp(x_j
    - row_max); they have no gradient. Raises IndexError for a target outside 0 <= t < C that is
    not `ignore_index`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, ignore_index: int, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _launch(LAUNCHERS[backend].forward, logits, target, ignore_index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, ctx.ignore_index, ctx.backend = inputs
        _, row_max, rest = output
        # The same tensors for both: torch's vmap rule keeps the batch dimensions of one list only.
        ctx.save_for_backward(logits, target, row_max, rest)
        ctx.save_for_forward(logits, target, row_max, rest)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        grad_logits = CrossEntropyBackward.apply(
            grad_loss, *ctx.saved_tensors, ctx.ignore_index, ctx.backend
        )
        return grad_logits, None, None, None

    @staticmethod
    def jvp(ctx: Any, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        logits, target, _row_max, _rest = ctx.saved_tensors
        tangent = _jvp(v, logits, target, ctx.ignore_index)
        # torch's vmap rule stumbles over None when a jvp surrounds the vmap, and torch insists on
        # None for an output that is marked as non-differentiable; hence neither.
        zero = torch.zeros_like(tangent)
        return tangent, zero, zero


# Without it the compiler refuses a Function that has a jvp; and without the jvp, compiled
# forward-mode derivatives would be zeros.
torch._dynamo.allow_in_graph(CrossEntropy)
torch._dynamo.allow_in_graph(CrossEntropyBackward)
