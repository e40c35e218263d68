"""Training curves that go on where they stopped: what figures 2 to 5 are made of.

A curve is one model, trained by one algorithm on one set of data, and looked at after 10^(k/10) samples, or
the whole steps nearest to them. It has a folder of its own under ``<out>/curves``, which all figures of that
``out`` share:

* ``checkpoint.safetensors``: replaced at every look, and between them every ``SAVE_EVERY`` samples;
* ``curve.csv``: samples, train, test, a line for every look;
* ``curve.json``: what the curve is, so that no other is taken for it.

Killed at any moment, it continues bit for bit. A finished curve is not trained again, and more samples
continue it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from .. import checkpoint as checkpoints
from .. import datasets
from .._extension import build_info
from ..algorithms import MonteCarloEM, WakeSleep
from ..batches import ArraySource
from ..datasets import Prepared
from ..nn import VAE
from ..presets import Preset
from ..report import write_atomically
from ..sweep import sweep
from ..trainer import Trainer

FULL = 100_000_000  # training samples of the paper's figure 2, scale 1
FIRST = 10_000  # the first look; until then the paper's Adagrad has only accumulated
SAVE_EVERY = 2_000_000
CHECKPOINT, POINTS, SPEC = "checkpoint.safetensors", "curve.csv", "curve.json"
ALGORITHMS: dict[str, type[Trainer]] = {"aevb": Trainer, "wake-sleep": WakeSleep, "mcem": MonteCarloEM}


class CurveError(ValueError):
    """A curve that cannot be trained or continued as asked; one sentence."""


@dataclass(frozen=True)
class Point:
    """A look at a curve: nats per datapoint, higher is better."""

    samples: int
    train: float
    test: float


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    ``data`` is a name of :func:`load_data`, of whose training rows the first ``rows`` are trained on; None:
    all. On the curve's axis a datapoint of a minibatch counts as ``passes`` samples: how often a step looks
    at it.
    """

    panel: str
    algorithm: str
    preset: Preset
    data: str
    rows: int | None = None
    passes: int = 1

    @property
    def name(self) -> str:
        return f"{self.panel}-{self.algorithm}"

    def datapoints(self, samples: int) -> int:
        """Datapoints of minibatches after so many samples, to the nearest whole step."""
        batch = self.preset.trainer_options["batch_size"]
        return int(round(samples / (self.passes * batch)) * batch)

    def has_point(self, samples: int) -> bool:
        """Whether whole steps come within a twentieth of so many samples."""
        return abs(self.datapoints(samples) * self.passes - samples) <= samples / 20


Data: TypeAlias = Mapping[str, tuple[Prepared, Prepared]]
# (trainer, train, test, mean of the online bound since the last look) -> (train, test) of a point
Evaluate: TypeAlias = Callable[[Trainer, Prepared, Prepared, float], tuple[float, float]]


def points_to(samples: int, first: int = FIRST) -> list[int]:
    """10^(k/10) samples, in minibatches of 100, from ``first`` to ``samples``.

    Raises:
        CurveError: there is none.
    """
    tenths = (round(10 ** (k / 10) / 100) * 100 for k in range(20, math.ceil(10 * math.log10(samples)) + 1))
    found = [n for n in tenths if first <= n <= samples]
    if not found:
        raise CurveError(
            f"scale: got {samples:,} samples, wanted {first:,} or more, where a curve's first point is"
        )
    return found


def load_data(
    names: Iterable[str], mnist: str | os.PathLike[str] | None, frey: str | os.PathLike[str] | None
) -> tuple[dict[str, tuple[Prepared, Prepared]], list[str]]:
    """(train, test) by name, pixels over 256, and a sentence where Frey Face is wanted and not there.

    Args:
        names: of "mnist", "mnist-dynamic", whose pixels of 0 and 1 are drawn anew at each use,
            "mnist-static", whose were drawn once, and "frey", those that are wanted.
        mnist: a folder as :func:`vae_fast.datasets.mnist` takes it; None: the bundled one.
        frey: the file of Frey Face, which is not bundled.
    """
    found, notes = {}, []
    for name in dict.fromkeys(names):
        if name == "frey" and (frey is None or not Path(frey).exists()):
            why = "no file was given" if frey is None else f"there is no file {os.fspath(frey)}"
            notes.append(
                f"Frey Face is left out: {why}; wanted --frey FILE with its 1965 frames, uint8 [1965, 560]."
            )
            continue
        likelihood = "gaussian" if name == "frey" else "bernoulli"
        targets = {"mnist-dynamic": "dynamic", "mnist-static": "binary"}.get(name, "real")
        parts: Sequence[Tensor] = datasets.frey(frey or "") if name == "frey" else datasets.mnist(mnist)
        if name == "mnist-static":
            generator = torch.Generator().manual_seed(0)
            parts = [torch.bernoulli(part / 256, generator=generator).to(torch.uint8) for part in parts]
        train, test = (
            datasets.prepare(part, likelihood=likelihood, targets=targets, pixel_scale=256, name=name)
            for part in parts
        )
        found[name] = train, test
    return found, notes


