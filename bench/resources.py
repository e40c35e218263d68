"""What the compiler says of every CUDA kernel: registers, stack frame, spills, shared memory.

python -m bench.resources [--arch 90a]     compiles csrc/cuda with nvcc; needs no GPU
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Kernel:
    source: str
    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


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
            operator = re.search(r"rows_kernel<(.*?) ?>\(", match[1])
            name = operator[1] if operator else match[1]
            name = re.sub(r"vae_fast::cuda::|\(anonymous namespace\)::", "", name)
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            frame = (int(match[1]), int(match[2]), int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            kernels.append(Kernel(source, name, int(match[1]), *frame))
    return kernels


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
        spilled = max(kernel.spill_stores + kernel.spill_loads for kernel in own)
        lines.append(f"{source:<20} {len(own):>7}  {spread:>33}  {stack:>14}  {spilled:>13}")
    lines += [f"spills: {k.source} {k.name}" for k in kernels if k.spill_stores + k.spill_loads]
    return "\n".join(lines) + "\n"


def to_dicts(kernels: Sequence[Kernel]) -> list[dict[str, object]]:
    return [asdict(kernel) for kernel in kernels]


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
