"""From a measurement of cross-entropy or attention on a GPU: whether its CUDA or its Triton kernels
run there by default.

python -m benchmarks.defaults benchmarks/results/DATE-cross-entropy-cuda.json           # print it
python -m benchmarks.defaults benchmarks/results/DATE-cross-entropy-cuda.json --write   # store it

The entry for a chip holds the ratio Triton / CUDA of the median times of forward and backward, the
median over the shapes: above 1 the CUDA kernels are the faster. It replaces an older entry of the
same op and chip in fastgpt/backends/measured.json.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers
from fastgpt.files import atomic_path

# As a report calls them, and as the table of backends does.
OPS = {"cross_entropy": "cross_entropy", "attention": "scaled_dot_product_attention"}
MEASURED = Path(__file__).parent.parent / "fastgpt" / "backends" / "measured.json"


class UnfitError(Exception):
    """A result from which nothing can be concluded."""


def entry(record: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a result file. Raises UnfitError with the reason."""
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
    ratios = _ratios(record["comparisons"])
    major, minor = needed["capability"].split(".")
    return {
        "op": OPS[op],
        "chip": f"sm_{major}{minor}",
        "gpu": needed["gpu"],
        "date": needed["date"],
        "commit": needed["commit"],
        "ratio": round(statistics.median(ratios.values()), 3),
        "shapes": list(ratios),
    }


def _ratios(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Triton's median time over CUDA's, by the names of the shapes that both ran."""
    ratios, reasons = {}, {}
    for comparison in comparisons:
        name = comparison["shape"]["name"]
        rows = {row["provider"]: row for row in comparison["rows"]}
        seconds = {}
        for provider in (peers.CUDA, peers.TRITON):
            row = rows.get(provider, {"reason": "it has no such row"})
            if row.get("red"):
                raise UnfitError(f"a gate failed: {provider} on {name}: {row['reason']}")
            if "median_seconds" in row:
                seconds[provider] = row["median_seconds"]["full"]
            else:
                reasons[name] = f"{provider}: {row['reason']}"
        if len(seconds) == 2:
            ratios[name] = seconds[peers.TRITON] / seconds[peers.CUDA]
    if not ratios:
        raise UnfitError(
            f"no shape has both {peers.CUDA!r} and {peers.TRITON!r}: "
            + ("; ".join(f"{name}: {why}" for name, why in reasons.items()) or "there are none")
        )
    return ratios


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
        new = entry(json.loads(options.result.read_text()))
    except (OSError, json.JSONDecodeError, UnfitError) as error:
        sys.exit(f"{options.result}: {error}")
    print(json.dumps(new, indent=2))
    faster = "CUDA" if new["ratio"] > 1 else "Triton"
    print(f"{faster} is the faster on {new['chip']}, over {len(new['shapes'])} shapes")
    if options.write:
        store(new, measured)
        print(measured)


if __name__ == "__main__":
    main()
