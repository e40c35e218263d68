"""One command for a bare machine with a GPU: builds, tests, sanitizes, measures and trains, in 27 minutes.

python -m bench.gpu --out DIR [--parts build,tests,...] [--quick] [--minutes M]
python -m bench.gpu --plan      prints four commands of at most ten minutes each that do the same

Needs torch, nvcc, ninja and pytest; no network. Run it in the root of a checkout. Without the part "build" it
takes what lies there, built elsewhere for the same Python and torch. A part that fails or runs out of time is
recorded, and the next one goes on; the exit status says whether all passed. Into DIR go gpu.json (all that
was read), gpu.txt (the tables), tests.txt, sanitizer.txt, build.txt, operators.png, operators.html, and for
bench.summary latency.json, sizes.json and rivals.json; native_step.json and persistent.json; and pixels.md,
.png, .csv and .json, curves of 10^8 samples (10^7 with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import machine, resources

ROOT = machine.ROOT
BUILD = ROOT / "build/bench"  # ignored by git; kept from part to part, and from call to call
# Minutes of each part, in order; what one leaves goes on to the next. --minutes stretches all alike.
SHARES = {
    "build": 1.6,
    "tests": 2.5,
    "sanitizer": 2.6,
    "native_step": 1.2,
    "persistent": 0.8,
    "curves": 3.5,
    "bench": 2.5,
    "latency": 1.5,
    "sizes": 4.0,
    "rivals": 6.9,
}
# Where a command may take ten minutes at most. A build that is there already takes seconds.
# What matters most comes first, for a machine that is lent for less than all of it.
PLAN = (
    "build,tests,native_step,persistent,latency",
    "build,rivals",
    "build,sanitizer,curves",
    "build,bench,sizes",
)
SIZES = ("128x20", "128x784", "1024x1024", "16384x1024", "65536x1024")  # to 2**26 elements
PYTEST = (sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--durations=10", "-p", "no:cacheprovider")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LOG_BYTES = 100_000  # of a log that is kept: its end


@dataclass
class Part:
    """What a part found: its verdict, a line for each detail, numbers for gpu.json, text for gpu.txt."""

    status: str = "passed"  # or failed, or skipped: it could not be tried here
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    def fail(self, note: str) -> None:
        self.status = "failed"
        self.notes.append(note)


@dataclass(frozen=True)
class Session:
    out: Path
    quick: bool


@dataclass(frozen=True)
class Run:
    """A command that ended, or was stopped when its time was up."""

    code: int
    output: str
    seconds: float
    timed_out: bool

    @property
    def verdict(self) -> str:
        return f"ran out of time after {self.seconds:.0f} s" if self.timed_out else f"exit status {self.code}"


def run(command: Sequence[str | Path], deadline: float, environment: Mapping[str, str] | None = None) -> Run:
    """Runs a command in the root of the checkout, and stops it and its children at the deadline."""
    start = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        # The checkout is what is tested, built in place, and not another copy that may be installed.
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    timed_out = False
    try:
        output, _ = process.communicate(timeout=max(1.0, deadline - start))
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    text = output.decode(errors="replace")
    return Run(process.returncode, text, time.monotonic() - start, timed_out)


def _last_lines(text: str, count: int = 5) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-count:])[-500:]


def write_log(path: Path, sections: Mapping[str, str]) -> None:
    text = "".join(f"=== {title}\n{body.strip()[-LOG_BYTES:]}\n\n" for title, body in sections.items())
    path.write_text(text, encoding="utf-8")


# --- the parts ----------------------------------------------------------------------------------------------


def build(session: Session, deadline: float) -> Part:
    """The extension in place for this GPU, and beside it the kernels' own test program."""
    part = Part()
    with ThreadPoolExecutor(2) as pool:
        extension = pool.submit(
            run,
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            deadline,
            {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "native")},
        )
        program = pool.submit(build_kernels_test, deadline)
    sections = {}
    built = extension.result()
    sections["setup.py build_ext --inplace"] = built.output
    part.data["extension_seconds"] = round(built.seconds, 1)
    if built.code:
        part.fail(f"extension: {built.verdict}: {_last_lines(built.output)}")
    kernels, failure = program.result()
    sections["kernels_test"] = failure or "built"
    if failure:
        part.fail(f"kernels_test: {_last_lines(failure)}")
    part.data["kernels"] = resources.to_dicts(kernels)
    part.text = resources.table(kernels)
    write_log(session.out / "build.txt", sections)
    return part


