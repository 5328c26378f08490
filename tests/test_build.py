"""The install: every supported way of `pip install -e .`, and every way a build can go wrong.

The tests marked slow install a copy of the source tree into fresh virtual environments, and need
the package index. Each environment is a copy of one into which torch was installed, except where
the absence of torch is the point.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TORCH = torch.__version__

spec = importlib.util.spec_from_file_location("fastgpt_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


# --- what a build decides -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("8.0", ["arch=compute_80,code=sm_80"]),
        ("9.0a", ["arch=compute_90a,code=sm_90a"]),
        ("12.0f", ["arch=compute_120f,code=sm_120f"]),
        ("8.0 9.0;10.0, 8.0;", [f"arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)]),
        ("8.6+PTX", ["arch=compute_86,code=sm_86", "arch=compute_86,code=compute_86"]),
    ],
)
def test_arch_list_is_read_as_torch_reads_it(text, targets):
    assert setup.parse_arch_list(text) == targets


@pytest.mark.parametrize("text", ["Volta", "80", "8.0+ptx", "8.0b", ";"])
def test_arch_list_that_names_no_architecture_is_refused_by_name(text):
    with pytest.raises(setup.BuildFailure, match="TORCH_CUDA_ARCH_LIST holds"):
        setup.parse_arch_list(text)


def test_default_arch_list_runs_on_later_gpus():
    assert "arch=compute_80,code=compute_80" in setup.parse_arch_list(setup.DEFAULT_ARCH_LIST)


def test_toolkit_of_torchs_major_version_is_chosen():
    old, new = setup.Toolkit("/old/nvcc", "12.4"), setup.Toolkit("/new/nvcc", "13.1")
    for cuda, toolkit in [("12.8", old), ("13.0", new)]:
        with_cuda = setup.Torch(Path("/torch"), "2.10.0", cuda)
        assert setup.choose_toolkit(with_cuda, [old, new]) == toolkit


@pytest.mark.parametrize(
    ("cuda", "toolkits", "reason"),
    [
        (None, [("/nvcc", "13.0")], r"torch 2\.10\.0 has no CUDA"),
        ("12.8", [], "No CUDA toolkit was found.*Install CUDA toolkit 12"),
        (
            "12.8",
            [("/nvcc", "13.0")],
            r"CUDA 12\.8.*only /nvcc \(13\.0\)\. Install CUDA toolkit 12",
        ),
    ],
)
def test_unusable_toolkit_is_reported_with_what_is_missing(cuda, toolkits, reason):
    with_cuda = setup.Torch(Path("/torch"), "2.10.0", cuda)
    with pytest.raises(setup.NotBuilt, match=reason):
        setup.choose_toolkit(with_cuda, [setup.Toolkit(*toolkit) for toolkit in toolkits])


@pytest.mark.parametrize(("version", "usable"), [("2.9.1", False), ("2.10.0a0+git1", True)])
def test_torch_older_than_the_stable_abi_is_refused(version, usable):
    old = setup.Torch(Path("/torch"), version, None)
    if usable:
        assert setup.check_torch(old) is old
    else:
        with pytest.raises(setup.BuildFailure, match=r"torch 2\.9\.1 is older than torch 2\.10"):
            setup.check_torch(old)


def test_failing_step_is_quoted_without_ninja(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "find_ninja", lambda: None)
    failing = setup.Step(["sh", "-c", "echo here it broke >&2; exit 1"], [], tmp_path / "o", None)
    linking = setup.Step(["touch", str(tmp_path / "linked")], [], tmp_path / "linked", None)
    with pytest.raises(setup.BuildFailure, match="here it broke"):
        setup.run_steps([failing, linking], tmp_path)
    assert not (tmp_path / "linked").exists()


# --- real installs --------------------------------------------------------------------------------


class Environment:
    """A virtual environment, and a copy of the source tree to install into it."""

    def __init__(self, folder, tree, constraints):
        self.python = folder / "bin" / "python"
        self.folder = folder
        self.tree = tree
        # -O0, after the build's own -O3, for the time these tests take.
        self.variables = {"PIP_CONSTRAINT": constraints, "CXXFLAGS": "-O0"}

    def run(self, *command, check=True, **variables):
        ours = re.compile("PYTHON|VIRTUAL_ENV|FASTGPT_|TORCH_|CUDA_|MAX_JOBS|CXX|LDFLAGS")
        inherited = {name: value for name, value in os.environ.items() if not ours.match(name)}
        result = subprocess.run(
            [str(self.python), *map(str, command)],
            cwd=self.folder,
            env={**inherited, **self.variables, **variables},
            capture_output=True,
            text=True,
        )
        if check and result.returncode:
            pytest.fail(f"{command} failed with {variables}:\n{result.stdout}{result.stderr}")
        return result

    def pip_install(self, *arguments, check=True, **variables):
        if "--no-build-isolation" not in arguments:
            # For pip >= 25.3, whose PIP_CONSTRAINT leaves build requirements alone.
            variables["PIP_BUILD_CONSTRAINT"] = self.variables["PIP_CONSTRAINT"]
        return self.run("-m", "pip", "install", "-v", *arguments, check=check, **variables)

    def record(self):
        return json.loads((self.tree / "fastgpt" / "_build.json").read_text())

    def cell(self):
        """What fastgpt.info says of the native cross-entropy kernel."""
        info = json.loads(self.run("-m", "fastgpt.info", "--json").stdout)
        [cell] = [
            cell
            for cell in info["cells"]
            if (cell["op"], cell["backend"], cell["device"]) == ("cross_entropy", "native", "cpu")
        ]
        return cell

    def assert_native_works(self):
        assert self.record()["C"] == {"built": True, "reason": None}
        assert self.cell()["available"], self.cell()["reason"]
        self.assert_works()

    def assert_works(self):
        self.run(
            "-c",
            "import torch, fastgpt\n"
            "logits, target = torch.randn(5, 7), torch.tensor([0, 6, 1, -100, 3])\n"
            "expected = torch.nn.functional.cross_entropy(logits, target)\n"
            "torch.testing.assert_close(fastgpt.cross_entropy(logits, target), expected)",
        )


def copy_tree(destination):
    """Copy what git tracks, or would."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, destination / name)


