"""`python -m fastgpt.backends.triton.report`: compile every stored kernel, and show what it uses.

No GPU is needed. Ends with status 1 if a kernel spills, uses stack, does not fit the chip, lacks an
instruction that it is meant to have, or does not compile.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt.backends import triton as package
from fastgpt.backends.triton import aot
from fastgpt.backends.triton.aot import Compilation
from fastgpt.backends.triton.chips import CHIPS, RELATIVES, Chip

OPS = ("cross_entropy", "linear_cross_entropy", "attention")
KNOWN = CHIPS | RELATIVES

# An H200: copying, and multiplying bfloat16 matrices, as measured with torch.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 790e12

# ---- what is compiled ----


class Row(NamedTuple):
    """A compiled kernel."""

    chip: str
    kernel: str
    configuration: str
    work: str
    resources: dict[str, Any] | None  # None where it did not compile
    complaints: list[str]


@functools.cache
def compilations(op: str, chip: str) -> list[Compilation]:
    module = importlib.import_module(f"fastgpt.backends.triton.{op}")
    return list(module.compilations(KNOWN[chip]))


def configuration(compilation: Compilation) -> str:
    """The tile and the launch: "M 128, N 64, 8 warps, 3 stages"."""
    tile = [
        f"{name.removeprefix('BLOCK_').lower()} {value}"
        for name, value in compilation.constants.items()
        if re.fullmatch("BLOCK|BLOCK_[MN]|ROWS", name)
    ]
    launch = [
        f"{compilation.options[option]} {unit}"
        for option, unit in (("num_warps", "warps"), ("num_stages", "stages"))
        if option in compilation.options
    ]
    return ", ".join(tile + launch)


def compile_one(task: tuple[str, str, int]) -> Row:
    """Compile one of `compilations(op, chip)`, in a process of the pool."""
    op, name, index = task
    chip, compilation = KNOWN[name], compilations(op, name)[index]
    try:
        resources = aot.compile(compilation, chip)
    except Exception as error:  # anything that Triton, LLVM or ptxas may raise is a finding
        complaints = [f"{compilation.name}: does not compile: {error}"]
        return _row(name, compilation, None, complaints)
    complaints = aot.check(resources, compilation, chip)
    return _row(name, compilation, resources._asdict(), complaints)


def _row(
    chip: str, compilation: Compilation, resources: dict[str, Any] | None, complaints: list[str]
) -> Row:
    work = compilation.work
    return Row(chip, compilation.name, configuration(compilation), work, resources, complaints)


def compile_all(chips: Iterable[str], ops: Iterable[str], jobs: int) -> list[Row]:
    """Every stored kernel of the ops, for every one of the chips, in `jobs` processes."""
    tasks = [
        (op, chip, i) for chip in chips for op in ops for i in range(len(compilations(op, chip)))
    ]
    if jobs == 1:
        return list(map(compile_one, tasks))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(compile_one, tasks, chunksize=4))


# ---- the roofline ----


class Limit(NamedTuple):
    """What a path has to move or compute for a shape, and the time that takes at the least."""

    path: str
    shape: str
    amount: float
    unit: str  # "B" or "FLOP"

    @property
    def seconds(self) -> float:
        rate = BYTES_PER_SECOND if self.unit == "B" else FLOPS_PER_SECOND
        return self.amount / rate


def roofline() -> list[Limit]:
    """The paths of all ops for the shapes by which they are compared."""
    limits = []
    for N, C in ((2048, 50304), (16384, 128256)):
        for dtype, size in (("bfloat16", 2), ("float32", 4)):
            shape = f"{N} x {C} {dtype}"
            for path, passes in (("forward", 1), ("backward", 2)):
                limits.append(Limit(f"cross-entropy {path}", shape, passes * N * C * size, "B"))
    for N, D, C in ((8192, 768, 50257), (8192, 4096, 128256)):
        for path, products in (("", 3), (" in slices", 4)):
            shape = f"({N}, {D}) x {C} bfloat16"
            limits.append(
                Limit(f"linear cross-entropy{path}", shape, products * 2 * N * C * D, "FLOP")
            )
    for B, H, L, D in ((1, 8, 4096, 128), (2, 12, 1024, 64), (1, 16, 16384, 128)):
        product = 2 * B * H * L * L * D / 2  # causal: half of the pairs
        for path, products in (("forward", 2), ("query gradient", 3), ("key gradient", 4)):
            shape = f"({B}, {H}, {L}, {D}) causal bfloat16"
            limits.append(Limit(f"attention {path}", shape, products * product, "FLOP"))
    return limits


# ---- tables ----

Table = list[Sequence[str]]  # the first row is the heading

HEADING = ("kernel", "configuration", "registers", "shared KiB", "occupancy", "instructions")


def resources_table(rows: Iterable[Row]) -> Table:
    """What the kernels of one chip use."""
    table: Table = [HEADING]
    for row in rows:
        used = row.resources
        if used is None:
            table.append((row.kernel, row.configuration, "does not compile", "", "", ""))
            continue
        counts = ", ".join(f"{count} {what}" for what, count in used["instructions"].items())
        shared = f"{used['shared_memory'] / 1024:.3g}"
        share = used["blocks"] * used["threads"] / KNOWN[row.chip].threads
        occupancy = f"{used['blocks']} ({share:.0%})"
        numbers = (str(used["registers"]), shared, occupancy)
        table.append((row.kernel, row.configuration, *numbers, counts))
    return table


def roofline_table(limits: Iterable[Limit]) -> Table:
    table: Table = [("path", "shape", "at the least", "on an H200")]
    for limit in limits:
        amount = _engineering(limit.amount) + limit.unit
        table.append((limit.path, limit.shape, amount, f"{1e6 * limit.seconds:.4g} µs"))
    return table


def _engineering(x: float) -> str:
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if x >= power:
            return f"{x / power:.3g} {prefix}"
    return f"{x:.3g} "


def plain(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Table) -> str:
    rows = [*table[:1], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_chip(rows: Iterable[Row]) -> dict[str, list[Row]]:
    chips: dict[str, list[Row]] = {}
    for row in rows:
        chips.setdefault(row.chip, []).append(row)
    return chips


def notes(rows: Iterable[Row]) -> list[str]:
    """What the compilers warn of, and in how many kernels; no complaint."""
    kernels: dict[str, list[str]] = {}
    for row in rows:
        for warning in (row.resources or {}).get("warnings", ()):
            kernels.setdefault(f"{row.chip}: {warning}", []).append(row.kernel)
    return [f"{w}, in {len(ks)} of these kernels, as {ks[0]}." for w, ks in kernels.items()]


def text(rows: list[Row], format: Callable[[Table], str]) -> str:
    """Every table, each with what is to be noted."""
    parts = []
    for chip, its in by_chip(rows).items():
        parts += [_title(KNOWN[chip], format), format(resources_table(its)), *notes(its)]
    parts += ["## The roofline" if format is markdown else "roofline", ROOFLINE]
    parts.append(format(roofline_table(roofline())))
    return "\n\n".join(parts)


def _title(chip: Chip, format: Callable[[Table], str]) -> str:
    name = f"sm_{chip.arch}" if chip.backend == "cuda" else str(chip.arch)
    limits = f"{chip.shared_memory // 1024} KiB of shared memory for a block"
    return f"## {name}: {limits}" if format is markdown else f"{name}: {limits}"


INTRODUCTION = """# What the Triton kernels use

