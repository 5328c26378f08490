"""GPT-2 in Hugging Face's format: a folder of config.json and safetensors, read and written.

Nothing is downloaded, and nothing in a folder is executed: JSON and safetensors are read, a pickle
never. The names of the parameters are ours. Their four projections of a block are transposed,
(in, out), the tied matrix is there once, and base models leave out the prefix "transformer.".
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.files import atomic_folder

from .config import GPTConfig
from .errors import CheckpointError, UsageError, require
from .model import GPT
from .tokenizer import BPETokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"

# GPT-2's config.json: what it says of the sizes, in GPTConfig's names and under another name, and
# what a key that is not there means.
_SIZES = {
    "vocab_size": ("vocab_size", None, 50257),
    "block_size": ("n_positions", "max_position_embeddings", 1024),
    "n_layer": ("n_layer", "num_hidden_layers", 12),
    "n_head": ("n_head", "num_attention_heads", 12),
    "n_embd": ("n_embd", "hidden_size", 768),
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_DROPOUT = 0.1  # of those that are not there
_EOS = 50256  # likewise

# What a GPT is in every respect but its size; the first is the value where the key is not there.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}

_TRANSPOSED = re.compile(r".*\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # older files hold the causal mask
_BASE = ("wte", "wpe", "h", "ln_f")  # the parts of a base model
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def load_pretrained(
    directory: Path | str,
    *,
    dropout: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """The GPT of a folder, in eval mode; see `GPT.from_pretrained`."""
    directory = Path(directory)
    config = read_config(directory, dropout)
    tensors = _read_tensors(directory)
    _tie(directory, tensors)
    with torch.device("meta"):
        model = GPT(config)
    expected = {
        name: parameter.T.shape if _TRANSPOSED.fullmatch(name) else parameter.shape
        for name, parameter in model.named_parameters()
    }
    _compare_names(directory, tensors, expected)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {tuple(tensors[name].shape)}, and {CONFIG} "
                f"makes it {tuple(shape)}"
            )
    dtype = dtype or _common_dtype(directory, tensors)
    for name in expected:
        tensor = tensors.pop(name)
        # A copy in any case: what safetensors gives may be the file itself, in memory.
        tensor = tensor.T if _TRANSPOSED.fullmatch(name) else tensor
        tensors[name] = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
    model.load_state_dict({_HEAD: tensors[_EMBEDDING], **tensors}, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def save_pretrained(
    model: GPT, directory: Path | str, *, tokenizer: BPETokenizer | None = None
) -> None:
    """Write a folder that `load_pretrained` and `transformers` read; see `GPT.save_pretrained`."""
    if model.lm_head.weight is not model.transformer.wte.weight:
        raise UsageError(
            f"{_HEAD} is not {_EMBEDDING}: expected the tied matrix, as GPT.__init__ makes it"
        )
    save_file = require("safetensors.torch").save_file
    tensors = {
        name: (parameter.T if _TRANSPOSED.fullmatch(name) else parameter).detach().cpu()
        for name, parameter in model.named_parameters()
    }
    config = model.config
    content = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, (theirs, _, _) in _SIZES.items()},
        "n_inner": None,
        **dict.fromkeys(_DROPOUTS, config.dropout),
        **{key: values[0] for key, values in _FIXED.items() if values[0] is not None},
        # Or `transformers` would assume token 50256, which need not exist.
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": str(tensors[_EMBEDDING].dtype).removeprefix("torch."),
    }
    with atomic_folder(Path(directory)) as folder:
        _write_json(folder / CONFIG, content)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer.serialized, encoding="utf-8")
            # The class of any tokenizer.json; of GPT-2's own `transformers` expects its files.
            settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
            _write_json(folder / "tokenizer_config.json", settings)


def read_config(directory: Path, dropout: float | None = None) -> GPTConfig:
    """The GPTConfig that a folder's config.json asks for.

    Raises CheckpointError for whatever our GPT is not, with key, value and what was expected.
    """
    path = directory / CONFIG
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder (models are not downloaded)")
    saved = _read_json(path)
    if saved.get("model_type") != "gpt2":
        raise CheckpointError(
            f"{path}: model_type is {saved.get('model_type')!r}, expected 'gpt2', the only one"
        )
    for key, expected in _FIXED.items():
        _check_value(path, key, saved.get(key, expected[0]), expected)
    sizes = {}
    for ours, (theirs, alias, default) in _SIZES.items():
        key = alias if alias is not None and alias in saved and theirs not in saved else theirs
        value = saved.get(key, default)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path}: {key} is {value!r}, expected a whole number above 0")
        sizes[ours] = value
    _check_value(path, "n_inner", saved.get("n_inner"), (None, 4 * sizes["n_embd"]))
    if dropout is None:
        dropouts = {key: saved.get(key, _DROPOUT) for key in _DROPOUTS}
        dropout = dropouts[_DROPOUTS[0]]
        number = isinstance(dropout, int | float)
        if not number or any(each != dropout for each in dropouts.values()):
            raise CheckpointError(
                f"{path}: {dropouts}, expected one number for all three; for another pass dropout="
            )
    try:
        return GPTConfig(**sizes, dropout=float(dropout))
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_tokenizer(directory: Path) -> BPETokenizer:
    """The tokeniser of a folder's tokenizer.json. Raises CheckpointError if it is not as GPT-2's:
    byte-level byte-pair encoding.
    """
    path = directory / TOKENIZER
    saved = json.dumps(_read_json(path))
    library = require("tokenizers")
    try:
        found = library.Tokenizer.from_str(saved)
        kinds = type(found.model).__name__, type(found.decoder).__name__
        tokenizer = BPETokenizer(saved) if kinds == ("BPE", "ByteLevel") else None
    except Exception as error:  # the library has no class of its own for what it raises
        raise CheckpointError(f"{path}: not a tokenizer that can be read ({error})") from error
    if tokenizer is None:
        raise CheckpointError(
            f"{path}: the model is {kinds[0]} and the decoder {kinds[1]}, "
            "expected GPT-2's, BPE and ByteLevel"
        )
    return tokenizer


def read_stop_tokens(directory: Path) -> list[int]:
    """The tokens that end a text: eos_token_id of generation_config.json, or of config.json."""
    for name in (GENERATION, CONFIG):
        if (directory / name).is_file():
            path, saved = directory / name, _read_json(directory / name)
            eos = saved.get("eos_token_id", _EOS if name == CONFIG else None)
            tokens = eos if isinstance(eos, list) else [] if eos is None else [eos]
            if not all(type(token) is int for token in tokens):
                raise CheckpointError(
                    f"{path}: eos_token_id is {eos!r}, expected a token, a list of them, or null"
                )
            if tokens or "eos_token_id" in saved:
                return tokens
    return []


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of all files, by our names; the causal masks of older files are left out."""
    tensors: dict[str, Tensor] = {}
    for path, names in _files(directory).items():
        with _reading(path) as file:
            present = set(file.keys())
            if names is not None and present != names:
                name = min(present ^ names)
                where = "not in the file" if name in names else "not in the index for this file"
                raise CheckpointError(f"{path}: {name} is {where}; {INDEX} does not fit it")
            for theirs in sorted(present):
                bare = theirs.removeprefix("transformer.")
                if _MASK.fullmatch(bare):
                    continue
                ours = f"transformer.{bare}" if bare.split(".")[0] in _BASE else theirs
                if ours in tensors:
                    raise CheckpointError(
                        f"{path}: {bare} is there twice, with and without the prefix 'transformer.'"
                    )
                tensors[ours] = file.get_tensor(theirs)
    return tensors


