"""Text of the reference GPT, with its cache and without: `pytest benchmarks --benchmark-only`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.generation import OURS, VARIANTS, WORKLOADS, Variant, Workload, measure, table
from benchmarks.replay import clock, replay, tables
from fastgpt.gpt import GPT, PRESETS

Measured = tuple[dict[Variant, list[float]], dict[Variant, float]]

_measured: dict[Workload, Measured] = {}


@pytest.fixture
def measured(shape: Workload, request: pytest.FixtureRequest) -> Measured:
    """The interleaved times of a workload, and whose tokens are ours; measured once for all tests.

    Under --benchmark-disable it is the gate and one round.
    """
    if shape not in _measured:
        disabled = request.config.getoption("benchmark_disable", default=False)
        seconds, least = (0, 1) if disabled else (request.config.getoption("budget"), 3)
        torch.manual_seed(0)
        model, tokens = GPT(PRESETS[shape.preset]).eval(), shape.new_tokens
        times, same = _measured[shape] = measure(model, shape.prompts(), tokens, seconds, least)
        title = f"{shape.name}: {shape.batch_size} x {tokens} tokens, {len(times[OURS])} rounds"
        if not disabled:
            lines = table(times, same, tokens * shape.batch_size)
            tables.append("\n".join([title, *lines]))
    return _measured[shape]


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("shape", WORKLOADS, ids=lambda shape: shape.name)
def test_generation(
    shape: Workload, variant: Variant, measured: Measured, benchmark: BenchmarkFixture
) -> None:
    times, same = measured
    if same[variant] < 1:
        pytest.fail(f"only {same[variant]:.1%} of the tokens are those with the cache")
    tokens = shape.batch_size * shape.new_tokens
    benchmark.group = shape.name
    benchmark.name = variant.name
    benchmark.extra_info.update(
        tokens_per_second=[tokens / seconds for seconds in times[variant]],
        ratios=[own / ours for own, ours in zip(times[variant], times[OURS], strict=True)],
    )
    replay(times[variant], benchmark)
