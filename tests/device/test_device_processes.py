"""What ends a process or must be asked for when one starts, on a GPU: in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k != "FASTGPT_AUTOTUNE"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("classes", [10, 5000])
@pytest.mark.parametrize("target", ["classes", "-1"])
def test_a_target_out_of_range_is_not_noticed(gpu, kernels, classes, target):
    """As with torch: a device assertion, which the next synchronisation raises."""
    ended = python(
        f"""
import torch, fastgpt
classes = {classes}
x = torch.randn(4, classes, device="cuda")
t = torch.zeros(4, dtype=torch.int64, device="cuda")
print("on", fastgpt.explain(fastgpt.cross_entropy, x, t).backend)
fastgpt.cross_entropy(x, t)
torch.cuda.synchronize()
print("warm")
t[2] = {target}
try:
    fastgpt.cross_entropy(x, t)
    torch.cuda.synchronize()
except RuntimeError as error:
    print("raised", error)
""",
        FASTGPT_BACKEND=kernels,
    )
    assert f"on {kernels}" in ended.stdout, ended.stderr
    assert "warm" in ended.stdout, ended.stderr
    assert "raised" in ended.stdout, ended.stdout + ended.stderr
    assert "device-side assert" in ended.stdout
    assert "out of bounds" in ended.stdout + ended.stderr


def test_a_target_of_ignore_index_out_of_range_is_an_error(gpu, kernels):
    ended = python(
        """
import torch, fastgpt
x = torch.randn(4, 5000, device="cuda")
t = torch.tensor([1, -100, 7, 999999], device="cuda")
print(fastgpt.cross_entropy(x, t.where(t != 999999, -100)).item() > 0)
print(fastgpt.cross_entropy(x, t.where(t != -100, 999999), ignore_index=999999).item() > 0)
""",
        FASTGPT_BACKEND=kernels,
    )
    assert ended.stdout.split() == ["True", "True"], ended.stderr


@pytest.mark.slow
def test_autotuning_measures_nothing_or_forgets(gpu, tmp_path):
    """Among the first three candidates of each kernel: all of them take minutes to compile."""
    code = """
import time, torch, fastgpt
from fastgpt.backends.triton import tiles
every = tiles.candidates
tiles.candidates = lambda *problem: every(*problem)[:3]
q = torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
start = time.perf_counter()
y = fastgpt.scaled_dot_product_attention(q, q, q, is_causal=True)
y.backward(torch.ones_like(y))
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
    cache = {"FASTGPT_AUTOTUNE": "1", "FASTGPT_CACHE": str(tmp_path)}
    first = python(code, **cache)
    assert first.returncode == 0, first.stderr
    files = sorted(tmp_path.rglob("autotune/*.json"))
    assert len(files) == 3, "no choice was stored for a kernel"
    for file in files:
        stored = json.loads(file.read_text())
        assert stored["config"]
        assert len(stored["milliseconds"]) > 1
    stamps = [file.stat().st_mtime_ns for file in files]
    second = python(code, **cache)
    assert second.returncode == 0, second.stderr
    assert sorted(tmp_path.rglob("autotune/*.json")) == files
    assert [file.stat().st_mtime_ns for file in files] == stamps, "it was tuned again"
    assert float(second.stdout) < float(first.stdout)
