"""Checks, from the machine code, that an extension holds CUDA kernels and that the engine's use tensor cores.

python .ci/kernels.py CUOBJDUMP EXTENSION ARCH...

Every .cu file that defines a `launch` must have left at least one kernel with instructions for every
architecture, such as sm_90a. A kernel's name tells its file by the anonymous namespace in it. Every kernel
of csrc/engine/cuda that multiplies matrices, a template in the precision, must have tensor-core
instructions (the persistent one is there from sm_90 to below sm_120), and none may access local memory, where
spilled registers go.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Kernel:
    arch: str
    source: str
    name: str
    instructions: Counter[str]  # by what they are called up to the first dot


def kernels(sass: str) -> Iterator[Kernel]:
    """The functions of `cuobjdump -sass`, empty ones left out."""
    arch, current = "", None
    for line in sass.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            if current and current.instructions["EXIT"]:
                yield current
            file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", match[1])
            current = Kernel(arch, f"{file[1]}.cu" if file else "?", match[1], Counter())
        elif current and (match := re.search(r"/\*[0-9a-f]{4,}\*/ +(?:@!?\w+ +)?([A-Z][A-Z0-9]*)", line)):
            current.instructions[match[1]] += 1
    if current and current.instructions["EXIT"]:
        yield current


def problems(found: list[Kernel], engine: set[str]) -> list[str]:
    """What is wrong with the kernels of the engine's files."""
    lines = []
    for kernel in found:
        if kernel.source in engine:
            number = int(re.findall(r"\d+", kernel.arch)[0])
            empty = "persistent_kernel" in kernel.name and not 90 <= number < 120
            multiplies = "PrecisionE" in kernel.name and not empty
            if multiplies and not kernel.instructions["HMMA"]:
                lines.append(f"{kernel.name} for {kernel.arch}: no tensor-core instruction")
            if kernel.instructions["LDL"] or kernel.instructions["STL"]:
                lines.append(f"{kernel.name} for {kernel.arch}: local memory")
    return lines


def main(cuobjdump: str, extension: str, *archs: str) -> None:
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    files = {
        folder: {
            path.name
            for path in (csrc / folder).glob("*.cu")
            if " launch(" in path.read_text(encoding="utf-8")
        }
        for folder in ("cuda", "engine/cuda")
    }
    sources, engine = sorted(set().union(*files.values())), files["engine/cuda"]
    dump = subprocess.run([cuobjdump, "-sass", extension], stdout=subprocess.PIPE, text=True).stdout
    found = list(kernels(dump))
    count = Counter((kernel.arch, kernel.source) for kernel in found)
    missing = [f"{source} for {arch}" for arch in archs for source in sources if not count[arch, source]]
    for arch in archs:
        print(f"{arch}:", ", ".join(f"{source} {count[arch, source]}" for source in sources), "kernels")
    if missing or not all(files.values()) or not archs:
        sys.exit(f"no machine code of {', '.join(missing) or 'anything'} in {extension}")
    if lines := problems(found, engine):
        sys.exit("\n".join(lines))
    tensor = sum(kernel.instructions["HMMA"] for kernel in found if kernel.source in engine)
    print(f"engine: {tensor} tensor-core instructions, no local memory")


if __name__ == "__main__":
    main(*sys.argv[1:])
