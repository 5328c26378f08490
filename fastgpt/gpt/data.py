"""Text to batches: the corpus, what is held out of it, the token files, random pieces of them."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fastgpt.files import atomic_path, cache_dir

from .errors import LazyModule, UsageError
from .tokenizer import Tokenizer, train_tokenizer

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")

TokenArray: TypeAlias = "np.ndarray[Any, Any]"  # 1-D, unsigned, memory-mapped

# Not prose for a language model: tests, installed packages, and tables of characters.
_NOT_CORPUS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
_NOT_CORPUS |= {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Corpus:
    """Texts to learn from, and others, never seen in training, to measure on."""

    name: str
    train: list[str]
    val: list[str]

    @property
    def digest(self) -> str:
        """A hash of all the text and of how it is split."""
        hasher = hashlib.sha256()
        for part in (self.train, self.val):
            for text in part:
                data = text.encode()
                hasher.update(len(data).to_bytes(8, "little"))
                hasher.update(data)
            hasher.update(b"|")
        return hasher.hexdigest()

    @property
    def characters(self) -> int:
        return sum(map(len, self.train)) + sum(map(len, self.val))


def load_corpus(path: str | Path | None = None) -> Corpus:
    """The text of a file, or of all text files in a folder; without a path, Python's own library.

    From twenty files on, every tenth in the order of their names is held out for validation, so
    that no file is on both sides; of fewer files, the last tenth of each. Raises UsageError if
    there is nothing to read.
    """
    if path is None:
        return standard_library()
    path = Path(path)
    if not path.exists():
        raise UsageError(f"--data {path}: no such file or folder")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if _is_visible(f, path))
    texts = [text for file in files if (text := _read_text(file))]
    if not texts:
        raise UsageError(f"--data {path}: expected text, found none in {len(files)} files")
    return _split(str(path), texts)


def standard_library() -> Corpus:
    """The source of this interpreter's standard library: several MB on every install."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.rglob("*.py"))
    files = [file for file in files if not _NOT_CORPUS & set(file.relative_to(root).parts)]
    texts = [text for file in files if (text := _read_text(file))]
    if not texts:
        raise UsageError(f"no source of the standard library in {root}; give a text with --data")
    return _split("the Python standard library", texts)


def _is_visible(file: Path, root: Path) -> bool:
    return file.is_file() and not any(p.startswith(".") for p in file.relative_to(root).parts)


def _read_text(file: Path) -> str:
    """A file's text, UTF-8 or else Latin-1; empty for a file that is not text."""
    data = file.read_bytes()
    if b"\0" in data:
        return ""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n")


def _split(name: str, texts: list[str]) -> Corpus:
    if len(texts) >= 20:
        held_out = texts[9::10]
        return Corpus(name, [t for i, t in enumerate(texts) if i % 10 != 9], held_out)
    train, val = [], []
    for text in texts:
        cut = len(text) * 9 // 10
        cut = text.find("\n", cut) + 1 or cut  # after the line, if there is an end of it
        train.append(text[:cut])
        val.append(text[cut:])
    return Corpus(name, train, val)


@dataclass(frozen=True)
class Dataset:
    """A corpus as tokens."""

    corpus: str  # its name
    digest: str  # the hash of its text
    tokenizer: Tokenizer
    train: TokenArray
    val: TokenArray


def load_dataset(
    path: str | Path | None, kind: str, vocab_size: int, tokenizer: Tokenizer | None = None
) -> Dataset:
    """Read a corpus (see `load_corpus`), train a tokeniser on it unless one is given, encode it."""
    corpus = load_corpus(path)
    digest = corpus.digest
    if tokenizer is None:
        # The held-out text takes no part, but for the alphabet of `char`, which must know it all.
        texts = corpus.train if kind == "bpe" else corpus.train + corpus.val
        tokenizer = train_tokenizer(kind, texts, vocab_size, digest)
    train = token_file(corpus.train, tokenizer, digest, "train")
    val = token_file(corpus.val, tokenizer, digest, "val")
    return Dataset(corpus.name, digest, tokenizer, train, val)


def token_file(texts: Sequence[str], tokenizer: Tokenizer, digest: str, split: str) -> TokenArray:
    """The tokens of the texts, one after the other with a line break between, memory-mapped.

    Written once to the cache, 2 bytes a token for a vocabulary up to 65,536 and 4 above. `digest`
    is the hash of the corpus that the texts are the `split` of.
    """
    settings = json.dumps(tokenizer.to_json(), sort_keys=True)
    key = hashlib.sha256(f"{digest} {split} {settings}".encode()).hexdigest()[:16]
    path = cache_dir() / f"{split}-{tokenizer.kind}-{key}.npy"
    if not path.exists():
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        parts = [np.zeros(0, dtype)]
        for pieces in _groups(texts):
            parts += [tokens.astype(dtype) for tokens in tokenizer.encode(pieces)]
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(parts))
    tokens: TokenArray = np.load(path, mmap_mode="r")
    return tokens


def _groups(texts: Sequence[str], characters: int = 2**16, pieces: int = 64) -> Iterator[list[str]]:
    """Lists of texts to encode at a time; a long text is cut, at a line's end where there is one.

    Without this the tokeniser's own records of a large corpus would not fit the memory.
    """
    group = []
    for i, text in enumerate(texts):
        text = text if i == 0 or texts[i - 1].endswith("\n") else "\n" + text
        start = 0
        while start < len(text):
            end = text.find("\n", start + characters) + 1 or len(text)
            group.append(text[start:end])
            start = end
            if len(group) == pieces:
                yield group
                group = []
    yield group


def random_batch(
    tokens: TokenArray,
    batch_size: int,
    context: int,
    key: Sequence[int],
    part: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (batch_size, context) int64: y[:, t] is what follows x[:, t].

    The places are drawn at random by a generator made from `key` alone: batch 1000 can be made
    without the 999 before it, so a resumed run sees the batches that it would have seen. `part`
    (i, n) is the i-th of n equal parts of the batch, (batch_size / n, context). Raises UsageError
    if there are too few tokens for one piece.
    """
    if len(tokens) <= context:
        raise UsageError(
            f"the text has {len(tokens)} tokens, and a piece of block_size {context} needs "
            f"{context + 1}; give more text (--data) or a smaller --block-size"
        )
    starts = np.random.default_rng(list(key)).integers(len(tokens) - context, size=batch_size)
    rows_here = batch_size // part[1]
    starts = starts[part[0] * rows_here :][:rows_here]
    rows = np.stack([tokens[i : i + context + 1] for i in starts]).astype(np.int64)  # (B, T + 1)
    pieces = torch.from_numpy(rows)
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
