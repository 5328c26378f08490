"""One interleaved comparison: a gate for every provider, then rounds in which each runs once.

In a round the order is shuffled, and each provider does a forward and a backward on the same
inputs; a ratio is formed within its round, so that what disturbs the machine for longer than a
round disturbs both sides of it. What is reported is the median of the ratios and their quartiles.
"""

import gc
import inspect
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import fastgpt
from benchmarks import UnavailableError, gates, peers
from benchmarks.gates import Errors, Function, Inputs
from benchmarks.memory import cuda_peak_bytes, peak_bytes
from benchmarks.peers import Provider
from benchmarks.shapes import PASSES, Shape
from benchmarks.timing import CpuRunner, CudaRunner


class RedGateError(AssertionError):
    """fastgpt or the baseline itself is wrong: there is nothing to compare."""


@dataclass
class Row:
    """What was measured of one provider."""

    provider: str
    reason: str = ""  # why it was not measured
    red: bool = False  # ... which is that its gate is red
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PASSES})
    # On a GPU: until the call and its backward return to Python, from an idle GPU.
    host_seconds: list[float] = field(default_factory=list)
    errors: Errors | None = None
    peak_bytes: int | None = None  # at once, beside the inputs, in one forward and backward

    @property
    def measured(self) -> bool:
        return bool(self.seconds["full"])

    def median(self, which: str) -> float:
        return statistics.median(self.seconds[which])


