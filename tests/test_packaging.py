"""What is in the wheel and in the source distribution, and what a build that cannot be says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import vae_fast

ROOT = Path(__file__).resolve().parent.parent
MNIST = {
    f"vae_fast/data/mnist/{name}.gz"
    for name in (
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    )
}


@pytest.fixture(scope="module")
def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("vae-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vae-fast is imported from a source folder, not installed")


@pytest.fixture(scope="module")
def wheel(distribution: importlib.metadata.Distribution) -> set[str]:
    """The files that the installed wheel brought."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("an editable install holds no files of its own")
    return {str(file) for file in distribution.files or () if not str(file).endswith(".pyc")}


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a source distribution of this checkout, built in a process without torch."""
    folder = tmp_path_factory.mktemp("sdist")
    program = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, '.')\n"
        "import build_backend; build_backend.build_sdist(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("vae_fast-*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def run_setup(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py with these arguments, as far as it gets without compiling anything."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "CXX")
    }
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True)


def script(path: Path, commands: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return str(path)


def toolkit(folder: Path, nvcc: str) -> str:
    """A CUDA toolkit that is nothing but this nvcc."""
    script(folder / "bin/nvcc", nvcc)
    return str(folder)


def fake_torch(folder: Path, cuda: str | None = "13.0") -> str:
    """Where a torch lies that says of itself what builds and imports ask, in an instant; for PYTHONPATH."""
    (folder / "torch.py").write_text(
        "from types import SimpleNamespace\n"
        f"__version__, version = '2.99.0', SimpleNamespace(cuda={cuda!r})\n"
    )
    return str(folder)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    return runpy.run_path("setup.py")


class TestWheel:
    def test_the_tested_package_is_the_installed_one(self, wheel, distribution):
        assert Path(vae_fast.__file__) == Path(distribution.locate_file("vae_fast/__init__.py"))

    def test_holds_the_extension_for_this_python(self, wheel):
        assert any(re.fullmatch(r"vae_fast/_C\.cpython-3\d+-.*\.so", file) for file in wheel)

    def test_holds_mnist(self, wheel):
        assert wheel >= MNIST

    def test_is_typed(self, wheel):
        assert {"vae_fast/py.typed", "vae_fast/_C.pyi"} <= wheel

    def test_holds_every_module(self, wheel):
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vae_fast").rglob("*.py")}
        assert modules | {"vae_fast/_build_config.py"} <= wheel

    def test_holds_the_benchmarks_of_the_command_line(self, wheel):
        modules = {f"vae_fast/_bench/{path.name}" for path in (ROOT / "bench").glob("*.py")}
        assert modules <= wheel

    def test_holds_nothing_but_the_package(self, wheel, distribution):
        own = ("vae_fast/", f"vae_fast-{distribution.version}.dist-info/")
        assert {file for file in wheel if not file.startswith(own)} <= {"../../../bin/vae-fast"}

    def test_holds_the_licences(self, wheel, distribution):
        info = f"vae_fast-{distribution.version}.dist-info/licenses"
        assert {f"{info}/LICENSE", f"{info}/NOTICE"} <= wheel


class TestMetadata:
    def test_version_is_that_of_the_package(self, distribution):
        assert distribution.version == vae_fast.__version__ == vae_fast.build_info()["version"]

    def test_names_the_licence_of_the_code_and_of_mnist(self, distribution):
        assert distribution.metadata["License-Expression"] == "Apache-2.0 AND CC-BY-SA-3.0"

    def test_run_time_dependencies_are_few(self, distribution):
        needed = [requirement for requirement in distribution.requires or () if "extra ==" not in requirement]
        names = {re.split(r"[<>=~!;\s\[]", requirement)[0] for requirement in needed}
        assert names == {"torch", "numpy", "safetensors", "matplotlib", "tqdm", "click"}

    def test_installs_the_command(self, distribution):
        (script,) = (entry for entry in distribution.entry_points if entry.group == "console_scripts")
        assert (script.name, script.value) == ("vae-fast", "vae_fast.cli:main")


class TestSourceDistribution:
    def test_holds_all_that_a_build_reads(self, source_distribution):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
        package = {str(path.relative_to(ROOT)) for path in (ROOT / "vae_fast").rglob("*.py")}
        package -= {"vae_fast/_build_config.py"}
        build = {"setup.py", "pyproject.toml", "build_backend.py", "CMakeLists.txt", "csrc/sources.txt"}
        texts = {"README.md", "LICENSE", "NOTICE"}
        assert sources | package | build | texts | MNIST <= source_distribution

    def test_holds_the_tests(self, source_distribution):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("*.py")} <= source_distribution

    def test_holds_nothing_that_was_built(self, source_distribution):
        built = [name for name in source_distribution if name.endswith((".so", ".pyc", "_build_config.py"))]
        assert built == []


class TestBuild:
    def test_backend_asks_for_torch_only_where_there_is_none(self, monkeypatch):
        spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
        backend = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(backend)
        assert backend.get_requires_for_build_wheel() == []
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as in an isolated build
        assert backend.get_requires_for_build_wheel() == []
        assert Path(backend._environment_torch()) == Path(torch.__file__).parent.parent
        monkeypatch.setattr(backend, "_site_packages", lambda: [])
        assert (
            backend.get_requires_for_build_editable() == [backend._torch_requirement()[0]] == ["torch>=2.11"]
        )

    def test_forced_cuda_with_a_cpu_build_of_torch_fails(self, tmp_path):
        result = run_setup("build_ext", FORCE_CUDA="1", PYTHONPATH=fake_torch(tmp_path, cuda=None))
        assert result.returncode != 0
        assert "torch 2.99.0 is no CUDA build; install one that is" in result.stderr

    def test_forced_cuda_contradicts_cpu_only(self, tmp_path):
        result = run_setup(
            "build_ext", FORCE_CUDA="1", VAE_FAST_CPU_ONLY="1", PYTHONPATH=fake_torch(tmp_path)
        )
        assert result.returncode != 0
        assert "FORCE_CUDA=1, but VAE_FAST_CPU_ONLY=1 is set; unset it" in result.stderr

    def test_missing_compiler_fails(self, tmp_path):
        result = run_setup("build_ext", CXX="no-such-compiler", PYTHONPATH=fake_torch(tmp_path))
        assert result.returncode != 0
        assert "there is no C++ compiler named no-such-compiler; install GCC" in result.stderr

    @pytest.mark.parametrize("wanted", ["many", "0", "-1"])
    def test_wrong_number_of_jobs_fails(self, setup, monkeypatch, wanted):
        monkeypatch.setenv("MAX_JOBS", wanted)
        with pytest.raises(SystemExit, match=f'MAX_JOBS is "{wanted}"; wanted a whole number from 1'):
            setup["jobs"]()

    @pytest.mark.parametrize(
        "nvcc, message",
        [
            ("exit 1", "nvcc --version says nothing; mend the toolkit, or set CUDA_HOME to another"),
            (
                "echo release 12.4, V12.4.131",
                "nvcc is of CUDA 12.4, torch 2.99.0 of CUDA 13.0; install a CUDA 13.0",
            ),
            (
                "if [ $1 = --version ]; then echo release 13.0, V13.0.88; "
                "elif [ $1 = --list-gpu-code ]; then echo sm_90; "
                "else echo 'probe.cu: error: unsupported GNU version' >&2; exit 1; fi",
                "cannot compile an empty kernel (probe.cu: error: unsupported GNU version); mend the toolkit",
            ),
        ],
        ids=["broken", "of another CUDA", "without a host compiler"],
    )
    def test_nvcc_that_will_not_do_fails(self, tmp_path, nvcc, message):
        result = run_setup(
            "build_ext", FORCE_CUDA="1", CUDA_HOME=toolkit(tmp_path, nvcc), PYTHONPATH=fake_torch(tmp_path)
        )
        assert result.returncode != 0
        assert message in result.stderr

    def test_cuda_home_without_nvcc_fails(self, tmp_path):
        result = run_setup(
            "build_ext", FORCE_CUDA="1", CUDA_HOME=str(tmp_path), PYTHONPATH=fake_torch(tmp_path)
        )
        assert result.returncode != 0
        assert f"CUDA_HOME is {tmp_path}, without bin/nvcc; set it to a CUDA 13.0 toolkit" in result.stderr

    def test_no_nvcc_anywhere_is_a_reason_with_a_remedy(self, setup, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(Path, "exists", lambda path: False)
        with pytest.raises(setup["NoCuda"], match="there is no nvcc on PATH"):
            setup["find_cuda_home"]("13.0", tmp_path)

    def test_architecture_that_nvcc_does_not_know_fails(self, tmp_path):
        nvcc = "case $1 in --version) echo release 13.0, V13.0.88;; --list-gpu-code) echo sm_90;; esac"
        result = run_setup(
            "build_ext",
            CUDA_HOME=toolkit(tmp_path, nvcc),
            PYTHONPATH=fake_torch(tmp_path),
            TORCH_CUDA_ARCH_LIST="7.0;9.0",
        )
        assert result.returncode != 0
        assert "does not know 7.0 of TORCH_CUDA_ARCH_LIST; leave it out or update CUDA" in result.stderr

    def test_no_torch_fails(self, tmp_path):
        (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open')")
        result = run_setup("build_ext", PYTHONPATH=str(tmp_path))
        assert result.returncode != 0
        assert "building needs torch, which does not import (libtorch.so: cannot open); pip" in result.stderr

    @pytest.mark.parametrize("free, wanted", [(0.5, 1), (5.0, 2), (1000.0, 8)])
    def test_as_many_files_compile_at_once_as_memory_holds(self, setup, monkeypatch, capsys, free, wanted):
        monkeypatch.delenv("MAX_JOBS", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
        monkeypatch.setitem(setup["jobs"].__globals__, "free_gib", lambda: free)
        assert setup["jobs"]() == wanted
        said = f"{wanted} of 8 cores compile, for {free} GiB of memory are free; MAX_JOBS overrides"
        assert (said in capsys.readouterr().out) == (wanted < 8)

    def test_a_killed_compiler_hints_at_memory(self, tmp_path):
        """The whole of build_ext, in a copy, with a compiler that the system kills."""
        for name in ("setup.py", "pyproject.toml", "README.md", "csrc", "vae_fast/__init__.py"):
            source = ROOT / name
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
        compiler = script(tmp_path / "c++", "case $1 in -dumpfullversion) echo 12.2.0;; *) kill -9 $$;; esac")
        result = run_setup("build_ext", folder=tmp_path, CXX=compiler, VAE_FAST_CPU_ONLY="1", MAX_JOBS="1")
        assert result.returncode != 0
        assert "If a compiler was killed, memory ran out: set MAX_JOBS=1 NVCC_THREADS=1" in result.stderr

    def test_why_there_are_no_cuda_kernels_is_recorded(self):
        info = vae_fast.build_info()
        assert bool(info["why_no_cuda"]) != info["cuda"]


class TestImport:
    """What `import vae_fast` says when the extension and torch do not go together."""

    @staticmethod
    def import_error(folder: Path, config: dict[str, object] | None, extension: str = "") -> str:
        """The message of an installation with this _build_config.py, and with this for an extension."""
        package = folder / "vae_fast"
        package.mkdir()
        (package / "__init__.py").write_text("from . import _extension")
        shutil.copy(ROOT / "vae_fast/_extension.py", package)
        (package / "_C.py").write_text(extension)
        if config is not None:
            built = {"TORCH_VERSION": "2.99.1+cpu", "TORCH_CUDA": None, "CUDA": False} | config
            lines = [f"{name} = {value!r}\n" for name, value in built.items()]
            (package / "_build_config.py").write_text("".join(lines))
        fake_torch(folder)
        program = "import vae_fast"
        result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
        return result.stderr.strip().splitlines()[-1] if result.returncode else "imported"

    def test_a_torch_of_the_same_release_will_do(self, tmp_path):
        assert self.import_error(tmp_path, {}) == "imported"

    def test_a_torch_of_another_release_is_named_with_what_to_do(self, tmp_path):
        message = self.import_error(tmp_path, {"TORCH_VERSION": "2.98.1"})
        assert message.startswith("ImportError: vae_fast was built for torch 2.98.1 (CUDA None)")
        assert "but torch 2.99.0 (CUDA 13.0) is installed" in message
        assert "`pip install --force-reinstall --no-deps .` in the source folder" in message

    def test_a_torch_of_another_cuda_is_named_with_what_to_do(self, tmp_path):
        message = self.import_error(tmp_path, {"CUDA": True, "TORCH_CUDA": "12.8"})
        assert "was built for torch 2.99.1+cpu (CUDA 12.8), but torch 2.99.0 (CUDA 13.0)" in message
        assert "pip install --force-reinstall" in message

    def test_an_extension_that_does_not_load_says_why_and_what_to_do(self, tmp_path):
        message = self.import_error(tmp_path, {}, "raise ImportError('undefined symbol: _ZN2at4_ops')")
        assert (
            "built for torch 2.99.1+cpu, does not load with torch 2.99.0: undefined symbol: _ZN2" in message
        )
        assert "pip install --force-reinstall" in message

    def test_an_extension_that_was_never_built_says_how(self, tmp_path):
        message = self.import_error(tmp_path, None)
        assert "vae_fast has not been built" in message and "`pip install .`" in message
