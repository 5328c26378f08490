"""A training step of the reference GPT: on our kernels, on torch's, and compiled; and what is left.

python -m benchmarks.training_step           # docs/training-step.md and a dated JSON, in 8 minutes
python -m benchmarks.training_step --quick   # a tiny model, to see that it works; writes nothing

Forward, backward and AdamW of one model, whose variants share weights, gradients and the
optimiser's state, and take turns. Memory is what torch's allocator held at most during a step,
without gradients: beyond weights, gradients and optimiser. First a gate: each variant's loss and
gradients must be eager's.
"""

import argparse
import copy
import datetime
import functools
import gc
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.attention_scaling import multiply_adds
from benchmarks.compare import RedGateError
from benchmarks.memory import peak_bytes
from benchmarks.report import RESULTS, machine, write_atomically
from fastgpt.gpt import GPT, PRESETS, GPTConfig
from fastgpt.gpt.model import attention_function, loss_function

PAGE = Path(__file__).parent.parent / "docs" / "training-step.md"
PARTS = ("forward", "backward", "AdamW")
FLOAT32, AUTOCAST, BFLOAT16 = "float32", "bfloat16 autocast", "bfloat16"
# How far from eager's, of the same weights: the loss, and the gradients in the norm of them all.
ALLOWED = {FLOAT32: (1e-5, 1e-4), AUTOCAST: (2e-3, 0.03), BFLOAT16: (1e-2, 0.05)}


@dataclass(frozen=True)
class Case:
    """A model, a batch and the types it is trained in."""

    model: str
    config: GPTConfig
    B: int
    mode: str
    seconds: float  # of rounds
    quick: bool = True  # else only with --long, of `pytest benchmarks`

    @property
    def name(self) -> str:
        return f"step-{self.model}-{self.mode.replace(' ', '-')}"

    def __str__(self) -> str:
        return f"{self.model}, {self.B} x {self.config.block_size} tokens, {self.mode}"

    def layer_operations(self) -> int:
        """Of the products in the blocks, forward and backward."""
        per_token = 12 * self.config.n_layer * self.config.n_embd**2
        return 6 * self.B * self.config.block_size * per_token


GPT2 = replace(PRESETS["gpt2"], vocab_size=50304)
CASES = (
    Case("124M", GPT2, 1, FLOAT32, 45),
    Case("124M", GPT2, 1, AUTOCAST, 35),
    Case("demo", PRESETS["demo"], 16, FLOAT32, 8),
    Case("demo", PRESETS["demo"], 16, AUTOCAST, 8),
    Case("124M", GPT2, 1, BFLOAT16, 30, quick=False),
    Case("demo", PRESETS["demo"], 16, BFLOAT16, 8, quick=False),
)
QUICK = tuple(Case("tiny", PRESETS["tiny"], 2, mode, 0) for mode in ALLOWED)


@dataclass(frozen=True)
class Variant:
    name: str
    attention: str  # of attention_function
    loss: str  # of loss_function
    compiled: bool = False
    recomputes: bool = False


OURS = Variant(peers.FASTGPT, "fused", "linear_cross_entropy")
# What torch.compile does by itself: cheap results are computed again for the backward.
RECOMPUTING = replace(OURS, name="fastgpt, recomputing", recomputes=True)
EAGER = Variant(peers.EAGER, "torch", "torch")
COMPILED = replace(EAGER, name=peers.COMPILED, compiled=True)
VARIANTS = (OURS, RECOMPUTING, EAGER, COMPILED)


