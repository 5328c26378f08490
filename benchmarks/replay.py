"""An interleaved measurement, replayed to pytest-benchmark.

pytest-benchmark times one test after another, and on a machine that other work disturbs the ratio
of two such times says little. So each shape is measured once, all providers interleaved
(compare.py), and the tests replay those times to pytest-benchmark by a clock that moves only by
what was measured: its table, --benchmark-json and --benchmark-compare show the same numbers as the
table of ratios that follows. Its own options on rounds and calibration have no effect; use
--budget. Forward, backward and both are from the same calls, in training mode.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.compare import Comparison

tables: list[str] = []  # what is printed at the end of the run

_now = 0.0


def clock() -> float:
    return _now


def _advance(seconds: float) -> None:
    global _now
    _now += seconds


def replay(seconds: list[float], benchmark: BenchmarkFixture) -> None:
    """The test must set `timer=clock`."""
    times = iter(seconds)
    benchmark.pedantic(_advance, setup=lambda: ((next(times),), {}), rounds=len(seconds))


def replay_provider(
    comparison: Comparison, which: str, provider: str, benchmark: BenchmarkFixture
) -> None:
    row = comparison.row(provider)
    if row.red:
        pytest.fail(f"not measured: {row.reason}", pytrace=False)
    if not row.measured:
        pytest.skip(row.reason)
    benchmark.group = f"{comparison.shape.op} {comparison.shape.name} {which}"
    benchmark.name = provider
    benchmark.extra_info.update(
        kernel=comparison.kernel,
        ratio_quartiles=comparison.ratio(provider, which),
        peak_bytes=row.peak_bytes,
    )
    replay(row.seconds[which], benchmark)