def advance(
    curves: Sequence[Curve],
    out: Path,
    data: Data,
    evaluate: Evaluate,
    *,
    samples: int,
    first: int = FIRST,
    seed: int = 0,
    device: str = "cpu",
    engine: str = "auto",
    progress: bool = True,
    draw_only: bool = False,
) -> dict[tuple[str, str], list[Point]]:
    """Trains what is missing of the curves; all their points, by (panel, algorithm).

    One after the other, but for those that the native engine can train side by side on a GPU. With
    ``draw_only`` nothing is trained and nothing written: a curve that has not begun has no points.

    Raises:
        CurveError: the folder holds another curve of that name; or with ``draw_only``, none of them.
        KeyboardInterrupt: after Ctrl-C; the same call goes on.
    """
    stops = points_to(samples, first)
    found: dict[tuple[str, str], list[Point]] = {}
    jobs: list[_Job] = []
    for curve in curves:
        folder = out / "curves" / curve.name
        train, test = data[curve.data]
        train = replace(train, values=train.values[: curve.rows])
        if not draw_only or (folder / SPEC).exists():
            _claim(folder, curve, train, seed)
        points = _read_points(folder)
        found[curve.panel, curve.algorithm] = points
        own = [stop for stop in stops if curve.has_point(stop)]
        if not draw_only and own and (not points or points[-1].samples < own[-1]):
            jobs.append(_Job(curve, folder, train, test, points, own))
    if draw_only and not any(found.values()):
        raise CurveError(f"{out}: found none of the curves, wanted one or more to draw")
    total = sum(job.stops[-1] - job.done for job in jobs)
    with _Progress(total, progress) as bar:
        for alike in _side_by_side(jobs, device, engine):
            _train(alike, evaluate, seed, device, engine, bar)
    return found


def model(curve: Curve, out: Path) -> VAE:
    """The trained model of a curve that :func:`advance` has made, on the CPU."""
    path = out / "curves" / curve.name / CHECKPOINT
    return ALGORITHMS[curve.algorithm].load(path, device="cpu").model


def settings(curves: Sequence[Curve], out: Path, **how: Any) -> dict[str, Any]:
    """What a figure was made with: JSON-able. Curves that have not begun are left out."""
    made = {}
    for curve in curves:
        folder = out / "curves" / curve.name
        if not (folder / CHECKPOINT).exists():
            continue
        meta = checkpoints.load(folder / CHECKPOINT)[1]
        made[curve.name] = {
            "samples": meta["samples_seen"] * curve.passes,
            "seconds": meta["seconds"],
            "settings": meta["settings"],
            "curve": json.loads((folder / SPEC).read_text(encoding="utf-8")),
        }
    return {**how, "curves": made, "versions": build_info()}


def unfinished(points: Mapping[tuple[str, str], Sequence[Point]], samples: int) -> list[str]:
    """A sentence that names the curves which end before ``samples``, or none."""
    stop = points_to(samples, first=0)[-1]
    short = [
        f"{panel} {algorithm} ({found[-1].samples if found else 0:,})"
        for (panel, algorithm), found in points.items()
        if not found or found[-1].samples < stop
    ]
    return [f"Trained for fewer than {stop:,} samples: {', '.join(short)}."] if short else []


# ---- the training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A curve that has not come to the last of its stops."""

    curve: Curve
    folder: Path
    train: Prepared
    test: Prepared
    points: list[Point]
    stops: Sequence[int]

    @property
    def done(self) -> int:
        return self.points[-1].samples if self.points else 0


def _side_by_side(jobs: Sequence[_Job], device: str, engine: str) -> list[list[_Job]]:
    """The jobs in groups that are trained at once: on a GPU models that differ in their latents alone."""
    groups: dict[Any, list[_Job]] = {}
    for job in jobs:
        key: Any = job.curve.name
        if device.startswith("cuda") and engine == "native" and job.curve.algorithm != "mcem":
            key = job.curve.algorithm, job.curve.data, job.curve.rows, job.done, tuple(job.stops)
        groups.setdefault(key, []).append(job)
    return list(groups.values())


