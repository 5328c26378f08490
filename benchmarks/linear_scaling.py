"""Linear cross-entropy: its time, rate and memory against the rows, and against those ignored.

python -m benchmarks.linear_scaling    # docs/linear-cross-entropy.md and .png, in some six minutes
"""

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastgpt
from benchmarks import UnavailableError, peers
from benchmarks.attention_scaling import multiply_adds, ratio
from benchmarks.gates import Function
from benchmarks.memory import peak_bytes
from benchmarks.report import machine, write_atomically
from benchmarks.scaling import Call, interleaved
from benchmarks.shapes import LinearCrossEntropyShape
from fastgpt.backends import native
from fastgpt.extras import require

DOCS = Path(__file__).parent.parent / "docs"
TYPES = (torch.float32, torch.bfloat16)
ROWS = (64, 128, 256, 512, 1024, 2048, 4096)
OURS, RECOMPUTE, EAGER, CHUNKED = peers.FASTGPT, peers.RECOMPUTE, peers.EAGER, peers.CHUNKED


def shape(
    dtype: torch.dtype, N: int, C: int = 16384, ignored: float = 0.0
) -> LinearCrossEntropyShape:
    return LinearCrossEntropyShape("", N, 768, C, dtype, "", ignored=ignored)


def functions() -> dict[str, Function]:
    found: dict[str, Function] = {
        OURS: fastgpt.linear_cross_entropy,
        RECOMPUTE: functools.partial(fastgpt.linear_cross_entropy, recompute=True),
        EAGER: peers.matmul_cross_entropy,
    }
    try:
        found[CHUNKED] = peers.chunked_cross_entropy()
    except UnavailableError as unavailable:
        print(f"without {CHUNKED}: {unavailable}")
    return found


class Measured(NamedTuple):
    """What was measured of each function on a shape, forward and backward together."""

    shape: LinearCrossEntropyShape
    times: dict[str, list[float]]  # seconds, by round
    peaks: dict[str, int]  # bytes beyond inputs and gradients
    multiply_adds: float  # the rate of them, of the machine

    def milliseconds(self, name: str) -> float:
        return 1e3 * statistics.median(self.times[name])

    def rate(self, name: str) -> float:
        """Of the operations that can't be avoided."""
        return sum(self.shape.work()) / statistics.median(self.times[name])

    def share(self, name: str) -> str:
        return f"{self.rate(name) / self.multiply_adds:.0%}"

    def over_ours(self, name: str) -> str:
        return ratio(self.times[name], self.times[OURS]) if name in self.times else ""

    def mebibytes(self, name: str) -> str:
        return f"{self.peaks[name] / 2**20:.3g}" if name in self.peaks else ""


def measure(
    shape: LinearCrossEntropyShape, seconds: float, of: dict[str, Function], least: int = 3
) -> Measured:
    inputs = shape.inputs()

    def both(function: Function) -> Call:
        return lambda: inputs.gradients(inputs.value(function))

    calls = {name: both(function) for name, function in of.items()}
    peaks = {name: peak_bytes(call) - shape.input_bytes for name, call in calls.items()}
    times = interleaved(calls, seconds, least, warm=True)
    measured = Measured(shape, times, peaks, multiply_adds(shape.dtype))
    print(shape, {name: f"{measured.milliseconds(name):.3g} ms" for name in calls}, flush=True)
    return measured


def head_table(N: int, seconds: float, of: dict[str, Function]) -> list[str]:
    """GPT-2's head."""
    lines = [
        "| | time ÷ fastgpt | forward + backward | of the multiply-add rate "
        "| MiB beyond inputs and gradients |",
        "|---|--:|--:|--:|--:|",
    ]
    for dtype in TYPES:
        measured = measure(shape(dtype, N, 50304), seconds, of)
        lines += [
            f"| {measured.shape}: {name} | {measured.over_ours(name)} "
            f"| {measured.milliseconds(name):.0f} ms | {measured.share(name)} "
            f"| {measured.mebibytes(name)} |"
            for name in of
        ]
    return lines


def ignored_table(N: int, seconds: float, of: dict[str, Function]) -> list[str]:
    """The work is that of the rows that count; torch does that of all."""
    of = {name: function for name, function in of.items() if name != RECOMPUTE}
    lines = [
        f"| | {EAGER} ÷ fastgpt | {CHUNKED} ÷ fastgpt | ms | of the multiply-add rate |",
        "|---|--:|--:|--:|--:|",
    ]
    for dtype in TYPES:
        for ignored in (0.0, 0.25, 0.5, 0.75):
            measured = measure(shape(dtype, N, ignored=ignored), seconds, of)
            lines.append(
                f"| {measured.shape} | {measured.over_ours(EAGER)} | {measured.over_ours(CHUNKED)} "
                f"| {measured.milliseconds(OURS):.3g} | {measured.share(OURS)} |"
            )
    return lines


