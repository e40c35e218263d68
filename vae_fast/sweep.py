"""Many models at once: seeds, step sizes, weights of the divergence, numbers of latent variables."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from . import datasets, native
from .trainer import History, Trainer, TrainingError, _bar, _Interrupt, is_out_of_memory, report_interval


def sweep(
    trainers: Sequence[Trainer],
    train: Any,
    test: Any = None,
    *,
    max_samples: int,
    report_every: int | None = None,
    checkpoints: Sequence[str | os.PathLike[str]] | None = None,
    progress: bool | str = True,
) -> list[History]:
    """Trains several models on the same data, each on ``max_samples`` more samples; their histories::

        trainers = [
            vf.Trainer(vf.VAE(784, [500], latent_dim=20, seed=seed), lr=lr, seed=seed)
            for seed in range(4)
            for lr in (0.01, 0.02)
        ]
        histories = vf.sweep(trainers, train, test, max_samples=1_000_000)

    Each model's curve is that of its own ``fit``, bit for bit. Models that the native engine takes run side
    by side: on a CPU one on each thread; on a GPU, where ``engine="native"`` asks for it, in the same
    launches as far as they differ only in seed, lr, beta and ``latent_dim``. The others take turns.

    Args:
        trainers: of one or more models, each of which is in there once.
        train, test, max_samples, report_every, progress: as in :meth:`vae_fast.Trainer.fit`; ``train`` is an
            array, tensor or file.
        checkpoints: a file for each trainer, written as ``fit`` writes its ``checkpoint``.

    Raises:
        ValueError: there is no trainer, one is in there twice, or two of them share a model.
        TypeError: ``train`` is a stream, which cannot be read by several.
        DataError, TrainingError: as in ``fit``.
        KeyboardInterrupt: after Ctrl-C, once the steps under way are done; each trainer can go on.
    """
    if not trainers:
        raise ValueError("trainers: got none, wanted one or more")
    for what, objects in (("trainer", trainers), ("model", [trainer.model for trainer in trainers])):
        if len({id(one) for one in objects}) < len(trainers):
            raise ValueError(f"trainers: got the same {what} twice, wanted each once")
    parameters = [id(p) for trainer in trainers for p in trainer.model.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError("trainers: got models that share parameters, wanted models of their own")
    if checkpoints is not None and len(checkpoints) != len(trainers):
        raise ValueError(f"checkpoints: got {len(checkpoints)} files, wanted {len(trainers)}: one each")
    if datasets.is_stream(train):
        raise TypeError(f"train: got a stream, {type(train).__name__}, wanted an array, a tensor or a file")
    shared = _Shared(train)
    files: Sequence[str | os.PathLike[str] | None] = checkpoints or [None] * len(trainers)
    runs = [
        _Run(trainer, shared.of(trainer), test, max_samples, report_every, file)
        for trainer, file in zip(trainers, files, strict=True)
    ]
    with _Interrupt() as interrupt, _bar(max_samples * len(runs), progress) as bar:
        while active := [run for run in runs if not run.done]:
            before = sum(run.trainer.samples_seen for run in runs)
            together = [run for run in active if run.native is not None]
            failed = _side_by_side(together)
            for run in active:
                if run not in together:
                    with run.trainer._randomness():
                        run.trainer._train(run.engine, run.sizes())
            for run in active:
                run.report_if_due()
            bar.update(sum(run.trainer.samples_seen for run in runs) - before)
            if failed:
                raise failed
            if interrupt.happened:
                for run in runs:
                    run.save()
                raise KeyboardInterrupt(
                    f"stopped after {max(r.trainer.samples_seen for r in runs)} samples each"
                )
    return [trainer.history for trainer in trainers]


class _Shared:
    """The training data, checked and moved once for all trainers that read them alike."""

    def __init__(self, train: Any) -> None:
        self._train = train
        self._found: dict[Any, datasets.Prepared] = {}

    def of(self, trainer: Trainer) -> datasets.Prepared:
        model, settings = trainer.model, trainer.settings
        key = (model.likelihood, model.data_dim, settings.targets, settings.pixel_scale, trainer.device)
        if key not in self._found:
            prepared = trainer._prepare("train", self._train, settings.targets)
            self._found[key] = prepared.to(trainer.device)
        return self._found[key]


class _Run:
    """One model's share of a sweep."""

    def __init__(
        self,
        trainer: Trainer,
        train: Any,
        test: Any,
        max_samples: int,
        report_every: int | None,
        checkpoint: str | os.PathLike[str] | None,
    ) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint
        remember = checkpoint is not None
        self.source, self.engine, self.test = trainer._begin(train, test, max_samples, report_every, remember)
        self.native: native.NativeEngine | None = None
        if isinstance(self.engine, native.NativeEngine):
            self.native = self.engine
        self.end = trainer.samples_seen + max_samples
        self.every = report_every or report_interval(self.source)
        self.next_report = self._after(trainer.samples_seen)
        trainer.model.train()

    def _after(self, samples: int) -> int:
        return (samples // self.every + 1) * self.every

    @property
    def done(self) -> bool:
        return self.trainer.samples_seen >= self.end

    def sizes(self) -> Any:
        seen = self.trainer.samples_seen
        self.engine.next_step = self.trainer.step_count
        until = min(self.end, self.next_report) - seen
        return self.source.sizes(self.trainer.step_count, self.engine.chunk_steps, until)

    def save(self) -> None:
        if self.checkpoint is not None:
            self.trainer.save(self.checkpoint)

    def report_if_due(self) -> None:
        if self.trainer.samples_seen >= self.next_report or self.done:
            self.trainer._report(self.test)
            self.save()
            self.next_report = self._after(self.trainer.samples_seen)


def _side_by_side(runs: Sequence[_Run]) -> TrainingError | None:
    """The next steps of each; ``seconds`` of a trainer is then its share of the time.

    Where a model fails, the others' steps count, and the first error is returned.
    """
    if not runs:
        return None
    began = time.perf_counter()
    sizes = [run.sizes() for run in runs]
    before = [run.engine.snapshot() for run in runs]
    engines = [run.native for run in runs if run.native is not None]
    waiting = list(zip(runs, before, strict=True))  # models that have moved, and are not counted
    failed = None
    try:
        terms = native.run_together(engines, [len(s) for s in sizes])
        for term, size in zip(terms, sizes, strict=True):
            (run, saved), counted = waiting[0], waiting[0][0].trainer.step_count
            try:
                run.trainer._accept(run.engine, saved, term, size)
            except TrainingError as error:
                failed = failed or error
            except BaseException:
                if run.trainer.step_count > counted:  # its own step by step: there is nothing to go back from
                    del waiting[0]
                raise
            del waiting[0]
    except BaseException as error:
        for run, saved in waiting:
            run.engine.restore(saved)
        if is_out_of_memory(error):
            raise TrainingError(
                f"out of memory: {len(runs)} models side by side do not fit; wanted fewer"
            ) from error
        raise
    share = (time.perf_counter() - began) / len(runs)
    for run in runs:
        run.trainer.seconds += share
    return failed
