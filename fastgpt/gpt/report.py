"""A page about a run: `python -m fastgpt.gpt.report --run runs/x` writes runs/x/report.html.

One HTML file that needs no other: the plots are in it, light and dark ones, and it loads nothing.
It can be made while the run goes on, and says what the run does not have (yet).
"""

import argparse
import base64
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Any

import torch

from fastgpt.files import atomic_path

from .about import kernels
from .charts import DARK, LIGHT, Chart, png, some
from .config import PRESETS, GPTConfig, TrainConfig
from .curves import curves
from .errors import CheckpointError, UsageError, run_command
from .history import Record, read_history
from .metrics import Row, read_metrics
from .panels import panels, short
from .train import _read_json, load_config, load_tokenizer, pick_device

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
    metrics, about = folder / "metrics.csv", folder / "about.json"
    try:
        rows = read_metrics(metrics) if metrics.exists() else []
    except ValueError as error:
        raise CheckpointError(f"{metrics}: damaged ({error})") from error
    return Run(
        folder=folder,
        config=config,
        vocab_size=load_tokenizer(folder).vocab_size,
        about=_read_json(about) if about.exists() else None,
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
    links = "".join(f'<li><a href="#{_id(t)}">{_text(t)}</a></li>' for t, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{_id(title)}"><h2 id="{_id(title)}">{_text(title)}</h2>'
        f"{content}</section>\n"
        for title, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a sample or a setting holds, nothing is fetched and nothing is run.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(name)}: a run of fastgpt</title>\n<style>{_STYLE}</style>\n</head>\n"
        "<body>\n"
        f"<header><h1>{_text(name)}</h1><p>{_status(run)}</p>{_numbers(run)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


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
    items = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in entries)
    return f'<dl class="numbers">{items}</dl>'


def _curves(run: Run) -> str:
    bigram = (run.about or {}).get("bigram_loss")
    charts = curves(run.rows, run.vocab_size, bigram)
    if not charts:
        return _missing("metrics.csv has no rows yet, so there are no curves.")
    return _figures(charts)


def _diagnostics(run: Run) -> str:
    if not run.diagnostics:
        if run.config.diagnostics:
            return _missing("Nothing was looked at yet: diagnostics.jsonl has no records.")
        return _missing(
            "This run has no diagnostics. Train with <code>--diagnostics 100</code>, or "
            "resume with it, to see what the layers do at every 100th step."
        )
    return _warnings(run.diagnostics) + _figures(panels(run.diagnostics)) + _layers(run.diagnostics)


def _warnings(records: Sequence[Record]) -> str:
    last = records[-1]
    now = {finding["text"].partition(":")[0]: finding["text"] for finding in last["findings"]}
    past: dict[str, int] = {}
    for record in records:
        for finding in record["findings"]:
            past[finding["text"].partition(":")[0]] = record["step"]
    past = {heading: step for heading, step in past.items() if heading not in now}
    lines = [
        f"<li><strong>{_text(heading)}</strong>{_text(text[len(heading) :])}</li>"
        for heading, text in now.items()
    ]
    lines += [
        f"<li>{_text(heading)}: until step {step:,}, and not at the last look.</li>"
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
    rows = []
    for name, seen in last["activations"].items():
        shares = (seen.get("dead"), seen.get("saturated"))
        cells = [_number(seen["mean"]), _number(seen["std"]), *map(_percent, shares)]
        rows.append([short(name), *cells])
    layers = _table("Outputs of layers", ["layer", "mean", "std", "dead", "saturated"], rows)
    rows = []
    for name, seen in last["gradients"].items():
        ratio = last["updates"].get(name)
        rows.append(
            [
                short(name), " x ".join(map(str, seen["shape"])), _number(seen["norm"]),
                "" if ratio is None else f"{ratio:.2f}",
            ]
        )  # fmt: skip
    heads = ["parameter", "shape", "gradient norm", "log10 of update / data"]
    parameters = _table("Gradients and updates of parameters", heads, rows)
    return (
        f"<details><summary>The numbers at step {last['step']:,}</summary>"
        f"{layers}{parameters}</details>"
    )


def _samples(run: Run) -> str:
    if not run.samples:
        return _missing(
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
            f'<pre tabindex="0"><b>{_text(str(sample.get("prompt", "")))}</b>'
            f"{_text(str(sample.get('text', '')))}</pre></details>"
        )
    left = len(run.samples) - len(shown)
    note = f" {left:,} of {len(run.samples):,} are left out." if left else ""
    return (
        f"<p>At each evaluation the model goes on with the same words (in bold) of held-out text."
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
    items = "".join(f"<li><code>{_text(line)}</code></li>" for line in lines)
    details = ""
    if "installation" in about:
        details = (
            "<details><summary>All that this installation could run</summary>"
            f'<pre class="wide" tabindex="0">{_text(about["installation"])}</pre></details>'
        )
    return f"<p>{_text(where)}</p><ul>{items}</ul>{details}"


def _settings(run: Run) -> str:
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    rows = []
    for name, value in asdict(run.config).items():
        changed = value != defaults[name]
        rows.append([name, _value(value), _value(defaults[name]) if changed else ""])
    text = ""
    if run.about is not None and "corpus" in run.about:
        text = (
            f"<p>Trained on {_text(str(run.about['corpus']))}: {run.about['train_tokens']:,} "
            f"tokens, and {run.about['val_tokens']:,} held out.</p>"
        )
    model = [[name, _value(value)] for name, value in asdict(_shape(run)).items()]
    return (
        text
        + _table("Training", ["setting", "value", "default, where it is another"], rows)
        + _table("Model", ["size", "value"], model)
    )


def _shape(run: Run) -> GPTConfig:
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


def _figures(charts: Iterable[Chart]) -> str:
    return f'<div class="figures">{"".join(map(_figure, charts))}</div>'


def _figure(chart: Chart) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(png(chart, theme)).decode()
        for theme in (LIGHT, DARK)
    )
    return (
        f"<figure><figcaption>{_text(chart.title)}</figcaption><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(chart.alt)}"></picture></figure>'
    )


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}">'
        f"<table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _missing(html: str) -> str:
    return f'<p class="missing">{html}</p>'


