"""Softmax-cross-entropy over rows: the raw operators and their derivatives.

A row has C logits x. With softcap k they first become y = k tanh(x / k), else y = x. Let
lse = logsumexp(y), p = softmax(y), w the class weights (1 without them) and

    c = hard w_t onehot(t) + spread w         for the class t
    c = w (hard q + spread)                   for probabilities q

the share of each class, A their sum; hard = 1 - s and spread = s / C with label smoothing s. Then

    loss           = A lse - <c, y> = sum_j c_j (lse - y_j)
    gradient       = y' (B p - g c)           B = g A + g_lse
    of q           = g hard w (lse - y)
    jvp along v    = A <p, u> - <c, u>        u = y' v; that of lse is <p, u>
    second order   = y' B (p u - p <p, u>) + y'' v (B p - g c)

where g and g_lse are the upstream gradients of the row's loss and lse. So a z-loss, or any other
function of lse, needs nothing from a kernel but g_lse.

Loss, lse and gradient come from kernels; the rest is torch operations on the logits, so that it
can be differentiated again, to any order. A row whose target is `ignore_index` has loss 0, lse 0
and gradient 0, whatever its logits hold.

`CrossEntropy` and `CrossEntropyBackward` are two Functions because the first one's backward is
differentiable only if it is made of differentiable pieces, and a kernel is not one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.ops.raw import Launcher, accumulator_dtype, fold, one_by_one

# ---- the call ----


class CrossEntropyCall(NamedTuple):
    """A checked call of `cross_entropy`, with a batch dimension in any case."""

    logits: Tensor  # (N, C, ...)
    target: Tensor  # (N, ...) int64 or uint8, or (N, C, ...) of a floating-point type
    weight: Tensor | None  # (C,)
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    inplace_backward: bool
    return_lse: bool
    process_group: Any  # of the ranks that hold the other classes, or None
    loss_shape: torch.Size  # of the unreduced loss
    loss_dtype: torch.dtype


class Options(NamedTuple):
    """What the raw operators take beside tensors."""

    ignore_index: int = -100
    hard: float = 1.0  # share of the target: 1 - s
    spread: float = 0.0  # share of each class: s / C
    softcap: float = 0.0  # 0: none
    # The logits are a slice of the classes: a target outside 0 <= t < C is in another slice. Loss
    # and lse are in float64, to be combined with those of the other slices.
    partial: bool = False


def shares(label_smoothing: float, classes: float) -> tuple[float, float]:
    """`hard` and `spread` of Options. Smoothing below zero is none, as torch's."""
    smoothing = max(float(label_smoothing), 0.0)
    return 1 - smoothing, smoothing / classes if smoothing else 0.0


def _at_one_distance(x: Tensor, first: int, last: int) -> bool:
    """Whether the dimensions [first, last) can be seen as one without a copy."""
    return all(
        x.shape[i] == 1 or x.stride(i) == x.stride(i + 1) * x.shape[i + 1]
        for i in range(first, last - 1)
    )


def positions(logits: Tensor) -> Tensor | None:
    """Logits (N, C, ...) as (N, C) or (N, C, L) without a copy, or None where their strides, those
    of the positions to one another, forbid it.
    """
    if logits.dim() <= 3:
        return logits
    return logits.flatten(2) if _at_one_distance(logits, 2, logits.dim()) else None


def by_columns(logits: Tensor) -> bool:
    """Whether the classes of (N, C) or (N, C, L) lie apart in memory, and the rows or positions
    side by side.
    """
    if logits.shape[1] == 1 or logits.stride(1) == 1:
        return False
    return logits.stride(2 if logits.dim() == 3 else 0) == 1