class Trainee:
    """The model of a case, in all variants on the same parameters, and a batch."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = GPT(case.config)
        if case.mode == BFLOAT16:
            self.model.bfloat16()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        size = (case.B, case.config.block_size + 1)
        tokens = torch.randint(case.config.vocab_size, size, generator=generator)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.forwards = {variant: self._forward(variant) for variant in VARIANTS}

    def _forward(self, variant: Variant) -> Callable[[Tensor, Tensor], Tensor]:
        shared = {id(parameter): parameter for parameter in self.parameters}
        model = copy.deepcopy(self.model, shared)
        model.use_attention(attention_function(variant.attention))
        loss_fn = loss_function(variant.loss)
        if variant.recomputes:
            model.checkpoint_activations(keep_products=True)

        def forward(x: Tensor, y: Tensor) -> Tensor:
            loss = model(x, y, loss_fn)[1]
            assert loss is not None
            return loss

        return torch.compile(forward, fullgraph=True) if variant.compiled else forward

    def loss(self, variant: Variant) -> Tensor:
        # Each weight is used once: there is nothing to keep the copies of it for.
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=self.case.mode == AUTOCAST, cache_enabled=False
        ):
            return self.forwards[variant](self.x, self.y)

    def step(self, variant: Variant) -> tuple[float, float, float]:
        """The seconds of each of PARTS."""
        self.optimizer.zero_grad()
        start = time.perf_counter()
        loss = self.loss(variant)
        middle = time.perf_counter()
        loss.backward()
        late = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        return middle - start, late - middle, end - late

    def gate(self) -> dict[Variant, str]:
        """Check that all variants compute what eager does: which do not, or don't run, and why.

        Raises RedGateError if it is one of ours.
        """
        want_loss, want = self._gradients(EAGER)
        size = math.sqrt(sum(float(g.float().square().sum()) for g in want))
        allowed_loss, allowed = ALLOWED[self.case.mode]
        left_out = {}
        for variant in VARIANTS:
            try:
                loss, got = self._gradients(variant)
            except Exception as error:
                if not variant.compiled:
                    raise
                left_out[variant] = (
                    f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                )
                continue
            squares = (
                float((a.float() - b.float()).square().sum())
                for a, b in zip(got, want, strict=True)
            )
            error = math.sqrt(sum(squares)) / size
            off = abs(loss - want_loss) / abs(want_loss)
            # Not "error > allowed", which NaN would pass.
            if not (error <= allowed and off <= allowed_loss):
                left_out[variant] = (
                    f"{variant.name} is not {EAGER.name}: the loss is {loss:.7g} instead of "
                    f"{want_loss:.7g}, and the gradients are off by {error:.2g} of their norm, "
                    f"where {allowed_loss:g} and {allowed:g} are allowed"
                )
                if not variant.compiled:
                    raise RedGateError(f"{self.case}: {left_out[variant]}")
        return left_out

    def _gradients(self, variant: Variant) -> tuple[float, list[Tensor]]:
        self.optimizer.zero_grad()
        loss = self.loss(variant)
        loss.backward()
        gradients = [parameter.grad for parameter in self.parameters]
        self.optimizer.zero_grad()
        return loss.item(), gradients  # type: ignore[return-value]


# ---- where the time goes ----

HEAD, LAYERS, ATTENTION = "output layer and loss", "products of the layers", "attention"
NORM, GELU, EMBEDDING, ADAMW = "layer norm", "GELU", "embeddings", "AdamW"
REST, COMPILER, PYTHON = "additions, casts, copies", "the compiler's code", "Python and autograd"
OWNERS = {  # of each part: the rows of the breakdown
    LAYERS: "torch", HEAD: "fastgpt", ATTENTION: "fastgpt", NORM: "torch", GELU: "torch",
    EMBEDDING: "torch", REST: "torch", ADAMW: "torch", COMPILER: "torch", PYTHON: "",
}  # fmt: skip


def part_of(name: str, shapes: list[Any], vocabulary: int) -> str:
    """Which part of the step an event of the profiler is of, by its own time."""
    name = name.lower()
    if "attention" in name or "dot_product" in name:
        return ATTENTION
    if "cross_entropy" in name or "log_softmax" in name or "nll_loss" in name:
        return HEAD
    if name in ("aten::mm", "aten::addmm", "aten::bmm"):
        wide = any(vocabulary in shape for shape in shapes if isinstance(shape, list))
        return HEAD if wide else LAYERS
    for part, words in {
        ADAMW: ("adam", "optimizer"),
        NORM: ("layer_norm",),
        GELU: ("gelu",),
        EMBEDDING: ("embedding",),
        COMPILER: ("compiled", "inductor", "fxgraph"),
    }.items():
        if any(word in name for word in words) and not name.startswith("autograd::"):
            return part
    return REST if name.startswith("aten::") else PYTHON


def breakdown(trainee: Trainee, variant: Variant) -> dict[str, float]:
    """The seconds of each part in one step; Python's are what no operator has."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        start = time.perf_counter()
        trainee.step(variant)
        total = time.perf_counter() - start
    parts = dict.fromkeys(OWNERS, 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        part = part_of(event.key, event.input_shapes, trainee.case.config.vocab_size)
        parts[part] += event.self_cpu_time_total / 1e6
    parts[PYTHON] = 0.0
    parts[PYTHON] = max(0.0, total - sum(parts.values()))
    return parts


# ---- a case ----


@dataclass
class Measured:
    """What was measured of a case, by the names of the variants."""

    case: Case
    seconds: dict[str, dict[str, list[float]]]  # of each part, by round
    peaks: dict[str, int]  # bytes beyond weights, gradients and optimiser
    breakdowns: dict[str, dict[str, float]]
    fixed_bytes: int  # of weights, gradients and optimiser
    multiply_adds: float  # the machine's, 1/s
    left_out: dict[str, str]  # variants that were not measured, and why
    took: float = field(default=0.0)  # seconds, of everything

    def step(self, name: str) -> list[float]:
        return [sum(parts) for parts in zip(*self.seconds[name].values(), strict=True)]

    def ratio(self, name: str, part: str | None = None) -> list[float]:
        """Quartiles of a variant's time over ours in the same round, of a part or the whole."""
        theirs, ours = (
            self.seconds[each][part] if part else self.step(each) for each in (name, OURS.name)
        )
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        return statistics.quantiles(ratios, n=4, method="inclusive")

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "step_ratio_quartiles": {name: self.ratio(name) for name in self.seconds},
            "peak_of_eager": {n: p / self.peaks[EAGER.name] for n, p in self.peaks.items()},
        }


