"""The trainer: what fit promises, what a step that is not finite leads to, and resuming bit for bit."""

from __future__ import annotations

import csv
import gc
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vae_fast import VAE, History, MLPEncoder, Trainer, TrainingError, checkpoint, evaluation, sweep
from vae_fast.batches import MinibatchOrder, StreamSource
from vae_fast.checkpoint import CheckpointError
from vae_fast.datasets import DataError, prepare
from vae_fast.estimators import ESTIMATORS, RUNNING_DECAY, step_seed
from vae_fast.optim import OPTIMIZERS, Adagrad
from vae_fast.trainer import HistoryRow


def data(count: int = 130, dim: int = 12) -> Tensor:
    """Rows near one of three patterns: there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(3, dim, generator=generator).round()
    rows = patterns[torch.randint(3, (count,), generator=generator)]
    return 0.1 + 0.8 * rows + 0.05 * torch.rand(count, dim, generator=generator)


def small_model(seed: int = 0) -> VAE:
    return VAE(data_dim=12, hidden_dims=[8], latent_dim=2, init="torch", seed=seed)


def small_trainer(model: VAE | None = None, **options: Any) -> Trainer:
    how = {"optimizer": "adam", "batch_size": 20, **options}
    if isinstance(how["optimizer"], str):
        how.setdefault("lr", 0.01)
    return Trainer(model or small_model(), **how)


def fit(trainer: Trainer, train: Any = None, *args: Any, **options: Any) -> History:
    how = {"progress": False, "max_samples": 1000, **options}
    return trainer.fit(data() if train is None else train, *args, **how)


def same(a: Trainer, b: Trainer) -> bool:
    """Every bit of parameters, optimizer state and random state, and the history but for seconds."""
    one, two = a.state_dict(), b.state_dict()
    tensors = one["tensors"].keys() == two["tensors"].keys()
    tensors = tensors and all(torch.equal(t, two["tensors"][name]) for name, t in one["tensors"].items())
    return tensors and without_seconds(one["meta"]) == without_seconds(two["meta"])


def without_seconds(meta: dict[str, Any]) -> dict[str, Any]:
    history = {column: values for column, values in meta["history"].items() if column != "seconds"}
    return {**meta, "seconds": None, "history": history}


# --- fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_training_raises_the_bound_of_data_it_has_not_seen(estimator: str, optimizer: str) -> None:
    trainer = small_trainer(estimator=estimator, num_samples=2, optimizer=optimizer, lr=0.02)
    train, test = data(400)[:300], data(400)[300:]
    before = evaluation.bound(trainer.model, test).elbo
    row = fit(trainer, train, test, max_samples=8000, report_every=2000).last
    assert row.test_bound is not None
    assert row.test_bound > before + 1
    assert row.train_bound > before + 1


def test_fit_goes_on_where_it_stopped() -> None:
    once, twice = small_trainer(), small_trainer()
    fit(once, max_samples=1300, report_every=260)
    for _ in range(2):
        fit(twice, max_samples=650, report_every=130 * 5)
    twice.history = once.history
    assert same(once, twice)


def test_samples_are_counted_exactly_and_steps_are_whole() -> None:
    """130 points in batches of 50: minibatches of 50, 50, 30."""
    trainer = small_trainer(batch_size=50)
    fit(trainer, max_samples=101)
    assert (trainer.samples_seen, trainer.step_count) == (130, 3)
    fit(trainer, max_samples=1)
    assert (trainer.samples_seen, trainer.step_count) == (180, 4)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 10), (7, 100), (21, 20), (5, 1)])
def test_any_batch_size_a_last_batch_of_one_and_fewer_points_than_a_batch(
    count: int, batch_size: int
) -> None:
    trainer = small_trainer(batch_size=batch_size)
    history = fit(trainer, data(count), data(count), max_samples=3 * count)
    assert trainer.samples_seen == 3 * count
    assert math.isfinite(history.last.train_bound)


def test_a_row_of_the_history_is_the_mean_over_the_datapoints_since_the_row_before() -> None:
    trainer = Trainer(small_model(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-20), batch_size=50)
    history = fit(trainer, max_samples=260, report_every=130)
    x, order = data(), MinibatchOrder(130, 50, seed=0)
    model = small_model()
    for epoch, row in enumerate(history):
        first = 3 * epoch
        minibatches = [
            x[r[:size]] for r, size in zip(order.rows(first, 3), order.sizes(first, 3), strict=True)
        ]
        terms = [model(batch, seed=step_seed(0, first + i)) for i, batch in enumerate(minibatches)]
        assert row.train_log_likelihood == pytest.approx(
            torch.cat([t.log_likelihood for t in terms]).mean().item()
        )
        assert row.train_kl == pytest.approx(torch.cat([t.kl for t in terms]).mean().item())
        assert row.train_bound == pytest.approx(row.train_log_likelihood - row.train_kl)


def test_the_test_bound_is_that_of_evaluation_at_that_moment() -> None:
    trainer = small_trainer(seed=3)
    row = fit(trainer, data(), data(50)).last
    result = evaluation.bound(trainer.model, data(50), seed=3)
    assert (row.test_bound, row.test_log_likelihood, row.test_kl) == (
        result.elbo,
        result.log_likelihood,
        result.kl,
    )


def test_rows_lie_on_multiples_of_report_every_and_at_the_end() -> None:
    trainer = small_trainer(batch_size=10)
    fit(trainer, max_samples=250, report_every=100)
    fit(trainer, max_samples=200, report_every=100)
    assert [row.samples for row in trainer.history] == [100, 200, 250, 300, 400, 450]


def test_beta_is_not_in_the_reported_bound_but_changes_the_training() -> None:
    one, four = small_trainer(), small_trainer(beta=4.0)
    rows = [fit(trainer, max_samples=5000).last for trainer in (one, four)]
    assert all(row.train_bound == row.train_log_likelihood - row.train_kl for row in rows)
    assert rows[1].train_kl < rows[0].train_kl


@pytest.mark.parametrize("engine", ["native", "modules", "reference"])
def test_out_of_memory_says_what_would_fit_on_a_cpu_too(engine: str) -> None:
    trainer = small_trainer(engine=engine, num_samples=10**12)
    before = [p.clone() for p in trainer.model.parameters()]
    message = "out of memory on cpu: minibatches of 20 .*, 1000000000000 latent samples .*; 10 datapoints"
    with pytest.raises(TrainingError, match=message):
        trainer.fit(data(), max_samples=40, progress=False)
    assert all(map(torch.equal, trainer.model.parameters(), before))


@pytest.mark.parametrize("option", ["num_samples", "weight_prior", "order", "seed", "targets", "estimator"])
def test_every_setting_changes_the_curve(option: str) -> None:
    value = {
        "num_samples": 3,
        "weight_prior": True,
        "order": "replacement",
        "seed": 1,
        "targets": "dynamic",
        "estimator": "sgvb_a",
    }[option]
    assert fit(small_trainer()).last.train_bound != fit(small_trainer(**{option: value})).last.train_bound


def test_the_same_seed_gives_the_same_training_whatever_torchs_generator_is_at() -> None:
    trainers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = VAE(encoder=WithDropout(), decoder=nn.Linear(2, 12))
        before = torch.get_rng_state()
        trainers.append(small_trainer(model))
        fit(trainers[-1])
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*trainers)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh())
        self.mu, self.logvar = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.mu(h), self.logvar(h)


def test_a_frozen_parameter_stays() -> None:
    model = small_model()
    for p in model.decoder.parameters():
        p.requires_grad_(False)
    before = [p.clone() for p in model.decoder.parameters()]
    fit(small_trainer(model))
    assert all(torch.equal(p, q) for p, q in zip(before, model.decoder.parameters(), strict=True))


def test_a_gaussian_decoder_and_a_float64_model_train() -> None:
    model = VAE(
        data_dim=12, hidden_dims=[8], latent_dim=2, likelihood="gaussian", init="torch", seed=0
    ).double()
    history = fit(small_trainer(model), max_samples=5000, report_every=500)
    assert history.last.train_bound > history[0].train_bound + 1


def test_the_engine_and_its_reason_are_told() -> None:
    trainer = small_trainer()
    fit(trainer)
    assert trainer.engine_name == "native"
    assert trainer.engine_reason
    reference = small_trainer(engine="reference")
    fit(reference)
    assert reference.engine_name == "reference"


# --- progress -----------------------------------------------------------------------------------------------


def test_no_bar_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    fit(small_trainer(), progress=True)
    assert capfd.readouterr() == ("", "")


def test_a_bar_that_is_asked_for_shows_engine_data_speed_and_bound(capfd: pytest.CaptureFixture[str]) -> None:
    trainer = small_trainer()
    row = fit(trainer, progress="always").last
    out, err = capfd.readouterr()
    assert out == ""
    for wanted in ("engine native", "130 rows of 12", "samples/s", f"bound {row.train_bound:.2f}"):
        assert wanted in err


# --- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "half"}, "precision: got 'half', wanted one of 'exact', 'fast'"),
        ({"engine": "turbo"}, "engine: got 'turbo', wanted one of 'auto'"),
        ({"estimator": "elbo"}, "estimator: got 'elbo', wanted one of 'sgvb_b'"),
        ({"order": "sorted"}, "order: got 'sorted', wanted one of 'shuffle'"),
        ({"targets": "soft"}, "targets: got 'soft', wanted one of 'auto'"),
        ({"on_nan": "ignore"}, "on_nan: got 'ignore', wanted one of 'stop'"),
        ({"batch_size": 0}, "batch_size: got 0, wanted an integer of 1 or more"),
        ({"num_samples": 0}, "num_samples: got 0, wanted an integer of 1 or more"),
        (
            {"estimator": "score_function_leave_one_out"},
            "num_samples: got 1, wanted an integer of 2 or more for estimator='score_function_leave_one_out'",
        ),
        ({"beta": -1.0}, "beta: got -1.0, wanted a number of 0 or more"),
        ({"optimizer": "lion"}, "optimizer: got 'lion', wanted one of 'sgd'"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_wanted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_trainer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 0}, "max_samples: got 0"),
        ({"report_every": 0}, "report_every: got 0"),
        ({"progress": "sometimes"}, "progress: got 'sometimes'"),
    ],
)
def test_a_bad_argument_of_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(small_trainer(), **options)


def test_a_module_that_is_no_vae_is_refused() -> None:
    with pytest.raises(TypeError, match="model: got Linear, wanted a VAE"):
        Trainer(nn.Linear(3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["train", "test"])
def test_data_of_another_width_are_refused_before_anything_is_trained(where: str) -> None:
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    sets = {"train": data(), "test": data(), where: data(dim=11)}
    with pytest.raises(DataError, match=rf"{where}.*11.*12"):
        fit(small_trainer(model), sets["train"], sets["test"])
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_a_weight_prior_has_no_weight_for_a_stream() -> None:
    with pytest.raises(ValueError, match="weight_prior"):
        fit(small_trainer(weight_prior=True), iter([data()]))


# --- history ------------------------------------------------------------------------------------------------


def test_a_history_comes_back_from_a_dict_and_is_written_as_csv(tmp_path: Path) -> None:
    rows = [
        HistoryRow(100, 1, 0.5, -3.0, -2.0, 1.0),
        HistoryRow(200, 2, 1.0, -2.5, -2.0, 0.5, -2.6, -2.0, 0.6),
    ]
    history = History(rows)
    assert list(History.from_dict(history.to_dict())) == rows
    assert history.last == rows[1]
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["test_bound"] == "" and float(second["test_bound"]) == -2.6
    assert float(first["train_bound"]) == -3.0


def test_an_empty_history_has_no_last_row() -> None:
    with pytest.raises(IndexError, match="call fit first"):
        _ = History().last


# --- streams ------------------------------------------------------------------------------------------------


def as_stream(x: Tensor, first_step: int = 0, batch_size: int = 20) -> Iterator[Tensor]:
    """The minibatches that an array would give, without end."""
    order = MinibatchOrder(len(x), batch_size, seed=0)
    step = first_step
    while True:
        yield x[order.rows(step, 1)[0][: order.sizes(step, 1)[0]]]
        step += 1


def test_a_stream_of_the_same_minibatches_gives_the_same_parameters() -> None:
    array, stream = small_trainer(), small_trainer()
    fit(array)
    fit(stream, as_stream(data()))
    tensors = stream.state_dict()["tensors"]
    assert all(torch.equal(t, tensors[name]) for name, t in array.state_dict()["tensors"].items())
    assert stream.history.last.train_bound == array.history.last.train_bound


def test_fit_takes_no_more_of_a_stream_than_it_trains_on() -> None:
    straight, parts = small_trainer(), small_trainer()
    fit(straight, as_stream(data()), max_samples=1030)
    stream = as_stream(data())
    for _ in range(4):
        fit(parts, stream, max_samples=250)
    assert parts.samples_seen == straight.samples_seen
    tensors = parts.state_dict()["tensors"]
    assert all(torch.equal(t, tensors[name]) for name, t in straight.state_dict()["tensors"].items())


def test_a_loader_is_read_again_as_often_as_it_takes() -> None:
    loader = DataLoader(TensorDataset(data(), torch.arange(130)), batch_size=32, shuffle=True)
    trainers = [small_trainer(), small_trainer()]
    for trainer in trainers:
        torch.manual_seed(random.randrange(2**31))  # the order comes from the trainer's seed, not from here
        fit(trainer, loader, max_samples=400)
    assert trainers[0].samples_seen == 422  # 3 epochs of 130 in batches of 32, and one batch more
    assert same(*trainers)


def test_a_stream_that_ends_early_ends_the_training_with_a_warning() -> None:
    trainer = small_trainer()
    with pytest.warns(UserWarning, match="the stream ended after 130 samples"):
        fit(trainer, iter(data().split(50)))
    assert trainer.history.last.samples == 130


class Drift:
    """Minibatches without end: at first rows of ``data()``, from step 100 to 200 more and more of them
    negatives, then negatives only. Knows how many of its minibatches are still held by anyone.
    """

    def __init__(self) -> None:
        self.step, self.alive, self.most_alive = 0, 0, 0

    def __iter__(self) -> Drift:
        return self

    def __next__(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.step)
        x = data()[torch.randint(130, (20,), generator=generator)]
        share = min(max((self.step - 100) / 100, 0.0), 1.0)
        negative = torch.rand(20, 1, generator=generator) < share
        array = torch.where(negative, 1 - x, x).numpy()
        self.step, self.alive = self.step + 1, self.alive + 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(array, self._forgotten)
        return torch.from_numpy(array)  # whoever keeps the tensor or a part of it keeps the array

    def _forgotten(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("engine", ["reference", "modules"])
def test_training_follows_a_stream_that_drifts(engine: str, optimizer: str) -> None:
    stream, trainer = Drift(), small_trainer(engine=engine, optimizer=optimizer, lr=0.03)
    history = fit(trainer, stream, 1 - data(), max_samples=12_000, report_every=500)
    after = {row.steps: row.test_bound for row in history}  # of the distribution that the stream goes to
    before = max(after[steps] for steps in (25, 50, 75, 100))  # type: ignore[type-var]
    half_way, end = after[150], after[600]
    assert before is not None and half_way is not None and end is not None
    assert before < half_way < end and end > before + 2, (before, half_way, end)


def test_training_on_a_stream_without_end_holds_no_more_of_it_the_longer_it_runs() -> None:
    stream, trainer = Drift(), small_trainer()
    fit(trainer, stream, max_samples=2000)
    held = stream.most_alive
    assert held <= 2 * StreamSource.steps_at_once
    fit(trainer, stream, max_samples=12_000)
    assert stream.step == 700 and stream.most_alive == held
    del trainer
    gc.collect()
    assert stream.alive == 0


# --- what is not finite -------------------------------------------------------------------------------------


class Trap(nn.Module):
    """An encoder that goes wrong at datapoints whose first feature is exactly 0.625."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mu, self.logvar = nn.Linear(12, 2), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.mu(x), self.logvar(x)
        trapped = (x[..., :1] == 0.625).to(x)
        if self.kind == "log_likelihood":  # an infinite mean: so is z, and then the logits
            mu = mu + torch.where(trapped > 0, torch.nan, 0.0)
        elif self.kind == "kl":  # exp(200) is infinite in float32, exp(-200 / 2) is not
            logvar = logvar + 200 * trapped
        elif self.kind == "the gradient":  # sqrt is finite at 0, its slope is not
            mu = mu + torch.sqrt(mu.abs() * (1 - trapped))
        return mu, logvar