def _train(
    jobs: Sequence[_Job], evaluate: Evaluate, seed: int, device: str, engine: str, bar: _Progress
) -> None:
    """Of several jobs all data and stops are the same."""
    trainers = [_trainer(job.curve, seed, device, engine) for job in jobs]
    for job, trainer in zip(jobs, trainers, strict=True):
        if (job.folder / CHECKPOINT).exists():
            trainer.resume(job.folder / CHECKPOINT)
        # A checkpoint is written before its point: where one is missing, it is the last.
        job.points[:] = [p for p in job.points if job.curve.datapoints(p.samples) <= trainer.samples_seen]
    if len({(trainer.samples_seen, job.done) for job, trainer in zip(jobs, trainers, strict=True)}) > 1:
        for job in jobs:  # killed between the checkpoint of one and that of another
            _train([job], evaluate, seed, device, engine, bar)
        return
    first, lead = jobs[0], trainers[0]
    train, test = first.train.to(lead.device), first.test.to(lead.device)
    for stop in first.stops:
        done = first.done
        if stop <= done:
            continue
        target, save_every = first.curve.datapoints(stop), max(1, SAVE_EVERY // first.curve.passes)
        while lead.samples_seen < target:
            before = lead.samples_seen
            end = min(target, (before // save_every + 1) * save_every)
            _go_on(jobs, trainers, train, end)
            bar.update((lead.samples_seen - before) * first.curve.passes * len(jobs))
        if lead.samples_seen > target:
            raise CurveError(
                f"{first.folder}: found a checkpoint at {lead.samples_seen * first.curve.passes:,} samples "
                f"and no point at {stop:,}, wanted all points up to it in {POINTS}; remove the folder to "
                "train this curve anew"
            )
        for job, trainer in zip(jobs, trainers, strict=True):
            online = _online(trainer, job.curve.datapoints(done))
            job.points.append(Point(stop, *evaluate(trainer, train, test, online)))
            _write_points(job.folder, job.points)
            bar.say(job.curve, job.points[-1])


def _go_on(jobs: Sequence[_Job], trainers: Sequence[Trainer], train: Prepared, end: int) -> None:
    """To ``end`` datapoints, and a checkpoint of each."""
    samples = end - trainers[0].samples_seen
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="train: these are not the data")
        warnings.filterwarnings("ignore", message="optimizer: Adagrad")  # the first point is there for that
        if len(jobs) == 1:
            path = jobs[0].folder / CHECKPOINT
            trainers[0].fit(train, max_samples=samples, report_every=end, checkpoint=path, progress=False)
            return
        files = [job.folder / CHECKPOINT for job in jobs]
        sweep(trainers, train, max_samples=samples, report_every=end, checkpoints=files, progress=False)


def _write_points(folder: Path, points: Sequence[Point]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Point.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in points)
    write_atomically(folder / POINTS, text.getvalue().encode())


def _trainer(curve: Curve, seed: int, device: str, engine: str) -> Trainer:
    options = {**curve.preset.trainer_options, "seed": seed, "device": device}
    if curve.algorithm != "mcem" or engine != "native":  # which has no step of Monte Carlo EM
        options["engine"] = engine
    return ALGORITHMS[curve.algorithm](curve.preset.model(seed=seed), **options)


def _online(trainer: Trainer, since: int) -> float:
    """The mean bound of the minibatches after so many samples, as the parameters moved."""
    total, before = 0.0, 0
    for row in trainer.history:
        if row.samples > since:
            total += (row.samples - before) * row.train_bound
        before = row.samples
    return total / (before - since)


def _claim(folder: Path, curve: Curve, train: Prepared, seed: int) -> None:
    """Writes what the curve is, or refuses a folder of another one."""
    source = ArraySource(train, batch_size=100, seed=seed, order="replacement", device=train.values.device)
    spec: dict[str, Any] = {
        "panel": curve.panel,
        "algorithm": curve.algorithm,
        "seed": seed,
        "model": curve.preset.model_options,
        "training": curve.preset.trainer_options,
        "train": {"note": train.note, "rows": len(train), "sha256": source.fingerprint()},
    }
    if curve.passes != 1:
        spec["passes"] = curve.passes
    path = folder / SPEC
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        for name, value in spec.items():
            if theirs.get(name) != value:
                raise CurveError(
                    f"{folder}: found a curve with {name} {theirs.get(name)!r}, wanted {value!r}; "
                    "choose another --out"
                )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(spec, indent=1) + "\n").encode())


def _read_points(folder: Path) -> list[Point]:
    path = folder / POINTS
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Point(int(row["samples"]), float(row["train"]), float(row["test"])) for row in rows]


class _Progress:
    """A bar over all curves with the time left; a line per point where stderr is no terminal."""

    def __init__(self, total: int, shown: bool) -> None:
        self._lines = shown and not sys.stderr.isatty()
        self._total, self._done, self._began = total, 0, time.monotonic()
        self._bar = tqdm(
            total=total,
            disable=not shown or self._lines,
            file=sys.stderr,
            unit=" samples",
            unit_scale=True,
            dynamic_ncols=True,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, samples: int) -> None:
        self._done += samples
        self._bar.update(samples)

    def say(self, curve: Curve, point: Point) -> None:
        text = f"{curve.name} {point.samples:,}: train {point.train:.2f}, test {point.test:.2f}"
        self._bar.set_postfix_str(text)
        if self._lines:
            spent = time.monotonic() - self._began
            left = spent * (self._total - self._done) / max(self._done, 1)
            share = self._done / max(self._total, 1)
            print(f"{share:4.0%}, {left / 60:.1f} min left  {text}", file=sys.stderr, flush=True)
