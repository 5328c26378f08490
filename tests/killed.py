"""Training runs that end by SIGKILL at given points of a checkpoint: `python killed.py FOLDER`.

One process that forks for each point, as importing torch takes longer than the runs.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastgpt.gpt import state, train
from fastgpt.gpt.metrics import MetricsFile
from fastgpt.gpt.train import Trainer, make_trainer

SETTINGS = {
    "tokenizer": "byte", "block_size": 16, "batch_size": 4, "dropout": 0.1, "steps": 20,
    "warmup": 5, "lr": 3e-3, "eval_interval": 8, "eval_batches": 2, "log_interval": 5,
    "device": "cpu", "threads": 1, "keep": 2, "skip_spikes": 6.0,
}  # fmt: skip
KILL_AT = 16  # the second evaluation; the first checkpoint is of step 8


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_of(write: Callable[..., None], path_of: Callable[..., Path]) -> Callable[..., None]:
    """As if the process died in the middle of writing."""

    def half(*arguments: Any, **keywords: Any) -> None:
        path = path_of(*arguments, **keywords)
        before = path.stat().st_size if path.exists() else 0
        write(*arguments, **keywords)
        os.truncate(path, (before + path.stat().st_size) // 2)
        die()

    return half


def arm(trainer: Trainer, point: str) -> None:
    """Have the process die at the point."""
    replace = os.replace
    if point == "in a step":
        trainer.optimizer.step = die  # type: ignore[method-assign]
    elif point == "in a row":
        MetricsFile.append = half_of(MetricsFile.append, lambda self, row: self.path)  # type: ignore[method-assign]
    elif point == "in the best":
        trainer.best_val = float("inf")
        safetensors.torch.save_file = half_of(
            safetensors.torch.save_file, lambda tensors, path, metadata: path
        )
    elif point == "before the latest":
        trainer.save = die  # type: ignore[method-assign]
    elif point == "in the latest":
        trainer.record = lambda evaluate: None  # type: ignore[method-assign]
        safetensors.torch.save_file = half_of(
            safetensors.torch.save_file, lambda tensors, path, metadata: path
        )
    elif point == "before the latest has its name":
        os.replace = lambda a, b: die() if Path(b).name == "latest.safetensors" else replace(a, b)
    elif point == "when the latest has its name":
        state.keep_checkpoint = die
    elif point == "before its second name":
        os.link = die
    elif point == "in the plot":
        train.draw_loss = die
    else:
        raise ValueError(point)


POINTS = {  # and the step of the checkpoint that there is then
    "in a step": 8,
    "in a row": 8,
    "in the best": 8,
    "before the latest": 8,
    "in the latest": 8,
    "before the latest has its name": 8,
    "when the latest has its name": 16,
    "before its second name": 16,
    "in the plot": 16,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork, with threads that sleep
    train.draw_loss(folder / "first.png", [], 256)  # its import too, once
    for point in POINTS:
        child = os.fork()
        if child == 0:
            settings = {**SETTINGS, "data": str(folder / "text.txt"), "out": folder / point}
            trainer = make_trainer(settings)
            train_step = trainer.train_step

            def step(trainer=trainer, train_step=train_step, point=point) -> None:
                if trainer.step == KILL_AT - 1:
                    arm(trainer, point)
                train_step()

            trainer.train_step = step  # type: ignore[method-assign]
            trainer.run()
            os._exit(0)  # not reached, if the point is
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"{point!r} was not reached: status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
