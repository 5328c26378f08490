"""A training step on our kernels, on torch's, and compiled: `pytest benchmarks`.

Like the other benchmarks, measured once for each case, interleaved, and replayed to
pytest-benchmark; the table and the breakdown stand at the end of the run.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.compare import RedGateError
from benchmarks.replay import clock, replay, tables
from benchmarks.training_step import (
    CASES,
    VARIANTS,
    Case,
    Measured,
    breakdown_table,
    measure,
    table,
)

_measured: dict[str, Measured | RedGateError] = {}


@pytest.fixture
def training_step(shape: Case, request: pytest.FixtureRequest) -> Measured:
    """Under --benchmark-disable it is the gate and two rounds."""
    if shape.name not in _measured:
        disabled = request.config.getoption("benchmark_disable", default=False)
        try:
            found = _measured[shape.name] = measure(
                shape, seconds=0 if disabled else None, least=2 if disabled else 3
            )
            tables.append("\n".join([*table([found]), "", *breakdown_table(found)]))
        except RedGateError as red:
            _measured[shape.name] = red
            tables.append(f"{shape} ({shape.name}): no report: {red}")
    result = _measured[shape.name]
    if isinstance(result, RedGateError):
        pytest.fail(f"no report: {result}", pytrace=False)
    return result


@pytest.mark.filterwarnings("default")  # the compiler's own are no failure of ours
@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("variant", [variant.name for variant in VARIANTS])
@pytest.mark.parametrize("shape", CASES, ids=lambda case: case.name)
def test_training_step(
    variant: str, shape: Case, training_step: Measured, benchmark: BenchmarkFixture
) -> None:
    if variant in training_step.left_out:
        pytest.skip(training_step.left_out[variant])
    benchmark.group = shape.name
    benchmark.name = variant
    benchmark.extra_info.update(
        ratio_quartiles=training_step.ratio(variant), peak_bytes=training_step.peaks[variant]
    )
    replay(training_step.step(variant), benchmark)
