"""Sampling from the reference GPT: the filters, the loop, and the command line."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgpt.gpt import GPT, GPTConfig
from fastgpt.gpt.errors import CheckpointError
from fastgpt.gpt.sample import (
    generate,
    load_run,
    main,
    next_token_probabilities,
    stream_text,
    stream_tokens,
)
from fastgpt.gpt.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt.gpt.train import Trainer, make_trainer

LOGITS = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()[:, [2, 0, 3, 1]]  # p = .3 .1 .2 .4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps as small as these gain nothing from more
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=8, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(30)  # or all tokens would be equally likely
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("def f(x):\n    return x\n" * 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGPT_CACHE", str(folder / "cache"))
        trainer: Trainer = make_trainer(
            {
                "data": str(folder / "text.txt"), "tokenizer": "byte", "steps": 3, "device": "cpu",
                "batch_size": 2, "block_size": 8, "eval_batches": 1, "out": folder / "run",
            }
        )  # fmt: skip
        trainer.run()
    return folder / "run", trainer.model


def test_without_filters_the_distribution_is_the_softmax():
    logits = torch.randn(3, 50)
    torch.testing.assert_close(next_token_probabilities(logits), logits.softmax(1))


def test_temperature_sharpens_and_zero_takes_the_largest():
    logits = torch.randn(3, 50)
    cold = next_token_probabilities(logits, temperature=0.5)
    torch.testing.assert_close(cold, (logits / 0.5).softmax(1))
    greedy = next_token_probabilities(logits, temperature=0)
    assert torch.equal(greedy.argmax(1), logits.argmax(1))
    assert greedy.sum().item() == 3


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, [0, 0, 0, 1]), (2, [3 / 7, 0, 0, 4 / 7]), (9, [0.3, 0.1, 0.2, 0.4])],
)
def test_top_k_keeps_the_k_most_likely_in_proportion(top_k, expected):
    torch.testing.assert_close(
        next_token_probabilities(LOGITS, top_k=top_k), torch.tensor([expected]).float()
    )


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.01, [0, 0, 0, 1]),  # never none
        (0.39, [0, 0, 0, 1]),
        (0.41, [3 / 7, 0, 0, 4 / 7]),  # the one that passes p is in
        (0.71, [3 / 9, 0, 2 / 9, 4 / 9]),
        (1.0, [0.3, 0.1, 0.2, 0.4]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p, expected):
    torch.testing.assert_close(
        next_token_probabilities(LOGITS, top_p=top_p), torch.tensor([expected]).float()
    )


def test_top_p_counts_after_top_k_and_temperature():
    cold = next_token_probabilities(LOGITS, temperature=0.5, top_k=2, top_p=0.6)
    torch.testing.assert_close(cold, torch.tensor([[0.0, 0, 0, 1]]), msg="16/25 reaches 0.6 alone")


def test_top_k_of_all_and_more_filters_nothing():
    logits = torch.randn(3, 50)
    for top_k in (50, 1000):
        torch.testing.assert_close(next_token_probabilities(logits, top_k=top_k), logits.softmax(1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38])
def test_a_very_low_temperature_takes_the_largest_and_is_never_nan(temperature):
    logits = 1e4 * torch.randn(3, 50)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.9}):
        prob = next_token_probabilities(logits, temperature, **filters)
        assert torch.equal(prob, next_token_probabilities(logits, temperature=0))


def test_float64_logits_are_not_rounded_to_float32():
    logits = torch.randn(3, 50, dtype=torch.float64)
    prob = next_token_probabilities(logits, 0.7, top_k=40)
    kept = logits.masked_fill(prob == 0, -math.inf)
    torch.testing.assert_close(prob, (kept / 0.7).softmax(1), rtol=1e-14, atol=0)


def test_equal_logits_leave_exactly_k():
    prob = next_token_probabilities(torch.zeros(1, 6), top_k=2)
    assert sorted(prob.tolist()[0]) == [0, 0, 0, 0, 0.5, 0.5]


def test_greedy_continues_with_the_most_likely_token_of_the_last_context(model):
    idx = torch.randint(256, (2, 5))
    out = generate(model, idx, 10, temperature=0)
    assert out.shape == (2, 15)
    assert torch.equal(out[:, :5], idx)
    model.eval()
    for t in range(5, 15):
        logits = model(out[:, max(0, t - 8) : t])[0][:, -1]  # block_size is 8
        assert torch.equal(out[:, t], logits.argmax(1)), t


def test_the_seed_decides_the_text_and_nothing_else_does(model):
    def text(seed):
        return "".join(stream_text(model, ByteTokenizer(), "ab", 30, temperature=1.0, seed=seed))

    first = text(1)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert text(1) == first
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    assert text(2) != first


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 5}, {"top_p": 0.6}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}],
    ids=str,
)
def test_filtered_draws_follow_the_filtered_distribution(model, settings):
    idx = torch.tensor([[65, 66]]).expand(4000, 2)
    tokens = generate(model, idx, 1, generator=torch.Generator().manual_seed(0), **settings)[:, 2]
    expected = next_token_probabilities(model(idx[:1])[0][:, -1], **settings)[0]
    observed = torch.bincount(tokens, minlength=256) / 4000
    assert torch.equal(observed > 0, expected > 0), "those and no others"
    error = (observed - expected).abs() / (expected * (1 - expected) / 4000).sqrt()
    assert error[expected > 0.002].max() < 5, "within five standard deviations"


def test_draws_follow_the_distribution(model):
    idx = torch.tensor([[65, 66]]).expand(4000, 2)
    tokens = generate(model, idx, 1, generator=torch.Generator().manual_seed(0))[:, 2]
    expected = model(idx[:1])[0][0, -1].softmax(0)
    observed = torch.bincount(tokens, minlength=256) / 4000
    error = (observed - expected).abs() / (expected * (1 - expected) / 4000).sqrt()
    assert error[expected > 0.002].max() < 5, "within five standard deviations"


def test_generating_restores_the_mode_and_records_no_gradient(model):
    model.train()
    tokens = stream_tokens(model, torch.zeros(1, 1, dtype=torch.int64), 3)
    assert not next(tokens).requires_grad
    assert not model.training
    tokens.close()  # as when the reader stops in the middle
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"generator": []}, "1 sequences need one generator or 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_value(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, torch.zeros(1, 1, dtype=torch.int64), 1, **settings)


def test_a_run_loads_as_the_model_that_was_trained(run):
    folder, trained = run
    loaded, tokenizer = load_run(folder)
    assert tokenizer.vocab_size == 256
    assert not loaded.training
    for (name, a), b in zip(trained.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_the_command_writes_the_prompt_and_as_many_tokens_as_asked(run, capsys):
    assert main(["--run", str(run[0]), "--prompt", "def", "--tokens", "20", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("def")
    assert len(first) <= len("def") + 20 + 1, "at most a character a byte, and the line's end"
    main(["--run", str(run[0]), "--prompt", "def", "--tokens", "20", "--seed", "3"])
    assert capsys.readouterr().out == first
    main(["--run", str(run[0]), "--tokens", "5", "--checkpoint", "best"])
    assert capsys.readouterr().out


def test_a_piece_never_ends_within_a_character(model, monkeypatch):
    text = "aé東🦊z"
    tokens = iter(text.encode() + b"\xf0\x9f")  # and half of one at the end
    monkeypatch.setattr(
        "fastgpt.gpt.sample.stream_tokens",
        lambda *args, **settings: (torch.tensor([token]) for token in tokens),
    )
    pieces = list(stream_text(model, ByteTokenizer(), "ab", 20))
    assert [piece for piece in pieces if piece] == [*text, "\ufffd"]


def test_a_text_ends_before_the_token_to_stop_at(model):
    prompt, tokenizer = "ab", ByteTokenizer()
    idx = torch.tensor([list(prompt.encode())])
    new = generate(model, idx, 20, temperature=0)[0, 2:].tolist()
    stop = new[4]
    text = "".join(stream_text(model, tokenizer, prompt, 20, temperature=0, stop=[stop]))
    assert text == tokenizer.decode(new[: new.index(stop)])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder of Hugging Face's format, and its model and tokeniser."""
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(["def f(x):\n    return x\n"] * 3, 300)
    vocab_size = tokenizer.vocab_size + 5  # padded
    model = GPT(GPTConfig(vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(30)
    folder = tmp_path_factory.mktemp("pretrained") / "gpt2"
    model.save_pretrained(folder, tokenizer=tokenizer)
    return folder, model, tokenizer


def test_the_command_writes_with_a_pretrained_folder_until_its_end_of_text(
    pretrained, tmp_path, capsys
):
    folder, model, tokenizer = pretrained
    command = ["--prompt", "def", "--tokens", "20", "--seed", "3", "--device", "cpu"]
    assert main(["--pretrained", str(folder), *command]) == 0
    expected = "".join(stream_text(model, tokenizer, "def", 20, seed=3))
    assert capsys.readouterr().out == f"def{expected}\n"
    ids = torch.tensor([tokenizer.encode(["def"])[0].tolist()])
    new = generate(
        model, ids, 20, temperature=0.8, generator=torch.Generator().manual_seed(3)
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    copy = Path(shutil.copytree(folder, tmp_path / "gpt2"))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": new[6]}))
    assert main(["--pretrained", str(copy), *command]) == 0
    expected = tokenizer.decode(new[: new.index(new[6])])
    assert capsys.readouterr().out == f"def{expected}\n"


def test_a_pretrained_folder_whose_parts_do_not_fit_is_refused(pretrained, tmp_path, capsys):
    copy = Path(shutil.copytree(pretrained[0], tmp_path / "gpt2"))
    larger = BPETokenizer.train([" ".join(map(str, range(1000)))], 500)
    (copy / "tokenizer.json").write_text(larger.serialized)
    with pytest.raises(CheckpointError, match=r"has 500 tokens and the model \d+, expected at lea"):
        main(["--pretrained", str(copy)])
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no such file"):
        main(["--pretrained", str(copy)])
    for wrong in (["--pretrained", str(copy), "--run", "x"], [],
                  ["--pretrained", str(copy), "--checkpoint", "best"]):  # fmt: skip
        with pytest.raises(SystemExit):
            main(wrong)
        assert "--run" in capsys.readouterr().err


def test_text_arrives_piece_by_piece(model):
    pieces = list(stream_text(model, ByteTokenizer(), "ab", 20, temperature=0))
    assert len(pieces) == 21, "one for each token and one for the end"
    assert "".join(pieces)


def test_a_folder_without_a_run_is_an_error_in_one_line(tmp_path):
    command = [sys.executable, "-m", "fastgpt.gpt.sample", "--run", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"error: {tmp_path}/tokenizer.json: no such file; is {tmp_path} the folder of a run?"
    ]
