"""The CUDA kernels without a GPU: compiled as plain C++ for the emulated device of tests/cuda_emulation, and
compared there, launch by launch, with the formulas of csrc/math in float64 (kernels_test.cpp beside it)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
EMULATION = ROOT / "tests" / "cuda_emulation"
KERNELS = re.findall(r"DO\((\w+)\)", (ROOT / "csrc" / "kernels.h").read_text())
MAPS = {  # kernels that sum over no row
    "GaussianKLBackward",
    "ReparameterizeBackward",
    "ReparameterizeDoubleBackward",
    "PhiloxNormal",
    "BernoulliBackward",
}

FLAGS = [
    "-std=c++20",
    "-w",
    "-fsanitize=alignment,bounds,signed-integer-overflow,shift",  # what a device would refuse
    "-fno-sanitize-recover=all",
    f"-I{EMULATION}",
    "-DVAE_FAST_MAX_GRID=3,3",  # so small that blocks must go on to further rows and segments
    "-DVAE_FAST_WIDE_ROWS=1200,200,4096",  # and that several blocks share a row of 5000
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def kernels_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled test program."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX or install g++")
    build = tmp_path_factory.mktemp("cuda_emulation")

    def run(*command: str | Path) -> None:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def compile_one(source: Path, optimisation: str) -> Path:
        output = build / (source.name + ".o")
        run(compiler, "-x", "c++", optimisation, *FLAGS, "-c", source, "-o", output)
        return output

    # Optimising the kernels would take longer than running them as they are.
    sources = [(path, "-O0") for path in sorted(CUDA.glob("*.cu"))]
    sources.append((EMULATION / "kernels_test.cpp", "-O1"))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compile_one(*source), sources))
    program = build / "kernels_test"
    run(compiler, "-fsanitize=undefined", *objects, "-o", program)
    return program


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_launch_equals_the_formulas_in_float64(kernels_test: Path, kernel: str) -> None:
    done = subprocess.run([kernels_test, kernel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches = re.fullmatch(rf"{kernel}: (\d+) launches, (\d+) with a workspace, .*\n", done.stdout)
    assert launches is not None and int(launches[1]) > 400
    assert (int(launches[2]) == 0) == (kernel in MAPS)  # a row of 5000 is shared among blocks, and only that


BEHAVIOURS = {
    "NaN": "it stays in its row",
    "alone": "the sum of a row does not depend on the other rows",
    "errors": "an unknown dtype is refused",
}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_launch_keeps_its_promises(kernels_test: Path, behaviour: str) -> None:
    done = subprocess.run([kernels_test, behaviour], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
