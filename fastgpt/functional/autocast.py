"""What torch's autocast does with the arguments of a function that it runs in a lower precision."""

from typing import Any

import torch
from torch import Tensor


def autocast(device: str, *tensors: Tensor | None) -> Any:
    """The tensors as torch's autocast passes them on: float64 and what is not a float as it is."""
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast to ask
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    ]
