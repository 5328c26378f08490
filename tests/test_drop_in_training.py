"""`fastgpt.drop_in()` as models are trained: compiled by inductor, in the processes of
DistributedDataParallel, with activation checkpointing. That our kernels ran is read from the
profiler, which sees the operators of compiled code, and of whatever thread.
"""

import datetime
import os
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from ranks import attempt
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastgpt

V, T, B, LAYERS = 50, 13, 4, 2
TORCHS = ("aten::log_softmax", "aten::_log_softmax", "aten::scaled_dot_product_attention")


class Decoder(nn.Module):
    """Somebody's model, which knows nothing of fastgpt but what `checkpointed` may."""

    def __init__(self, layers=LAYERS, checkpointed=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(16, V)
        self.checkpointed = checkpointed

    def forward(self, tokens, targets):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embedding(tokens)
        for layer in self.layers:
            if self.checkpointed:
                x = self.checkpointed(layer, x, mask, None, True)
            else:
                x = layer(x, mask, is_causal=True)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def kept(layer, *args):
    """Non-reentrant, with the state of the forward."""
    context_fn = fastgpt.checkpoint_context_fn
    return checkpoint(layer, *args, use_reentrant=False, context_fn=context_fn)


def reentrant(layer, *args):
    return checkpoint(layer, *args, use_reentrant=True)


def reentrant_inside(layer, *args):
    """As documented: the function that is checkpointed enters the mode."""

    def inside(*args):
        with fastgpt.drop_in():
            return layer(*args)

    return checkpoint(inside, *args, use_reentrant=True)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (2, B, T), generator=generator).unbind()


