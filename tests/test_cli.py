"""The command line: what appears in which file, exit codes, and one sentence for whatever is wrong."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import vae_fast as vf
import vae_fast.report
from vae_fast import cli, functional
from vae_fast.trainer import Trainer

FILES = ["checkpoint.safetensors", "history.csv", "report.html", "run.json"]
SMALL = ("--hidden", "6", "--latent", "2", "--optimizer", "adam", "--batch-size", "10")


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def whole_report() -> None:
    """Asks for the report with its figures; drawing them takes longer than these trainings."""


@pytest.fixture(autouse=True)
def short_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "whole_report" in request.fixturenames:
        return

    def write(path: Path, *_: object, reproduce: str, resume: str, notes: list[str], **__: object) -> None:
        path.write_text("\n".join([f"<code>{reproduce}</code>", f"<code>{resume}</code>", *notes]))

    monkeypatch.setattr(vf.report, "write_report", write)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def vae_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments], prog_name="vae-fast")
        out, err = capsys.readouterr()
        return Result(exit_.value.code, out, err)

    return run


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """60 images of 8 x 8 pixels, a different one in every row."""
    path = tmp_path / "digits.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    return path


@pytest.fixture
def trained(vae_fast, digits: Path) -> Path:
    """The folder of a finished run."""
    assert vae_fast("train", digits, *SMALL, "--samples", 300, "--out", "run").code == 0
    return Path("run")


def idx(path: Path, array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    return path.read_bytes()


class TestTrain:
    def test_it_leaves_report_checkpoint_history_and_run(self, whole_report, vae_fast, digits: Path) -> None:
        result = vae_fast("train", digits, *SMALL, "--samples", 300, "--out", "run")
        assert result.code == 0
        assert sorted(os.listdir("run")) == FILES
        history = Trainer.load("run/checkpoint.safetensors").history
        assert len(Path("run/history.csv").read_text().splitlines()) == len(history) + 1
        bound = f"{history.last.test_bound:.2f}".replace("-", "−")
        assert f"<dd>{bound}</dd>" in Path("run/report.html").read_text(encoding="utf-8")

    def test_its_last_line_says_the_test_bound_and_where_the_report_is(self, vae_fast, digits: Path) -> None:
        result = vae_fast("train", digits, *SMALL, "--samples", 300, "--out", "run")
        last = Trainer.load("run/checkpoint.safetensors").history.last
        assert result.out.count("\n") == 1
        assert result.out.startswith(f"test bound {last.test_bound:.2f} nats per datapoint after 300 samples")
        assert result.out.endswith("report: run/report.html\n")

    def test_without_a_file_it_trains_on_mnist(self, whole_report, vae_fast) -> None:
        result = vae_fast("train", "--hidden", 4, "--latent", 2, "--samples", 200)
        assert result.code == 0
        trainer = Trainer.load("vae-fast-run/checkpoint.safetensors")
        assert trainer.model.data_dim == 784 and trainer.settings.lr == 0.02
        assert "60000 rows of 784, uint8 from 0 to 255, taken as real values over 255" in result.err
        assert "<h1>VAE on MNIST</h1>" in Path("vae-fast-run/report.html").read_text(encoding="utf-8")

    def test_the_defaults_are_the_papers_model_and_settings(self) -> None:
        defaults = {
            option.name: option.get_default(cli.click.Context(cli.train)) for option in cli.train.params
        }
        wanted = {"hidden": "500", "latent": 20, "likelihood": "bernoulli", "optimizer": "adagrad"}
        wanted |= {"batch_size": 100, "samples": 1_000_000, "seed": 0, "pixel_scale": 255, "targets": "auto"}
        assert {name: defaults[name] for name in wanted} == wanted

    def test_without_test_data_a_tenth_is_held_out_and_it_is_said(self, vae_fast, digits: Path) -> None:
        result = vae_fast("train", digits, *SMALL, "--samples", 100, "--out", "run")
        assert "6 of the 60 rows, drawn at random, are held out" in result.err
        assert "6 of the 60 rows" in Path("run/report.html").read_text(encoding="utf-8")

    def test_with_test_data_all_rows_are_trained_on(self, vae_fast, digits: Path) -> None:
        rows = np.load(digits)
        np.save("test.npy", rows[:7])
        result = vae_fast("train", digits, "--test", "test.npy", *SMALL, "--samples", 120, "--out", "run")
        assert result.code == 0 and "held out" not in result.err
        trainer = Trainer.load("run/checkpoint.safetensors")
        wanted = vf.evaluation.bound(trainer.model, rows[:7].reshape(7, 64), seed=0).elbo
        assert trainer.history.last.test_bound == pytest.approx(wanted, abs=1e-4)

    def test_a_new_run_gets_a_new_folder(self, vae_fast, digits: Path) -> None:
        for name in ("vae-fast-run", "vae-fast-run-2", "vae-fast-run-3"):
            assert f"report: {name}/report.html" in vae_fast("train", digits, *SMALL, "--samples", 50).out

    def test_a_run_is_never_overwritten(self, vae_fast, digits: Path, trained: Path) -> None:
        before = {name: (trained / name).read_bytes() for name in FILES}
        result = vae_fast("train", digits, *SMALL, "--samples", 50, "--out", "run")
        assert result.code == 2 and "--out: found a run in run" in result.err
        assert {name: (trained / name).read_bytes() for name in FILES} == before

    def test_the_report_says_the_command_that_trains_the_same_again(self, vae_fast, digits: Path) -> None:
        vae_fast("train", digits, *SMALL, "--samples", 300, "--seed", 3, "--out", "run")
        page = Path("run/report.html").read_text(encoding="utf-8")
        command = re.search(r"<code>vae-fast (train .*?)</code>", page)
        assert command is not None
        assert vae_fast(*command[1].split(), "--out", "again").code == 0
        first, second = (Trainer.load(f"{run}/checkpoint.safetensors") for run in ("run", "again"))
        for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_a_gaussian_mean_of_pixels_stays_within_them(self, vae_fast, digits: Path) -> None:
        vae_fast("train", digits, *SMALL, "--likelihood", "gaussian", "--samples", 50, "--out", "run")
        config = Trainer.load("run/checkpoint.safetensors").model.config
        assert config is not None and config["mean_activation"] == "sigmoid"

    def test_several_hidden_layers_are_written_with_commas(self, vae_fast, digits: Path) -> None:
        vae_fast("train", digits, *SMALL, "--hidden", "9,5", "--samples", 50, "--out", "run")
        config = Trainer.load("run/checkpoint.safetensors").model.config
        assert config is not None and config["hidden_dims"] == [9, 5] and config["init"] == "torch"

    def test_one_array_of_an_npz_is_chosen_by_name(self, vae_fast, digits: Path) -> None:
        np.savez("both.npz", x_train=np.load(digits), x_test=np.load(digits)[:5])
        result = vae_fast("train", "both.npz", *SMALL)
        assert result.code == 2 and "x_train, x_test" in result.err and "both.npz:NAME" in result.err
        result = vae_fast(
            "train", "both.npz:x_train", "--test", "both.npz:x_test", *SMALL, "--samples", 50, "--out", "run"
        )
        assert result.code == 0 and "60 rows of 64" in result.err

    def test_a_file_without_a_terminal_gets_a_line_per_report(self, vae_fast, digits: Path) -> None:
        result = vae_fast("train", digits, *SMALL, "--samples", 100, "--out", "run")
        history = Trainer.load("run/checkpoint.safetensors").history
        lines = [line for line in result.err.splitlines() if " samples  bound " in line]
        assert len(lines) == len(history)
        assert lines[-1].split()[0] == str(history.last.samples)


class TestWrongData:
    """One sentence that names the file, what was found and what was wanted; code 2; nothing written."""

    def refused(self, vae_fast, *arguments: object, name: str) -> str:
        before = sorted(os.listdir())
        result = vae_fast("train", *arguments)
        assert result.code == 2 and result.out == ""
        (sentence,) = result.err.splitlines()
        assert name in sentence and "found" in sentence and "wanted" in sentence
        assert sorted(os.listdir()) == before
        return sentence

    def test_labels(self, vae_fast) -> None:
        idx(Path("train-labels-idx1-ubyte.gz"), np.arange(10))
        assert "labels" in self.refused(
            vae_fast, "train-labels-idx1-ubyte.gz", name="train-labels-idx1-ubyte.gz"
        )

    def test_a_truncated_gzip(self, vae_fast) -> None:
        whole = idx(Path("a-idx3-ubyte.gz"), np.random.default_rng(0).integers(0, 256, (20, 8, 8)))
        Path("a-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])
        assert "stop early" in self.refused(vae_fast, "a-idx3-ubyte.gz", name="a-idx3-ubyte.gz")

    def test_values_to_255_as_floats(self, vae_fast, digits: Path) -> None:
        np.save("floats.npy", np.load(digits).astype(np.float32))
        assert "divide by 255" in self.refused(vae_fast, "floats.npy", name="floats.npy")

    def test_nan(self, vae_fast) -> None:
        rows = np.full((10, 64), 0.5)
        rows[3, 5] = np.nan
        np.save("nan.npy", rows)
        assert "nan in row 3, column 5" in self.refused(vae_fast, "nan.npy", name="nan.npy")

    def test_an_empty_file(self, vae_fast) -> None:
        Path("empty.npy").touch()
        assert "empty" in self.refused(vae_fast, "empty.npy", name="empty.npy")

    def test_no_file(self, vae_fast) -> None:
        assert "no such file" in self.refused(vae_fast, "nowhere.npy", name="nowhere.npy")

    def test_test_data_of_another_width(self, vae_fast, digits: Path) -> None:
        np.save("wide.npy", np.zeros((5, 65), dtype=np.uint8))
        assert "wide.npy" in self.refused(vae_fast, digits, "--test", "wide.npy", name="wide.npy")

    def test_an_out_folder_named_by_the_user_is_not_made(self, vae_fast) -> None:
        Path("empty.npy").touch()
        self.refused(vae_fast, "empty.npy", "--out", "run", name="empty.npy")


class TestWrongCommands:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--hidden", "many"], "--hidden"),
            (["--hidden", "5,0"], "--hidden"),
            (["--lr", "0"], "--lr"),
            (["--samples", "0"], "--samples"),
            (["--likelihood", "poisson"], "--likelihood"),
            (["--image-shape", "3by5"], "--image-shape"),
            (["--image-shape", "9x9"], "--image-shape: found 9x9; wanted sizes whose product is 64"),
            (["--device", "abacus"], "--device: found 'abacus'"),
            (["--colour", "red"], "--colour"),
        ],
    )
    def test_each_is_one_sentence_with_code_2_and_nothing_written(
        self, vae_fast, digits: Path, options: list[str], words: str
    ) -> None:
        result = vae_fast("train", digits, *options)
        assert result.code == 2
        (sentence,) = result.err.splitlines()
        assert words in sentence
        assert os.listdir() == ["digits.npy"]

    @pytest.mark.parametrize("command", [("train",), ("reproduce", "figure2")])
    def test_a_native_engine_that_was_not_built(
        self, vae_fast, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
    ) -> None:
        """A GPU that torch sees, and a build without CUDA kernels"""
        monkeypatch.setattr(cli, "_device", lambda name: "cuda:0")
        monkeypatch.delattr(vf._C, "CudaStep", raising=False)
        result = vae_fast(*command, "--engine", "native", "--device", "cuda:0", "--out", "run")
        assert result.code == 2
        (sentence,) = result.err.splitlines()
        assert "--engine: found native with --device cuda:0" in sentence and "vae-fast doctor" in sentence
        assert os.listdir() == []

    def test_a_folder_that_cannot_be_made(self, vae_fast, digits: Path) -> None:
        Path("file").touch()
        for out in ("file", "file/run"):
            result = vae_fast("train", digits, *SMALL, "--out", out)
            assert result.code == 2 and f"--out: found {out}" in result.err and result.err.count("\n") == 1

    @pytest.mark.parametrize("command", sorted(cli.main.commands))
    def test_every_command_has_help_with_an_example(self, vae_fast, command: str) -> None:
        result = vae_fast(command, "--help")
        assert result.code == 0 and f"Example: vae-fast {command}" in result.out


class TestResume:
    def test_ctrl_c_saves_says_how_to_go_on_and_the_rest_is_as_without_it(
        self, vae_fast, digits: Path
    ) -> None:
        def interrupt() -> None:
            while not Path("run/checkpoint.safetensors").exists():
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        result = vae_fast("train", digits, *SMALL, "--samples", 20_000, "--out", "run")
        thread.join()
        assert result.code == 130
        assert "saved" in result.err and result.err.endswith("vae-fast train --resume run\n")
        seen = Trainer.load("run/checkpoint.safetensors").samples_seen
        assert 0 < seen < 20_000

        total = seen + 537
        resumed = vae_fast("train", "--resume", "run", "--samples", total)
        assert resumed.code == 0 and sorted(os.listdir("run")) == FILES
        vae_fast("train", digits, *SMALL, "--samples", total, "--out", "whole")
        first, second = (Trainer.load(f"{run}/checkpoint.safetensors") for run in ("run", "whole"))
        assert first.samples_seen == second.samples_seen
        for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert first.history.last.test_bound == second.history.last.test_bound

    def test_a_run_killed_before_its_first_checkpoint_begins_again(self, vae_fast, trained: Path) -> None:
        whole = Trainer.load(trained / "checkpoint.safetensors")
        for name in ("checkpoint.safetensors", "history.csv", "report.html"):
            (trained / name).unlink()
        assert vae_fast("train", "--resume", trained).code == 0
        again = Trainer.load(trained / "checkpoint.safetensors")
        assert again.history.last.test_bound == whole.history.last.test_bound

    def test_a_finished_run_gets_its_report_again(self, vae_fast, trained: Path) -> None:
        (trained / "report.html").unlink()
        checkpoint = (trained / "checkpoint.safetensors").read_bytes()
        assert vae_fast("train", "--resume", trained).code == 0
        assert (trained / "report.html").exists()
        assert (trained / "checkpoint.safetensors").read_bytes() == checkpoint

    def test_it_goes_on_from_another_folder(self, vae_fast, trained: Path, monkeypatch) -> None:
        monkeypatch.chdir(trained)
        assert vae_fast("train", "--resume", ".", "--samples", 400).code == 0
        assert Trainer.load("checkpoint.safetensors").samples_seen >= 400

    def test_other_data_are_refused_and_nothing_changes(self, vae_fast, trained: Path, digits: Path) -> None:
        np.save(digits, 255 - np.load(digits))
        before = {name: (trained / name).read_bytes() for name in FILES}
        result = vae_fast("train", "--resume", trained, "--samples", 400)
        assert result.code == 2 and "found other data than this run was trained on" in result.err
        assert {name: (trained / name).read_bytes() for name in FILES} == before

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--resume", "run", "--latent", "3"], "--resume: found --latent"),
            (["--resume", "run", "--samples", "10"], "--samples: found 10"),
            (["--resume", "nowhere"], "nowhere: found no readable run.json"),
        ],
    )
    def test_what_it_cannot_do_is_refused(
        self, vae_fast, trained: Path, options: list[str], words: str
    ) -> None:
        before = (trained / "run.json").read_bytes()
        result = vae_fast("train", *options)
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1
        assert (trained / "run.json").read_bytes() == before


class TestEvaluate:
    def test_without_data_it_is_the_test_bound_of_the_run(self, vae_fast, trained: Path) -> None:
        last = Trainer.load(trained / "checkpoint.safetensors").history.last
        lines = vae_fast("evaluate", trained).out.splitlines()
        values = [float(line.split()[-1 if i else 1]) for i, line in enumerate(lines[:3])]
        assert values == pytest.approx([last.test_bound, last.test_log_likelihood, last.test_kl], abs=5e-4)
        assert "6 datapoints, real pixels" in lines[-1]

    def test_with_data_it_is_the_bound_of_those(self, vae_fast, trained: Path, digits: Path) -> None:
        model = Trainer.load(trained / "checkpoint.safetensors").model
        wanted = vf.evaluation.bound(model, np.load(digits), num_samples=3, seed=5)
        for checkpoint in (trained, trained / "checkpoint.safetensors"):
            result = vae_fast("evaluate", checkpoint, digits, "--num-samples", 3, "--seed", 5)
            assert result.code == 0 and f"{wanted.elbo:.3f}  nats per datapoint, 3 posterior" in result.out
            assert "60 datapoints" in result.out

    def test_data_are_read_as_the_model_was_trained(self, vae_fast, digits: Path) -> None:
        vae_fast("train", digits, *SMALL, "--samples", 50, "--out", "run", "--pixel-scale", 256)
        np.save("dark.npy", np.load(digits) // 200)  # only 0 and 1, but of 256
        assert "real pixels" in vae_fast("evaluate", "run", "dark.npy").out

    def test_what_is_no_checkpoint_is_refused(self, vae_fast, trained: Path, digits: Path) -> None:
        whole = (trained / "checkpoint.safetensors").read_bytes()
        Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
        for name in ("half.safetensors", "digits.npy", "nowhere"):
            result = vae_fast("evaluate", name, digits)
            assert result.code == 2 and result.err.startswith(f"vae-fast: {name}: found")
            assert result.err.count("\n") == 1

    def test_a_checkpoint_alone_needs_data(self, vae_fast, trained: Path) -> None:
        (trained / "checkpoint.safetensors").rename("alone.safetensors")
        result = vae_fast("evaluate", "alone.safetensors")
        assert result.code == 2 and "wanted" in result.err


class TestSample:
    def test_an_npy_holds_what_the_model_draws(self, vae_fast, trained: Path) -> None:
        assert vae_fast("sample", trained, "-n", 5, "-o", "s.npy", "--seed", 9).code == 0
        model = Trainer.load(trained / "checkpoint.safetensors").model
        found = np.load("s.npy")
        assert found.dtype == np.float32 and (found == model.sample(5, seed=9).numpy()).all()

    def test_a_png_holds_their_pixels_row_by_row(self, vae_fast, trained: Path) -> None:
        from matplotlib.image import imread

        assert vae_fast("sample", trained, "-n", 9, "-o", "s.png").code == 0
        images = Trainer.load(trained / "checkpoint.safetensors").model.sample(9, seed=0).numpy()
        picture = np.rint(255 * imread("s.png")).astype(int)[..., 0]
        for k in range(9):
            row, column = divmod(k, 3)
            cell = picture[9 * row : 9 * row + 8, 9 * column : 9 * column + 8]
            assert np.abs(cell - 255 * images[k].reshape(8, 8)).max() <= 0.501

    def test_what_cannot_be_written_or_shown_is_refused(self, vae_fast, trained: Path) -> None:
        before = sorted(os.listdir())
        for options, words in (
            (["-o", "s.gif"], "ends in .png or .npy"),
            (["-o", "no/such/s.png"], "found no folder 'no/such'"),
            (["--image-shape", "none"], "--image-shape: found none"),
        ):
            result = vae_fast("sample", trained, *options)
            assert result.code == 2 and words in result.err and result.err.count("\n") == 1
        assert sorted(os.listdir()) == before


class TestEncode:
    def test_row_k_is_the_posterior_of_row_k(self, vae_fast, trained: Path) -> None:
        rows = np.random.default_rng(1).integers(0, 256, (2345, 64), dtype=np.uint8)
        np.save("rows.npy", rows)
        assert vae_fast("encode", trained, "rows.npy", "-o", "z.npz", "--parameters").code == 0
        model = Trainer.load(trained / "checkpoint.safetensors").model
        with torch.no_grad():
            mu, logvar = model.encoder(torch.from_numpy(rows) / 255)
        with np.load("z.npz") as found:
            assert sorted(found) == ["logvar", "mean", "mu"]
            assert found["mean"].dtype == np.float32
            np.testing.assert_allclose(found["mean"], mu.numpy(), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found["mu"], mu.numpy(), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found["logvar"], logvar.numpy(), rtol=1e-4, atol=1e-6)

    def test_the_means_alone_and_a_picture_are_the_default(self, vae_fast, trained: Path) -> None:
        result = vae_fast("encode", trained)
        assert result.out == "6 datapoints, 2 latents: latents.npz, latents.png\n"
        with np.load("latents.npz") as found:
            assert list(found) == ["mean"] and found["mean"].shape == (6, 2)
        assert Path("latents.png").read_bytes().startswith(b"\x89PNG")

    def test_data_of_another_width_are_refused(self, vae_fast, trained: Path) -> None:
        result = vae_fast("encode", trained, "mnist:test")
        assert result.code == 2 and "found rows of 784 values; wanted 64" in result.err
        assert not Path("latents.npz").exists()


class TestUses:
    """The commands write what the functions of :mod:`vae_fast.uses` return, of the run's test data."""

    def test_reconstruct(self, vae_fast, trained: Path, digits: Path) -> None:
        assert vae_fast("reconstruct", trained, digits).code == 0
        model = Trainer.load(trained / "checkpoint.safetensors").model
        wanted = vf.uses.reconstruct(model, np.load(digits))
        np.testing.assert_allclose(np.load("reconstructions.npy"), wanted.numpy(), rtol=1e-5)
        assert Path("reconstructions.png").exists()

    def test_denoise_puts_noise_on_and_takes_it_out(self, vae_fast, trained: Path, digits: Path) -> None:
        options = ["--noise", 0.2, "--seed", 3, "--steps", 5]
        result = vae_fast("denoise", trained, digits, *options)
        x = torch.from_numpy(np.load(digits)).reshape(60, 64) / 255
        noisy = vf.uses.corrupt(x, 0.2, seed=3)
        model = Trainer.load(trained / "checkpoint.safetensors").model
        wanted = vf.uses.denoise(model, noisy, 0.2, steps=5)
        with np.load("denoised.npz") as found:
            np.testing.assert_allclose(found["noisy"], noisy.numpy())
            np.testing.assert_allclose(found["denoised"], wanted.numpy(), rtol=1e-4, atol=1e-5)
        before, after = ((part - x).square().mean() for part in (noisy, wanted))
        assert f"mean squared error {before:.5f} before, {after:.5f} after" in result.out

    def test_data_that_are_noisy_already_get_no_more(self, vae_fast, trained: Path, digits: Path) -> None:
        result = vae_fast("denoise", trained, digits, "--as-is", "--kind", "masking", "-o", "d.npz")
        assert result.code == 0 and "error" not in result.out
        with np.load("d.npz") as found:
            np.testing.assert_allclose(found["noisy"], np.load(digits).reshape(60, 64) / 255, rtol=1e-6)

    def test_manifold(self, vae_fast, trained: Path) -> None:
        assert vae_fast("manifold", trained, "-n", 3).out == "9 images: manifold.npy, manifold.png\n"
        model = Trainer.load(trained / "checkpoint.safetensors").model
        np.testing.assert_allclose(np.load("manifold.npy"), vf.uses.manifold(model, 3).numpy(), rtol=1e-5)

    def test_the_manifold_of_many_latents_moves_those_that_the_data_move(
        self, vae_fast, digits: Path
    ) -> None:
        vae_fast("train", digits, *SMALL, "--latent", 4, "--samples", 300, "--out", "four")
        assert vae_fast("manifold", "four", digits, "-n", 3, "-o", "m.npy").code == 0
        model = Trainer.load("four/checkpoint.safetensors").model
        variance = vf.evaluation.active_units(model, np.load(digits)).variance
        wanted = vf.uses.manifold(model, 3, variance=variance)
        np.testing.assert_allclose(np.load("m.npy"), wanted.numpy(), rtol=1e-5)

    @pytest.mark.parametrize(
        ("command", "options", "words"),
        [
            ("denoise", ["--noise", "1"], "--noise: found 1; wanted a share"),
            ("denoise", ["-o", "d.npy"], "ends in .npz or .png"),
            ("reconstruct", ["-o", "r.npz"], "ends in .npy or .png"),
            ("manifold", ["--image-shape", "none"], "--image-shape: found none"),
        ],
    )
    def test_what_cannot_be_is_refused_with_nothing_written(
        self, vae_fast, trained: Path, command: str, options: list[str], words: str
    ) -> None:
        before = sorted(os.listdir())
        result = vae_fast(command, trained, *options)
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1
        assert sorted(os.listdir()) == before

    def test_data_that_are_no_images_are_drawn_as_rows(self, vae_fast) -> None:
        np.save("table.npy", np.random.default_rng(0).normal(0, 1, (40, 12)).astype(np.float32))
        vae_fast("train", "table.npy", "--likelihood", "gaussian", *SMALL, "--samples", 100, "--out", "run")
        assert vae_fast("reconstruct", "run").code == 0
        assert vae_fast("denoise", "run", "--kind", "gaussian", "--noise", 2).code == 0
        assert Path("reconstructions.png").exists() and Path("denoised.png").exists()


