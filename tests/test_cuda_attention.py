"""What only the CUDA kernels of attention have, in their host twin: their tiles, their head dims,
the two ways in which a tile is copied, and their barriers.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import twin
from attention_cases import Sizes, boundaries, kept, sinks, slopes
from backends import HOPPER, TWIN, activate
from oracle import (
    REDUCED_DTYPES,
    attention_results,
    exact_attention_options,
    half_ulp,
    random_like,
    random_qkv,
    upstream_for,
)

PROGRAM = Path(__file__).parent / "cuda_attention.cpp"
NAN, INF, SEED = math.nan, math.inf, 11
# Of queries, and of keys: the forward's block has 128 queries, the others' 64, and a tile of what
# is walked 64 or 32.
BLOCK, TILE = 128, 64


@pytest.fixture
def on_ampere():
    yield from activate(TWIN)


@pytest.fixture(params=["ampere", "hopper"])
def on_twin(request):
    """The kernels of both generations."""
    yield from activate(HOPPER if request.param == "hopper" else TWIN)


def results(backend, inputs, **options):
    upstream = upstream_for(inputs[0], inputs[2])
    upstream_lse = random_like(upstream[..., 0].float(), 2)
    grouped = inputs[0].shape[1] != inputs[1].shape[1]
    torch.manual_seed(SEED)
    return attention_results(
        backend.attention, inputs, upstream, upstream_lse, enable_gqa=grouped, **options
    )


def assert_exact(backend, inputs, **options):
    """As the other backends: within 64 half ulps of float32 and six of their own, relative to the
    largest magnitude.
    """
    got = results(backend, inputs, **options)
    query, key, _ = inputs
    upstream = upstream_for(inputs[0], inputs[2])
    upstream_lse = random_like(upstream[..., 0].float(), 2)
    if options.get("dropout_p"):
        n = Sizes(*query.shape[:3], key.shape[2], query.dtype)
        options["keep"] = kept("cpu", n, options["dropout_p"], SEED)
    truth = exact_attention_options(*inputs, upstream, upstream_lse, **options)
    tolerance = 64 * half_ulp(torch.float32) + 6 * half_ulp(query.dtype)
    for name, ours in got.items():
        want = torch.from_numpy(getattr(truth, name)).double()
        bounded = want.isfinite()
        assert torch.equal(ours.double()[~bounded], want[~bounded]), name
        error = (ours.double() - want)[bounded].abs().max()
        assert error <= tolerance * max(1.0, want[bounded].abs().max()), name
    return got


LENGTHS = [
    (1, 1), (1, TILE + 1), (TILE - 1, TILE), (TILE, TILE - 1), (TILE + 1, 1), (BLOCK, BLOCK),
    (BLOCK - 1, TILE + 1), (BLOCK + 1, 2 * TILE + 3), (2 * BLOCK + 3, 2 * TILE),
]  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("L", "S"), LENGTHS)
def test_the_end_of_a_tile_is_wrong(on_twin, L, S, is_causal):
    inputs = random_qkv(1, 1, 1, L, S, 64, 64, dtype=torch.bfloat16)
    assert_exact(on_twin, inputs, is_causal=is_causal, causal_alignment="bottom_right")


@pytest.mark.parametrize("dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_a_head_dim_is_wrong(on_twin, head_dim, dtype):
    """The tiles of each, several each way, with a remainder."""
    L, S = (BLOCK + 3, TILE + 3) if head_dim < 256 else (TILE + 3, TILE + 3)
    inputs = random_qkv(1, 2, 1, L, S, head_dim, head_dim, dtype=dtype)
    assert_exact(on_twin, inputs, is_causal=True)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(1, 1), (33, 7), (72, 40), (100, 128), (8, 136)]
)
def test_a_head_dim_between_the_widths_is_wrong(on_twin, head_dim, value_dim):
    inputs = random_qkv(1, 1, 1, 20, 70, head_dim, value_dim, dtype=torch.float16)
    assert_exact(on_twin, inputs)


def everything(n: Sizes) -> dict:
    return {
        "softcap": 3.0, "alibi_slopes": slopes(n), "sinks": sinks(n), "dropout_p": 0.2,
        "causal_alignment": "bottom_right",
    }  # fmt: skip


# Whatever hides keys, each with a tile that is hidden, one that is seen, and one between.
SIGHTS = {
    "all": lambda n: {},
    "window": lambda n: {"window": (TILE + 9, 5)},
    "causal window": lambda n: {"window": (3, -1), "is_causal": True},
    "documents": lambda n: {
        "cu_seqlens_q": boundaries(n.L, 0.1, 0.1, 0.6), "is_causal": True,
        "cu_seqlens_k": boundaries(n.S, 0.2, 0.5, 0.5),
    },
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("name", SIGHTS)
def test_an_option_is_wrong_beside_what_hides_keys(on_twin, name, head_dim):
    """On groups of query heads, and where the pass over the keys is two kernels."""
    L, S = (BLOCK + 5, 3 * TILE + 1) if head_dim == 64 else (TILE + 5, TILE + 37)
    n = Sizes(1, 2, L, S, torch.float16)
    inputs = random_qkv(1, 2, 1, L, S, head_dim, head_dim, dtype=n.dtype)
    assert_exact(on_twin, inputs, **SIGHTS[name](n), **everything(n))


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_hidden_key_or_query_reaches_a_result(on_twin, poison, head_dim):
    """The window hides key j from all but a few queries; the others' results keep their bits. And
    what is seen is as infinite as it is in torch.
    """
    L = S = TILE + 6
    j = TILE - 1
    inputs = random_qkv(1, 1, 1, L, S, head_dim, head_dim, dtype=torch.bfloat16)
    options = {"window": (2, 1)}
    clean = results(on_twin, inputs, **options)
    query, key, value = (x.clone() for x in inputs)
    value[:, :, j, 5] = poison
    got = results(on_twin, (query, key, value), **options)
    place = torch.arange(L)
    sees = (j >= place - 2) & (j <= place + 1)
    for name in ("output", "lse", "grad_query"):
        assert torch.equal(got[name][:, :, ~sees], clean[name][:, :, ~sees]), name
    column = got["output"][:, :, sees, 5]
    assert torch.equal(column.isnan(), torch.full_like(column, math.isnan(poison)).bool())
    assert column.isnan().all() or (column == poison).all()
    query, key, value = (x.clone() for x in inputs)
    query[:, :, j, 5] = poison
    got = results(on_twin, (query, key, value), **options)
    place = torch.arange(S)
    seen = (place >= j - 2) & (place <= j + 1)
    for name in ("grad_key", "grad_value"):
        assert torch.equal(got[name][:, :, ~seen], clean[name][:, :, ~seen]), name
    assert got["grad_key"][:, :, seen].isnan().any()


@pytest.mark.parametrize("head_dim", [64, 80])
def test_rows_that_are_not_aligned_have_other_bits(on_ampere, head_dim):
    """They are copied one by one, the others by vectors."""
    inputs = random_qkv(1, 2, 1, 70, 67, head_dim, head_dim, dtype=torch.bfloat16)
    shifted = []
    for x in inputs:
        room = torch.full((*x.shape[:-1], head_dim + 3), NAN, dtype=x.dtype)
        room[..., 1:-2] = x
        shifted.append(room[..., 1:-2])
    got, want = (results(on_ampere, x, is_causal=True) for x in (shifted, inputs))
    for name, ours in got.items():
        assert torch.equal(ours, want[name]), name


def test_a_head_changes_the_bits_of_another(on_twin):
    inputs = random_qkv(2, 4, 2, 40, 50, 64, 64, dtype=torch.bfloat16)
    upstream = upstream_for(inputs[0], inputs[2])
    upstream_lse = random_like(upstream[..., 0].float(), 2)

    def run(batch, heads, key_heads):
        parts = [x[batch, h] for x, h in zip(inputs, (heads, key_heads, key_heads), strict=True)]
        return attention_results(
            on_twin.attention, parts, upstream[batch, heads], upstream_lse[batch, heads],
            enable_gqa=True, is_causal=True,
        )  # fmt: skip

    together = run(slice(None), slice(None), slice(None))
    alone = run(slice(1, 2), slice(2, 4), slice(1, 2))
    for name, ours in alone.items():
        heads = slice(1, 2) if name in ("grad_key", "grad_value") else slice(2, 4)
        assert torch.equal(ours, together[name][1:2, heads]), name


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": torch.float32}, "expected query, key and value of bfloat16 or float16"),
        ({"D": 257}, "expected heads of at most 256 columns, got 257 and 8"),
        ({"mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "expected no attn_mask"),
    ],
)
def test_the_operator_takes_what_its_kernels_cannot_do(on_twin, changed, reason):
    shape = {"dtype": torch.bfloat16, "D": 8, "mask": None, **changed}
    inputs = random_qkv(1, 1, 1, 3, 3, shape["D"], 8, dtype=shape["dtype"])
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        twin.attention_launcher().forward(
            *inputs, shape["mask"], None, None, None, None, 1 << 30, 1 << 30, 0, 1.0, 0.0, 0.0
        )


@pytest.mark.slow
def test_a_missing_barrier_or_wait_goes_unnoticed(tmp_path):
    """Each of them is left out of the kernels in turn, on the host: the twin must find that."""
    run = twin.run_program(PROGRAM, tmp_path, "-Wall", "-Wextra", "-Werror")
    assert run.returncode == 0, run.stdout + run.stderr
    left_out = re.findall(r"^(\w+) without (\w+) (\d+): (.*)$", run.stdout, re.M)
    assert {kernel for kernel, *_ in left_out} == {"forward", "query_gradient", "key_gradient"}
    assert {what for _, what, *_ in left_out} == {"barrier", "wait"}
    unnoticed = [line for line in left_out if line[3] == "passed"]
    assert not unnoticed
