"""Files that are either whole or not there, and the folder for those that can be made again."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path next to `path` to write to; it takes the name `path` if the block succeeds.

    A reader sees the old file or the new one, and a crash leaves the old one. Creates the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut could keep the new name and lose the bytes
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path` to fill; it takes the name `path` if the block succeeds.

    `path` may be an empty folder. A file, or a folder that holds something, raises FileExistsError,
    so that none is ever half old and half new. Creates the folder around it.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already: expected a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for each in temporary.iterdir():
            with each.open("rb+") as file:
                os.fsync(file.fileno())
            each.chmod(0o666 & ~_umask())
        temporary.chmod(0o777 & ~_umask())
        os.rename(temporary, path)  # onto a folder only if that is still empty
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what `atomic_path(path)` left where its process was killed inside the block."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.????????{path.suffix}"):
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def cache_dir() -> Path:
    """$FASTGPT_CACHE, or `fastgpt` in $XDG_CACHE_HOME, or ~/.cache/fastgpt."""
    if own := os.environ.get("FASTGPT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastgpt"
