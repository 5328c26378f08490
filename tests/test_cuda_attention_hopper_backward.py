"""What only Hopper's backward of attention has, in the host twin: two passes, each with a stream of
tiles that two warpgroups multiply at once.
"""

import math

import pytest
import torch
from attention_cases import Sizes, boundaries, sinks, slopes
from backends import HOPPER, activate
from oracle import REDUCED_DTYPES, random_qkv, upstream_for
from test_cuda_attention import assert_exact

NAN, INF = math.nan, math.inf
WIDTHS = (64, 80, 96, 128)
# Rows of a block: queries, or keys; those of a tile of keys, half as many with options, in the pass
# over the queries, and of a tile of queries in that over the keys.
BLOCK, KEYS, QUERIES = 128, 128, 64
GRADIENTS = ("grad_query", "grad_key", "grad_value")


@pytest.fixture
def hopper():
    yield from activate(HOPPER)


def gradients(backend, inputs, upstream, on_hopper=True, **options):
    """Of a forward on Hopper."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = backend.attention(*leaves, **options)
    torch.ops.fastgpt_twin_settings.hopper(on_hopper)
    found = torch.autograd.grad(out, leaves, upstream)
    torch.ops.fastgpt_twin_settings.hopper(True)
    return found


def runs_on_hopper(backend, inputs, upstream=None, **options) -> bool:
    """Whether a backward has other bits than by the kernels of Ampere, which walk tiles of other
    sizes.
    """
    if upstream is None:
        upstream = upstream_for(inputs[0], inputs[2])
    both = (gradients(backend, inputs, upstream, on, **options) for on in (True, False))
    return not all(torch.equal(ours, theirs) for ours, theirs in zip(*both, strict=True))


def everything(n: Sizes) -> dict:
    return {
        "softcap": 3.0, "alibi_slopes": slopes(n), "sinks": sinks(n), "dropout_p": 0.2,
        "causal_alignment": "bottom_right",
    }  # fmt: skip


# ---- tiles, widths and groups ----


@pytest.mark.parametrize("dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
def test_a_tile_of_keys_is_taken_for_another(hopper, tiles, dtype):
    """Of two stages, the parity of which turns after every round; and the two warpgroups have
    different rows.
    """
    inputs = random_qkv(1, 1, 1, QUERIES + 5, tiles * KEYS - 3, 64, 64, dtype=dtype)
    assert runs_on_hopper(hopper, inputs)
    assert_exact(hopper, inputs)


@pytest.mark.parametrize("dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
def test_a_tile_of_queries_is_taken_for_another(hopper, tiles, dtype):
    inputs = random_qkv(1, 1, 1, tiles * QUERIES - 3, QUERIES + 5, 64, 64, dtype=dtype)
    assert_exact(hopper, inputs)


@pytest.mark.parametrize("tiles", [1, 3, 5])
def test_a_tile_is_taken_for_another_with_options(hopper, tiles):
    """Whose tiles of keys are half as long."""
    n = Sizes(1, 1, tiles * QUERIES - 3, (6 - tiles) * KEYS // 2 - 3, torch.bfloat16)
    inputs = random_qkv(1, 1, 1, n.L, n.S, 64, 64, dtype=n.dtype)
    assert_exact(hopper, inputs, **everything(n))


@pytest.mark.parametrize("dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_is_wrong(hopper, width, dtype):
    """Several blocks and tiles each way, with a remainder."""
    inputs = random_qkv(1, 1, 1, BLOCK + 3, KEYS + 5, width, width, dtype=dtype)
    assert runs_on_hopper(hopper, inputs, is_causal=True)
    assert_exact(hopper, inputs, is_causal=True)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(8, 64), (72, 40), (40, 72), (96, 88), (104, 72), (64, 128)]
)
def test_a_head_dim_between_the_widths_is_wrong(hopper, head_dim, value_dim):
    """The last box of a row has columns that the tensor lacks, and boxes begin behind all of its
    columns where keys and values have different widths.
    """
    inputs = random_qkv(1, 2, 1, QUERIES + 9, KEYS + 5, head_dim, value_dim, dtype=torch.float16)
    assert runs_on_hopper(hopper, inputs, enable_gqa=True)
    assert_exact(hopper, inputs)


@pytest.mark.parametrize("head_dim", [136, 256])
def test_a_wide_head_has_other_gradients_than_on_ampere(hopper, head_dim):
    """Registers do not hold both gradients of a key; Ampere's kernels have a block for each."""
    inputs = random_qkv(1, 1, 1, 70, 40, head_dim, head_dim, dtype=torch.bfloat16)
    assert not runs_on_hopper(hopper, inputs, is_causal=True)
    assert_exact(hopper, inputs, is_causal=True)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "options"])
