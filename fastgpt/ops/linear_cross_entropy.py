"""Linear cross-entropy over rows: the raw operators and their derivatives.

The logits z = x W^T + b of inputs x (N, D), a matrix W (C, D) and a bias b (C,) go into the
cross-entropy of ops/cross_entropy.py, and exist a chunk of rows at a time. With S (N, C) what that
calls the gradient, for the upstream gradients g and g_lse of loss and lse,

    of x = S W        of W = S^T x        of b = S^T 1

A change (u, U, v) of (x, W, b) changes the logits by V = u W^T + x U^T + v, and with H the change
of S along V, which is the Hessian times V,

    jvp                    that of the cross-entropy along V
    change of S W          H W + S U               of S^T x       H^T x + S^T u
    adjoint of the gradients along (u, U, v):
        of g, g_lse        the change of loss and lse along V
        of x               H W + S U
        of W, b            H^T x + S^T u,  H^T 1

Loss, lse and gradients come from kernels, which form the logits once for both; where only the
backward knows the upstream gradients of a row, it forms them again. The rest is torch operations,
chunk by chunk, so that it can be differentiated to any order.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.ops.cross_entropy import (
    CrossEntropyCall,
    Options,
    _refuse_weight_gradient,
    _Rows,
    launch,
)
from fastgpt.ops.raw import Launcher, accumulator_dtype, fold, one_by_one

# ---- the call ----


class LinearCrossEntropyCall(NamedTuple):
    """A checked call of `linear_cross_entropy`, with a batch dimension in any case."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D), or (C, P, D) where there are P positions
    linear_bias: Tensor | None  # (C,) or (C, P)
    loss: CrossEntropyCall  # of logits that take up no memory
    sequences: tuple[int, int] | None  # (B, T) if the rows are next-token pairs of B sequences
    filter_eps: float
    recompute: bool


class Problem(NamedTuple):
    """The tensors of rows of one matrix."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    linear_bias: Tensor | None  # (C,)
    target: Tensor  # (N,) int64, or (N, C) of a floating-point type
    weight: Tensor | None  # (C,)


# ---- the closed forms in torch operations ----

CHUNK_ELEMENTS = 1 << 21  # of the logits; the forms hold some ten such tensors

_F = TypeVar("_F", bound=Callable[..., Any])


def _without_autocast(function: _F) -> _F:
    """The products of these forms are in the accumulator type, whatever autocast would have."""

    @functools.wraps(function)
    def exact(options: Options, problem: Problem, *rest: Any) -> Any:
        with torch.autocast(problem.input.device.type, enabled=False):
            return function(options, problem, *rest)

    return exact  # type: ignore[return-value]


class _Chunk(NamedTuple):
    rows: slice
    input: Tensor  # of the accumulator type
    linear_weight: Tensor
    forms: _Rows

    def along(self, u: Tensor | None, U: Tensor | None, v: Tensor | None) -> Tensor:
        """V, the change of the logits."""
        dtype = self.input.dtype
        V = torch.zeros_like(self.forms.p)
        if u is not None:
            V = V + u[self.rows].to(dtype) @ self.linear_weight.t()
        if U is not None:
            V = V + self.input @ U.to(dtype).t()
        return V if v is None else V + v.to(dtype)


def _chunks(options: Options, problem: Problem) -> Iterator[_Chunk]:
    x, W, b, target, weight = problem
    dtype = accumulator_dtype(x.dtype)
    W = W.to(dtype)
    step = max(1, CHUNK_ELEMENTS // max(1, W.shape[0]))
    for start in range(0, max(1, x.shape[0]), step):  # at least one, if it is empty
        rows = slice(start, start + step)
        some = x[rows].to(dtype)
        t = target[rows]
        if not t.is_floating_point():
            # What an ignored row holds must reach nothing.
            some = some.masked_fill((t == options.ignore_index).unsqueeze(1), 0)
        logits = some @ W.t()
        if b is not None:
            logits = logits + b.to(dtype)
        yield _Chunk(rows, some, W, _Rows(logits, t, weight, *options))


def _total(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _of(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _scaled(matrix: Tensor, other: Tensor | None) -> Tensor | float:
    """matrix @ other, and nothing for nothing."""
    return 0.0 if other is None else matrix @ other.to(matrix.dtype)


@_without_autocast
def _tangents(
    options: Options,
    problem: Problem,
    u: Tensor | None,
    U: Tensor | None,
    v: Tensor | None,
    of_target: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The tangents of loss and lse along (u, U, v), and along `of_target` of the probabilities."""
    losses, lses = [], []
    for chunk in _chunks(options, problem):
        V = chunk.along(u, U, v)
        loss = chunk.forms.loss_along(V)
        if of_target is not None:
            loss = loss + chunk.forms.loss_along_target(of_target[chunk.rows])
        losses.append(loss)
        lses.append(chunk.forms.lse_along(V))
    return torch.cat(losses), torch.cat(lses)


