"""The benchmarks work: what they time runs, what they report is there, and nothing outlives its time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # at the end: the installed vae_fast stays first

import vae_fast
from bench import (
    accuracy,
    every_operator,
    gpu,
    latency,
    linear_bernoulli,
    machine,
    native_step,
    operators,
    report,
    resources,
    rivals,
    step,
    step_report,
    summary,
    timing,
)

ROOT = machine.ROOT
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", operators.operators(), ids=lambda op: op.name)
def test_no_variant_of_any_operator_fails(op: operators.Operator, dtype: torch.dtype) -> None:
    lines = operators.bench(op, (4, 6), dtype, CPU, seconds=0, compile=False)
    assert [line["direction"] for line in lines] == ["forward", "backward", "both"]
    for line in lines:
        assert line["variants"].keys() == {"ours", "eager", "copy", *op.rivals}
        assert all(variant["median"] > 0 for variant in line["variants"].values())


def test_the_launches_of_a_step_are_told_apart_however_they_overlap() -> None:
    engine = "void vae_fast::engine::(anonymous namespace)::"
    product = engine + "product_kernel<(vae_fast::engine::Precision)0, true, vae_fast::engine::{0}>({0})"
    names = [product.format(name) for name in ("ActivateHidden", "DrawLatents")]
    names.append(engine + "update_kernel<(vae_fast::engine::Precision)0>(Jobs)")
    events, end = [(0, 900, engine + "prepare_kernel(Prepare)")], 1000
    for name, took in zip(names * 4, (8000, 4000, 9000) * 4, strict=True):
        events.append((end - 500, took + 500, name))  # begins before the launch ahead of it has ended
        end += took
    assert native_step.by_launch(events) == [
        ("ActivateHidden", 8.0, 8.5),
        ("DrawLatents", 4.0, 4.5),
        ("update_kernel", 9.0, 9.5),
    ]


def test_the_fused_last_layer_is_timed_and_weighed_against_the_two_apart() -> None:
    report = linear_bernoulli.bench(600, 4, 600, torch.float32, CPU, seconds=0, compiled=False)
    assert report.keys() == {"ours, sum", "ours, none", "eager"}
    assert all(line["median"] > 0 for line in report.values())
    assert report["ours, sum"]["extra_bytes"] < report["eager"]["extra_bytes"]
    assert all(name in linear_bernoulli.table(report) for name in report)


def test_our_variant_and_the_eager_one_compute_the_same() -> None:
    for op in operators.operators():
        inputs = op.inputs((3, 5), torch.float32, CPU)
        if op.name.startswith("reparameterize"):
            inputs[1].fill_(-200.0)  # no noise: eager draws another
        for ours, eager in zip(op.ours(*inputs), op.eager(*inputs), strict=True):
            torch.testing.assert_close(ours, eager)


def test_the_command_writes_numbers_a_table_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "DTYPES", [torch.bfloat16])
    arguments = ["--device", "cpu", "--quick", "--no-compile", "--seconds", "0", "--operators", "gaussian_kl"]
    threads = torch.get_num_threads()
    operators.main([*arguments, "--threads", str(threads), "--out", str(tmp_path)])
    files = {f"operators.{suffix}" for suffix in ("json", "txt", "png", "html")}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert "eager/ours" in capsys.readouterr().out
    result = json.loads((tmp_path / "operators.json").read_text(encoding="utf-8"))
    assert {"machine", "commit", "versions", "command", "operators", "host", "accuracy"} <= result.keys()
    assert {line["operator"] for line in result["operators"]} == {"gaussian_kl"}


def test_peak_memory_counts_what_is_freed_again() -> None:
    x = torch.zeros(2**18)
    mebibyte = 4 * x.numel()
    few = 1024  # scalars
    assert 2 * mebibyte <= timing.peak_memory(lambda: x.exp().add(1).mul(2), CPU) < 2 * mebibyte + few
    assert timing.peak_memory(lambda: x.zero_(), CPU) < few


def test_a_shape_that_does_not_fit_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(accuracy, "DTYPES", [])
    result = operators.run(CPU, quick=True, seconds=0, only=["gaussian_kl"], compile=False)
    assert {line["rows"] for line in result["operators"]} == {128}
    (left_out,) = result["skipped"]
    assert left_out.startswith("gaussian_kl 4096x128 float32: needs ") and "GiB" in left_out


def line(**microseconds: float) -> dict[str, object]:
    """A line of a result, with medians by the name of the variant."""
    variants = {name.replace("_", " "): {"median": value} for name, value in microseconds.items()}
    key = {"operator": "gaussian_kl", "rows": 8, "cols": 4, "dtype": "float32", "direction": "both"}
    return {**key, "bytes": 512, "variants": variants}


def test_where_we_lose_lists_every_faster_rival_but_not_the_copy() -> None:
    won, lost = line(ours=2, eager=3, copy=1), line(ours=4, eager=2, compile=3, sigmoid=5, copy=1)
    found = report.losses({"operators": [won, lost]})
    assert found == [(lost, "eager", 2.0), (lost, "compile", 4 / 3)]


def test_the_page_says_where_we_lose_and_draws_a_bar_for_each_ratio_to_the_copy() -> None:
    facts = {"machine": "a <machine>", "device": "cpu", "date": "today"}
    result = {**facts, "operators": [line(ours=4, eager=2, compile=12, copy=1)]}
    html = report.page(result)
    assert "<td>2.00</td>" in html and "1 of 2 comparisons" in html
    assert "a &lt;machine&gt;" in html and "a <machine>" not in html
    (axes,) = report.figure({"gaussian_kl": result["operators"]}).axes
    ends = {round(bar.get_x() + bar.get_width(), 6) for bar in axes.patches}
    assert ends == {4, 2, 12} and all(bar.get_x() == 1 for bar in axes.patches)


def test_each_operator_has_its_pytest_benchmark_and_groups_it_with_the_copy(tmp_path: Path) -> None:
    modules = {path.stem.removeprefix("test_") for path in (ROOT / "bench").glob("test_*.py")}
    assert modules == set(operators.functions())
    chosen = ["-k", "128x20 and not 128x2048 and float32 and forward and cpu and not compile"]
    written = tmp_path / "benchmarks.json"
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={written}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/test_reparameterize.py", *chosen, *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(Path(vae_fast.__file__).parent.parent)},  # that which is tested
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(written.read_text(encoding="utf-8"))["benchmarks"]
    assert {entry["group"] for entry in benchmarks} == {"reparameterize 128x20 float32 forward cpu"}
    names = [entry["name"].rstrip("]").split()[-1] for entry in benchmarks]
    assert names == ["ours", "eager", "copy"]
    assert all(entry["extra_info"]["bytes"] == 3 * 4 * 128 * 20 for entry in benchmarks)
    assert all(entry["extra_info"]["GB/s"] > 0 for entry in benchmarks)


def test_a_variant_that_fails_has_its_error_in_place_of_a_timing() -> None:
    def broken(_: object) -> None:
        raise RuntimeError("no such kernel")

    good = timing.Variant("good", lambda i: i, lambda i: i)
    result = timing.measure([good, timing.Variant("bad", lambda i: i, broken)], 2, CPU, 0)
    assert isinstance(result["good"], timing.Timing)
    assert result["bad"] == "RuntimeError: no such kernel"


def test_a_command_is_stopped_at_its_deadline_with_its_children() -> None:
    start = time.monotonic()
    done = gpu.run(["bash", "-c", "echo begun; sleep 60 & wait"], start + 1)
    assert done.timed_out and done.code != 0 and done.output == "begun\n"
    assert time.monotonic() - start < 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_part_that_raises_is_recorded_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(session: gpu.Session, deadline: float) -> gpu.Part:
        raise OSError("disk full")

    monkeypatch.setattr(gpu, "describe", lambda *_: FACTS)
    monkeypatch.setattr(gpu, "PARTS", {"build": broken, "bench": lambda *_: gpu.Part(text="a table")})
    assert gpu.main(["--out", str(tmp_path), "--parts", "build,bench"]) == 1
    text = (tmp_path / "gpu.txt").read_text()
    assert "OSError: disk full" in text and "a table" in text
    assert '"status": "passed"' in (tmp_path / "gpu.json").read_text()


FACTS = {
    "command": "python -m bench.gpu",
    "date": "",
    "commit": "0",
    "uncommitted_changes": False,
    "versions": {"torch": "2"},
    "nvcc": None,
    "driver": "",
    "gpu": {"name": "a GPU"},
}


def test_the_compilers_report_is_read() -> None:
    report = """\
