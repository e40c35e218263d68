"""The trainer: algorithm 1 of the paper (auto-encoding variational Bayes), its history and its checkpoints.

Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114, section 2.3.
"""

from __future__ import annotations

import csv
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint as checkpoints
from .batches import ORDERS, ArraySource, Source, StreamSource
from .checkpoint import CheckpointError
from .datasets import DataError, Prepared, is_stream, prepare
from .engines import (
    Engine,
    Incident,
    Plan,
    ProgramType,
    State,
    StepProgram,
    check_engine,
    copy_state,
    first_random_state,
    make_engine,
    random_state,
    restore_random,
    restore_state,
)
from .estimators import (
    ESTIMATORS,
    EVALUATE,
    check_estimator,
    check_num_samples,
    default_estimator,
    initial_state,
    step_seed,
)
from .evaluation import Bound, bound
from .nn import VAE
from .optim import OptimizerFactory, make_optimizer
from .reference import integer

ON_NAN = ("stop", "skip", "rollback")
TARGETS = ("auto", "real", "binary", "dynamic")
LR = 0.02  # of Adagrad, from the paper's {0.01, 0.02, 0.1}
MOST_INCIDENTS_IN_A_ROW = 10

log = logging.getLogger("vae_fast")


class TrainingError(RuntimeError):
    """Training cannot go on. ``incident`` holds step, term, value and datapoint if a step was not finite."""

    def __init__(self, message: str, incident: Incident | None = None) -> None:
        super().__init__(message)
        self.incident = incident


@dataclass(frozen=True)
class HistoryRow:
    """A report: counts since the start of training, and means in nats per datapoint, higher is better.

    ``train_*`` are means over the minibatches since the row before, as the parameters moved; ``test_*`` are
    over the whole test set with the parameters of now, None where there is none. bound = log_likelihood - kl,
    whatever beta is. ``seconds`` is training time alone: no evaluation, no checkpoints.
    """

    samples: int
    steps: int
    seconds: float
    train_bound: float
    train_log_likelihood: float
    train_kl: float
    test_bound: float | None = None
    test_log_likelihood: float | None = None
    test_kl: float | None = None


