"""Write text with a trained GPT: `python -m fastgpt.gpt.sample --run runs/x --prompt "def "`.

`--pretrained DIR` in place of `--run` takes the folder of a GPT-2 in Hugging Face's format.
"""

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cache import KeyValueCache
from .checkpoint import load_checkpoint, restore_model
from .config import GPTConfig
from .device import pick_device
from .errors import CheckpointError, UsageError, run_command
from .folder import load_tokenizer
from .model import GPT
from .pretrained import read_stop_tokens, read_tokenizer
from .tokenizer import StreamDecoder, Tokenizer

Prompts = TypeVar("Prompts", Tensor, list[Tensor])  # (B, T), or B prompts, each (its length,)
Generators = (
    torch.Generator | Sequence[torch.Generator] | None
)  # one for all, one for each, torch's


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution (B, V) to draw from, given logits (B, V); the filters apply in this order.

    temperature: divides the logits; 0 puts all on the largest (the first, if several are).
    top_k: only the k most likely tokens remain; of equal ones, any.
    top_p: only the most likely tokens that together just reach p remain (Holtzman et al. 2020).
    """
    prob, tokens = _candidates(logits, temperature, top_k, top_p)
    return prob if tokens is None else prob.new_zeros(logits.shape).scatter(1, tokens, prob)


def _candidates(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, K), and the tokens (B, K) that have them; None: all V in their order."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        largest = logits.argmax(1, keepdim=True)
        return torch.ones_like(largest, dtype=logits.dtype), largest
    tokens = None
    if top_k is not None and top_k < logits.shape[1]:
        logits, tokens = logits.topk(
            top_k
        )  # in descending order, for a fraction of what a sort costs
    elif top_p is not None:
        logits, tokens = logits.sort(dim=1, descending=True, stable=True)
    # From the largest, or a very low temperature would make inf - inf of it.
    prob = ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)
    if top_p is not None and tokens is not None:
        before = prob.cumsum(1) - prob  # what the more likely tokens have; 0 for the first
        prob = prob.masked_fill(before >= top_p, 0)
        prob = prob / prob.sum(1, keepdim=True)
    return prob, tokens


def _draw(prob: Tensor, tokens: Tensor | None, generators: Generators) -> Tensor:
    """One of the tokens (B, K) for each row, (B, 1)."""
    if prob.shape[1] == 1:
        column = torch.zeros_like(prob, dtype=torch.int64)
    elif isinstance(generators, Sequence):
        rows = zip(prob, generators, strict=True)
        column = torch.stack([torch.multinomial(row, 1, generator=own) for row, own in rows])
    else:
        column = torch.multinomial(prob, 1, generator=generators)
    return column if tokens is None else tokens.gather(1, column)


@torch.no_grad()
def stream_tokens(
    model: GPT,
    idx: Tensor | list[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Generators = None,
    stop: Collection[int] = (),
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the tokens that continue `idx`, one of each sequence (B,) at a time.

    The model sees the last block_size tokens, in eval mode; its mode is as before afterwards.
    Raises UsageError (a ValueError) for settings out of range; for those of the filters see
    `next_token_probabilities`.

    idx: (B, T) int64, T >= 1, or a list of B prompts (T,) of different lengths, each of which goes
        on as it would alone.
    generator: what the draws come from, on the model's device; None is torch's own. One generator
        draws for all sequences together, so what one gets depends on the others. A list of B gives
        each its own, and then each gets what it would get alone.
    stop: tokens that end a sequence. It repeats the one that ended it while others go on, is not
        computed any more, and when all have ended the tokens do.
    use_cache: read each token once, and keep its keys and values, until the longest sequence has
        filled the context: from there on all positions change at every step. Without it every step
        reads the whole context, for the same text, up to rounding.
    """
    sequences = _sequences(idx)
    _check_settings(len(sequences), max_new_tokens, temperature, top_k, top_p, generator)
    training = model.training
    model.eval()
    try:
        texts = _Texts(model, sequences, max_new_tokens if use_cache else None)
        going = list(range(len(sequences)))  # those that have not ended
        latest = torch.empty(0)  # one token of each, also of those that have ended
        for _ in range(max_new_tokens):
            logits = model.lm_head(texts.last_features())  # (B that go on, V)
            own = generator
            if isinstance(generator, Sequence):
                own = [generator[b] for b in going]
            token = _draw(*_candidates(logits, temperature, top_k, top_p), own)  # (B, 1)
            if len(going) == len(sequences):
                latest = token[:, 0]
            else:
                latest = latest.clone()  # the reader may have kept the one before
                latest[going] = token[:, 0]
            yield latest
            if stop:
                rows = [i for i, drawn in enumerate(token[:, 0].tolist()) if drawn not in stop]
                if not rows:
                    return
                if len(rows) < len(going):
                    going, token = [going[i] for i in rows], token[rows]
                    texts.keep(rows)
            texts.append(token)
    finally:
        model.train(training)