ptxas info    : Compiling entry function 'kernel_a' for 'sm_90a'
    40 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 128 bytes smem
"""
    kernels = resources.parse("a.cu", report)
    assert kernels == [resources.Kernel("a.cu", "kernel_a", 64, 40, 8, 12)]
    assert "spills: a.cu kernel_a" in resources.table(kernels)
    assert resources.from_dicts(json.loads(json.dumps(resources.to_dicts(kernels)))) == kernels


def test_the_report_of_an_installed_extension_is_read_for_this_gpu_only() -> None:
    usage = """\
arch = sm_80
 Function _ZN60_GLOBAL__N__0a1b2c3d_14_gaussian_kl_cu_0a1b2c3d4kernelEv:
  REG:99 STACK:8 SHARED:0 LOCAL:0
arch = sm_90a
 Function _ZN60_GLOBAL__N__0a1b2c3d_14_gaussian_kl_cu_0a1b2c3d4kernelEv:
  REG:40 STACK:16 SHARED:64 LOCAL:0
"""
    (kernel,) = resources.parse_usage(usage, "90")
    assert (kernel.source, kernel.registers, kernel.stack) == ("gaussian_kl.cu", 40, 16)
    assert kernel.spilled is None and "-" in resources.table([kernel])


SASS = """\
		Function : void vae_fast::cuda::rows_kernel<vae_fast::cuda::Map<float, Bits, true> >(long)
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U8.CONSTANT R3, desc[UR4][R2.64] ;
        /*0030*/                   FADD R4, R4, 1 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/              @!P0 BRA 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""