def measure(case: Case, seconds: float | None = None, least: int = 3) -> Measured:
    """Gate, memory, rounds for about `seconds` (the case's), and a profile of each variant."""
    begin = time.perf_counter()
    trainee = Trainee(case)
    failed = trainee.gate()  # and the compiler's work
    variants = [variant for variant in VARIANTS if variant not in failed]
    trainee.step(OURS)  # the optimiser's state is there from now on
    peaks = {}
    for variant in variants:
        trainee.optimizer.zero_grad()
        peaks[variant.name] = peak_bytes(
            functools.partial(trainee.step, variant),
            beside=lambda: [p.grad for p in trainee.parameters if p.grad is not None],
        )
    times: dict[str, dict[str, list[float]]] = {
        variant.name: {part: [] for part in PARTS} for variant in variants
    }
    order, shuffle = list(variants), random.Random(0).shuffle
    end = time.perf_counter() + (case.seconds if seconds is None else seconds)
    gc.collect()
    gc.disable()
    try:
        while len(times[OURS.name][PARTS[0]]) < least or time.perf_counter() < end:
            shuffle(order)
            for variant in order:
                for part, taken in zip(PARTS, trainee.step(variant), strict=True):
                    times[variant.name][part].append(taken)
    finally:
        gc.enable()
    breakdowns = {variant.name: breakdown(trainee, variant) for variant in variants}
    fixed = sum(p.nbytes + p.grad.nbytes for p in trainee.parameters if p.grad is not None)
    states = (x for state in trainee.optimizer.state.values() for x in state.values())
    fixed += sum(x.nbytes for x in states if isinstance(x, Tensor))
    dtype = torch.float32 if case.mode == FLOAT32 else torch.bfloat16
    left_out = {variant.name: reason for variant, reason in failed.items()}
    measured = Measured(case, times, peaks, breakdowns, fixed, multiply_adds(dtype), left_out)
    torch._dynamo.reset()  # the graphs hold the parameters
    measured.took = time.perf_counter() - begin
    return measured


def within(cases: tuple[Case, ...], seconds: float) -> Iterator[Case]:
    """Those that can be expected to end in time: none takes longer than the longest before."""
    start, longest = time.perf_counter(), 0.0
    for case in cases:
        begin = time.perf_counter()
        if begin - start + 0.8 * longest > seconds:
            print(f"{case}: left out, it would end after --seconds", flush=True)
            continue
        yield case
        longest = max(longest, time.perf_counter() - begin)


# ---- as text ----


def _quartiles(values: list[float]) -> str:
    low, median, high = values
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def _milliseconds(values: list[float]) -> str:
    return f"{1e3 * statistics.median(values):.3g} ms"