class History:
    """The rows of a training, oldest first."""

    columns = tuple(column.name for column in fields(HistoryRow))

    def __init__(self, rows: Sequence[HistoryRow] = ()) -> None:
        self.rows = list(rows)

    def __iter__(self) -> Iterator[HistoryRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> HistoryRow:
        return self.rows[index]

    @property
    def last(self) -> HistoryRow:
        if not self.rows:
            raise IndexError("history: it is empty, wanted at least one report: call fit first")
        return self.rows[-1]

    def to_dict(self) -> dict[str, list[Any]]:
        """One list per column; JSON-able."""
        return {column: [getattr(row, column) for row in self.rows] for column in self.columns}

    @classmethod
    def from_dict(cls, columns: Mapping[str, Sequence[Any]]) -> History:
        values = zip(*(columns[column] for column in cls.columns), strict=True)
        return cls([HistoryRow(*row) for row in values])

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """One line per row under a line of column names; what is None is left empty."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)


@dataclass(frozen=True)
class Settings:
    """What a training's curve depends on, besides the model, the data and the optimizer's own options."""

    optimizer: str | None
    lr: float
    batch_size: int
    seed: int
    estimator: str
    num_samples: int
    beta: float
    weight_prior: bool
    order: str
    targets: str
    pixel_scale: float
    precision: str = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        _one_of("estimator", self.estimator, tuple(ESTIMATORS))
        _one_of("order", self.order, ORDERS)
        _one_of("targets", self.targets, TARGETS)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, wanted an integer of 1 or more")
        check_num_samples(self.estimator, self.num_samples)
        if not self.beta >= 0:
            raise ValueError(f"beta: got {self.beta}, wanted a number of 0 or more")


class Trainer:
    """Trains a variational auto-encoder on an array or a stream::

        trainer = Trainer(model, optimizer="adagrad", lr=0.02, batch_size=100, seed=0)
        history = trainer.fit(train, test, max_samples=1_000_000)

    A step takes a minibatch of M datapoints and ascends 1/M sum_i L(x_i), L from the estimator: nats per
    datapoint, summed over features. Minibatches and noise are functions of (seed, step), so every engine
    gives the same curve.

    Args:
        model: a :class:`vae_fast.VAE`.
        optimizer: "sgd", "adagrad" (the paper's: the first 100 steps only accumulate), "adam", "adamw", or a
            function ``params -> torch.optim.Optimizer``.
        lr: its step size; None: 0.02. A function's optimizer brings its own.
        batch_size: M. With ``order="shuffle"`` the last minibatch of an epoch is as small as it must be, and
            counts.
        seed: of minibatches and noise (not of the model's initial values).
        engine: "reference" (plain PyTorch), "modules" (the fused operators; any model), "native" (the whole
            step in C++; the multi-layer perceptrons of :class:`vae_fast.VAE`), or "auto", the fastest that
            can take the model. ``engine_name`` and ``engine_reason`` say which was taken and why, once
            ``fit`` has begun.
        precision: of the native engine's matrix products. "exact" is float32; "fast" rounds their operands to
            bfloat16 and adds in float32, which is another curve.
        estimator: "sgvb_b", "sgvb_a", or the score function without and with a baseline, "score_function",
            "score_function_running", "score_function_leave_one_out" (for num_samples of 2 or more), or
            "iwae", the importance-weighted bound, another objective; see :mod:`vae_fast.estimators`. None:
            "sgvb_b", or "sgvb_a" for a posterior of your own whose divergence from the prior has no closed
            form.
        num_samples: L, latent samples per datapoint.
        beta: weight of the KL divergence.
        weight_prior: maximum a posteriori with p(theta) = N(0, I) on the weights (parameters of two or more
            dimensions, not on biases): the objective per datapoint has (1/N) log p(theta) more, N the number
            of training datapoints.
        order: "shuffle" (every datapoint once per epoch) or "replacement" (the paper's code).
        targets, pixel_scale: how to read the data; see :func:`vae_fast.datasets.prepare`.
        device: where to train; None leaves the model where it is.
        on_nan: what to do when a step is not finite. "stop" raises :class:`TrainingError`, and the parameters
            are those before that step; "skip" leaves out that step's update; "rollback" returns to the
            parameters of the last look at them (at most 50 steps ago on a CPU, 1000 on a GPU or with the
            native engine) and goes on after the bad step. Each names the term, the first bad datapoint and
            the step, in a warning and in ``incidents``.

    Attributes:
        history, samples_seen, step_count, incidents: of the whole training, resumed parts included.
    """

    kind = "vae_fast.Trainer"  # what a checkpoint calls itself

    def __init__(
        self,
        model: VAE,
        *,
        optimizer: str | OptimizerFactory = "adagrad",
        lr: float | None = None,
        batch_size: int = 100,
        seed: int = 0,
        engine: str = "auto",
        precision: str = "exact",
        estimator: str | None = None,
        num_samples: int = 1,
        beta: float = 1.0,
        weight_prior: bool = False,
        order: str = "shuffle",
        targets: str = "auto",
        pixel_scale: float = 255,
        device: torch.device | str | None = None,
        on_nan: str = "stop",
    ) -> None:
        check_engine(engine, precision)
        _one_of("on_nan", on_nan, ON_NAN)
        beta, pixel_scale = float(beta), float(pixel_scale)
        batch_size, seed = integer("batch_size", batch_size), integer("seed", seed)
        num_samples = integer("num_samples", num_samples)
        name = optimizer if isinstance(optimizer, str) else None
        if not isinstance(model, VAE):
            got = type(model).__name__
            raise TypeError(
                f"model: got {got}, wanted a VAE; VAE(encoder=..., decoder=...) takes any modules"
            )
        if name is None and lr is not None:
            warnings.warn(f"lr: {lr} is not used: an optimizer of your own brings its own", stacklevel=2)
        lr = LR if lr is None else float(lr)
        estimator = default_estimator(model) if estimator is None else estimator
        self.settings = Settings(
            name,
            lr,
            batch_size,
            seed,
            estimator,
            num_samples,
            beta,
            weight_prior,
            order,
            targets,
            pixel_scale,
            precision=precision,
        )
        check_estimator(estimator, model)
        self.device = _device(device, model)
        self.model = model.to(self.device)
        self.optimizer = make_optimizer(optimizer, [p for p in model.parameters() if p.requires_grad], lr)
        if name is None:
            self.settings = replace(self.settings, lr=float(self.optimizer.param_groups[0].get("lr", lr)))
        self.on_nan = on_nan
        self.engine = engine
        self.engine_name, self.engine_reason = engine, "not chosen before fit"
        self.history = History()
        self.samples_seen = 0
        self.step_count = 0
        self.seconds = 0.0
        self.incidents: list[Incident] = []
        self._in_a_row = 0
        self._fitting = False
        self._interval = np.zeros(3)  # sums over the datapoints since the last report: log_likelihood, kl, 1
        self._random = first_random_state(seed, self.device)
        self._estimator_state = initial_state(estimator, self.device)
        self._data: str | None = None  # what the data are recognised by

    def fit(
        self,
        train: Any,
        test: Any = None,
        *,
        max_samples: int,
        report_every: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool | str = True,
    ) -> History:
        """Trains on ``max_samples`` more samples; called again, it goes on where it stopped.

        Steps are whole: training stops after the first one with which ``max_samples`` is reached, and
        ``samples_seen`` says exactly how many samples there were.

        Args:
            train: an array, tensor or file of datapoints ``[N, D]``, or a DataLoader or any other iterable of
                minibatches. A stream that ends early ends the training with a warning, unless it can be
                iterated again.
            test: an array, tensor or file to report the bound of.
            max_samples: how many samples more.
            report_every: samples between rows of the history, which lie on multiples of it (and at the end);
                None: an epoch, but not fewer than 10,000.
            checkpoint: a file to save to at every row, replaced as a whole. After a kill,
                ``Trainer.load(checkpoint)`` and ``fit`` continue bit for bit; the samples left to do are
                ``total - trainer.samples_seen``.
            progress: a bar on stderr if that is a terminal; "always" for a bar in any case.

        Raises:
            DataError: the data cannot be what they are said to be.
            TrainingError: a step was not finite (see ``on_nan``), or out of memory.
            KeyboardInterrupt: after Ctrl-C, once the steps under way are done and the checkpoint, if any, is
                saved.
        """
        source, engine, test_data = self._begin(
            train, test, max_samples, report_every, checkpoint is not None
        )
        began = self.samples_seen
        end = began + max_samples
        every = report_every or report_interval(source)

        self.model.train()
        with self._randomness(), _Interrupt() as interrupt, _bar(max_samples, progress) as bar:

            def report() -> None:
                self._report(test_data)
                bar.set_postfix_str(_summary(self.history.last))
                if checkpoint is not None:
                    self.save(checkpoint)

            def stop_if_interrupted() -> None:
                if interrupt.happened:
                    saved = "no checkpoint was asked for"
                    if checkpoint is not None:
                        self.save(checkpoint)
                        saved = f"saved to {os.fspath(checkpoint)}"
                    raise KeyboardInterrupt(
                        f"stopped after {self.samples_seen} samples, step {self.step_count}; {saved}"
                    )

            self._say(bar, f"engine {self.engine_name}: {self.engine_reason}")
            said = False
            while self.samples_seen < end:
                before, next_report = self.samples_seen, (self.samples_seen // every + 1) * every
                n_steps = min(engine.chunk_steps, source.steps_at_once)
                sizes = source.sizes(self.step_count, n_steps, min(end, next_report) - self.samples_seen)
                if not said:
                    self._say(bar, source.note)
                    said = True
                if len(sizes) == 0:
                    if self.samples_seen == began:
                        raise DataError("train: found no minibatch in the stream, wanted one or more")
                    warnings.warn(f"train: the stream ended after {self.samples_seen} samples", stacklevel=2)
                    break
                self._train(engine, sizes)
                bar.update(self.samples_seen - before)
                if self.samples_seen >= next_report:
                    report()
                stop_if_interrupted()
            if not self.history.rows or self.history.last.samples < self.samples_seen:
                report()
                stop_if_interrupted()
        waits = self.optimizer.param_groups[0].get("accumulate_steps", 0)
        if self.step_count <= waits:
            warnings.warn(
                f"optimizer: Adagrad only accumulates in its first {waits} steps, as the paper's does, and "
                f"there were {self.step_count}: no parameter has moved yet",
                stacklevel=2,
            )
        return self.history

    def _begin(
        self, train: Any, test: Any, max_samples: int, report_every: int | None, remember: bool
    ) -> tuple[Source, Engine, Prepared | None]:
        """Checks what ``fit`` was given; what it trains on, with, and is tested on."""
        if max_samples < 1:
            raise ValueError(f"max_samples: got {max_samples}, wanted an integer of 1 or more")
        if report_every is not None and report_every < 1:
            raise ValueError(f"report_every: got {report_every}, wanted an integer of 1 or more")
        own = {id(p) for p in self.model.parameters()}
        if any(id(p) not in own for group in self.optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "model: found other parameters than when this trainer was made, wanted those, which the "
                "optimizer has; make another trainer"
            )
        source = self._source(train)
        test_data = None if test is None else self._prepare("test", test, source.kind).to(self.device)
        if remember or self._data is not None:
            fingerprint = source.fingerprint()
            if self._data not in (None, fingerprint):
                warnings.warn(
                    "train: these are not the data that this training has seen so far", stacklevel=3
                )
            self._data = fingerprint
        s = self.settings
        plan = Plan(s.seed, s.estimator, s.num_samples, s.beta, s.weight_prior, self._estimator_state)
        engine, self.engine_reason = make_engine(
            self.engine,
            self.model,
            self.optimizer,
            source,
            plan,
            self.device,
            self._program_type(),
            s.precision,
        )
        self.engine_name = engine.name
        return source, engine, test_data

    # --- steps ----------------------------------------------------------------------------------------------

    def _train(self, engine: Engine, sizes: NDArray[np.int64]) -> None:
        """The next steps, as many as there are sizes, or fewer where one is not finite."""
        began = time.perf_counter()
        engine.next_step = self.step_count
        before = engine.snapshot()
        try:
            terms = engine.run(len(sizes))
        except BaseException as error:
            engine.restore(before)  # where samples_seen and step_count still are
            if not is_out_of_memory(error):
                raise
            size, samples = int(sizes.max()), self.settings.num_samples
            raise TrainingError(
                f"out of memory on {self.device}: minibatches of {size} datapoints, {samples} latent samples "
                f"each do not fit; {max(1, size // 2)} datapoints need about half as much"
            ) from error
        self._accept(engine, before, terms, sizes)
        self.seconds += time.perf_counter() - began

    def _accept(self, engine: Engine, before: State, terms: Tensor, sizes: NDArray[np.int64]) -> None:
        """Counts the steps that ``engine`` has taken since ``before``, or goes back and mends them."""
        if terms.isfinite().all() and engine.finite():
            self._count(terms, sizes)
            self._in_a_row = 0
        else:
            self._mend(engine, before, sizes)

    def _count(self, terms: Tensor, sizes: NDArray[np.int64]) -> None:
        sums = np.column_stack((terms[:, 1:].double().numpy(), np.ones(len(sizes)))) * sizes[:, None]
        # One after the other, so that it does not matter where a chunk began.
        self._interval = np.add.accumulate(np.vstack((self._interval, sums)))[-1]
        self.step_count += len(sizes)
        self.samples_seen += int(sizes.sum())

    def _mend(self, engine: Engine, before: State, sizes: NDArray[np.int64]) -> None:
        """Repeats the steps one by one from ``before``, and deals with the first that is not finite."""
        engine.restore(before)
        for i in range(len(sizes)):
            engine.next_step = self.step_count
            good = engine.snapshot()
            try:
                terms = engine.run(1)
            except BaseException:
                engine.restore(good)
                raise
            if terms.isfinite().all() and engine.finite():
                self._count(terms, sizes[i : i + 1])
                continue
            engine.restore(good)
            engine.next_step = self.step_count
            incident = engine.diagnose()
            self._in_a_row = 1 if self.on_nan == "skip" and i > 0 else self._in_a_row + 1
            if self.on_nan == "stop":
                raise TrainingError(f"{incident}. The parameters are those before this step.", incident)
            if self._in_a_row > MOST_INCIDENTS_IN_A_ROW:
                raise TrainingError(
                    f"{incident}; {self.on_nan} has not helped {MOST_INCIDENTS_IN_A_ROW} times.", incident
                )
            self.incidents.append(incident)
            done = "this update was left out"
            if self.on_nan == "rollback":
                engine.restore(before)
                done = f"the last {i + 1} updates were dropped"
            warnings.warn(f"{incident}: {done}", stacklevel=4)
            self.step_count += 1
            self.samples_seen += int(sizes[i])
            return
        first = self.step_count - len(sizes)
        raise TrainingError(
            f"steps {first} to {self.step_count - 1} were finite only when they were repeated"
        )

    def _program_type(self) -> ProgramType:
        """What computes a step; other algorithms have others (:mod:`vae_fast.algorithms`)."""
        return StepProgram

    # --- reports --------------------------------------------------------------------------------------------

    def _report(self, test: Prepared | None) -> None:
        seen = self._interval[2] or float("nan")  # none, where every update was left out
        log_likelihood, kl = (float(total / seen) for total in self._interval[:2])
        row = HistoryRow(
            self.samples_seen, self.step_count, self.seconds, log_likelihood - kl, log_likelihood, kl
        )
        if test is not None:
            with _random_state_of_its_own(self.settings.seed, self.device):
                result = self._evaluate(test)
            row = replace(
                row, test_bound=result.elbo, test_log_likelihood=result.log_likelihood, test_kl=result.kl
            )
        self.history.rows.append(row)
        self._interval = np.zeros(3)
        log.info("%s", _summary(row))

    def _evaluate(self, test: Prepared) -> Bound:
        return bound(self.model, test, seed=self.settings.seed)

    def _say(self, bar: Any, message: str) -> None:
        log.info("%s", message)
        if not bar.disable:
            bar.write(message, file=sys.stderr)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that the rest of the training depends on: "tensors" by name, and JSON-able "meta"."""
        state = copy_state(self.model, self.optimizer, self.device, self._estimator_state)
        # Outside fit, torch's generators are the caller's, not the training's.
        tensors = state.tensors if self._fitting else state.tensors | self._random
        groups = [
            {key: _plain(value) for key, value in g.items() if key != "params"}
            for g in self.optimizer.param_groups
        ]
        described = self._description()
        meta = {
            **described,
            "samples_seen": self.samples_seen,
            "step_count": self.step_count,
            "seconds": self.seconds,
            "interval": self._interval.tolist(),
            "history": self.history.to_dict(),
            "incidents": [asdict(incident) for incident in self.incidents],
            "optimizer": {**described["optimizer"], "groups": groups, "numbers": state.numbers},
            "data": self._data,
        }
        return {"tensors": tensors, "meta": meta}

    def _description(self) -> dict[str, Any]:
        """What a state is of: settings, model and optimizer."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        trained = [names.get(id(p)) for group in self.optimizer.param_groups for p in group["params"]]
        return {
            "settings": asdict(self.settings),
            "model": self.model.description(),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "optimizer": {"class": type(self.optimizer).__name__, "parameters": trained},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict()``.

        Raises:
            ValueError: it belongs to another model or optimizer, or to a trainer of other settings (the curve
                would be another), or it is no whole state. Nothing has changed then.
        """
        tensors, meta = state["tensors"], state["meta"]
        ours, theirs = _identity(self._description()), _identity(meta)
        for name in ours:
            if name in theirs and ours[name] != theirs[name]:
                found = f"this trainer has {ours[name]!r}, the saved one {theirs[name]!r}"
                raise ValueError(f"{name}: {found}; wanted the same")
        try:
            history = History.from_dict(meta["history"])
            incidents = [Incident(**incident) for incident in meta["incidents"]]
            interval = np.array(meta["interval"], dtype=float).reshape(3)
            counts = integer("samples_seen", meta["samples_seen"]), integer("step_count", meta["step_count"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state: its history cannot be read ({error}), wanted a whole one") from error
        if min(counts) < 0:
            raise ValueError(f"state: got {counts[0]} samples in {counts[1]} steps, wanted 0 or more")
        random = {name: tensor for name, tensor in tensors.items() if name.startswith("random.")}
        own = {name: tensor for name, tensor in tensors.items() if name not in random}
        saved_state = State(own, meta["optimizer"]["numbers"])
        restore_state(self.model, self.optimizer, self.device, saved_state, self._estimator_state)
        for group, options in zip(self.optimizer.param_groups, meta["optimizer"]["groups"], strict=True):
            for key, value in options.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                elif key not in _OF_THE_MACHINE:
                    group[key] = tuple(value) if isinstance(value, list) else value
        self._random |= random
        self.samples_seen, self.step_count = counts
        self.seconds = meta["seconds"]
        self._interval, self.history, self.incidents = interval, history, incidents
        self._data = meta["data"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint: one safetensors file, replaced as a whole or not at all."""
        state = self.state_dict()
        checkpoints.save(path, state["tensors"], {**state["meta"], "kind": self.kind})

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a checkpoint, with this trainer's model and settings, which must be those of the
        checkpoint.

        Raises:
            CheckpointError: the file is not a whole checkpoint.
            ValueError: it is one of another model or other settings.
        """
        self.load_state_dict(_read(path, self.kind))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: VAE | None = None,
        optimizer: OptimizerFactory | None = None,
        engine: str = "auto",
        device: torch.device | str | None = None,
        on_nan: str = "stop",
    ) -> Trainer:
        """The trainer of a checkpoint, its model included; ``fit`` then continues bit for bit.

        Args:
            path: the checkpoint.
            model: needed where the encoder and decoder were the caller's own; made from the checkpoint
                otherwise.
            optimizer: the function that made it, where it was not made by name.
            engine, device, on_nan: as for a new trainer; the curve does not depend on them.

        Raises:
            CheckpointError: the file is not a whole checkpoint.
            ValueError: the model or the optimizer is missing, or is another.
        """
        state = _read(path, cls.kind)
        meta = state["meta"]
        if model is None:
            if meta["model"] is None:
                raise ValueError(
                    "model: got None, wanted the one of this checkpoint: its encoder and decoder are your "
                    "own, or were changed after they were made"
                )
            model = _model(path, meta, state["tensors"])
        settings = dict(meta["settings"])
        name = settings.pop("optimizer")
        if name is None:
            del settings["lr"]
        if (name is None) != (optimizer is not None):
            wanted = (
                f"None: the checkpoint's is {name!r}"
                if name
                else "the function that made the checkpoint's optimizer"
            )
            raise ValueError(f"optimizer: got {optimizer!r}, wanted {wanted}")
        trainer = cls(
            model, optimizer=optimizer or name, engine=engine, device=device, on_nan=on_nan, **settings
        )
        trainer.load_state_dict(state)
        return trainer

    # --- what fit stands on ---------------------------------------------------------------------------------

    def _source(self, train: Any) -> Source:
        settings, likelihood = self.settings, self.model.likelihood
        if is_stream(train):
            if settings.weight_prior:
                raise ValueError(
                    "weight_prior: got True with a stream, wanted an array: the prior is weighed by its size"
                )
            return StreamSource(
                train,
                likelihood=likelihood,
                targets=settings.targets,
                pixel_scale=settings.pixel_scale,
                data_dim=self.model.data_dim,
                device=self.device,
                first_step=self.step_count,
            )
        data = self._prepare("train", train, settings.targets)
        return ArraySource(
            data, batch_size=settings.batch_size, seed=settings.seed, order=settings.order, device=self.device
        )

    def _prepare(self, name: str, data: Any, targets: str) -> Prepared:
        return prepare(
            data,
            likelihood=self.model.likelihood,
            targets=targets,
            pixel_scale=self.settings.pixel_scale,
            name=name,
            width=self.model.data_dim,
        )

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        """torch's default generators as the training left them; the caller's are as before, afterwards.

        So what modules such as dropout draw is a function of the seed, too, and goes on after a resume.
        """
        cuda = [self.device.index] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            restore_random(self._random, self.device)
            self._fitting = True
            try:
                yield
            finally:
                self._fitting = False
                self._random = random_state(self.device)


@contextmanager
def _random_state_of_its_own(seed: int, device: torch.device) -> Iterator[None]:
    """What a module draws in an evaluation does not move the training, or the caller's generators."""
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        restore_random(first_random_state(step_seed(seed, 0, EVALUATE), device), device)
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator has an exception of its own; that of a CPU is known by its words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def report_interval(source: Source) -> int:
    """Samples from one row of the history to the next, where nobody says."""
    return max(10_000, source.count or 0)


class _Interrupt:
    """Turns the first Ctrl-C into a flag; a second one interrupts at once."""

    def __init__(self) -> None:
        self.happened = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._before = handler
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.happened:
            raise KeyboardInterrupt
        self.happened = True
        print("\nfinishing the steps under way; once more to stop at once", file=sys.stderr)


_ENTRIES = {
    "settings",
    "model",
    "samples_seen",
    "step_count",
    "seconds",
    "interval",
    "history",
    "incidents",
    "optimizer",
    "data",
}
_OF_THE_MACHINE = ("fused", "foreach", "capturable")  # how an optimizer computes, not what


def _read(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The ``state_dict()`` in a checkpoint of that kind."""
    tensors, meta = checkpoints.load(path)
    missing = sorted(_ENTRIES - meta.keys()) if meta.get("kind") == kind else [kind]
    if missing:
        wanted = kind.removeprefix("vae_fast.")
        raise CheckpointError(
            f"{os.fspath(path)}: found no {missing[0]!r} in it, wanted a checkpoint of a {wanted}"
        )
    return {"tensors": tensors, "meta": meta}


def _identity(meta: Mapping[str, Any]) -> dict[str, Any]:
    """By name what must be the same for a training to go on; older checkpoints tell less of it."""
    found = {"precision": "exact", **meta["settings"]}
    found |= {name: value for name, value in (meta["model"] or {}).items() if name != "init"}
    found["optimizer"] = meta["optimizer"]["class"]
    if "dtype" in meta:
        found["dtype"] = meta["dtype"]
    if "parameters" in meta["optimizer"]:
        found["the optimizer's parameters"] = meta["optimizer"]["parameters"]
    return found


def _model(path: str | os.PathLike[str], meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VAE:
    """As a checkpoint describes it; memory is taken once the checkpoint is known to have as much."""
    dtype = getattr(torch, str(meta.get("dtype", "float32")), None)
    try:
        with torch.device("meta"):
            outline = VAE.from_config({**meta["model"], "init": "torch"})
        wanted = {f"model.{name}": value.shape for name, value in outline.state_dict().items()}
        if not isinstance(dtype, torch.dtype) or any(
            name not in tensors or tensors[name].shape != shape for name, shape in wanted.items()
        ):
            raise ValueError("its tensors are others")
        return VAE.from_config(meta["model"]).to(dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{os.fspath(path)}: found a model that it does not hold ({error}), wanted a whole checkpoint"
        ) from error


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _device(device: torch.device | str | None, model: nn.Module) -> torch.device:
    if device is None:
        return next(model.parameters()).device
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _summary(row: HistoryRow) -> str:
    test = "" if row.test_bound is None else f", test {row.test_bound:.2f}"
    return f"bound {row.train_bound:.2f}{test}"


def _bar(total: int, progress: bool | str) -> Any:
    _one_of("progress", progress, (True, False, "always"))
    disable = None if progress is True else not progress  # None: unless stderr is a terminal
    return tqdm(
        total=total, disable=disable, file=sys.stderr, unit=" samples", unit_scale=True, dynamic_ncols=True
    )


def _one_of(name: str, got: object, wanted: Sequence[object]) -> None:
    if got not in wanted:
        raise ValueError(f"{name}: got {got!r}, wanted one of {', '.join(repr(w) for w in wanted)}")
