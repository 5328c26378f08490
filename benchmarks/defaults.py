"""From a measurement of cross-entropy or attention on a GPU: whether its CUDA or its Triton kernels
run there by default, and of attention's CUDA kernels, which generation.

python -m benchmarks.defaults benchmarks/results/DATE-cross-entropy-cuda.json           # print it
python -m benchmarks.defaults benchmarks/results/DATE-cross-entropy-cuda.json --write   # store it

The entry for a chip holds the ratio Triton / CUDA of the median times of forward and backward, the
median over the shapes: above 1 the CUDA kernels are the faster. Of attention there is one more for
each pass and width that Hopper has kernels of, with the ratio Ampere / Hopper; and the time of CUDA
above is that of the faster generation. An entry replaces an older one of the same op and chip in
fastgpt/backends/measured.json.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers
from fastgpt.backends import hopper
from fastgpt.files import atomic_path

# As a report calls them, and as the table of backends does.
OPS = {"cross_entropy": "cross_entropy", "attention": "scaled_dot_product_attention"}
MEASURED = Path(__file__).parent.parent / "fastgpt" / "backends" / "measured.json"


class UnfitError(Exception):
    """A result from which nothing can be concluded."""


class _NotMeasuredError(Exception):
    """Why a shape has no time of a provider."""


Ratios = dict[str, float]  # by the names of the shapes


def entries(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a result file, that of the op first. Raises UnfitError with the reason."""
    where = record.get("machine", {})
    op = record.get("op")
    if op not in OPS:
        raise UnfitError(f"expected a result of {' or '.join(OPS)}, got one of {op}")
    if where.get("device") != "cuda":
        raise UnfitError(f"expected a result from a GPU, got one from a {where.get('device')}")
    needed = {"date": record.get("date")}
    needed |= {name: where.get(name) for name in ("gpu", "capability", "commit")}
    if missing := [name for name, value in needed.items() if not value]:
        raise UnfitError(f"the result does not say its {' and '.join(missing)}")
    if "failed" not in record:
        raise UnfitError("the result does not say which gates failed: it is of an older report")
    if record["failed"]:
        raise UnfitError("a gate failed: " + "; ".join(record["failed"]))
    major, minor = needed["capability"].split(".")

    def entry(name: str, ratios: Ratios) -> dict[str, Any]:
        return {
            "op": name,
            "chip": f"sm_{major}{minor}",
            "gpu": needed["gpu"],
            "date": needed["date"][:10],
            "commit": needed["commit"],
            "ratio": round(statistics.median(ratios.values()), 3),
            "shapes": list(ratios),
        }

    comparisons = record["comparisons"]
    generations = _generations(comparisons) if op == "attention" else {}
    found = {key: entry(hopper.entry(*key), ratios) for key, ratios in generations.items()}
    on = {key: its["ratio"] > 1 for key, its in found.items()}
    return [entry(OPS[op], _ratios(op, comparisons, on)), *found.values()]


def _generations(
    comparisons: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, int], Ratios]:
    """Ampere's median time over Hopper's, of each pass and width that both generations ran."""
    found: dict[tuple[str, int], Ratios] = {}
    for comparison in comparisons:
        shape = comparison["shape"]
        width = hopper.width_of(shape["D"])
        for which in hopper.PASSES:
            with contextlib.suppress(_NotMeasuredError):
                ratio = _seconds(comparison, peers.AMPERE, which)
                ratio /= _seconds(comparison, peers.HOPPER, which)
                found.setdefault((which, width), {})[shape["name"]] = ratio
    return found


def _ratios(op: str, comparisons: Sequence[Mapping[str, Any]], on: hopper.Switch) -> Ratios:
    """Triton's median time over CUDA's, of the shapes that both ran. `on`: where Hopper's kernels
    are the faster.
    """
    ratios, reasons = {}, {}
    for comparison in comparisons:
        name = comparison["shape"]["name"]
        try:
            cuda = _cuda_seconds(op, comparison, on)
            ratios[name] = _seconds(comparison, peers.TRITON, "full") / cuda
        except _NotMeasuredError as error:
            reasons[name] = str(error)
    if not ratios:
        raise UnfitError(
            "no shape has both CUDA's kernels and Triton's: "
            + ("; ".join(f"{name}: {why}" for name, why in reasons.items()) or "there are none")
        )
    return ratios


def _cuda_seconds(op: str, comparison: Mapping[str, Any], on: hopper.Switch) -> float:
    """Of forward and backward, each on the generation that is to run it."""
    if op != "attention":
        return _seconds(comparison, peers.CUDA, "full")
    width = hopper.width_of(comparison["shape"]["D"])
    return sum(
        _seconds(
            comparison,
            peers.HOPPER if on.get((which, width)) else peers.AMPERE,
            which,
        )
        for which in hopper.PASSES
    )


def _seconds(comparison: Mapping[str, Any], provider: str, which: str) -> float:
    """The median time of a pass. Raises UnfitError if the provider is wrong."""
    rows = {row["provider"]: row for row in comparison["rows"]}
    row = rows.get(provider, {"reason": "it has no such row"})
    if row.get("red"):
        name = comparison["shape"]["name"]
        raise UnfitError(f"a gate failed: {provider} on {name}: {row['reason']}")
    if "median_seconds" not in row:
        raise _NotMeasuredError(f"{provider}: {row['reason']}")
    return row["median_seconds"][which]


def store(new: Mapping[str, Any], path: Path) -> None:
    """In the place of what is stored for the same op and chip."""
    try:
        old = json.loads(path.read_text())
    except FileNotFoundError:
        old = []
    kept = [e for e in old if (e["op"], e["chip"]) != (new["op"], new["chip"])]
    entries = sorted([*kept, new], key=lambda e: (e["op"], e["chip"]))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None, measured: Path = MEASURED) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.defaults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, help="a JSON of the report's")
    parser.add_argument("--write", action="store_true", help="store it in measured.json")
    options = parser.parse_args(arguments)
    try:
        found = entries(json.loads(options.result.read_text()))
    except (OSError, json.JSONDecodeError, UnfitError) as error:
        sys.exit(f"{options.result}: {error}")
    for new in found:
        print(json.dumps(new, indent=2))
        kinds = ("CUDA", "Triton") if new["op"] in OPS.values() else ("Hopper", "Ampere")
        faster = kinds[0] if new["ratio"] > 1 else kinds[1]
        where = f"{new['op']} on {new['chip']}"
        print(f"{faster} is the faster in {where}, over {len(new['shapes'])} shapes")
        if options.write:
            store(new, measured)
    if options.write:
        print(measured)


if __name__ == "__main__":
    main()
