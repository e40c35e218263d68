"""Many models at once: each is trained as by its own fit, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_native import StandIn
from torch import Tensor

import vae_fast as vf
from vae_fast import _C, checkpoint, native


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


def test_models_that_share_parameters_are_refused() -> None:
    ours = trainers()[:2]
    ours[1].model.encoder.mu.weight = ours[0].model.encoder.mu.weight
    with pytest.raises(ValueError, match="trainers: got models that share parameters"):
        vf.sweep(ours, data(), max_samples=40, progress=False)


def test_it_goes_on_where_it_stopped() -> None:
    twice, once = trainers()[:2], trainers()[:2]
    vf.sweep(twice, data(), max_samples=300, progress=False)
    vf.sweep(twice, data(), max_samples=400, progress=False)
    vf.sweep(once, data(), max_samples=700, progress=False)
    for ours, theirs in zip(twice, once, strict=True):
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_checkpoints_are_those_of_fit(tmp_path: Path) -> None:
    together, alone = trainers()[:2], trainers()[:2]
    files = [tmp_path / f"together{i}" for i in range(2)]
    vf.sweep(together, data(), max_samples=500, report_every=300, checkpoints=files, progress=False)
    for i, trainer in enumerate(alone):
        trainer.fit(data(), max_samples=500, report_every=300, checkpoint=tmp_path / "own", progress=False)
        one, two = (checkpoint.load(file) for file in (files[i], tmp_path / "own"))
        assert one[0].keys() == two[0].keys()
        assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
        assert one[1]["data"] == two[1]["data"] is not None  # what another set of data is told by
    with pytest.raises(ValueError, match="checkpoints: got 1 files, wanted 2"):
        vf.sweep(trainers()[:2], data(), max_samples=10, checkpoints=files[:1])


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


def test_on_cuda_models_with_other_latents_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def several() -> list[vf.Trainer]:
        return [
            vf.Trainer(vf.VAE(20, [12], latent, seed=latent), seed=latent, batch_size=20)
            for latent in (2, 3, 9)
        ]

    alone, together = several(), several()
    for trainer in alone:
        trainer.fit(data(), max_samples=2000, progress=False)
    monkeypatch.setattr(native, "_is_cuda", lambda device: True)
    monkeypatch.setattr(native, "RUN_FLOPS", 1e6)  # by which models of other latents would take other steps
    monkeypatch.setattr(native, "MOST_STEPS", 30)
    monkeypatch.setattr(_C, "CudaStep", StandIn, raising=False)
    StandIn.made = 0
    vf.sweep(together, data(), max_samples=2000, progress=False)
    assert StandIn.made == 1
    for ours, theirs in zip(together, alone, strict=True):
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_an_error_leaves_every_model_where_its_trainer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainers()[:2]
    before = [p.clone() for trainer in ours for p in trainer.model.parameters()]
    run = native.run_together

    def fails(engines: Any, n_steps: Any) -> Any:
        run(engines, n_steps)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(native, "run_together", fails)
    with pytest.raises(vf.TrainingError, match="2 models side by side do not fit"):
        vf.sweep(ours, data(), max_samples=700, progress=False)
    monkeypatch.undo()
    now = [p for trainer in ours for p in trainer.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    wanted = trainers()[:2]
    for trainers_ in (ours, wanted):
        vf.sweep(trainers_, data(), max_samples=700, progress=False)
    for a, b in zip(ours, wanted, strict=True):
        assert all(map(torch.equal, a.model.parameters(), b.model.parameters()))


def test_one_model_that_fails_does_not_move_the_others_unseen() -> None:
    bad, good = trainers()[:2]
    _, alone = trainers()[:2]
    bad.on_nan = "stop"
    with torch.no_grad():
        next(bad.model.parameters())[0, 0] = torch.nan
    with pytest.raises(vf.TrainingError):
        vf.sweep([bad, good], data(), max_samples=700, progress=False)
    alone.fit(data(), max_samples=700, progress=False)
    assert (bad.samples_seen, good.samples_seen) == (0, alone.samples_seen)
    ours, theirs = good.history.to_dict(), alone.history.to_dict()
    assert len(ours["samples"]) > 0
    assert [ours[c] for c in ours if c != "seconds"] == [theirs[c] for c in theirs if c != "seconds"]
    assert all(map(torch.equal, good.model.parameters(), alone.model.parameters()))
