"""The same training step with fused, torch's and written-out operations: loss, time, memory.

    python -m fastgpt.gpt.compare --preset demo --batch-size 16

Only one operation changes at a time, the loss or the attention; the other stays fused. The loss is
timed with the projection to logits, the output layer, of which `linear_cross_entropy` is a part.
Time: in one process, the variants take turns, and the median counts. Memory: each in a fresh
process, how far the resident set (the high-water mark that the kernel of the operating system
keeps) rises above what it was with the model built and the batch loaded.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .config import LOSSES, PRESETS, GPTConfig, TrainConfig
from .errors import run_command
from .model import GPT, attention_function, loss_function
from .optim import make_optimizer


@dataclass(frozen=True)
class Variant:
    """A choice of the functions that a training step calls."""

    loss: str = "linear_cross_entropy"  # of loss_function
    attention: str = "fused"  # of attention_function


FUSED = Variant()
SECTIONS = {  # of the table, by the operation that changes; the rows by their names
    "projection + loss": {name: Variant(loss=name) for name in LOSSES},
    "attention": {name: Variant(attention=name) for name in ("fused", "torch", "explicit")},
}
VARIANTS = tuple(dict.fromkeys(v for section in SECTIONS.values() for v in section.values()))


@dataclass(frozen=True)
class Measurement:
    """What a training step of one variant gives and takes."""

    loss: float  # nats per token
    step_ms: float  # forward, backward and optimiser
    operation_ms: Mapping[str, float]  # forward and backward alone, of each of SECTIONS
    peak_mib: float | None  # of the whole step; None where the system does not tell


def compare_variants(
    config: GPTConfig, batch_size: int, repeats: int = 7, seconds: float = 20.0
) -> dict[Variant, Measurement]:
    """Measure each on the same weights and the same batch of random tokens, on the CPU.

    Each is timed `repeats` times, or fewer when the `seconds` are over.
    """
    step = _training_step(config, batch_size)
    timed = {
        "step": step,
        "projection + loss": _loss_alone(config, batch_size),
        "attention": _attention_alone(config, batch_size),
    }
    losses = {variant: step(variant).item() for variant in VARIANTS}  # and the first, slower, calls
    times: dict[Variant, list[list[float]]] = {variant: [] for variant in VARIANTS}
    begin = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - begin > seconds:
            break
        for variant in VARIANTS:
            times[variant].append([_milliseconds(run, variant) for run in timed.values()])
    measurements = {}
    for variant in VARIANTS:
        medians = map(statistics.median, zip(*times[variant], strict=True))
        operation_ms = dict(zip(timed, medians, strict=True))
        measurements[variant] = Measurement(
            loss=losses[variant],
            step_ms=operation_ms.pop("step"),
            operation_ms=operation_ms,
            peak_mib=_peak_in_fresh_process(variant, config, batch_size),
        )
    return measurements


def table(measurements: Mapping[Variant, Measurement]) -> str:
    """The measurements as text, with the ratio of each step's time to the fused one's."""
    sections = []
    for operation, variants in SECTIONS.items():
        head = (operation, "loss", "step", "", f"of it {operation}", "peak memory")
        lines = ["{:20}  {:>9}  {:>9}  {:7}  {:>23}  {:>11}".format(*head)]
        for name, variant in variants.items():
            m = measurements[variant]
            ratio = m.step_ms / measurements[FUSED].step_ms
            peak = f"{m.peak_mib:,.0f} MiB" if m.peak_mib is not None else "unknown"
            lines.append(
                f"{name:20}  {m.loss:9.6f}  {m.step_ms:6.1f} ms  {ratio:6.2f}x  "
                f"{m.operation_ms[operation]:20.1f} ms  {peak:>11}"
            )
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _training_step(config: GPTConfig, batch_size: int) -> Callable[[Variant], Tensor]:
    torch.manual_seed(0)
    model = GPT(config)
    # At a learning rate of 0 every step is done in full and starts from the same weights.
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    tokens = torch.randint(config.vocab_size, (batch_size, config.block_size + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(variant: Variant) -> Tensor:
        model.use_attention(attention_function(variant.attention))
        loss: Tensor = model(x, y, loss_function(variant.loss))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _loss_alone(config: GPTConfig, batch_size: int) -> Callable[[Variant], object]:
    """From features and matrix, as large as the model's are at first, to their gradients."""
    rows = batch_size * config.block_size
    x = torch.randn(rows, config.n_embd).requires_grad_()
    weight = (0.02 * torch.randn(config.vocab_size, config.n_embd)).requires_grad_()
    targets = torch.randint(config.vocab_size, (rows,))

    def run(variant: Variant) -> object:
        loss = loss_function(variant.loss)(x, weight, targets)
        return torch.autograd.grad(loss, (x, weight))

    return run


def _attention_alone(config: GPTConfig, batch_size: int) -> Callable[[Variant], object]:
    """The attention of all layers, on heads that lie in memory as the model's do."""
    shape = (batch_size, config.block_size, 3, config.n_head, config.n_embd // config.n_head)
    heads = torch.randn(shape).transpose(1, 3).unbind(2)  # 3 x (B, nh, T, hs)
    qkv = [part.requires_grad_() for part in heads]
    upstream = torch.randn_like(qkv[0])

    def run(variant: Variant) -> object:
        attention = attention_function(variant.attention)
        return [
            torch.autograd.grad(attention(*qkv, is_causal=True), qkv, upstream)
            for _ in range(config.n_layer)
        ]

    return run


def _milliseconds(run: Callable[[Variant], object], variant: Variant) -> float:
    start = time.perf_counter()
    result = run(variant)
    elapsed = time.perf_counter() - start
    del result  # only now: to free the gradients is not the operation's work
    return 1e3 * elapsed


def _peak_in_fresh_process(variant: Variant, config: GPTConfig, batch_size: int) -> float | None:
    task = {"variant": asdict(variant), "config": asdict(config), "batch_size": batch_size}
    task["threads"] = torch.get_num_threads()
    command = [sys.executable, "-m", "fastgpt.gpt.compare", "--peak", json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"measuring the memory of {variant} failed:\n{result.stderr}")
    peak: float | None = json.loads(result.stdout)
    return peak


def _peak_here(task: dict[str, Any]) -> float | None:
    """MiB that two steps add to the resident set of this process."""
    torch.set_num_threads(task["threads"])
    step = _training_step(GPTConfig(**task["config"]), task["batch_size"])
    variant = Variant(**task["variant"])
    before = _resident_mib("VmRSS")
    step(variant)
    step(variant)
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
        description="Compare a training step with fused, torch's and written-out operations.",
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
    print(table(compare_variants(config, options.batch_size)))
    return 0


if __name__ == "__main__":
    run_command(main)
