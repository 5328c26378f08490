"""Writes the pages of the tour: `python docs/tour/build.py` runs the chapters and shows results.

A chapter is a script in cells. `# %% [markdown]` begins prose, in comments; `# %%` code, under
which the page shows what it printed; `# %% [figure]` the code that draws the chapter's figure,
which the page folds away. A chapter's first cell is its title and a paragraph that sums it up.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

from fastgpt.files import atomic_path

FOLDER = Path(__file__).parent
README = """\
# The tour

What is inside a GPT and its training, in twelve chapters. Each is a script that runs in seconds on
one core, downloads nothing, prints its numbers, draws its figure, and asserts what its text claims;
the tests of this repository run them all. The pages below are those scripts and what they printed.

```sh
pip install -e '.[gpt]'             # torch, and matplotlib for the figures
python docs/tour/01_tensors.py      # change a line and run it again
```

Where other programs keep the cores busy, `OMP_NUM_THREADS=1` in front is much quicker.
"""


def cells(source: str) -> list[tuple[str, str]]:
    """The (kind, text) of each cell; the kind is "markdown", "figure" or "" for code."""
    parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)
    texts = zip(parts[1::2], parts[2::2], strict=True)
    return [(kind.strip(" []"), text.strip("\n")) for kind, text in texts]


def prose(text: str) -> str:
    return re.sub(r"^# ?", "", text, flags=re.MULTILINE)


def run(script: Path) -> list[str]:
    """Execute the cells as one program; what each printed."""
    names = {"__name__": "__main__", "__file__": str(script)}
    outputs = []
    for kind, text in cells(script.read_text(encoding="utf-8")):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            if kind != "markdown":
                exec(compile(text, script, "exec"), names)
        outputs.append(output.getvalue())
    return outputs


def page(script: Path, outputs: list[str]) -> str:
    """The chapter in Markdown, with the output of each of its cells."""
    blocks = []
    for (kind, text), output in zip(
        cells(script.read_text(encoding="utf-8")), outputs, strict=True
    ):
        code = f"```python\n{text}\n```"
        if kind == "markdown":
            blocks.append(prose(text))
        elif kind == "figure":
            summary = "<summary>The code of the figure</summary>"
            blocks += [image(script), f"<details>{summary}\n\n{code}\n</details>"]
        else:
            blocks.append(code)
        if output:
            blocks.append(f"```text\n{output.rstrip()}\n```")
    scripts = chapters()
    place = scripts.index(script)
    beside = [s for s in scripts[max(place - 1, 0) : place + 2] if s != script]
    links = ["[The tour](README.md)", *(f"[{title(s)}]({s.stem}.md)" for s in beside)]
    blocks.append(f"---\n\n{' · '.join(links)} · this page is `{script.name}`, run")
    return "\n\n".join(blocks) + "\n"


def readme() -> str:
    blocks = [README.rstrip()]
    for script in chapters():
        summary = prose(cells(script.read_text(encoding="utf-8"))[0][1]).split("\n\n")[1]
        blocks += [f"## [{title(script)}]({script.stem}.md)", summary, image(script)]
    return "\n\n".join(blocks) + "\n"


def chapters() -> list[Path]:
    return sorted(FOLDER.glob("[0-9]*.py"))


def title(script: Path) -> str:
    return prose(cells(script.read_text(encoding="utf-8"))[0][1]).split("\n")[0].removeprefix("# ")


def image(script: Path) -> str:
    return f"![{title(script)}](figures/{script.stem}.png)"


def write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    wanted = sys.argv[1:]  # parts of names; without any, all
    for script in chapters():
        if not wanted or any(part in script.name for part in wanted):
            write(script.with_suffix(".md"), page(script, run(script)))
    write(FOLDER / "README.md", readme())