@pytest.mark.parametrize(("group", "L"), [(2, 2 * QUERIES + 1), (3, 20)])
def test_a_query_head_of_a_group_is_lost(hopper, group, L, plain):
    """A block walks the tiles of one query head after another, here three of each or one."""
    n = Sizes(2, 2 * group, L, 50, torch.bfloat16)
    inputs = random_qkv(2, n.Hq, 2, L, n.S, 64, 40, dtype=n.dtype)
    options = {"is_causal": True} if plain else everything(n)
    assert_exact(hopper, inputs, **options)


# ---- what is seen ----

# Each with a tile that is hidden, one that is seen, and one between.
SIGHTS = {
    "top left": lambda n: {"is_causal": True},
    "bottom right": lambda n: {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": lambda n: {"window": (QUERIES + 9, 5), "causal_alignment": "bottom_right"},
    "causal window": lambda n: {"window": (3, -1), "is_causal": True},
    "documents": lambda n: {
        "cu_seqlens_q": boundaries(n.L, 0.1, 0.1, 0.6), "is_causal": True,
        "cu_seqlens_k": boundaries(n.S, 0.2, 0.5, 0.5),
    },
}  # fmt: skip


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "options"])
@pytest.mark.parametrize("name", SIGHTS)
def test_a_gradient_is_wrong_beside_what_hides_keys(hopper, name, plain):
    """With a sink's gradient among the options, and that of lse in both."""
    n = Sizes(1, 2, 3 * QUERIES + 5, 2 * KEYS + 9, torch.float16)
    inputs = random_qkv(1, 2, 1, n.L, n.S, 64, 56, dtype=n.dtype)
    options = SIGHTS[name](n) if plain else {**everything(n), **SIGHTS[name](n)}
    found = assert_exact(hopper, inputs, **options)
    assert plain or found["grad_sinks"].all()


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_options_are_wrong_at_a_width(hopper, width):
    n = Sizes(1, 1, 2 * QUERIES + 5, KEYS + 9, torch.bfloat16)
    inputs = random_qkv(1, 1, 1, n.L, n.S, width, width - 8, dtype=n.dtype)
    assert_exact(hopper, inputs, is_causal=True, **everything(n))


@pytest.mark.parametrize("option", ["softcap", "alibi_slopes", "sinks", "dropout_p"])
def test_an_option_needs_another_one(hopper, option):
    """Sinks alone leave a call plain."""
    n = Sizes(1, 2, QUERIES + 9, QUERIES + 5, torch.bfloat16)
    inputs = random_qkv(1, 2, 2, n.L, n.S, 64, 64, dtype=n.dtype)
    assert_exact(hopper, inputs, **{option: everything(n)[option]})


def test_the_gradient_of_what_sees_or_is_seen_by_nothing_is_not_zero(hopper):
    """Whole blocks of either, and rows of a block."""
    query, key, value = random_qkv(1, 1, 1, 300, 60, 64, 64, dtype=torch.float16)
    upstream = upstream_for(query, value)
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    dq, *_ = gradients(hopper, (query, key, value), upstream, **options)
    assert torch.equal(dq[:, :, :240], torch.zeros_like(dq[:, :, :240]))
    # The first query that sees a key sees no other: the gradient of its score is rounding.
    assert dq[:, :, 241:].any(-1).all()
    query, key, value = random_qkv(1, 1, 1, 60, 300, 64, 64, dtype=torch.float16)
    upstream = upstream_for(query, value)
    _, dk, dv = gradients(hopper, (query, key, value), upstream, is_causal=True)
    for x in (dk, dv):
        assert torch.equal(x[:, :, 60:], torch.zeros_like(x[:, :, 60:]))
        assert x[:, :, :60].any(-1).all()


# ---- layouts ----


