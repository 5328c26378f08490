"""What the options of cross-entropy cost, and its time against the size of the logits.

python -m benchmarks.scaling            # writes docs/cross-entropy.md and docs/cross-entropy.png

Needs some 18 GiB of memory for the largest logits, 10^9 numbers of float32; `--most 1e8` does less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt
from benchmarks.report import machine, write_atomically
from benchmarks.roofline import MemoryFloor
from fastgpt.backends import native
from fastgpt.extras import require

DOCS = Path(__file__).parent.parent / "docs"
Call = Callable[[], Any]
SIZES = (
    (16, 64), (64, 160), (128, 800), (256, 4000), (1024, 10000), (2048, 50000), (20000, 50000),
)  # fmt: skip


def interleaved(
    calls: dict[str, Call], seconds: float, least: int = 5, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call in each round; one after another in a round, so that they share its
    weather. `warm`: they have run before.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    if not warm:
        for call in calls.values():
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def _both_passes(function: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Call:
    return lambda: torch.autograd.grad(function(x, *args, **options), x)


def options_table(seconds: float) -> list[str]:
    """The time of each option over the plain one's in the same round, fp32 2048x50304."""
    N, C = 2048, 50304
    x = torch.randn(N, C).requires_grad_()
    in_place = x.detach().clone().requires_grad_()
    target = torch.randint(C, (N,))
    weight = torch.rand(C)
    probabilities = torch.rand(N, C)
    ours = fastgpt.cross_entropy
    calls = {
        "plain": _both_passes(ours, x, target),
        "class weights": _both_passes(ours, x, target, weight),
        "label smoothing": _both_passes(ours, x, target, label_smoothing=0.1),
        "weights and smoothing": _both_passes(ours, x, target, weight, label_smoothing=0.1),
        "z_loss": _both_passes(ours, x, target, z_loss=1e-4),
        "softcap": _both_passes(ours, x, target, softcap=30.0),
        "probabilities": _both_passes(ours, x, probabilities),
        "inplace_backward": _both_passes(ours, in_place, target, inplace_backward=True),
    }
    times = interleaved(calls, seconds)
    lines = ["| option | time ÷ plain | forward + backward |", "|---|--:|--:|"]
    for name, measured in times.items():
        ratios = [a / b for a, b in zip(measured, times["plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        lines.append(
            f"| {name} | {median:.2f} [{low:.2f}, {high:.2f}] | "
            f"{1e3 * statistics.median(measured):.1f} ms |"
        )
    return lines


def instruction_sets_table(seconds: float) -> list[str]:
    """Forward + backward on each instruction set, beside torch eager in the same rounds."""
    lines = ["| instruction set | float32 2048x50304 | bfloat16 2048x50304 |", "|---|--:|--:|"]
    cells: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2048, 50304).to(dtype).requires_grad_()
        target = torch.randint(50304, (2048,))

        def on(isa: str, run: Call) -> Call:
            def call() -> None:
                native.extension.set_isa(isa)  # type: ignore[union-attr]
                run()

            return call

        ours = _both_passes(fastgpt.cross_entropy, x, target)
        calls = {isa: on(isa, ours) for isa in native.isas() if isa != "scalar"}
        calls["torch eager"] = _both_passes(F.cross_entropy, x, target)
        before = native.isa()
        try:
            times = interleaved(calls, seconds)
        finally:
            native.extension.set_isa(before)  # type: ignore[union-attr]
        for isa in list(calls)[:-1]:
            ratios = [a / b for a, b in zip(times["torch eager"], times[isa], strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            cells.setdefault(isa, []).append(f"{median:.2f} [{low:.2f}, {high:.2f}]")
    return lines + [f"| {isa} | {' | '.join(row)} |" for isa, row in cells.items()]


def scaling(most: float, seconds: float) -> dict[str, dict[int, float]]:
    """Median seconds of forward and backward by the number of logits, float32."""
    found: dict[str, dict[int, float]] = {}
    for N, C in SIZES:
        if most < N * C:
            break
        x = torch.randn(N, C).requires_grad_()
        target = torch.randint(C, (N,))
        torch._dynamo.reset()
        compiled = torch.compile(F.cross_entropy, dynamic=False, fullgraph=True)
        calls = {
            "fastgpt": _both_passes(fastgpt.cross_entropy, x, target),
            "torch eager": _both_passes(F.cross_entropy, x, target),
            "torch.compile": _both_passes(compiled, x, target),
        }
        times = interleaved(calls, seconds, least=3)
        for name, measured in times.items():
            found.setdefault(name, {})[N * C] = statistics.median(measured)
        if 16 << 20 <= N * C <= 1 << 28:  # beyond the caches, and with room for two more
            floor = MemoryFloor(x.nbytes)
            passes = [sum(floor()) for _ in range(5)]
            floor.close()
            found.setdefault("memory floor", {})[N * C] = statistics.median(passes)
        print(N, C, {name: row[N * C] for name, row in found.items() if N * C in row}, flush=True)
    return found


def draw(found: dict[str, dict[int, float]], where: dict[str, Any], path: Path) -> None:
    figure_class = require("matplotlib.figure").Figure
    figure = figure_class(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = {"fastgpt": "#2a7f3f", "torch eager": "#c44e52", "torch.compile": "#4c72b0"}
    for name, row in found.items():
        dotted = name not in colours
        axes.loglog(
            list(row), [1e3 * s for s in row.values()], "s" if dotted else "o-",
            color=colours.get(name, "black"), label=name,
        )  # fmt: skip
    axes.set_xlabel("N x C, float32 logits")
    axes.set_ylabel("forward + backward, ms (median)")
    axes.set_title(
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}",
        fontsize=10,
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--most", type=float, default=1e9, help="logits of the largest size (1e9)")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each comparison (15)")
    arguments = parser.parse_args()
    require("matplotlib.figure")  # now rather than after the measurement
    where = machine()
    torch.manual_seed(0)
    options = options_table(arguments.seconds)
    print("\n".join(options))
    sets = instruction_sets_table(arguments.seconds)
    print("\n".join(sets))
    found = scaling(arguments.most, arguments.seconds / 3)
    sizes = sorted({n for row in found.values() for n in row})
    table = ["| N x C | " + " | ".join(found) + " |", "|--:|" + "--:|" * len(found)]
    for n in sizes:
        cells = [f"{1e3 * row[n]:.3g} ms" if n in row else "" for row in found.values()]
        table.append(f"| {n:.1e} | " + " | ".join(cells) + " |")
    text = "\n".join(
        [
            "# Cross-entropy: what its options cost, and how its time grows\n",
            "Written by `python -m benchmarks.scaling`: forward and backward, interleaved rounds, "
            "medians [quartiles].\n",
            f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}, "
            f"commit {where['commit']}.\n",
            "## Options, float32 2048x50304\n",
            *options,
            "\n## Instruction sets: torch eager's time ÷ fastgpt's\n",
            *sets,
            "\n## Time against size, float32\n",
            "![time against size](cross-entropy.png)\n",
            *table,
            "",
        ]
    )
    write_atomically(DOCS / "cross-entropy.md", lambda path: path.write_text(text))
    write_atomically(DOCS / "cross-entropy.png", lambda path: draw(found, where, path))


if __name__ == "__main__":
    main()