@pytest.fixture(scope="module")
def constraints(tmp_path_factory):
    """Keep every torch to the one that runs the tests: an index may offer one of gigabytes."""
    path = tmp_path_factory.mktemp("pip") / "constraints.txt"
    # The distribution's version: torch.__version__ may have a local part that an index lacks.
    path.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    return str(path)


@pytest.fixture(scope="module")
def new_environment(tmp_path_factory, constraints):
    """Make an environment from the interpreter that runs the tests, or from a copy of another."""

    def make(copied_from=None):
        # Every path in the build has a space, and characters that ninja and the shell know.
        folder = tmp_path_factory.mktemp("a (new) $HOME,")
        environment = Environment(folder / "venv", folder / "source tree", constraints)
        copy_tree(environment.tree)
        if copied_from:
            # Links, not copies: pip replaces files, it does not write into them.
            shutil.copytree(
                copied_from.folder, environment.folder, symlinks=True, copy_function=os.link
            )
        else:
            command = [sys.executable, "-m", "venv", str(environment.folder)]
            subprocess.run(command, check=True)
        return environment

    return make


@pytest.fixture(scope="module")
def plain(new_environment):
    """The plain real thing: an empty environment, the newest pip, and one command."""
    environment = new_environment()
    environment.pip_install("--upgrade", "pip")
    environment.pip_install("-e", environment.tree)
    return environment


@pytest.fixture(scope="module")
def new_environment_with_torch(new_environment, plain):
    def make():
        environment = new_environment(copied_from=plain)
        environment.run("-m", "pip", "uninstall", "-y", "fastgpt")
        return environment

    return make


