"""Checks, from the machine code, that an extension holds CUDA kernels.

python .ci/kernels.py CUOBJDUMP EXTENSION ARCH...

Every .cu file that defines a `launch` must have left at least one kernel with instructions for every
architecture, such as sm_90a. A kernel's name tells its file by the anonymous namespace in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path


def kernels(sass: str) -> Counter[tuple[str, str]]:
    """Counts (architecture, source file) over the functions of `cuobjdump -sass`, empty ones left out."""
    count: Counter[tuple[str, str]] = Counter()
    arch = source = ""
    for line in sass.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            name = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", match[1])
            source = f"{name[1]}.cu" if name else "?"
        elif source and re.search(r"\bEXIT\b", line):
            count[arch, source] += 1
            source = ""
    return count


def main(cuobjdump: str, extension: str, *archs: str) -> None:
    folder = Path(__file__).resolve().parent.parent / "csrc/cuda"
    sources = sorted(
        path.name for path in folder.glob("*.cu") if " launch(" in path.read_text(encoding="utf-8")
    )
    found = kernels(subprocess.run([cuobjdump, "-sass", extension], stdout=subprocess.PIPE, text=True).stdout)
    missing = [f"{source} for {arch}" for arch in archs for source in sources if not found[arch, source]]
    for arch in archs:
        print(f"{arch}:", ", ".join(f"{source} {found[arch, source]}" for source in sources), "kernels")
    if missing or not sources or not archs:
        sys.exit(f"no machine code of {', '.join(missing) or 'anything'} in {extension}")


if __name__ == "__main__":
    main(*sys.argv[1:])
