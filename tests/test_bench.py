"""The benchmarks work: what they time runs, what they report is there, and nothing outlives its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # at the end: the installed vae_fast stays first

import vae_fast
from bench import (
    accuracy,
    every_operator,
    gpu,
    linear_bernoulli,
    machine,
    operators,
    report,
    resources,
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
