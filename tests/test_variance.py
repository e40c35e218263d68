"""The variance experiment: what it measures is the estimators' own gradient, and a bias would be seen."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_estimators import LinearGaussian
from torch import Tensor

from vae_fast import VAE, datasets, functional
from vae_fast.estimators import ESTIMATORS, EVALUATE, Estimate, initial_state, step_seed
from vae_fast.experiments import variance
from vae_fast.experiments.variance import _EncoderGradient, _moments


@pytest.fixture
def x() -> Tensor:
    return torch.rand(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def model() -> VAE:
    return VAE(12, [8], 3, init="torch", seed=0).double()


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if not initial_state(name)])
def test_a_draw_is_the_gradient_of_the_estimator(model: VAE, x: Tensor, name: str) -> None:
    (got,) = _EncoderGradient(model, x).draws(name, 2, 1, seed=3)
    objective = ESTIMATORS[name](model, x, step_seed(3, 0, EVALUATE), 2, 1.0, functional).objective.mean()
    wanted = torch.autograd.grad(objective, list(model.encoder.parameters()))
    torch.testing.assert_close(got[0], torch.cat([g.flatten() for g in wanted]))


def test_every_draw_has_noise_of_its_own(model: VAE, x: Tensor) -> None:
    draws = torch.cat(list(_EncoderGradient(model, x).draws("sgvb_b", 1, 25, seed=0)))
    assert len(draws) == 25
    assert len(draws.unique(dim=0)) == 25


def test_moments_are_those_of_all_draws_together() -> None:
    draws = 5 + torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    origin = torch.full((4,), 5.0)
    mean, spread = _moments(iter(draws.split(7)), origin)
    torch.testing.assert_close(mean, (draws.double() - 5).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(spread, draws.double().var(0), rtol=1e-5, atol=0)


def exact_and_rows(**how: Any) -> tuple[Tensor, Tensor, list[variance.Row]]:
    """The exact gradient as it is estimated and in closed form, and the rows of all estimators."""
    model = LinearGaussian()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimated = _EncoderGradient(model, x).exact(4000, seed=0)
    closed = torch.autograd.grad(model.exact_bound(x, 1.0).mean(), list(model.encoder.parameters()))
    rows = variance.measure(model, x, draws=400, samples=(1, 4), exact_samples=4000, **how)
    return estimated, torch.cat([g.flatten() for g in closed]), rows


def test_no_estimator_is_biased_and_the_score_function_has_the_largest_variance() -> None:
    estimated, closed, rows = exact_and_rows()
    torch.testing.assert_close(estimated, closed, rtol=0.05, atol=0.02)
    assert all(row.bias < 2.5 for row in rows)
    found = {(row.estimator, row.num_samples): row for row in rows}
    # One sample cannot be left out, and the importance-weighted bound is another objective.
    assert len(found) == 2 * (len(ESTIMATORS) - 1) - 1
    assert found["sgvb_b", 1].ratio_50 == 1
    assert found["sgvb_b", 4].variance == pytest.approx(found["sgvb_b", 1].variance / 4, rel=0.3)
    assert found["score_function", 4].ratio_50 > 10
    for name in ("score_function_running", "score_function_leave_one_out"):
        assert found[name, 4].variance < 0.7 * found["score_function", 4].variance


def test_a_biased_estimator_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(*args: Any) -> Estimate:
        estimate = ESTIMATORS["sgvb_b"](*args)
        return estimate._replace(objective=estimate.objective - 0.5 * estimate.kl)

    monkeypatch.setitem(ESTIMATORS, "sgvb_a", biased)  # type: ignore[arg-type]
    rows = exact_and_rows(estimators=("sgvb_b", "sgvb_a"))[2]
    assert [row.bias < 2.5 for row in rows] == [True, False, True, False]


def test_a_run_leaves_table_settings_and_picture(tmp_path: Path) -> None:
    train = datasets.mnist()[0][:100]
    how: dict[str, Any] = {
        "train": train,
        "steps": 3,
        "samples": (1, 2),
        "latent_dim": 2,
        "progress": False,
    }
    result = variance.run(tmp_path, **how, draws=20, scale=0.2, exact_samples=20)
    with (tmp_path / "variance.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["estimator"], int(line["num_samples"])) for line in lines] == [
        (row.estimator, row.num_samples) for row in result.rows
    ]
    assert float(lines[1]["ratio_50"]) == result.row("sgvb_a").ratio_50
    settings = json.loads((tmp_path / "variance.json").read_text())
    assert (settings["draws"], settings["steps"], settings["exact_samples"]) == (4, 3, 20)
    assert (tmp_path / "variance.md").read_text().count("\n") == 2 + len(result.rows)
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_draws_for_a_variance_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draws, scale: got 1 draws in all, wanted 2 or more"):
        variance.run(tmp_path, draws=100, scale=0.01)
