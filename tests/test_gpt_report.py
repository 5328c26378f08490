"""The report of a run: a page that is well-formed, alone, safe, and says what is missing."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt.gpt import PRESETS, TrainConfig
from fastgpt.gpt import page as pieces
from fastgpt.gpt.about import kernels
from fastgpt.gpt.charts import DARK, LIGHT
from fastgpt.gpt.config import LOSSES
from fastgpt.gpt.curves import curves
from fastgpt.gpt.errors import CheckpointError
from fastgpt.gpt.history import HistoryFile, read_history
from fastgpt.gpt.metrics import read_metrics
from fastgpt.gpt.report import main, page, read_run, write_report
from fastgpt.gpt.train import make_trainer

TEXT = "".join(f"def f{i}(x):\n    return x + {i * 7919 % 1000}\n\n" for i in range(500))
PIXEL = b"\x89PNG\r\n\x1a\n"  # stands for a plot where the test is not of plots
VOID = {"meta", "img", "source"}  # elements without an end


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with diagnostics and samples, to copy before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    threads = torch.get_num_threads()
    make_trainer(
        {
            "data": str(folder / "text.txt"), "tokenizer": "byte", "block_size": 16,
            "batch_size": 4, "steps": 8, "warmup": 2, "lr": 3e-3, "eval_interval": 4,
            "eval_batches": 1, "log_interval": 2, "device": "cpu", "threads": 1, "diagnostics": 4,
            "sample_tokens": 20, "out": folder / "a run",
        }
    ).run()  # fmt: skip
    torch.set_num_threads(threads)
    return folder / "a run"


@pytest.fixture(scope="module")
def html(finished) -> str:
    """Its page, with the plots."""
    path = write_report(finished)
    assert path == finished / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "a run"))


@pytest.fixture
def quick(monkeypatch):
    """Draws nothing."""
    monkeypatch.setattr(pieces, "png", lambda chart, theme: PIXEL)


class Page(HTMLParser):
    """Reads a page and asserts that every element ends where it should."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}  # what each kind of element holds
        self.feed(html)
        self.close()
        assert self.open == [], "these have no end"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert tag not in VOID
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.text[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_is_well_formed_and_shows_all_that_the_run_has(run, html):
    assert html.startswith("<!DOCTYPE html>\n")
    parsed = Page(html)
    assert parsed.text["h1"] == ["a run"]
    assert parsed.text["h2"] == [
        "Loss and speed", "Inside the model", "Samples", "Kernels", "Settings",
    ]  # fmt: skip
    assert parsed.text["figcaption"] == [
        "Loss", "Learning rate", "Gradient norm", "Speed", "Activations by depth", "Dead units",
        "Gradient norm by depth", "Gradient histograms at step 8", "Update to data",
        "Attention entropy",
    ]  # fmt: skip
    assert "Finished: all of its 8 steps are done." in html
    rows = read_metrics(run / "metrics.csv")
    assert f"<dd>{rows[-1].val_loss:.4f}</dd>" in html
    assert "linear_cross_entropy on cpu runs on" in html
    assert "scaled_dot_product_attention on cpu runs on" in html
    samples = read_history(run / "samples.jsonl")
    summaries = [text for text in parsed.text["summary"] if text.startswith("Step ")]
    losses = {row.step: row.val_loss for row in rows}
    assert summaries == [f"Step {s}, validation loss {losses[s]:.3f}" for s in (0, 4, 8)]
    assert len(samples) == 3
    for sample in samples:
        prompt, text = map(pieces.text, (sample["prompt"], sample["text"]))
        assert f"<b>{prompt}</b>{text}</pre>" in html


def test_the_page_can_be_read_without_seeing_it(run, quick):
    parsed = Page(page(read_run(run)))
    (root,) = parsed.all("html")
    assert root["lang"] == "en"
    assert len(parsed.text["title"]) == len(parsed.text["h1"]) == len(parsed.text["main"]) == 1
    for image in parsed.all("img"):
        assert len(image["alt"]) > 30, image["alt"]
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in pairwise(levels)), "none is left out"
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    references = [a["href"].removeprefix("#") for a in parsed.all("a")]
    references += [a["aria-labelledby"] for a in parsed.all("section")]
    assert set(references) == set(ids)
    for table in parsed.text["table"]:
        assert table.strip()
    assert len(parsed.all("caption")) == len(parsed.all("table")) >= 4
    assert all("scope" in heading for heading in parsed.all("th"))


