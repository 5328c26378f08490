"""What only Hopper's backward of attention has, in the host twin: two passes, each with a stream of
tiles that two warpgroups multiply at once.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import twin
from attention_cases import Sizes, boundaries, sinks, slopes
from backends import HOPPER, activate
from oracle import REDUCED_DTYPES, random_qkv, upstream_for
from test_cuda_attention import SEED, assert_exact

PROGRAM = Path(__file__).parent / "cuda_attention_hopper_backward.cpp"
NAN, INF = math.nan, math.inf
WIDTHS = (64, 80, 96, 128, 256)
# Rows of a block: queries, or keys; those of a tile of keys in the pass over the queries, half as
# many with options or at width 256, and of a tile of queries in that over the keys.
BLOCK, KEYS, QUERIES = 128, 128, 64
GRADIENTS = ("grad_query", "grad_key", "grad_value")


@pytest.fixture
def hopper():
    yield from activate(HOPPER)


def gradients(backend, inputs, upstream, on_hopper=True, **options):
    """Of a forward on Hopper."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.manual_seed(SEED)
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
    ("head_dim", "value_dim"), [(8, 64), (72, 40), (96, 88), (104, 72), (64, 128), (72, 136)]
)
def test_a_head_dim_between_the_widths_is_wrong(hopper, head_dim, value_dim):
    """The last box of a row has columns that the tensor lacks, and boxes begin behind all of its
    columns where keys and values have different widths.
    """
    inputs = random_qkv(1, 2, 1, QUERIES + 9, KEYS + 5, head_dim, value_dim, dtype=torch.float16)
    assert runs_on_hopper(hopper, inputs, enable_gqa=True)
    assert_exact(hopper, inputs)


@pytest.mark.parametrize("tiles", [2, 3])
def test_the_only_stage_of_a_wide_head_is_filled_too_early(hopper, tiles):
    inputs = random_qkv(1, 1, 1, tiles * QUERIES, tiles * KEYS // 2, 256, 256, dtype=torch.float16)
    assert_exact(hopper, inputs)


@pytest.mark.parametrize(
    ("head_dim", "options"), [(200, {"softcap": 3.0}), (256, {"dropout_p": 0.2}), (65, {}), (1, {})]
)
def test_what_hopper_does_not_take_is_wrong(hopper, head_dim, options):
    """Options have no room in registers beside 256 columns, and rows of no whole vectors no boxes:
    Ampere's kernels compute them.
    """
    inputs = random_qkv(1, 1, 1, 70, 40, head_dim, 8, dtype=torch.bfloat16)
    assert not runs_on_hopper(hopper, inputs, is_causal=True, **options)
    assert_exact(hopper, inputs, is_causal=True, **options)


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


@pytest.mark.parametrize("width", WIDTHS[1:-1])
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
    """In boxes; what has none is copied before, and has the same bits."""
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
    assert runs_on_hopper(hopper, inputs, upstream, is_causal=True)
    got = gradients(hopper, inputs, upstream, is_causal=True)
    copies = [x.contiguous() for x in inputs]
    want = gradients(hopper, copies, upstream.contiguous(), is_causal=True)
    for name, ours, theirs in zip(GRADIENTS, got, want, strict=True):
        assert torch.equal(ours, theirs), name


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


# ---- waits, fences, barriers and arrivals ----


def not_needed(kernel: str) -> set[tuple[str, int]]:
    """What the results and the twin do without, in a block of four tiles; or of three, twice, the
    first time in vain.
    """
    over_keys, careful = kernel.startswith("key"), kernel.endswith("careful")
    # Where the lanes that copied meet the others again, which the hardware alone needs. In the pass
    # over the keys two warps have come to one for each tile before that.
    whole = (7 if careful else 4) if over_keys else int(careful)
    found = {("copiers_warp_barrier", whole)}
    if not careful:
        # The last two arrivals of either stream: their stages are not filled again.
        found |= {("arrival", n) for n in (4, 5, 6, 7)}
        # The second stream's waits for room: who released the first's stage had read both.
        found |= {("empty", 1), ("empty", 3)}
        # Before the last two arrivals.
        found |= {("readers_warp_barrier", n) for n in (2, 3) if over_keys}
        return found
    found |= {("arrival", n) for n in (8, 9, 10, 11)}
    # And that of either for the tiles of the first run, whose stages are empty since the vote.
    found |= {("empty", n) for n in (2, 3, 4, 5, 7)}
    if over_keys:
        found |= {("tellers_empty", n) for n in (1, 2)}
        # The named barriers behind what is known of the queries say as much.
        found |= {("readers_warp_barrier", n) for n in (3, 4, 5)}
        # The next one, of the other tile, fences the writes to both.
        found |= {("fence_asynchronous", n) for n in (0, 2, 4)}
    return found


@pytest.mark.slow
def test_a_missing_wait_fence_or_arrival_goes_unnoticed(tmp_path):
    """Each of them is left out of the kernels in turn, on the host: the twin must find that, or the
    results must be others.
    """
    run = twin.run_program(PROGRAM, tmp_path, "-Wall", "-Wextra", "-Werror")
    assert run.returncode == 0, run.stdout + run.stderr
    outcomes: dict[str, dict[tuple[str, int], str]] = {}
    for kernel, what, n, outcome in re.findall(
        r"^(\w+) without (\w+) (\d+): (.*)$", run.stdout, re.M
    ):
        outcomes.setdefault(kernel, {})[what, int(n)] = outcome
    counts = {
        kernel: {what: sum(1 for kind, _ in found if kind == what) for what, _ in found}
        for kernel, found in outcomes.items()
    }
    of_queries = {
        "block_barrier": 1, "copiers_warp_barrier": 1, "readers_warp_barrier": 1,
        "fence_barriers": 1, "warpgroup_fence": 12, "warpgroup_wait": 12, "full": 9, "empty": 4,
        "arrival": 8,
    }  # fmt: skip
    of_keys = {
        **of_queries, "copiers_warp_barrier": 5, "readers_warp_barrier": 4, "full_arrival": 4,
        "tellers_empty": 2,
    }  # fmt: skip
    careful = {
        "block_barrier": 1, "copiers_warp_barrier": 1, "named_barrier": 7, "fence_asynchronous": 3,
        "warpgroup_fence": 9, "warpgroup_wait": 9, "full": 6, "empty": 6, "arrival": 6,
    }  # fmt: skip
    assert counts == {
        "query_gradient": of_queries,
        "query_gradient_with_options": {**of_queries, "warpgroup_wait": 8},
        "query_gradient_careful": careful,
        "key_gradient": of_keys,
        "key_gradient_with_options": {**of_keys, "warpgroup_wait": 8},
        "key_gradient_careful": {
            **careful, "copiers_warp_barrier": 4, "readers_warp_barrier": 3, "full_arrival": 3,
            "tellers_empty": 3, "fence_asynchronous": 6,
        },
    }  # fmt: skip
    for kernel, found in outcomes.items():
        passed = {what for what, outcome in found.items() if outcome == "passed"}
        assert passed == not_needed(kernel), kernel
