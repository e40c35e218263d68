"""Which minibatches, units and step size are those of the paper's curves of Frey Face?

python frey_settings.py FREY.npz figure2.csv

Trains with several settings to the first points that the paper draws, and prints theirs and ours. A "train"
of the paper's is the mean bound since the point before, so that its first one has all that happened until
then: the first 100 steps, in which Adagrad only accumulates and the bound is -526, weigh in it.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from math import gcd

from vae_fast import presets
from vae_fast.algorithms import WakeSleep
from vae_fast.datasets import Prepared
from vae_fast.experiments import curves
from vae_fast.trainer import Trainer

MOST = 1_700_000  # samples
SETTINGS = [(units, 500, lr) for units in ("tanh", "softplus") for lr in (0.01, 0.02)]
SETTINGS += [("tanh", 100, 0.02), ("softplus", 100, 0.02)]
NAMES = {"AEVB": Trainer, "WS": WakeSleep}


def drawn(path: str) -> dict[tuple[str, int], dict[int, dict[str, float]]]:
    """(curve, latents) to samples to the values of train and test."""
    found: dict[tuple[str, int], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with open(path, encoding="utf-8") as lines:
        for panel, curve, samples, bound in list(csv.reader(lines))[1:]:
            if panel.startswith("Frey"):
                name, part = curve.rstrip(")").split("(")
                found[name, int(panel.split("=")[1])][int(samples)][part] = float(bound)
    return found


def train(
    data: tuple[Prepared, Prepared],
    name: str,
    latents: int,
    units: str,
    batch: int,
    lr: float,
    marks: Sequence[int],
) -> str:
    """Cells of "train test" at the marks."""
    preset = presets.paper_frey(latents, wake_sleep=name == "WS").but(
        {"activation": units}, lr=lr, batch_size=batch
    )
    options = {k: v for k, v in preset.trainer_options.items() if name == "AEVB" or k != "num_samples"}
    trainer = NAMES[name](preset.model(seed=0), **options, seed=0)
    cells, before = [], 0
    for mark in marks:
        steps = mark - before
        last = trainer.fit(*data, max_samples=steps, report_every=steps, progress=False).last
        cells.append(f"{last.train_bound:.0f} {last.test_bound:.0f}")
        before = mark
    return " | ".join(cells)


def main(argv: Sequence[str]) -> None:
    data = curves.load_data(["frey"], None, argv[0])[0]["frey"]
    for (name, latents), points in sorted(drawn(argv[1]).items()):
        print(f"{name}, {latents} latents: the paper's numbers of samples have {gcd(*points)} in common")
        if latents not in (2, 20):
            continue
        marks = [samples for samples in sorted(points) if samples <= MOST][:3]
        print("| train, test at | " + " | ".join(f"{mark:,}" for mark in marks) + " |")
        print("|---" * (len(marks) + 1) + "|")
        shown = [[points[mark].get(part) for part in ("train", "test")] for mark in marks]
        cells = [" ".join("-" if value is None else f"{value:.0f}" for value in both) for both in shown]
        print("| paper | " + " | ".join(cells) + " |", flush=True)
        for units, batch, lr in SETTINGS:
            values = train(data, name, latents, units, batch, lr, marks)
            print(f"| {units}, {batch}, lr {lr} | {values} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
