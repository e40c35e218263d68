"""What is in the wheel and in the source distribution, and what a build that cannot be says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

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


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py with these arguments, as far as it gets without compiling anything."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "CXX")
    }
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)


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

    @pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
    def test_forced_cuda_with_a_cpu_build_of_torch_fails(self):
        result = run_setup("build_ext", FORCE_CUDA="1")
        assert result.returncode != 0
        assert f"torch {torch.__version__} is no CUDA build; install one that is" in result.stderr

    @pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
    def test_forced_cuda_without_nvcc_fails(self, tmp_path):
        result = run_setup("build_ext", FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
        assert result.returncode != 0
        assert f"CUDA_HOME is {tmp_path}, without bin/nvcc; set it to a CUDA" in result.stderr

    def test_forced_cuda_contradicts_cpu_only(self):
        result = run_setup("build_ext", FORCE_CUDA="1", VAE_FAST_CPU_ONLY="1")
        assert result.returncode != 0
        assert "FORCE_CUDA=1, but VAE_FAST_CPU_ONLY=1 is set; unset it" in result.stderr

    def test_missing_compiler_fails(self):
        result = run_setup("build_ext", CXX="no-such-compiler")
        assert result.returncode != 0
        assert "there is no C++ compiler named no-such-compiler; install GCC" in result.stderr

    def test_wrong_number_of_jobs_fails(self):
        result = run_setup("build_ext", MAX_JOBS="many", VAE_FAST_CPU_ONLY="1")
        assert result.returncode != 0
        assert 'MAX_JOBS is "many"; wanted a whole number' in result.stderr

    def test_why_there_are_no_cuda_kernels_is_recorded(self):
        info = vae_fast.build_info()
        assert bool(info["why_no_cuda"]) != info["cuda"]


class TestImport:
    """What `import vae_fast` says when the extension and torch do not go together."""

    @staticmethod
    def import_error(torch_version: str) -> str:
        program = f"import torch; torch.__version__ = {torch_version!r}; import vae_fast"
        result = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True)
        assert result.returncode != 0
        return result.stderr.strip().splitlines()[-1]

    def test_names_both_torches_and_what_to_do(self):
        message = self.import_error("1.0.0")
        assert message.startswith("ImportError: ")
        assert f"built for torch {vae_fast.build_info()['torch_built_with']}" in message
        assert "torch 1.0.0" in message
        assert "pip install" in message
