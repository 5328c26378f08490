"""Measured comparisons of fastgpt with its peers: `pytest benchmarks --benchmark-only`."""


class UnavailableError(Exception):
    """Something can't run here, or not on this shape; the text is printed in its row."""