@_without_autocast
def _target_gradient(options: Options, problem: Problem, grad_loss: Tensor) -> Tensor:
    """The gradient of the probabilities."""
    return torch.cat(
        [chunk.forms.target_gradient(grad_loss[chunk.rows]) for chunk in _chunks(options, problem)]
    ).to(problem.target.dtype)


def _gradients(
    changes: list[tuple[_Chunk, Tensor, Tensor]],
    u: Tensor | None,
    U: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """H W + S U, H^T x + S^T u and H^T 1 of the chunks' S and H."""
    x, W, b = [], [], []
    for chunk, S, H in changes:
        some = _of(u, chunk.rows)
        x.append(H @ chunk.linear_weight + _scaled(S, U))
        W.append(H.t() @ chunk.input + _scaled(S.t(), some))
        b.append(H.sum(0))
    bias = problem.linear_bias
    return (
        torch.cat(x).to(problem.input.dtype),
        _total(W).to(problem.linear_weight.dtype),
        None if bias is None else _total(b).to(bias.dtype),
    )


@_without_autocast
def _gradient_tangents(
    options: Options,
    problem: Problem,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    grad_tangents: tuple[Tensor | None, Tensor | None],
    u: Tensor | None,
    U: Tensor | None,
    v: Tensor | None,
    of_target: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tangents of the gradients of input, linear_weight and linear_bias."""
    changes = []
    for chunk in _chunks(options, problem):
        rows, forms = chunk.rows, chunk.forms
        g, g_lse = grad_loss[rows], _of(grad_lse, rows)
        H = forms.gradient(*(_of(x, rows) for x in grad_tangents))
        if u is not None or U is not None or v is not None:
            H = H + forms.gradient_along(g, g_lse, chunk.along(u, U, v))
        if of_target is not None:
            H = H + forms.gradient_along_target(g, of_target[rows])
        changes.append((chunk, forms.gradient(g, g_lse), H))
    return _gradients(changes, u, U, problem)


@_without_autocast
def _second_order(
    options: Options,
    problem: Problem,
    of_target: bool,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    u: Tensor | None,
    U: Tensor | None,
    v: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The adjoints of the gradients along (u, U, v): of grad_loss, grad_lse and the Problem."""
    losses, lses, targets, changes = [], [], [], []
    for chunk in _chunks(options, problem):
        forms = chunk.forms
        g, g_lse = grad_loss[chunk.rows], _of(grad_lse, chunk.rows)
        V = chunk.along(u, U, v)
        losses.append(forms.loss_along(V))
        lses.append(forms.lse_along(V))
        if of_target:
            targets.append(forms.target_adjoint(g, V))
        changes.append((chunk, forms.gradient(g, g_lse), forms.gradient_along(g, g_lse, V)))
    return (
        torch.cat(losses).to(grad_loss.dtype),
        None if grad_lse is None else torch.cat(lses).to(grad_lse.dtype),
        *_gradients(changes, u, U, problem),
        torch.cat(targets).to(problem.target.dtype) if of_target else None,
        None,
    )


# ---- the raw operators ----


def new_losses(problem: Problem, options: Options) -> tuple[Tensor, Tensor]:
    """Loss and lse, not yet written."""
    x = problem.input
    dtype = torch.float64 if options.partial else accumulator_dtype(x.dtype)
    return x.new_empty(x.shape[:1], dtype=dtype), x.new_empty(x.shape[:1], dtype=dtype)


def new_gradients(
    problem: Problem, of_input: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, not yet written: empty where they are not wanted."""
    x, W = problem.input, problem.linear_weight
    dtype = accumulator_dtype(x.dtype)
    return (
        x.new_empty(x.shape if of_input else (0,), dtype=dtype),
        x.new_empty(W.shape if of_weight else (0,), dtype=dtype),
        x.new_empty(W.shape[:1] if of_bias else (0,), dtype=dtype),
    )


_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    "int ignore_index, float hard, float spread, float softcap, bool partial"
)
_PROBLEM, _OPTIONS = len(Problem._fields), len(Options._fields)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return new_losses(Problem(*arguments[:_PROBLEM]), Options(*arguments[_PROBLEM:]))


def _fake_gradients(grad_loss: Any, grad_lse: Any, grad_square: Any, *rest: Any) -> Any:
    problem, options = Problem(*rest[:_PROBLEM]), Options(*rest[_PROBLEM : _PROBLEM + _OPTIONS])
    return *new_losses(problem, options), *new_gradients(problem, *rest[-3:])


def define(namespace: str) -> Launcher:
    """Define a backend's raw operators in `namespace`; its kernels are registered elsewhere.

    input (N, D) and linear_weight (C, D) of one type, linear_bias (C,) of it, too; target (N,)
    int64, or probabilities (N, C) in the inputs' type or the accumulator's; weight (C,) and the
    upstream gradients (N,) in the accumulator type. `forward` gives loss and lse (N,), in the
    accumulator type, and in float64 if `partial`.

    `backward` forms the gradients of input, linear_weight and linear_bias as well, in the
    accumulator type, for the gradients of each row's loss, lse and lse² upstream: the last one
    lets a z-loss be known before lse is. It drops from S the part of the classes whose probability
    is below `filter_eps`. A gradient that is not asked for is empty.
    """
    names = [f"{namespace}::linear_cross_entropy_{which}" for which in ("forward", "backward")]
    torch.library.define(names[0], f"({_TENSORS}) -> (Tensor loss, Tensor lse)")
    torch.library.define(
        names[1],
        f"(Tensor grad_loss, Tensor? grad_lse, Tensor? grad_square, {_TENSORS}, float filter_eps,"
        " bool of_input, bool of_weight, bool of_bias) -> (Tensor loss, Tensor lse,"
        " Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    )
    operators = getattr(torch.ops, namespace)
    launcher = Launcher(
        operators.linear_cross_entropy_forward.default,
        operators.linear_cross_entropy_backward.default,
    )
    torch.library.register_fake(names[0], _fake_forward)
    torch.library.register_fake(names[1], _fake_gradients)

    def forward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        if any(in_dims[i] is not None for i in (1, 2, 4)):
            return one_by_one(info, in_dims, launcher.forward, inputs)
        x, target = fold(info, (in_dims[0], in_dims[3]), (inputs[0], inputs[3]))
        outputs = launcher.forward(x, *inputs[1:3], target, *inputs[4:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)

    def backward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
        return one_by_one(info, in_dims, launcher.backward, inputs)

    torch.library.register_vmap(names[0], forward_vmap)
    torch.library.register_vmap(names[1], backward_vmap)

    # For whoever calls the operators themselves, and for graphs that hold them.
    def forward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options = Options(*inputs[_PROBLEM:])
        ctx.save_for_backward(*inputs[:_PROBLEM])

    def forward_backward(ctx, grad_loss, grad_lse):  # type: ignore[no-untyped-def]
        problem = Problem(*ctx.saved_tensors)
        _refuse_weight_gradient(ctx.needs_input_grad[4])
        dtype = accumulator_dtype(problem.input.dtype)
        _, _, *gradients = launcher.backward(
            grad_loss.to(dtype), grad_lse.to(dtype), None, *problem, *ctx.options, 0.0, True, True,
            problem.linear_bias is not None,
        )  # fmt: skip
        x, W, b = _narrowed(problem, *gradients)
        of_target = None
        if ctx.needs_input_grad[3]:
            of_target = _target_gradient(ctx.options, problem, grad_loss)
        return x, W, b, of_target, *(None,) * (1 + _OPTIONS)

    def backward_backward(ctx, *_):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            f"{names[1]} is not differentiable: call fastgpt.linear_cross_entropy instead"
        )

    torch.library.register_autograd(names[0], forward_backward, setup_context=forward_setup)
    torch.library.register_autograd(names[1], backward_backward)
    return launcher


LAUNCHERS = {"native": define("fastgpt")}


def _narrowed(
    problem: Problem, x: Tensor, W: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    bias = problem.linear_bias
    return (
        x.to(problem.input.dtype),
        W.to(problem.linear_weight.dtype),
        None if bias is None else b.to(bias.dtype),
    )


# ---- the Functions ----


class LinearCrossEntropyBackward(Function):
    """The gradients of `LinearCrossEntropy` as an op of its own, so that they have derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_loss: Tensor,
        grad_lse: Tensor | None,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        hard: float,
        spread: float,
        softcap: float,
        partial: bool,
        filter_eps: float,
        of_input: bool,
        of_weight: bool,
        of_bias: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = input.dtype
        _, _, *gradients = LAUNCHERS[backend].backward(
            grad_loss, grad_lse, None, input, linear_weight, linear_bias, target, weight,
            ignore_index, hard, spread, softcap, partial, filter_eps, of_input, of_weight, of_bias,
        )  # fmt: skip
        x, W, b = (x.to(dtype) for x in gradients)
        return x, W, b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.wanted = Options(*inputs[7:12]), inputs[13:16]
        ctx.set_materialize_grads(False)  # else a weight has a tangent of zeros
        ctx.save_for_backward(*inputs[:7])
        ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> tuple[Any, ...]:
        _refuse_weight_gradient(ctx.needs_input_grad[6])
        u, U, v = (x if wanted else None for x, wanted in zip(along, ctx.wanted, strict=True))
        if u is None and U is None and v is None:
            return (None,) * 17
        grad_loss, grad_lse, *tensors = ctx.saved_tensors
        adjoints = _second_order(
            ctx.options, Problem(*tensors), ctx.needs_input_grad[5], grad_loss, grad_lse, u, U, v
        )
        return *adjoints, *(None,) * 10

    @staticmethod
    def jvp(
        ctx: Any,
        grad_tangent: Tensor | None,
        grad_lse_tangent: Tensor | None,
        u: Tensor | None,
        U: Tensor | None,
        v: Tensor | None,
        of_target: Tensor | None,
        weight_tangent: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, ...]:
        _refuse_weight_gradient(weight_tangent is not None)
        grad_loss, grad_lse, *tensors = ctx.saved_tensors
        problem = Problem(*tensors)
        tangents = _gradient_tangents(
            ctx.options, problem, grad_loss, grad_lse, (grad_tangent, grad_lse_tangent), u, U, v,
            of_target,
        )  # fmt: skip
        # Of a gradient that nobody asked for, as it is: of no numbers.
        nothing = problem.input.new_zeros(0)
        x, W, b = (
            nothing if x is None or not wanted else x
            for x, wanted in zip(tangents, ctx.wanted, strict=True)
        )
        return x, W, b


class LinearCrossEntropy(Function):
    """Rows of inputs to rows of loss and lse, by a backend's kernels.

    apply(input (N, D), linear_weight (C, D), linear_bias (C,) or None, target (N,) int64 or
    probabilities (N, C), weight (C,) in the accumulator type or None, *Options, filter_eps,
    backend) -> (loss, lse), (N,) in the accumulator type (of a slice of the classes: float64).
    Raises IndexError for a target outside 0 <= t < C that is not `ignore_index`; on a GPU that is
    an assertion of the device's, as with torch. The backward forms the logits again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        hard: float,
        spread: float,
        softcap: float,
        partial: bool,
        filter_eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return launch(
            LAUNCHERS[backend].forward, input, linear_weight, linear_bias, target, weight,
            ignore_index, hard, spread, softcap, partial,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.filter_eps, ctx.backend = Options(*inputs[5:10]), *inputs[10:]
        ctx.set_materialize_grads(False)  # else a weight has a tangent of zeros
        # The same tensors for both: torch's vmap rule keeps the batch dimensions of one list only.
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        _refuse_weight_gradient(ctx.needs_input_grad[4])
        if grad_loss is None and grad_lse is None:
            return (None,) * 12
        problem = Problem(*ctx.saved_tensors)
        dtype = accumulator_dtype(problem.input.dtype)
        grad_lse = None if grad_lse is None else grad_lse.to(dtype)
        if grad_loss is None:
            grad_loss = torch.zeros_like(grad_lse)  # type: ignore[arg-type]
        grad_loss = grad_loss.to(dtype)
        wanted = ctx.needs_input_grad[:3]
        gradients: list[Tensor | None] = [None, None, None]
        if any(wanted):
            formed = LinearCrossEntropyBackward.apply(
                grad_loss, grad_lse, *problem, *ctx.options, ctx.filter_eps, *wanted, ctx.backend
            )
            gradients = [x if w else None for x, w in zip(formed, wanted, strict=True)]
        of_target = None
        if ctx.needs_input_grad[3]:
            of_target = _target_gradient(ctx.options, problem, grad_loss)
        return *gradients, of_target, *(None,) * 8

    @staticmethod
    def jvp(
        ctx: Any,
        u: Tensor | None,
        U: Tensor | None,
        v: Tensor | None,
        of_target: Tensor | None,
        weight_tangent: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, ...]:
        _refuse_weight_gradient(weight_tangent is not None)
        return _tangents(ctx.options, Problem(*ctx.saved_tensors), u, U, v, of_target)


# Without it the compiler refuses a Function that has a jvp; and without the jvp, compiled
# forward-mode derivatives would be zeros.
torch._dynamo.allow_in_graph(LinearCrossEntropy)
torch._dynamo.allow_in_graph(LinearCrossEntropyBackward)