class Forgiving(nn.Linear):
    """A decoder that is finite for any z, so that only the KL divergence is not."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(torch.nan_to_num(z).clamp(-5, 5))


BAD_ROW = 77


def trapped_data() -> Tensor:
    x = data()
    x[BAD_ROW, 0] = 0.625
    return x


def trapped_trainer(kind: str, on_nan: str = "stop", **options: Any) -> Trainer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = Forgiving(2, 12) if kind == "kl" else nn.Linear(2, 12)
        model = VAE(encoder=Trap(kind), decoder=decoder)
    return small_trainer(model, on_nan=on_nan, **options)


def bad_step(seed: int = 0) -> int:
    rows = MinibatchOrder(130, 20, seed).rows(0, 7)
    return next(step for step in range(7) if BAD_ROW in rows[step])


TERMS = pytest.mark.parametrize("term", ["log_likelihood", "kl", "the gradient"])


@TERMS
@pytest.mark.parametrize("engine", ["reference", "modules"])
def test_a_nan_names_the_term_the_first_bad_datapoint_and_the_step(term: str, engine: str) -> None:
    trainer = trapped_trainer(term, engine=engine)
    with pytest.raises(TrainingError) as caught:
        fit(trainer, trapped_data())
    assert str(caught.value).startswith(f"step {bad_step()}: {term} is ")
    assert f"first at row {BAD_ROW} of the training data" in str(caught.value)
    assert caught.value.incident is not None and not math.isfinite(caught.value.incident.value)


def test_a_nan_in_a_stream_names_the_place_in_the_stream() -> None:
    batches = list(trapped_data().split(13))
    with pytest.raises(TrainingError, match=rf"step {BAD_ROW // 13}: .* datapoint {BAD_ROW} of this stream"):
        fit(trapped_trainer("log_likelihood"), iter(batches))


@TERMS
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stop_keeps_the_parameters_from_before_the_bad_step(term: str, optimizer: str) -> None:
    stopped, short = (trapped_trainer(term, optimizer=optimizer, seed=2) for _ in range(2))
    assert bad_step(seed=2) > 0
    with pytest.raises(TrainingError, match="The parameters are those before this step"):
        fit(stopped, trapped_data())
    fit(short, trapped_data(), max_samples=20 * bad_step(seed=2))
    assert stopped.step_count == short.step_count == bad_step(seed=2)
    tensors = short.state_dict()["tensors"]
    assert all(torch.equal(t, tensors[name]) for name, t in stopped.state_dict()["tensors"].items())


def test_a_step_size_that_is_too_large_for_the_numbers_is_found_in_the_update() -> None:
    trainer = small_trainer(optimizer="sgd", lr=3e38)
    with pytest.raises(TrainingError) as caught:
        fit(trainer)
    assert caught.value.incident is not None
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_skip_leaves_out_the_bad_update_and_nothing_else() -> None:
    """By hand: the same steps through the model, without the bad ones."""
    trainer = trapped_trainer("log_likelihood", "skip", optimizer="sgd", lr=0.1)
    with pytest.warns(UserWarning, match="this update was left out"):
        fit(trainer, trapped_data(), max_samples=260)

    by_hand = trapped_trainer("log_likelihood").model
    order = MinibatchOrder(130, 20, seed=0)
    skipped = []
    for step in range(14):
        rows = order.rows(step, 1)[0][: order.sizes(step, 1)[0]]
        if BAD_ROW in rows:
            skipped.append(step)
            continue
        by_hand.zero_grad()
        (-by_hand(trapped_data()[rows], seed=step_seed(0, step)).elbo.mean()).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.1 * p.grad  # type: ignore[operator]
    for p, q in zip(trainer.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert [incident.step for incident in trainer.incidents] == skipped
    assert trainer.samples_seen == 260


@TERMS
@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
@pytest.mark.filterwarnings("ignore:step")
def test_training_goes_on_past_bad_steps(term: str, on_nan: str) -> None:
    trainer = trapped_trainer(term, on_nan)
    row = fit(trainer, trapped_data(), max_samples=1300).last
    assert trainer.samples_seen == 1300
    assert len(trainer.incidents) == 10
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert math.isfinite(row.train_bound)


def test_a_bad_step_leaves_no_trace_in_what_an_estimator_remembers() -> None:
    trainer = trapped_trainer("log_likelihood", "skip", estimator="score_function_running", lr=1e-3)
    with pytest.warns(UserWarning, match="this update was left out"):
        fit(trainer, trapped_data(), max_samples=130)
    baseline = trainer.state_dict()["tensors"]["estimator.baseline"]
    assert baseline.isfinite().all()
    assert baseline[1] == pytest.approx(1 - RUNNING_DECAY**6)  # of 7 steps, one was left out


def test_rollback_returns_to_the_parameters_of_the_last_look() -> None:
    trainer = trapped_trainer("log_likelihood", "rollback", seed=2)
    before = trainer.state_dict()["tensors"]
    with pytest.warns(UserWarning, match=f"the last {bad_step(seed=2) + 1} updates were dropped"):
        fit(trainer, trapped_data(), max_samples=20 * (bad_step(seed=2) + 1))
    after = trainer.state_dict()["tensors"]
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model."))


@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
@pytest.mark.filterwarnings("ignore:step")
def test_what_does_not_help_is_given_up(on_nan: str) -> None:
    x = data()
    x[:, 0] = 0.625
    with pytest.raises(TrainingError, match=f"{on_nan} has not helped 10 times"):
        fit(trapped_trainer("log_likelihood", on_nan), x, max_samples=100_000)


# --- checkpoints --------------------------------------------------------------------------------------------

RUN = """
import sys
import torch
from vae_fast import VAE, Trainer
torch.set_num_threads(1)
path, resumed, max_samples, optimizer = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3]), sys.argv[4]
if resumed:
    trainer = Trainer.load(path)
