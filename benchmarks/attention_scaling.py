"""Attention: what its options cost, decoding against the memory, and its rate against length.

python -m benchmarks.attention_scaling    # writes docs/attention.md and docs/attention.png
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt
from benchmarks.gemm import kernel_of
from benchmarks.report import machine, write_atomically
from benchmarks.roofline import MemoryFloor
from benchmarks.scaling import Call, interleaved
from fastgpt.backends import native
from fastgpt.extras import require

DOCS = Path(__file__).parent.parent / "docs"
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
Ours, Torch = fastgpt.scaled_dot_product_attention, F.scaled_dot_product_attention


def inputs(dtype: torch.dtype, B: int, Hq: int, H: int, L: int, S: int, D: int) -> list[Tensor]:
    """Normal query, key and value."""
    shapes = (B, Hq, L, D), (B, H, S, D), (B, H, S, D)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def forward(function: Any, qkv: list[Tensor], **options: Any) -> Call:
    def call() -> None:
        with torch.no_grad():
            function(*qkv, **options)

    return call


def both(
    function: Any,
    qkv: list[Tensor],
    upstream: Tensor,
    of: list[Tensor] | None = None,
    **options: Any,
) -> Call:
    """`of`: what is differentiated, if it is more than query, key and value."""
    return lambda: torch.autograd.grad(function(*qkv, **options), of or qkv, upstream)


def ratio(a: list[float], b: list[float]) -> str:
    """The quotient of the two in each round: median [quartiles]."""
    found = [x / y for x, y in zip(a, b, strict=True)]
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def passes(dtype: torch.dtype, sizes: tuple[int, ...], **options: Any) -> dict[str, Call]:
    """Forward, and forward with backward, of ours and torch's on the same inputs."""
    qkv = inputs(dtype, *sizes)
    upstream = torch.randn(sizes[0], sizes[1], sizes[3], sizes[5]).to(dtype)
    calls = {}
    for name, function in (("ours", Ours), ("torch", Torch)):
        calls[f"{name} forward"] = forward(function, qkv, **options)
        calls[f"{name} both"] = both(function, qkv, upstream, **options)
    return calls


def operations(sizes: tuple[int, ...]) -> float:
    """Of a causal forward."""
    B, Hq, _, L, _, D = sizes
    return 4 * B * Hq * D * L * (L + 1) / 2


def multiply_adds(dtype: torch.dtype) -> float:
    """The rate of them, on registers alone."""
    kernel = kernel_of(dtype)
    rates = []
    for _ in range(5):
        time.sleep(0.1)  # torch's threads wait for more work awake, and would take a share
        rates.append(kernel.fma_rate())
    kernel.close()
    return max(rates)


def shapes_table(seconds: float) -> list[str]:
    """torch's time over ours, causal, and the share of the rate of multiply-adds."""
    lines = [
        "| causal | forward | forward + backward | of the multiply-add rate: forward, both |",
        "|---|--:|--:|--:|",
    ]
    long, gpt2, demo = (
        (1, 8, 8, 4096, 4096, 128),
        (2, 12, 12, 1024, 1024, 64),
        (8, 6, 6, 256, 256, 64),
    )
    for dtype, sizes in [(t, s) for s in (long, gpt2, demo) for t in (FLOAT, BF16)] + [
        (HALF, gpt2)
    ]:
        times = interleaved(passes(dtype, sizes, is_causal=True), seconds)
        rate = multiply_adds(dtype)
        work = operations(sizes)
        shares = (
            work / statistics.median(times["ours forward"]) / rate,
            3.5 * work / statistics.median(times["ours both"]) / rate,
        )
        B, Hq, _, L, _, D = sizes
        lines.append(
            f"| {str(dtype)[6:]} ({B}, {Hq}, {L}, {D}) "
            f"| {ratio(times['torch forward'], times['ours forward'])} "
            f"| {ratio(times['torch both'], times['ours both'])} "
            f"| {shares[0]:.0%}, {shares[1]:.0%} |"
        )
        print(lines[-1], flush=True)
    return lines


