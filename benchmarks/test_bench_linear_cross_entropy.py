"""Linear cross-entropy against its peers: `pytest benchmarks --benchmark-only`."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import peers
from benchmarks.compare import Comparison
from benchmarks.replay import clock, replay_provider
from benchmarks.shapes import LINEAR_CROSS_ENTROPY


@pytest.mark.filterwarnings("default")  # the compiler's own are no failure of ours
@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("provider", [provider.name for provider in peers.LINEAR_CROSS_ENTROPY])
@pytest.mark.parametrize("shape", LINEAR_CROSS_ENTROPY, ids=lambda shape: shape.name)
def test_linear_cross_entropy(
    provider: str, comparison: Comparison, benchmark: BenchmarkFixture
) -> None:
    (which,) = comparison.shape.passes
    replay_provider(comparison, which, provider, benchmark)
