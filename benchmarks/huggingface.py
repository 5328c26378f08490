"""A training step of Hugging Face models, patched and not: its peak memory, and its time.

python -m benchmarks.huggingface
python -m benchmarks.huggingface --seconds 60    the times, too; the variants take turns

Random weights; forward and backward, without the optimizer.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import transformers

from benchmarks.attention_scaling import ratio
from benchmarks.memory import peak_bytes
from benchmarks.report import machine
from benchmarks.scaling import interleaved
from fastgpt.integrations.transformers import patched

VARIANTS: dict[str, Callable[[Any], Any]] = {
    "patched": patched,
    "patched, keep_logits": lambda model: patched(model, keep_logits=True),
    "unpatched": nullcontext,
}


def models() -> dict[str, Callable[[], Any]]:
    """Names with makers: GPT-2 of 124M, and a shallow model with the vocabulary of Llama 3."""
    llama = {
        "vocab_size": 128256, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return {
        "GPT-2 124M": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        "Llama, 4 x 512, 128256 classes": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**llama)
        ),
    }


def rows(tokens: int, seconds: float) -> Iterator[str]:
    yield "| | MiB beyond weights and gradients | |"
    yield "|---|--:|---|"
    for name, make in models().items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = make().to(dtype)
            ids = torch.randint(0, model.config.vocab_size, (1, tokens))
            for x in model.parameters():
                x.grad = torch.zeros_like(x)
            calls = {variant: stepping(model, ids, variant) for variant in VARIANTS}
            times = interleaved(calls, seconds) if seconds else {}
            for variant, call in calls.items():
                cell = f"{ratio(times[variant], times['patched'])} of the time" if times else ""
                yield (
                    f"| {name}, {str(dtype).removeprefix('torch.')}: {variant} | "
                    f"{peak_bytes(call) / 2**20:.0f} | {cell} |"
                )


def stepping(model: Any, ids: torch.Tensor, variant: str) -> Callable[[], None]:
    def step() -> None:
        with VARIANTS[variant](model):
            model(ids, labels=ids, use_cache=False).loss.backward()

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.huggingface", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each model's rounds (none)")
    options = parser.parse_args(arguments)
    where = machine()
    print(
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}, "
        f"transformers {transformers.__version__}, commit {where['commit']}; 1 x {options.tokens}\n"
    )
    for row in rows(options.tokens, options.seconds):
        print(row, flush=True)


if __name__ == "__main__":
    main()
