"""Cross-entropy against its peers: `pytest benchmarks --benchmark-only`.

pytest-benchmark times one test after another, and on a machine that other work disturbs the ratio
of two such times says little. So each shape is measured once, all providers interleaved
(compare.py), and the tests replay those times to pytest-benchmark by a clock that moves only by
what was measured: its table, --benchmark-json and --benchmark-compare show the same numbers as the
table of ratios that follows. Its own options on rounds and calibration have no effect; use
--budget. Forward, backward and both are from the same calls, in training mode.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import peers
from benchmarks.compare import PASSES, Comparison
from benchmarks.shapes import CROSS_ENTROPY, CrossEntropyShape

_now = 0.0


def interleaved_clock() -> float:
    return _now


def _advance(seconds: float) -> None:
    global _now
    _now += seconds


@pytest.mark.filterwarnings("default")  # the compiler's own are no failure of ours
@pytest.mark.benchmark(timer=interleaved_clock)
@pytest.mark.parametrize("provider", [provider.name for provider in peers.CROSS_ENTROPY])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", CROSS_ENTROPY, ids=lambda shape: shape.name)
def test_cross_entropy(
    shape: CrossEntropyShape,
    which: str,
    provider: str,
    comparison: Comparison,
    benchmark: BenchmarkFixture,
) -> None:
    row = comparison.row(provider)
    if row.red:
        pytest.fail(f"not measured: {row.reason}", pytrace=False)
    if not row.measured:
        pytest.skip(row.reason)
    benchmark.group = f"cross_entropy {shape.name} {which}"
    benchmark.name = provider
    benchmark.extra_info.update(
        kernel=comparison.kernel,
        ratio_quartiles=comparison.ratio(provider, which),
        peak_bytes=row.peak_bytes,
    )
    seconds = iter(row.seconds[which])
    benchmark.pedantic(
        _advance, setup=lambda: ((next(seconds),), {}), rounds=len(row.seconds[which])
    )
