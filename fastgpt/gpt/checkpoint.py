"""Checkpoints: one safetensors file each, with the settings as JSON in its header.

Reading one executes nothing that is in it (no pickle). A file appears under its name whole or not
at all, and each tensor has a checksum, so a damaged file is an error, not a strange model. Names:

    model/<parameter>          the parameters, the tied matrix once
    optimizer/<state>/<parameter>, rng/<device>, progress, spikes/...   what resuming needs besides

Tensors are whole, however many processes had parts of them, so any number of processes can go on;
only the random numbers are of each process (rng/<device>/<rank>, from rank 1 on). The header's
"fastgpt" is the version of this format; files from before there were versions have none.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastgpt.files import atomic_path

from .errors import CheckpointError, require

Tensors = dict[str, Tensor]
VERSION = 2


def save_checkpoint(path: Path, tensors: Tensors, metadata: dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata to `path`, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    header = {
        "fastgpt": str(VERSION),
        "metadata": json.dumps(metadata),
        "crc32": json.dumps(checksums),
    }
    with atomic_path(path) as temporary:
        require("safetensors.torch").save_file(tensors, temporary, metadata=header)


def load_checkpoint(path: Path, prefix: str = "") -> tuple[Tensors, dict[str, Any]]:
    """The tensors whose names begin with `prefix`, on the CPU, and the metadata.

    Raises CheckpointError, naming the file, if it is missing, truncated, damaged, of a newer
    fastgpt, or not fastgpt's at all.
    """
    safetensors = require("safetensors")
    require("safetensors.torch")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, checksums = _read_header(path, file.metadata() or {})
            names = set(file.keys())
            if names != checksums.keys():
                odd = min(names ^ checksums.keys())
                raise CheckpointError(f"{path}: damaged; {odd} has no checksum, or no tensor")
            tensors = {n: file.get_tensor(n) for n in sorted(names) if n.startswith(prefix)}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole fastgpt checkpoint ({type(error).__name__}: {error})"
        ) from error
    damaged = [name for name, tensor in tensors.items() if _checksum(tensor) != checksums[name]]
    if damaged:
        raise CheckpointError(f"{path}: damaged; the checksum of {damaged[0]} is not the one saved")
    return tensors, metadata


def _read_header(path: Path, header: dict[str, str]) -> tuple[dict[str, Any], dict[str, int]]:
    if not {"metadata", "crc32"} <= header.keys():
        raise CheckpointError(
            f"{path}: a safetensors file, but not a checkpoint of fastgpt; expected metadata and "
            f"crc32 in its header, found {sorted(header) or 'nothing'}"
        )
    version = header.get("fastgpt", "1")
    if not version.isdecimal():
        raise CheckpointError(f"{path}: not a checkpoint of fastgpt; its version is {version!r}")
    if int(version) > VERSION:
        raise CheckpointError(
            f"{path}: written by a newer fastgpt, in format {version}; this one reads formats up "
            f"to {VERSION}, so it needs an upgrade"
        )
    try:
        metadata, checksums = json.loads(header["metadata"]), json.loads(header["crc32"])
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged; its header is not JSON ({error})") from error
    if not (isinstance(metadata, dict) and isinstance(checksums, dict)):
        raise CheckpointError(f"{path}: damaged; expected two JSON objects in its header")
    return metadata, checksums


def keep_checkpoint(path: Path, step: int, keep: int) -> None:
    """Give `path` a second name, step-<step>.safetensors, and remove all but the last `keep` such.

    Those of later steps, which a run continued from an earlier one leaves behind, stay until it
    has passed them. Does nothing for `keep` 1: `path` is the one.
    """
    if keep == 1:
        return
    name = path.with_name(f"step-{step:08}{path.suffix}")
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:  # a file system without links
        with atomic_path(name) as temporary:
            shutil.copyfile(path, temporary)
    steps = {file: int(file.stem.removeprefix("step-")) for file in kept_checkpoints(path.parent)}
    for file in [file for file, of in steps.items() if of <= step][:-keep]:
        file.unlink()


def kept_checkpoints(run: Path) -> list[Path]:
    """The files that `keep_checkpoint` has left in a run folder, in the order of their steps."""
    files = run.glob("step-*.safetensors")
    return sorted(file for file in files if re.fullmatch(r"step-\d{8,}", file.stem))


class Layout(Protocol):
    """How parameters, and optimiser states of their shape, lie on the processes of a run."""

    def whole_shape(self, name: str, parameter: Tensor) -> torch.Size:
        """The shape of a parameter of which this process may have a part."""

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        """All of it, on the CPU of the process that writes; None on the others."""

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this process has of it, as the parameter of that name has it."""


