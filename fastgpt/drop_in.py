"""`drop_in()`: an unmodified model on the fused kernels."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastgpt import dispatch
from fastgpt.functional import (
    cross_entropy,
    linear_cross_entropy,
    scaled_dot_product_attention,
)


def _check_key_padding_mask(mask: Tensor, keys: int, batch: int) -> None:
    """torch's check, whose message the compiler can't take out of an inlined function."""
    if mask.shape != (batch, keys):
        raise AssertionError(
            f"expected key_padding_mask of shape {[batch, keys]}, got {list(mask.shape)}"
        )


def _with_our_attention(function: Any) -> FunctionType:
    """torch's own code of `function`, in a namespace where its attention is ours.

    A Python function arrives in the mode whole, and runs where the mode no longer sees its calls.
    """
    names = {
        **function.__globals__,
        "scaled_dot_product_attention": scaled_dot_product_attention,
        "_check_key_padding_mask": _check_key_padding_mask,
    }
    del names["__name__"]  # or the compiler looks the names up in the module of that name
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    names[function.__name__] = copy  # what it tells an outer mode or a tensor subclass to run
    return copy


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Only the compiler sends it through the mode, and would trace `function` outside of it."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with drop_in():
            return function(*args, **kwargs)

    return checkpoint(inside, *args, **kwargs)


# torch's functions that have a fused kernel here, and those that hide such a call from the mode.
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: cross_entropy,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: _with_our_attention(F.multi_head_attention_forward),
    checkpoint: _checkpoint,
}
if hasattr(F, "linear_cross_entropy"):  # new in torch 2.13
    REPLACEMENTS[F.linear_cross_entropy] = linear_cross_entropy


class drop_in(TorchFunctionMode):
    """Inside `with fastgpt.drop_in():`, torch's loss and attention functions are ours.

    Covers `cross_entropy`, `linear_cross_entropy`, `scaled_dot_product_attention` and
    `multi_head_attention_forward` of `torch.nn.functional`, and the modules that call them:
    `nn.CrossEntropyLoss`, `nn.LinearCrossEntropyLoss`, `nn.MultiheadAttention`, `nn.Transformer`
    and its layers. Nothing global is assigned to: the
    mode belongs to the thread that entered it, nests, and ends with the block, also on an
    exception. A backward pass may run outside; activation checkpointing, which calls the model
    again then, needs `fastgpt.checkpoint_context_fn`.

    Around a model in `DistributedDataParallel`, or one that `torch.compile` compiles, it works as
    around any, also within the compiled function. (`fullgraph=True` around DDP's own forward is
    more than torch can do; compile the module inside.)

    Four calls stay torch's:

    - `nn.MultiheadAttention` with `need_weights=True` (its default): a fused kernel never has the
      weights.
    - Nested tensors. The modules' inference fast path, which makes them, is not taken here.
    - What a reentrant checkpoint (`use_reentrant=True`) recomputes, and so its gradients, unless it
      is compiled: it takes no context. Enter `drop_in()` in the checkpointed function itself.
    - A compiled `nn.TransformerEncoderLayer` without gradients and in eval mode: the compiler
      takes that fast path past any mode. `torch.backends.mha.set_fastpath_enabled(False)` ends it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in REPLACEMENTS and not any(
            isinstance(x, Tensor) and x.is_nested for x in (*args, *kwargs.values())
        ):
            func = REPLACEMENTS[func]
        return func(*args, **kwargs)


class _Recomputation(AbstractContextManager[None]):
    """Inside it, `drop_in` and the preferred backend are as they were where this was made.

    May be entered again: a second backward recomputes a second time.
    """

    def __init__(self) -> None:
        modes = _get_current_function_mode_stack()
        self._replacing = any(isinstance(mode, drop_in) for mode in modes)
        self._backend = dispatch.preferred()

    def __enter__(self) -> None:
        # On torch 2.10 a backward inside a mode runs in that mode.
        self._outer_modes = _get_current_function_mode_stack()
        self._outer_backend = dispatch.prefer(self._backend)
        others = [mode for mode in self._outer_modes if not isinstance(mode, drop_in)]
        _exchange_modes([*others, drop_in()] if self._replacing else others)

    def __exit__(self, *exception: object) -> None:
        _exchange_modes(self._outer_modes)
        dispatch.prefer(self._outer_backend)


def _exchange_modes(modes: list[TorchFunctionMode]) -> None:
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def checkpoint_context_fn(
    policy: Callable[..., CheckpointPolicy] | None = None,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Activation checkpointing that recomputes on the kernels which the forward ran on.

    Pass it as `torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False,
    context_fn=fastgpt.checkpoint_context_fn)`. The recomputation runs during the backward pass,
    maybe in another thread and after `fastgpt.drop_in()` and `fastgpt.backend(...)` have ended; it
    is given the state that the forward had of both.

    With a `policy` (of `torch.utils.checkpoint.create_selective_checkpoint_contexts`) some results
    are kept: pass `functools.partial(fastgpt.checkpoint_context_fn, policy)`.

    Inside `torch.compile` the recomputation is part of the graph, with the kernels that were chosen
    when it was traced; what is recomputed is up to the compiler, as without this function. Enter
    `drop_in()` in the compiled function: torch 2.13 can't take it into a checkpoint from outside,
    and raises with `fullgraph=True` or runs the checkpoint uncompiled. torch 2.10 loses the mode
    in a compiled checkpoint, and runs its own functions.
    """
    if TracingContext.try_get() is not None:  # is_compiling is false here on torch 2.10
        return create_selective_checkpoint_contexts(policy or _recompute)
    if policy is None:
        return nullcontext(), _Recomputation()
    keeping, using = create_selective_checkpoint_contexts(policy)
    return keeping, _both(_Recomputation(), using)


@contextmanager
def _both(
    first: AbstractContextManager[Any], second: AbstractContextManager[Any]
) -> Iterator[None]:
    with first, second:
        yield


def _recompute(*args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE
