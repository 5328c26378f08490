"""The compiled extensions: loads one, or finds out why there is none."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any


def build_record() -> dict[str, Any]:
    """What the installation wrote about its build; empty if it wrote nothing."""
    path = Path(__file__).parent.parent / "_build.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def load(name: str, key: str) -> tuple[ModuleType | None, str]:
    """The extension `fastgpt.<name>`, `key` in the record; or the reason why it is not there."""
    built = build_record().get(key, {})
    if built.get("reason"):
        return None, built["reason"]
    try:
        return importlib.import_module(f"fastgpt.{name}"), ""
    except ModuleNotFoundError:
        return None, "the extension has not been built: run `pip install -e .` in the source tree"
    except ImportError as error:
        return None, (
            f"the extension does not load ({error}): it may have been built for another torch; "
            "run `pip install -e .` again"
        )
