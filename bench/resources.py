"""What the compiler says of every CUDA kernel: registers, stack frame, spills.

python -m bench.resources [--arch 90a]     compiles csrc/cuda with nvcc; needs no GPU

Of an installed extension cuobjdump says the same, less the spills, which show as a stack frame.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .machine import ROOT


@dataclass(frozen=True)
class Kernel:
    source: str
    name: str
    registers: int
    stack: int
    spill_stores: int | None = None  # bytes; None where they were not asked for
    spill_loads: int | None = None

    @property
    def spilled(self) -> int | None:
        return None if self.spill_stores is None else self.spill_stores + (self.spill_loads or 0)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def compile_kernels(nvcc: str, arch: str, objects: Path) -> tuple[list[Kernel], str]:
    """Compiles every kernel file to ``objects``; the kernels, and the compiler's messages if it failed."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    flags = [
        "-O3",
        "-std=c++20",
        "-lineinfo",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-Xptxas",
        "-v",
    ]

    def compile_one(source: Path) -> subprocess.CompletedProcess[str]:
        command = [nvcc, *flags, "-c", str(source), "-o", str(objects / f"{source.stem}.o")]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_one, sources))
    kernels = [
        kernel
        for source, result in zip(sources, results, strict=True)
        for kernel in parse(source.name, result.stdout)
    ]
    return kernels, "".join(result.stdout[-4000:] for result in results if result.returncode)


def parse(source: str, report: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` printed."""
    kernels, name, frame = [], "", (0, 0, 0)
    for line in _demangled(report).splitlines():
        if match := re.search(r"Compiling entry function '(.*)' for", line):
            name = _short(match[1])
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            frame = (int(match[1]), int(match[2]), int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            kernels.append(Kernel(source, name, int(match[1]), *frame))
    return kernels


def of_extension(device: Any) -> list[Kernel]:
    """The kernels of vae_fast._C for this GPU, from cuobjdump; none where there is no such tool."""
    import torch

    from vae_fast import _C

    tool = find_cuobjdump()
    if tool is None:
        return []
    done = subprocess.run(
        [tool, "--dump-resource-usage", _C.__file__],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    major, minor = torch.cuda.get_device_capability(device)
    return parse_usage(done.stdout, f"{major}{minor}")


def find_cuobjdump() -> str | None:
    """Of the toolkit, or the one that comes with triton."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [f"{home}/bin"]
    if triton := importlib.util.find_spec("triton"):
        folders += [
            str(Path(folder) / "backends/nvidia/bin") for folder in triton.submodule_search_locations or ()
        ]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


def parse_usage(usage: str, capability: str) -> list[Kernel]:
    """The kernels for sm_<capability>, with or without a letter after it, in cuobjdump's report."""
    found: list[tuple[str, int, int]] = []
    right_arch, function = False, ""
    for line in usage.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            right_arch = match[1] == capability
        elif match := re.search(r"Function (\S+):", line):
            function = match[1]
        elif right_arch and (match := re.search(r"REG:(\d+) STACK:(\d+)", line)):
            found.append((function, int(match[1]), int(match[2])))
    kernels = []
    names = _demangled("\n".join(function for function, _, _ in found)).splitlines()
    for (function, registers, stack), name in zip(found, names, strict=True):
        file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", function)
        kernels.append(Kernel(f"{file[1]}.cu" if file else "?", _short(name), registers, stack))
    return kernels


def _short(function: str) -> str:
    operator = re.search(r"rows_kernel<(.*?) ?>\(", function)
    return re.sub(r"vae_fast::cuda::|\(anonymous namespace\)::", "", operator[1] if operator else function)


def _demangled(text: str) -> str:
    tool = shutil.which("c++filt")
    return subprocess.run([tool], input=text, stdout=subprocess.PIPE, text=True).stdout if tool else text


def table(kernels: Sequence[Kernel]) -> str:
    """One line per file, and one for every kernel that spills."""
    lines = [f"{'file':<20} kernels  registers (least, median, most)  bytes of stack  bytes spilled"]
    for source in sorted({kernel.source for kernel in kernels}):
        own = [kernel for kernel in kernels if kernel.source == source]
        registers = sorted(kernel.registers for kernel in own)
        spread = f"{registers[0]}, {registers[len(own) // 2]}, {registers[-1]}"
        stack = max(kernel.stack for kernel in own)
        known = [kernel.spilled for kernel in own if kernel.spilled is not None]
        spilled = str(max(known)) if known else "-"
        lines.append(f"{source:<20} {len(own):>7}  {spread:>33}  {stack:>14}  {spilled:>13}")
    lines += [f"spills: {k.source} {k.name}" for k in kernels if k.spilled]
    return "\n".join(lines) + "\n"


def to_dicts(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    return [asdict(kernel) for kernel in kernels]


def from_dicts(kernels: Sequence[dict[str, Any]]) -> list[Kernel]:
    return [Kernel(**kernel) for kernel in kernels]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90a")
    arguments = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc: not on PATH and not in CUDA_HOME, wanted a CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        kernels, failure = compile_kernels(nvcc, arguments.arch, Path(folder))
    print(table(kernels))
    if failure:
        raise SystemExit(failure)


if __name__ == "__main__":
    main()
