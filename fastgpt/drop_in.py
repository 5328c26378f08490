"""`drop_in()`: an unmodified model on the fused kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastgpt.functional import cross_entropy

# torch's functions that have a fused kernel here. Attention joins when it has one.
REPLACEMENTS: dict[Any, Callable[..., Any]] = {torch.nn.functional.cross_entropy: cross_entropy}


class drop_in(TorchFunctionMode):
    """Inside `with fastgpt.drop_in():`, torch's loss functions run on the fused kernels.

    Covers `torch.nn.functional.cross_entropy` and `torch.nn.CrossEntropyLoss`, called from any
    module. Nothing global is assigned to: the mode belongs to the thread that entered it, nests,
    and ends with the block, also on an exception. A backward pass may run outside.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))
