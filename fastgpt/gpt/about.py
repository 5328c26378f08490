"""What a run is, beside its settings: the model, the text, the machine and its kernels."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastgpt

from .config import GPTConfig, TrainConfig
from .data import Dataset
from .folder import read_json


def about(
    config: TrainConfig,
    shape: GPTConfig,
    parameters: int,
    data: Dataset,
    device: torch.device,
    bigram: float | None,
) -> dict[str, Any]:
    """What about.json holds, so that a report made anywhere tells of the machine that trained."""
    return {
        "model": asdict(shape),
        "parameters": parameters,
        "corpus": str(data.corpus),
        "train_tokens": len(data.train),
        "val_tokens": len(data.val),
        "bigram_loss": bigram,
        "device": device_name(device),
        "installation": str(fastgpt.info()),
        "kernels": kernels(config, shape, device),
    }


def read_about(path: Path) -> dict[str, Any] | None:
    """What a run's about.json holds; None for a run from before there was one.

    Raises CheckpointError, naming the file, if it is damaged.
    """
    return read_json(path) if path.is_file() else None


def kernels(config: TrainConfig, shape: GPTConfig, device: torch.device) -> list[str]:
    """What `explain` says here of the loss and the attention of one of the run's training steps."""
    rows, head_dim = config.batch_size * config.context, shape.n_embd // shape.n_head
    bf16 = config.dtype == "bfloat16"

    def tensor(*sizes: int, half: bool) -> torch.Tensor:
        dtype = torch.bfloat16 if half else torch.float32
        return torch.empty(sizes, dtype=dtype, device=device, requires_grad=True)

    q = tensor(config.batch_size, shape.n_head, config.context, head_dim, half=bf16)
    targets = torch.empty(rows, dtype=torch.int64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        if config.loss == "linear_cross_entropy":
            x = tensor(rows, shape.n_embd, half=False)
            weight = tensor(shape.vocab_size, shape.n_embd, half=False)
            loss = str(fastgpt.explain(fastgpt.linear_cross_entropy, x, weight, targets))
        elif config.loss == "cross_entropy":
            logits = tensor(rows, shape.vocab_size, half=bf16)
            loss = str(fastgpt.explain(fastgpt.cross_entropy, logits, targets))
        else:
            loss = f"the loss is {config.loss!r}, in torch's operations"
        attention = fastgpt.explain(fastgpt.scaled_dot_product_attention, q, q, q, is_causal=True)
    return [loss, str(attention)]


def device_name(device: torch.device) -> str:
    """A device and what it is, as far as torch knows."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        isa = fastgpt.info().isa
        return f"cpu ({torch.get_num_threads()} threads" + (f", {isa})" if isa else ")")
    return str(device)
