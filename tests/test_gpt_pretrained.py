"""The reference GPT and Hugging Face's GPT-2: folders of one, read and written by the other."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgpt.gpt import GPT, GPTConfig
from fastgpt.gpt.errors import CheckpointError, MissingExtraError, UsageError
from fastgpt.gpt.model import attention_function
from fastgpt.gpt.pretrained import read_stop_tokens, read_tokenizer
from fastgpt.gpt.tokenizer import BPETokenizer

SMALL = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=4, n_embd=32, dropout=0.1)
TOKENS = torch.arange(3 * 16).reshape(3, 16) * 7 % 61


@pytest.fixture(scope="module")
def transformers():
    import transformers  # seconds

    return transformers


@torch.no_grad()
def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """All parameters as large as matters: also the biases, which are 0 at first."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.4)
    return model.eval()


def theirs(transformers, cls: str = "GPT2LMHeadModel", **settings: Any) -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=None, eos_token_id=None, **settings,
    )  # fmt: skip
    return randomized(getattr(transformers, cls)(config))


def ours() -> GPT:
    return randomized(GPT(SMALL))


@pytest.fixture(scope="module")
def saved(transformers, tmp_path_factory) -> Path:
    """A folder that transformers wrote; not to be changed."""
    folder = tmp_path_factory.mktemp("gpt2") / "theirs"
    theirs(transformers).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of ours, to be changed."""
    ours().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def shard(folder: Path, files: int = 2) -> dict[str, str]:
    """Spread the weights over files with an index; the index's weight_map."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {key: tensors[key].clone() for key in sorted(tensors)[i::files]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    output = model(TOKENS)
    return output.logits if hasattr(output, "logits") else output[0]


def assert_same_model(a: GPT, b: GPT) -> None:
    assert a.config == b.config
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    for (name, x), (other, y) in pairs:
        assert name == other
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name


