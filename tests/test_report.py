"""The report: its numbers are those of the history, it needs nothing from elsewhere, and text stays text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import vae_fast as vf
from vae_fast import datasets, plots, report
from vae_fast.trainer import History, HistoryRow

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Text, tags with attributes, and whether every tag that opens closes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or not data.strip():
            return
        self.texts.append(data.strip())
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def headings(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)


def images(count: int, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, width), generator=generator, dtype=torch.uint8)


def trained(data: torch.Tensor, test: torch.Tensor | None, **model: object) -> vf.Trainer:
    settings = {"hidden_dims": [8], "latent_dim": 3, "likelihood": "bernoulli", "seed": 0, **model}
    trainer = vf.Trainer(vf.VAE(data.shape[1], **settings), optimizer="adam", lr=1e-3, batch_size=10)
    trainer.fit(data, test, max_samples=60, report_every=20, progress=False)
    return trainer


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run() -> tuple[vf.Trainer, torch.Tensor, torch.Tensor]:
    data = images(40)
    return trained(data[:30], data[30:]), data[:30], data[30:]


def page(path: Path, *arguments: object, **options: object) -> Page:
    report.write_report(path, *arguments, **options)
    return Page(path)


def shown(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


class TestNumbers:
    def test_the_headline_is_the_last_row_of_the_history(self, run, tmp_path: Path) -> None:
        trainer, train, test = run
        found = page(tmp_path / "r.html", trainer, train, test, name="noise")
        last = trainer.history.last
        index = found.texts.index("Test bound")
        assert found.texts[index + 1] == shown(last.test_bound)
        index = found.texts.index("Speed")
        assert float(found.texts[index + 1].replace(",", "")) == pytest.approx(
            last.samples / last.seconds, 0.01
        )
        assert "60 samples, 2 epochs of 30 datapoints" in found.text

    def test_the_table_of_the_curves_is_the_history(self, run, tmp_path: Path) -> None:
        trainer, train, test = run
        rows = page(tmp_path / "r.html", trainer, train, test).cells
        for row in trainer.history:
            wanted = [
                f"{row.samples:,}",
                f"{row.seconds:.1f}",
                *map(
                    shown,
                    (
                        row.test_bound,
                        row.train_bound,
                        row.test_log_likelihood,
                        row.test_kl,
                        row.train_log_likelihood,
                        row.train_kl,
                    ),
                ),
            ]
            assert wanted in rows

    def test_without_test_data_it_is_about_the_training_data(self, tmp_path: Path) -> None:
        data = images(30)
        trainer = trained(data, None)
        found = page(tmp_path / "r.html", trainer, data)
        index = found.texts.index("Training bound")
        assert found.texts[index + 1] == shown(trainer.history.last.train_bound)
        assert "Evenly spaced rows of the training data" in found.text
        assert "Test bound" not in found.text

    def test_latents_in_use_are_those_of_the_evaluation(self, run, tmp_path: Path) -> None:
        trainer, train, test = run
        count = vf.evaluation.active_units(trainer.model, test).count
        assert f"{count} of 3" in page(tmp_path / "r.html", trainer, train, test).texts

    def test_settings_data_machine_and_commands_are_listed(self, run, tmp_path: Path) -> None:
        trainer, train, test = run
        found = page(
            tmp_path / "r.html",
            trainer,
            train,
            test,
            reproduce="vae-fast train 'my file.npy'",
            resume="vae-fast train --resume run",
            notes=["A remark."],
        )
        assert ["batch size", "10"] in found.cells and ["latent dim", "3"] in found.cells
        assert [
            "torch",
            f"{torch.__version__} (built with {vf.build_info()['torch_built_with']})",
        ] in found.cells
        note = datasets.prepare(train, likelihood="bernoulli", name="train").note
        for text in (note, "A remark.", "vae-fast train 'my file.npy'", "vae-fast train --resume run"):
            assert text in found.texts


class TestSelfContained:
    def test_nothing_is_loaded_from_anywhere(self, run, tmp_path: Path) -> None:
        found = page(tmp_path / "r.html", *run)
        tags = {tag for tag, _ in found.tags}
        assert not tags & {"script", "link", "iframe", "object", "embed", "base"}
        for _, attributes in found.tags:
            for name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                value = attributes.get(name)
                assert value is None or value.startswith(("#", "data:image/png;base64,")), value
        assert "@import" not in found.source
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", found.source))
        assert os.listdir(tmp_path) == ["r.html"]

    def test_curves_take_the_colours_of_the_page_light_or_dark(self, run, tmp_path: Path) -> None:
        source = page(tmp_path / "r.html", *run).source
        drawings = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
        assert "var(--test)" in drawings and "var(--train)" in drawings and "var(--ink)" in drawings
        for colour in (plots.TEST, plots.TRAIN, plots.INK, plots.QUIET):
            assert colour not in drawings
        assert "prefers-color-scheme: dark" in source

    def test_text_from_outside_stays_text(self, run, tmp_path: Path) -> None:
        evil = "<script>alert('&amp;')</script>"
        found = page(
            tmp_path / "r.html",
            *run,
            name=evil,
            notes=[evil],
            reproduce=evil,
            resume=f'"{evil}',
            image_shape=None,
        )
        assert not any(tag == "script" for tag, _ in found.tags)
        assert found.text.count(evil) == 5  # title, headline, note and the two commands


class TestPictures:
    def test_images_are_shown_as_images(self, run, tmp_path: Path) -> None:
        found = page(tmp_path / "r.html", *run)
        assert "Data, and below each its reconstruction" in found.headings
        assert "100 samples from the prior" in found.headings
        assert any(heading.startswith("Most active latents") for heading in found.headings)
        assert "Noisy, denoised, clean" in found.headings
        assert "Posterior means on the two most active latents" in found.headings
        assert sum(tag == "image" for tag, _ in found.tags) == 5

    def test_denoising_says_the_error_before_and_after(self, run, tmp_path: Path) -> None:
        trainer, _, test = run
        found = page(tmp_path / "r.html", *run)
        x = test / 255
        noisy = vf.uses.corrupt(x, 0.3)
        after = vf.uses.denoise(trainer.model, noisy, 0.3)
        errors = [f"{float((part - x).square().mean()):.4f}" for part in (noisy, after)]
        assert f"{errors[0]} noisy, {errors[1]} denoised" in found.text

    def test_they_are_of_the_test_data(self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        taken: list[torch.Tensor] = []
        draw = plots.reconstructions
        monkeypatch.setattr(
            plots, "reconstructions", lambda x, xhat, **options: taken.append(x) or draw(x, xhat, **options)
        )
        report.write_report(tmp_path / "r.html", *run)
        assert torch.equal(taken[0], run[2] * (1 / 255))

    def test_data_that_are_no_images_are_a_heat_map_and_it_is_said(self, tmp_path: Path) -> None:
        data = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
        trainer = trained(data[:30], data[30:], likelihood="gaussian")
        found = page(tmp_path / "r.html", trainer, data[:30], data[30:])
        assert "Data, reconstructions and samples" in found.headings
        assert "No pictures: 12 values are no square image" in found.text

    def test_squares_that_are_no_images_can_be_said_to_be_none(self, run, tmp_path: Path) -> None:
        found = page(tmp_path / "r.html", *run, image_shape=None)
        assert "No pictures: the data are said to be no images" in found.text

    def test_a_shape_may_be_given(self, tmp_path: Path) -> None:
        data = images(20, 6)
        assert "2 × 3" in page(tmp_path / "r.html", trained(data, None), data, image_shape=(2, 3)).text
        with pytest.raises(ValueError, match="image_shape"):
            report.write_report(tmp_path / "s.html", trained(data, None), data, image_shape=(4, 3))
        assert not (tmp_path / "s.html").exists()

    def test_data_that_are_gone_leave_curves_and_settings(self, run, tmp_path: Path) -> None:
        found = page(tmp_path / "r.html", run[0])
        assert found.headings == ["Training curves", "Data", "Settings", "Made with"]

    def test_modules_of_the_users_own_are_reported_too(self, tmp_path: Path) -> None:
        class Encoder(torch.nn.Linear):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return super().forward(x).chunk(2, dim=-1)

        model = vf.VAE(encoder=Encoder(64, 4), decoder=torch.nn.Linear(2, 64))
        trainer = vf.Trainer(model, optimizer="adam", lr=1e-3, batch_size=10)
        trainer.fit(images(30), max_samples=30, progress=False)
        found = page(tmp_path / "r.html", trainer, images(30))
        assert (
            "Own encoder and decoder" in found.text
            and "Data, and below each its reconstruction" in found.headings
        )


class TestPaper:
    @pytest.fixture
    def paper_run(self) -> tuple[vf.Trainer, torch.Tensor, torch.Tensor]:
        """The paper's model, as if it had been trained for a million samples."""
        data = images(20, 784)
        trainer = vf.Trainer(vf.VAE(784, [500], 20, seed=0))
        row = HistoryRow(1_000_000, 10_000, 50.0, -122.5, -97.5, 25.0, -121.0, -96.0, 25.0)
        trainer.history = History([row])
        return trainer, data[:10], data[10:]

    def test_ours_stands_beside_the_papers_value_at_equal_samples(self, paper_run, tmp_path: Path) -> None:
        found = page(tmp_path / "r.html", *paper_run, name="MNIST")
        theirs = plots.paper_curve(20).at(1_000_000)
        assert ["1,000,000", "−121.00", shown(theirs), f"+{-121.0 - theirs:.2f}"] in found.cells
        assert f"{-121.0 - theirs:.2f} nats better here" in found.text
        assert "at 100,000,000 samples, 100 times as many" in found.text
        assert "pixels over 255 (theirs: 256)" in found.text

    def test_a_short_run_is_not_compared(self, paper_run, tmp_path: Path) -> None:
        trainer, train, test = paper_run
        short = vf.Trainer(trainer.model)
        short.history = History([HistoryRow(1000, 10, 0.1, -540.0, -540.0, 0.0, -540.0, -540.0, 0.0)])
        found = page(tmp_path / "r.html", short, train, test, name="MNIST")
        assert "nothing to compare at equal samples" in found.text
        assert "nats better" not in found.text

    @pytest.mark.parametrize("why", ["other data", "binary pixels", "another width"])
    def test_other_work_is_not_set_beside_it(self, paper_run, tmp_path: Path, why: str) -> None:
        trainer, train, test = paper_run
        name = "MNIST"
        if why == "other data":
            name = "faces"
        if why == "binary pixels":
            train, test = train.gt(127), test.gt(127)
        if why == "another width":
            history, trainer = trainer.history, vf.Trainer(vf.VAE(784, [400], 20, seed=0))
            trainer.history = history
        found = page(tmp_path / "r.html", trainer, train, test, name=name)
        assert "Beside the paper" not in found.headings and "figure 2" not in found.text


class TestWriting:
    def test_a_write_that_fails_leaves_the_previous_report_whole(
        self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "r.html"
        path.write_text("before")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            report.write_report(path, run[0])
        assert path.read_text() == "before" and os.listdir(tmp_path) == ["r.html"]

    def test_before_training_there_is_nothing_to_report(self, tmp_path: Path) -> None:
        with pytest.raises(IndexError, match="history"):
            report.write_report(tmp_path / "r.html", vf.Trainer(vf.VAE(64, [8], 2)))
        assert os.listdir(tmp_path) == []
