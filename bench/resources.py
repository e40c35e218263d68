"""What the compiler made of every CUDA kernel: registers, stack frame and spills; from the machine code, the
widths of the accesses to global memory and the instructions per element.

python -m bench.resources [--arch 80 90a]     compiles the kernels with nvcc; needs no GPU

The machine code is read where cuobjdump and nvdisasm are on PATH or in CUDA_HOME (there are wheels of them:
nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm). The exit status is 1 where a kernel spills or a vector kernel
moves a chunk in more than one access. Of an installed extension cuobjdump says the same, less the spills,
which show as a stack frame.
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
from dataclasses import asdict, dataclass, replace
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
    # of the innermost loop that touches global memory, where the machine code was read
    accesses: tuple[int, ...] | None = None  # bytes of each
    instructions: float | None = None  # per element

    @property
    def spilled(self) -> int | None:
        return None if self.spill_stores is None else self.spill_stores + (self.spill_loads or 0)

    @property
    def elements(self) -> int:
        """Of a chunk: 16 bytes of the operator's type, its first template argument."""
        types = {"float": 4, "double": 2, "__half": 8, "__nv_bfloat16": 8}
        return types.get(re.split("[<,>]", self.name + "<")[1].strip(), 1)

    @property
    def is_vector(self) -> bool:
        """Whether it moves chunks in vectors: its first template argument that is no type (kVector).

        The engine's product_kernel walks no rows; its accesses are not judged here.
        """
        if "product_kernel" in self.name:
            return False
        flags = re.findall(r"\btrue\b|\bfalse\b", self.name)
        return flags[:1] == ["true"]

    @property
    def problem(self) -> str:
        if self.spilled:
            return "spills"
        # Bytes and bits beside the chunks take one access too, of a byte for every element or of one byte.
        target = {"unsigned char": self.elements, "Bits": 1}
        narrow = [width for width in self.accesses or () if width < 16]
        for name, width in target.items():
            if f", {name}," in self.name and width in narrow:
                narrow = [other for other in narrow if other != width]
        return f"accesses of {narrow} bytes" if self.is_vector and narrow else ""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def find_tools() -> dict[str, str] | None:
    """The environment in which cuobjdump runs, and finds nvdisasm; None where one is missing."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.pathsep.join((os.environ.get("PATH", ""), f"{home}/bin"))
    found = all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm"))
    return {**os.environ, "PATH": path} if found else None


def compile_kernels(nvcc: str, arch: str, objects: Path) -> tuple[list[Kernel], str]:
    """Compiles every kernel file to ``objects``; the kernels, and the compiler's messages if it failed."""
    sources = [
        path for folder in ("csrc/cuda", "csrc/engine/cuda") for path in sorted((ROOT / folder).glob("*.cu"))
    ]
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
    if tools := find_tools():
        for source, result in zip(sources, results, strict=True):
            if result.returncode == 0:
                command = ["cuobjdump", "-sass", str(objects / f"{source.stem}.o")]
                sass = subprocess.run(command, env=tools, stdout=subprocess.PIPE, text=True).stdout
                kernels = with_machine_code(source.name, kernels, sass)
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


def with_machine_code(source: str, kernels: Sequence[Kernel], sass: str) -> list[Kernel]:
    """The kernels, those of ``source`` with what `cuobjdump -sass` shows of them."""
    loops = {}
    for function in _demangled(sass).split("Function : ")[1:]:
        name, _, body = function.partition("\n")
        code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?) *;", body)]
        loops[_short(name)] = _inner_loop(code)
    return [
        replace(
            kernel,
            accesses=tuple(sorted(map(_access_bytes, filter(_is_global, loop)))),
            instructions=len(loop) / kernel.elements,
        )
        if kernel.source == source and (loop := loops.get(kernel.name))
        else kernel
        for kernel in kernels
    ]


def _inner_loop(code: Sequence[tuple[int, str]]) -> list[str]:
    """The shortest loop, from the target of a branch back to the branch, that touches global memory."""
    found: list[list[str]] = []
    for end, text in code:
        if match := re.search(r"\bBRA .*?(0x[0-9a-f]+)", text):
            loop = [other for at, other in code if int(match[1], 16) <= at <= end]
            if any(map(_is_global, loop)):
                found.append(loop)
    return min(found, key=len, default=[])


def _is_global(instruction: str) -> bool:
    return re.search(r"\b(LDG|STG)\b", instruction) is not None


def _access_bytes(instruction: str) -> int:
    widths = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2, ".64": 8, ".128": 16}
    name = re.search(r"\b(?:LDG|STG)\S*", instruction)
    return next((widths[f".{part}"] for part in name[0].split(".") if f".{part}" in widths), 4) if name else 0


def _demangled(text: str) -> str:
    tool = shutil.which("c++filt")
    return subprocess.run([tool], input=text, stdout=subprocess.PIPE, text=True).stdout if tool else text


def table(kernels: Sequence[Kernel]) -> str:
    """One line per file, one for every vector kernel, and one for every problem."""
    lines = [f"{'file':<20} kernels  registers (least, median, most)  bytes of stack  bytes spilled"]
    for source in sorted({kernel.source for kernel in kernels}):
        own = [kernel for kernel in kernels if kernel.source == source]
        registers = sorted(kernel.registers for kernel in own)
        spread = f"{registers[0]}, {registers[len(own) // 2]}, {registers[-1]}"
        stack = max(kernel.stack for kernel in own)
        known = [kernel.spilled for kernel in own if kernel.spilled is not None]
        spilled = str(max(known)) if known else "-"
        lines.append(f"{source:<20} {len(own):>7}  {spread:>33}  {stack:>14}  {spilled:>13}")
    lines.append(
        f"\n{'vector kernel':<66} registers  instructions per element  bytes of each access in its loop"
    )
    for k in kernels:
        if k.is_vector and k.instructions is not None:
            accesses = " ".join(map(str, k.accesses or ()))
            lines.append(f"{k.name:<66} {k.registers:>9}  {k.instructions:>24.1f}  {accesses}")
    lines += [f"{k.problem}: {k.source} {k.name}" for k in kernels if k.problem]
    return "\n".join(lines) + "\n"


def to_dicts(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    return [asdict(kernel) for kernel in kernels]


def from_dicts(kernels: Sequence[dict[str, Any]]) -> list[Kernel]:
    return [Kernel(**kernel) for kernel in kernels]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["80", "90a"])
    arguments = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc: not on PATH and not in CUDA_HOME, wanted a CUDA toolkit")
    if find_tools() is None:
        print("No cuobjdump or no nvdisasm on PATH or in CUDA_HOME: the machine code is not read.")
    problems = 0
    for arch in arguments.arch:
        with tempfile.TemporaryDirectory() as folder:
            kernels, failure = compile_kernels(nvcc, arch, Path(folder))
        print(f"sm_{arch}\n{table(kernels)}")
        if failure:
            raise SystemExit(failure)
        problems += sum(bool(kernel.problem) for kernel in kernels)
    raise SystemExit(int(problems > 0))


if __name__ == "__main__":
    main()