def test_the_machine_code_is_read() -> None:
    name = "Map<float, Bits, true>"
    (kernel,) = resources.with_machine_code("a.cu", [resources.Kernel("a.cu", name, 64, 0, 0, 0)], SASS)
    assert kernel.accesses == (1, 16, 16)  # of the loop, not the constant before it
    assert kernel.instructions == 5 / 4
    assert kernel.problem == ""  # bits take one access of a byte
    narrow = SASS.replace("LDG.E.128", "LDG.E.64")
    (kernel,) = resources.with_machine_code("a.cu", [resources.Kernel("a.cu", name, 64, 0, 0, 0)], narrow)
    assert kernel.problem == "accesses of [8] bytes" and "accesses of [8]" in resources.table([kernel])


@pytest.mark.slow
def test_the_program_for_sanitizers_calls_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    every_operator.main(["--device", "cpu"])
    assert "all finite" in capsys.readouterr().out


# ---- the rivals of the whole step --------------------------------------------------------------------------

TINY = rivals.Work(batch=8, hidden=6)


def pixels() -> torch.Tensor:
    return torch.rand((64, 12), generator=torch.Generator().manual_seed(1)).round()


@pytest.fixture(
    params=["eager", "fused optimizer", "whole step", "JAX jit", "JAX scan", "native exact", "modules"]
)
def rival(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if "JAX" in request.param:
        pytest.importorskip("jax")
    # What torch.compile is given: compiling it takes longer than all other tests of this file together.
    whole = {"whole step": lambda w, s, seed, _: rivals.Compiled(w, s, seed, mode=None)}
    monkeypatch.setattr(rivals, "MAKERS", step.makers() | whole)
    return request.param


@pytest.mark.parametrize("optimizer", list(rivals.LEARNING_RATES))
def test_every_rival_follows_float64_with_the_same_minibatch_and_noise(rival: str, optimizer: str) -> None:
    assert rivals.distance(rival, replace(TINY, optimizer=optimizer), pixels()) < 1e-4


def test_a_rival_that_is_restarted_forgets_what_it_has_learned(rival: str) -> None:
    work = replace(TINY, optimizer="adam")
    started = rivals.make(rival, work, rivals.Source(pixels(), work.batch), 5, epoch=4)
    results = []
    for seed in (5, 5, 6):
        started.restart(seed)
        started.run(4 // started.unit)
        results.append(started.result()["w1"])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", list(rivals.LEARNING_RATES))
def test_the_compiled_rival_follows_float64(optimizer: str) -> None:
    assert rivals.distance("compile", replace(TINY, optimizer=optimizer), pixels()) < 1e-4


def test_half_precision_follows_float64_less_closely() -> None:
    assert 1e-3 < rivals.distance("native fast", TINY, pixels(), makers=step.makers()) < 0.1


def test_a_rival_draws_new_minibatches_and_noise_at_every_step() -> None:
    source = rivals.Source(torch.arange(1000.0)[:, None], 8)
    (x, eps), (x_next, eps_next) = source.draw(), source.draw()
    assert x.shape == (8, 1) and eps.shape == (8, rivals.LATENT)
    assert not torch.equal(x, x_next) and not torch.equal(eps, eps_next)


def test_the_check_tells_right_rivals_from_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(rivals.Eager):
        def __init__(self, work: rivals.Work, source: rivals.Source, seed: int) -> None:
            super().__init__(work, source, seed, fused=False)
            self.optimizer.param_groups[0]["lr"] *= 0.97

    class Still(rivals.Eager):
        def step(self) -> None:
            pass

    def broken(*_: object) -> rivals.Rival:
        raise RuntimeError("no such kernel")

    added = {
        "slow": lambda w, s, seed, _: Slow(w, s, seed),
        "still": lambda w, s, seed, _: Still(w, s, seed, fused=False),
        "broken": broken,
    }
    monkeypatch.setattr(rivals, "MAKERS", rivals.MAKERS | added)
    checked = rivals.check(["eager", *added], TINY, pixels(), pixels(), steps=60, reference_seeds=4, seeds=2)
    right = {name: line["right"] for name, line in checked["rivals"].items()}
    assert right == {"eager": True, "slow": False, "still": False, "broken": False}
    assert checked["rivals"]["broken"]["error"] == "RuntimeError: no such kernel"
    assert checked["rivals"]["still"]["distance"] == pytest.approx(1)
    rows = rivals.check_rows({"checks": [checked]})
    assert [row[-1] for row in rows[1:]] == ["", "", "yes", "NO", "NO", "RuntimeError: no such kernel"]
    assert 0 < checked["float32_distance"] < rivals.MAX_DISTANCE


def test_rivals_are_timed_per_step_and_one_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sleeper:
        unit = 5

        def run(self, calls: int) -> None:
            time.sleep(0.005 * calls)

        def finish(self) -> None:
            pass

    def broken(*_: object) -> rivals.Rival:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(rivals, "MAKERS", {"sleeper": lambda *_: Sleeper(), "broken": broken})
    line = rivals.bench(["sleeper", "broken"], TINY, pixels(), seconds=0, block=0.01)
    assert line["rivals"]["sleeper"]["median"] >= 1000  # microseconds: 5 steps in 5 ms
    assert line["rivals"]["sleeper"]["steps_per_block"] % 5 == 0
    result = {"steps": [line], "checks": [], "skipped": ["the rest: no time left"]}
    text = rivals.text(result)
    assert "adagrad, float32, broken: RuntimeError: no such kernel" in text
    assert "not measured: the rest: no time left" in text


# ---- the programs for the GPU ------------------------------------------------------------------------------


def program(folder: Path, body: str) -> Path:
    path = folder / "program"
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_the_floor_multiplies_what_a_step_multiplies() -> None:
    source = rivals.Source(torch.zeros((4, 784)), 100)
    floor = step.Products(rivals.Work(), source, seed=0)
    floor.run(1)
    assert len(floor.products) == 4 + 4 + 3  # forward, in the weights, in the inputs of all layers but one
    assert sum(2 * a.numel() * b.shape[1] for a, b, _ in floor.products) == step.flop(rivals.Work(), 784)
    assert step.flop(rivals.Work(), 784) == 410_000_000
    for a, b, out in floor.products:
        torch.testing.assert_close(out, a @ b)


def test_an_engine_that_is_not_there_is_left_out_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "OURS", {"modules": ("modules", "exact"), "warp": ("warp", "exact")})
    found, missing = step.ours_here(CPU)
    assert found == {"modules": "asked for"}
    assert len(missing) == 1 and missing[0].startswith("warp: ValueError: engine: got 'warp'")


def step_result(**medians: float) -> dict[str, object]:
    """A line of bench.step; an underscore stands for a space."""
    entries = {
        name.replace("_", " "): {"median": time, "low": 0.9 * time, "high": 1.2 * time, "how": "clock"}
        for name, time in medians.items()
    }
    work = asdict(rivals.Work())
    return {"work": work, "flop": 10**6, "rivals": entries, "missing": [], "checks": [], "distances": {}}


def test_ratios_of_the_step_are_to_the_best_rival_and_to_the_floor() -> None:
    result = step_result(matrix_floor=100.0, native_exact=125.0, modules=500.0, eager=400.0, JAX_scan=250.0)
    table = {row[0]: row[1:] for row in step_report.rows(result)[1:]}
    assert list(table) == ["matrix floor (10 GFLOP/s)", "native exact", "JAX scan", "eager", "modules"]
    assert table["native exact"] == ["125.0", "112.5 to 150.0", "800,000", "0.50", "0.80"]
    assert table["modules"][-2:] == ["2.00", "0.20"]
    assert step_report.native_rows([result])[1][1:] == ["125.0", "0.50", "-", "0.50", "JAX scan", "0.80"]


def test_the_step_report_names_the_rivals_that_win() -> None:
    won = step_result(matrix_floor=1.0, native_exact=2.0, eager=4.0)
    lost = step_result(matrix_floor=1.0, native_exact=8.0, eager=4.0, JAX_scan=2.0, compile=9.0)
    assert step_report.losses([won]) == []
    (loss,) = step_report.losses([won, lost])
    assert loss == (str(rivals.Work()), "native exact", ["JAX scan", "eager"], 4.0)


def test_the_step_command_writes_json_a_report_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = (255 * pixels()).to(torch.uint8)
    monkeypatch.setattr(vae_fast.datasets, "mnist", lambda: (images, images))
    monkeypatch.setattr(rivals, "MAKERS", {"eager": rivals.MAKERS["eager"]})
    bounds = {"work": asdict(TINY), "reference": {"mean": -1.0, "sd": 0.1}, "rivals": {}}
    monkeypatch.setattr(rivals, "check", lambda *_, **__: bounds)  # which has tests of its own
    monkeypatch.setattr(step, "BLOCK_SECONDS", {"cpu": 0.01})
    threads = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    before = torch.get_num_threads()
    arguments = ["--device", "cpu", "--threads", threads, "--batch", "8", "--hidden", "6", "--seconds", "0"]
    step.main([*arguments, "--optimizer", "adam", "--out", str(tmp_path)])
    torch.set_num_threads(before)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"batch-8-hidden-6-adam.json", "REPORT.md", "step.png"}
    (result,) = step_report.read(tmp_path)
    assert result["rivals"].keys() == {"matrix floor", "native exact", "native fast", "modules", "eager"}
    assert all(entry["median"] > 0 for entry in result["rivals"].values())
    assert {name for name, entry in result["distances"].items() if entry["right"]} == {*step.OURS, "eager"}
    assert "of floor" in capsys.readouterr().out
    page = (tmp_path / "REPORT.md").read_text(encoding="utf-8")
    assert result["command"] in page and "Where we lose" in page


