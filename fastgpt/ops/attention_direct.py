"""Attention outside of transforms: with less between the caller and the kernel.

`Attention` of ops/attention.py holds under vmap, jvp and the compiler, and its `apply` pays for it
more than the kernel takes on a short sequence. So does the derivative of the raw operator itself,
which torch.library keeps in Python. `_Attention` is an old-style Function, without `setup_context`,
and what needs no gradient calls the operator below autograd.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.ops.attention import LAUNCHERS, Attention, AttentionBackward, _gradients
from fastgpt.ops.attention_forms import Inputs, Options
from fastgpt.ops.raw import below_autograd, transformed


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, ctx.options, ctx.backend = arguments
        outputs = below_autograd(LAUNCHERS[ctx.backend].forward, *inputs, *ctx.options)
        ctx.mark_non_differentiable(*outputs[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, outputs[0], *outputs[2:])
        return outputs

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        # The backward may be differentiated, or transformed, where the forward was not.
        if torch.is_grad_enabled() or transformed():
            found = _gradients(ctx, grad_output, grad_lse, AttentionBackward.apply, ctx.backend)
        else:
            found = _gradients(ctx, grad_output, grad_lse, _backward_of(ctx.backend))
        return found


def _backward_of(backend: str) -> Any:
    return lambda *arguments: below_autograd(LAUNCHERS[backend].backward, *arguments)


# torch's own apply, without what Function.apply does for transforms.
_attention = super(Function, _Attention).apply


def attention(inputs: Inputs, options: Options, backend: str) -> Any:
    """What `Attention` returns, by the shortest way that has the derivatives which can be asked."""
    if transformed():
        return Attention.apply(*inputs, *options, backend)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _attention(*inputs, options, backend)
    return below_autograd(LAUNCHERS[backend].forward, *inputs, *options)