@dataclass
class Comparison:
    shape: Shape
    kernel: str  # the backend that ran for fastgpt
    threads: int
    input_bytes: int  # of what is differentiated, and so of the gradients
    rows: list[Row]
    floor_rates: dict[str, float] = field(default_factory=dict)
    floor_operations: str = ""

    def row(self, provider: str) -> Row:
        return next(row for row in self.rows if row.provider == provider)

    @property
    def rounds(self) -> int:
        return len(self.row(peers.FASTGPT).seconds["full"])

    def ratio(self, provider: str, which: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the provider's time over fastgpt's."""
        return self._quartiles(self.row(provider).seconds[which], which)

    def share(self, provider: str, which: str) -> float | None:
        """The floor's time over the provider's, 1 at the best; None without a floor."""
        floor = self.row(self.shape.floor_name)
        return floor.median(which) / self.row(provider).median(which) if floor.measured else None

    def wrong(self) -> list[str]:
        """Of fastgpt's own rows, those whose gate is red."""
        red = [row for row in self.rows if row.red and row.provider in peers.OWN]
        return [f"{row.provider}: {row.reason}" for row in red]

    def better_of_torch(self) -> tuple[str, tuple[float, float, float]] | None:
        """Which of torch's own functions is faster, and the ratio; None where there is only one."""
        which = self.shape.passes[-1]
        own = [row for row in self.rows if row.provider in peers.TORCH and row.measured]
        if len(own) < 2 and self.shape.goal is None:
            return None
        best = min(own, key=lambda row: row.median(which))
        return best.provider, self._quartiles(best.seconds[which], which)

    def _quartiles(self, seconds: list[float], which: str) -> tuple[float, float, float]:
        own = self.row(peers.FASTGPT).seconds[which]
        ratios = [a / b for a, b in zip(seconds, own, strict=True)]
        return tuple(statistics.quantiles(ratios, n=4, method="inclusive"))  # type: ignore[return-value]

    def as_json(self) -> dict[str, Any]:
        result = asdict(self)
        result["shape"]["dtype"] = str(self.shape.dtype)
        result["rounds"] = self.rounds
        result["better_of_torch"] = self.better_of_torch()
        result.update(result.pop("floor_rates"))
        for row, plain in zip(self.rows, result["rows"], strict=True):
            if row.measured:
                plain["median_seconds"] = {p: row.median(p) for p in PASSES}
                plain["share_of_floor"] = {
                    p: self.share(row.provider, p) for p in self.shape.passes
                }
                plain["ratio_quartiles"] = {
                    p: self.ratio(row.provider, p) for p in self.shape.passes
                }
        return result


def compare(
    shape: Shape, budget: float = 15.0, rounds: tuple[int, int] | None = None
) -> Comparison:
    """Gate the op's providers and measure them for about `budget` seconds, within limits on the
    rounds, which are the shape's fewest and 300.

    Raises RedGateError if fastgpt or torch eager fails its gate. Another provider that fails is
    left out, with the reason in its row. Raises UnavailableError if a GPU is too small.
    """
    providers = peers.PROVIDERS[shape.op, shape.device]
    _check_memory(shape, len(providers))
    rows = {p.name: Row(p.name) for p in providers}
    functions = _build(shape, providers, rows)
    inputs = shape.inputs()
    _gate(shape, providers, rows, functions, inputs)
    destroying = {provider.name for provider in providers if provider.destroys}
    runners: dict[str, Callable[[], tuple[float, ...]]] = {}
    peak = peak_bytes if shape.device == "cpu" else cuda_peak_bytes
    for name, function in functions.items():
        own = inputs.copied() if name in destroying else inputs
        rows[name].peak_bytes = peak(lambda f=function, x=own: x.gradients(x.value(f)))
        if shape.device == "cpu":
            runners[name] = CpuRunner(function, own)
        elif own is inputs:
            runners[name] = CudaRunner(function, inputs)
        else:
            runners[name] = CudaRunner(function, own, lambda x=own: x.restore(inputs))
    kernel = _kernel(functions[peers.FASTGPT], inputs)
    floor_row = rows[shape.floor_name] = Row(shape.floor_name)
    floor = None
    try:
        floor = runners[shape.floor_name] = shape.floor()
        floor()  # the others have run, for the gate and for their memory
    except UnavailableError as unavailable:
        floor_row.reason = str(unavailable)
    _interleave(runners, rows, budget, rounds or (shape.fewest_rounds, 300))

    input_bytes = sum(x.nbytes for x in inputs.wanted)
    result = Comparison(shape, kernel, torch.get_num_threads(), input_bytes, list(rows.values()))
    if floor is not None:
        result.floor_rates = floor.rates(floor_row.median("forward"), floor_row.median("backward"))
        result.floor_operations = floor.operations
        floor.close()
    return result


def _build(
    shape: Shape, providers: tuple[Provider, ...], rows: dict[str, Row]
) -> dict[str, Function]:
    functions = {}
    for provider in providers:
        try:
            functions[provider.name] = provider.build(shape)
        except UnavailableError as unavailable:
            rows[provider.name].reason = str(unavailable)
    return functions


def _gate(
    shape: Shape,
    providers: tuple[Provider, ...],
    rows: dict[str, Row],
    functions: dict[str, Function],
    inputs: Inputs,
) -> None:
    """Record the errors and take the providers whose gate is red out of `functions`."""
    destroying = {provider.name for provider in providers if provider.destroys}
    spared = {
        name: _on_a_copy(function) if name in destroying else function
        for name, function in functions.items()
    }
    errors, largest = shape.errors(inputs, spared)
    for provider in providers:
        row = rows[provider.name]
        if row.reason:
            continue
        row.errors = errors[provider.name]
        gated = row.errors
        if provider.sums_loss_in_type and shape.dtype.itemsize < 4:
            gated = {part: error for part, error in gated.items() if part != "loss"}
        row.reason = gates.red(gated, errors[peers.EAGER], largest, provider.allowed, shape.dtype)
        if row.reason:
            row.red = True
            del functions[provider.name]
            if provider.name in (peers.FASTGPT, peers.EAGER):
                raise RedGateError(f"{provider.name}: {row.reason}")


def _kernel(function: Function, inputs: Inputs) -> str:
    found = fastgpt.explain(inspect.unwrap(function), *inputs.arguments, **inputs.keywords)
    if found.backend != "native":
        return found.backend
    if found.device == "cuda":
        return f"CUDA, {found.kernels}" if found.kernels else "CUDA"
    return f"native, {fastgpt.info().isa}"


def _on_a_copy(function: Function) -> Function:
    return lambda input, *args, **kwargs: function(input.clone(), *args, **kwargs)


def _check_memory(shape: Shape, functions: int) -> None:
    if shape.device != "cuda":
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if (needed := shape.bytes_needed(functions)) > free:
        raise UnavailableError(
            f"needs {needed / 2**30:.0f} GiB of the GPU's memory, {free / 2**30:.0f} are free"
        )


def _interleave(
    runners: dict[str, Callable[[], tuple[float, ...]]],
    rows: dict[str, Row],
    budget: float,
    rounds: tuple[int, int],
) -> None:
    order = list(runners)
    shuffle = random.Random(0).shuffle
    least, most = rounds
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        done = 0
        while done < least or (done < most and time.perf_counter() - start < budget):
            shuffle(order)
            for name in order:
                forward, backward, *host = runners[name]()
                for which, seconds in zip(
                    PASSES, (forward, backward, forward + backward), strict=True
                ):
                    rows[name].seconds[which].append(seconds)
                rows[name].host_seconds += host
            done += 1
    finally:
        gc.enable()


# ---- as text ----


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _rate(number: float, unit: str) -> str:
    return f"{number / 1e12:.2f} T{unit}" if number >= 1e12 else f"{number / 1e9:.1f} G{unit}"


def headline(comparison: Comparison) -> str:
    parts = [
        f"{comparison.shape} ({comparison.shape.name}): fastgpt is {comparison.kernel}",
        f"{comparison.threads} threads" if comparison.shape.device == "cpu" else "one GPU",
        f"{comparison.rounds} rounds",
    ]
    if comparison.floor_rates:
        rates = " and ".join(
            f"{rate / 1e9:.1f}e9 {name.replace('_', ' ')}"
            for name, rate in comparison.floor_rates.items()
        )
        parts.append(f"{rates} ({comparison.floor_operations})")
    if better := comparison.better_of_torch():
        name, (low, median, high) = better
        goal = comparison.shape.goal
        parts.append(
            f"the better of torch's own, {name}, ÷ fastgpt: {median:.2f} [{low:.2f}, {high:.2f}]"
            + (f", goal {goal:g}" if goal else "")
        )
    return "; ".join(parts)


def markdown(comparison: Comparison) -> str:
    """Median times; the ratios to fastgpt's time as median [quartiles] over the rounds; what the
    median time means as a rate of the work that can't be avoided, with the share of the floor; and
    the peak memory beside the inputs, over their size, and what of it is no gradient. Ratios and
    rates are of the passes in which the providers do the same work.
    """
    shape = comparison.shape
    host = bool(comparison.row(peers.FASTGPT).host_seconds)
    lines = [
        "| | forward | backward | both | forward ÷ fastgpt | backward ÷ fastgpt | "
        "both ÷ fastgpt | forward rate | backward rate | rate of both | peak memory ÷ inputs | "
        "beyond gradients | gradient error |" + " host |" * host,
        "|---|" + "--:|" * (12 + host),
    ]
    forward, backward = shape.work()
    work = {"forward": forward, "backward": backward, "full": forward + backward}
    for row in comparison.rows:
        if not row.measured:
            lines.append(f"| {row.provider} | {row.reason} |" + " |" * (11 + host))
            continue
        cells = [row.provider] + [_time(row.median(which)) for which in PASSES]
        for which in PASSES:
            if which not in shape.passes:
                cells.append("")
            elif row.provider == peers.FASTGPT:
                cells.append("1")
            else:
                low, median, high = comparison.ratio(row.provider, which)
                cells.append(f"{median:.2f} [{low:.2f}, {high:.2f}]")
        for which in PASSES:
            if which not in shape.passes:
                cells.append("")
                continue
            rate = _rate(work[which] / row.median(which), shape.unit)
            share = comparison.share(row.provider, which)
            cells.append(rate if share is None else f"{rate} ({share:.0%})")
        if row.peak_bytes is None or row.errors is None:
            cells += ["", "", ""]
        else:
            inputs = comparison.input_bytes
            cells.append(f"{row.peak_bytes / inputs:.2f}" if inputs else "")
            cells.append(f"{max(0, row.peak_bytes - inputs) / 2**20:.1f} MiB")
            _, *gradient_errors = row.errors.values()
            cells.append(f"{max(gradient_errors):.1e}" if gradient_errors else "")
        if host:
            times = row.host_seconds
            cells.append(_time(statistics.median(times)) if times else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shares(comparisons: list[Comparison]) -> str:
    """Of cross-entropy's shapes that have a floor, the share of it that each provider reaches,
    forward and both together. On a GPU the floor is one read of the logits, and two reads and a
    write, at the rate of a copy: so it is the share of the copy rate. Empty without a floor.
    """
    found = [c for c in comparisons if c.row(c.shape.floor_name).measured]
    if not found:
        return ""
    names = [row.provider for row in found[0].rows if row.provider != found[0].shape.floor_name]
    lines = [
        f"| forward, both ÷ {found[0].shape.floor_name} | " + " | ".join(names) + " |",
        "|---|" + "--:|" * len(names),
    ]
    for comparison in found:
        cells = [str(comparison.shape)]
        for name in names:
            parts = (
                [comparison.share(name, which) for which in ("forward", "full")]
                if comparison.row(name).measured
                else []
            )
            cells.append(", ".join(f"{part:.0%}" for part in parts if part is not None))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