def options_table(seconds: float) -> list[str]:
    """The time of each option over the plain causal one's in the same round."""
    lines = ["| option | float32 forward | and backward | bfloat16 forward | and backward |"]
    lines.append("|---|--:|--:|--:|--:|")
    cells: dict[str, list[str]] = {}
    for dtype in (FLOAT, BF16):
        qkv = inputs(dtype, 2, 12, 12, 1024, 1024, 64)
        upstream = torch.randn_like(qkv[0])
        mask = torch.randn(1, 12, 1024, 1024).to(dtype)
        options: dict[str, dict[str, Any]] = {
            "plain": {},
            "dropout 0.1": {"dropout_p": 0.1},
            "softcap": {"softcap": 30.0},
            "ALiBi": {"alibi_slopes": torch.rand(12)},
            "sinks": {"sinks": torch.randn(12)},
            "window 256": {"window": (256, 0)},
            "four documents": {"cu_seqlens_q": torch.tensor([0, 300, 500, 800, 1024])},
            "additive mask (1, H, L, S)": {"attn_mask": mask},
            "its gradient, too": {"attn_mask": mask.clone().requires_grad_()},
        }
        calls = {}
        for name, option in options.items():
            calls[f"{name} forward"] = forward(Ours, qkv, is_causal=True, **option)
            of = [*qkv, *(x for x in option.values() if isinstance(x, Tensor) and x.requires_grad)]

            calls[f"{name} both"] = both(Ours, qkv, upstream, of, is_causal=True, **option)
        calls["full forward"] = forward(Ours, qkv)
        calls["full both"] = both(Ours, qkv, upstream)
        times = interleaved(calls, 2 * seconds)
        for name in (*options, "full"):
            cells.setdefault(name, []).extend(
                ratio(times[f"{name} {which}"], times[f"plain {which}"])
                for which in ("forward", "both")
            )
    del cells["plain"]
    return lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]


def window_table(seconds: float) -> list[str]:
    """A window of 256 keys in 8192, causal: how much faster than without it."""
    lines = ["| (1, 8, 8192, 64), causal ÷ window 256 | forward | forward + backward |"]
    lines.append("|---|--:|--:|")
    for dtype in (FLOAT, BF16):
        qkv = inputs(dtype, 1, 8, 8, 8192, 8192, 64)
        upstream = torch.randn_like(qkv[0])
        calls = {}
        for name, option in (("causal", {}), ("window", {"window": (256, 0)})):
            calls[f"{name} forward"] = forward(Ours, qkv, is_causal=True, **option)
            calls[f"{name} both"] = both(Ours, qkv, upstream, is_causal=True, **option)
        times = interleaved(calls, seconds, least=3)
        cells = [ratio(times[f"causal {x}"], times[f"window {x}"]) for x in ("forward", "both")]
        lines.append(f"| {str(dtype)[6:]} | {cells[0]} | {cells[1]} |")
    return lines


def decoding_table(seconds: float) -> list[str]:
    """One query on 8192 keys, 32 heads on 8: against torch, and against the memory's rate."""
    lines = [
        "| 32 query heads, 8 of keys, S = 8192, D = 128 | torch ÷ ours | ms | of the read rate |"
    ]
    lines.append("|---|--:|--:|--:|")
    floor = MemoryFloor(1 << 28)
    for dtype in (FLOAT, BF16, HALF):
        qkv = inputs(dtype, 1, 32, 8, 1, 8192, 128)
        # Before and after, not between: its threads stay awake, and would take a share.
        read = [floor()[0] for _ in range(5)]
        time.sleep(0.5)
        calls = {
            "ours": forward(Ours, qkv, enable_gqa=True),
            "torch": forward(Torch, qkv, enable_gqa=True),
        }
        times = interleaved(calls, seconds)
        read += [floor()[0] for _ in range(5)]
        ours = statistics.median(times["ours"])
        rate = (1 << 28) / statistics.median(read)
        share = 2 * qkv[1].numel() * dtype.itemsize / ours / rate
        lines.append(
            f"| {str(dtype)[6:]} | {ratio(times['torch'], times['ours'])} | {1e3 * ours:.2f} "
            f"| {share:.0%} of {rate / 1e9:.1f} GB/s |"
        )
        print(lines[-1], flush=True)
    floor.close()
    return lines