else:
    model = VAE(data_dim=12, hidden_dims=[8], latent_dim=2, init="torch", seed=0)
    trainer = Trainer(model, optimizer=optimizer, lr=0.01, batch_size=20)
x = torch.load(sys.argv[5])
left = max_samples - trainer.samples_seen
if left > 0:
    trainer.fit(x, x[:50], max_samples=left, report_every=500, checkpoint=path, progress=False)
"""


def process(path: Path, how: str, max_samples: int, optimizer: str = "adam") -> subprocess.Popen[bytes]:
    torch.save(data(), path.parent / "data.pt")
    arguments = [str(path), how, str(max_samples), optimizer, str(path.parent / "data.pt")]
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(RUN), *arguments])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dropout", [False, True])
def test_a_saved_and_loaded_training_is_the_unbroken_one_bit_for_bit(
    tmp_path: Path, optimizer: str, dropout: bool
) -> None:
    def new() -> Trainer:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = VAE(encoder=WithDropout(), decoder=nn.Linear(2, 12)) if dropout else small_model()
        return small_trainer(model, optimizer=optimizer, targets="dynamic")

    straight, halfway = new(), new()
    fit(straight, max_samples=5200, report_every=650)
    fit(halfway, max_samples=2600, report_every=650)
    halfway.save(tmp_path / "half")
    resumed = Trainer.load(tmp_path / "half", model=new().model if dropout else None)
    fit(resumed, max_samples=2600, report_every=650)
    assert same(straight, resumed)


def test_what_an_estimator_remembers_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    straight, halfway = (small_trainer(estimator="score_function_running", lr=1e-3) for _ in range(2))
    fit(straight, max_samples=520, report_every=130)
    fit(halfway, max_samples=260, report_every=130)
    halfway.save(tmp_path / "half")
    assert checkpoint.load(tmp_path / "half")[0]["estimator.baseline"][0] < -1
    resumed = Trainer.load(tmp_path / "half")
    fit(resumed, max_samples=260, report_every=130)
    assert same(straight, resumed)


@pytest.mark.slow
def test_a_training_goes_on_in_another_process_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for how, samples, folder in (("new", 4000, "a"), ("new", 2000, "b"), ("resume", 4000, "b")):
        assert process(tmp_path / folder / "run", how, samples, "adagrad").wait() == 0
    assert same(Trainer.load(tmp_path / "a" / "run"), Trainer.load(tmp_path / "b" / "run"))


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
def test_a_training_killed_at_any_moment_is_finished_as_if_it_had_not_been(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    samples = 15_000
    assert process(whole, "new", samples).wait() == 0

    kills = 0
    for attempt in range(20):
        run = process(killed, "resume" if killed.exists() else "new", samples)
        before = written(killed)
        while written(killed) == before and run.poll() is None:
            time.sleep(0.001)
        if attempt < 3:
            time.sleep(random.uniform(0.0, 0.8))
            run.send_signal(signal.SIGKILL)
        code = run.wait()
        kills += code == -signal.SIGKILL
        if code == 0:
            break
        Trainer.load(killed)  # whole, whenever the kill came
    assert code == 0
    assert kills >= 1
    assert same(Trainer.load(whole), Trainer.load(killed))


def test_ctrl_c_saves_and_leaves_with_a_clear_message(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def interrupted() -> Iterator[Tensor]:
        for i, batch in enumerate(as_stream(data())):
            if i == 7:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    handler = signal.getsignal(signal.SIGINT)
    trainer = small_trainer()
    with pytest.raises(KeyboardInterrupt, match=r"stopped after \d+ samples, step \d+; saved to"):
        fit(trainer, interrupted(), max_samples=2600, checkpoint=path, report_every=1300)
    assert signal.getsignal(signal.SIGINT) is handler

    resumed, straight = Trainer.load(path), small_trainer()
    fit(
        resumed,
        as_stream(data(), resumed.step_count),
        max_samples=2600 - resumed.samples_seen,
        report_every=1300,
    )
    fit(straight, as_stream(data()), max_samples=2600, report_every=1300)
    assert 0 < trainer.samples_seen < 2600
    assert same(straight, resumed)


def test_ctrl_c_without_a_checkpoint_says_that_nothing_was_saved() -> None:
    def interrupted() -> Iterator[Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        yield from as_stream(data())

    with pytest.raises(KeyboardInterrupt, match="no checkpoint was asked for"):
        fit(small_trainer(), interrupted())


def test_resume_wants_the_settings_of_the_checkpoint(tmp_path: Path) -> None:
    saved = small_trainer()
    fit(saved)
    saved.save(tmp_path / "run")
    with pytest.raises(ValueError, match="batch_size: this trainer has 10, the saved one 20"):
        small_trainer(batch_size=10).resume(tmp_path / "run")
    other = small_trainer()
    other.resume(tmp_path / "run")
    assert same(saved, other)


def test_a_model_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    trainer = small_trainer(VAE(encoder=WithDropout(), decoder=nn.Linear(2, 12)))
    trainer.save(tmp_path / "run")
    with pytest.raises(ValueError, match="model: got None"):
        Trainer.load(tmp_path / "run")


def test_an_optimizer_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    def rmsprop(params: Any) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(params, lr=1e-3, momentum=0.9)

    straight, halfway = small_trainer(optimizer=rmsprop), small_trainer(optimizer=rmsprop)
    fit(straight, max_samples=2600, report_every=1300)
    fit(halfway, max_samples=1300)
    halfway.save(tmp_path / "run")
    with pytest.raises(ValueError, match="optimizer: got None, wanted the function"):
        Trainer.load(tmp_path / "run")
    resumed = Trainer.load(tmp_path / "run", optimizer=rmsprop)
    fit(resumed, max_samples=1300)
    assert same(straight, resumed)


def test_an_optimizers_own_options_come_back(tmp_path: Path) -> None:
    def adagrad(params: Any) -> torch.optim.Optimizer:
        return Adagrad(params, lr=0.1, accumulate_steps=7)

    trainer = small_trainer(optimizer=adagrad)
    trainer.optimizer.param_groups[0]["lr"] = 0.03
    trainer.save(tmp_path / "run")
    resumed = Trainer.load(tmp_path / "run", optimizer=adagrad)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.03


def test_other_data_than_before_are_noticed(tmp_path: Path) -> None:
    fit(small_trainer(), checkpoint=tmp_path / "run")
    with pytest.warns(UserWarning, match="not the data that this training has seen"):
        fit(Trainer.load(tmp_path / "run"), 1 - data())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Trainer.load(tmp_path / "run"))


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    for meta in ({}, {"kind": "vae_fast.Trainer"}, {"kind": 3}):
        checkpoint.save(tmp_path / "run", {"x": torch.zeros(1)}, meta)
        with pytest.raises(CheckpointError, match="wanted a checkpoint of a Trainer"):
            Trainer.load(tmp_path / "run")


def test_checkpoints_are_written_at_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Trainer, "save", lambda self, path: seen.append(self.samples_seen))
    fit(small_trainer(), max_samples=1000, report_every=400, checkpoint=tmp_path / "run")
    assert seen == [410, 800, 1010]  # whole minibatches, of 20 and then of 10 once an epoch


# --- CUDA ---------------------------------------------------------------------------------------------------

ON_A_GPU = pytest.mark.parametrize("engine", ["modules", "native"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@ON_A_GPU
def test_on_a_gpu_a_loaded_training_is_the_unbroken_one_bit_for_bit(
    tmp_path: Path, engine: str, optimizer: str
) -> None:
    made = {"optimizer": optimizer, "device": "cuda", "engine": engine}
    straight, halfway = (small_trainer(**made) for _ in range(2))
    fit(straight, max_samples=5200, report_every=650)
    fit(halfway, max_samples=2600, report_every=650)
    halfway.save(tmp_path / "half")
    resumed = Trainer.load(tmp_path / "half", device="cuda")
    fit(resumed, max_samples=2600, report_every=650)
    assert resumed.engine_name == engine and "graph" in resumed.engine_reason
    assert same(straight, resumed)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ON_A_GPU
def test_a_gpu_gives_the_history_of_the_cpu(engine: str) -> None:
    trainers = (small_trainer(device=device, engine=engine) for device in ("cpu", "cuda"))
    histories = [fit(trainer, data(), data(50)) for trainer in trainers]
    for on_cpu, on_gpu in zip(*histories, strict=True):
        assert on_gpu.train_bound == pytest.approx(on_cpu.train_bound, rel=1e-4)
        assert on_gpu.test_bound == pytest.approx(on_cpu.test_bound, rel=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ON_A_GPU
def test_on_a_gpu_a_stream_gives_the_parameters_of_the_array(engine: str) -> None:
    array, stream = (small_trainer(device="cuda", engine=engine) for _ in range(2))
    fit(array)
    fit(stream, as_stream(data()))
    assert np.isclose(stream.history.last.train_bound, array.history.last.train_bound, rtol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@TERMS
def test_on_a_gpu_a_nan_is_named_too(term: str) -> None:
    trainer = trapped_trainer(term, device="cuda")
    with pytest.raises(TrainingError, match=f"step {bad_step()}: {term} is .*row {BAD_ROW}"):
        fit(trainer, trapped_data())


# --- what is silent elsewhere -------------------------------------------------------------------------------


def test_a_float64_training_goes_on_in_float64(tmp_path: Path) -> None:
    straight, halfway = (small_trainer(small_model().double()) for _ in range(2))
    fit(straight, max_samples=2600, report_every=1300)
    fit(halfway, max_samples=1300)
    halfway.save(tmp_path / "run")
    resumed = Trainer.load(tmp_path / "run")
    assert next(resumed.model.parameters()).dtype == torch.float64
    fit(resumed, max_samples=1300)
    assert same(straight, resumed)
    with pytest.raises(ValueError, match="dtype: this trainer has 'float32', the saved one 'float64'"):
        small_trainer().resume(tmp_path / "run")


def frozen(model: VAE) -> None:
    model.encoder.hidden[0].requires_grad_(False)


def tied(model: VAE) -> None:
    model.encoder.logvar.weight = model.encoder.mu.weight


def other_activation(model: VAE) -> None:
    model.encoder.hidden[1] = nn.ReLU()


def other_scale(model: VAE) -> None:
    model.encoder.logvar_scale = 0.1


@pytest.mark.parametrize("change", [frozen, tied, other_activation, other_scale])
def test_a_model_that_was_changed_is_not_made_anew_from_a_checkpoint(change: Any, tmp_path: Path) -> None:
    def changed() -> VAE:
        model = small_model()
        change(model)
        return model

    straight, halfway = small_trainer(changed()), small_trainer(changed())
    fit(straight, max_samples=2600, report_every=1300)
    fit(halfway, max_samples=1300)
    halfway.save(tmp_path / "run")
    with pytest.raises(ValueError, match="model: got None, wanted the one of this checkpoint"):
        Trainer.load(tmp_path / "run")
    resumed = Trainer.load(tmp_path / "run", model=changed())
    fit(resumed, max_samples=1300)
    assert same(straight, resumed)


@pytest.mark.parametrize("other", [{"activation": "softplus"}, {"posterior": "log_normal"}])
def test_another_model_of_the_same_shapes_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    fit(small_trainer(), checkpoint=tmp_path / "run")
    model = VAE(data_dim=12, hidden_dims=[8], latent_dim=2, init="torch", **other)
    (name,) = other
    for go_on in (
        lambda: small_trainer(model).resume(tmp_path / "run"),
        lambda: Trainer.load(tmp_path / "run", model=model),
    ):
        with pytest.raises(ValueError, match=f"{name}: this trainer has '{other[name]}', the saved one"):
            go_on()


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    def square(first: bool) -> VAE:
        model = VAE(data_dim=8, hidden_dims=[8, 8], latent_dim=8, init="torch", seed=0)
        model.encoder.hidden[0 if first else 2].requires_grad_(False)
        return model

    fit(small_trainer(square(True)), data(130, 8), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match=r"the optimizer's parameters: this trainer has \['encoder.hidden.0"):
        small_trainer(square(False)).resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer.0.exp_avg", torch.zeros(1), "optimizer.0.exp_avg has shape"),
        ("optimizer.0.exp_avg", None, "keeps of some parameters what it does not of others"),
        ("history", {}, "its history cannot be read"),
        ("interval", [1], "its history cannot be read"),
        ("samples_seen", -5, "got -5 samples"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    name: str, value: Any, message: str
) -> None:
    trained, other = small_trainer(), small_trainer()
    fit(trained)
    state = trained.state_dict()
    part = state["tensors"] if name in state["tensors"] else state["meta"]
    part[name] = value
    if value is None:
        del part[name]
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    after = other.state_dict()
    assert all(torch.equal(t, after["tensors"][key]) for key, t in before["tensors"].items())
    assert without_seconds(before["meta"]) == without_seconds(after["meta"])


def test_a_checkpoint_that_asks_for_more_memory_than_it_has_is_refused(tmp_path: Path) -> None:
    trainer = small_trainer()
    state = trainer.state_dict()
    state["meta"]["model"]["latent_dim"] = 10**12
    checkpoint.save(tmp_path / "run", state["tensors"], {**state["meta"], "kind": Trainer.kind})
    with pytest.raises(CheckpointError, match="found a model that it does not hold"):
        Trainer.load(tmp_path / "run")


def adafactor(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(params, lr=1e-2)  # rows and columns of a matrix, a variance of a bias


def two_groups(params: Any) -> torch.optim.Optimizer:
    params = list(params)
    return torch.optim.Adam([{"params": params[:3], "amsgrad": True}, {"params": params[3:]}], lr=1e-3)


@pytest.mark.parametrize("optimizer", [adafactor, two_groups])
def test_an_optimizer_that_keeps_other_things_of_some_parameters_goes_on(
    optimizer: Any, tmp_path: Path
) -> None:
    straight, halfway = small_trainer(optimizer=optimizer), small_trainer(optimizer=optimizer)
    fit(straight, max_samples=2600, report_every=1300)
    fit(halfway, max_samples=1300)
    halfway.save(tmp_path / "run")
    resumed = Trainer.load(tmp_path / "run", optimizer=optimizer)
    fit(resumed, max_samples=1300)
    assert same(straight, resumed)


class Draws(nn.Module):
    """A decoder that draws whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 12)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z) + 0.1 * torch.randn(len(z), 12)


