"""Tokens per second of the reference GPT, with and without its cache, and with torch's attention.

python -m benchmarks.generation --preset demo --dtype bfloat16

Greedy text of a model with random weights, as long as its context. The variants take turns.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.report import machine
from benchmarks.scaling import interleaved
from fastgpt import explain, scaled_dot_product_attention
from fastgpt.gpt import GPT, PRESETS
from fastgpt.gpt.model import attention_function
from fastgpt.gpt.sample import generate


@dataclass(frozen=True)
class Variant:
    name: str
    attention: str  # of attention_function
    use_cache: bool


OURS = Variant("cache", "fused", True)
VARIANTS = (
    OURS,
    Variant("cache, torch's attention", "torch", True),
    Variant("no cache", "fused", False),
    Variant("no cache, torch's attention", "torch", False),
)


def measure(
    model: GPT, prompts: list[Tensor], tokens: int, seconds: float
) -> tuple[dict[Variant, list[float]], dict[Variant, float]]:
    """Seconds of each round by variant, and the share of the tokens that are those of OURS."""
    texts: dict[Variant, Tensor] = {}

    def writing(variant: Variant) -> Callable[[], None]:
        def write() -> None:
            model.use_attention(attention_function(variant.attention))
            text = generate(model, prompts, tokens, temperature=0, use_cache=variant.use_cache)
            texts[variant] = torch.stack([each[-tokens:] for each in text]).cpu()

        return write

    calls = {variant.name: writing(variant) for variant in VARIANTS}
    by_name = interleaved(calls, seconds)
    same = {v: (texts[v] == texts[OURS]).float().mean().item() for v in VARIANTS}
    return {variant: by_name[variant.name] for variant in VARIANTS}, same


def table(times: dict[Variant, list[float]], same: dict[Variant, float], tokens: int) -> list[str]:
    """Rates, and the time over that of OURS in the same round: medians [quartiles]."""
    lines = ["| | tokens/s | time ÷ ours | same tokens |", "|---|--:|--:|--:|"]
    for variant, measured in times.items():
        rates = [tokens / t for t in measured]
        ratios = [a / b for a, b in zip(measured, times[OURS], strict=True)]
        lines.append(
            f"| {variant.name} | {_quartiles(rates, ',.0f')} | {_quartiles(ratios, '.2f')} | "
            f"{same[variant]:.0%} |"
        )
    return lines


def _quartiles(values: Sequence[float], style: str) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:{style}} [{low:{style}}, {high:{style}}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences at once (1)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the longest prompt (16)")
    parser.add_argument(
        "--ragged", action="store_true", help="prompts of different lengths, not all of --prompt"
    )
    parser.add_argument("--tokens", type=int, help="to write (what fits the context)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for all rounds together (30)")
    options = parser.parse_args(arguments)
    config = PRESETS[options.preset]
    tokens = options.tokens or config.block_size - options.prompt + 1
    if options.prompt < 1 or tokens < 1:
        parser.error(f"--prompt must be in 1 ... {config.block_size}, the context, and tokens >= 1")
    torch.manual_seed(0)
    model = GPT(config).to(options.device, getattr(torch, options.dtype)).eval()
    lengths = [
        1 + (options.prompt - 1) * (b + 1) // options.batch_size
        if options.ragged
        else options.prompt
        for b in range(options.batch_size)
    ]
    prompts = [torch.randint(config.vocab_size, (n,), device=options.device) for n in lengths]
    where = machine()
    step = model.new_cache(options.batch_size).keys[0, :, :, :tokens]
    runs_on = explain(scaled_dot_product_attention, step[:, :, :1], step, step).backend
    print(
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}, "
        f"commit {where['commit']}\n"
        f"{options.preset}, {options.dtype}, on {options.device}: {options.batch_size} prompts of "
        f"{min(lengths)} to {max(lengths)} tokens, {tokens} more of each; "
        f"our attention is {runs_on}\n"
    )
    times, same = measure(model, prompts, tokens, options.seconds)
    print("\n".join(table(times, same, tokens * options.batch_size)))
    print(f"\n{len(times[OURS])} rounds")


if __name__ == "__main__":
    main()
