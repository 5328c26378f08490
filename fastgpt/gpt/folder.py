"""A run's folder: the settings and the tokeniser in it, and the files it may be resumed from."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_path, remove_leftovers

from .config import TrainConfig
from .errors import CheckpointError, UsageError
from .tokenizer import from_json

LATEST, BEST = "latest.safetensors", "best.safetensors"
_FILES = (
    *(LATEST, BEST, "config.json", "tokenizer.json", "about.json", "metrics.csv", "loss.png"),
    *("samples.jsonl", "diagnostics.jsonl", "report.html"),
)


def load_config(run: Path) -> TrainConfig:
    """The settings of a run folder. Raises CheckpointError if there are none, or unknown ones."""
    path = run / "config.json"
    settings = read_json(path)
    if settings.get("loss") == "fused":  # its name in runs from before linear_cross_entropy
        settings["loss"] = "cross_entropy"
    known = {field.name for field in fields(TrainConfig)}
    if unknown := sorted(settings.keys() - known):
        raise CheckpointError(
            f"{path}: unknown setting {unknown[0]!r}; is the run of a newer fastgpt?"
        )
    try:
        return TrainConfig(**settings)
    except (UsageError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_tokenizer(run: Path) -> Any:
    """The tokeniser of a run folder. Raises CheckpointError if there is none."""
    return from_json(read_json(run / "tokenizer.json"))


def find_checkpoint(resume: Path) -> Path:
    """The checkpoint that `--resume` names: a file, or the latest one of a run folder."""
    return resume if resume.suffix == ".safetensors" else resume / LATEST


def remove_unfinished(run: Path) -> None:
    """Remove what a process that was killed while it wrote has left in a run folder."""
    for name in _FILES:
        remove_leftovers(run / name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, naming the file, if there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is {path.parent} the folder of a run?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