def kernel_view(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, C, ...) and their targets as the raw operators take them: (N, C) or (N, C, L).

    Copies where `positions` finds no view. The transpose of a matrix (C, N) is one sequence.
    """
    if logits.dim() == 2 and by_columns(logits):
        return logits.t().unsqueeze(0), target.t().unsqueeze(0)
    if logits.dim() <= 3:
        return logits, target
    return logits.flatten(2), target.flatten(2 if target.is_floating_point() else 1)


def class_rows(logits: Tensor) -> Tensor | None:
    """Logits (N, C, ...) as rows (R, C) without a copy, or None where their strides forbid it: the
    classes of a row must lie together, and the rows at any one distance. So (N, T, C) seen as
    (N, C, T) through a transpose is rows; a contiguous (N, C, T) is not.
    """
    x = logits.movedim(1, -1)
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return None
    return x.flatten(0, -2) if _at_one_distance(x, 0, x.dim() - 1) else None


# ---- the closed forms in torch operations ----


class _Rows:
    """y, p, c and A of the rows of a call, in the accumulator type. The classes are dimension 1."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        hard: float,
        spread: float,
        softcap: float,
        partial: bool,
    ):
        self.dtype = logits.dtype
        accumulator = accumulator_dtype(logits.dtype)
        self.loss_dtype = torch.float64 if partial else accumulator
        x = logits.to(accumulator)
        of_probabilities = target.is_floating_point()
        self.ignored = None if of_probabilities else target == ignore_index
        x = self._without_ignored(x, 1)
        self.slope: Tensor | None = None  # y'
        self.bend: Tensor | None = None  # y''
        if softcap:
            u = torch.tanh(x / softcap)
            self.slope = 1 - u * u
            self.bend = -2 / softcap * u * self.slope
            x = softcap * u
        self.y = x
        if partial:  # where a slice is all -inf, none of the probability is in it
            dead = (x == -torch.inf).all(1, keepdim=True)
            self.p = torch.softmax(x.masked_fill(dead, 0), 1).masked_fill(dead, 0)
        else:
            self.p = torch.softmax(x, 1)
        shape = (1, -1, *[1] * (logits.dim() - 2))
        self.weight = None if weight is None else weight.view(shape)
        share: Tensor | float = spread if self.weight is None else spread * self.weight
        if of_probabilities:
            self.c: Tensor = hard * target.to(accumulator)
            if self.weight is not None:
                self.c = self.c * self.weight
            self.c = self.c + share
            self.hard = hard
        else:
            # A target that is not here, or ignored, is no column at all.
            classes = torch.arange(logits.shape[1], device=logits.device).view(shape)
            onehot = (classes == target.unsqueeze(1)).to(accumulator)
            if self.weight is not None:
                onehot = onehot * self.weight
            self.c = hard * onehot + share
        self.total = self.c.sum(1)  # A

    def _without_ignored(self, x: Tensor, classes: int | None = None) -> Tensor:
        """Zero for the ignored rows; x (N, C, ...) if `classes`, else (N, ...)."""
        if self.ignored is None:
            return x
        return x.masked_fill(self.ignored if classes is None else self.ignored.unsqueeze(1), 0)

    def _capped(self, v: Tensor) -> Tensor:
        v = v.to(self.p.dtype)
        return v if self.slope is None else v * self.slope

    def lse_along(self, v: Tensor) -> Tensor:
        """The tangent of lse along v (N, C, ...) of the logits: (N, ...)."""
        along = (self.p * self._capped(v)).sum(1)
        return self._without_ignored(along).to(self.loss_dtype)

    def loss_along(self, v: Tensor) -> Tensor:
        """The tangent of the loss along v of the logits: (N, ...)."""
        u = self._capped(v)
        along = self.total * (self.p * u).sum(1) - (self.c * u).sum(1)
        return self._without_ignored(along).to(self.loss_dtype)

    def _target_slope(self) -> Tensor:
        """hard w (lse - y), what the loss gains by each probability."""
        slope = -self.hard * torch.log_softmax(self.y, 1)
        return slope if self.weight is None else slope * self.weight

    def loss_along_target(self, v: Tensor) -> Tensor:
        """The tangent of the loss along v (N, C, ...) of the probabilities."""
        return (self._target_slope() * v.to(self.p.dtype)).sum(1).to(self.loss_dtype)

    def _column(self, g: Tensor) -> Tensor:
        return g.to(self.p.dtype).unsqueeze(1)

    def _slopes(self, g: Tensor | None, g_lse: Tensor | None) -> Tensor:
        """B p - g c."""
        slopes = torch.zeros_like(self.p)
        if g is not None:
            slopes = slopes + self._column(g) * (self.total.unsqueeze(1) * self.p - self.c)
        if g_lse is not None:
            slopes = slopes + self._column(g_lse) * self.p
        return slopes

    def gradient(self, g: Tensor | None, g_lse: Tensor | None) -> Tensor:
        """The gradient of the logits for upstream gradients of loss and lse."""
        gradient = self._slopes(g, g_lse)
        if self.slope is not None:
            gradient = gradient * self.slope
        return self._without_ignored(gradient, 1)

    def target_gradient(self, g: Tensor) -> Tensor:
        """The gradient of the probabilities."""
        return self._column(g) * self._target_slope()

    def gradient_along(self, g: Tensor, g_lse: Tensor | None, v: Tensor) -> Tensor:
        """The tangent of the gradient along v of the logits: their Hessian times v."""
        u = self._capped(v)
        B = self._column(g) * self.total.unsqueeze(1)
        if g_lse is not None:
            B = B + self._column(g_lse)
        product = B * self.p * (u - (self.p * u).sum(1, keepdim=True))
        if self.slope is not None and self.bend is not None:
            product = product * self.slope + self.bend * v.to(u.dtype) * self._slopes(g, g_lse)
        return self._without_ignored(product, 1)

    def gradient_along_target(self, g: Tensor, v: Tensor) -> Tensor:
        """The tangent of the gradient along v of the probabilities."""
        dc = self.hard * v.to(self.p.dtype)
        if self.weight is not None:
            dc = dc * self.weight
        tangent = self._column(g) * (self.p * dc.sum(1, keepdim=True) - dc)
        return tangent if self.slope is None else tangent * self.slope

    def target_adjoint(self, g: Tensor, v: Tensor) -> Tensor:
        """The adjoint of the gradient along v (N, C, ...) with respect to the probabilities."""
        u = self._capped(v)
        adjoint = self.hard * self._column(g) * ((self.p * u).sum(1, keepdim=True) - u)
        return adjoint if self.weight is None else adjoint * self.weight


