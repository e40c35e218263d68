"""Figures of the paper: curves that go on where they stopped, verdicts on them, and what is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from vae_fast import MonteCarloEM, datasets, presets
from vae_fast.cli import main
from vae_fast.experiments import curves, figure2, figure3, figure4, figure5, page, pixels, table1
from vae_fast.experiments.curves import Curve, CurveError, Point
from vae_fast.trainer import Trainer

STOPS = [10_000, 12_600, 15_800]


@pytest.fixture(scope="module")
def data() -> curves.Data:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 784), dtype=np.uint8)
    prepared = [
        datasets.prepare(part, likelihood="bernoulli", targets="real", pixel_scale=256, name="mnist")
        for part in (pixels[:200], pixels[200:])
    ]
    return {"mnist": (prepared[0], prepared[1])}


def tiny(panel: str = "mnist-3", algorithm: str = "aevb") -> Curve:
    latent = int(panel.split("-")[1])
    return Curve(panel, algorithm, presets.paper_mnist(latent, hidden_dim=4), "mnist")


def advance(out: Path, data: curves.Data, *wanted: Curve, **how: Any) -> dict[tuple[str, str], list[Point]]:
    how = {"samples": STOPS[-1], "progress": False, **how}
    return curves.advance(wanted or [tiny()], out, data, figure2.bounds, **how)


# --- curves -------------------------------------------------------------------------------------------------


def test_points_are_tenths_of_a_decade_in_whole_minibatches() -> None:
    assert curves.points_to(15_848) == STOPS
    assert curves.points_to(10**8)[-1] == 10**8
    assert len(curves.points_to(10**7, first=10**6)) == 11
    with pytest.raises(CurveError, match="got 9,000 samples, wanted 10,000 or more"):
        curves.points_to(9000)


def test_a_curve_that_was_killed_goes_on_bit_for_bit(
    data: curves.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "SAVE_EVERY", 1500)
    whole = advance(tmp_path / "whole", data)

    def killed(trainer: Trainer, *rest: Any) -> tuple[float, float]:
        if trainer.samples_seen == STOPS[1]:
            raise KeyboardInterrupt
        return figure2.bounds(trainer, *rest)

    with pytest.raises(KeyboardInterrupt):
        curves.advance([tiny()], tmp_path / "cut", data, killed, samples=STOPS[-1], progress=False)
    assert advance(tmp_path / "cut", data, draw_only=True)["mnist-3", "aevb"] == whole["mnist-3", "aevb"][:1]
    again = advance(tmp_path / "cut", data)
    assert again["mnist-3", "aevb"] == whole["mnist-3", "aevb"]
    one, two = (curves.model(tiny(), tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_curves_side_by_side_are_those_of_their_own_training_killed_between_two_of_them_too(
    data: curves.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [tiny("mnist-3"), tiny("mnist-5")]
    alone = advance(tmp_path / "alone", data, *wanted)
    monkeypatch.setattr(curves, "_side_by_side", lambda jobs, device, engine: [jobs] if jobs else [])
    assert advance(tmp_path / "together", data, *wanted) == alone
    saved, save = [], Trainer.save

    def killed(trainer: Trainer, path: Path) -> None:
        saved.append(path)
        if len(saved) == 4:  # the first curve is a point ahead
            raise KeyboardInterrupt
        save(trainer, path)

    monkeypatch.setattr(Trainer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        advance(tmp_path / "cut", data, *wanted)
    monkeypatch.setattr(Trainer, "save", save)
    assert advance(tmp_path / "cut", data, *wanted) == alone
    for curve in wanted:
        models = [curves.model(curve, tmp_path / name) for name in ("alone", "together", "cut")]
        for other in models[1:]:
            assert all(map(torch.equal, models[0].parameters(), other.parameters()))


def test_on_a_gpu_the_native_engine_trains_models_that_differ_in_their_latents_at_once(
    data: curves.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def grouped(jobs: Any, device: str, engine: str) -> list[Any]:
        asked.append((device, engine))
        return []

    real = curves._side_by_side
    monkeypatch.setattr(curves, "_side_by_side", grouped)
    advance(tmp_path, data, device="cuda:0", engine="native")
    assert asked == [("cuda:0", "native")]
    train, test = data["mnist"]
    jobs = [
        curves._Job(tiny(panel, algorithm), tmp_path, train, test, [], STOPS)
        for panel, algorithm in (("mnist-3", "aevb"), ("mnist-3", "wake-sleep"), ("mnist-5", "aevb"))
    ]
    assert real(jobs, "cuda:0", "native") == [[jobs[0], jobs[2]], [jobs[1]]]
    assert real(jobs, "cuda:0", "auto") == real(jobs, "cpu", "native") == [[job] for job in jobs]


def test_a_finished_curve_is_not_trained_again_and_more_samples_go_on_with_it(
    data: curves.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = advance(tmp_path, data, samples=STOPS[0])
    longer = advance(tmp_path, data)
    assert longer["mnist-3", "aevb"][:1] == short["mnist-3", "aevb"]
    monkeypatch.setattr(Trainer, "fit", None)
    assert advance(tmp_path, data) == longer


def test_the_train_column_is_the_mean_online_bound_since_the_point_before(
    data: curves.Data, tmp_path: Path
) -> None:
    points = advance(tmp_path, data)["mnist-3", "aevb"]
    preset = tiny().preset
    trainer = preset.trainer(seed=0)
    trainer.fit(data["mnist"][0], max_samples=STOPS[1], report_every=100, progress=False)
    steps = [row.train_bound for row in trainer.history if row.samples > STOPS[0]]
    assert points[1].train == pytest.approx(sum(steps) / len(steps), rel=1e-6)


def test_monte_carlo_em_takes_all_datapoints_in_a_step_and_counts_its_passes(
    data: curves.Data, tmp_path: Path
) -> None:
    """200 rows of 15 passes each: points where whole steps of 3000 samples are near."""
    preset = presets.paper_mnist(3, hidden_dim=4).but(batch_size=200, order="shuffle")
    curve = Curve("n-200", "mcem", preset, "mnist", passes=15)
    wanted = {12_600: 4, 15_800: None, 20_000: 7, 25_100: 8}
    for samples, steps in wanted.items():
        assert curve.has_point(samples) == (steps is not None)
        assert steps is None or curve.datapoints(samples) == 200 * steps
    found = advance(tmp_path, data, curve)["n-200", "mcem"]
    assert [p.samples for p in found] == [12_600]
    more = advance(tmp_path, data, curve, samples=26_000)["n-200", "mcem"]
    assert [p.samples for p in more] == [12_600, 20_000, 25_100] and more[:1] == found
    trained = curves.model(curve, tmp_path)
    trainer = MonteCarloEM(preset.model(seed=0), **preset.trainer_options, seed=0)
    trainer.fit(data["mnist"][0], max_samples=8 * 200, progress=False)
    for ours, theirs in zip(trained.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_figures_models_are_the_papers() -> None:
    of_panel = {
        "mnist-3": ("tanh", ("lecun", "paper")),
        "frey-2": ("softplus", ("paper", "paper")),
    }
    for panel, (activation, inits) in of_panel.items():
        for algorithm, scale, init in zip(figure2.ALGORITHMS, (1, 0.1), inits, strict=True):
            preset = figure2.curve(panel, algorithm).preset
            model = preset.model()
            assert model.encoder.logvar_scale == scale
            assert (model.config["init"], model.config["activation"]) == (init, activation)
            assert preset.trainer_options["batch_size"] == 100
    for panel, rows in figure3.PANELS.items():
        for algorithm in figure3.ALGORITHMS:
            curve = figure3.curve(panel, algorithm)
            options = curve.preset.trainer_options
            assert (curve.rows, options["lr"]) == (rows, 0.1)
            everything = algorithm == "mcem"
            assert (options["batch_size"], curve.passes) == ((rows, 15) if everything else (100, 1))
            scale = curve.preset.model().encoder.logvar_scale
            assert scale == (0.1 if algorithm == "wake-sleep" else 1)
    # 195,000, 405,000 and 27,750,000 samples are points of the paper's drawing
    mcem, large = (figure3.curve(panel, "mcem") for panel in figure3.PANELS)
    assert [mcem.datapoints(n) // 1000 for n in (195_000, 405_000)] == [13, 27]
    assert large.datapoints(27_750_000) == 37 * 50_000


def test_the_folder_of_another_curve_is_refused(data: curves.Data, tmp_path: Path) -> None:
    advance(tmp_path, data, samples=STOPS[0])
    with pytest.raises(CurveError, match="found a curve with seed 0, wanted 1; choose another --out"):
        advance(tmp_path, data, seed=1)


def test_drawing_alone_trains_and_writes_nothing(data: curves.Data, tmp_path: Path) -> None:
    with pytest.raises(CurveError, match="found none of the curves"):
        advance(tmp_path, data, draw_only=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_short_is_named() -> None:
    points = {("a", "aevb"): [Point(10**6, 0, 0)], ("b", "aevb"): [], ("c", "mcem"): [Point(10**7, 0, 0)]}
    assert curves.unfinished(points, 10**7) == [
        "Trained for fewer than 10,000,000 samples: a aevb (1,000,000), b aevb (0)."
    ]
    assert curves.unfinished({("c", "mcem"): points["c", "mcem"]}, 10**7) == []


# --- verdicts -----------------------------------------------------------------------------------------------


def panel(figure: str, key: str) -> page.Panel:
    rows = figure2.arranged(figure2.PANELS) if figure == "figure2" else []
    found = [p for row in rows for p in row if p.key == key]
    return found[0] if found else page.Panel(key, "N = 1,000", "Ntrain=1000")


def shifted(figure: str, key: str, algorithm: str, by: float, end: int = 10**7) -> list[Point]:
    """The paper's own curve, moved up."""

    def at(part: str, samples: int) -> float:
        drawn = page.paper(figure, panel(figure, key), algorithm, part)
        assert drawn is not None
        value = drawn.at(samples)
        return (-200.0 if value is None else value) + by

    return [Point(n, at("train", n), at("test", n)) for n in curves.points_to(end, first=10**6)]


