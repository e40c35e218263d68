"""Builds vae_fast._C: the operators in C++ and, where nvcc and a CUDA build of torch are there, in CUDA.

Environment variables:
    VAE_FAST_CPU_ONLY=1    leave the CUDA kernels out
    FORCE_CUDA=1           fail, rather than leave them out, where they cannot be built
    CUDA_HOME              the CUDA toolkit (default: that of the nvcc on PATH, then /usr/local/cuda)
    TORCH_CUDA_ARCH_LIST   GPU architectures, such as "8.0;9.0a+PTX", or "native" (default: DEFAULT_ARCHS)
    MAX_JOBS               files compiled at once (default: one per core, 2 GiB of free memory each)
    NVCC_THREADS           architectures compiled at once per CUDA file
    CXX                    the C++ compiler
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0"  # less those that the nvcc at hand does not know
GIB_PER_JOB = 2  # what compiling a C++ file with torch's headers takes at most

# No -ffast-math: NaN, infinities and signed zeros keep their meaning. No -std: torch adds the one it needs.
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wno-maybe-uninitialized"]  # GCC 12 warns of its own avx512fintrin.h, by the thousand
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for runs on one thread


class NoCuda(Exception):
    """Why the CUDA kernels cannot be built, and what to do about it."""


@dataclass
class Cuda:
    home: Path
    version: str
    archs: list[str]
    include_dirs: list[str]  # of the CUDA runtime, where the toolkit has none
    link_args: list[str]  # instead of -lcudart, likewise


def say(message: str) -> None:
    print(f"vae-fast: {message}", flush=True)


def fail(message: str) -> NoReturn:
    raise SystemExit(f"vae-fast: {message}")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def sources(cuda: bool) -> list[str]:
    lines = (ROOT / "csrc/sources.txt").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    found = [path.relative_to(ROOT) for pattern in patterns for path in sorted((ROOT / "csrc").glob(pattern))]
    return [str(path) for path in found if cuda or path.parent.name != "cuda"]


def find_cuda_home(torch_cuda: str, site_packages: Path) -> Path:
    """The toolkit of CUDA_HOME, of the nvcc on PATH, /usr/local/cuda, or of an nvidia wheel beside torch."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        if not (Path(named) / "bin/nvcc").exists():
            raise NoCuda(f"CUDA_HOME is {named}, without bin/nvcc; set it to a CUDA {torch_cuda} toolkit")
        return Path(named)
    candidates = [Path("/usr/local/cuda"), *site_packages.glob("nvidia/cu*")]
    if nvcc := shutil.which("nvcc"):
        candidates.insert(0, Path(nvcc).resolve().parent.parent)
        # What is on PATH may be a script that calls another nvcc; that one says where it lives.
        steps = run(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull).stderr
        if top := re.search(r"^#\$ TOP=(.+?)\s*$", steps, re.MULTILINE):
            candidates.insert(0, Path(top[1]).resolve())
    for home in candidates:
        if (home / "bin/nvcc").exists():
            return home
    raise NoCuda(
        "there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda; "
        f"install the CUDA {torch_cuda} toolkit, or set CUDA_HOME to it"
    )


