"""One interleaved comparison: a gate for every provider, then rounds in which each runs once.

In a round the order is shuffled, and each provider does a forward and a backward on the same
logits; a ratio is formed within its round, so that what disturbs the machine for longer than a
round disturbs both sides of it. What is reported is the median of the ratios and their quartiles.
"""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastgpt
from benchmarks import peers
from benchmarks.peers import Errors, LossFunction, Provider, UnavailableError
from benchmarks.roofline import MemoryFloor
from benchmarks.shapes import CrossEntropyShape

PASSES = ("forward", "backward", "full")
FLOOR = "memory floor"
FLOOR_BYTES = 64 << 20  # smaller logits may stay in a cache, and memory is no floor then


class RedGateError(AssertionError):
    """fastgpt or the baseline itself is wrong: there is nothing to compare."""


@dataclass
class Row:
    """What was measured of one provider."""

    provider: str
    reason: str = ""  # why it was not measured
    red: bool = False  # ... which is that its gate is red
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PASSES})
    errors: Errors | None = None
    peak_bytes: int | None = None  # at once, beside the inputs, in one forward and backward

    @property
    def measured(self) -> bool:
        return bool(self.seconds["full"])

    def median(self, which: str) -> float:
        return statistics.median(self.seconds[which])


@dataclass
class Comparison:
    shape: CrossEntropyShape
    kernel: str  # the backend that ran for fastgpt
    threads: int
    rows: list[Row]
    read_bytes_per_second: float | None = None
    copy_bytes_per_second: float | None = None  # read and written bytes together
    floor_operations: str = ""

    def row(self, provider: str) -> Row:
        return next(row for row in self.rows if row.provider == provider)

    @property
    def rounds(self) -> int:
        return len(self.row(peers.FASTGPT).seconds["full"])

    def ratio(self, provider: str, which: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the provider's time over fastgpt's."""
        own = self.row(peers.FASTGPT).seconds[which]
        ratios = [a / b for a, b in zip(self.row(provider).seconds[which], own, strict=True)]
        return tuple(statistics.quantiles(ratios, n=4, method="inclusive"))  # type: ignore[return-value]

    def as_json(self) -> dict[str, Any]:
        result = asdict(self)
        result["shape"]["dtype"] = str(self.shape.dtype)
        result["rounds"] = self.rounds
        for row, plain in zip(self.rows, result["rows"], strict=True):
            if row.measured:
                plain["median_seconds"] = {p: row.median(p) for p in PASSES}
                plain["ratio_quartiles"] = {p: self.ratio(row.provider, p) for p in PASSES}
        return result


def compare(
    shape: CrossEntropyShape,
    providers: tuple[Provider, ...] = peers.CROSS_ENTROPY,
    budget: float = 15.0,
    rounds: tuple[int, int] = (5, 300),
) -> Comparison:
    """Gate the providers and measure them for about `budget` seconds, within limits on the
    rounds.

    Raises RedGateError if fastgpt or torch eager fails its gate. Another provider that fails is
    left out, with the reason in its row.
    """
    rows = {p.name: Row(p.name) for p in providers}
    functions = _build(shape, providers, rows)
    _gate(shape, providers, rows, functions)

    leaf, logits, target = shape.inputs()
    for name, function in functions.items():
        rows[name].peak_bytes = _peak_bytes(function, leaf, logits, target)

    def timed(function: LossFunction) -> Callable[[], tuple[float, float]]:
        return lambda: _forward_backward(function, leaf, logits, target)

    runners = {name: timed(function) for name, function in functions.items()}
    floor = MemoryFloor(shape.logits_bytes) if shape.logits_bytes >= FLOOR_BYTES else None
    if floor is not None:
        rows[FLOOR] = Row(FLOOR)
        runners[FLOOR] = lambda: (floor.read(), floor.copy())
    _interleave(runners, rows, budget, rounds)

    result = Comparison(
        shape, _kernel(logits, target), torch.get_num_threads(), list(rows.values())
    )
    if floor is not None:
        result.read_bytes_per_second = floor.bytes / rows[FLOOR].median("forward")
        result.copy_bytes_per_second = 2 * floor.bytes / rows[FLOOR].median("backward")
        result.floor_operations = f"{floor.reader}; {floor.copier}"
        floor.close()
    return result


def _build(
    shape: CrossEntropyShape, providers: tuple[Provider, ...], rows: dict[str, Row]
) -> dict[str, LossFunction]:
    functions = {}
    for provider in providers:
        try:
            functions[provider.name] = provider.build(shape)
        except UnavailableError as unavailable:
            rows[provider.name].reason = str(unavailable)
    return functions


def _gate(
    shape: CrossEntropyShape,
    providers: tuple[Provider, ...],
    rows: dict[str, Row],
    functions: dict[str, LossFunction],
) -> None:
    """Record the errors and take the providers whose gate is red out of `functions`."""
    errors, largest = peers.cross_entropy_errors(shape, functions)
    for provider in providers:
        row = rows[provider.name]
        if row.reason:
            continue
        row.errors = errors[provider.name]
        row.reason = peers.red(provider, row.errors, errors[peers.EAGER], largest, shape.dtype)
        if row.reason:
            row.red = True
            del functions[provider.name]
            if provider.name in (peers.FASTGPT, peers.EAGER):
                raise RedGateError(row.reason)


def _kernel(logits: Tensor, target: Tensor) -> str:
    backend = fastgpt.explain(fastgpt.cross_entropy, logits, target).backend
    return f"native, {fastgpt.info().isa}" if backend == "native" else backend


def _forward_backward(
    function: LossFunction, leaf: Tensor, logits: Tensor, target: Tensor
) -> tuple[float, float]:
    start = time.perf_counter()
    loss = function(logits, target)
    middle = time.perf_counter()
    torch.autograd.grad(loss, leaf)  # and the gradient is freed at once
    end = time.perf_counter()
    return middle - start, end - middle


def _interleave(
    runners: dict[str, Callable[[], tuple[float, float]]],
    rows: dict[str, Row],
    budget: float,
    rounds: tuple[int, int],
) -> None:
    order = list(runners)
    shuffle = random.Random(0).shuffle
    least, most = rounds
    for run in runners.values():
        run()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        done = 0
        while done < least or (done < most and time.perf_counter() - start < budget):
            shuffle(order)
            for name in order:
                forward, backward = runners[name]()
                for which, seconds in zip(
                    PASSES, (forward, backward, forward + backward), strict=True
                ):
                    rows[name].seconds[which].append(seconds)
            done += 1
    finally:
        gc.enable()


def _peak_bytes(function: LossFunction, leaf: Tensor, logits: Tensor, target: Tensor) -> int:
    """The most that torch's allocator held at once for one forward and backward, the gradient
    included: from the profiler's record of every allocation, so it is exact and repeatable.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints each start and stop
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        gradient = torch.autograd.grad(function(logits, target), leaf)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del gradient
    return peak


# ---- as text ----


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def headline(comparison: Comparison) -> str:
    parts = [
        f"{comparison.shape} ({comparison.shape.name}): fastgpt is {comparison.kernel}",
        f"{comparison.threads} threads",
        f"{comparison.rounds} rounds",
    ]
    if comparison.read_bytes_per_second and comparison.copy_bytes_per_second:
        parts.append(
            f"memory reads {comparison.read_bytes_per_second / 1e9:.1f} GB/s and copies "
            f"{comparison.copy_bytes_per_second / 1e9:.1f} GB/s ({comparison.floor_operations})"
        )
    return "; ".join(parts)


def markdown(comparison: Comparison) -> str:
    """Median times, and the ratios to fastgpt's time as median [quartiles] over the rounds."""
    lines = [
        "| | forward | backward | both | forward ÷ fastgpt | backward ÷ fastgpt | "
        "both ÷ fastgpt | peak memory ÷ logits | gradient error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in comparison.rows:
        if not row.measured:
            lines.append(f"| {row.provider} | {row.reason} |" + " |" * 7)
            continue
        cells = [row.provider] + [_time(row.median(which)) for which in PASSES]
        for which in PASSES:
            low, median, high = comparison.ratio(row.provider, which)
            cells.append(
                "1" if row.provider == peers.FASTGPT else f"{median:.2f} [{low:.2f}, {high:.2f}]"
            )
        if row.peak_bytes is None or row.errors is None:
            cells += ["", ""]
        else:
            cells.append(f"{row.peak_bytes / comparison.shape.logits_bytes:.2f}")
            cells.append(f"{max(row.errors.target, row.errors.others):.1e}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
