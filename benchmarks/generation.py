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


@dataclass(frozen=True)
class Workload:
    """Prompts of random tokens, and how many to write of each."""

    preset: str = "demo"
    batch_size: int = 1
    prompt: int = 16  # tokens of the longest
    ragged: bool = False  # from a few tokens to `prompt`, not all of that length
    tokens: int | None = None  # None: what fits the context
    quick: bool = True  # measured unless others are asked for

    @property
    def name(self) -> str:
        lengths = "ragged" if self.ragged else "equal"
        return f"generation-{self.preset}-{self.batch_size}-{lengths}"

    @property
    def new_tokens(self) -> int:
        """Of each sequence."""
        return self.tokens or PRESETS[self.preset].block_size - self.prompt + 1

    def prompts(self, device: torch.device | str = "cpu") -> list[Tensor]:
        B, vocab_size = self.batch_size, PRESETS[self.preset].vocab_size
        lengths = [
            1 + (self.prompt - 1) * (b + 1) // B if self.ragged else self.prompt for b in range(B)
        ]
        return [torch.randint(vocab_size, (length,), device=device) for length in lengths]


# `pytest benchmarks` measures these. Without a cache a GPT-2's text is a minute's work.
WORKLOADS = [
    Workload("demo"),
    Workload("demo", batch_size=8, ragged=True),
    Workload("gpt2", prompt=128, tokens=16, quick=False),
    Workload("gpt2", batch_size=8, prompt=128, ragged=True, tokens=16, quick=False),
]


def measure(
    model: GPT, prompts: list[Tensor], tokens: int, seconds: float, least: int = 5
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
    by_name = interleaved(calls, seconds, least)
    same = {v: (texts[v] == texts[OURS]).float().mean().item() for v in VARIANTS}
    return {variant: by_name[variant.name] for variant in VARIANTS}, same


def table(times: dict[Variant, list[float]], same: dict[Variant, float], tokens: int) -> list[str]:
    """Rates, and the time over that of OURS in the same round: medians [quartiles]."""
    lines = ["| | tokens/s | time ÷ ours | same tokens |", "|---|--:|--:|--:|"]
    for variant, measured in times.items():
        rates = [tokens / t for t in measured]
        ratios = [a / b for a, b in zip(measured, times[OURS], strict=True)]
        style = ",.0f" if min(rates) >= 100 else ".1f"
        lines.append(
            f"| {variant.name} | {_quartiles(rates, style)} | {_quartiles(ratios, '.2f')} | "
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
    workload = Workload(
        options.preset, options.batch_size, options.prompt, options.ragged, options.tokens
    )
    tokens = workload.new_tokens
    if options.prompt < 1 or tokens < 1:
        block_size = PRESETS[options.preset].block_size
        parser.error(f"--prompt must be in 1 ... {block_size}, the context, and tokens >= 1")
    torch.manual_seed(0)
    model = GPT(PRESETS[options.preset]).to(options.device, getattr(torch, options.dtype)).eval()
    prompts = workload.prompts(options.device)
    lengths = [len(prompt) for prompt in prompts]
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
