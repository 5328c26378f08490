"""Write text with a trained GPT: `python -m fastgpt.gpt.sample --run runs/x --prompt "def "`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cache import KeyValueCache
from .checkpoint import load_checkpoint, restore_model
from .config import GPTConfig
from .device import pick_device
from .errors import UsageError, run_command
from .folder import load_tokenizer
from .model import GPT
from .tokenizer import StreamDecoder, Tokenizer

Prompts = TypeVar("Prompts", Tensor, list[Tensor])  # (B, T), or B prompts, each (its length,)


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
    idx: Tensor | list[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the tokens that continue `idx`, one of each sequence (B,) at a time.

    The model sees the last block_size tokens, in eval mode; its mode is as before afterwards. Draws
    from `generator`, on the model's device, or from torch's own. Raises UsageError (a ValueError)
    for settings out of range.

    idx: (B, T) int64, T >= 1, or a list of B prompts (T,) of different lengths, each of which goes
        on as it would alone.
    use_cache: read each token once, and keep its keys and values, until the longest sequence has
        filled the context: from there on all positions change at every step. Without it every step
        reads the whole context, for the same text, up to rounding.
    """
    sequences = _sequences(idx)
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
    cache = model.new_cache(len(sequences)) if use_cache else None
    try:
        for _ in range(max_new_tokens):
            if max(map(len, sequences)) > model.config.block_size:
                cache = None
            logits = model.lm_head(_last_features(model, sequences, cache))  # (B, V)
            prob = next_token_probabilities(logits, temperature, top_k, top_p)
            token = torch.multinomial(prob, 1, generator=generator)  # (B, 1)
            sequences = [torch.cat(pair) for pair in zip(sequences, token, strict=True)]
            yield token[:, 0]
    finally:
        model.train(training)


def _sequences(idx: Tensor | list[Tensor]) -> list[Tensor]:
    if isinstance(idx, Tensor) and idx.dim() != 2:
        raise UsageError(f"idx must be (B, T), or a list of (T,), got shape {tuple(idx.shape)}")
    sequences = list(idx)
    for i, sequence in enumerate(sequences):
        if sequence.dim() != 1:
            raise UsageError(f"prompt {i} must be (T,), got shape {tuple(sequence.shape)}")
        if len(sequence) == 0:
            raise UsageError(f"a continuation needs a token to continue, and prompt {i} has none")
    if not sequences:
        raise UsageError("at least one prompt is needed, got none")
    return sequences


def _last_features(model: GPT, sequences: list[Tensor], cache: KeyValueCache | None) -> Tensor:
    """The features (B, C) of each sequence's last token; reads only what the cache has not."""
    if cache is None:
        unread = [sequence[-model.config.block_size :] for sequence in sequences]
    else:
        unread = [s[length:] for s, length in zip(sequences, cache.lengths, strict=True)]
    # Padding is at the end, where causality hides it from the tokens; what the cache holds of it
    # is cut off, and overwritten by the next tokens.
    features = model.features(pad_sequence(unread, batch_first=True), cache)  # (B, T, C)
    if cache is not None:
        cache.truncate([len(sequence) for sequence in sequences])
    last = torch.tensor([len(tokens) - 1 for tokens in unread], device=features.device)
    return features[torch.arange(len(unread), device=features.device), last]


def generate(
    model: GPT,
    idx: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Prompts:
    """`idx` with its continuation: (B, T + max_new_tokens) for (B, T), and a list for a list.

    See `stream_tokens`.
    """
    tokens = stream_tokens(
        model, idx, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        generator=generator, use_cache=use_cache,
    )  # fmt: skip
    steps: list[Tensor] = [token[:, None] for token in tokens]  # (B, 1) each
    if isinstance(idx, list):
        return [torch.cat(parts) for parts in zip(idx, *steps, strict=True)]
    return torch.cat([idx, *steps], dim=1)


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
