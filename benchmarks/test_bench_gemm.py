"""The products of csrc/cpu/gemm.h against the rate of multiply-adds on registers alone.

The goal is 85 % of it on matrices that fit the second-level cache, with every instruction set and
type. Operands are packed: bfloat16 without instructions of its own is float32 by then, and so is
float16. The portable code's rate is that of what the compiler makes of it.
"""

import random
import statistics
import time
from dataclasses import dataclass

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import UnavailableError
from benchmarks.gemm import MicroKernel
from benchmarks.replay import clock, replay, tables

SIZES = [(m, 256, k) for m in (48, 96) for k in (64, 128)]


@dataclass(frozen=True)
class KernelName:
    isa: str
    type_name: str
    quick: bool = True

    @property
    def name(self) -> str:
        return f"gemm-{self.isa}-{self.type_name}"


KERNELS = [
    *(
        KernelName(isa, type_name)
        for isa in ("scalar", "avx2", "avx512")
        for type_name in ("float32", "float64")
    ),
    KernelName("avx512_bf16", "bfloat16"),
]

Size = tuple[int, int, int]
Rates = dict[Size | None, list[float]]  # by round; None: multiply-adds alone

_measured: dict[str, Rates | str] = {}


@pytest.fixture
def rates(shape: KernelName, request: pytest.FixtureRequest) -> Rates:
    """The interleaved rates of a kernel, measured once for all its tests."""
    if shape.name not in _measured:
        disabled = request.config.getoption("benchmark_disable", default=False)
        try:
            kernel = MicroKernel(shape.isa, shape.type_name)
        except UnavailableError as unavailable:
            _measured[shape.name] = str(unavailable)
        else:
            budget = 0 if disabled else request.config.getoption("budget")
            measured = _measured[shape.name] = _interleave(kernel, budget)
            kernel.close()
            tables.append(_markdown(kernel, measured))
    result = _measured[shape.name]
    if isinstance(result, str):
        pytest.skip(result)
    return result


def _interleave(kernel: MicroKernel, budget: float) -> Rates:
    rates: Rates = {None: []} | {size: [] for size in SIZES}
    order = list(rates)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    while len(rates[None]) < 2 or (len(rates[None]) < 41 and time.perf_counter() - start < budget):
        shuffle(order)
        for size in order:
            rates[size].append(kernel.product_rate(*size) if size else kernel.fma_rate())
    return rates


def _shares(rates: Rates, size: Size) -> list[float]:
    """Quartiles of the product's rate over that of multiply-adds alone, in the same round."""
    shares = [a / b for a, b in zip(rates[size], rates[None], strict=True)]
    return statistics.quantiles(shares, n=4, method="inclusive")


def _markdown(kernel: MicroKernel, rates: Rates) -> str:
    lines = [
        f"| {kernel} | GFLOP/s | of multiply-adds alone |",
        "|---|--:|--:|",
        f"| multiply-adds alone | {statistics.median(rates[None]) / 1e9:.1f} | |",
    ]
    for size in SIZES:
        low, median, high = _shares(rates, size)
        name = " x ".join(map(str, size))
        rate = statistics.median(rates[size]) / 1e9
        lines.append(f"| {name} | {rate:.1f} | {median:.0%} [{low:.0%}, {high:.0%}] |")
    return "\n".join(lines)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("shape", KERNELS, ids=lambda shape: shape.name)
def test_gemm(shape: KernelName, size: Size, rates: Rates, benchmark: BenchmarkFixture) -> None:
    m, n, k = size
    benchmark.group = f"gemm {m}x{n}x{k}"
    benchmark.name = shape.name
    benchmark.extra_info.update(share_quartiles=_shares(rates, size))
    replay([2 * m * n * k / rate for rate in rates[size]], benchmark)
