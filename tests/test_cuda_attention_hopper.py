"""What only Hopper's kernels of attention have, in the host twin: a stream of tiles through stages,
two warpgroups by turns, and the tensors that can be copied in boxes.
"""

import re
from pathlib import Path

import pytest
import torch
import twin
from attention_cases import Sizes, boundaries, sinks, slopes
from backends import TWIN, activate
from oracle import REDUCED_DTYPES, random_qkv
from test_cuda_attention import assert_exact, results

from fastgpt.backends import hopper as generations
from fastgpt.backends.measured import Measurement

PROGRAM = Path(__file__).parent / "cuda_attention_hopper.cpp"
BLOCK = 128  # queries
TILES = {64: 128, 80: 128, 96: 128, 128: 128, 256: 80}  # keys, by width


def use_hopper(on: bool) -> None:
    torch.ops.fastgpt_twin_settings.hopper(on)


@pytest.fixture
def hopper():
    twin.load()
    use_hopper(True)
    yield from activate(TWIN)
    use_hopper(False)


def output_and_lse(backend, inputs, **options):
    return backend.attention(*inputs, return_lse=True, **options)


def runs_on_hopper(backend, inputs, **options) -> bool:
    """Whether a call has other bits than the kernels of Ampere have, whose tiles have 64 or 32
    keys.
    """
    ours = output_and_lse(backend, inputs, **options)[1]
    use_hopper(False)
    theirs = output_and_lse(backend, inputs, **options)[1]
    use_hopper(True)
    assert (ours - theirs).abs().max() <= 1e-4
    return not torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("width", TILES)
@pytest.mark.parametrize("tiles", [2, 3, 5])
def test_a_stage_is_taken_for_another(hopper, tiles, width, dtype):
    """Of two stages each, the parity of which turns after every round; and the two warpgroups have
    different rows.
    """
    inputs = random_qkv(1, 1, 1, BLOCK, tiles * TILES[width] - 3, width, width, dtype=dtype)
    assert runs_on_hopper(hopper, inputs)
    assert_exact(hopper, inputs, is_causal=True, causal_alignment="bottom_right")


@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(72, 40), (96, 88), (104, 72), (200, 256), (8, 72), (80, 64), (64, 256), (136, 8)],
)
def test_a_head_dim_between_the_widths_is_wrong(hopper, head_dim, value_dim):
    """The last box of a row has columns that the tensor lacks, and boxes begin behind all of its
    columns where keys and values have different widths.
    """
    L, S = BLOCK + 3, 2 * TILES[64] + 5
    inputs = random_qkv(1, 2, 1, L, S, head_dim, value_dim, dtype=torch.float16)
    assert runs_on_hopper(hopper, inputs, enable_gqa=True)
    assert_exact(hopper, inputs)


OPTIONS = {
    "top left": lambda n: {"is_causal": True},
    "window": lambda n: {"window": (n.S // 3, 5), "causal_alignment": "bottom_right"},
    "documents": lambda n: {
        "cu_seqlens_q": boundaries(n.L, 0.1, 0.1, 0.6), "is_causal": True,
        "cu_seqlens_k": boundaries(n.S, 0.2, 0.5, 0.5),
    },
    "everything": lambda n: {
        "softcap": 3.0, "alibi_slopes": slopes(n), "sinks": sinks(n), "dropout_p": 0.2,
        "is_causal": True, "causal_alignment": "bottom_right",
    },
}  # fmt: skip


@pytest.mark.parametrize("width", TILES)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_wrong_at_a_width(hopper, name, width):
    n = Sizes(1, 2, BLOCK + 5, 3 * TILES[width] + 1, torch.bfloat16)
    inputs = random_qkv(1, 2, 1, n.L, n.S, width, width - 8, dtype=n.dtype)
    assert_exact(hopper, inputs, **OPTIONS[name](n))


@pytest.mark.parametrize("width", TILES)
def test_a_query_that_sees_nothing_is_not_zero(hopper, width):
    tile = TILES[width]
    inputs = random_qkv(1, 1, 1, 2 * BLOCK, tile, width, width, dtype=torch.float16)
    out, lse = output_and_lse(hopper, inputs, is_causal=True, causal_alignment="bottom_right")
    blind = 2 * BLOCK - tile  # the first block sees no tile at all
    assert torch.equal(out[:, :, :blind], torch.zeros_like(out[:, :, :blind]))
    assert (lse[:, :, :blind] == -torch.inf).all()
    assert lse[:, :, blind:].isfinite().all()


@pytest.mark.parametrize("width", TILES)
@pytest.mark.parametrize("layout", ["heads inside", "unaligned", "expanded", "a single row"])
def test_a_layout_is_copied_wrongly(hopper, layout, width):
    """In boxes; what has none is copied before."""
    query, key, value = random_qkv(2, 2, 2, 70, 300, width, width, dtype=torch.bfloat16)
    if layout == "heads inside":  # (B, T, H, D), as a GPT has it
        query, key, value = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)
        )
    elif layout == "unaligned":
        room = torch.zeros(2, 2, 300, width + 3, dtype=torch.bfloat16)
        room[..., 1:-2] = key
        key = room[..., 1:-2]
    elif layout == "expanded":
        key, value = (x[:, :1].expand(-1, 2, -1, -1) for x in (key, value))
    else:
        query = query[:, :, :1]
    if layout != "a single row":  # whose few numbers may be those of the other kernels
        assert runs_on_hopper(hopper, (query, key, value))
    assert_exact(hopper, (query, key, value))


