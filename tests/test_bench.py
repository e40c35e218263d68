"""The benchmarks work: what they time runs, what they report is there, and nothing outlives its time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # at the end: the installed vae_fast stays first

from bench import every_operator, gpu, operators, resources, timing

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", operators.operators(), ids=lambda op: op.name)
def test_no_variant_of_any_operator_fails(op: operators.Operator, dtype: torch.dtype) -> None:
    lines = operators.bench(op, (4, 6), dtype, CPU, seconds=0, compile=False)
    assert [line["direction"] for line in lines] == ["forward", "backward", "both"]
    for line in lines:
        assert line["variants"].keys() == {"ours", "eager", "copy", *op.rivals}
        assert all(variant["median"] > 0 for variant in line["variants"].values())


def test_our_variant_and_the_eager_one_compute_the_same() -> None:
    for op in operators.operators():
        inputs = op.inputs((3, 5), torch.float32, CPU)
        if op.name.startswith("reparameterize"):
            inputs[1].fill_(-200.0)  # no noise: eager draws another
        for ours, eager in zip(op.ours(*inputs), op.eager(*inputs), strict=True):
            torch.testing.assert_close(ours, eager)


def test_the_command_writes_numbers_a_table_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--quick", "--no-compile", "--seconds", "0", "--operators", "gaussian_kl"]
    threads = torch.get_num_threads()
    operators.main([*arguments, "--threads", str(threads), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"operators.json", "operators.txt", "operators.png"}
    assert "eager/ours" in capsys.readouterr().out


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
