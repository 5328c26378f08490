"""Which device a command computes on."""

import os

import torch

from .errors import UsageError


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is a GPU where there is one. Raises UsageError.

    Where torchrun started several processes on this machine, each has a GPU of its own.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if name == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        name = device.type
    elif ":" in name and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UsageError(f"--device {name}: is one device, for several processes; leave out the :N")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "mps") and device.index is None and local_rank is not None:
            index = int(local_rank) % torch.accelerator.device_count()
            device = torch.device(device.type, index)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: torch can't use it here: {reason}") from None
    return device