def states(verdicts: list[page.Verdict], words: str) -> list[bool | None]:
    return [verdict.holds for verdict in verdicts if words in verdict.bar]


@pytest.mark.parametrize(
    ("by", "end", "holds"), [(-0.9, 10**7, True), (-1.1, 10**7, False), (0.5, 10**6, None)]
)
@pytest.mark.parametrize("key", ["mnist-20", "frey-2"])
def test_aevb_is_to_be_no_more_than_a_nat_below_the_paper(
    key: str, by: float, end: int, holds: bool | None
) -> None:
    points = {
        (key, "aevb"): shifted("figure2", key, "aevb", by, end),
        (key, "wake-sleep"): [],
    }
    assert states(figure2.verdicts(points), "paper − 1") == [holds]


@pytest.mark.parametrize(
    ("by", "end", "holds"), [(-1.9, 10**8, True), (-2.1, 10**8, False), (-9.0, 10**7, None)]
)
@pytest.mark.parametrize("key", ["mnist-5", "frey-10"])
def test_wake_sleep_is_to_be_no_more_than_two_nats_below_the_paper_at_the_end(
    key: str, by: float, end: int, holds: bool | None
) -> None:
    points = {
        (key, "aevb"): [],
        (key, "wake-sleep"): shifted("figure2", key, "wake-sleep", by, end),
    }
    assert states(figure2.verdicts(points), "paper − 2 ") == [holds]


