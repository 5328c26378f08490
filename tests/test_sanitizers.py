"""The CPU kernels under the address and undefined-behaviour sanitizers, without torch."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from once import made_once

ROOT = Path(__file__).parent.parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """Built once. -Og takes a third of -O1's time over what the sanitizers put in, and -g1 names
    the lines of a report.
    """

    def make(folder):
        compiler = os.environ.get("CXX") or shutil.which("c++")
        sources = [ROOT / "tests/kernels_under_sanitizers.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]
        objects = [folder / f"{source.name}.o" for source in sources]

        def build(source, compiled):
            command = [compiler, "-Og", "-g1", *SANITIZE, "-c", str(source), "-o", str(compiled)]
            subprocess.run(command, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(build, sources, objects))
        command = [compiler, *SANITIZE, *map(str, objects), "-o", str(folder / "kernels")]
        subprocess.run(command, check=True)

    return made_once(tmp_path_factory, "sanitized-kernels", make) / "kernels"


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["cross-entropy", "linear cross-entropy", "attention"])
def test_kernels_read_and_write_only_their_buffers(program, kernels):
    result = subprocess.run([str(program), kernels], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split(" cases")[0]) > 1000