@pytest.fixture(scope="module")
def developer(new_environment_with_torch):
    """An environment without build isolation, in which one tree is installed again and again."""
    environment = new_environment_with_torch()
    environment.pip_install("setuptools", "ninja")
    environment.install = lambda **options: environment.pip_install(
        "--no-build-isolation", "-e", environment.tree, **options
    )
    return environment


@pytest.mark.slow
@pytest.mark.parametrize("pip", ["pip==23.2.1", "pip"])
def test_isolated_build_uses_the_torch_that_is_installed(new_environment_with_torch, pip):
    environment = new_environment_with_torch()
    environment.pip_install("--upgrade", pip)
    result = environment.pip_install("-e", environment.tree)
    assert "Collecting torch" not in result.stdout
    assert environment.record()["torch"] == TORCH
    environment.assert_native_works()


@pytest.mark.slow
def test_isolated_build_without_torch_asks_for_it(plain):
    assert plain.record()["torch"] == TORCH
    plain.assert_native_works()


@pytest.mark.slow
def test_old_pips_isolated_build_without_torch_asks_for_it(new_environment):
    environment = new_environment()
    environment.pip_install("pip==23.2.1")
    # The dependencies would only install torch a second time.
    environment.pip_install("--no-deps", "-e", environment.tree)
    assert environment.record()["torch"] == TORCH
    assert environment.record()["C"] == {"built": True, "reason": None}


@pytest.mark.slow
def test_build_needs_neither_ninja_nor_a_recent_setuptools(new_environment_with_torch, tmp_path):
    environment = new_environment_with_torch()
    environment.pip_install("setuptools==68.0.0", "wheel")
    path = path_without(tmp_path, "ninja")
    environment.pip_install("--no-build-isolation", "-e", environment.tree, PATH=path)
    assert not list(environment.tree.rglob("build.ninja"))
    environment.assert_native_works()


@pytest.mark.slow
def test_second_build_compiles_only_what_changed(developer):
    def objects():
        return {path: path.stat().st_mtime_ns for path in developer.tree.rglob("*.cpp.o")}

    developer.install()
    developer.assert_native_works()
    first = objects()
    assert len(first) > 1
    developer.install()
    assert objects() == first
    header = developer.tree / "csrc" / "cpu" / "kernels.h"
    header.write_text(header.read_text() + "\n// edited\n")
    developer.install()
    assert any(objects()[path] > first[path] for path in first)
    developer.assert_native_works()


@pytest.mark.slow
def test_missing_compiler_leaves_a_working_package_that_says_why(developer, tmp_path):
    path = path_without(tmp_path, "c++", "g++", "clang++")
    for variables, reason in [
        ({"PATH": path}, "No C++ compiler was found"),
        ({"CXX": "/nonexistent"}, "The C++ compiler that CXX names, '/nonexistent', cannot be run"),
    ]:
        developer.install()
        developer.install(**variables)
        cell = developer.cell()
        assert not cell["available"]
        assert reason in cell["reason"]
        assert "install fastgpt again" in cell["reason"]
        assert not list(developer.tree.glob("fastgpt/*.so")), "an older extension has survived"
        developer.assert_works()


