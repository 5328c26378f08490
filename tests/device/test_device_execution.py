"""How the ops run on a GPU: by default, without waiting for it, on any stream, in a CUDA graph."""

import json
from pathlib import Path

import memcheck
import pytest
import torch
from calls import calls
from device_oracle import assert_close, half_ulp, normal, targets

import fastgpt


def assert_equal(got, want):
    for ours, expected in zip(got, want, strict=True):
        assert torch.equal(ours, expected)


def faster_cross_entropy() -> str:
    """The backend that was measured to be the faster on this chip; Triton where nothing was."""
    path = Path(fastgpt.__file__).parent / "backends" / "measured.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    major, minor = torch.cuda.get_device_capability()
    ratios = {e["chip"]: e["ratio"] for e in entries if e["op"] == "cross_entropy"}
    return "native" if ratios.get(f"sm_{major}{minor}", 0) > 1 else "triton"


def test_another_backend_runs_by_default(gpu):
    q = normal(1, 2, 5, 64)
    logits, target = normal(3, 7), targets(3, 7)
    for explanation, backend in (
        (fastgpt.explain(fastgpt.cross_entropy, logits, target), faster_cross_entropy()),
        (fastgpt.explain(fastgpt.scaled_dot_product_attention, q, q, q), "triton"),
    ):
        assert explanation.backend == backend, str(explanation)
        assert explanation.device == "cuda"
    cells = [c for c in fastgpt.info().cells if (c["backend"], c["device"]) == ("triton", "cuda")]
    assert cells
    assert all(cell["available"] for cell in cells), cells


def test_a_cpu_tensor_runs_on_triton(gpu):
    """Beside a GPU it stays with the native kernels, and `explain` says why."""
    explanation = fastgpt.explain(
        fastgpt.cross_entropy, normal(3, 7, device="cpu"), torch.ones(3).long()
    )
    assert explanation.backend != "triton"
    with fastgpt.backend("triton"):
        explanation = fastgpt.explain(
            fastgpt.cross_entropy, normal(3, 7, device="cpu"), torch.ones(3).long()
        )
    reasons = dict(explanation.decisions)
    assert "TRITON_INTERPRET" in reasons["triton"]


@calls
def test_a_call_is_not_what_eager_computes(device, kernels, make):
    got = make(device=device).run()
    with fastgpt.backend("eager"):
        want = make(device=device).run()
    for ours, expected in zip(got, want, strict=True):
        tolerance = 64 * half_ulp(torch.float32) + 8 * half_ulp(ours.dtype)
        assert_close(ours, expected.double(), tolerance)


@calls
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_call_waits_for_the_gpu(gpu, kernels, make):
    """torch raises at a wait of its own; and no other one may outlast what the GPU has to do."""
    call = make()
    call.run()  # compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)  # about 0.2 s
        slept = torch.cuda.current_stream().record_event()
        call.run()
        waited = slept.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited


@calls
def test_a_call_runs_on_another_stream_than_the_current(gpu, kernels, make):
    """The inputs become right on a side stream, after a while. A kernel on any other stream would
    read the old ones; and only an event tells the default stream that the results are there.
    """
    want = make(seed=1).run()
    call, fresh = make(seed=0), make(seed=1)
    side = torch.cuda.Stream()
    call.run()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)  # about 0.2 s
        call.fill(fresh)
        got = call.run()
        done = side.record_event()
    assert not done.query(), "the sleep was over before the calls were queued: nothing was tested"
    torch.cuda.current_stream().wait_event(done)
    same = [(a == b).all() for a, b in zip(got, want, strict=True)]
    assert all(same)


@calls
def test_a_replayed_graph_gives_an_old_answer(gpu, kernels, make):
    """Forward and backward, captured once, replayed on new numbers in the same memory."""
    call = make(seed=0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.run()
    for seed in (1, 2):
        fresh = make(seed)
        call.fill(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(got, fresh.run())


def test_the_script_for_the_memory_checker_fails(gpu, kernels):
    """Without the checker, which then finds the kernels in Triton's cache."""
    memcheck.main("cuda", (kernels,))


@calls
def test_a_call_on_another_device_than_the_current_goes_wrong(gpu, kernels, make):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, {torch.cuda.device_count()} is there")
    with torch.cuda.device(1):
        want = make(seed=0, device="cuda:1").run()
    with torch.cuda.device(0):
        got = make(seed=0, device="cuda:1").run()
        assert all(x.device == torch.device("cuda:1") for x in got)
        assert_equal(got, want)
