"""The pieces of an HTML page that needs no other file, for `report`."""

import base64
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

from .charts import DARK, LIGHT, Chart, png


def document(name: str, title: str, top: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page: its heading and title as text; below it `top`, and sections (heading, HTML)."""
    links = "".join(f'<li><a href="#{_id(head)}">{text(head)}</a></li>' for head, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{_id(head)}"><h2 id="{_id(head)}">{text(head)}</h2>'
        f"{content}</section>\n"
        for head, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a sample or a setting holds, nothing is fetched and nothing is run.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(name)}</h1>{top}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def figures(charts: Iterable[Chart]) -> str:
    """Each chart twice, of which the reader's colour scheme shows one."""
    return f'<div class="figures">{"".join(map(_figure, charts))}</div>'


def _figure(chart: Chart) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(png(chart, theme)).decode()
        for theme in (LIGHT, DARK)
    )
    return (
        f"<figure><figcaption>{text(chart.title)}</figcaption><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{text(chart.alt)}"></picture></figure>'
    )


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text, whose first column names the rows; it scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>'
        + "".join(f"<td>{text(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">'
        f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def missing(html: str) -> str:
    """A paragraph about what is not there."""
    return f'<p class="missing">{html}</p>'


def text(content: str) -> str:
    """Any text for HTML: control characters, which it has none for, become pictures of them."""
    content = content.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is a "?"
    shown = (
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else chr(0x2400 + min(ord(c), 0x21))
        for c in content
    )
    return escape("".join(shown))


def _id(heading: str) -> str:
    return heading.lower().replace(" ", "-")


STYLE = f"""
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
.tables {{ display: grid; gap: 0.9rem; align-items: start; margin: 0.9rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }}
.scroll {{ padding: 0.4rem 0.9rem; overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ padding: 0.3rem 0; font-weight: 600; text-align: left; }}
th, td {{ padding: 0.25rem 1.25rem 0.25rem 0; border-top: 1px solid var(--line);
  text-align: left; vertical-align: top; overflow-wrap: break-word; }}
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