def _second_order(
    options: Options,
    of_target: bool,
    v: Tensor,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The adjoints of the gradient along v: of grad_loss, grad_lse, logits and target."""
    rows = _Rows(logits, target, weight, *options)
    return (
        rows.loss_along(v).to(grad_loss.dtype),
        None if grad_lse is None else rows.lse_along(v).to(grad_lse.dtype),
        rows.gradient_along(grad_loss, grad_lse, v).to(logits.dtype),
        rows.target_adjoint(grad_loss, v).to(target.dtype) if of_target else None,
    )


# ---- the raw operators ----


def new_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward's results, not yet written: loss, lse, row_max and rest."""
    shape = logits.shape[:1] + logits.shape[2:]
    dtype = accumulator_dtype(logits.dtype)
    wide = torch.float64 if Options(*options).partial else dtype
    return tuple(logits.new_empty(shape, dtype=d) for d in (wide, wide, dtype, dtype))  # type: ignore[return-value]


def new_gradient(grad_loss: Tensor, grad_lse: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    """The backward's result, not yet written: dense, and with the classes last in memory if they
    are so in the logits.
    """
    if logits.dim() == 3 and logits.stride(1) == 1:
        N, C, L = logits.shape
        return logits.new_empty_strided((N, C, L), (C * L, 1, C))
    return logits.new_empty(logits.shape)


_OPTIONS = "int ignore_index, float hard, float spread, float softcap, bool partial"


def define(namespace: str) -> Launcher:
    """Define a backend's raw operators in `namespace`; its kernels are registered elsewhere.

    logits (N, C) or (N, C, L); target (N,) or (N, L) int64, or probabilities shaped like the logits
    in their type or the accumulator's; weight (C,), grad_loss, grad_lse and the statistics row_max
    and rest, shaped like the unreduced loss, in the accumulator type. row_max is max_j y_j; rest is
    the sum over j of exp(y_j - row_max) without the target's, or of all for probabilities and
    targets in another slice. `backward_in_place` writes the gradient over the logits.
    """
    names = [f"{namespace}::cross_entropy_{which}" for which in ("forward", "backward")]
    forward, backward = names
    in_place = f"{namespace}::cross_entropy_backward_in_place"
    torch.library.define(
        forward,
        f"(Tensor logits, Tensor target, Tensor? weight, {_OPTIONS})"
        " -> (Tensor loss, Tensor lse, Tensor row_max, Tensor rest)",
    )
    gradients = "Tensor grad_loss, Tensor? grad_lse"
    saved = f"Tensor target, Tensor? weight, Tensor row_max, Tensor rest, {_OPTIONS}"
    torch.library.define(backward, f"({gradients}, Tensor logits, {saved}) -> Tensor")
    torch.library.define(in_place, f"({gradients}, Tensor(a!) logits, {saved}) -> ()")
    operators = getattr(torch.ops, namespace)
    launcher = Launcher(
        operators.cross_entropy_forward.default, operators.cross_entropy_backward.default
    )
    torch.library.register_fake(forward, new_losses)
    torch.library.register_fake(backward, new_gradient)
    torch.library.register_fake(in_place, lambda *_: None)

    def forward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        if in_dims[2] is not None:  # weights of each problem's own
            return one_by_one(info, in_dims, launcher.forward, inputs)
        folded = fold(info, in_dims[:2], inputs[:2])
        outputs = launcher.forward(*folded, *inputs[2:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * 4

    def backward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        if in_dims[4] is not None:
            return one_by_one(info, in_dims, launcher.backward, inputs)
        tensors = (*inputs[:4], *inputs[5:7])
        *rows, row_max, rest = fold(info, (*in_dims[:4], *in_dims[5:7]), tensors)
        gradient = launcher.backward(*rows, inputs[4], row_max, rest, *inputs[7:])
        return gradient.unflatten(0, (info.batch_size, -1)), 0

    torch.library.register_vmap(forward, forward_vmap)
    torch.library.register_vmap(backward, backward_vmap)

    # For whoever calls the operators themselves, and for graphs that hold them.
    def forward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options = Options(*inputs[3:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[:3], *output[2:])

    def forward_backward(ctx, grad_loss, grad_lse, *_):  # type: ignore[no-untyped-def]
        _refuse_weight_gradient(ctx.needs_input_grad[2])
        # Once: a checkpoint recomputes at the first access, and refuses a second.
        saved = ctx.saved_tensors
        logits, target, weight, row_max, _ = saved
        dtype = row_max.dtype
        gradient = launcher.backward(grad_loss.to(dtype), grad_lse.to(dtype), *saved, *ctx.options)
        of_target = None
        if ctx.needs_input_grad[1]:
            rows = _Rows(logits, target, weight, *ctx.options)
            of_target = rows.target_gradient(grad_loss).to(target.dtype)
        return gradient, of_target, *(None,) * 6

    def backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options = Options(*inputs[7:])
        ctx.save_for_backward(*inputs[:5])

    def backward_backward(ctx, v):  # type: ignore[no-untyped-def]
        _refuse_weight_gradient(ctx.needs_input_grad[4])
        adjoints = _second_order(ctx.options, ctx.needs_input_grad[3], v, *ctx.saved_tensors)
        return *adjoints, *(None,) * 8

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


def launch(operator: Any, *arguments: Any) -> Any:
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
        grad_lse: Tensor | None,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        row_max: Tensor,
        rest: Tensor,
        ignore_index: int,
        hard: float,
        spread: float,
        softcap: float,
        partial: bool,
        backend: str,
    ) -> Tensor:
        return LAUNCHERS[backend].backward(
            grad_loss, grad_lse, logits, target, weight, row_max, rest,
            ignore_index, hard, spread, softcap, partial,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = Options(*inputs[7:12])
        ctx.set_materialize_grads(False)  # else a weight has a tangent of zeros
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> tuple[Any, ...]:
        _refuse_weight_gradient(ctx.needs_input_grad[4])
        if v is None:
            return (None,) * 13
        adjoints = _second_order(ctx.options, ctx.needs_input_grad[3], v, *ctx.saved_tensors)
        return *adjoints, *(None,) * 9

    @staticmethod
    def jvp(
        ctx: Any,
        grad_tangent: Tensor | None,
        grad_lse_tangent: Tensor | None,
        logits_tangent: Tensor | None,
        target_tangent: Tensor | None,
        weight_tangent: Tensor | None,
        *_: Any,
    ) -> Tensor:
        _refuse_weight_gradient(weight_tangent is not None)
        grad_loss, grad_lse, *tensors = ctx.saved_tensors
        rows = _Rows(*tensors, *ctx.options)
        tangent = rows.gradient(grad_tangent, grad_lse_tangent)
        if logits_tangent is not None:
            tangent = tangent + rows.gradient_along(grad_loss, grad_lse, logits_tangent)
        if target_tangent is not None:
            tangent = tangent + rows.gradient_along_target(grad_loss, target_tangent)
        return tangent.to(rows.dtype)


class CrossEntropy(Function):
    """Rows of logits to rows of loss and lse, by a backend's kernels.

    apply(logits (N, C) or (N, C, L), target (N,) or (N, L) int64 or probabilities, weight (C,) in
    the accumulator type or None, *Options, backend) -> (loss, lse, row_max, rest), each shaped like
    the unreduced loss, in the accumulator type (loss and lse of a slice of the classes: float64).
    `row_max` and `rest` are the statistics that `define` describes; they have no gradient. Raises
    IndexError for a target outside 0 <= t < C that is not `ignore_index`; on a GPU that is an
    assertion of the device's, as with torch.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        hard: float,
        spread: float,
        softcap: float,
        partial: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return launch(
            LAUNCHERS[backend].forward, logits, target, weight,
            ignore_index, hard, spread, softcap, partial,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.backend = Options(*inputs[3:8]), inputs[8]
        ctx.set_materialize_grads(False)  # else a weight has a tangent of zeros
        # The same tensors for both: torch's vmap rule keeps the batch dimensions of one list only.
        ctx.save_for_backward(*inputs[:3], *output[2:])
        ctx.save_for_forward(*inputs[:3], *output[2:])

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        _refuse_weight_gradient(ctx.needs_input_grad[2])
        if grad_loss is None and grad_lse is None:
            return (None,) * 9
        # Once: a checkpoint recomputes at the first access, and refuses a second.
        saved = ctx.saved_tensors
        logits, target, weight, row_max, _ = saved
        grad_loss, grad_lse = (
            None if g is None else g.to(row_max.dtype) for g in (grad_loss, grad_lse)
        )
        if grad_loss is None:
            grad_loss = torch.zeros_like(row_max)
        of_logits = of_target = None
        if ctx.needs_input_grad[0]:
            of_logits = CrossEntropyBackward.apply(
                grad_loss, grad_lse, *saved, *ctx.options, ctx.backend
            )
        if ctx.needs_input_grad[1]:
            rows = _Rows(logits, target, weight, *ctx.options)
            of_target = rows.target_gradient(grad_loss).to(target.dtype)
        return of_logits, of_target, *(None,) * 7

    @staticmethod
    def jvp(
        ctx: Any,
        v: Tensor | None,
        target_tangent: Tensor | None,
        weight_tangent: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, ...]:
        _refuse_weight_gradient(weight_tangent is not None)
        logits, target, weight, row_max, _ = ctx.saved_tensors
        rows = _Rows(logits, target, weight, *ctx.options)
        # torch's vmap rule stumbles over None when a jvp surrounds the vmap, and torch insists on
        # None for an output that is marked as non-differentiable; hence neither.
        zero = torch.zeros_like(row_max)
        loss = lse = zero.to(rows.loss_dtype)
        if v is not None:
            loss, lse = rows.loss_along(v), rows.lse_along(v)
        if target_tangent is not None:
            loss = loss + rows.loss_along_target(target_tangent)
        return loss, lse, zero, zero.clone()


# Without it the compiler refuses a Function that has a jvp; and without the jvp, compiled
# forward-mode derivatives would be zeros.
torch._dynamo.allow_in_graph(CrossEntropy)
torch._dynamo.allow_in_graph(CrossEntropyBackward)
