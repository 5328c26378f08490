"""What latest.safetensors holds of a run: all that the next step depends on.

The parameters, the optimiser's moments, the random numbers of each process, the losses that a spike
is measured by, and the number of steps: which text a step reads follows from that and the seed.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import (
    Tensors,
    keep_checkpoint,
    kept_checkpoints,
    load_checkpoint,
    model_tensors,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)
from .errors import CheckpointError
from .folder import BEST, LATEST

if TYPE_CHECKING:
    from .train import Trainer


def save_latest(trainer: "Trainer") -> None:
    """Write latest.safetensors; no process goes on before it is there."""
    tensors = {
        **model_tensors(trainer.model, trainer.parallel),
        **optimizer_tensors(trainer.model, trainer.optimizer, trainer.parallel),
        **_rng_of_all(trainer),
        **trainer.spikes.tensors(),
        "progress": trainer.sums,
    }
    metadata = {
        **_metadata(trainer),
        "config": asdict(trainer.config),
        "best_val": trainer.best_val,
        "seconds": trainer.seconds,
        "interval_steps": trainer.interval_steps,
        "interval_skipped": trainer.interval_skipped,
        "interval_seconds": trainer.interval_seconds,
    }
    if trainer.world.main:
        save_checkpoint(trainer.out / LATEST, tensors, metadata)
        keep_checkpoint(trainer.out / LATEST, trainer.step, trainer.config.keep)
    trainer.world.wait()


def save_best(trainer: "Trainer") -> None:
    """Write best.safetensors: the weights alone."""
    tensors = model_tensors(trainer.model, trainer.parallel)
    if trainer.world.main:
        save_checkpoint(trainer.out / BEST, tensors, _metadata(trainer))


def restore(trainer: "Trainer", path: Path) -> None:
    """Put a new trainer where the one that wrote the checkpoint was. Raises CheckpointError."""
    tensors, saved = load_checkpoint(path)
    if "progress" not in tensors or "best_val" not in saved:
        kept = [LATEST, *(file.name for file in kept_checkpoints(path.parent))]
        raise CheckpointError(
            f"{path}: holds no state of a run to resume, only weights; resume from one of "
            f"{', '.join(kept)}"
        )
    if saved["corpus"] != trainer.data.digest:
        raise CheckpointError(
            f"{path} was trained on another text than {trainer.data.corpus} is now; give the same "
            "with --data (the default corpus changes with the Python version)"
        )
    restore_model(path, trainer.model, tensors, trainer.parallel)
    restore_optimizer(path, trainer.model, trainer.optimizer, tensors, trainer.parallel)
    trainer.step, trainer.best_val = saved["step"], saved["best_val"]
    trainer.seconds = saved["seconds"]
    world = trainer.world
    if not restore_rng(tensors, trainer.device, world.rank, world.size):
        # Of other processes than these: new numbers, as nobody's go on.
        torch.manual_seed(trainer.config.seed + world.rank + 1_000_003 * trainer.step)
    trainer.spikes.restore(tensors)
    trainer.sums.copy_(tensors["progress"])
    trainer.interval_steps = saved["interval_steps"]
    trainer.interval_skipped = saved.get("interval_skipped", 0)
    trainer.interval_seconds = saved["interval_seconds"]


def _metadata(trainer: "Trainer") -> dict[str, Any]:
    return {
        "model": asdict(trainer.model.config),
        "corpus": trainer.data.digest,
        "step": trainer.step,
    }


def _rng_of_all(trainer: "Trainer") -> Tensors:
    return {
        f"{name}/{rank}" if rank else name: state
        for name, own in rng_tensors(trainer.device).items()
        for rank, state in enumerate(trainer.world.gather(own))
    }