def build_kernels_test(deadline: float) -> tuple[list[resources.Kernel], str]:
    """tests/cuda_emulation/kernels_test.cpp for the GPU itself; the compiler's report, and why it failed."""
    nvcc = resources.find_nvcc()
    if nvcc is None:
        return [], "no nvcc on PATH or in CUDA_HOME"
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "kernels_test").unlink(missing_ok=True)
    arch = gpu_arch()
    with ThreadPoolExecutor(2) as pool:
        kernels = pool.submit(resources.compile_kernels, nvcc, arch, BUILD)
        test = ROOT / "tests/cuda_emulation/kernels_test.cpp"
        gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        flags = ["-x", "cu", "-std=c++20", "-O1", gencode]
        compiled = run([nvcc, *flags, "-c", test, "-o", BUILD / "kernels_test.o"], deadline)
    found, failure = kernels.result()
    if compiled.code:
        failure += compiled.output
    if failure:
        return found, failure
    objects = [BUILD / f"{source.stem}.o" for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    linked = run([nvcc, gencode, *objects, BUILD / "kernels_test.o", "-o", BUILD / "kernels_test"], deadline)
    return found, linked.output if linked.code else ""


def gpu_arch() -> str:
    """The architecture as nvcc writes it: 90a for compute capability 9.0."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major == 9 else ''}"


def tests(session: Session, deadline: float) -> Part:
    """pytest -m cuda, and every kernel launch of the test program. The persistent kernel, whose waits may
    trap, has its own part.
    """
    part = Part()
    pytest = [*PYTEST, "-k", "not persistent"]
    if find_spec("xdist"):  # most of the time is the host's: compiling, references
        pytest += ["-n", str(min(8, os.cpu_count() or 1))]
    program = [BUILD / "kernels_test", *(["--quick"] if session.quick else [])]
    with ThreadPoolExecutor(2) as pool:
        suite = pool.submit(run, pytest, deadline)
        kernels = pool.submit(run, program, deadline) if program[0].exists() else None
    sections = {}
    for name, result in {
        "pytest -m cuda": suite.result(),
        "kernels_test": kernels and kernels.result(),
    }.items():
        if result is None:
            part.fail(f"{name}: not built")
            continue
        sections[name] = result.output
        part.notes.append(f"{name}: {_last_lines(result.output, 1)}")
        part.data[name] = {"exit": result.code, "seconds": round(result.seconds, 1)}
        if result.code:
            part.fail(f"{name}: {result.verdict}: {_last_lines(result.output)}")
        elif name.startswith("pytest") and " passed" not in result.output:
            part.fail(f"{name}: every test was skipped")
    write_log(session.out / "tests.txt", sections)
    return part


def sanitizer(session: Session, deadline: float) -> Part:
    """compute-sanitizer's four tools over the kernels' test program, every operator and the engine."""
    part = Part()
    tool = find_sanitizer()
    if tool is None:
        part.status = "skipped"
        part.notes.append("no compute-sanitizer on PATH or in CUDA_HOME")
        return part
    programs: dict[str, list[str | Path]] = {
        "operators": [sys.executable, "-m", "bench.every_operator"],
        "engine": [sys.executable, "-m", "bench.native_step", "--once"],
        # racecheck may report copies into shared memory that an mbarrier orders, which it does not follow.
        "persistent": [sys.executable, "-m", "bench.native_step", "--once", "--persistent"],
    }
    if (BUILD / "kernels_test").exists():
        programs["kernels"] = [BUILD / "kernels_test", "--quick"]

    def watch(job: tuple[str, str]) -> Run:
        check, program = job
        command = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "20", *programs[program]]
        # Without torch's cache every tensor is an allocation of its own, with ends that can be watched.
        return run(command, deadline, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    jobs = [(check, program) for program in programs for check in TOOLS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        results = dict(zip(jobs, pool.map(watch, jobs), strict=True))
    sections = {}
    refused = 0
    for (check, program), result in results.items():
        name = f"{check}, {program}"
        sections[name] = result.output
        part.data[name] = {"exit": result.code, "seconds": round(result.seconds, 1)}
        if "Device not supported" in result.output:
            refused += 1
            part.notes.append(f"{name}: compute-sanitizer does not support this machine")
        elif result.code:
            part.fail(f"{name}: {result.verdict}: {_last_lines(result.output, 2)}")
        else:
            part.notes.append(f"{name}: clean")
    if refused == len(results):
        part.status = "skipped"
    write_log(session.out / "sanitizer.txt", sections)
    return part


def find_sanitizer() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    for folder in (None, home / "bin", home / "compute-sanitizer"):
        if found := shutil.which("compute-sanitizer", path=None if folder is None else str(folder)):
            return found
    return None


def bench(session: Session, deadline: float) -> Part:
    """The operators and the training step."""
    part = Part()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder)
        quick = ["--quick"] if session.quick else []
        texts = []
        for name, share in {"training": 0.25, "operators": 1.0}.items():
            left = share * (deadline - time.monotonic())
            command = [sys.executable, "-m", f"bench.{name}", "--device", "cuda", "--out", found]
            if name == "training":
                command += ["--steps", "500" if session.quick else "1000"]
            else:  # it begins no new shape when the budget is spent; the last one takes time too
                command += ["--budget", f"{max(10.0, left - 25):.0f}", *quick]
            result = run(command, time.monotonic() + left)
            if result.code:
                part.fail(f"{name}: {result.verdict}: {_last_lines(result.output)}")
            if (found / f"{name}.json").exists():
                part.data[name] = json.loads((found / f"{name}.json").read_text(encoding="utf-8"))
                texts.append((found / f"{name}.txt").read_text(encoding="utf-8"))
        for name in ("operators.png", "operators.html"):
            if (found / name).exists():
                shutil.copy(found / name, session.out)
        part.text = "\n".join(texts)
    for line in part.data.get("operators", {}).get("operators", []):
        if error := line["variants"].get("ours", {}).get("error"):
            part.fail(f"{line['operator']} {line['rows']}x{line['cols']} {line['dtype']}: {error}")
    return part


def native_step(session: Session, deadline: float) -> Part:
    """Whether the native engine's step is right, and how long it takes."""
    part = Part()
    quick = ["--quick"] if session.quick else []
    part.text = _measured(part, ["bench.native_step", "--out", session.out, *quick], deadline).output
    return part


def persistent(session: Session, deadline: float) -> Part:
    """The same of the kernel that stays on the GPU for many steps: its tests, its steps, its phases. Each
    is a process of its own: a wait that is given up ends whatever else that had on the GPU.
    """
    part = Part()
    suite = run([*PYTEST, "-k", "persistent"], deadline)
    part.notes.append(f"pytest: {_last_lines(suite.output, 1)}")
    if suite.code:
        part.fail(f"pytest: {suite.verdict}: {_last_lines(suite.output)}")
    quick = ["--quick"] if session.quick else []
    command: list[str | Path] = ["bench.native_step", "--persistent"]
    steps = _measured(part, [*command, "--out", session.out, *quick], deadline)
    phases = _measured(part, [*command, "--timeline"], deadline)
    part.text = f"{steps.output}\n{phases.output}"
    write_log(session.out / "persistent_tests.txt", {"pytest -m cuda -k persistent": suite.output})
    return part


def curves(session: Session, deadline: float) -> Part:
    """The curve of 20 latents at full scale, by the native engine, with three treatments of pixels."""
    part = Part()
    scale = ["--scale", "0.1" if session.quick else "1"]
    with tempfile.TemporaryDirectory() as folder:
        how = ["--engine", "native", "--device", "cuda", "--out", folder]
        _measured(part, ["vae_fast.cli", "reproduce", "pixels", *scale, *how], deadline)
        for suffix in ("md", "png", "csv", "json"):
            if (found := Path(folder) / f"pixels.{suffix}").exists():
                shutil.copy(found, session.out)
        if not (settings := Path(folder) / "pixels.json").exists():
            return part  # and what an earlier run left in session.out is not taken for this one's
        part.text = (Path(folder) / "pixels.md").read_text(encoding="utf-8")
        trained = json.loads(settings.read_text(encoding="utf-8"))["curves"]
    part.data = {name: {k: one[k] for k in ("samples", "seconds")} for name, one in trained.items()}
    part.notes += [f"{n}: {d['samples']:,} samples in {d['seconds']:.1f} s" for n, d in part.data.items()]
    return part


def latency(session: Session, deadline: float) -> Part:
    """What waiting, broadcasting and making noise cost."""
    part = Part()
    left = deadline - time.monotonic()
    result = _measured(
        part, ["bench.latency", "--out", session.out, "--seconds", f"{max(20.0, left - 5):.0f}"], deadline
    )
    part.text = result.output
    return part


def sizes(session: Session, deadline: float) -> Part:
    """Bernoulli, KL and sampling and their rivals, from 128x20 to 2**26 elements."""
    part = Part()
    with tempfile.TemporaryDirectory() as folder:
        chosen = ["--operators", "bernoulli_log_likelihood", "gaussian_kl", "reparameterize"]
        shapes = ["--shapes", *(SIZES[::2] if session.quick else SIZES)]
        budget = f"{max(10.0, deadline - time.monotonic() - 25):.0f}"
        command = ["bench.operators", *chosen, *shapes, "--no-accuracy", "--budget", budget]
        _measured(part, [*command, "--device", "cuda", "--out", folder], deadline)
        found = Path(folder)
        if (found / "operators.json").exists():
            shutil.copy(found / "operators.json", session.out / "sizes.json")
            part.text = (found / "operators.txt").read_text(encoding="utf-8")
    return part


def rivals(session: Session, deadline: float) -> Part:
    """The whole training step in every rival, each checked to be right."""
    part = Part()
    command: list[str | Path] = ["bench.rivals", "--device", "cuda", "--check", "--out", session.out]
    command += ["--quick"] if session.quick else []
    text = session.out / "rivals.txt"

    def attempt(*more: str) -> Run:
        budget = f"{max(10.0, deadline - time.monotonic() - 60):.0f}"  # the last line takes time too
        text.unlink(missing_ok=True)
        return _measured(part, [*command, "--budget", budget, *more], deadline)

    # Two frameworks on one GPU, and each with libraries of its own: if that crashes, PyTorch goes on alone.
    if (done := attempt()).code < 0 and not done.timed_out:
        part.notes.append("again without JAX")
        attempt("--without-jax")
    if text.exists():
        part.text = text.read_text(encoding="utf-8")
    return part


def _measured(part: Part, module: Sequence[str | Path], deadline: float) -> Run:
    """Runs `python -m MODULE ...`; the part has failed if that does."""
    result = run([sys.executable, "-m", *module], deadline)
    if result.code:
        part.fail(f"{module[0]}: {result.verdict}: {_last_lines(result.output)}")
    return result


PARTS: dict[str, Callable[[Session, float], Part]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "native_step": native_step,
    "persistent": persistent,
    "curves": curves,
    "bench": bench,
    "latency": latency,
    "sizes": sizes,
    "rivals": rivals,
}


# --- where and what -----------------------------------------------------------------------------------------


def describe(argv: Sequence[str], commit: str | None) -> dict[str, Any]:
    """What machine.describe says, and GPU, driver and compiler."""
    nvcc = resources.find_nvcc()
    facts = machine.describe(" ".join(["python -m bench.gpu", *argv]))
    facts |= {
        "commit": commit or facts["commit"] or "unknown",
        "nvcc": machine.output(nvcc, "--version").splitlines()[-2:] if nvcc else None,
        "gpu_state": machine.output(
            "nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem,clocks.max.sm,power.limit", "--format=csv"
        ),
    }
    try:
        import torch

        facts["torch_cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            facts["gpu"] = {
                "name": properties.name,
                "capability": list(torch.cuda.get_device_capability()),
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "l2_bytes": getattr(properties, "L2_cache_size", None),
            }
    except ImportError as error:
        facts["torch_error"] = str(error)
    return facts


def report(facts: Mapping[str, Any], parts: Mapping[str, Part]) -> str:
    gpu = facts.get("gpu", {}).get("name", "no GPU")
    nvcc = (facts["nvcc"] or ["no nvcc"])[0]
    lines = [
        f"{gpu}, driver {facts['driver'] or 'unknown'}, torch {facts['versions']['torch']}, {nvcc}",
        f"commit {facts['commit']}{' with uncommitted changes' if facts['uncommitted_changes'] else ''}",
        f"{facts['date']}: {facts['command']}",
        "",
    ]
    for name, part in parts.items():
        lines.append(f"{name:<10} {part.status:<8} {part.seconds:6.1f} s")
        lines += [f"    {note}" for note in part.notes]
    for name, part in parts.items():
        if part.text:
            lines += ["", f"=== {name}", part.text.rstrip()]
    return "\n".join(lines) + "\n"


def plan() -> list[str]:
    """The commands of PLAN, with the minutes that each takes at most."""
    return [
        f"python -m bench.gpu --out results/{i} --parts {parts}  "
        f"# {sum(SHARES[name] for name in parts.split(',')):.1f} minutes"
        for i, parts in enumerate(PLAN, 1)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a folder; required but for --plan")
    parser.add_argument("--plan", action="store_true", help="print the commands of at most ten minutes each")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--minutes", type=float, help="for all parts together (by default what they need)")
    parser.add_argument("--commit", help="where the checkout cannot say it itself")
    arguments = parser.parse_args(argv)
    chosen = [name for name in arguments.parts.split(",") if name]
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}, wanted some of {','.join(PARTS)}")
    if arguments.plan:
        print("\n".join(plan()))
        return 0
    if arguments.out is None:
        parser.error("--out: got none, wanted a folder")
    arguments.out.mkdir(parents=True, exist_ok=True)
    session = Session(arguments.out.resolve(), arguments.quick)

    start = time.monotonic()
    facts = describe(argv, arguments.commit)
    if "gpu" not in facts:
        print("bench.gpu: torch sees no GPU; it needs one, and a CUDA build of torch", file=sys.stderr)
        return 2
    parts: dict[str, Part] = {}
    whole = sum(SHARES[name] for name in chosen)
    seconds_per_share = 60 * (arguments.minutes or whole) / whole
    shares = 0.0
    for name in [name for name in PARTS if name in chosen]:
        shares += SHARES[name]
        begin = time.monotonic()
        try:
            part = PARTS[name](session, start + shares * seconds_per_share)
        except Exception as error:
            part = Part(status="failed", notes=[f"{type(error).__name__}: {error}"])
        part.seconds = round(time.monotonic() - begin, 1)
        parts[name] = part
        # Written after every part: whatever stops this program later, that much is there.
        text = report(facts, parts)
        (session.out / "gpu.txt").write_text(text, encoding="utf-8")
        content = facts | {
            "parts": {
                key: {"status": p.status, "seconds": p.seconds, "notes": p.notes, **p.data}
                for key, p in parts.items()
            }
        }
        (session.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {part.status} ({part.seconds:.0f} s)", flush=True)
    print(report(facts, parts))
    return int(any(part.status == "failed" for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