@pytest.mark.parametrize(("by", "holds"), [(0.0, True), (10.0, False)])
def test_aevb_is_to_be_above_wake_sleep(by: float, holds: bool) -> None:
    points = {
        ("mnist-20", "aevb"): shifted("figure2", "mnist-20", "aevb", 0),
        ("mnist-20", "wake-sleep"): shifted("figure2", "mnist-20", "wake-sleep", by),
    }
    assert states(figure2.verdicts(points), "above wake-sleep") == [holds]
    points["mnist-20", "wake-sleep"] = points["mnist-20", "wake-sleep"][:2]
    # A failure is one at once; that it holds is known at the end of both.
    assert states(figure2.verdicts(points), "above wake-sleep") == [None if holds else False]


@pytest.mark.parametrize(("by", "holds"), [(0.0, True), (-3.0, False)])
def test_200_latents_are_to_be_no_worse_than_20(by: float, holds: bool) -> None:
    points = {
        ("mnist-20", "aevb"): shifted("figure2", "mnist-20", "aevb", 0),
        ("mnist-200", "aevb"): shifted("figure2", "mnist-200", "aevb", by),
    }
    assert states(figure2.verdicts(points), "200 latents ≥ 20 latents") == [holds]


@pytest.mark.parametrize(("by", "plateau", "holds"), [(-19, 581.9, True), (-21, 582.1, False)])
def test_frey_face_is_to_be_near_the_paper_and_wake_sleep_at_its_plateau(
    by: float, plateau: float, holds: bool
) -> None:
    points = {
        ("frey-5", "aevb"): shifted("figure2", "frey-5", "aevb", by),
        ("frey-5", "wake-sleep"): [Point(10**7, plateau, 569.0)],
    }
    found = figure2.verdicts(points)
    assert states(found, "paper − 20") == states(found, "577 ± 5") == [holds]


