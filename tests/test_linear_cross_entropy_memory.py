"""What linear cross-entropy holds beside its inputs and gradients: 64 MiB, and a float32 copy of
16-bit gradients, whatever the number of rows times that of classes.

The most that a fresh process had resident at once, so that the kernels' own buffers count, too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of a process"
)

MIB = 1 << 20
NOISE = 4 * MIB  # what a process of Python and torch grows by in a call of any size

MEASURE = """
import json, sys
import torch, fastgpt
n, classes, features, options = json.loads(sys.argv[1])
dtype = getattr(torch, options.pop("dtype"))
gradients, bias = options.pop("gradients", True), options.pop("bias", True)
torch.set_num_threads(options.pop("threads", 1))
generator = torch.Generator().manual_seed(0)

def tensors(n, classes):
    x = torch.randn(n, features, generator=generator).to(dtype)
    W = torch.randn(classes, features, generator=generator).to(dtype)
    b = torch.zeros(classes, dtype=dtype) if bias else None
    return x, W, b, torch.randint(classes, (n,), generator=generator)

def kib(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

def run(x, W, b, t):
    leaves = [a.requires_grad_(gradients) for a in (x, W, b) if a is not None]
    loss = fastgpt.linear_cross_entropy(x, W, t, linear_bias=b, **options)
    upstream = torch.full_like(loss, 0.7)
    return loss, torch.autograd.grad(loss, leaves, upstream) if gradients else ()

x, W, _, t = tensors(3, 5)
explanation = fastgpt.explain(fastgpt.linear_cross_entropy, x, W, t)
assert explanation.backend == "native", explanation
run(*tensors(64, 100))
problem = tensors(n, classes)
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
loss, gradients = run(*problem)
grown = kib("VmHWM") - before
assert all(g.isfinite().all() for g in gradients)
print(json.dumps([grown * 1024, float(loss.float().mean())]))
"""


def grown(n, classes, features, **options) -> tuple[int, float]:
    """By how many bytes a process grew at most for a forward and backward, and the mean loss."""
    paths = [str(Path(fastgpt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    shown = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([n, classes, features, options])],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert shown.returncode == 0, shown.stderr
    size, loss = json.loads(shown.stdout)
    return size, loss


def allowed(n, classes, features, dtype, gradients=True) -> int:
    """Gradients, their float32 copy if they are of 16 bits, and 64 MiB."""
    numbers = (n + classes) * features + classes if gradients else 0
    copies = dtype.itemsize + (4 if dtype.itemsize < 4 else 0)
    return numbers * copies + 64 * MIB + NOISE


CALLS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 without gradients": {"dtype": torch.bfloat16, "gradients": False},
    "float32, unreduced, in two threads": {
        "dtype": torch.float32, "reduction": "none", "threads": 2, "bias": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_memory_grows_with_rows_times_classes(name):
    """Logits of 512 MiB in float32, which the limit is far below."""
    n, classes, features = 2048, 65536, 8
    options = dict(CALLS[name])
    dtype = options["dtype"]
    limit = allowed(n, classes, features, dtype, options.get("gradients", True))
    assert limit < n * classes * 4 / 5
    size, loss = grown(
        n, classes, features, **{**options, "dtype": str(dtype).removeprefix("torch.")}
    )
    assert size <= limit, f"{size / MIB:.0f} MiB of {limit / MIB:.0f}"
    assert 11 < loss < 16  # log C, and half the variance of the logits


@pytest.mark.slow
def test_four_billion_logits_need_gigabytes():
    """16384 x 262144 in bfloat16: logits of 8 GiB, of more numbers than 32 bits count."""
    n, classes, features = 16384, 262144, 8
    assert n * classes >= 1 << 32
    size, loss = grown(n, classes, features, dtype="bfloat16")
    limit = allowed(n, classes, features, torch.bfloat16)
    assert size <= limit, f"{size / MIB:.0f} MiB of {limit / MIB:.0f}"
    assert 12 < loss < 17
