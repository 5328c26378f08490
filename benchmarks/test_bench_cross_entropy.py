"""Cross-entropy against its peers: `pytest benchmarks --benchmark-only`."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import peers
from benchmarks.compare import PASSES, Comparison
from benchmarks.replay import clock, replay_provider
from benchmarks.shapes import CROSS_ENTROPY


@pytest.mark.filterwarnings("default")  # the compiler's own are no failure of ours
@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("provider", [provider.name for provider in peers.CROSS_ENTROPY])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", CROSS_ENTROPY, ids=lambda shape: shape.name)
def test_cross_entropy(
    which: str, provider: str, comparison: Comparison, benchmark: BenchmarkFixture
) -> None:
    replay_provider(comparison, which, provider, benchmark)