# ---- which generation runs ----


@pytest.fixture
def switch(hopper):
    """Sets which of Hopper's kernels run, as the extension's switch does."""

    def to(on):
        generations.switch(on, torch.ops.fastgpt_twin_settings)

    yield to
    to(generations.ALL)


def long_inputs(columns):
    """Of several tiles at every width."""
    return random_qkv(1, 1, 1, BLOCK, 253, columns, columns, dtype=torch.bfloat16)


def other_than(width):
    return generations.WIDTHS[generations.WIDTHS.index(width) - 1]


def gradients(backend, columns, **options):
    """With the sinks' in float32, which shows what bfloat16 may hide: the bits of both passes."""
    sinks = torch.zeros(1)
    return list(results(backend, long_inputs(columns), sinks=sinks, **options).values())


def only(*key):
    return {**generations.NONE, key: True}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("which", generations.PASSES)
@pytest.mark.parametrize("width", generations.WIDTHS)
def test_a_pass_runs_another_generation_than_it_is_switched_to(hopper, switch, width, which):
    """With the other pass on Ampere's kernels; the backward is given the same forward's results."""
    switch(generations.NONE)
    amperes = gradients(hopper, width)
    switch(only(which, width))
    assert not same(gradients(hopper, width), amperes)
    assert_exact(hopper, long_inputs(width))
    switch(only(which, other_than(width)))
    assert same(gradients(hopper, width), amperes), "it is the switch of another width"


def test_a_switch_gives_a_gpu_kernels_that_it_has_not(hopper, switch):
    switch(generations.NONE)
    amperes = gradients(hopper, 64)
    switch(generations.ALL)
    assert not same(gradients(hopper, 64), amperes)
    use_hopper(False)
    assert same(gradients(hopper, 64), amperes)


@pytest.mark.parametrize("columns", [8, 64, 72, 80, 88, 96, 104, 128, 136, 256])
def test_a_head_runs_on_kernels_of_another_width_than_is_said(hopper, switch, columns):
    width, inputs = generations.width_of(columns), long_inputs(columns)
    switch(generations.NONE)
    amperes = output_and_lse(hopper, inputs)
    for its in generations.WIDTHS:
        switch(only("forward", its))
        assert same(output_and_lse(hopper, inputs), amperes) == (width != its)


@pytest.mark.parametrize("ratio", [None, 0.8, 1.0, 1.2])
@pytest.mark.parametrize("width", generations.WIDTHS)
def test_a_stored_measurement_is_ignored_or_told_otherwise(hopper, switch, width, ratio):
    stored = []
    if ratio:
        name = generations.entry("forward", width)
        stored = [Measurement(name, "sm_90", "a GPU", "2026-12-01", "db4a743", ratio, [])]
    switch(generations.chosen(stored))
    widths = width, other_than(width)
    ours = {columns: output_and_lse(hopper, long_inputs(columns)) for columns in widths}
    switch(generations.NONE)
    for columns, its in ours.items():
        of_hopper = not same(its, output_and_lse(hopper, long_inputs(columns)))
        assert of_hopper == (columns != width or ratio in (None, 1.2))
        explained = generations.explain(stored, True, "sm_90", columns, columns, plain=True)
        assert explained.startswith("forward by Hopper's kernels") == of_hopper


@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}, {"scale": -0.1}, {"dropout_p": 0.1}])
@pytest.mark.parametrize("columns", [128, 136])
def test_options_have_another_backward_than_is_said(hopper, switch, columns, options):
    switch(generations.NONE)
    amperes = gradients(hopper, columns, **options)
    switch(only("backward", generations.width_of(columns)))
    ours = gradients(hopper, columns, **options)
    plain = not options
    explained = generations.explain([], True, "sm_90", columns, columns, plain)
    assert (
        same(ours, amperes)
        == ("backward by Ampere's" in explained)
        == (columns > 128 and not plain)
    )


# ---- barriers and fences ----


# Of four tiles, what nothing depends on: the last two arrivals of the keys' and of the values'
# stages, which are not filled again; and the wait for the second stage of keys, since that for the
# first one of values says as much: both warpgroups have multiplied those keys before.
NOT_NEEDED = {("arrival", n) for n in (3, 5, 6, 7)} | {("empty", 2)}


@pytest.mark.slow
def test_a_missing_wait_fence_or_arrival_goes_unnoticed(tmp_path):
    """Each of them is left out of the kernel in turn, on the host: the twin must find that, or the
    results must be others.
    """
    run = twin.run_program(PROGRAM, tmp_path, "-Wall", "-Wextra", "-Werror")
    assert run.returncode == 0, run.stdout + run.stderr
    outcomes = {
        (what, int(n)): outcome
        for what, n, outcome in re.findall(r"^without (\w+) (\d+): (.*)$", run.stdout, re.M)
    }
    counts = {what: sum(1 for kind, _ in outcomes if kind == what) for what, _ in outcomes}
    assert counts == {
        "block_barrier": 1, "fence_barriers": 1, "warpgroup_fence": 5, "warpgroup_wait": 8,
        "full": 9, "empty": 4, "arrival": 8,
    }  # fmt: skip
    assert {what for what, outcome in outcomes.items() if outcome == "passed"} == NOT_NEEDED