def test_what_a_module_draws_in_an_evaluation_moves_nothing() -> None:
    def trainer() -> Trainer:
        torch.manual_seed(1)
        return small_trainer(VAE(encoder=MLPEncoder(12, [8], 2), decoder=Draws()))

    alone, watched, often = trainer(), trainer(), trainer()
    fit(alone, max_samples=400)
    fit(watched, None, data(30), max_samples=400)
    fit(often, None, data(30), max_samples=400, report_every=60)
    swept, before = trainer(), torch.get_rng_state()
    sweep([swept], data(), data(30), max_samples=400, report_every=60, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    for other in (watched, often, swept):
        assert all(map(torch.equal, alone.model.parameters(), other.model.parameters()))
    assert often.history.last.test_bound == watched.history.last.test_bound == swept.history.last.test_bound


@pytest.mark.parametrize("engine", ["modules", "reference"])
def test_an_exception_in_a_step_leaves_the_training_where_it_says(engine: str) -> None:
    straight, stopped = small_trainer(engine=engine), small_trainer(engine=engine)
    fit(straight, max_samples=400)
    calls = 0

    def fails(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("no more")

    hook = stopped.model.decoder.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="no more"):
        fit(stopped, max_samples=400)
    hook.remove()
    assert stopped.step_count == 0
    fit(stopped, max_samples=400)
    assert all(map(torch.equal, straight.model.parameters(), stopped.model.parameters()))


def test_a_buffer_that_is_infinite_from_the_start_is_no_incident() -> None:
    model = small_model()
    model.encoder.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    trainer = small_trainer(model, engine="modules")
    fit(trainer, max_samples=130)
    assert trainer.step_count == 7


def test_a_tensor_for_a_step_size_comes_back(tmp_path: Path) -> None:
    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=torch.tensor(1e-2), foreach=False)

    trainer = small_trainer(optimizer=adam)
    trainer.optimizer.param_groups[0]["lr"].fill_(1e-4)
    trainer.save(tmp_path / "run")
    resumed = Trainer.load(tmp_path / "run", optimizer=adam)
    assert float(resumed.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-4)


