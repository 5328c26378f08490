"""Tokenisers: `bpe` (byte-level byte-pair encoding, trained on the corpus), `byte` and `char`.

Every token is a fixed string of bytes, so any of them can decode any sequence of tokens.
"""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastgpt.files import atomic_path, cache_dir

from .errors import LazyModule, UsageError, require

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")


class Tokenizer(ABC):
    """Text to tokens and back."""

    kind: str
    vocab_size: int

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> "list[np.ndarray[Any, Any]]":
        """The tokens of each text, 1-D integer arrays. A str gives back itself through `decode`."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; it may be only a part of a character."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All there is to it; `from_json` makes it again."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8."""

    kind = "byte"
    vocab_size = 256

    def encode(self, texts: Sequence[str]) -> "list[np.ndarray[Any, Any]]":
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}


class CharTokenizer(Tokenizer):
    """One token for each character of an alphabet. Encoding any other raises UsageError."""

    kind = "char"

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)
        self.index = {character: i for i, character in enumerate(alphabet)}

    def encode(self, texts: Sequence[str]) -> "list[np.ndarray[Any, Any]]":
        try:
            return [np.array([self.index[c] for c in text], dtype=np.int64) for text in texts]
        except KeyError as error:
            raise UsageError(
                f"the character {error.args[0]!r} is not among the {self.vocab_size} of the "
                "training text; the tokenizers bpe and byte know every character"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        return self.alphabet[token].encode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self.alphabet}


class BPETokenizer(Tokenizer):
    """GPT-2's tokeniser: byte-pair encoding (Sennrich et al. 2016) of bytes, within words."""

    kind = "bpe"

    def __init__(self, serialized: str) -> None:
        self.serialized = serialized
        self._tokenizer = require("tokenizers").Tokenizer.from_str(serialized)
        vocabulary, added = self._tokenizer.get_vocab(), self._tokenizer.get_added_tokens_decoder()
        self.vocab_size = 1 + max(vocabulary.values())
        byte_of = _byte_of_printable()
        self._bytes = [b""] * self.vocab_size
        for text, token in vocabulary.items():
            as_it_is = token in added  # such as <|endoftext|>, beside the encoding
            self._bytes[token] = text.encode() if as_it_is else bytes(byte_of[c] for c in text)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn up to `vocab_size` tokens, the 256 bytes among them; a short text has fewer."""
        library = require("tokenizers")
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> "list[np.ndarray[Any, Any]]":
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def token_bytes(self, token: int) -> bytes:
        # A model's vocabulary may be padded beyond the tokeniser's.
        return self._bytes[token] if token < self.vocab_size else b""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer": json.loads(self.serialized)}


def _byte_of_printable() -> dict[str, int]:
    """GPT-2 writes a byte of a token as a printable character: itself, or the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def from_json(saved: dict[str, Any]) -> Tokenizer:
    """The tokeniser that `to_json` described."""
    if saved["kind"] == "byte":
        return ByteTokenizer()
    if saved["kind"] == "char":
        return CharTokenizer(saved["alphabet"])
    return BPETokenizer(json.dumps(saved["tokenizer"]))


def train_tokenizer(kind: str, texts: Sequence[str], vocab_size: int, digest: str) -> Tokenizer:
    """The tokeniser `kind` for these texts; a bpe is cached under the texts' `digest`."""
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer("".join(sorted(set().union(*texts))))
    version = require("tokenizers").__version__
    key = hashlib.sha256(f"{digest} bpe {vocab_size} {version}".encode()).hexdigest()[:16]
    path = cache_dir() / f"bpe-{vocab_size}-{key}.json"
    if not path.exists():
        with atomic_path(path) as temporary:
            trained = BPETokenizer.train(texts, vocab_size)
            temporary.write_text(trained.serialized, encoding="utf-8")
    return BPETokenizer(path.read_text(encoding="utf-8"))


class StreamDecoder:
    """Text as tokens arrive: a character is given out when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes; often a piece of a word, sometimes nothing."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left of a character that never became whole: nothing, or U+FFFD."""
        return self._decoder.decode(b"", final=True)