def instruction_sets_table(N: int, seconds: float, of: dict[str, Function]) -> list[str]:
    """torch has its own best."""
    of = {name: of[name] for name in (OURS, EAGER)}
    lines = [f"| | {EAGER} ÷ fastgpt | ms |", "|---|--:|--:|"]
    before = native.isa()
    for dtype in TYPES:
        for isa in native.isas():
            if isa == "scalar":
                continue
            native.extension.set_isa(isa)  # type: ignore[union-attr]
            try:
                measured = measure(shape(dtype, N), seconds, of)
            finally:
                native.extension.set_isa(before)  # type: ignore[union-attr]
            lines.append(
                f"| {measured.shape}, {isa} | {measured.over_ours(EAGER)} "
                f"| {measured.milliseconds(OURS):.3g} |"
            )
    return lines


def against_rows(most: int, seconds: float, of: dict[str, Function]) -> list[list[Measured]]:
    """Of each type, for each number of rows."""
    return [
        [
            measure(shape(dtype, N), seconds, of, least=3 if N <= 1024 else 2)
            for N in ROWS
            if most >= N
        ]
        for dtype in TYPES
    ]


def rows_table(found: list[list[Measured]], of: dict[str, Function]) -> list[str]:
    others = [name for name in of if name != OURS]
    lines = [
        f"| | {' | '.join(f'{name} ÷ fastgpt' for name in others)} | ms | of the multiply-add rate "
        f"| MiB beyond inputs and gradients: {', '.join(of)} |",
        "|---|" + "--:|" * (len(others) + 3),
    ]
    for measured in (measured for of_type in found for measured in of_type):
        cells = [measured.over_ours(name) for name in others]
        cells += [f"{measured.milliseconds(OURS):.3g}", measured.share(OURS)]
        cells.append(", ".join(measured.mebibytes(name) for name in of))
        lines.append(f"| {measured.shape} | {' | '.join(cells)} |")
    return lines


def draw(found: list[list[Measured]], where: dict[str, Any], path: Path) -> None:
    figure_class = require("matplotlib.figure").Figure
    figure = figure_class(figsize=(9, 7), layout="constrained")
    colours = {OURS: "#2a7f3f", RECOMPUTE: "#55a868", EAGER: "#c44e52", CHUNKED: "#4c72b0"}
    grid = figure.subplots(2, len(found), squeeze=False)
    for of_type, (rates, memory) in zip(found, grid.T, strict=True):
        sizes = [measured.shape.N for measured in of_type]
        for name in of_type[0].times:
            line = {"color": colours[name], "label": name}
            rates.plot(sizes, [m.rate(name) / 1e9 for m in of_type], "o-", **line)
            memory.plot(sizes, [m.peaks[name] / 2**20 for m in of_type], "o-", **line)
        rates.plot(
            sizes, [m.multiply_adds / 1e9 for m in of_type], ":", color="black",
            label="multiply-adds",
        )  # fmt: skip
        first = of_type[0].shape
        dtype = str(first.dtype).removeprefix("torch.")
        rates.set_title(f"{dtype}, D = {first.D}, C = {first.C}", fontsize=10)
        rates.set_ylim(bottom=0)
        rates.set_ylabel("GFLOP/s of 6 N D C (median)")
        memory.set_yscale("log")
        memory.set_ylabel("MiB beyond inputs and gradients")
        memory.set_xlabel("N")
        for axes in (rates, memory):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(N) for N in sizes])
            axes.grid(visible=True, which="major", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        rates.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear_scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="for each comparison (4)")
    parser.add_argument("--most", type=int, default=ROWS[-1], help="rows of the largest (4096)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for the page and the chart")
    arguments = parser.parse_args()
    require("matplotlib.figure")  # now rather than after the measurement
    seconds, most = arguments.seconds, arguments.most
    where = machine()
    of = functions()
    tables = {
        "GPT-2's head": head_table(min(2048, most), seconds, of),
        "Ignored rows": ignored_table(min(512, most), seconds / 2, of),
        "Instruction sets": instruction_sets_table(min(512, most), seconds / 2, of),
    }
    found = against_rows(most, seconds / 2, of)
    text = [
        "# Linear cross-entropy: its speed and memory, against the rows and those ignored\n",
        "Written by `python -m benchmarks.linear_scaling`: forward and backward, interleaved "
        "rounds, medians [quartiles]; N x D x C. The rate is that of 6 N D C operations for the N "
        "rows that are not ignored, the least that the loss and both gradients take.\n",
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}, "
        f"commit {where['commit']}.\n",
    ]
    for title, table in tables.items():
        text += [f"## {title}\n", *table, ""]
    text += ["## Against the rows\n", "![rate and memory](linear-cross-entropy.png)\n"]
    text += [*rows_table(found, of), ""]
    stem = arguments.out / "linear-cross-entropy"
    page, chart = stem.with_suffix(".md"), stem.with_suffix(".png")
    write_atomically(page, lambda path: path.write_text("\n".join(text)))
    write_atomically(chart, lambda path: draw(found, where, path))


if __name__ == "__main__":
    main()
