"""Options of the benchmarks, and the tables at the end of the run."""

import pytest

from benchmarks.compare import Comparison, RedGateError, compare, headline, markdown
from benchmarks.replay import tables
from benchmarks.shapes import Shape

_results: dict[str, Comparison | RedGateError] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgpt benchmarks")
    group.addoption("--long", action="store_true", help="measure the long shapes too")
    group.addoption("--shape", action="append", help="measure this shape only (repeatable)")
    group.addoption(
        "--budget", type=float, default=15.0, help="seconds of rounds for each shape (15)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def shape_of(item: pytest.Item) -> Shape | None:
        callspec = getattr(item, "callspec", None)
        return callspec.params.get("shape") if callspec else None

    names, long = config.getoption("shape") or [], config.getoption("long")
    known = dict.fromkeys(shape.name for item in items if (shape := shape_of(item)))
    if unknown := set(names) - set(known):
        raise pytest.UsageError(
            f"--shape: expected one of {', '.join(known)}, got {', '.join(sorted(unknown))}"
        )

    def wanted(item: pytest.Item) -> bool:
        shape = shape_of(item)
        if shape is None:
            return True
        return shape.name in names if names else shape.quick or long

    left_out = [item for item in items if not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if wanted(item)]


@pytest.fixture
def comparison(shape: Shape, request: pytest.FixtureRequest) -> Comparison:
    """The interleaved measurement of a shape, made once for all its tests.

    Under --benchmark-disable it is the gate and one round.
    """
    if shape.name not in _results:
        disabled = request.config.getoption("benchmark_disable", default=False)
        budget = request.config.getoption("budget")
        try:
            measured = _results[shape.name] = compare(
                shape, budget=0 if disabled else budget, rounds=(2, 2) if disabled else None
            )
            tables.append(f"{headline(measured)}\n{markdown(measured)}")
        except RedGateError as red:
            _results[shape.name] = red
            tables.append(f"{shape} ({shape.name}): no report: {red}")
    result = _results[shape.name]
    if isinstance(result, RedGateError):
        pytest.fail(f"no report: {result}", pytrace=False)
    return result


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tables:
        terminalreporter.section("measured in the same rounds")
    for table in tables:
        terminalreporter.write_line(f"{table}\n")
