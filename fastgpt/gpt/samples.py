"""What the model writes at each evaluation, from the same prompt: the lines of samples.jsonl."""

from pathlib import Path

import torch

from .data import Dataset
from .history import HistoryFile
from .model import GPT

PROMPT = 8  # tokens, the first of the held-out text: those are in every vocabulary
TEMPERATURE = 0.8


class Samples:
    """Continues the held-out text of `data` by `tokens` tokens, drawn alike each time; 0: never."""

    def __init__(self, folder: Path, data: Dataset, tokens: int) -> None:
        self.history = HistoryFile(folder / "samples.jsonl")
        self.tokenizer, self.tokens = data.tokenizer, tokens
        self.prompt = torch.tensor([[int(token) for token in data.val[:PROMPT]]])  # (1, T)

    def start(self, last_step: int | None = None) -> None:
        """Begin a new file, or continue the one in the folder after `last_step`."""
        self.history.start(last_step)

    def write(self, model: GPT, step: int) -> None:
        """Add what the model writes now. Leaves torch's random numbers as they were."""
        if not self.tokens:
            return
        from .sample import stream_tokens  # which imports what imports this

        device = model.lm_head.weight.device
        generator = torch.Generator(device).manual_seed(0)
        drawn = stream_tokens(
            model, self.prompt.to(device), self.tokens, temperature=TEMPERATURE, generator=generator
        )
        text = self.tokenizer.decode([int(token) for token in drawn])
        prompt = self.tokenizer.decode(self.prompt[0].tolist())
        self.history.append({"step": step, "prompt": prompt, "text": text})