def _files(directory: Path) -> dict[Path, set[str] | None]:
    """The files of the weights, and which tensors each should hold, if an index says so."""
    if (directory / WEIGHTS).is_file():
        return {directory / WEIGHTS: None}
    path = directory / INDEX
    if not path.is_file():
        pickles = [p.name for p in sorted(directory.glob("pytorch_model*.bin"))]
        found = (
            f"only {pickles[0]}, a pickle, which could execute anything and is not read: have "
            "`transformers` write it again with save_pretrained"
            if pickles
            else "neither"
        )
        raise CheckpointError(f"{directory}: expected {WEIGHTS} or {INDEX}, found {found}")
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {weight_map!r}, expected names of files")
    files: dict[Path, set[str]] = {}
    for name, file in sorted(weight_map.items()):
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{path}: weight_map[{name!r}] is {file!r}, expected a .safetensors file beside it"
            )
        if not (directory / file).is_file():
            raise CheckpointError(f"{path}: weight_map[{name!r}] is {file!r}, no such file")
        files.setdefault(directory / file, set()).add(name)
    return dict(files)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The open safetensors file; what it raises becomes a CheckpointError that names the file."""
    safetensors = require("safetensors")
    require("safetensors.torch")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def _tie(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Take out the output layer, which some files hold beside the embedding: it has to be that."""
    head, embedding = tensors.pop(_HEAD, None), tensors.get(_EMBEDDING)
    if head is None or embedding is None:
        return
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise CheckpointError(
            f"{directory}: {_HEAD} {tuple(head.shape)} differs from {_EMBEDDING} "
            f"{tuple(embedding.shape)}, expected the same: the output layer is the embedding"
        )


def _compare_names(
    directory: Path, found: dict[str, Tensor], expected: dict[str, torch.Size]
) -> None:
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    parts = [
        f"{len(names)} {kind}, such as {min(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{directory}: expected the {len(expected)} parameters that {CONFIG} makes, "
            f"found {len(found)}: {'; '.join(parts)}"
        )


def _common_dtype(directory: Path, tensors: dict[str, Tensor]) -> torch.dtype:
    """The type of all parameters, a floating-point one."""
    dtype = tensors[_EMBEDDING].dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise CheckpointError(
                f"{directory}: {name} is {tensor.dtype} and {_EMBEDDING} {dtype}, expected one "
                "floating-point type for all; to convert them pass dtype="
            )
    return dtype


def _check_value(path: Path, key: str, value: Any, expected: tuple[Any, ...]) -> None:
    if not any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in expected
    ):
        wanted = " or ".join(map(repr, expected))
        raise CheckpointError(f"{path}: {key} is {value!r}, expected {wanted}, as this GPT has it")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is {path.parent} the folder of a model?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {type(content).__name__}, expected a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
