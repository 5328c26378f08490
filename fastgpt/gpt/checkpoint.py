"""Checkpoints: one safetensors file each, with the settings as JSON in its header.

Reading one executes nothing that is in it (no pickle). A file appears under its name whole or not
at all, and each tensor has a checksum, so a damaged file is an error, not a strange model. Names:

    model/<parameter>          the parameters, the tied matrix once
    optimizer/<state>/<parameter>, rng/<device>, progress    what resuming needs besides
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.files import atomic_path

from .errors import CheckpointError, require

Tensors = dict[str, Tensor]


def save_checkpoint(path: Path, tensors: Tensors, metadata: dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata to `path`, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    header = {"metadata": json.dumps(metadata), "crc32": json.dumps(checksums)}
    with atomic_path(path) as temporary:
        require("safetensors.torch").save_file(tensors, temporary, metadata=header)


def load_checkpoint(path: Path, prefix: str = "") -> tuple[Tensors, dict[str, Any]]:
    """The tensors whose names begin with `prefix`, on the CPU, and the metadata.

    Raises CheckpointError, naming the file, if it is missing, truncated or damaged.
    """
    safetensors = require("safetensors")
    require("safetensors.torch")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            metadata, checksums = json.loads(header["metadata"]), json.loads(header["crc32"])
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
        damaged = [name for name in names if _checksum(tensors[name]) != checksums[name]]
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole fastgpt checkpoint ({type(error).__name__}: {error})"
        ) from error
    if damaged:
        raise CheckpointError(f"{path}: damaged; the checksum of {damaged[0]} is not the one saved")
    return tensors, metadata


def model_tensors(model: nn.Module) -> Tensors:
    """The parameters under their names in a checkpoint."""
    return {f"model/{name}": parameter for name, parameter in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimiser's state under the names of the parameters that it belongs to."""
    return {
        f"optimizer/{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_model(path: Path, model: nn.Module, tensors: Tensors) -> None:
    """Copy the parameters of a checkpoint into the model; CheckpointError if they don't fit it."""
    saved = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    own = dict(model.named_parameters())
    if saved.keys() != own.keys():
        different = sorted(saved.keys() ^ own.keys())
        raise CheckpointError(f"{path}: {different[0]} is in the file or in the model, not in both")
    with torch.no_grad():
        for name, parameter in own.items():
            if saved[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {tuple(saved[name].shape)} in the file and "
                    f"{tuple(parameter.shape)} in the model"
                )
            parameter.copy_(saved[name])


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Give the optimiser the state saved for each parameter."""
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer/"):
            _, key, name = full_name.split("/", 2)
            parameter = parameters[name]
            device = parameter.device if key != "step" or _fused(optimizer) else "cpu"
            optimizer.state[parameter][key] = tensor.to(device)


def rng_tensors(device: torch.device) -> Tensors:
    """The state of torch's random numbers, from which dropout draws."""
    state = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng/cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(tensors: Tensors, device: torch.device) -> None:
    torch.set_rng_state(tensors["rng/cpu"])
    if device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], device)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)