class OneProcess:
    """The layout in which nothing is shared out."""

    def whole_shape(self, name: str, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        return part.detach().cpu()

    def part(self, name: str, whole: Tensor) -> Tensor:
        return whole


def model_tensors(model: nn.Module, layout: Layout | None = None) -> Tensors:
    """The parameters under their names in a checkpoint; nothing on a process that writes none."""
    layout = layout or OneProcess()
    tensors = {f"model/{n}": layout.whole(n, p) for n, p in model.named_parameters()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, layout: Layout | None = None
) -> Tensors:
    """The optimiser's state under the names of the parameters that it belongs to."""
    layout = layout or OneProcess()
    tensors = {
        f"optimizer/{key}/{name}": layout.whole(name, value) if value.dim() else value.cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def restore_model(
    path: Path, model: nn.Module, tensors: Tensors, layout: Layout | None = None
) -> None:
    """Copy the parameters of a checkpoint into the model; CheckpointError if they don't fit it."""
    layout = layout or OneProcess()
    saved = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    own = dict(model.named_parameters())
    if saved.keys() != own.keys():
        different = sorted(saved.keys() ^ own.keys())
        raise CheckpointError(f"{path}: {different[0]} is in the file or in the model, not in both")
    for name, parameter in own.items():
        _check_shape(path, name, saved[name], layout.whole_shape(name, parameter))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(layout.part(name, saved[name]))


def restore_optimizer(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Tensors,
    layout: Layout | None = None,
) -> None:
    """Give the optimiser the state saved for each parameter; CheckpointError if it doesn't fit."""
    layout = layout or OneProcess()
    parameters = dict(model.named_parameters())
    states: dict[str, Tensors] = {name: {} for name in parameters}
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer/"):
            _, key, name = full_name.split("/", 2)
            if name not in parameters:
                raise CheckpointError(f"{path}: {full_name} is of no parameter of the model")
            if tensor.dim():
                _check_shape(path, full_name, tensor, layout.whole_shape(name, parameters[name]))
            states[name][key] = tensor
    keys = {tuple(sorted(state)) for state in states.values()}
    if len(keys) > 1:
        raise CheckpointError(f"{path}: the optimiser's state is not the same of each parameter")
    for name, state in states.items():
        device = parameters[name].device
        for key, tensor in state.items():
            if tensor.dim():
                optimizer.state[parameters[name]][key] = layout.part(name, tensor).to(device)
            else:  # the number of steps
                optimizer.state[parameters[name]][key] = tensor.to(
                    device if _fused(optimizer) else "cpu"
                )


def _check_shape(path: Path, name: str, saved: Tensor, expected: torch.Size) -> None:
    if saved.shape != expected:
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(saved.shape)} in the file and {tuple(expected)} in "
            "the model"
        )


def rng_tensors(device: torch.device) -> Tensors:
    """The state of torch's random numbers in this process, from which dropout draws."""
    state = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng/cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(tensors: Tensors, device: torch.device, rank: int = 0, size: int = 1) -> bool:
    """Go on with the random numbers of a rank of `size`; False if as many were not saved."""
    if sum(name.split("/")[:2] == ["rng", "cpu"] for name in tensors) != size:
        return False
    of_rank = f"/{rank}" if rank else ""
    torch.set_rng_state(tensors[f"rng/cpu{of_rank}"])
    if device.type == "cuda" and f"rng/cuda{of_rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng/cuda{of_rank}"], device)
    return True


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)
