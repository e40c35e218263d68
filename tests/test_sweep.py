"""Many models at once: each is trained as by its own fit, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vae_fast as vf


def data(count: int = 230) -> Tensor:
    x = torch.rand(count, 20, generator=torch.Generator().manual_seed(0))
    return (x * 255).to(torch.uint8)


def trainers() -> list[vf.Trainer]:
    """Of several seeds, step sizes, weights, sizes, and one that the native engine does not take."""
    settings: list[dict[str, Any]] = [
        {"lr": 0.01},
        {"lr": 0.02, "seed": 1},
        {"lr": 0.02, "beta": 4.0},
        {"optimizer": "adam", "lr": 1e-3, "batch_size": 7},
        {"estimator": "score_function"},
    ]
    models = [vf.VAE(20, [12], latent, seed=i) for i, latent in enumerate((2, 3, 5, 2, 2))]
    return [
        vf.Trainer(model, **{"batch_size": 20, **how}) for model, how in zip(models, settings, strict=True)
    ]


def test_each_model_is_that_of_its_own_fit() -> None:
    together, alone = trainers(), trainers()
    histories = vf.sweep(together, data(), data(50), max_samples=700, report_every=300, progress=False)
    for ours, theirs, history in zip(together, alone, histories, strict=True):
        wanted = theirs.fit(data(), data(50), max_samples=700, report_every=300, progress=False)
        assert ours.samples_seen == theirs.samples_seen
        columns = [column for column in history.columns if column != "seconds"]
        assert [history.to_dict()[c] for c in columns] == [wanted.to_dict()[c] for c in columns]
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(a, b)
    assert [trainer.engine_name for trainer in together] == ["native"] * 4 + ["modules"]


def test_it_goes_on_where_it_stopped() -> None:
    twice, once = trainers()[:2], trainers()[:2]
    vf.sweep(twice, data(), max_samples=300, progress=False)
    vf.sweep(twice, data(), max_samples=400, progress=False)
    vf.sweep(once, data(), max_samples=700, progress=False)
    for ours, theirs in zip(twice, once, strict=True):
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_what_cannot_be_is_refused() -> None:
    (one, *_) = trainers()
    with pytest.raises(ValueError, match="trainers: got none"):
        vf.sweep([], data(), max_samples=10)
    with pytest.raises(ValueError, match="got the same trainer twice"):
        vf.sweep([one, one], data(), max_samples=10)
    with pytest.raises(ValueError, match="got the same model twice"):
        vf.sweep([one, vf.Trainer(one.model)], data(), max_samples=10)
    with pytest.raises(TypeError, match="train: got a stream"):
        vf.sweep([one], iter([data()]), max_samples=10)
