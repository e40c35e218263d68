"""What waiting, broadcasting and making noise cost on a GPU: compiles and runs latency.cu and normals.cu.

python -m bench.latency [--out DIR] [--seconds S] [--only PROGRAM ...]

--only tiles: a training step's large products in tiles of many shapes (tiles.cu), to find better ones.

Needs nvcc and a GPU, nothing else: no torch. Every section is a process of its own with its own time limit,
so that one that traps or hangs takes no other with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, resources

BUILD = machine.ROOT / "build/bench"  # ignored by git
# program: its C++ standard and its sections
PROGRAMS = {
    "latency": ("c++17", ["barriers", "handoff", "clusters", "graph", "broadcast"]),
    "normals": ("c++20", [""]),
    "tiles": ("c++20", [""]),
}
USUAL = ("latency", "normals")
SECONDS = 40.0  # for one section


def build(program: str, arch: str) -> Path:
    """Compiles bench/<program>.cu for an architecture such as 90a, unless it has been since it changed;
    RuntimeError with the compiler's words.
    """
    nvcc = resources.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc: not on PATH and not in CUDA_HOME, wanted a CUDA toolkit")
    BUILD.mkdir(parents=True, exist_ok=True)
    binary = BUILD / f"{program}-{arch}"
    read = [*(machine.ROOT / "bench").glob("*.cu*"), *(machine.ROOT / "csrc").rglob("*.*")]
    if binary.exists() and binary.stat().st_mtime > max(path.stat().st_mtime for path in read):
        return binary
    # Not -arch: machine code for this GPU alone.
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    source = machine.ROOT / f"bench/{program}.cu"
    command = [nvcc, gencode, f"-std={PROGRAMS[program][0]}", "-O3", str(source), "-o", str(binary)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}: {done.stdout[-2000:]}")
    return binary


def gpu_arch() -> str:
    """Of the first GPU, as nvcc writes it: 90a for compute capability 9.0."""
    found = machine.output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()
    if not found:
        raise RuntimeError("nvidia-smi: names no GPU, wanted one")
    arch = found[0].strip().replace(".", "")
    return arch + ("a" if arch == "90" else "")


def parse(output: str) -> list[dict[str, Any]]:
    """The JSON lines that a program printed; the last may be cut off where it was stopped."""
    lines = []
    for line in output.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def run_section(binary: Path, section: str, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What one section measured, and why it ended early, if it did."""
    command = [str(binary), *([section] if section else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=seconds)
        failure = f"exit status {process.returncode}: {errors.strip()}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        failure = f"stopped after {seconds:.0f} s: {errors.strip()}"
    return parse(output), failure


def run(seconds: float, command: str, programs: Sequence[str] = USUAL) -> dict[str, Any]:
    """Everything, within about ``seconds``; what failed and what was left out stands in "failures"."""
    end = time.monotonic() + seconds
    arch = gpu_arch()
    nvcc = machine.output(resources.find_nvcc() or "nvcc", "--version").splitlines()
    result: dict[str, Any] = {**machine.describe(command), "machine": "no GPU", "lines": [], "failures": []}
    result["nvcc"] = nvcc[-1] if nvcc else None
    for program in programs:
        _, sections = PROGRAMS[program]
        try:
            binary = build(program, arch)
        except RuntimeError as error:
            result["failures"].append(f"{program}: {error}")
            continue
        for section in sections:
            left = end - time.monotonic()
            if left < 5:
                result["failures"].append(f"{program} {section}: no time left")
                continue
            lines, failure = run_section(binary, section, min(SECONDS, left))
            for line in lines:
                if line["what"] == "device":  # the same every time
                    result["machine"], result["gpu"] = line["name"], line
                else:
                    result["lines"].append(line)
            if failure:
                result["failures"].append(f"{program} {section}: {failure}")
    return result


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A table: what was measured, how, its settings, median and quantiles in microseconds."""
    table = [["what", "how", "settings", "us", "10 %", "90 %"]]
    for line in result["lines"]:
        settings = ", ".join(f"{k} {v:g}" for k, v in line.items() if isinstance(v, (int, float)))
        us = line.get("us", {})
        numbers = [f"{us[key]:.4g}" if us else "-" for key in ("median", "low", "high")]
        table.append([line["what"], line.get("how", ""), settings, *numbers])
    return table


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120, help="for all, compiling included")
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS), default=USUAL, metavar="PROGRAM")
    parser.add_argument("--out", type=Path, help="a folder for latency.json")
    arguments = parser.parse_args(argv)
    try:
        command = " ".join(["python -m bench.latency", *argv])
        result = run(arguments.seconds, command, arguments.only)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    for row in rows(result):
        print(" | ".join(row))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1) + "\n"
        (arguments.out / "latency.json").write_text(text, encoding="utf-8")
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


if __name__ == "__main__":
    main()
