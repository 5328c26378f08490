"""Measure, print Markdown, and leave a dated JSON and a chart of each op in benchmarks/results/.

python -m benchmarks.report                      # the quick shapes of every op
python -m benchmarks.report --long               # and the long ones
python -m benchmarks.report --op attention       # of one op
python -m benchmarks.report --shape gpt2-fp32 --budget 60
python -m benchmarks.report --device cuda        # on a GPU; `make gpu` runs this, too
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastgpt
from benchmarks import UnavailableError, peers
from benchmarks.compare import (
    Comparison,
    RedGateError,
    compare,
    headline,
    markdown,
    shares,
)
from benchmarks.shapes import SHAPES, Shape

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on, as far as it can be told."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    info = fastgpt.info()
    return {
        "device": device,
        **(_gpu() if device == "cuda" else {}),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": info.isa,
        "isas": list(info.isas),
        "threads": torch.get_num_threads(),
        # Of the minute before: above about 0, other work disturbed the measurement.
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "fastgpt": fastgpt.__version__,
        "commit": _commit(),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "float32_matmul_precision": torch.backends.cuda.matmul.fp32_precision,
        "peers": {
            name: importlib.metadata.version(name)
            for name in ("liger-kernel", "quack-kernels", "cut-cross-entropy")
            if _installed(name)
        },
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.split("\n")[0].strip()


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _commit() -> str | None:
    """The commit that was measured, with "-dirty" if the tree differs from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def draw(comparisons: list[Comparison], where: dict[str, Any], path: Path) -> None:
    """Bars of each peer's time over fastgpt's, forward and backward together, with quartiles."""
    from matplotlib.figure import Figure

    op, device = comparisons[0].shape.op, comparisons[0].shape.device
    names = [p.name for p in peers.PROVIDERS[op, device] if p.name != peers.FASTGPT]
    others = itertools.cycle(("#dd8452", "#8172b3", "#937860", "#da8bc3", "#64b5cd", "#ccb974"))
    known = {
        peers.IN_PLACE: "#55a868",
        peers.COMPILED: "#4c72b0",
        peers.NAIVE: "#b0b0b0",
        peers.MATH: "#b0b0b0",
    }
    known[peers.EAGER] = "#c44e52"
    palette = {name: known.get(name) or next(others) for name in names}
    step = len(names) + 1
    height = max(1.05, 0.35 * len(names)) * len(comparisons)
    figure = Figure(figsize=(8.5, 1.2 + height), layout="constrained")
    axes = figure.subplots()
    reach = max(
        comparison.ratio(row.provider, "full")[2]
        for comparison in comparisons
        for row in comparison.rows
        if row.measured
    )
    for index, comparison in enumerate(comparisons):
        for place, name in enumerate(names):
            at = index * step + place
            row = comparison.row(name)
            if not row.measured:
                reason = textwrap.shorten(f"{name}: {row.reason}", 70, placeholder=" …")
                axes.text(1 + reach * 0.012, at, reason, va="center", fontsize=8)
                continue
            low, median, high = comparison.ratio(name, "full")
            axes.barh(at, median, color=palette[name], height=0.85, label=name)
            axes.errorbar(
                median, at, xerr=[[median - low], [high - median]], color="0.15", capsize=2, lw=1
            )
            beside = high if median > 1 else max(high, 1)  # clear of the line at 1
            ratio = f"{median:.2f}" if median < 10 else f"{median:.0f}"
            axes.text(beside + reach * 0.012, at, ratio, va="center", fontsize=9)
        floor = comparison.shape.floor_name
        if comparison.row(floor).measured:
            _, fraction, _ = comparison.ratio(floor, "full")
            axes.plot(
                [fraction] * 2,
                [index * step - 0.5, index * step + len(names) - 0.5],
                color="black",
                lw=1.5,
                ls=":",
                label=floor,
            )
    axes.axvline(1, color="#2a7f3f", lw=2, label="fastgpt")
    axes.set_yticks(
        [index * step + (len(names) - 1) / 2 for index in range(len(comparisons))],
        [
            f"{c.shape}\n{c.row(peers.FASTGPT).median('full') * 1e3:.3g} ms with fastgpt"
            for c in comparisons
        ],
    )
    axes.set_ylim(len(comparisons) * step - 0.5, -1.5)  # the first one on top
    axes.set_xlim(0, reach * 1.1)
    axes.set_xlabel("time ÷ fastgpt's time, forward + backward (median, quartiles)")
    if device == "cpu":
        on = f"{where['cpu']}, {where['threads']} threads, {where['isa']}"
    else:
        on = f"{where['gpu']}, driver {where['driver']}, triton {where['triton']}"
    figure.suptitle(f"{_title(op)}: {on}, torch {where['torch']}", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(
        once.values(),
        once,
        loc="outside lower center",
        ncols=min(len(once), 6),
        fontsize=8,
        frameon=False,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=SHAPES, default="cpu", help="where (cpu)")
    parser.add_argument("--long", action="store_true", help="measure the long shapes too")
    known = dict.fromkeys(shape.name for of_device in SHAPES.values() for shape in of_device)
    parser.add_argument("--shape", action="append", choices=known, help="only this one")
    ops = dict.fromkeys(op for op, _ in peers.PROVIDERS)
    parser.add_argument("--op", action="append", choices=ops, help="only this one")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of rounds a shape (15)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no shape that would end after this"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and PNG")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: `python -m benchmarks.gpu_check` says why")

    where = machine(arguments.device)
    shapes = [
        shape
        for shape in SHAPES[arguments.device]
        if (shape.name in arguments.shape if arguments.shape else shape.quick or arguments.long)
        and (not arguments.op or shape.op in arguments.op)
    ]
    name = where["cpu"] if arguments.device == "cpu" else where["gpu"]
    print(f"{name}, torch {where['torch']}, commit {where['commit']}")
    if arguments.device == "cpu" and where["load_average"] > 0.5:
        print(f"Other work disturbs this: the load average was {where['load_average']:.1f}.")
    end = time.monotonic() + arguments.seconds
    red: list[str] = []
    for op, of_op in itertools.groupby(shapes, key=lambda shape: shape.op):
        comparisons: list[Comparison] = []
        before = len(red)
        try:
            for comparison in _compare_each(of_op, arguments.budget, end, red):
                comparisons.append(comparison)
                print(f"\n{headline(comparison)}\n\n{markdown(comparison)}", flush=True)
                red += [f"{comparison.shape}: red gate: {row}" for row in comparison.wrong()]
        finally:  # interrupted: what was measured is kept
            if comparisons:
                if op == "cross_entropy":
                    print(f"\n{shares(comparisons)}", flush=True)
                _write(op, comparisons, where, arguments.out, red[before:])
    if red:
        sys.exit("\n".join(red))


