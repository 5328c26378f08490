"""A page about a run: `python -m fastgpt.gpt.report --run runs/x` writes runs/x/report.html.

One HTML file that needs no other: the plots are in it, light and dark ones, and it loads nothing.
It can be made while the run goes on, and says what the run does not have (yet).
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.files import atomic_path

from .about import kernels, read_about
from .charts import some
from .config import PRESETS, GPTConfig, TrainConfig
from .curves import curves
from .device import pick_device
from .errors import CheckpointError, UsageError, run_command
from .folder import load_config, load_tokenizer
from .history import Record, read_history
from .metrics import Row, read_metrics
from .page import document, figures, missing, table, text
from .panels import panels, short

SAMPLES = 12  # are shown, of as many as there are


@dataclass(frozen=True)
class Run:
    """What a run folder holds, as far as the report tells it."""

    folder: Path
    config: TrainConfig
    vocab_size: int
    about: Record | None
    rows: list[Row]
    diagnostics: list[Record]
    samples: list[Record]


def read_run(folder: Path) -> Run:
    """Read a run folder; what is not there yet is empty.

    Raises CheckpointError if it is no run's folder, or if a file of it is damaged.
    """
    config = load_config(folder)
    metrics = folder / "metrics.csv"
    try:
        rows = read_metrics(metrics) if metrics.exists() else []
    except ValueError as error:
        raise CheckpointError(f"{metrics}: damaged ({error})") from error
    return Run(
        folder=folder,
        config=config,
        vocab_size=load_tokenizer(folder).vocab_size,
        about=read_about(folder / "about.json"),
        rows=rows,
        diagnostics=read_history(folder / "diagnostics.jsonl"),
        samples=read_history(folder / "samples.jsonl"),
    )


def page(run: Run) -> str:
    """The report as HTML."""
    name = run.folder.resolve().name
    sections = (
        ("Loss and speed", _curves(run)),
        ("Inside the model", _diagnostics(run)),
        ("Samples", _samples(run)),
        ("Kernels", _kernels(run)),
        ("Settings", _settings(run)),
    )
    top = f"<p>{_status(run)}</p>{_numbers(run)}"
    return document(name, f"{name}: a run of fastgpt", top, sections)


def _status(run: Run) -> str:
    if not run.rows:
        return "No step is recorded yet: the run has just begun, or was stopped at once."
    done, steps = run.rows[-1].step, run.config.steps
    if done >= steps:
        return f"Finished: all of its {steps:,} steps are done."
    return (
        f"At step {done:,} of {steps:,}: still running, or stopped before its end. "
        "Make this page again to see more."
    )


def _numbers(run: Run) -> str:
    about, rows = run.about or {}, run.rows
    val = [row.val_loss for row in rows if row.val_loss is not None]
    train = [row.train_loss for row in rows if row.train_loss is not None]
    speed = [row.tokens_per_s for row in rows if row.tokens_per_s is not None]
    entries: list[tuple[str, str]] = []
    if "parameters" in about:
        entries.append(("parameters", f"{about['parameters']:,}"))
    if rows:
        entries.append(("tokens trained on", f"{rows[-1].tokens:,}"))
    if val:
        entries.append(("validation loss", f"{val[-1]:.4f}"))
        entries.append(("lowest validation loss", f"{min(val):.4f}"))
        entries.append(("perplexity", f"{_exp(val[-1]):,.1f}"))
    if about.get("bigram_loss") is not None:
        entries.append(("bigram model's loss", f"{about['bigram_loss']:.4f}"))
    entries.append(("ln(vocabulary)", f"{math.log(run.vocab_size):.4f}"))
    if train:
        entries.append(("training loss", f"{train[-1]:.4f}"))
    if speed:
        middle = sorted(speed)[len(speed) // 2]
        entries.append(("tokens per second (median)", f"{middle:,.0f}"))
    if rows:
        entries.append(("time in training", _duration(rows[-1].seconds)))
    items = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in entries)
    return f'<dl class="numbers">{items}</dl>'


def _curves(run: Run) -> str:
    bigram = (run.about or {}).get("bigram_loss")
    charts = curves(run.rows, run.vocab_size, bigram)
    if not charts:
        return missing("metrics.csv has no rows yet, so there are no curves.")
    return figures(charts)


def _diagnostics(run: Run) -> str:
    if not run.diagnostics:
        if run.config.diagnostics:
            return missing("Nothing was looked at yet: diagnostics.jsonl has no records.")
        return missing(
            "This run has no diagnostics. Train with <code>--diagnostics 100</code>, or "
            "resume with it, to see what the layers do at every 100th step."
        )
    return _warnings(run.diagnostics) + figures(panels(run.diagnostics)) + _layers(run.diagnostics)


def _warnings(records: Sequence[Record]) -> str:
    last = records[-1]
    now = {finding["text"].partition(":")[0]: finding["text"] for finding in last["findings"]}
    past: dict[str, int] = {}
    for record in records:
        for finding in record["findings"]:
            past[finding["text"].partition(":")[0]] = record["step"]
    past = {heading: step for heading, step in past.items() if heading not in now}
    lines = [
        f"<li><strong>{text(heading)}</strong>{text(line[len(heading) :])}</li>"
        for heading, line in now.items()
    ]
    lines += [
        f"<li>{text(heading)}: until step {step:,}, and not at the last look.</li>"
        for heading, step in past.items()
    ]
    step = f"step {last['step']:,}"
    if not lines:
        return (
            f'<p class="good">No layer was dead, saturated, vanishing or exploding at any of '
            f"{len(records):,} looks; the last was at {step}.</p>"
        )
    title = f"Warnings at {step}" if now else f"Warnings before {step}"
    return f'<div class="warnings"><h3>{title}</h3><ul>{"".join(lines)}</ul></div>'


def _layers(records: Sequence[Record]) -> str:
    """The numbers of the last look, for those who read tables rather than plots."""
    last = records[-1]
    heads = ["mean", "std", "dead", "saturated"]
    heads = [key for key in heads if any(key in seen for seen in last["activations"].values())]
    rows = [
        [short(name), *(_cell(key, seen) for key in heads)]
        for name, seen in last["activations"].items()
    ]
    layers = table("Outputs of layers", ["layer", *heads], rows)
    rows = []
    for name, seen in last["gradients"].items():
        ratio = last["updates"].get(name)
        shape = "x".join(map(str, seen["shape"]))
        shown = "" if ratio is None else f"{ratio:.2f}"
        rows.append([short(name), shape, _number(seen["norm"]), shown])
    heads = ["parameter", "shape", "gradient norm", "log10 of update / data"]
    parameters = table("Gradients and updates of parameters", heads, rows)
    return (
        f"<details><summary>The numbers at step {last['step']:,}</summary>"
        f'<div class="tables">{layers}{parameters}</div></details>'
    )


def _samples(run: Run) -> str:
    if not run.samples:
        return missing(
            "This run has no samples: samples.jsonl has none yet, or the run was made with "
            "<code>--sample-tokens 0</code> or an older fastgpt."
        )
    val = {row.step: row.val_loss for row in run.rows if row.val_loss is not None}
    shown = some(run.samples, SAMPLES)
    parts = []
    for sample in shown:
        step = sample["step"]
        loss = f", validation loss {val[step]:.3f}" if step in val else ""
        is_open = " open" if sample is shown[0] or sample is shown[-1] else ""
        parts.append(
            f"<details{is_open}><summary>Step {step:,}{loss}</summary>"
            f'<pre tabindex="0"><b>{text(str(sample.get("prompt", "")))}</b>'
            f"{text(str(sample.get('text', '')))}</pre></details>"
        )
    left = len(run.samples) - len(shown)
    note = f" {left:,} of {len(run.samples):,} are left out." if left else ""
    return (
        "<p>At each evaluation the model goes on with the same words (in bold) of held-out text."
        f"{note}</p>{''.join(parts)}"
    )


def _kernels(run: Run) -> str:
    about = run.about or {}
    if "kernels" in about:
        where = f"On {about.get('device', 'an unknown device')}, where the run was last started:"
        lines = about["kernels"]
    else:
        where = (
            "The run did not note its kernels (about.json is missing). Its shapes on this machine:"
        )
        lines = kernels(run.config, _shape(run), _device(run.config))
    items = "".join(f"<li><code>{text(line)}</code></li>" for line in lines)
    details = ""
    if "installation" in about:
        details = (
            "<details><summary>All that this installation could run</summary>"
            f'<pre class="wide" tabindex="0">{text(about["installation"])}</pre></details>'
        )
    return f"<p>{text(where)}</p><ul>{items}</ul>{details}"


def _settings(run: Run) -> str:
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    rows = []
    for name, value in asdict(run.config).items():
        changed = value != defaults[name]
        rows.append([name, _value(value), _value(defaults[name]) if changed else ""])
    corpus = ""
    if run.about is not None and "corpus" in run.about:
        corpus = (
            f"<p>Trained on {text(str(run.about['corpus']))}: {run.about['train_tokens']:,} "
            f"tokens, and {run.about['val_tokens']:,} held out.</p>"
        )
    model = [[name, _value(value)] for name, value in asdict(_shape(run)).items()]
    training = table("Training", ["setting", "value", "default, if changed"], rows)
    return f'{corpus}<div class="tables">{training}{table("Model", ["size", "value"], model)}</div>'


def _shape(run: Run) -> GPTConfig:
    if run.about is not None and "model" in run.about:
        return GPTConfig(**run.about["model"])
    return replace(
        PRESETS[run.config.preset],
        vocab_size=run.vocab_size,
        block_size=run.config.context,
        dropout=run.config.dropout,
    )


def _device(config: TrainConfig) -> torch.device:
    try:
        return pick_device(config.device)
    except UsageError:  # the run was made on a machine that has it
        return torch.device("cpu")


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ", ".join(map(_value, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _cell(key: str, seen: Record) -> str:
    if key not in seen:
        return ""
    share = key in ("dead", "saturated") and seen[key] is not None
    return f"{seen[key]:.1%}" if share else _number(seen[key])


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run, at its folder's report.html or at `out`; returns where."""
    path = out or folder / "report.html"
    html = page(read_run(folder))
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.gpt.report", description="Write an HTML page about a training run."
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in it)")
    options = parser.parse_args(arguments)
    print(write_report(options.run, options.out))
    return 0


if __name__ == "__main__":
    run_command(main)