def step(model, *args, inside=True):
    """The loss, the gradients, and how often each operator ran that is ours or is replaced."""
    model.zero_grad(set_to_none=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints each start and stop
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        with fastgpt.drop_in() if inside else nullcontext():
            loss = model(*args)
        loss.backward()
    names = Counter(event.name() for event in profile.profiler.kineto_results.events())
    wanted = {n: c for n, c in names.items() if n.startswith("fastgpt::") or n in TORCHS}
    return loss.detach(), [p.grad for p in model.parameters()], wanted


def kernels(layers=LAYERS, forwards=1, loss="_reduced"):
    """The operators of such a step where none is torch's, and each layer runs `forwards` times."""
    return {
        "fastgpt::attention_forward": forwards * layers,
        "fastgpt::attention_backward": layers,
        f"fastgpt::cross_entropy{loss or '_forward'}": 1,
        f"fastgpt::cross_entropy{loss}_backward": 1,
    }


COMPILED = {"loss": ""}  # the operators of the loss are the general ones there


def assert_same(got, want):
    """Loss and gradients, up to the order of sums in float32."""
    torch.testing.assert_close(list(got[:2]), list(want[:2]), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def want():
    found = step(Decoder(), *batch(), inside=False)
    assert set(found[2]) == set(TORCHS)  # or the tests below would see nothing
    return found


def compiled(model, backend, enters):
    """With the mode entered by the compiled function, or around its calls."""
    eager = model.forward

    def inside(*args):
        with fastgpt.drop_in():
            return eager(*args)

    torch._dynamo.reset()
    model.forward = torch.compile(inside if enters else eager, fullgraph=True, backend=backend)
    step(model, *batch(), inside=not enters)  # traced and compiled
    return model


# ---- torch.compile ----


@pytest.mark.slow
@pytest.mark.parametrize("enters", [True, False])
def test_inductor_breaks_the_graph_or_runs_torchs_functions(enters):
    want = step(Decoder(layers=1), *batch(), inside=False)
    model = compiled(Decoder(layers=1), "inductor", enters)
    *got, names = step(model, *batch(), inside=not enters)
    assert names == kernels(layers=1, **COMPILED)
    assert_same(got, want)
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointed", [None, kept, reentrant])
def test_a_compiled_model_runs_torchs_functions(checkpointed, want):
    """Checkpointed or not: the recomputation is in the graph then, and reentrant is no other."""
    if checkpointed and torch.__version__ < (2, 13):
        pytest.skip("torch loses the mode in a compiled checkpoint there")
    model = compiled(Decoder(checkpointed=checkpointed), "aot_eager", enters=True)
    *got, names = step(model, *batch(), inside=False)
    recomputed = names.pop("fastgpt::attention_forward")  # of which the compiler may save some
    assert LAYERS <= recomputed <= (2 * LAYERS if checkpointed else LAYERS)
    assert names.items() <= kernels(**COMPILED).items()
    assert len(names) == 3
    assert_same(got, want)
    torch._dynamo.reset()


# ---- activation checkpointing ----


@pytest.mark.parametrize("checkpointed", [kept, reentrant_inside])
def test_a_checkpoint_recomputes_on_torchs_functions(checkpointed, want):
    *got, names = step(Decoder(checkpointed=checkpointed), *batch())
    assert names == kernels(forwards=2)
    assert_same(got, want)


def test_a_reentrant_checkpoint_recomputes_elsewhere_than_documented(want):
    """It calls the model in the backward pass, where the mode has ended, and takes no context."""
    *got, names = step(Decoder(checkpointed=reentrant), *batch())
    assert names["fastgpt::attention_forward"] == LAYERS  # the forward's
    assert names["aten::scaled_dot_product_attention"] == LAYERS  # the recomputation's
    assert "fastgpt::attention_backward" not in names
    assert_same(got, want)
    with pytest.raises(ValueError, match="context_fn"), fastgpt.drop_in():
        checkpoint(
            nn.Linear(2, 2), torch.ones(2, requires_grad=True), use_reentrant=True,
            context_fn=fastgpt.checkpoint_context_fn,
        )  # fmt: skip


# ---- DistributedDataParallel ----


def replicated(checkpointed=None, **options):
    return DistributedDataParallel(Decoder(checkpointed=checkpointed), **options)


def compile_replicated(**options):
    """Not in one graph, which torch can't here; DDP breaks it where its buckets end."""
    return torch.compile(replicated(**options), backend="aot_eager")


REPLICAS = {
    "plain": (replicated, kernels()),
    "static graph": (lambda: replicated(static_graph=True), kernels()),
    "checkpointed": (lambda: replicated(kept), kernels(forwards=2)),
    "reentrant": (lambda: replicated(reentrant_inside), kernels(forwards=2)),
    "compiled inside": (
        lambda: DistributedDataParallel(compiled(Decoder(), "aot_eager", enters=False)),
        kernels(**COMPILED),
    ),
    "compiled": (compile_replicated, kernels(**COMPILED)),
    "compiled in pieces": (
        lambda: compile_replicated(bucket_cap_mb=0.004), kernels(**COMPILED),
    ),
}  # fmt: skip


def work(rank, folder):
    """One of two processes: of each case the loss, the gradients and the operators."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1024  # torch's is of the size of real models
    mine = [x.chunk(2)[rank] for x in batch()]

    def replica(make):
        torch._dynamo.reset()
        model = make()
        step(model, *mine)  # a compiler traces, and DDP rebuilds its buckets
        return step(model, *mine)

    def accumulated():
        model = replicated()
        mine = [x.chunk(4) for x in batch()]
        parts = [[x[2 * rank + i] for x in mine] for i in range(2)]
        with model.no_sync(), fastgpt.drop_in():
            first = model(*parts[0]) / 2
            first.backward()
        with fastgpt.drop_in():
            second = model(*parts[1]) / 2
        second.backward()
        return (first + second).detach(), [p.grad for p in model.parameters()], None

    found = {name: attempt(replica, make) for name, (make, _) in REPLICAS.items()}
    found["accumulated"] = attempt(accumulated)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [*REPLICAS, "accumulated"])
def test_replicas_run_torchs_functions_or_learn_otherwise_than_one_process(name, ranks, want):
    found = [rank[name] for rank in ranks]
    for result in found:
        assert not isinstance(result, str), result
    loss = (found[0][0] + found[1][0]) / 2
    for _, gradients, names in found:
        assert_same((loss, gradients), want)
        if name in REPLICAS:
            assert names == REPLICAS[name][1]
    for first, second in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(first, second)
