"""The same training step with the fused, torch's and the naive cross-entropy: loss, time, memory.

    python -m fastgpt.gpt.compare --preset demo --batch-size 16

Time: in one process, the three take turns, and the median counts. Memory: each in a fresh process,
how far the resident set (the high-water mark that the kernel of the operating system keeps) rises
above what it was with the model built and the batch loaded.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import PRESETS, GPTConfig, TrainConfig
from .errors import run_command
from .model import GPT, loss_function
from .optim import make_optimizer

LOSSES = ("fused", "torch", "naive")


@dataclass(frozen=True)
class Measurement:
    """What a training step with one of the losses gives and takes."""

    name: str
    loss: float  # nats per token
    step_ms: float  # forward, backward and optimiser
    loss_ms: float  # the cross-entropy's forward and backward alone
    peak_mib: float | None  # of the whole step; None where the system does not tell


def compare_losses(
    config: GPTConfig, batch_size: int, repeats: int = 7, seconds: float = 20.0
) -> list[Measurement]:
    """Measure the three on the same weights and the same batch of random tokens, on the CPU.

    Each is timed `repeats` times, or fewer when the `seconds` are over.
    """
    step, targets = _prepare(config, batch_size)
    logits = torch.randn(len(targets), config.vocab_size).requires_grad_()
    losses = {name: step(name).item() for name in LOSSES}  # and the first, slower, calls
    step_times: dict[str, list[float]] = {name: [] for name in LOSSES}
    loss_times: dict[str, list[float]] = {name: [] for name in LOSSES}
    begin = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - begin > seconds:
            break
        for name in LOSSES:
            start = time.perf_counter()
            step(name)
            step_times[name].append(time.perf_counter() - start)
            logits.grad = None
            start = time.perf_counter()
            loss_function(name)(logits, targets).backward()
            loss_times[name].append(time.perf_counter() - start)
    return [
        Measurement(
            name=name,
            loss=losses[name],
            step_ms=1e3 * statistics.median(step_times[name]),
            loss_ms=1e3 * statistics.median(loss_times[name]),
            peak_mib=_peak_in_fresh_process(name, config, batch_size),
        )
        for name in LOSSES
    ]


def table(measurements: Sequence[Measurement]) -> str:
    """The measurements as text, with the ratio of each step's time to the fused one's."""
    fused = measurements[0]
    head = ("cross-entropy", "loss", "step", "", "of it loss", "peak memory")
    lines = ["{:13}  {:>9}  {:>9}  {:7}  {:>10}  {:>11}".format(*head)]
    for m in measurements:
        peak = f"{m.peak_mib:,.0f} MiB" if m.peak_mib is not None else "unknown"
        lines.append(
            f"{m.name:13}  {m.loss:9.6f}  {m.step_ms:6.1f} ms  {m.step_ms / fused.step_ms:6.2f}x  "
            f"{m.loss_ms:7.1f} ms  {peak:>11}"
        )
    return "\n".join(lines)


def _prepare(config: GPTConfig, batch_size: int) -> tuple[Callable[[str], Tensor], Tensor]:
    """A function that does one step with the loss of a name, and the targets (N,) of its batch."""
    torch.manual_seed(0)
    model = GPT(config)
    # At a learning rate of 0 every step is done in full and starts from the same weights.
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    tokens = torch.randint(config.vocab_size, (batch_size, config.block_size + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(name: str) -> Tensor:
        loss: Tensor = model(x, y, loss_function(name))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, y.flatten()


def _peak_in_fresh_process(name: str, config: GPTConfig, batch_size: int) -> float | None:
    task = {"name": name, "config": vars(config), "batch_size": batch_size}
    task["threads"] = torch.get_num_threads()
    command = [sys.executable, "-m", "fastgpt.gpt.compare", "--peak", json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name!r} failed:\n{result.stderr}")
    peak: float | None = json.loads(result.stdout)
    return peak


def _peak_here(task: dict[str, object]) -> float | None:
    """MiB that two steps add to the resident set of this process."""
    torch.set_num_threads(int(str(task["threads"])))
    config = GPTConfig(**task["config"])  # type: ignore[arg-type]
    step, _ = _prepare(config, int(str(task["batch_size"])))
    before = _resident_mib("VmRSS")
    step(str(task["name"]))
    step(str(task["name"]))
    peak = _resident_mib("VmHWM")
    return peak - before if peak is not None and before is not None else None


def _resident_mib(field: str) -> float | None:
    """A line of /proc/self/status, which Linux has."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) / 1024  # it is in KiB
    except OSError:
        pass
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.gpt.compare",
        description="Compare a training step with the fused, torch's and the naive cross-entropy.",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=None)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak is not None:
        print(json.dumps(_peak_here(json.loads(options.peak))))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    config = PRESETS[options.preset]
    config = replace(config, vocab_size=options.vocab_size or config.vocab_size)
    print(table(compare_losses(config, options.batch_size)))
    return 0


if __name__ == "__main__":
    run_command(main)