Written by `python -m fastgpt.backends.triton.report --markdown docs/triton.md`, which compiles
every stored configuration of every kernel ahead of time, here with Triton {version}, and fails if
one spills registers, uses stack, exceeds the chip's shared memory or lacks its instructions. No GPU
takes part: these are not measurements.

*registers* are 32-bit ones of a thread (on AMD, vector registers with the accumulators); *shared*
is the memory of a block; *occupancy* is how many blocks a multiprocessor holds at once, and what
share of its threads that is; *instructions* is how many of those that matter stand in the code."""

ROOFLINE = """What a path has to move or to compute, and the time that means at an H200's 4.3 TB/s
and 790 TFLOP/s in bfloat16. Linear cross-entropy is forward and backward in one; in slices of the
classes it forms the logits twice. Attention's backward takes two passes, so that it needs no
atomics: three products for the query's gradient and four for key's and value's, where one pass
would do with five."""


def document(rows: list[Row], version: str) -> str:
    return f"{INTRODUCTION.format(version=version)}\n\n{text(rows, markdown)}\n"


def listed(document: str) -> set[tuple[str, str, str]]:
    """The (chip, kernel, configuration) of a document's tables."""
    found, chip = set(), ""
    for line in document.splitlines():
        if line.startswith("## "):
            chip = line[3:].partition(":")[0]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == len(HEADING) and line.startswith("| ") and cells[0] != HEADING[0]:
            found.add((chip, cells[0], cells[1]))
    return {entry for entry in found if entry[1] != "---"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.backends.triton.report", description=__doc__
    )
    parser.add_argument("--chip", action="append", choices=KNOWN, help="only this one; repeatable")
    parser.add_argument("--op", action="append", choices=OPS, help="only this one; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write it as a document")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    options = parser.parse_args(arguments)
    if missing := package._missing():
        parser.error(missing)
    if package._interpreted():
        parser.error("TRITON_INTERPRET is set, and interpreted kernels can't be compiled: unset it")
    version = package.version() or "unknown"
    rows = compile_all(options.chip or CHIPS, options.op or OPS, options.jobs)
    print(text(rows, plain))
    if options.json:
        record = {"triton": version, "kernels": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(record, indent=1))
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(document(rows, version))
    complaints = [f"{row.chip}: {complaint}" for row in rows for complaint in row.complaints]
    print(f"\n{len(rows)} kernels compiled with Triton {version}, {len(complaints)} complaints")
    for complaint in complaints:
        print(complaint)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