def _text(text: str) -> str:
    """Any text for HTML: control characters, which it has none for, become pictures of them."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is a "?"
    shown = (
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else chr(0x2400 + min(ord(c), 0x21))
        for c in text
    )
    return escape("".join(shown))


def _id(title: str) -> str:
    return title.lower().replace(" ", "-")


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


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


_STYLE = f"""
:root {{
  color-scheme: light dark;
  --text: {LIGHT.text}; --faint: {LIGHT.faint}; --paper: {LIGHT.paper}; --page: #f3f5f7;
  --line: {LIGHT.grid}; --link: {LIGHT.strong}; --bad: #a4161a; --good: #1b6e3a;
}}
@media (prefers-color-scheme: dark) {{ :root {{
  --text: {DARK.text}; --faint: {DARK.faint}; --paper: {DARK.paper}; --page: #0c0f12;
  --line: {DARK.grid}; --link: {DARK.strong}; --bad: #ff9b9b; --good: #7ee2a8;
}} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.25rem clamp(0.75rem, 3vw, 2.5rem) 4rem; max-width: 92rem;
  background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ margin: 0; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }}
h2 {{ margin: 2.5rem 0 0.75rem; font-size: 1.3rem; }}
h3 {{ margin: 0 0 0.5rem; font-size: 1rem; }}
header p {{ margin: 0.25rem 0 1rem; color: var(--faint); }}
a {{ color: var(--link); }}
:focus-visible {{ outline: 2px solid var(--link); outline-offset: 2px; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; list-style: none; }}
.numbers {{ display: grid; gap: 0.6rem; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); }}
.numbers div, figure, details, .scroll, .warnings, .missing, .good {{
  background: var(--paper); border: 1px solid var(--line); border-radius: 0.5rem; }}
.numbers div {{ padding: 0.5rem 0.75rem; }}
.numbers dt {{ color: var(--faint); font-size: 0.8rem; }}
.numbers dd {{ margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }}
.figures {{ display: grid; gap: 0.9rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }}
figure {{ margin: 0; padding: 0.6rem; }}
figcaption {{ padding: 0 0.25rem 0.35rem; font-weight: 600; }}
img {{ display: block; width: 100%; height: auto; }}
details {{ margin: 0.6rem 0; padding: 0 0.9rem; }}
summary {{ margin: 0 -0.9rem; padding: 0.6rem 0.9rem; cursor: pointer; }}
pre {{ margin: 0 0 0.9rem; font: 0.85rem/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 24rem; overflow-y: auto; }}
pre.wide {{ white-space: pre; overflow-x: auto; }}
code {{ font-family: ui-monospace, monospace; font-size: 0.9em; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
.scroll {{ margin: 0.9rem 0; padding: 0.4rem 0.9rem; overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ padding: 0.3rem 0; font-weight: 600; text-align: left; }}
th, td {{ padding: 0.25rem 1.25rem 0.25rem 0; border-top: 1px solid var(--line);
  text-align: left; vertical-align: top; overflow-wrap: anywhere; }}
thead th {{ border: 0; color: var(--faint); font-weight: 400; }}
tbody th {{ font-weight: 500; }}
.warnings, .missing, .good {{ margin: 0 0 0.9rem; padding: 0.75rem 1rem; }}
.warnings {{ border-left: 0.3rem solid var(--bad); }}
.warnings h3, .warnings strong {{ color: var(--bad); }}
.warnings ul {{ margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }}
.good {{ border-left: 0.3rem solid var(--good); }}
.missing {{ color: var(--faint); border-style: dashed; }}
@media print {{ details > summary {{ list-style: none; }} section {{ break-inside: avoid-page; }} }}
"""


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