@pytest.mark.parametrize(("by", "holds"), [(2.9, True), (-3.1, False)])
def test_figure_3_is_to_be_within_three_nats_of_the_paper(by: float, holds: bool) -> None:
    points = {("n-1000", a): shifted("figure3", "n-1000", a, by) for a in figure3.ALGORITHMS}
    found = figure3.verdicts(points)
    assert states(found, "within 3") == 6 * [holds]
    ends = [points["n-1000", a][-1].test for a in ("mcem", "aevb")]
    assert states(found, "Monte Carlo EM test at or above AEVB") == [ends[0] >= ends[1]]


@pytest.mark.parametrize(
    ("up", "apart", "holds"), [(1.9, 0.9, True), (-1.9, -0.9, True), (2.1, 0, False), (0, 1.1, False)]
)
def test_pixels_that_the_paper_may_have_taken(up: float, apart: float, holds: bool) -> None:
    """By the height of the test curve, and by how far the training curve is above it."""
    paper = [page.paper("figure2", page.Panel("", "", pixels.DRAWN), "aevb", part) for part in page.PARTS]
    test, train = (drawn.at(10**7) for drawn in paper if drawn is not None)
    ours = Point(10**7, train + up + apart, test + up)
    key = pixels.curve("dynamic").panel, "aevb"
    assert [verdict.holds for verdict in pixels.verdicts({key: [ours]})] == [None, holds, None]
    young = Point(10**6, ours.train, ours.test)
    assert [verdict.holds for verdict in pixels.verdicts({key: [young]})] == 3 * [None]


def test_static_pixels_are_drawn_once_from_the_images() -> None:
    found, notes = curves.load_data(["mnist", "mnist-dynamic", "mnist-static"], None, None)
    assert notes == [] and [found[name][0].kind for name in found] == ["real", "dynamic", "binary"]
    again = curves.load_data(["mnist-static"], None, None)[0]
    for part in (0, 1):
        images, drawn = found["mnist"][part].values, found["mnist-static"][part].values
        assert torch.equal(again["mnist-static"][part].values, drawn)
        assert torch.equal(found["mnist-dynamic"][part].values, images)
        frequency = torch.stack([drawn[images == value].double().mean() for value in (0, 64, 128, 255)])
        assert ((frequency - torch.tensor([0, 64, 128, 255]) / 256).abs() < 0.02).all()