class _Texts:
    """B texts that grow token by token, and what the model makes of the last of each.

    With a cache, for up to `max_new_tokens`, only what is new is read. Padding is at the end, where
    causality hides it from the tokens; what the cache holds of it is cut off, and overwritten.
    """

    def __init__(self, model: GPT, prompts: list[Tensor], max_new_tokens: int | None) -> None:
        self.model, self.block_size = model, model.config.block_size
        self.contexts = [prompt[-self.block_size :] for prompt in prompts]
        self.appended: list[Tensor] = []  # (B, 1) each, not yet in the contexts
        self.unread = self.contexts
        self.cache: KeyValueCache | None = None
        if max_new_tokens:
            room = max(map(len, self.contexts)) + max_new_tokens - 1  # the last is drawn, not read
            self.cache = model.new_cache(len(prompts), min(room, self.block_size))

    def last_features(self) -> Tensor:
        """Of each text's last token, (B, C)."""
        lengths = [len(tokens) for tokens in self.unread]
        features = self.model.features(pad_sequence(self.unread, batch_first=True), self.cache)
        T = features.shape[1]
        if min(lengths) == T:
            return features[:, -1]
        if self.cache is not None:
            read = zip(self.cache.lengths, lengths, strict=True)
            self.cache.truncate([end - T + length for end, length in read])
        last = torch.tensor(lengths, device=features.device) - 1
        return features[torch.arange(len(lengths), device=features.device), last]

    def append(self, token: Tensor) -> None:
        """Add a token (B, 1) to each."""
        self.appended.append(token)
        if self.cache is not None and max(self.cache.lengths) < self.block_size:
            self.unread = list(token)
        else:
            self.cache = None  # the contexts begin to move, and with them all positions change
            self.unread = self._up_to_date()

    def keep(self, rows: list[int]) -> None:
        """Forget all texts but these."""
        contexts = self._up_to_date()
        self.contexts = [contexts[i] for i in rows]
        if self.cache is not None:
            self.cache.keep(rows)

    def _up_to_date(self) -> list[Tensor]:
        if self.appended:
            pairs = zip(self.contexts, torch.cat(self.appended, dim=1), strict=True)
            self.contexts = [torch.cat(pair)[-self.block_size :] for pair in pairs]
            self.appended = []
        return self.contexts


def _check_settings(
    B: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: Generators,
) -> None:
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not temperature >= 0:
        raise UsageError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p must be in (0, 1], got {top_p}")
    if isinstance(generator, Sequence) and len(generator) != B:
        raise UsageError(f"{B} sequences need one generator or {B}, got {len(generator)}")


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


def generate(
    model: GPT,
    idx: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Generators = None,
    stop: Collection[int] = (),
    use_cache: bool = True,
) -> Prompts:
    """`idx` with its continuation: (B, T + max_new_tokens) for (B, T), and a list for a list.

    See `stream_tokens`. With tokens to stop at, a tensor is as wide as the longest text, and in a
    list each text ends with the token that ended it.
    """
    tokens = stream_tokens(
        model, idx, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        generator=generator, stop=stop, use_cache=use_cache,
    )  # fmt: skip
    steps: list[Tensor] = [token[:, None] for token in tokens]  # (B, 1) each
    if not isinstance(idx, list):
        return torch.cat([idx, *steps], dim=1)
    if not steps:
        return list(idx)
    texts = []
    for prompt, new in zip(idx, torch.cat(steps, dim=1), strict=True):
        end = next((i + 1 for i, t in enumerate(new.tolist()) if t in stop), None) if stop else None
        texts.append(torch.cat([prompt, new[:end]]))
    return texts


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
    stop: Collection[int] = (),
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece; an empty prompt stands for a line break.

    A piece never ends within a character. The same seed gives the same text, which ends before a
    token to stop at. Other settings as in `stream_tokens`.
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
        stop=stop,
    ):
        if int(token) not in stop:
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


def load_pretrained_text(
    directory: Path, device: torch.device | str = "cpu"
) -> tuple[GPT, Tokenizer, list[int]]:
    """The GPT-2 of a folder, in eval mode, its tokeniser, and the tokens that end a text.

    Raises CheckpointError if something is missing or damaged, or does not fit the rest.
    """
    tokenizer = read_tokenizer(directory)
    model = GPT.from_pretrained(directory, dropout=0.0, device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}, expected at least as many"
        )
    return model, tokenizer, read_stop_tokens(directory)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.gpt.sample", description="Write text with a trained GPT."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a training run")
    source.add_argument(
        "--pretrained",
        type=Path,
        help="folder of a GPT-2 in Hugging Face's format, with tokenizer.json",
    )
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="how many to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="default: 0.8; 0 is greedy")
    parser.add_argument("--top-k", type=int, help="draw from the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest that reach p together")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text")
    parser.add_argument(
        "--checkpoint", choices=("latest", "best"), help="which of the run (default: latest)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    stop: Collection[int] = ()
    if options.pretrained:
        if options.checkpoint:
            parser.error("--checkpoint is of a run: expected it with --run")
        model, tokenizer, stop = load_pretrained_text(options.pretrained, device)
    else:
        model, tokenizer = load_run(options.run, options.checkpoint or "latest", device)
    text = stream_text(
        model, tokenizer, options.prompt, options.tokens, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p, seed=options.seed, stop=stop,
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
