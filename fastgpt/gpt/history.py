"""What a run notes as it goes, in files of JSON lines: diagnostics.jsonl and samples.jsonl."""

import json
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_path

from .errors import CheckpointError

Record = dict[str, Any]  # it has at least a "step"


class HistoryFile:
    """A file with one record a line, each on the disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, last_step: int | None = None) -> None:
        """Begin anew without a file, or continue the one that is there after `last_step`.

        Records past it are of steps that no checkpoint kept, and will be made again.
        """
        kept = [] if last_step is None else read_history(self.path)
        kept = [record for record in kept if last_step is not None and record["step"] <= last_step]
        if not kept:
            self.path.unlink(missing_ok=True)
            return
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")

    def append(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = _line(record)  # before the file is opened: what can't be JSON leaves no trace
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)


def read_history(path: Path) -> list[Record]:
    """The records of a file, none where there is no file; a last line cut short is left out.

    Raises CheckpointError, naming file and line, for anything else that is not a record.
    """
    if not path.is_file():
        return []
    records: list[Record] = []
    *lines, _ = path.read_bytes().split(b"\n")  # behind the last line break is what a crash cut
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}: line {number} is not JSON ({error})") from error
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            raise CheckpointError(f"{path}: line {number} is no record with a step: {line[:80]!r}")
        records.append(record)
    return records


def _line(record: Record) -> str:
    return json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
