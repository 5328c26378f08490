"""The reference GPT's data: corpus, tokenisers, token files, batches, and the bigram model."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.files import atomic_path, cache_dir
from fastgpt.gpt.bigram import Bigram
from fastgpt.gpt.data import load_corpus, load_dataset, random_batch, standard_library, token_file
from fastgpt.gpt.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    from_json,
    train_tokenizer,
)

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(400)) + "ünïcödé ☃ 🦙\n" * 20
BPE = BPETokenizer.train([TEXT], 300)
CHAR = CharTokenizer("".join(sorted(set(TEXT))))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))


# --- tokenisers


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["bpe", "byte"])
@settings(deadline=None)
@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text):
    (tokens,) = tokenizer.encode([text])
    assert tokenizer.decode(tokens) == text


def test_char_survives_encoding_and_decoding():
    (tokens,) = CHAR.encode([TEXT])
    assert len(tokens) == len(TEXT)
    assert CHAR.decode(tokens) == TEXT


def test_char_names_a_character_that_it_does_not_know():
    with pytest.raises(ValueError, match="the character '€' is not among"):
        CHAR.encode(["def €"])


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer(), CHAR], ids=["bpe", "byte", "char"])
def test_a_saved_tokenizer_gives_the_same_tokens(tokenizer: Tokenizer):
    again = from_json(tokenizer.to_json())
    assert again.vocab_size == tokenizer.vocab_size
    for before, after in zip(tokenizer.encode([TEXT]), again.encode([TEXT]), strict=True):
        np.testing.assert_array_equal(before, after)


def test_bpe_has_the_size_asked_for_and_shortens_the_text():
    assert BPE.vocab_size == 300
    assert len(BPE.encode([TEXT])[0]) < 0.7 * len(TEXT.encode())


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["bpe", "byte"])
@settings(deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text_even_when_it_is_no_utf8(tokenizer: Tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokens]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(tokens)


def test_streaming_holds_a_character_back_until_it_is_whole():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(byte) for byte in "é🦙!".encode()] == ["", "é", "", "", "", "🦙", "!"]


# --- corpus


def test_standard_library_is_several_megabytes_of_real_text():
    corpus = standard_library()
    assert corpus.characters > 3_000_000
    assert any("class JSONDecoder" in text for text in corpus.train + corpus.val)
    assert not any("import unittest\nimport unittest.mock" in text for text in corpus.train)


def test_no_file_of_a_folder_is_both_trained_on_and_held_out(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i}\n")
    corpus = load_corpus(tmp_path)
    assert len(corpus.val) == 4
    assert not set(corpus.train) & set(corpus.val)
    assert sorted(corpus.train + corpus.val) == sorted(f"file {i}\n" for i in range(40))


def test_of_a_single_file_the_last_tenth_is_held_out_from_a_lines_start(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    corpus = load_corpus(tmp_path / "a.txt")
    assert corpus.train[0] + corpus.val[0] == TEXT
    assert corpus.train[0].endswith("\n")
    assert len(corpus.val[0]) == pytest.approx(len(TEXT) / 10, rel=0.05)


def test_files_that_are_hidden_or_not_text_are_left_out_and_latin1_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve\r\n".encode("latin-1") * 10)
    (tmp_path / "b.bin").write_bytes(b"\x00\x01\x02")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    corpus = load_corpus(tmp_path)
    assert "".join(corpus.train + corpus.val) == "naïve\n" * 10


def test_a_corpus_that_is_not_there_or_empty_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected text, found none in 0 files"):
        load_corpus(tmp_path)


# --- token files


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer(), CHAR], ids=["bpe", "byte", "char"])
def test_the_token_file_holds_all_the_text_with_lines_between_the_files(tokenizer: Tokenizer):
    unended = "return x"
    texts = [TEXT, unended, TEXT * 10]
    tokens = token_file(texts, tokenizer, "digest", "train")
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens) == f"{TEXT}{unended}\n{TEXT * 10}"


def test_a_vocabulary_above_two_to_the_sixteen_is_not_cut_to_two_bytes():
    alphabet = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    tokens = token_file([alphabet], CharTokenizer(alphabet), "digest", "train")
    np.testing.assert_array_equal(tokens, np.arange(70_000))


def test_the_cache_is_used_again_and_a_changed_text_is_not_taken_for_the_old(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    first = load_dataset(path, "bpe", 300)
    files = {file: file.stat().st_mtime_ns for file in cache_dir().iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(BPETokenizer, "train", None)  # calling it would fail
        again = load_dataset(path, "bpe", 300)
    assert {file: file.stat().st_mtime_ns for file in cache_dir().iterdir()} == files
    np.testing.assert_array_equal(first.train, again.train)
    path.write_text(TEXT.replace("return", "yield"), encoding="utf-8")
    changed = load_dataset(path, "bpe", 300)
    assert "yield" in changed.tokenizer.decode(changed.train)


def test_bpe_learns_nothing_from_the_held_out_text(tmp_path):
    (tmp_path / "a.txt").write_text("abc\n" * 900 + "xyzzy\n" * 60)
    tokenizer = load_dataset(tmp_path / "a.txt", "bpe", 400).tokenizer
    learnt = {tokenizer.token_bytes(token) for token in range(256, tokenizer.vocab_size)}
    assert b"abc" in learnt
    assert not any(b"z" in token for token in learnt)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGPT_CACHE", "/one")
    assert cache_dir() == Path("/one")
    monkeypatch.delenv("FASTGPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_dir() == Path("/two/fastgpt")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_char_knows_the_held_out_characters_too(tmp_path):
    (tmp_path / "a.txt").write_text("abc\n" * 900 + "xyz\n" * 70)
    data = load_dataset(tmp_path / "a.txt", "char", 0)
    assert data.tokenizer.decode(data.val).endswith("xyz\n")
    assert train_tokenizer("char", ["b", "a"], 0, "").vocab_size == 2


# --- batches


def test_targets_are_the_inputs_one_token_later():
    tokens = np.random.default_rng(0).permutation(1000).astype(np.uint16)
    x, y = random_batch(tokens, 5, 12, (0, 0, 0))
    assert x.shape == y.shape == (5, 12)
    assert x.dtype == y.dtype == torch.int64
    place = {int(token): i for i, token in enumerate(tokens)}
    for row_x, row_y in zip(x.tolist(), y.tolist(), strict=True):
        start = place[row_x[0]]
        assert row_x == tokens[start : start + 12].tolist()
        assert row_y == tokens[start + 1 : start + 13].tolist()


def test_a_batch_depends_on_its_key_alone():
    tokens = np.arange(5000, dtype=np.uint16)
    first = random_batch(tokens, 4, 8, (1, 0, 7))[0]
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(random_batch(tokens, 4, 8, (1, 0, 7))[0], first)
    for key in [(2, 0, 7), (1, 1, 7), (1, 0, 8)]:
        assert not torch.equal(random_batch(tokens, 4, 8, key)[0], first)


def test_every_token_can_be_drawn_and_the_first_never_as_a_target():
    tokens = np.arange(10, dtype=np.uint16)
    x, y = random_batch(tokens, 500, 8, (0,))
    assert x.unique().tolist() == list(range(9))
    assert y.unique().tolist() == list(range(1, 10))


def test_too_short_a_text_is_refused_with_the_lengths():
    with pytest.raises(ValueError, match="8 tokens, and a piece of block_size 8 needs 9"):
        random_batch(np.arange(8, dtype=np.uint16), 1, 8, (0,))


# --- the bigram model


def bigram_by_the_formula(tokens: list[int], V: int, a: int, b: int) -> float:
    pairs = Counter(pairwise(tokens))
    n1, n2 = (sum(count == k for count in pairs.values()) for k in (1, 2))
    d = n1 / (n1 + 2 * n2)
    q = (sum(pair[1] == b for pair in pairs) + 1) / (len(pairs) + V)
    total = sum(count for pair, count in pairs.items() if pair[0] == a)
    if not total:
        return q
    kinds = sum(pair[0] == a for pair in pairs)
    return max(pairs[a, b] - d, 0) / total + d * kinds / total * q


def test_bigram_probabilities_are_those_of_the_formula_and_sum_to_one():
    V = 12
    tokens = np.random.default_rng(0).integers(0, V - 2, 60).astype(np.uint16)  # two never occur
    model = Bigram(tokens, V)
    first, second = np.divmod(np.arange(V * V), V)
    prob = model.probability(first, second)
    expected = [bigram_by_the_formula(tokens.tolist(), V, a, b) for a in range(V) for b in range(V)]
    np.testing.assert_allclose(prob, expected, rtol=1e-12)
    np.testing.assert_allclose(prob.reshape(V, V).sum(1), 1, rtol=1e-12)
    assert prob.min() > 0


def test_bigram_finds_the_entropy_of_a_markov_chain():
    rng = np.random.default_rng(0)
    matrix = rng.dirichlet(np.ones(5) * 0.3, size=5)
    tokens = [0]
    for _ in range(40_000):
        tokens.append(int(rng.choice(5, p=matrix[tokens[-1]])))
    array = np.array(tokens, dtype=np.uint16)
    truth = -np.log(matrix[array[30_000:-1], array[30_001:]]).mean()
    assert Bigram(array[:30_000], 5).loss(array[30_000:]) == pytest.approx(truth, abs=0.005)
    assert truth < 0.9 * math.log(5), "or the chain would be too easy to match"