def cuda_archs(nvcc: Path, torch: Any) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, checked, or the default architectures that this nvcc knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted == "native":
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        if not found:
            fail('TORCH_CUDA_ARCH_LIST is "native" but torch sees no GPU; name architectures, such as 9.0a')
        return [f"{major}.{minor}{'a' if major == 9 else ''}" for major, minor in sorted(found)]
    archs = [arch for arch in re.split(r"[;,\s]+", wanted or DEFAULT_ARCHS) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            fail(f'TORCH_CUDA_ARCH_LIST has "{arch}"; wanted numbers such as "{DEFAULT_ARCHS}", or "native"')
    codes = run(nvcc, "--list-gpu-code").stdout.split()
    unknown = [arch for arch in archs if "sm_" + re.sub(r"[.af]|\+PTX", "", arch) not in codes]
    if wanted and unknown:
        fail(f"{nvcc} does not know {';'.join(unknown)} of TORCH_CUDA_ARCH_LIST; leave it out or update CUDA")
    return [arch for arch in archs if arch not in unknown]


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.replace(".", "").removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def check_nvcc(nvcc: Path, cuda: Cuda) -> None:
    """Compiles an empty kernel, so that a broken toolkit is found before minutes of compiling C++."""
    host_compiler = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # as torch does
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cu"
        probe.write_text("#include <cuda_fp16.h>\n__global__ void f() {}\nvoid g() { f<<<1, 1>>>(); }\n")
        flags = [f"-I{path}" for path in cuda.include_dirs] + gencode(cuda.archs[-1:]) + host_compiler
        result = run(nvcc, "-c", probe, "-o", f"{probe}.o", *flags)
    if result.returncode:
        lines = (result.stderr + result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
        why = next((line for line in lines if "error" in line), lines[0]).strip()
        raise NoCuda(
            f"{nvcc} cannot compile an empty kernel ({why}); "
            "mend the toolkit, set CUDA_HOME to another, or CC to a host compiler that it supports"
        )


def find_cuda(torch: Any) -> Cuda:
    """All that a CUDA build needs, or NoCuda."""
    if os.environ.get("VAE_FAST_CPU_ONLY") == "1":
        raise NoCuda("VAE_FAST_CPU_ONLY=1 is set; unset it to have them")
    torch_cuda = torch.version.cuda
    if torch_cuda is None:
        raise NoCuda(f"torch {torch.__version__} is no CUDA build; install one that is, then vae-fast again")
    site_packages = Path(torch.__file__).parent.parent
    home = find_cuda_home(torch_cuda, site_packages)
    nvcc = home / "bin/nvcc"
    release = re.search(r"release (\d+)\.(\d+), V([\d.]+)", run(nvcc, "--version").stdout)
    if not release:
        raise NoCuda(f"{nvcc} --version says nothing; mend the toolkit, or set CUDA_HOME to another")
    if release[1] != torch_cuda.split(".")[0]:
        raise NoCuda(
            f"{nvcc} is of CUDA {release[1]}.{release[2]}, torch {torch.__version__} of CUDA {torch_cuda}; "
            f"install a CUDA {torch_cuda} toolkit and set CUDA_HOME to it"
        )
    # Headers and library of the CUDA runtime come with the toolkit, or with the wheels that torch depends on:
    # nvidia/cu13/include, before CUDA 13 nvidia/*/include.
    include_dirs, link_args = [], []
    if not (home / "include/cuda_runtime.h").exists():
        found = [*site_packages.glob("nvidia/*/include"), *site_packages.glob("nvidia/*/include/cccl")]
        include_dirs = sorted(map(str, found))
    if not any((home / lib / "libcudart.so").exists() for lib in ("lib64", "lib", "lib/x86_64-linux-gnu")):
        for library in site_packages.glob("nvidia/*/lib/libcudart.so.*"):
            link_args = [f"-L{library.parent}", f"-l:{library.name}"]
    cuda = Cuda(home, release[3], cuda_archs(nvcc, torch), include_dirs, link_args)
    check_nvcc(nvcc, cuda)
    return cuda


def free_gib() -> float:
    """Memory to be had, within the container's limit if it has one."""
    free = []
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free.append(int(re.findall(r"MemAvailable:\s+(\d+)", meminfo)[0]) / 2**20)
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append((limit - used) / 2**30)
    except (OSError, IndexError, ValueError):
        pass  # not Linux, or no limit
    return min(free, default=float("inf"))


def jobs() -> int:
    if wanted := os.environ.get("MAX_JOBS"):
        if not wanted.isdigit() or int(wanted) == 0:
            fail(f'MAX_JOBS is "{wanted}"; wanted a whole number from 1')
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = free_gib()
    number = max(1, int(min(cores, free / GIB_PER_JOB)))
    if number < cores:
        say(f"{number} of {cores} cores compile, for {free:.1f} GiB of memory are free; MAX_JOBS overrides")
    return number


def write_build_config(path: Path, values: dict[str, object]) -> None:
    note = "# How the extension beside this file was built; written by setup.py.\n"
    path.write_text(note + "".join(f"{name} = {value!r}\n" for name, value in values.items()))


def extension_and_command() -> tuple[Extension, type]:
    """The extension, and the build_ext that compiles it and records how."""
    try:
        import torch
    except ImportError as error:
        fail(f"building needs torch, which does not import ({error}); pip install torch, then install again")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[0]):
        fail(f"there is no C++ compiler named {compiler}; install GCC 11 or newer, or set CXX to one")

    forced = os.environ.get("FORCE_CUDA") == "1"
    cuda, why_no_cuda = None, ""
    try:
        cuda = find_cuda(torch)
        say(f"CUDA kernels for {';'.join(cuda.archs)} with nvcc {cuda.version} of {cuda.home}")
        os.environ["CUDA_HOME"] = str(cuda.home)  # before torch.utils.cpp_extension looks for one itself
    except NoCuda as reason:
        why_no_cuda = str(reason)
        if forced:
            fail(f"FORCE_CUDA=1, but {why_no_cuda}")
        say(f"CUDA kernels are left out: {why_no_cuda}")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    files = sources(cuda is not None)
    os.environ["MAX_JOBS"] = str(jobs())
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # for ninja
    flags = CXX_FLAGS + OPENMP
    if cuda is None:
        extension = CppExtension("vae_fast._C", files, extra_compile_args=flags, extra_link_args=OPENMP)
    else:
        threads = os.environ.get("NVCC_THREADS") or max(1, int(os.environ["MAX_JOBS"]) // len(files))
        extension = CUDAExtension(
            "vae_fast._C",
            files,
            define_macros=[("VAE_FAST_WITH_CUDA", None)],
            include_dirs=list(cuda.include_dirs),
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", f"--threads={threads}", *gencode(cuda.archs)]},
            extra_link_args=OPENMP + cuda.link_args,
        )
        if cuda.link_args:
            extension.libraries.remove("cudart")

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Objects for different torches are kept apart, those of an editable install are kept at all.
            self.build_temp = str(ROOT / f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}")

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                fail(
                    f"compiling failed ({error}); the first error above says where. If a compiler was "
                    "killed, memory ran out: set MAX_JOBS=1 NVCC_THREADS=1. If the error is in a .cu file, "
                    "VAE_FAST_CPU_ONLY=1 builds without CUDA"
                )

        def run(self) -> None:
            super().run()
            write_build_config(
                Path(self.get_ext_fullpath("vae_fast._C")).with_name("_build_config.py"),
                {
                    "TORCH_VERSION: str": str(torch.__version__),
                    "TORCH_CUDA: str | None": torch.version.cuda,
                    "CUDA: bool": cuda is not None,
                    "CUDA_ARCHS: list[str]": cuda.archs if cuda else [],
                    "NVCC_VERSION: str": cuda.version if cuda else "",
                    "CXX: str": run(*compiler.split(), "--version").stdout.split("\n")[0],
                    "WHY_NO_CUDA: str": why_no_cuda,
                },
            )

    return extension, Build


# The source distribution and the metadata need no torch.
if {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
    extension, command = extension_and_command()
    setup(ext_modules=[extension], cmdclass={"build_ext": command})
else:
    setup(ext_modules=[Extension("vae_fast._C", sources(cuda=True))])