def instruction_sets_table(seconds: float) -> list[str]:
    """torch's time over ours on each instruction set; torch has its own best."""
    sets = [isa for isa in native.isas() if isa != "scalar"]
    lines = ["| (2, 12, 1024, 64) causal | forward | forward + backward |", "|---|--:|--:|"]
    before = native.isa()
    for dtype in (FLOAT, BF16):
        for isa in sets:
            native.extension.set_isa(isa)  # type: ignore[union-attr]
            times = interleaved(
                passes(dtype, (2, 12, 12, 1024, 1024, 64), is_causal=True), seconds / 2
            )
            cells = [ratio(times[f"torch {x}"], times[f"ours {x}"]) for x in ("forward", "both")]
            lines.append(f"| {str(dtype)[6:]}, {isa} | {cells[0]} | {cells[1]} |")
    native.extension.set_isa(before)  # type: ignore[union-attr]
    return lines


Rates = dict[str, dict[int, float]]  # FLOP/s by line and length


def lengths(dtype: torch.dtype, seconds: float) -> Rates:
    found: Rates = {}
    for S in LENGTHS:
        sizes = (1, 32768 // S, 32768 // S, S, S, 64)
        times = interleaved(passes(dtype, sizes, is_causal=True), seconds, least=3)
        found.setdefault("multiply-adds", {})[S] = multiply_adds(dtype)
        for name, measured in times.items():
            work = operations(sizes) * (3.5 if name.endswith("both") else 1)
            found.setdefault(name, {})[S] = work / statistics.median(measured)
        print(dtype, S, {k: f"{v[S] / 1e9:.0f}" for k, v in found.items()}, flush=True)
    return found


def draw(found: dict[str, Rates], where: dict[str, Any], path: Path) -> None:
    figure_class = require("matplotlib.figure").Figure
    figure = figure_class(figsize=(9, 4), layout="constrained")
    for axes, (dtype, rates) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for name, row in rates.items():
            ours, peak = name.startswith("ours"), name == "multiply-adds"
            axes.plot(
                list(row), [x / 1e9 for x in row.values()],
                ":" if peak else "o--" if name.endswith("both") else "o-",
                color="black" if peak else "#2a7f3f" if ours else "#c44e52",
                label=name.replace("both", "forward + backward"),
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{dtype}, causal, D = 64", fontsize=10)
        axes.set_xlabel("L = S (heads x S = 32768)")
        axes.set_ylabel("GFLOP/s of the allowed pairs (median)")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def lengths_table(found: dict[str, Rates]) -> list[str]:
    names = [(dtype, name) for dtype, rates in found.items() for name in rates]
    lines = ["| GFLOP/s at L = S | " + " | ".join(f"{d} {n}" for d, n in names) + " |"]
    lines.append("|--:|" + "--:|" * len(names))
    for S in LENGTHS:
        cells = [f"{found[dtype][name][S] / 1e9:.0f}" for dtype, name in names]
        lines.append(f"| {S} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_scaling", description=__doc__
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="for each comparison (6)")
    seconds = parser.parse_args().seconds
    require("matplotlib.figure")  # now rather than after the measurement
    where = machine()
    torch.manual_seed(0)
    tables = {
        "Decoding": decoding_table(seconds),
        "torch's time ÷ fastgpt's": shapes_table(seconds),
        "Options: time ÷ the plain causal call's, (2, 12, 1024, 64)": options_table(seconds),
        "A window": window_table(seconds),
        "Instruction sets: torch's time ÷ fastgpt's": instruction_sets_table(seconds),
    }
    found = {str(dtype)[6:]: lengths(dtype, seconds / 3) for dtype in (FLOAT, BF16)}
    text = [
        "# Attention: its speed, what its options cost, and its rate against length\n",
        "Written by `python -m benchmarks.attention_scaling`: interleaved rounds, medians "
        "[quartiles]; (B, H, L = S, D).\n",
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}, "
        f"commit {where['commit']}.\n",
    ]
    for title, table in tables.items():
        text += [f"## {title}\n", *table, ""]
    text += ["## Rate against length\n", "![rate against length](attention.png)\n"]
    text += [*lengths_table(found), ""]
    write_atomically(DOCS / "attention.md", lambda path: path.write_text("\n".join(text)))
    write_atomically(DOCS / "attention.png", lambda path: draw(found, where, path))


if __name__ == "__main__":
    main()
