"""Attention against its peers: `pytest benchmarks --benchmark-only`."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import peers
from benchmarks.compare import PASSES, Comparison
from benchmarks.replay import clock, replay_provider
from benchmarks.shapes import ATTENTION


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("provider", [provider.name for provider in peers.ATTENTION])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", ATTENTION, ids=lambda shape: shape.name)
def test_attention(
    which: str, provider: str, comparison: Comparison, benchmark: BenchmarkFixture
) -> None:
    replay_provider(comparison, which, provider, benchmark)