def table(found: list[Measured]) -> list[str]:
    lines = [
        "| | step | ÷ fastgpt | forward ÷ | backward ÷ | forward, backward, AdamW | "
        "MiB beyond weights, gradients, optimiser | of eager's |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for measured in found:
        fixed = measured.fixed_bytes / 2**20
        lines.append(f"| **{measured.case}** | | | | | | beside {fixed:,.0f} | |")
        for name, parts in measured.seconds.items():
            ratios = [_quartiles(measured.ratio(name, part)) for part in (None, *PARTS[:2])]
            if name == OURS.name:
                ratios = ["1", "1", "1"]
            each = ", ".join(_milliseconds(parts[part]).removesuffix(" ms") for part in PARTS)
            peak = measured.peaks[name]
            lines.append(
                f"| {name} | {_milliseconds(measured.step(name))} | {' | '.join(ratios)} | "
                f"{each} | {peak / 2**20:,.0f} | {peak / measured.peaks[EAGER.name]:.2f} |"
            )
        lines += [f"| {name} | {why} | | | | | | |" for name, why in measured.left_out.items()]
    return lines


def breakdown_table(measured: Measured) -> list[str]:
    """What is left of a step, by part; of fastgpt's, also the share and whose code it is."""
    names = list(measured.breakdowns)
    lines = [
        f"| {measured.case} | whose, in fastgpt | of its step | {' | '.join(names)} |",
        "|---|---|--:|" + "--:|" * len(names),
    ]
    ours = measured.breakdowns[OURS.name]
    for part, owner in OWNERS.items():
        times = [measured.breakdowns[name][part] for name in names]
        if max(times) == 0:
            continue
        cells = [f"{1e3 * seconds:.3g} ms" if seconds else "" for seconds in times]
        share = f"{ours[part] / sum(ours.values()):.0%}" if ours[part] else ""
        lines.append(f"| {part} | {owner if ours[part] else ''} | {share} | {' | '.join(cells)} |")
    totals = [f"{1e3 * sum(measured.breakdowns[name].values()):.3g} ms" for name in names]
    lines.append(f"| the whole step, profiled | | | {' | '.join(totals)} |")
    rates = [
        f"{measured.case.layer_operations() / measured.breakdowns[name][LAYERS]:.3g}"
        for name in names
    ]
    shares = [f"{float(rate) / measured.multiply_adds:.0%}" for rate in rates]
    lines.append(f"| the layers' products, of the multiply-add rate | | | {' | '.join(shares)} |")
    return lines


def page(found: list[Measured], where: dict[str, Any]) -> str:
    text = [
        "# A training step: its time and memory, and what is left\n",
        "Written by `python -m benchmarks.training_step`. The reference GPT, forward, backward and "
        "AdamW (torch's fused one), on our two kernels, on torch's attention and cross-entropy, "
        "and that compiled. All variants share weights, gradients and optimiser state and take "
        "turns in a process; medians, and ratios to fastgpt's time in the same round as median "
        "[quartiles]. Memory is the most that torch's allocator held in a step, gradients not "
        "counted. *Recomputing* keeps the results of products and attention, and computes what "
        "lies between them again for the backward, as torch.compile does "
        "(`GPT.checkpoint_activations(keep_products=True)`). In *bfloat16 autocast* the weights "
        "are float32, in *bfloat16* nothing is.\n",
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}, "
        f"commit {where['commit']}, load average {where['load_average']:.1f} before.\n",
        *table(found),
        "\n## What is left, and whose it is\n",
        "Of one step under torch's profiler: the own time of each operator. With torch's functions "
        "the output layer's products and the loss are several operators, with ours they are one. "
        "The compiler's code has layer norm, GELU, the loss and the additions in it. The rate is "
        "of the products in the blocks, against multiply-adds on registers alone.\n",
    ]
    for measured in found:
        text += [*breakdown_table(measured), ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model; nothing is written")
    parser.add_argument(
        "--seconds", type=float, default=480.0, help="start no case that would end after (480)"
    )
    parser.add_argument("--docs", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    where = machine()
    date = datetime.datetime.now(datetime.timezone.utc)
    found = []
    for case in within(QUICK if options.quick else CASES, options.seconds):
        found.append(measure(case))
        print(f"{case}: {found[-1].took:.0f} s", flush=True)
        record = {
            "date": date.isoformat(timespec="seconds"),
            "op": "training_step",
            "machine": where,
            "cases": [measured.as_json() for measured in found],
        }
        if not options.quick:  # after each case: what was measured is kept
            _write(options.results / f"{date:%Y-%m-%d-%H%M%S}-training-step-cpu.json",
                   json.dumps(record, indent=1) + "\n")  # fmt: skip
            _write(options.docs, page(found, where))
    print(page(found, where))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