@pytest.mark.parametrize(
    "layout",
    ["heads inside", "unaligned upstream", "expanded upstream", "expanded keys", "unaligned query"],
)
def test_a_layout_is_copied_wrongly(hopper, layout):
    """In boxes where the hardware can; what it cannot goes another way, with the same results."""
    B, H, L, S, D = 2, 2, 70, 150, 64
    query, key, value = random_qkv(B, H, H, L, S, D, D, dtype=torch.bfloat16)
    upstream = upstream_for(query, value)

    def unaligned(x):
        room = torch.full((*x.shape[:-1], D + 3), NAN, dtype=x.dtype)
        room[..., 1:-2] = x
        return room[..., 1:-2]

    if layout == "heads inside":  # (B, T, H, D), as a GPT has it
        query, key, value, upstream = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value, upstream)
        )
    elif layout == "unaligned upstream":
        upstream = unaligned(upstream)
    elif layout == "expanded upstream":
        upstream = upstream[:, :, :1].expand(B, H, L, D)
    elif layout == "expanded keys":
        key, value = (x[:, :1].expand(-1, H, -1, -1) for x in (key, value))
    else:
        query = unaligned(query)
    inputs = (query, key, value)
    on_hopper = runs_on_hopper(hopper, inputs, upstream, is_causal=True)
    assert on_hopper == (layout == "heads inside")
    got = gradients(hopper, inputs, upstream, is_causal=True)
    copies = [x.contiguous() for x in inputs]
    want = gradients(hopper, copies, upstream.contiguous(), is_causal=True)
    for name, ours, theirs in zip(GRADIENTS, got, want, strict=True):
        if layout == "heads inside":
            assert torch.equal(ours, theirs), name
        else:
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-10)


# ---- what is not finite ----


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "options"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["query", "key", "value", "grad_output"])
def test_a_hidden_number_reaches_a_gradient(hopper, which, poison, plain):
    """The window hides key j from all but a few queries, and query j from all but a few keys: the
    others' gradients keep their bits. What is seen is NaN, or as infinite as it is in torch.
    """
    L = S = BLOCK + 40
    j = QUERIES - 1  # the last one of a tile, and sees or is seen by the next
    query, key, value = random_qkv(1, 1, 1, L, S, 64, 64, dtype=torch.bfloat16)
    tensors = dict(zip(("query", "key", "value"), (query, key, value), strict=True))
    tensors["grad_output"] = upstream_for(query, value)
    options = {"window": (2, 1)} if plain else {"window": (2, 1), "softcap": 3.0}

    def run():
        inputs = [tensors[name] for name in ("query", "key", "value")]
        found = gradients(hopper, inputs, tensors["grad_output"], **options)
        return dict(zip(GRADIENTS, found, strict=True))

    clean = run()
    tensors[which] = tensors[which].clone()
    tensors[which][:, :, j, 5] = poison
    got = run()
    i = torch.arange(L)
    # The queries with j among their keys or themselves, and the keys that any of these sees.
    poisoned = (j >= i - 2) & (j <= i + 1) if which in ("key", "value") else i == j
    sees = (i[None] >= i[:, None] - 2) & (i[None] <= i[:, None] + 1)
    reached = sees[poisoned].any(0)
    for name, unreached in zip(GRADIENTS, (~poisoned, ~reached, ~reached), strict=True):
        ours, theirs = (x[name][:, :, unreached] for x in (got, clean))
        assert torch.equal(ours, theirs), name
    if which == "grad_output":
        seen = got["grad_value"][:, :, reached, 5]
        assert torch.equal(seen, torch.full_like(seen, poison)) or seen.isnan().all()
        assert seen.isnan().all() == math.isnan(poison)
        others = [n for n in range(64) if n != 5]
        assert torch.equal(got["grad_value"][..., others], clean["grad_value"][..., others])
    if which in ("key", "value"):
        assert got["grad_query"][:, :, poisoned].isnan().any()
    if which in ("query", "value"):
        assert got["grad_key"][:, :, reached].isnan().any()


# ---- bits ----


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "options"])
def test_a_head_changes_the_bits_of_another(hopper, plain):
    """Nor do two calls differ."""
    n = Sizes(2, 4, QUERIES + 6, 50, torch.bfloat16)
    inputs = random_qkv(2, 4, 2, n.L, n.S, 64, 64, dtype=n.dtype)
    upstream = upstream_for(inputs[0], inputs[2])
    slope = slopes(n)

    def run(batch, heads, key_heads):
        options = {} if plain else {"softcap": 3.0, "alibi_slopes": slope[heads]}
        parts = [x[batch, h] for x, h in zip(inputs, (heads, key_heads, key_heads), strict=True)]
        return gradients(
            hopper, parts, upstream[batch, heads], enable_gqa=True, is_causal=True, **options
        )

    everywhere = (slice(None),) * 3
    together, again = run(*everywhere), run(*everywhere)
    alone = run(slice(1, 2), slice(2, 4), slice(1, 2))
    for name, *found in zip(GRADIENTS, together, again, alone, strict=True):
        assert torch.equal(found[0], found[1]), name
        heads = slice(2, 4) if name == "grad_query" else slice(1, 2)
        assert torch.equal(found[2], found[0][1:2, heads]), name
