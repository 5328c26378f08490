"""The command line of training: an option for each setting."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .config import TrainConfig


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options given, and no others: `out`, `resume`, and fields of TrainConfig."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.gpt.train",
        description="Train a GPT on text.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<preset>-<time>)")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN",
        help="continue the run in this folder, or from this checkpoint in it",
    )  # fmt: skip
    for setting in fields(TrainConfig):
        keywords = dict(setting.metadata)
        if setting.default not in (None, False) or "type" not in keywords:
            shown = setting.default
            keywords["help"] += f" (default: {shown})" if shown is not False else ""
        if setting.default is False:
            keywords["action"] = argparse.BooleanOptionalAction
        elif "choices" not in keywords:
            keywords.setdefault("type", type(setting.default))
            keywords.setdefault("metavar", {int: "N", float: "X", str: "NAME"}[keywords["type"]])
        parser.add_argument("--" + setting.name.replace("_", "-"), **keywords)
    return parser.parse_args(arguments)
