"""A pytest plugin: `-p benchmarks.shard --shard 2/5` runs every fifth test from the second on.

Most of a test of a GPU kernel is the kernel's compilation, on one core.
"""

import pytest

_others = pytest.StashKey[bool]()  # whether any test was selected, in this part or another


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", type=_shard, default=(1, 1), help="i/n: the i-th of n parts")


def _shard(text: str) -> tuple[int, int]:
    number, of = map(int, text.split("/"))
    if not 1 <= number <= of:
        raise ValueError(text)
    return number, of


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, of = config.getoption("shard")
    config.stash[_others] = len(items) > 0
    kept = items[number - 1 :: of]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A part of few tests may have none of them."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash[_others]:
        session.exitstatus = pytest.ExitCode.OK