def test_the_step_size_of_an_optimizer_of_ones_own_is_recorded() -> None:
    with pytest.warns(UserWarning, match="lr: 0.5 is not used"):
        trainer = Trainer(small_model(), optimizer=torch.optim.SGD, lr=0.5)
    assert trainer.settings.lr == trainer.optimizer.param_groups[0]["lr"] == 1e-3


def test_ctrl_c_during_the_last_report_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer()
    evaluate = trainer._evaluate

    def interrupted(test: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(test)

    monkeypatch.setattr(trainer, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after 100 samples"):
        fit(trainer, None, data(30), max_samples=100)


def test_numpys_numbers_are_settings_and_can_be_saved(tmp_path: Path) -> None:
    numbers = {"lr": np.float32(0.5), "beta": np.float32(1), "num_samples": np.int64(2)}
    trainer = Trainer(small_model(), batch_size=np.int64(10), **numbers)
    fit(trainer, checkpoint=tmp_path / "run")
    assert Trainer.load(tmp_path / "run").settings == trainer.settings
    with pytest.raises(TypeError, match=r"num_samples: got 1\.5, wanted an integer"):
        small_trainer(num_samples=1.5)


def test_parameters_that_were_replaced_are_not_left_behind_in_silence() -> None:
    trainer = small_trainer()
    fit(trainer, max_samples=40)
    trainer.model.encoder.mu.weight = nn.Parameter(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="model: found other parameters than when this trainer was made"):
        fit(trainer)


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(DataError, match="train: found no minibatch in the stream"):
        fit(small_trainer(), iter([]))


def test_data_that_were_prepared_for_a_gaussian_are_checked_for_a_bernoulli() -> None:
    prepared = prepare(torch.randn(50, 12), likelihood="gaussian")
    with pytest.raises(DataError, match="train"):
        fit(small_trainer(), prepared)


def test_a_training_that_has_only_accumulated_says_so() -> None:
    with pytest.warns(UserWarning, match="accumulates in its first 100 steps.* there were 7: no parameter"):
        fit(small_trainer(optimizer="adagrad"), max_samples=130)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(small_trainer(optimizer="adagrad"), max_samples=2020)
