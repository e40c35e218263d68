"""The presets are the paper's models and settings, as far as these are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vae_fast as vf
from vae_fast.optim import Adagrad

FREY = Path(__file__).resolve().parents[1] / "../shared/data/frey/freyface_1965x28x20_uint8.npz"
PAPER = {
    "optimizer": "adagrad",
    "lr": 0.02,
    "batch_size": 100,
    "estimator": "sgvb_b",
    "num_samples": 1,
    "beta": 1.0,
    "weight_prior": True,
    "order": "replacement",
    "pixel_scale": 256,
}


def widths(module: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


def test_the_papers_mnist_model() -> None:
    model = vf.presets.paper_mnist(20).model()
    assert widths(model.encoder) == [(784, 500), (500, 20), (500, 20)]
    assert widths(model.decoder) == [(20, 500), (500, 784)]
    assert model.likelihood == "bernoulli"
    assert sum(isinstance(m, nn.Tanh) for m in model.modules()) == 2


def test_the_papers_frey_face_model() -> None:
    """One layer each for the mean, through a sigmoid, and the log-variance, which is linear (equation 12)."""
    model = vf.presets.paper_frey(2).model()
    assert widths(model.encoder) == [(560, 200), (200, 2), (200, 2)]
    assert widths(model.decoder) == [(2, 200), (200, 560), (200, 560)]
    assert model.likelihood == "gaussian"
    with torch.no_grad():
        for head in (model.decoder.mean, model.decoder.logvar):
            head.weight.mul_(1e4)
        mean, logvar = model.decoder(torch.randn(50, 2))
    assert 0 <= mean.min() < 0.1 and 0.9 < mean.max() <= 1
    assert logvar.min() < -10 and logvar.max() > 10


@pytest.mark.parametrize("preset", [vf.presets.paper_mnist(3), vf.presets.paper_frey(2)])
def test_the_papers_initial_values(preset: vf.presets.Preset) -> None:
    """Zero for the encoder's log-variance layer and the output biases, N(0, 0.01**2) for all else."""
    model = preset.model(seed=1)
    for name, p in model.named_parameters():
        zero = name.startswith("encoder.logvar") or (name.endswith("bias") and ".hidden." not in name)
        assert p.std().item() == pytest.approx(0.0 if zero else 0.01, rel=0.2), name
    same, other = preset.model(seed=1), preset.model(seed=2)
    assert torch.equal(same.encoder.mu.weight, model.encoder.mu.weight)
    assert not torch.equal(other.encoder.mu.weight, model.encoder.mu.weight)


@pytest.mark.parametrize("preset", [vf.presets.paper_mnist, vf.presets.paper_frey])
def test_wake_sleep_has_a_tenth_of_the_logvar_and_nothing_else(
    preset: Callable[..., vf.presets.Preset],
) -> None:
    plain, wake_sleep = preset(2), preset(2, wake_sleep=True)
    assert wake_sleep == plain.but({"logvar_scale": 0.1})
    assert wake_sleep.model().encoder.logvar_scale == 0.1
    assert plain.model().encoder.logvar_scale == 1


@pytest.mark.parametrize("preset", [vf.presets.paper_mnist(3), vf.presets.paper_frey(2)])
def test_the_papers_settings(preset: vf.presets.Preset) -> None:
    settings = vars(preset.trainer(seed=5).settings)
    assert {name: settings[name] for name in PAPER} == PAPER
    assert settings["seed"] == 5


def test_the_first_100_steps_of_adagrad_only_accumulate() -> None:
    trainer = vf.presets.paper_mnist(2, hidden_dim=8).trainer()
    assert isinstance(trainer.optimizer, Adagrad)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    images = vf.datasets.mnist()[0][:500]

    def moved() -> list[bool]:
        return [not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True)]

    trainer.fit(images, max_samples=100 * 100, progress=False)
    assert not any(moved())
    trainer.fit(images, max_samples=100, progress=False)
    assert all(moved())


def test_anything_can_be_changed() -> None:
    how: dict[str, Any] = {"seed": 1, "lr": 0.1, "engine": "reference"}
    trainer = vf.presets.paper_mnist(2, hidden_dim=8).trainer(**how, dtype=torch.float64)
    assert (trainer.settings.lr, trainer.engine) == (0.1, "reference")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float64}
    other = vf.presets.paper_mnist(2, hidden_dim=8).but({"init": "lecun"}, lr=0.1)
    assert other.trainer().settings.lr == 0.1
    assert other.model().config["init"] == "lecun"
    assert vf.presets.paper_mnist(2).trainer().settings.lr == 0.02  # that of the next is as it was


@pytest.mark.skipif(not FREY.exists(), reason=f"needs {FREY.name}, which is not bundled")
def test_frey_face_is_learned() -> None:
    """From -526 nats, the standard normal's, within 50 steps after the 100 that only accumulate."""
    train, test = vf.datasets.frey(FREY)
    history = (
        vf.presets.paper_frey(2)
        .trainer()
        .fit(train, test, max_samples=15_000, report_every=10_000, progress=False)
    )
    before, after = (row.test_bound for row in history)
    assert before == pytest.approx(-526, abs=1)
    assert after is not None and after > 300
