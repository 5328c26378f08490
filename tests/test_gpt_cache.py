"""The key-value cache of the reference GPT: reading on gives what reading all again would."""

from collections.abc import Iterator

import pytest
import torch

from fastgpt.gpt import GPT, PRESETS, GPTConfig
from fastgpt.gpt.errors import UsageError
from fastgpt.gpt.model import attention_function
from fastgpt.gpt.sample import generate, stream_tokens

SMALL = GPTConfig(vocab_size=61, block_size=12, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps as small as these gain nothing from more
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def small_gpt(**changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(SMALL), **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # or each token would repeat the one before it
            parameter.normal_(std=0.5)
    return model


@pytest.fixture(params=["fused", "torch", "explicit"])
def model(request) -> GPT:
    """With each attention function; the fused one on whichever backend the process prefers."""
    model = small_gpt()
    model.use_attention(attention_function(request.param))
    return model


def read(model, idx, cache, *chunks):
    """The logits (B, T, V) of idx, read chunk by chunk."""
    parts = idx.split(list(chunks) or [idx.shape[1]], dim=1)
    return torch.cat([model.lm_head(model.features(part, cache)) for part in parts], dim=1)


def assert_same(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def record_calls(model):
    """Have the attention keep the arguments of its calls."""
    calls, attention = [], model.transformer.h[0].attn.attention

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return attention(*args, **kwargs)

    model.use_attention(record)
    return calls


def test_after_any_prefix_each_further_token_has_the_logits_of_the_whole(model):
    idx = torch.randint(61, (2, 12))
    expected = model(idx)[0]
    for first in range(1, 13):
        cache = model.new_cache(2)
        assert_same(read(model, idx, cache, first, *[1] * (12 - first)), expected)
        assert cache.lengths == [12, 12]


def test_each_backend_decodes_as_it_reads(one_isa):
    model = small_gpt()
    idx = torch.randint(61, (2, 8))
    expected = model(idx)[0]
    model.use_attention(one_isa.attention)  # asserts that this backend runs
    assert_same(read(model, idx, model.new_cache(2), 5, 1, 2), expected)


def test_each_backend_decodes_sequences_of_different_lengths(one_isa):
    model = small_gpt()
    idx = torch.randint(61, (2, 8))
    expected = model(idx)[0]
    model.use_attention(one_isa.attention)
    cache = model.new_cache(2)
    read(model, idx[:, :7], cache)
    cache.truncate([7, 3])
    step = torch.stack([idx[0, 7:], idx[1, 3:4]])
    assert_same(read(model, step, cache), torch.stack([expected[0, 7:], expected[1, 3:4]]))


@pytest.mark.parametrize("chunks", [(3, 9), (1, 10, 1), (5, 1, 4, 2), (2, 2, 2, 2, 2, 2)])
def test_a_text_read_in_chunks_has_the_logits_of_the_whole(model, chunks):
    idx = torch.randint(61, (3, 12))
    assert_same(read(model, idx, model.new_cache(3), *chunks), model(idx)[0])


def test_sequences_of_different_lengths_go_on_side_by_side_as_alone(model):
    idx, lengths = torch.randint(61, (4, 12)), [1, 3, 7, 5]
    expected = model(idx)[0]
    padded = idx.clone()
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = 60
    cache = model.new_cache(4)
    prompts = read(model, padded[:, :7], cache)
    cache.truncate(lengths)
    rows = torch.arange(4)[:, None]
    for count in (1, 1, 3):  # a chunk, too
        place = torch.tensor(cache.lengths)[:, None] + torch.arange(count)
        assert_same(read(model, idx[rows, place], cache), expected[rows, place])
    assert cache.lengths == [6, 8, 12, 10]
    for b, length in enumerate(lengths):
        assert_same(prompts[b, :length], expected[b, :length])


def test_what_was_cut_off_is_forgotten(model):
    idx, other = torch.randint(61, (2, 1, 10))
    cache = model.new_cache(1)
    read(model, torch.cat([idx[:, :4], other[:, 4:]], dim=1), cache)
    cache.truncate([4])
    assert_same(read(model, idx[:, 4:], cache), model(idx)[0][:, 4:])
    cache.truncate([0])
    assert_same(read(model, other, cache), model(other)[0])


def test_nan_in_a_place_not_yet_filled_reaches_nothing(model):
    idx = torch.randint(61, (2, 12))
    cache = model.new_cache(2)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    assert_same(read(model, idx, cache, 4, 1, 2, 1, 1, 1, 1, 1), model(idx)[0])


def test_nan_behind_a_shorter_sequence_reaches_nothing_in_a_kernel(best_kernel):
    model = small_gpt()
    idx = torch.randint(61, (2, 10))
    expected = model(idx)[0]
    model.use_attention(best_kernel.attention)
    cache = model.new_cache(2)
    read(model, idx[:, :8], cache)
    cache.truncate([8, 2])
    for x in (cache.keys, cache.values):
        x[:, 1, :, 2:] = torch.nan
        x[:, 0, :, 8:] = torch.nan
    for t in range(2):
        step = torch.stack([idx[0, 8 + t : 9 + t], idx[1, 2 + t : 3 + t]])
        logits = read(model, step, cache)
        assert_same(logits[:, 0], torch.stack([expected[0, 8 + t], expected[1, 2 + t]]))


def test_a_step_is_one_call_of_one_query_on_the_cache_itself(model):
    calls = record_calls(model)
    idx = torch.randint(61, (2, 6))
    cache = model.new_cache(2)
    read(model, idx[:, :5], cache)
    assert [options for _, options in calls] == [{"dropout_p": 0.0, "is_causal": True}] * 2
    calls.clear()
    read(model, idx[:, 5:], cache)
    assert len(calls) == 2, "one a layer"
    for layer, ((q, k, v), options) in enumerate(calls):
        assert q.shape == (2, 2, 1, 8)
        assert k.shape == v.shape == (2, 2, 6, 8)
        assert k.data_ptr() == cache.keys[layer].data_ptr()
        assert v.data_ptr() == cache.values[layer].data_ptr()
        assert options == {"dropout_p": 0.0}, "the last query looks at every key"


def test_each_token_is_read_once_until_the_context_is_full(model):
    calls = record_calls(model)
    generate(model, torch.randint(61, (1, 9)), 6)
    queries_and_keys = [(q.shape[2], k.shape[2]) for (q, k, _), _ in calls[::2]]
    assert queries_and_keys == [(9, 9), (1, 10), (1, 11), (1, 12), (12, 12), (12, 12)]
    calls.clear()
    generate(model, torch.randint(61, (1, 9)), 2, use_cache=False)
    assert [q.shape[2] for (q, _, _), _ in calls[::2]] == [9, 10]


@pytest.mark.parametrize("length", [1, 5, 12, 20])
def test_the_cache_changes_no_text_not_even_beyond_the_context(model, length):
    idx = torch.randint(61, (2, length))
    for settings in ({"temperature": 0}, {"temperature": 0.8, "top_k": 20}):
        texts = [
            generate(
                model,
                idx,
                25,
                generator=torch.Generator().manual_seed(1),
                use_cache=use,
                **settings,
            )
            for use in (True, False)
        ]
        assert texts[0].shape == (2, length + 25)
        assert torch.equal(*texts)


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_different_lengths_go_on_as_alone(model, use_cache):
    lengths = [4, 1, 9, 4]
    prompts = [torch.randint(61, (length,)) for length in lengths]
    together = generate(model, prompts, 14, temperature=0, use_cache=use_cache)
    assert [len(text) for text in together] == [length + 14 for length in lengths]
    for prompt, text in zip(prompts, together, strict=True):
        assert torch.equal(text, generate(model, prompt[None], 14, temperature=0)[0])
    assert len({tuple(text[-3:].tolist()) for text in together}) == 4, "and not all in one way"


def test_a_prompt_longer_than_the_context_goes_on_beside_a_shorter_one(model):
    prompts = [torch.randint(61, (3,)), torch.randint(61, (15,))]
    together = generate(model, prompts, 4, temperature=0)
    for prompt, text in zip(prompts, together, strict=True):
        assert torch.equal(text, generate(model, prompt[None], 4, temperature=0)[0])


def test_prompts_of_one_length_are_one_tensor_in_another_form(model):
    idx = torch.randint(61, (3, 4))
    texts = generate(model, list(idx), 5, temperature=0)
    assert torch.equal(torch.stack(texts), generate(model, idx, 5, temperature=0))
    assert all(torch.equal(a, b) for a, b in zip(generate(model, list(idx), 0), idx, strict=True))


def test_tokens_of_all_prompts_come_step_by_step(model):
    prompts = [torch.randint(61, (2,)), torch.randint(61, (5,))]
    steps = list(stream_tokens(model, prompts, 3, temperature=0))
    texts = generate(model, prompts, 3, temperature=0)
    for b in range(2):
        assert torch.equal(torch.stack(steps)[:, b], texts[b][-3:])


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


SAMPLED = [
    {"temperature": 0},
    {"temperature": 1.3},
    {"temperature": 0.9, "top_k": 20},
    {"top_p": 0.8},
    {"top_k": 30, "top_p": 0.9},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_with_its_own_generator_a_text_does_not_depend_on_those_beside_it(model, dtype, settings):
    model.to(dtype)
    lengths, stop = [4, 1, 9, 4, 15], [3, 17, 40]
    prompts = [torch.randint(61, (length,)) for length in lengths]
    together = generate(model, prompts, 12, generator=generators(range(5)), stop=stop, **settings)
    for seed, (prompt, text) in enumerate(zip(prompts, together, strict=True)):
        for generator, use_cache in [(generators([seed]), True), (generators([seed])[0], False)]:
            alone = generate(
                model, [prompt], 12, generator=generator, stop=stop, use_cache=use_cache, **settings
            )
            assert torch.equal(text, alone[0])
    turned = generate(
        model, prompts[::-1], 12, generator=generators(range(4, -1, -1)), stop=stop, **settings
    )
    assert all(torch.equal(a, b) for a, b in zip(together, turned[::-1], strict=True))


def test_logits_of_a_ragged_batch_are_those_of_each_alone_to_float64s_last_bits(model):
    """Also while sequences leave the batch."""
    model.double()
    lengths = [5, 1, 8, 3]
    prompts = [torch.randint(61, (12,)) for _ in lengths]
    expected = [model(prompt[None])[0][0] for prompt in prompts]
    padded = torch.zeros(4, 8, dtype=torch.int64)
    for row, prompt, length in zip(padded, prompts, lengths, strict=True):
        row[:length] = prompt[:length]
    cache = model.new_cache(4)
    read(model, padded, cache)
    cache.truncate(lengths)
    rows = [0, 1, 2, 3]
    for left in ([0, 1, 2, 3], [0, 1, 3], [1, 3]):
        cache.keep([rows.index(b) for b in left])
        rows = left
        step = torch.stack([prompts[b][cache.lengths[i], None] for i, b in enumerate(rows)])
        places = list(cache.lengths)
        logits = read(model, step, cache)[:, 0]
        for i, b in enumerate(rows):
            torch.testing.assert_close(logits[i], expected[b][places[i]], rtol=1e-11, atol=1e-11)
    assert cache.lengths == [4, 6]


def test_one_generator_makes_the_whole_batch_again(model):
    prompts = [torch.randint(61, (length,)) for length in (4, 1, 9)]
    texts = [
        torch.cat(generate(model, prompts, 10, generator=torch.Generator().manual_seed(seed)))
        for seed in (5, 5, 6)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_a_text_ends_with_the_first_stop_token_and_leaves_the_others_alone(model):
    prompts = [torch.randint(61, (length,)) for length in (4, 1, 9)]
    endless = generate(model, prompts, 14, generator=generators(range(3)))
    new = [text[-14:].tolist() for text in endless]
    stop = {new[0][5], new[2][2]}  # which the others may draw, too
    ended = generate(model, prompts, 14, generator=generators(range(3)), stop=stop)
    for prompt, full, text in zip(prompts, new, ended, strict=True):
        end = next((i + 1 for i, token in enumerate(full) if token in stop), 14)
        assert text.tolist() == prompt.tolist() + full[:end]
    assert len({len(text) for text in ended}) > 1
    steps = torch.stack(
        list(stream_tokens(model, prompts, 14, generator=generators(range(3)), stop=stop)), dim=1
    )
    for row, prompt, text in zip(steps.tolist(), prompts, ended, strict=True):
        own = text[len(prompt) :].tolist()
        assert row == own + own[-1:] * (len(row) - len(own)), "it repeats what ended it"
    assert steps.shape[1] == max(len(t) - len(p) for t, p in zip(ended, prompts, strict=True))


def test_a_batch_in_one_tensor_is_as_wide_as_its_longest_text(model):
    idx = torch.randint(61, (3, 4))
    new = generate(model, idx, 9, temperature=0)[:, 4:]
    stop = [new[b, 2 + b].item() for b in range(3)]
    texts = generate(model, idx, 9, temperature=0, stop=stop)
    ends = [next(i for i, t in enumerate(row) if t in stop) for row in new.tolist()]
    assert texts.shape == (3, 4 + 1 + max(ends))
    for row, full, end in zip(texts[:, 4:].tolist(), new.tolist(), ends, strict=True):
        assert row == full[: end + 1] + [full[end]] * (max(ends) - end)
    assert generate(model, idx, 9, temperature=0, stop=range(61)).shape == (3, 5), "at once"


def test_what_has_ended_is_not_computed_and_does_not_end_the_use_of_the_cache(model):
    prompts = [torch.randint(61, (9,)), torch.randint(61, (2,))]
    texts = generate(model, prompts, 10, generator=generators([0, 1]))
    first, second = (text.tolist() for text in texts)
    stop = next(token for token in first[9:12] if token not in second[2:])
    calls = record_calls(model)
    generate(model, prompts, 10, generator=generators([0, 1]), stop=[stop])
    assert {q.shape[0] for (q, _, _), _ in calls} == {1, 2}
    alone = [(q.shape[2], k.shape[2]) for (q, k, _), _ in calls[::2] if q.shape[0] == 1]
    assert [q for q, _ in alone] == [1] * len(alone), "each token read once, to the end"
    assert alone[-1] == (1, 11)


def test_the_memory_is_taken_once_and_no_more_than_the_text_can_need(model, monkeypatch):
    caches, new_cache = [], model.new_cache

    def record(*args):
        caches.append(new_cache(*args))
        caches.append(caches[-1].keys.data_ptr())
        return caches[-2]

    monkeypatch.setattr(model, "new_cache", record)
    prompts = [torch.randint(61, (3,)), torch.randint(61, (5,))]
    generate(model, prompts, 4)
    cache, place = caches
    assert cache.keys.shape == cache.values.shape == (2, 2, 2, 8, 8), "5 + 4 - 1: the last is drawn"
    assert cache.lengths == [6, 8]
    assert cache.keys.data_ptr() == place
    caches.clear()
    generate(model, prompts, 400)
    assert caches[0].keys.shape[3] == 12, "block_size"
    caches.clear()
    generate(model, prompts, 0)
    generate(model, prompts, 3, use_cache=False)
    assert caches == []


def test_keeping_sequences_moves_them_in_place(model):
    idx = torch.randint(61, (4, 12))
    expected = model(idx)[0]
    cache = model.new_cache(4)
    read(model, idx[:, :7], cache)
    cache.truncate([7, 2, 5, 6])
    places = cache.keys.data_ptr(), cache.values.data_ptr()
    cache.keep([1, 3])
    assert cache.lengths == [2, 6]
    assert places == (cache.keys.data_ptr(), cache.values.data_ptr())
    step = torch.stack([idx[1, 2:4], idx[3, 6:8]])
    assert_same(read(model, step, cache), torch.stack([expected[1, 2:4], expected[3, 6:8]]))


def test_dropout_is_off_while_generating():
    model, dropping = small_gpt(), small_gpt(dropout=0.5)
    dropping.train()
    idx = torch.randint(61, (1, 5))
    expected = generate(model, idx, 10, temperature=0)
    assert torch.equal(generate(dropping, idx, 10, temperature=0), expected)
    assert dropping.training


def test_a_reading_that_fails_halfway_can_be_repeated(model):
    idx = torch.randint(61, (1, 8))
    expected = model(idx)[0]
    cache = model.new_cache(1)
    read(model, idx[:, :5], cache)
    last, attention = model.transformer.h[1].attn, model.transformer.h[1].attn.attention

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    last.attention = interrupted
    with pytest.raises(KeyboardInterrupt):
        read(model, idx[:, 5:], cache)
    assert cache.lengths == [5]
    last.attention = attention
    assert_same(read(model, idx[:, 5:], cache), expected[:, 5:])


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-xl"])
def test_memory_is_two_numbers_for_each_feature_of_each_layer_and_place(preset):
    config = PRESETS[preset]
    with torch.device("meta"):
        cache = GPT(config).bfloat16().new_cache(3)
    numbers = 2 * config.n_layer * 3 * config.block_size * config.n_embd
    assert cache.keys.nbytes + cache.values.nbytes == 2 * numbers, "bfloat16's two bytes"
    assert cache.keys.device.type == cache.values.device.type == "meta"


def test_decoding_takes_no_memory_that_grows_with_the_context():
    """Nothing of the size of the keys so far is made: they are seen where they lie."""
    from benchmarks.memory import peak_bytes

    model = small_gpt(block_size=4096, n_layer=1, n_embd=64)
    cache = model.new_cache(1)
    cache.lengths = [4000]
    token = torch.zeros(1, 1, dtype=torch.int64)
    model.use_attention(lambda q, k, v, **options: q)  # what attention takes is tested with it
    assert peak_bytes(lambda: model.features(token, cache)) < 64 * 1024


def test_a_bfloat16_model_caches_bfloat16(model):
    model.bfloat16()
    idx = torch.randint(61, (2, 8))
    cache = model.new_cache(2)
    logits, expected = read(model, idx, cache, 5, 1, 2), model(idx)[0]
    assert cache.keys.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_autocast_reads_a_float32_cache(model):
    idx = torch.randint(61, (2, 8))
    cache = model.new_cache(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, expected = read(model, idx, cache, 5, 1, 2), model(idx)[0]
        cache.truncate([7, 3])
        step = read(model, torch.stack([idx[0, 7:], idx[1, 3:4]]), cache)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    expected_step = torch.stack([expected[0, 7:], expected[1, 3:4]])
    assert (step - expected_step).abs().max() < 0.1 * expected.abs().max()


def test_a_cache_asks_for_no_gradient():
    model = small_gpt()
    with (
        torch.enable_grad(),
        pytest.raises(UsageError, match=r"call the model under torch.no_grad"),
    ):
        model.features(torch.zeros(1, 1, dtype=torch.int64), model.new_cache(1))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, c: m.features(torch.zeros(2, 3, dtype=torch.int64), c),
         "3 tokens do not fit the context after 10 in the cache: block_size is 12; pass the last"),
        (lambda m, c: m.features(torch.zeros(2, 13, dtype=torch.int64), c),
         "13 tokens do not fit the context: block_size is 12"),
        (lambda m, c: m.features(torch.zeros(3, 1, dtype=torch.int64), c),
         "the cache is of 2 sequences, got 3"),
        (lambda m, c: small_gpt(n_head=4).features(torch.zeros(2, 1, dtype=torch.int64), c),
         r"the cache is for GPTConfig\(.*n_head=2.*the model is GPTConfig\(.*n_head=4"),
        (lambda m, c: c.truncate([11, 4]), r"lengths \[10, 10\] can't be cut to \[11, 4\]"),
        (lambda m, c: c.truncate([10, -1]), r"lengths \[10, 10\] can't be cut to \[10, -1\]"),
        (lambda m, c: c.truncate([10]), r"lengths \[10, 10\] can't be cut to \[10\]"),
        (lambda m, c: m.new_cache(0), "batch_size must be at least 1, got 0"),
        (lambda m, c: m.new_cache(1, 13), r"length must be in 1 ... 12, .*block_size, got 13"),
        (lambda m, c: m.new_cache(1, 0), r"length must be in 1 ... 12, .*block_size, got 0"),
        (lambda m, c: m.features(torch.zeros(1, 5, dtype=torch.int64), m.new_cache(1, 4)),
         "5 tokens do not fit the context after 0 in the cache: its length is 4"),
        (lambda m, c: c.keep([]), r"of 2 sequences the cache can't keep \[\]"),
        (lambda m, c: c.keep([0, 2]), r"of 2 sequences the cache can't keep \[0, 2\]"),
        (lambda m, c: c.keep([1, 0]), r"of 2 sequences the cache can't keep \[1, 0\]"),
        (lambda m, c: c.keep([1, 1]), r"of 2 sequences the cache can't keep \[1, 1\]"),
        (lambda m, c: c.keep([-1]), r"of 2 sequences the cache can't keep \[-1\]"),
    ],
)  # fmt: skip
def test_what_a_cache_can_not_do_is_refused_with_the_values(use, message):
    model = small_gpt()
    cache = model.new_cache(2)
    model.features(torch.zeros(2, 10, dtype=torch.int64), cache)
    with pytest.raises(UsageError, match=message):
        use(model, cache)
    assert cache.lengths == [10, 10]


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"idx must be \(B, T\), or .*, got shape \(3,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), "prompt 0 has none"),
        ([torch.ones(2).long(), torch.ones(0).long()], "prompt 1 has none"),
        ([torch.ones(1, 2).long()], r"prompt 0 must be \(T,\), got shape \(1, 2\)"),
        ([], "at least one prompt is needed, got none"),
    ],
)
def test_prompts_that_can_not_go_on_are_refused(idx, message):
    with pytest.raises(UsageError, match=message):
        generate(small_gpt(), idx, 1)