class TestDoctor:
    def test_a_sound_installation_is_said_to_be_one(self, vae_fast) -> None:
        result = vae_fast("doctor")
        assert result.code == 0 and result.out.endswith("all is well\n")
        for subject in ("Python", "torch", "vae-fast", "CPU", "CUDA", "numbers, cpu", "MNIST", "matplotlib"):
            assert any(line[6:].startswith(subject) for line in result.out.splitlines())
        assert torch.__version__ in result.out and str(vf.build_info()["cpu_capability"]) in result.out

    @pytest.mark.parametrize(
        "operator",
        ["gaussian_kl", "reparameterize_with_kl", "bernoulli_log_likelihood", "gaussian_log_likelihood"],
    )
    def test_a_wrong_number_is_found(self, vae_fast, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
        right = getattr(functional, operator)

        def slightly_wrong(*args: object, **options: object) -> object:
            found = right(*args, **options)
            return tuple(1.0001 * t for t in found) if isinstance(found, tuple) else 1.0001 * found

        monkeypatch.setattr(functional, operator, slightly_wrong)
        result = vae_fast("doctor")
        assert result.code == 1 and "1 of these checks failed" in result.out
        (line,) = [line for line in result.out.splitlines() if line.startswith("FAIL")]
        assert "off by 1.0e-04 of float64" in line
        assert "Install again" in result.out

    def test_an_extension_that_does_not_load_is_found(
        self, vae_fast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "vae_fast._extension", None)
        result = vae_fast("doctor")
        assert result.code == 1 and re.search(r"^FAIL +vae-fast ", result.out, re.MULTILINE)

    def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(
        self, vae_fast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken() -> None:
            raise OSError("the disk is gone")

        monkeypatch.setattr(vf.datasets, "mnist", broken)
        result = vae_fast("doctor")
        assert result.code == 1
        assert re.search(r"^FAIL +MNIST +OSError: the disk is gone$", result.out, re.MULTILINE)
        assert re.search(r"^ok +click", result.out, re.MULTILINE)


class TestBench:
    def test_it_prints_the_table_and_writes_page_picture_and_numbers(
        self, vae_fast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cli._bench_module("accuracy"), "DTYPES", [torch.bfloat16])
        options = ["--operators", "gaussian_kl", "--device", "cpu", "--seconds", 0, "--no-compile"]
        result = vae_fast("bench", *options, "--out", "results")
        assert result.code == 0 and result.out.endswith("report: results/operators.html\n")
        assert re.search(r"^gaussian_kl +128x20 +float32 +backward +\d", result.out, re.MULTILINE)
        files = [f"operators.{suffix}" for suffix in ("html", "json", "png", "txt")]
        assert sorted(os.listdir("results")) == files
        numbers = json.loads(Path("results/operators.json").read_text(encoding="utf-8"))
        words = "--device cpu --operators gaussian_kl --seconds 0.0 --no-compile"
        assert numbers["command"] == f"vae-fast bench {words}"

    def test_an_unknown_operator_is_refused_with_those_there_are(self, vae_fast) -> None:
        result = vae_fast("bench", "--operators", "gaussian_kl,elbow")
        assert result.code == 2 and os.listdir() == []
        assert "--operators: found elbow; wanted some of bernoulli_log_likelihood," in result.err


class TestWhatGoesWrongOnTheWay:
    def test_a_full_disk_is_one_sentence_with_code_1(
        self, vae_fast, digits: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise vf.checkpoint.CheckpointError("run: found no space; wanted some")

        monkeypatch.setattr(vf.checkpoint, "save", full)
        result = vae_fast("train", digits, *SMALL, "--samples", 100, "--out", "run")
        assert result.code == 1 and "found no space; wanted some. To go on: vae-fast train" in result.err

    def test_ctrl_c_outside_training_has_code_130(self, vae_fast, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(vf.datasets, "mnist", interrupted)
        result = vae_fast("train")
        assert result.code == 130 and result.err.strip() == "vae-fast: interrupted" and os.listdir() == []

    def test_a_bound_that_is_not_finite_is_one_sentence_with_code_1(self, vae_fast) -> None:
        np.save("huge.npy", np.random.default_rng(0).normal(0, 1e30, (60, 5)).astype(np.float32))
        result = vae_fast("train", "huge.npy", "--likelihood", "gaussian", *SMALL, "--samples", 300)
        assert result.code == 1
        assert "step 0" in result.err.splitlines()[-1]
