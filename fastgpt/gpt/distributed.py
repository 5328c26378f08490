"""Several processes on one run: `torchrun --nproc_per_node=N -m fastgpt.gpt.train`.

Each process computes its part of every batch. What the others need of it:

    plain        the gradients: DistributedDataParallel
    --fsdp       parameters, when their block runs, and gradients, each of which, and its optimiser
                 state, lies on one process in the meantime: fully_shard
    --tensor-parallel   the token embedding and output layer lie in slices of the vocabulary
                 (vocabulary.py), the rest as above

In each case a step is what one process alone would do with the whole batch, to rounding, and a
checkpoint holds whole tensors. Without torchrun there is one process, and nothing of this.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .config import TrainConfig
from .errors import UsageError
from .model import GPT
from .vocabulary import share_out_vocabulary

dist = torch.distributed
if dist.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


class World:
    """The processes of a run, of which this one has number `rank`.

    What they find together every process has alike, bit for bit.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers."""
        return max(float(x) for x in self.gather(torch.tensor(number, dtype=torch.float64)))

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every process's x, all of one shape, where x is."""
        x = x.detach()
        if self.group is None:
            return [x]
        all_x = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(all_x, x, group=self.group)
        return all_x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, added in their order."""
        return torch.stack(self.gather(x)).sum(0)

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """A block that one process of each machine runs before the others, to fill the cache."""
        turn = int(os.environ.get("LOCAL_RANK", 0)) == 0 or self.group is None
        if not turn:
            self.wait()
        yield
        if turn:
            self.wait()


def join(device: torch.device) -> World:
    """The world of this process: of torchrun, of the process group there is, or of its own."""
    if not dist.is_available():
        return World()
    if not dist.is_initialized():
        if not os.environ.keys() >= _TORCHRUN:
            return World()
        backend = "gloo"
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        dist.init_process_group(backend)
    return World(dist.group.WORLD)


def leave(world: World) -> None:
    """The end of a run that went well."""
    if world.group is not None and dist.is_initialized():
        world.wait()
        dist.destroy_process_group()


class Parallel:
    """A model as the processes of a world train it together; `model` itself becomes that.

    Raises UsageError for settings that need more processes, or that these can't share.
    """

    def __init__(self, model: GPT, config: TrainConfig, world: World) -> None:
        _check(config, world)
        self.model, self.world = model, world
        self.slices: dict[str, list[int]] = {}  # rows of each process, by parameter
        if config.tensor_parallel and world.group is not None:
            self.slices = share_out_vocabulary(model, world.group)
        self._fsdp = config.fsdp
        self._wrapped: nn.Module = model
        if config.fsdp:
            self._wrapped = _fully_shard(model, self.slices, world, config.compile)
        elif world.group is not None:
            self._wrapped = _data_parallel(model, self.slices)
        compiled = config.compile and not config.fsdp
        self.forward: Callable[..., tuple[None, Tensor]] = (
            torch.compile(self._wrapped) if compiled else self._wrapped
        )

    @property
    def shares_parameters(self) -> bool:
        """Whether no process has the whole model, so that none can run it alone."""
        return self._fsdp or bool(self.slices)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward: gradients are exchanged after the last of a step alone."""
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel) and not last:
            with self._wrapped.no_sync():
                yield
        else:
            if self._fsdp:
                cast(FSDPModule, self._wrapped).set_requires_gradient_sync(last)
            yield

    def reshard(self) -> None:
        """After a forward pass without a backward, for which fully_shard keeps parameters whole."""
        if self._fsdp:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> Tensor:
        """Scale the gradients to a norm of `limit` at the most; returns the norm before that."""
        everywhere: list[Tensor] = []
        here: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            if (gradient := parameter.grad) is None:
                continue
            if self._fsdp and isinstance(gradient, DTensor):
                here.append(gradient.to_local())
            else:
                (here if name in self.slices else everywhere).append(gradient)
        norm = get_total_norm(everywhere) if everywhere else here[0].new_zeros(())
        if here:
            norm = (norm.square() + self.world.sum(get_total_norm(here).square())).sqrt()
        if limit < math.inf:
            scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
            for gradient in everywhere + here:
                gradient.mul_(scale)
        return norm

    # The layout of a checkpoint (checkpoint.Layout).

    def whole_shape(self, name: str, parameter: Tensor) -> torch.Size:
        if name in self.slices:
            return torch.Size([sum(self.slices[name]), *parameter.shape[1:]])
        return parameter.shape

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        part = part.detach()
        if self._fsdp and isinstance(part, DTensor):
            part = part.full_tensor()
        elif name in self.slices:
            rows = self.slices[name]
            # Slices differ by a row: filled up for the exchange, and cut off again.
            padded = part.new_zeros(max(rows), *part.shape[1:])
            padded[: len(part)] = part
            gathered = self.world.gather(padded)
            part = torch.cat([x[:n] for x, n in zip(gathered, rows, strict=True)])
        return part.cpu() if self.world.main else None

    def part(self, name: str, whole: Tensor) -> Tensor:
        parameter = self.model.get_parameter(name)
        whole = whole.to(parameter.device)
        if self._fsdp and isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            return distribute_tensor(whole, mesh, placements, src_data_rank=None)
        if name in self.slices:
            return whole.split(self.slices[name])[self.world.rank].clone()
        return whole


def _check(config: TrainConfig, world: World) -> None:
    for name in ("fsdp", "tensor_parallel"):
        if getattr(config, name) and world.group is None:
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} shares a model out over processes, and here is one: start them with "
                "torchrun --standalone --nproc_per_node=N -m fastgpt.gpt.train, or say "
                f"--no-{option}"
            )
        if getattr(config, name) and config.diagnostics:
            option = name.replace("_", "-")
            raise UsageError(
                f"--diagnostics looks at whole parameters, and --{option} shares them out; leave "
                "out one of the two"
            )
    if config.batch_size % world.size:
        raise UsageError(
            f"batch_size must be a multiple of the number of processes, which share each batch; "
            f"got {config.batch_size} and {world.size}"
        )


def _data_parallel(model: GPT, slices: dict[str, list[int]]) -> nn.Module:
    ddp = nn.parallel.DistributedDataParallel
    if slices:  # under all their names: the output layer's matrix is the embedding's
        names = [
            name
            for name, p in model.named_parameters(remove_duplicate=False)
            if any(p is model.get_parameter(sliced) for sliced in slices)
        ]
        ddp._set_params_and_buffers_to_ignore_for_model(model, names)
    device = next(model.parameters()).device
    return ddp(model, device_ids=None if device.type == "cpu" else [device])


def _fully_shard(
    model: GPT, slices: dict[str, list[int]], world: World, compile: bool
) -> nn.Module:
    device = next(model.parameters()).device
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        "ignored_params": {model.get_parameter(name) for name in slices},
    }
    for block in model.transformer.h:
        if compile:  # what happens between the blocks is not for the compiler
            block.compile()
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model
