"""Softmax-cross-entropy of class-index targets over rows: the raw operators and their derivatives.

For a row x of C logits with target t, p = softmax(x), class weights w (1 without them, with the sum
W) and label smoothing s, let

    c = (1 - s) w_t onehot(t) + s / C w       what the row asks of each class
    A = (1 - s) w_t + s / C W                 its sum

so that

    loss           = A logsumexp(x) - <c, x>
    gradient       = g (A p - c)              g is the upstream gradient of the row's loss
    jvp along v    = A <p, v> - <c, v>
    second order   = g A (p * v - p <p, v>)   the Hessian times v, times g

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


class _Rows:
    """A and c of the rows of a call, and their softmax p, in the accumulator type."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ):
        self.dtype = logits.dtype
        x = logits.to(accumulator_dtype(logits.dtype))
        self.ignored = target == ignore_index
        self.target = target.masked_fill(self.ignored, 0)
        self.p = torch.softmax(x.masked_fill(self.ignored.unsqueeze(1), 0), dim=1)
        classes = logits.shape[1]
        self.weight = weight
        self.spread = label_smoothing / max(classes, 1)
        self.at_target: Tensor | float = 1 - label_smoothing  # (1 - s) w_t
        self.total: Tensor | float = self.at_target + self.spread * classes  # A
        if weight is not None:
            self.at_target = self.at_target * weight.index_select(0, self.target)
            self.total = self.at_target + self.spread * weight.sum()

    def _column(self, x: Tensor | float) -> Tensor | float:
        return x.unsqueeze(1) if isinstance(x, Tensor) else x

    def _spread_weight(self) -> Tensor | float:
        return self.spread if self.weight is None else self.spread * self.weight

    def directional(self, v: Tensor) -> Tensor:
        """A <p, v> - <c, v> for each row (N,), zero for the ignored rows."""
        v = v.to(self.p.dtype)
        v_t = v.gather(1, self.target.unsqueeze(1)).squeeze(1)
        along = self.total * (self.p * v).sum(1) - self.at_target * v_t
        if self.spread:
            along = along - (self._spread_weight() * v).sum(1)
        return along.masked_fill(self.ignored, 0)

    def gradient(self, g: Tensor) -> Tensor:
        """g (A p - c) for each row (N, C), zero for the ignored rows."""
        classes = torch.arange(self.p.shape[1], device=self.p.device)
        onehot = (classes == self.target.unsqueeze(1)).to(self.p.dtype)
        c = self._column(self.at_target) * onehot + self._spread_weight()
        gradient = g.unsqueeze(1) * (self._column(self.total) * self.p - c)
        return gradient.masked_fill(self.ignored.unsqueeze(1), 0)

    def hessian_product(self, g: Tensor, v: Tensor) -> Tensor:
        """g A (p * v - p <p, v>) for each row (N, C), zero for the ignored rows."""
        v = v.to(self.p.dtype)
        product = self.p * (v - (self.p * v).sum(1, keepdim=True))
        product = (g * self.total).unsqueeze(1) * product
        return product.masked_fill(self.ignored.unsqueeze(1), 0)

    def second_order(self, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint of the gradient along v (N, C), with respect to g and to the logits."""
        return self.directional(v), self.hessian_product(g, v).to(self.dtype)


# ---- the raw operators ----


def new_losses(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward's results, not yet written: loss, row_max and rest."""
    dtype = accumulator_dtype(logits.dtype)
    loss, row_max, rest = (logits.new_empty(logits.shape[:1], dtype=dtype) for _ in range(3))
    return loss, row_max, rest


def new_gradient(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    """The backward's result, not yet written."""
    return logits.new_empty(logits.shape)


def define(namespace: str) -> Launcher:
    """Define a backend's raw operators in `namespace`; its kernels are registered elsewhere.

    logits (N, C), target (N,) int64; weight (C,) and the statistics (N,) in the accumulator type.
    """
    forward, backward = (
        f"{namespace}::cross_entropy_forward",
        f"{namespace}::cross_entropy_backward",
    )
    torch.library.define(
        forward,
        "(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing)"
        " -> (Tensor loss, Tensor row_max, Tensor rest)",
    )
    torch.library.define(
        backward,
        "(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor row_max,"
        " Tensor rest, int ignore_index, float label_smoothing) -> Tensor",
    )
    operators = getattr(torch.ops, namespace)
    launcher = Launcher(
        operators.cross_entropy_forward.default, operators.cross_entropy_backward.default
    )
    torch.library.register_fake(forward, new_losses)
    torch.library.register_fake(backward, new_gradient)

    def per_weight(info, in_dims, operator, inputs):  # type: ignore[no-untyped-def]
        """Weights of each problem's own: one problem after another."""
        outputs = [
            operator(
                *(
                    x if dim is None else x.select(dim, i)
                    for x, dim in zip(inputs, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])

    def forward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        if in_dims[2] is not None:
            return per_weight(info, in_dims, launcher.forward, inputs)
        folded = fold(info, in_dims[:2], inputs[:2])
        outputs = launcher.forward(*folded, *inputs[2:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0, 0)

    def backward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        if in_dims[3] is not None:
            return per_weight(info, in_dims, launcher.backward, inputs)
        tensors = (*inputs[:3], *inputs[4:6])
        *rows, row_max, rest = fold(info, (*in_dims[:3], *in_dims[4:6]), tensors)
        gradient = launcher.backward(*rows, inputs[3], row_max, rest, *inputs[6:])
        return gradient.unflatten(0, (info.batch_size, -1)), 0

    torch.library.register_vmap(forward, forward_vmap)
    torch.library.register_vmap(backward, backward_vmap)

    # For whoever calls the operators themselves, and for graphs that hold them.
    def forward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options = inputs[3:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:3], *output[1:])

    def forward_backward(ctx, grad_loss, _grad_row_max, _grad_rest):  # type: ignore[no-untyped-def]
        _refuse_weight_gradient(ctx.needs_input_grad[2])
        gradient = launcher.backward(grad_loss, *ctx.saved_tensors, *ctx.options)
        return gradient, None, None, None, None

    def backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options = inputs[6:]
        ctx.save_for_backward(*inputs[:4])

    def backward_backward(ctx, v):  # type: ignore[no-untyped-def]
        _refuse_weight_gradient(ctx.needs_input_grad[3])
        grad_loss, *tensors = ctx.saved_tensors
        adjoints = _Rows(*tensors, *ctx.options).second_order(v, grad_loss)
        return *adjoints, *(None,) * 6

    torch.library.register_autograd(forward, forward_backward, setup_context=forward_setup)
    torch.library.register_autograd(backward, backward_backward, setup_context=backward_setup)
    return launcher


LAUNCHERS = {"native": define("fastgpt")}


def _refuse_weight_gradient(wanted: bool) -> None:
    # The public function refuses such a call itself; torch.func hides some from it.
    if wanted:
        raise RuntimeError(
            "cross_entropy is not differentiable with respect to weight for class-index targets"
        )


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
        weight: Tensor | None,
        row_max: Tensor,
        rest: Tensor,
        ignore_index: int,
        label_smoothing: float,
        backend: str,
    ) -> Tensor:
        return LAUNCHERS[backend].backward(
            grad_loss, logits, target, weight, row_max, rest, ignore_index, label_smoothing
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[6:8]
        ctx.set_materialize_grads(False)  # else a weight has a tangent of zeros
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> tuple[Any, ...]:
        _refuse_weight_gradient(ctx.needs_input_grad[3])
        if v is None:
            return (None,) * 9
        grad_loss, *tensors = ctx.saved_tensors
        adjoints = _Rows(*tensors, *ctx.options).second_order(v, grad_loss)
        return *adjoints, *(None,) * 7

    @staticmethod
    def jvp(
        ctx: Any,
        grad_tangent: Tensor | None,
        logits_tangent: Tensor | None,
        target_tangent: None,
        weight_tangent: Tensor | None,
        *_: Any,
    ) -> Tensor:
        _refuse_weight_gradient(weight_tangent is not None)
        grad_loss, *tensors = ctx.saved_tensors
        rows = _Rows(*tensors, *ctx.options)
        tangent = torch.zeros_like(rows.p)
        if grad_tangent is not None:
            tangent = tangent + rows.gradient(grad_tangent)
        if logits_tangent is not None:
            tangent = tangent + rows.hessian_product(grad_loss, logits_tangent)
        return tangent.to(rows.dtype)


class CrossEntropy(Function):
    """Rows of logits to rows of loss, by a backend's kernels.

    apply(logits (N, C), target (N,) int64, weight (C,) in the accumulator type or None,
    ignore_index, label_smoothing, backend) -> (loss, row_max, rest), each (N,) in the accumulator
    type. `row_max` is max_j x_j and `rest` the sum over j != t of exp(x_j - row_max); they have no
    gradient. Raises IndexError for a target outside 0 <= t < C that is not `ignore_index`; on a
    GPU that is an assertion of the device's, as with torch.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _launch(
            LAUNCHERS[backend].forward, logits, target, weight, ignore_index, label_smoothing
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[3:]
        ctx.set_materialize_grads(False)  # else a weight has a tangent of zeros
        # The same tensors for both: torch's vmap rule keeps the batch dimensions of one list only.
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.save_for_forward(*inputs[:3], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        _refuse_weight_gradient(ctx.needs_input_grad[2])
        if grad_loss is None:
            return (None,) * 6
        gradient = CrossEntropyBackward.apply(grad_loss, *ctx.saved_tensors, *ctx.options)
        return gradient, *(None,) * 5

    @staticmethod
    def jvp(
        ctx: Any, v: Tensor, target_tangent: None, weight_tangent: Tensor | None, *_: Any
    ) -> tuple[Tensor, ...]:
        _refuse_weight_gradient(weight_tangent is not None)
        rows = _Rows(*ctx.saved_tensors[:3], *ctx.options[:2])
        tangent = rows.directional(v)
        # torch's vmap rule stumbles over None when a jvp surrounds the vmap, and torch insists on
        # None for an output that is marked as non-differentiable; hence neither.
        zero = torch.zeros_like(tangent)
        return tangent, zero, zero


# Without it the compiler refuses a Function that has a jvp; and without the jvp, compiled
# forward-mode derivatives would be zeros.
torch._dynamo.allow_in_graph(CrossEntropy)
torch._dynamo.allow_in_graph(CrossEntropyBackward)