def test_turns_in_which_others_had_the_processors_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", torch.get_num_threads)  # none to spare
    assert timing._disturbed((10.0, 5.0), (11.0, 5.5), 1.0)  # half a processor went to others
    assert not timing._disturbed((10.0, 5.0), (11.0, 5.9), 1.0)
    assert not timing._disturbed((10.0, 5.0), (11.0, 5.0), 0.01)  # too short for the system's clock
    calm = timing._undisturbed([(1.0, False)] * 5 + [(9.0, True)] * 6)
    assert (calm.median, calm.high, calm.count) == (1.0, 1.0, 5) and "without 6 turns" in calm.how
    busy = timing._undisturbed([(1.0, False)] * 4 + [(9.0, True)] * 6)
    assert (busy.median, busy.count) == (9.0, 10) and "while others" in busy.how


def test_what_was_measured_before_a_trap_or_a_hang_is_kept(tmp_path: Path) -> None:
    said = 'echo \'{"what": "barrier"}\'; echo -n \'{"what": "cut\''
    trap = program(tmp_path, f"{said}; echo launch failure >&2; exit 1")
    assert latency.run_section(trap, "all", 10) == ([{"what": "barrier"}], "exit status 1: launch failure")
    hang = program(tmp_path, f"{said}; exec sleep 60")
    start = time.monotonic()
    assert latency.run_section(hang, "all", 1) == ([{"what": "barrier"}], "stopped after 1 s: ")
    assert time.monotonic() - start < 10


