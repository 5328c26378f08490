"""Measured comparisons of fastgpt with its peers: `pytest benchmarks --benchmark-only`."""