@pytest.mark.slow
def test_failing_compiler_leaves_a_working_package_that_quotes_it(developer, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'the disk is on fire' >&2\nexit 1\n")
    compiler.chmod(0o755)
    developer.install(CXX=str(compiler))
    cell = developer.cell()
    assert not cell["available"]
    assert "the disk is on fire" in cell["reason"]
    log = re.search(r"The whole of it is in (.*build\.log)", cell["reason"])
    assert "the disk is on fire" in Path(log[1]).read_text()
    developer.assert_works()


@pytest.mark.slow
def test_forced_build_fails_the_install(developer):
    result = developer.install(check=False, CXX="/nonexistent", FASTGPT_FORCE_BUILD="1")
    assert result.returncode != 0
    assert "The C++ compiler that CXX names, '/nonexistent'" in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_cuda_that_is_asked_for_and_impossible_is_explained(developer):
    sources = list(developer.tree.glob("csrc/cuda/*.c[pu]*"))
    developer.install(FASTGPT_CUDA="1")
    missing = f"torch {TORCH} has no CUDA" if sources else "csrc/cuda holds no sources"
    assert "FASTGPT_CUDA=1 could not be met. " in developer.record()["cuda"]["reason"]
    assert missing in developer.record()["cuda"]["reason"]
    developer.assert_native_works()
    developer.install(FASTGPT_CUDA="0")
    assert "FASTGPT_CUDA=0" in developer.record()["cuda"]["reason"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files with nm and readelf")
def test_extension_keeps_to_the_stable_abis(developer):
    developer.install()
    [extension] = developer.tree.glob("fastgpt/_C*")
    assert extension.name == "_C.abi3.so"

    def output(*command):
        run = subprocess.run([*command, extension], check=True, stdout=subprocess.PIPE, text=True)
        return run.stdout

    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d"))
    assert "libtorch_cpu.so" in needed
    assert not [
        name for name in needed if "python" in name or "cuda" in name or name == "libc10.so"
    ]
    assert "RUNPATH" not in output("readelf", "-d")
    symbols = re.findall(r" U (\S+)", output("nm", "-D"))
    # Py_LIMITED_API hides the declaration of every other function; macros reach these few.
    private = {name for name in symbols if name.startswith("_Py")}
    assert private <= {"_Py_Dealloc", "_Py_NoneStruct", "_Py_TrueStruct", "_Py_FalseStruct"}
    cplusplus = [name for name in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
    assert not cplusplus, "these are not in torch's stable ABI"


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_need_and_nothing_stale(developer, tmp_path):
    developer.install()
    (developer.tree / "fastgpt" / "_cuda.abi3.so").write_text("left by another build")
    build = "from setuptools import build_meta; print(build_meta.{}({!r}))"
    for kind in ("build_wheel", "build_sdist"):
        code = f"import os; os.chdir({str(developer.tree)!r}); {build.format(kind, str(tmp_path))}"
        developer.run("-c", code)
    [wheel] = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"fastgpt/_C.abi3.so", "fastgpt/_build.json", "fastgpt/py.typed"} <= names
    assert "fastgpt/backends/measured.json" in names
    assert "fastgpt/_cuda.abi3.so" not in names
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    written = {str(path.relative_to(developer.tree)) for path in developer.tree.glob("csrc/**/*.*")}
    assert written <= packed
    assert "fastgpt/backends/measured.json" in packed
    assert not [name for name in packed if name.endswith((".so", "_build.json"))]


@pytest.mark.slow
def test_oldest_torch(new_environment):
    python = os.environ.get("FASTGPT_TEST_OLDEST_TORCH")
    if not python:
        pytest.skip("FASTGPT_TEST_OLDEST_TORCH names no Python that has torch 2.10")
    site, version = subprocess.run(
        [python, "-c", "import torch; print(torch.__path__[0]); print(torch.__version__)"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.splitlines()
    assert version.startswith("2.10.")
    environment = new_environment()
    shutil.rmtree(environment.folder)
    subprocess.run([python, "-m", "venv", str(environment.folder)], check=True)
    [packages] = environment.folder.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(f"{Path(site).parent}\n")
    environment.pip_install("--no-deps", "-e", environment.tree)
    assert environment.record()["torch"] == version
    environment.assert_native_works()


def path_without(folder, *names):
    """A PATH with everything that is on this one but those commands."""
    commands = folder / "commands"
    commands.mkdir()
    for entry in os.environ["PATH"].split(os.pathsep):
        for path in Path(entry).glob("*"):
            if path.name not in names and not (commands / path.name).is_symlink():
                (commands / path.name).symlink_to(path)
    return str(commands)