def test_curves_that_have_not_begun_leave_every_verdict_open() -> None:
    nothing: dict[tuple[str, str], list[Point]] = {
        (key, algorithm): [] for key in figure2.PANELS for algorithm in figure2.ALGORITHMS
    }
    assert {verdict.holds for verdict in figure2.verdicts(nothing)} == {None}
    assert figure3.verdicts({("n-1000", a): [] for a in figure3.ALGORITHMS}) == []


# --- what is written ----------------------------------------------------------------------------------------


@pytest.fixture
def small(data: curves.Data, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Figures of tiny models and data, on the way that the command goes."""
    monkeypatch.setattr(curves, "load_data", lambda names, *_: (data, []))
    monkeypatch.setattr(figure2, "curve", tiny)

    def run(*arguments: object, code: int = 0) -> str:
        how = ["--scale", "0.000126", "--device", "cpu"]
        result = CliRunner().invoke(main, ["reproduce", *map(str, arguments), *how])
        assert result.exit_code == code, result.output
        return str(result.output)

    return run


def test_figure_2_leaves_a_page_a_picture_a_table_and_the_settings(small: Any, tmp_path: Path) -> None:
    output = small("figure2", "--panels", "mnist-3,mnist-5", "--out", tmp_path)
    assert "open" in output and "MNIST, 5 latents: AEVB test ≥ paper − 1" in output
    with (tmp_path / "figure2.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["panel"], line["algorithm"]) for line in lines} == {
        (key, algorithm) for key in ("mnist-3", "mnist-5") for algorithm in figure2.ALGORITHMS
    }
    assert [int(line["samples"]) for line in lines] == 4 * STOPS[:2]
    settings = json.loads((tmp_path / "figure2.json").read_text())
    assert settings["curves"]["mnist-5-wake-sleep"]["samples"] == STOPS[1]
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    assert "figure2 --out" in (tmp_path / "figure2.html").read_text()
    small("figure5", "--draw-only", "--out", tmp_path)  # of the curves that figure 2 has trained
    assert list(json.loads((tmp_path / "figure5.json").read_text())["curves"]) == ["mnist-5-aevb"]


def test_a_figure_may_be_drawn_before_its_curves_are_there(small: Any, tmp_path: Path) -> None:
    assert "found none of the curves" in small("figure2", "--draw-only", "--out", tmp_path, code=2)
    small("figure2", "--panels", "mnist-3", "--out", tmp_path)
    output = small("figure2", "--panels", "mnist-3,mnist-10", "--draw-only", "--out", tmp_path)
    assert "Trained for fewer than 12,600 samples: mnist-10 aevb (0), mnist-10 wake-sleep (0)." in output
    assert not (tmp_path / "curves" / "mnist-10-aevb").exists()
    assert "wanted one of the figures" in small("variance", "--draw-only", "--out", tmp_path, code=2)


def test_pixels_shares_figure_2s_curve_and_trains_the_other_treatments(
    small: Any, data: curves.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data["mnist"][0].values
    more = {
        f"mnist-{treatment}": 2 * (datasets.prepare(values, likelihood="bernoulli", targets=targets),)
        for treatment, targets, values in (
            ("dynamic", "dynamic", images),
            ("static", "binary", (images > 99).to(torch.uint8)),
        )
    }
    monkeypatch.setattr(curves, "load_data", lambda names, *_: ({**data, **more}, []))
    small("figure2", "--panels", "mnist-20", "--out", tmp_path)
    shared = tmp_path / "curves/mnist-20-aevb/checkpoint.safetensors"
    before = shared.stat().st_mtime_ns
    output = small("pixels", "--out", tmp_path)
    assert shared.stat().st_mtime_ns == before
    assert output.count("train − test within 1") == 3
    with (tmp_path / "pixels.csv").open() as file:
        lines = list(csv.DictReader(file))
    first = {line["panel"]: float(line["test"]) for line in lines if line["samples"] == "10000"}
    assert list(first) == ["mnist-20", "mnist-20-dynamic", "mnist-20-static"]
    assert len(set(first.values())) == 3
    assert (tmp_path / "pixels.png").exists() and (tmp_path / "pixels.html").exists()


def test_figures_4_and_5_are_manifolds_and_samples(small: Any, data: curves.Data, tmp_path: Path) -> None:
    small("figure5", "--out", tmp_path)
    assert set(json.loads((tmp_path / "figure5.json").read_text())["curves"]) == {
        f"mnist-{latent}-aevb" for latent in figure5.LATENTS
    }
    assert figure4.GRIDS == {"frey-2": ("Frey Face", 10), "mnist-2": ("MNIST", 20)}
    small("figure4", "--out", tmp_path)
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_panel_is_named(small: Any, tmp_path: Path) -> None:
    assert "panels: got 'mnist-4', wanted some of" in small(
        "figure2", "--panels", "mnist-4", "--out", tmp_path, code=2
    )


# --- table 1 ------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (260, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(datasets, "mnist", lambda folder=None: (images[:200], images[200:]))
    monkeypatch.setattr(table1, "STAGES", 3)


def test_step_sizes_fall_as_passes_grow() -> None:
    found = table1.stages(1.0, 60_000, 20)
    assert found[-1][0] == 3280 * 60_000 and len(found) == 8
    assert [lr for _, lr in found] == pytest.approx([10 ** (-3 - i / 7) for i in range(8)])
    assert table1.stages(1e-9, 60_000, 20)[-1][0] == 8 * 20


@pytest.mark.usefixtures("few")
def test_a_table_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"scale": 0.5, "panels": ["iwae-5", "vae-1"], "progress": False}
    whole = table1.run(tmp_path / "whole", **how)
    assert [row.name for row in whole.rows] == ["vae-1", "iwae-5"]
    assert {row.samples for row in whole.rows} == {100 + 300 + 900}
    fit, calls = Trainer.fit, []

    def stops(trainer: Trainer, *args: Any, **options: Any) -> Any:
        calls.append(trainer.optimizer.param_groups[0]["lr"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(trainer, *args, **options)

    monkeypatch.setattr(Trainer, "fit", stops)
    with pytest.raises(KeyboardInterrupt):
        table1.run(tmp_path / "stopped", **how)
    assert calls == pytest.approx([10 ** (-3 - i / 7) for i in range(3)])
    again = table1.run(tmp_path / "stopped", **how)
    assert [(row.nll, row.active_units) for row in again.rows] == [
        (row.nll, row.active_units) for row in whole.rows
    ]
    assert (tmp_path / "stopped" / "table1.md").read_text() == whole.table()
    with pytest.raises(CurveError, match=r"found a row of .*wanted .*choose another --out"):
        table1.run(tmp_path / "stopped", **{**how, "scale": 0.25})


@pytest.mark.usefixtures("few")
def test_the_table_by_the_command_line(tmp_path: Path) -> None:
    command = ["reproduce", "table1", "--out", str(tmp_path), "--scale", "0.1", "--panels", "vae-1"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and "| VAE | 1 |" in done.output and "86.76" in done.output
    content = json.loads((tmp_path / "table1.json").read_text())
    assert content["settings"]["adam"]["eps"] == 1e-4
    wrong = CliRunner().invoke(main, [*command[:-1], "vae-2"])
    assert wrong.exit_code != 0 and "panels: got 'vae-2'" in wrong.output


@pytest.mark.usefixtures("few")
def test_the_table_begins_at_the_mean_of_the_data_with_adams_own_options(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(trainer: Trainer, *_: Any, **__: Any) -> Any:
        bias = trainer.model.decoder.logits.bias.detach().clone()
        seen.append((bias, dict(trainer.optimizer.param_groups[0])))
        trainer.samples_seen = 10**9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", look)
        table1.run(tmp_path, scale=0.1, panels=["vae-1"], progress=False)
    bias, options = seen[0]
    mean = torch.as_tensor(datasets.mnist()[0]).double().reshape(200, 784).mean(0) / 255
    torch.testing.assert_close(torch.sigmoid(bias).double(), mean, rtol=1e-4, atol=1e-6)
    assert (options["betas"], options["eps"], options["lr"]) == ((0.99, 0.999), 1e-4, 1e-3)