def luminance(color: str) -> float:
    """Relative, as the Web Content Accessibility Guidelines (2.x) define it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_writing_stands_out_from_what_is_behind_it(scheme):
    styles = pieces.STYLE.split("@media (prefers-color-scheme: dark)")
    colors = dict(re.findall(r"--(\w+): (#\w{6})", styles[scheme == "dark"]))
    assert len(colors) == 8, "both schemes name all of them"
    for text in ("text", "faint", "link", "bad", "good"):
        for behind in ("paper", "page"):
            pair = sorted((luminance(colors[text]), luminance(colors[behind])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (text, behind)
    theme = LIGHT if scheme == "light" else DARK
    for line, least in ((theme.strong, 4.5), (theme.faint, 4.5), (theme.pale, 2.0)):
        pair = sorted((luminance(line), luminance(theme.paper)))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, line


def test_the_page_needs_nothing_but_itself(html):
    parsed = Page(html)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in parsed.elements}
    for tag, attributes in parsed.elements:
        for name in ("src", "srcset", "href", "poster", "action", "style"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith("data:image/png;base64," if tag != "a" else "#"), (
                    tag,
                    name,
                )
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", re.sub('base64,[^"]*', "", html))
    (policy,) = [a["content"] for a in parsed.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert len(parsed.all("source")) == len(parsed.all("img")) == 10
    for source, image in zip(parsed.all("source"), parsed.all("img"), strict=True):
        assert source["media"] == "(prefers-color-scheme: dark)"
        assert source["srcset"] != image["src"], "a plot of its own for the dark"


HOSTILE = (
    "</pre></details><script>alert('1')</script><img src=x onerror=\"f()\">&amp;\x00\x1b[31m\ud800"
)


def test_hostile_text_in_samples_settings_and_names_is_shown_and_does_nothing(run, quick):
    for name in ("samples.jsonl", "diagnostics.jsonl"):
        records = read_history(run / name)
        history = HistoryFile(run / name)
        history.start()
        for record in records:
            if name == "samples.jsonl":
                record |= {"prompt": HOSTILE, "text": HOSTILE}
            else:
                finding = {"kind": "dead", "layers": [HOSTILE], "text": f"dead: {HOSTILE}"}
                record["findings"] = [finding]
                for key in ("activations", "gradients", "updates"):
                    record[key] = {HOSTILE + n: value for n, value in record[key].items()}
            history.append(record)
    for name, keys in (("config.json", ["data"]), ("about.json", ["corpus", "device"])):
        content = json.loads((run / name).read_text())
        content |= dict.fromkeys(keys, HOSTILE)
        if name == "about.json":
            content |= {"kernels": [HOSTILE], "installation": HOSTILE}
        (run / name).write_text(json.dumps(content))
    hostile = run.with_name("<script>run&")
    run.rename(hostile)

    html = write_report(hostile).read_bytes().decode("utf-8")
    parsed = Page(html)
    assert "script" not in {tag for tag, _ in parsed.elements}
    assert len(parsed.all("img")) == 10
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", html), "HTML has no such characters"
    shown = HOSTILE.replace("\x00", "\u2400").replace("\x1b", "\u241b").replace("\ud800", "?")
    assert parsed.text["h1"] == ["<script>run&"]
    assert parsed.text["pre"][0] == shown + shown
    everything = parsed.text["html"][0]
    assert everything.count(shown) >= 2 * 3 + 1 + 2 + 2 + 2


def test_a_warning_is_on_the_page_and_one_that_is_over_is_said_to_be(run, quick):
    assert "No layer was dead, saturated, vanishing or exploding at any of 3 looks" in page(
        read_run(run)
    )
    records = read_history(run / "diagnostics.jsonl")
    history = HistoryFile(run / "diagnostics.jsonl")
    history.start()
    for record, kind in zip(
        records, ("vanishing gradient", "dead units", "dead units"), strict=True
    ):
        text = f"{kind}: layer x (50% of them). They do not learn."
        record["findings"] = [{"kind": kind.split()[0], "layers": ["x"], "text": text}]
        history.append(record)
    parsed = Page(page(read_run(run)))
    assert parsed.text["h3"][0] == "Warnings at step 8"
    items = [text for text in parsed.text["li"] if "vanishing" in text or "dead" in text]
    assert items == [
        "dead units: layer x (50% of them). They do not learn.",
        "vanishing gradient: until step 1, and not at the last look.",
    ]


def test_a_run_without_diagnostics_samples_and_notes_has_a_page_that_says_so(run, quick):
    for name in ("diagnostics.jsonl", "samples.jsonl", "about.json"):
        (run / name).unlink()
    config = json.loads((run / "config.json").read_text())
    for name in ("diagnostics", "sample_tokens", "tensorboard"):  # as before there were any
        del config[name]
    (run / "config.json").write_text(json.dumps(config))
    html = page(read_run(run))
    Page(html)
    assert "This run has no diagnostics. Train with <code>--diagnostics 100</code>" in html
    assert "This run has no samples" in html
    assert "about.json is missing). Its shapes on this machine:" in html
    assert "linear_cross_entropy on cpu runs on" in html


def test_a_run_that_has_just_begun_has_a_page(run, quick):
    for name in ("diagnostics.jsonl", "samples.jsonl", "metrics.csv"):
        (run / name).unlink()
    html = page(read_run(run))
    Page(html)
    assert "No step is recorded yet" in html
    assert "metrics.csv has no rows yet, so there are no curves." in html
    assert "Nothing was looked at yet" in html


def test_a_run_that_goes_on_has_a_page_of_what_is_done_even_in_the_middle_of_a_line(run, quick):
    lines = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("\n".join(lines[:4]) + "\n6,38")
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step":6,"te')
    html = page(read_run(run))
    Page(html)
    assert "At step 4 of 8: still running, or stopped before its end." in html


def test_what_is_no_run_and_a_damaged_one_are_errors_that_name_the_file(run, tmp_path, quick):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; is .* folder of a run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    good = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text("{}\n" + good)
    with pytest.raises(CheckpointError, match=r"samples\.jsonl: line 1"):
        write_report(run)
    (run / "samples.jsonl").write_text(good)
    columns = (run / "metrics.csv").read_text().splitlines()[0].count(",")
    with (run / "metrics.csv").open("a") as file:
        file.write("ten" + columns * ",1" + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.csv: damaged"):
        write_report(run)


def test_a_page_that_cannot_be_finished_leaves_the_one_before_it(run, quick, monkeypatch):
    assert main(["--run", str(run)]) == 0
    before = (run / "report.html").read_bytes()

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="No space"):
            write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not [file for file in run.iterdir() if file.name.startswith(".")]


def test_the_command_writes_where_it_is_told_and_a_mistake_is_one_line(
    run, tmp_path, quick, capsys
):
    out = tmp_path / "pages" / "x.html"
    assert main(["--run", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    Page(out.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "fastgpt.gpt.report", "--run", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: .*config\.json: no such file; is .* of a run\?\n", result.stderr)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_kernels_are_those_that_the_runs_own_calls_would_take(loss, dtype):
    config = TrainConfig(preset="tiny", batch_size=2, loss=loss, dtype=dtype)
    lines = kernels(config, PRESETS["tiny"], torch.device("cpu"))
    kernel = loss in ("linear_cross_entropy", "cross_entropy")
    first = f"{loss} on cpu runs on " if kernel else f"the loss is '{loss}', in torch's operations"
    assert lines[0].startswith(first)
    assert lines[1].startswith("scaled_dot_product_attention on cpu runs on ")
    with fastgpt.backend("eager"):
        lines = kernels(config, PRESETS["tiny"], torch.device("cpu"))
    assert [" on cpu runs on eager" in line for line in lines] == [kernel, True]


def test_curves_say_in_words_what_they_show(run):
    rows = read_metrics(run / "metrics.csv")
    by_name = {chart.name: chart for chart in curves(rows, 256, 2.5)}
    assert list(by_name) == ["loss", "learning-rate", "total-gradient-norm", "speed"]
    val = [row.val_loss for row in rows if row.val_loss is not None]
    alt = by_name["loss"].alt
    assert f"Validation from {val[0]:.4g} at step 0 to {val[-1]:.4g} at step 8" in alt
    assert "ln(vocabulary) is 5.55, the bigram model's 2.50." in alt
    assert [chart.name for chart in curves(rows[:1], 256)] == ["loss", "learning-rate"]
    assert curves([], 256) == []