@pytest.mark.parametrize("attention", ["fused", "torch"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_logits_are_those_of_transformers(transformers, saved, dtype, tolerance, attention):
    model = GPT.from_pretrained(saved, dtype=dtype)
    model.use_attention(attention_function(attention))
    expected = logits_of(transformers.GPT2LMHeadModel.from_pretrained(saved, dtype=dtype))
    assert expected.std() > 1, "or equal logits would mean little"
    assert expected.dtype == dtype
    torch.testing.assert_close(logits_of(model), expected, rtol=tolerance, atol=10 * tolerance)


def test_the_loss_and_its_gradients_are_those_of_transformers(transformers, saved):
    model = GPT.from_pretrained(saved, dtype=torch.float64)
    peer = transformers.GPT2LMHeadModel.from_pretrained(saved, dtype=torch.float64)
    loss = model(TOKENS[:, :-1], TOKENS[:, 1:])[1]
    expected = peer(TOKENS, labels=TOKENS).loss
    # Conv1D's loss is in float32, whatever the model's type.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, check_dtype=False)
    loss.backward()
    expected.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in peer.named_parameters():
        gradient = gradients[name].grad
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            gradient = gradient.T
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


def test_a_loaded_model_is_tied_in_eval_mode_and_of_the_files_sizes_and_type(saved):
    model = GPT.from_pretrained(str(saved))
    assert model.config == SMALL
    assert not model.training
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(p.is_contiguous() and p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert GPT.from_pretrained(saved, dropout=0.0).config.dropout == 0


def test_a_base_model_whose_names_have_no_prefix_loads(transformers, tmp_path):
    base = theirs(transformers, "GPT2Model")
    base.save_pretrained(tmp_path / "base")
    assert "wte.weight" in load_file(tmp_path / "base" / "model.safetensors")
    model = GPT.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = base(TOKENS).last_hidden_state
        torch.testing.assert_close(model.features(TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_weights_in_several_files_load(transformers, saved, tmp_path):
    theirs(transformers).save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert_same_model(GPT.from_pretrained(tmp_path / "parts"), GPT.from_pretrained(saved))


def test_masks_and_a_second_copy_of_the_tied_matrix_in_older_files_are_passed_over(folder):
    def older(tensors):
        for layer in range(2):
            mask = torch.ones(16, 16).tril()[None, None]
            tensors[f"transformer.h.{layer}.attn.bias"] = mask
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    change_tensors(folder, older)
    assert_same_model(GPT.from_pretrained(folder), ours())


def test_older_names_of_the_sizes_are_understood_and_absent_ones_are_gpt2s(folder):
    content = json.loads((folder / "config.json").read_text())
    for name, other in [("n_embd", "hidden_size"), ("n_positions", "max_position_embeddings")]:
        content[other] = content.pop(name)
    for name in ("activation_function", "layer_norm_epsilon", "resid_pdrop", "n_inner"):
        del content[name]
    (folder / "config.json").write_text(json.dumps(content))
    assert_same_model(GPT.from_pretrained(folder), ours())
    del content["vocab_size"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"wte.weight has shape \(61, 32\).*\(50257, 32\)"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("cls", ["GPT2LMHeadModel", "AutoModelForCausalLM"])
def test_transformers_loads_what_we_save_with_equal_logits(transformers, tmp_path, cls):
    model = ours().double()
    model.save_pretrained(tmp_path / "gpt2")
    peer, loading = getattr(transformers, cls).from_pretrained(
        tmp_path / "gpt2", dtype="auto", output_loading_info=True
    )
    assert type(peer) is transformers.GPT2LMHeadModel
    assert not any(loading.values()), "no key missing, unexpected, misshapen"
    torch.testing.assert_close(logits_of(model), logits_of(peer), rtol=1e-12, atol=1e-11)
    config = peer.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.1, 0.1, 0.1)
    assert (config.bos_token_id, config.eos_token_id) == (None, None), "not GPT-2's 50256"


def test_transformers_loads_what_we_save_as_a_base_model(transformers, tmp_path):
    model = ours()
    model.save_pretrained(tmp_path / "gpt2")
    base = transformers.GPT2Model.from_pretrained(tmp_path / "gpt2")
    with torch.no_grad():
        expected = base(TOKENS).last_hidden_state
        torch.testing.assert_close(model.features(TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_model_comes_back_bit_for_bit_and_in_its_type(tmp_path, dtype):
    model = ours().to(dtype)
    model.save_pretrained(tmp_path / "new" / "gpt2")
    loaded = GPT.from_pretrained(tmp_path / "new" / "gpt2")
    assert_same_model(loaded, model)
    assert json.loads((tmp_path / "new" / "gpt2" / "config.json").read_text())["dtype"] in str(
        dtype
    )


def test_a_loaded_model_does_not_change_with_its_file(folder):
    model = GPT.from_pretrained(folder)
    with (folder / "model.safetensors").open("rb+") as file:
        file.write(bytes(file.seek(0, 2)))
        file.seek(0)
        file.write(bytes(file.seek(0, 2)))
    assert_same_model(model, ours())


def test_loading_and_saving_draw_no_random_numbers(folder, tmp_path):
    state = torch.get_rng_state()
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'gpt2'"),
        ({"activation_function": "relu"},
         "activation_function is 'relu', expected 'gelu_new' or 'gelu_pytorch_tanh'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', expected 'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, expected 1e-05"),
        ({"n_inner": 64}, "n_inner is 64, expected None or 128"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, expected True"),
        ({"scale_attn_by_inverse_layer_idx": True},
         "scale_attn_by_inverse_layer_idx is True, expected False"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True, expected False"),
        ({"add_cross_attention": True}, "add_cross_attention is True, expected False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, expected True"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected True"),
        ({"quantization_config": {"bits": 4}},
         r"quantization_config is \{'bits': 4\}, expected None"),
        ({"n_embd": "32"}, "n_embd is '32', expected a whole number above 0"),
        ({"vocab_size": True}, "vocab_size is True, expected a whole number above 0"),
        ({"n_layer": 0}, "n_layer is 0, expected a whole number above 0"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head, got n_embd=32 and n_head=5"),
        ({"attn_pdrop": 0.0}, r"'attn_pdrop': 0.0\}, expected one number .* pass dropout="),
        ({"resid_pdrop": 1.0, "attn_pdrop": 1.0, "embd_pdrop": 1.0},
         r"dropout must be in \[0, 1\), got 1.0"),
        ({"n_layer": 3}, "expected the 40 parameters .*, found 28: 12 missing, such as "
                         "transformer.h.2.attn.c_attn.bias"),
        ({"n_layer": 1}, "found 28: 12 unexpected, such as transformer.h.1.attn.c_attn.bias"),
        ({"n_positions": 12}, r"wpe.weight has shape \(16, 32\), and .* makes it \(12, 32\)"),
        ({"n_embd": 64},
         r"h.0.attn.c_attn.weight has shape \(32, 96\), and .* makes it \(64, 192\)|"
         r"wte.weight has shape \(61, 32\), and .* makes it \(61, 64\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_model_that_ours_is_not_is_refused_with_key_and_values(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        GPT.from_pretrained(folder)
    assert str(caught.value).startswith(str(folder)), "which file"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"),
         "28 parameters .*, found 27: 1 missing, such as transformer.h.1.ln_2.bias$"),
        (lambda t: t.update({"score.weight": torch.ones(2, 32)}),
         "found 29: 1 unexpected, such as score.weight$"),
        (lambda t: t.update({"wte.weight": torch.ones(61, 32)}),
         "wte.weight is there twice, with and without the prefix 'transformer.'"),
        (lambda t: t.update({"lm_head.weight": torch.ones(61, 32)}),
         "lm_head.weight .* differs from transformer.wte.weight .* the output layer is the"),
        (lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].half()}),
         "lm_head.weight .* differs from transformer.wte.weight"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.ones(32).half()}),
         "ln_f.bias is torch.float16 and .* torch.float32, expected one .* pass dtype="),
        (lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(128, 32)}),
         r"mlp.c_fc.weight has shape \(128, 32\), and config.json makes it \(32, 128\)"),
        (lambda t: t.update({n: x.to(torch.int8) for n, x in t.items()}),
         "is torch.int8 .* expected one floating-point type"),
        (lambda t: t.clear(), "found 0: 28 missing"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused_by_name(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: not JSON"),
        ("[]", "config.json: list, expected a JSON object"),
        ("[" * 100_000, "config.json: not JSON"),
    ],
    ids=["half", "list", "deep"],
)
def test_a_config_that_is_no_json_object_is_refused(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        GPT.from_pretrained(folder)


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"gpt2-xl: no such folder \(models are not downl"):
        GPT.from_pretrained("gpt2-xl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty/config.json: no such file"):
        GPT.from_pretrained(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or .*, found neither"):
        GPT.from_pretrained(folder)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_read(folder, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    (folder / "pytorch_model.bin").write_bytes(bomb)
    assert_same_model(GPT.from_pretrained(folder), ours())
    (folder / "model.safetensors").unlink()
    message = r"found only pytorch_model.bin, a pickle, .* is not read"
    with pytest.raises(CheckpointError, match=message):
        GPT.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        GPT.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()
    pickle.loads(bomb)
    assert (tmp_path / "executed").exists(), "or the pickle was harmless"


def test_an_index_that_does_not_fit_its_files_is_refused(folder):
    weight_map = shard(folder)
    assert_same_model(GPT.from_pretrained(folder), ours())
    name = "transformer.h.0.ln_1.bias"
    first, second = sorted(set(weight_map.values()))
    for changed, message in [
        ({**weight_map, name: second if weight_map[name] == first else first}, f"{name} is not in"),
        ({n: f for n, f in weight_map.items() if n != name}, f"{name} is not in the index"),
        ({**weight_map, "h.9.x": first}, r"h.9.x is not in the file"),
        ({**weight_map, name: "../gpt2/model.safetensors"}, "expected a .safetensors file beside"),
        ({**weight_map, name: "pytorch_model.bin"}, "expected a .safetensors file beside it"),
        ({**weight_map, name: 3}, "is 3, expected a .safetensors file beside it"),
        ({**weight_map, name: "model-3.safetensors"}, "is 'model-3.safetensors', no such file"),
        ({}, r"weight_map is \{\}, expected names of files"),
        ([], r"weight_map is \[\], expected names of files"),
    ]:
        write_index(folder, changed)
        with pytest.raises(CheckpointError, match=message):
            GPT.from_pretrained(folder)


def test_a_folder_that_holds_something_is_not_written_into(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"gpt2 is there already: expected a new or an empty"):
        randomized(GPT(GPTConfig(61, 16, 1, 4, 32))).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(FileExistsError, match=r"config.json is there already"):
        ours().save_pretrained(folder / "config.json")
    assert [path.name for path in folder.parent.iterdir()] == ["gpt2"], "nothing is left over"


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(OSError, match="no space left"):
        ours().save_pretrained(tmp_path / "gpt2")
    assert list(tmp_path.rglob("*")) == [tmp_path / "gpt2"]
    monkeypatch.undo()
    ours().save_pretrained(tmp_path / "gpt2")
    assert_same_model(GPT.from_pretrained(tmp_path / "gpt2"), ours())


def test_a_saved_file_says_that_it_is_pytorchs(folder):
    """transformers 4 refuses one that does not."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_saved_files_have_the_modes_of_ordinary_ones(folder):
    (folder / "ordinary").touch()
    (folder / "ordinary folder").mkdir()
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == modes["ordinary"]
    assert folder.stat().st_mode == modes["ordinary folder"]


def test_an_output_layer_that_is_not_the_embedding_is_not_saved(tmp_path):
    model = ours()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(UsageError, match=r"lm_head.weight is not transformer.wte.weight"):
        model.save_pretrained(tmp_path / "gpt2")
    assert not (tmp_path / "gpt2").exists()


@pytest.mark.parametrize("use", [
    lambda path: GPT.from_pretrained(path), lambda path: ours().save_pretrained(path / "new"),
])  # fmt: skip
def test_without_safetensors_the_error_names_the_extra(folder, monkeypatch, use):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError, match=r"safetensors.*pip install .*fastgpt\[gpt\]"):
        use(folder)


TEXT = "naïve café, 東京 🦊: def f(x):\n    return  x\t# "


def hugging_face_tokenizer():
    """One like GPT-2's, with a special token."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(BPETokenizer.train([TEXT] * 3, 290).serialized)
    tokenizer.add_special_tokens(["<|end of text|>"])
    return tokenizer


def test_a_tokenizer_json_encodes_and_decodes_as_the_library_does(tmp_path):
    library = hugging_face_tokenizer()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    end = library.token_to_id("<|end of text|>")
    ids = tokenizer.encode([TEXT + "<|end of text|>" + TEXT])[0].tolist()
    assert ids == library.encode(TEXT + "<|end of text|>" + TEXT).ids
    assert ids.count(end) == 1
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == TEXT + "<|end of text|>" + TEXT
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert tokenizer.token_bytes(tokenizer.vocab_size + 3) == b"", "padding of a vocabulary"


def test_transformers_reads_the_tokenizer_that_we_save(transformers, tmp_path):
    tokenizer = BPETokenizer.train([TEXT] * 3, 290)
    GPT(GPTConfig(tokenizer.vocab_size, 16, 1, 2, 16)).save_pretrained(
        tmp_path / "gpt2", tokenizer=tokenizer
    )
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    ids = tokenizer.encode([TEXT])[0].tolist()
    assert peer(TEXT)["input_ids"] == ids
    assert peer.decode(ids) == TEXT
    assert read_tokenizer(tmp_path / "gpt2").encode([TEXT])[0].tolist() == ids


def test_an_older_tokenizer_json_that_does_not_name_its_model_is_read(tmp_path):
    library = hugging_face_tokenizer()
    content = json.loads(library.to_str())
    del content["model"]["type"]
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_tokenizer(tmp_path).encode([TEXT])[0].tolist() == library.encode(TEXT).ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}},
         "the model is WordLevel and the decoder ByteLevel, expected GPT-2's, BPE and ByteLevel"),
        ({"decoder": None}, "the model is BPE and the decoder NoneType, expected GPT-2's"),
        ({"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}, "and the decoder BPEDecoder"),
        ({"kind": "byte", "model": None}, "tokenizer.json: not a tokenizer that can be read"),
        ({"model": {"type": "BPE", "vocab": 3}}, "tokenizer.json: not a tokenizer that can be"),
        ({"model": {"type": "BPE", "vocab": {"a b": 0}, "merges": []}}, "not a tokenizer that can"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_not_gpt2s_is_refused(tmp_path, changes, message):
    content = json.loads(hugging_face_tokenizer().to_str()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, None, [5]),
        ({"eos_token_id": None}, None, []),
        ({}, None, [50256]),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 8]}, [7, 8]),
        ({"eos_token_id": 5}, {"eos_token_id": None}, []),
        ({"eos_token_id": 5}, {"do_sample": True}, [5]),
    ],
)
def test_a_text_ends_where_the_folder_says(tmp_path, config, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_stop_tokens(tmp_path) == expected
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match="eos_token_id is 'x', expected a token"):
        read_stop_tokens(tmp_path)
