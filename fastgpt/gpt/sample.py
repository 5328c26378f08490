"""Write text with a trained GPT: `python -m fastgpt.gpt.sample --run runs/x --prompt "def "`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import load_checkpoint, restore_model
from .config import GPTConfig
from .errors import UsageError, run_command
from .model import GPT
from .tokenizer import StreamDecoder, Tokenizer
from .train import load_tokenizer, pick_device


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution (B, V) to draw from, given logits (B, V); the filters apply in this order.

    temperature: divides the logits; 0 puts all on the largest (the first, if several are).
    top_k: only the k most likely tokens remain.
    top_p: only the most likely tokens that together just reach p remain (Holtzman et al. 2020).
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    logits, order = (logits.float() / temperature).sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        logits[:, top_k:] = float("-inf")
    prob = logits.softmax(1)
    if top_p is not None:
        before = prob.cumsum(1) - prob  # what the more likely tokens have; 0 for the first
        prob = prob.masked_fill(before >= top_p, 0)
        prob = prob / prob.sum(1, keepdim=True)
    return torch.zeros_like(prob).scatter(1, order, prob)


@torch.no_grad()
def stream_tokens(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens that continue `idx` (B, T) int64, T >= 1, one (B,) at a time.

    The model sees the last block_size tokens, in eval mode; its mode is as before afterwards. Draws
    from `generator`, on the model's device, or from torch's own. Raises UsageError (a ValueError)
    for settings out of range.
    """
    if idx.shape[1] == 0:
        raise UsageError("a continuation needs at least one token to continue")
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not temperature >= 0:
        raise UsageError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p must be in (0, 1], got {top_p}")
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            features = model.features(idx[:, -model.config.block_size :])  # (B, T, C)
            logits = model.lm_head(features[:, -1])  # (B, V), of the last position only
            prob = next_token_probabilities(logits, temperature, top_k, top_p)
            token = torch.multinomial(prob, 1, generator=generator)  # (B, 1)
            idx = torch.cat([idx, token], dim=1)
            yield token[:, 0]
    finally:
        model.train(training)


def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`idx` (B, T) with its continuation, (B, T + max_new_tokens). See `stream_tokens`."""
    tokens = stream_tokens(
        model, idx, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        generator=generator,
    )  # fmt: skip
    return torch.cat([idx, *(token[:, None] for token in tokens)], dim=1)


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece; an empty prompt stands for a line break.

    The same seed gives the same text. Settings as in `stream_tokens`.
    """
    device = model.lm_head.weight.device
    ids = tokenizer.encode([prompt or "\n"])[0].tolist()
    decoder = StreamDecoder(tokenizer)
    for token in stream_tokens(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
    ):
        yield decoder.push(int(token))
    yield decoder.finish()


def load_run(
    run: Path, checkpoint: str = "latest", device: torch.device | str = "cpu"
) -> tuple[GPT, Tokenizer]:
    """The model of a run folder, in eval mode, and its tokeniser.

    `checkpoint` is "latest" or "best". Raises CheckpointError if something is missing or damaged.
    """
    tokenizer: Tokenizer = load_tokenizer(run)
    path = run / f"{checkpoint}.safetensors"
    tensors, saved = load_checkpoint(path, prefix="model/")
    model = GPT(GPTConfig(**saved["model"]))
    restore_model(path, model, tensors)
    return model.to(device).eval(), tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.gpt.sample", description="Write text with a trained GPT."
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="how many to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="default: 0.8; 0 is greedy")
    parser.add_argument("--top-k", type=int, help="draw from the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest that reach p together")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_run(options.run, options.checkpoint, pick_device(options.device))
    text = stream_text(
        model, tokenizer, options.prompt, options.tokens, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p, seed=options.seed,
    )  # fmt: skip
    print_stream(options.prompt, text)
    return 0


def print_stream(prompt: str, text: Iterator[str]) -> None:
    """Print the prompt and then each piece of the text as it comes."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # what the terminal's encoding can't show is a "?"
    print(prompt, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_command(main)