def _compare_each(
    shapes: Iterable[Shape], budget: float, end: float, red: list[str]
) -> Iterator[Comparison]:
    """A shape without a comparison has its reason printed, and in `red` if it is an error."""
    longest = 0.0  # that a shape took so far
    for shape in shapes:
        start = time.monotonic()
        if start + 0.8 * longest > end:  # the first one also warmed everything up
            print(f"\n{shape} ({shape.name}): left out: its time would end after --seconds")
            continue
        try:
            yield compare(shape, budget=budget)
        except UnavailableError as unavailable:
            print(f"\n{shape} ({shape.name}): left out: {unavailable}", flush=True)
        except Exception as error:  # whatever it is, the other shapes may do
            if not isinstance(error, RedGateError):
                traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            red.append(f"{shape}: no report: {type(error).__name__}: {first}")
            print(f"\n{red[-1]}", flush=True)
        longest = max(longest, time.monotonic() - start)


def _title(op: str) -> str:
    return op.replace("_", "-")


def _write(
    op: str,
    comparisons: list[Comparison],
    where: dict[str, Any],
    folder: Path,
    failed: Sequence[str] = (),
) -> None:
    """`failed`: what of fastgpt was wrong or ended in an error."""
    date = datetime.datetime.now(datetime.timezone.utc)
    record = {
        "date": date.isoformat(timespec="seconds"),
        "op": op,
        "machine": where,
        "failed": list(failed),
        "comparisons": [comparison.as_json() for comparison in comparisons],
    }
    stem = folder / f"{date:%Y-%m-%d-%H%M%S}-{_title(op)}-{where['device']}"
    chart, numbers = stem.with_suffix(".png"), stem.with_suffix(".json")
    write_atomically(numbers, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"\n{numbers}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no chart: matplotlib is not installed")
        return
    write_atomically(chart, lambda path: draw(comparisons, where, path))
    print(chart)


if __name__ == "__main__":
    main()