def test_the_plan_for_short_commands_leaves_no_part_out() -> None:
    parts = [parts.split(",") for parts in gpu.PLAN]
    assert set().union(*parts) == gpu.PARTS.keys() == gpu.SHARES.keys()
    assert all(sum(gpu.SHARES[name] for name in some) <= 9.5 for some in parts)
    assert all(f"--parts {some}" in line for some, line in zip(gpu.PLAN, gpu.plan(), strict=True))


def test_rivals_that_crash_are_run_again_without_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def crash(command: list[object], deadline: float) -> gpu.Run:
        commands.append(command)
        if "--without-jax" in command:
            (tmp_path / "rivals.txt").write_text("a table")
            return gpu.Run(0, "", 1.0, False)
        return gpu.Run(-11, "core dumped", 1.0, False)

    monkeypatch.setattr(gpu, "run", crash)
    part = gpu.rivals(gpu.Session(tmp_path, quick=True), time.monotonic() + 100)
    assert len(commands) == 2 and part.text == "a table"
    assert part.status == "failed" and "core dumped" in part.notes[0]  # it is not to go unseen


def test_shapes_from_the_command_line_replace_every_operators_own(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--no-compile", "--no-accuracy", "--seconds", "0", "--out", str(tmp_path)]
    threads = ["--threads", str(torch.get_num_threads())]
    operators.main([*arguments, *threads, "--operators", "gaussian_kl", "--shapes", "3x5", "7x2"])
    result = json.loads((tmp_path / "operators.json").read_text(encoding="utf-8"))
    assert {(line["rows"], line["cols"]) for line in result["operators"]} == {(3, 5), (7, 2)}
    assert "accuracy" not in result
    with pytest.raises(SystemExit):
        operators.main([*arguments, "--shapes", "3by5"])


# ---- the report --------------------------------------------------------------------------------------------


def a_run(scale: float = 1.0) -> summary.Run:
    made = {
        "machine": "a GPU", "commit": "0123456789abcdef", "uncommitted_changes": False, "driver": "580",
        "versions": {"torch": "2"}, "date": "today", "command": "python -m bench.gpu",
    }  # fmt: skip

    def us(median: float) -> dict[str, float]:
        return {"median": scale * median, "low": median - 1, "high": median + 1, "count": 9}

    barrier = {"what": "barrier", "how": "counter", "blocks": 132, "us": us(2)}
    steps = [{"work": asdict(TINY), "rivals": {"eager": us(500), "JAX jit": {"error": "no JAX"}}}]
    sized = {**line(ours=4, eager=9, compile=6, copy=2), "direction": "both"}
    return {
        "latency": {**made, "lines": [barrier], "failures": ["latency graph: exit status 1"]},
        "rivals": {**made, "steps": steps, "checks": [], "skipped": []},
        "sizes": {**made, "device": "cuda", "operators": [sized], "host": [], "skipped": []},
    }


def test_the_report_says_what_was_measured_by_what_and_how_far_two_runs_are_apart(tmp_path: Path) -> None:
    summary.write([a_run(), a_run(1.1)], tmp_path)
    text = (tmp_path / "REPORT.md").read_text(encoding="utf-8")
    assert "| barrier | counter | blocks 132 | 2.000 | 1.000 to 3.000 |  | 2.200 |" in text
    assert (
        "500.0 (499.0 to 501.0)" in text and "| gaussian_kl | 8x4 | float32 | 4.0 | 9.0 | 6.0 | 2.0 |" in text
    )
    assert text.count("are 10.0% apart") == 2 and "at worst 10.0% (barrier, counter, blocks 132)" in text
    assert "0123456789ab" in text and "580" in text and "`python -m bench.gpu`" in text
    assert "* latency graph: exit status 1" in text and "JAX jit: no JAX" in text
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert {"latency.png", "rivals.png", "sizes.png", "run-1/sizes.json", "run-2/rivals.json"} <= names
    assert summary.read([tmp_path / "run-2"]) == a_run(1.1)


def test_one_run_alone_claims_no_spread_and_no_run_is_refused(tmp_path: Path) -> None:
    assert "no spread is known" in summary.text([a_run()])
    with pytest.raises(ValueError, match=r"wanted folders with latency\.json"):
        summary.read([tmp_path])
    summary.write([a_run()], tmp_path)
    with pytest.raises(ValueError, match=r"two files latency\.json"):
        summary.read([tmp_path / "run-1", tmp_path / "run-1"])


@pytest.mark.parametrize(("stray", "right"), [(0.049, True), (0.051, False), (math.nan, False)])
def test_a_report_of_the_native_step_is_there_after_every_line(
    stray: float, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(native_step, "check", lambda *_, **__: {"exact": stray, "fast": 0.3})
    monkeypatch.setattr(native_step, "side_by_side", lambda *_: [])
    seen = []

    def measured(data: Any, hidden: int, batch: int, precision: str, seconds: float, models: int = 1) -> Any:
        seen.append(json.loads((tmp_path / "step.json").read_text(encoding="utf-8")))
        what = {"models": models, "hidden": hidden, "batch_size": batch, "precision": precision}
        return {**what, "us_per_step": 3.0, "least": 2.0, "most": 4.0}

    monkeypatch.setattr(native_step, "measure", measured)
    report = native_step.Report(tmp_path, "step", [])
    native_step.report_launches(report, torch.zeros(1), quick=True)
    assert report.right is right and len(report.facts["steps"]) == 10
    assert [len(found["steps"]) for found in seen] == list(range(10))
    assert all(found["right"] is right for found in seen)
    assert "3.00, 2.00, 4.00" in (tmp_path / "step.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("capability", "right"), [((8, 0), True), ((9, 0), False)])
def test_a_persistent_kernel_that_is_not_taken_says_why(
    capability: tuple[int, int], right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    step = SimpleNamespace(why_not_persistent="several models")
    monkeypatch.setattr(native_step, "make_step", lambda *_, **__: (step, []))
    report = native_step.Report(tmp_path, "persistent", [])
    native_step.report_persistent(report, torch.zeros(1), quick=True)
    assert report.right is right
    assert "does not take several models" in (tmp_path / "persistent.txt").read_text(encoding="utf-8")
