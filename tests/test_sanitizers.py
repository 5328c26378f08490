"""The CPU kernels under the address and undefined-behaviour sanitizers, without torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_kernels_read_and_write_only_their_buffers(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    sources = [ROOT / "tests/kernels_under_sanitizers.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]
    program = tmp_path / "kernels"
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith("cases")
