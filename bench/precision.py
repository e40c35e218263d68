"""What the precisions of the native engine do to a training of the paper's MNIST model.

Adagrad 0.02, minibatches of 100.

python -m bench.precision exact [--steps 6000] [--device cuda] [--out DIR]
    "exact" against the reference engine in float64, same seed, order and noise: how far the means over 100
    steps are apart at most (bar 0.05 nat), and the bounds over the test set at the end (bar 0.02).
python -m bench.precision fast [--steps 6000] [--seeds 16] [--init lecun] [--device cuda] [--out DIR]
    "fast" against "exact", by pairs of equal seeds: the mean difference of the test bound with its 95 %
    interval (bar: the interval within 0.3 nat). Two trainings soon have nothing in common but their setting,
    so that the difference is as wide as that of two seeds: less from initial weights of variance 1 / inputs
    ("lecun", as in figure 2) than from the paper's.

Each prints its result and writes DIR/precision-<what>.json, with -<init> where that is not "paper".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import machine

BLOCK = 100  # steps


def trainer(
    seed: int,
    precision: str = "exact",
    engine: str = "native",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    init: str = "paper",
) -> Any:
    import vae_fast

    model = vae_fast.VAE(784, [500], 20, init=init, seed=seed).to(dtype)  # drawn in float32: the same in both
    return vae_fast.Trainer(
        model,
        optimizer="adagrad",
        lr=0.02,
        batch_size=100,
        seed=seed,
        order="replacement",
        engine=engine,
        precision=precision,
        device=device,
    )


def exact(steps: int, device: str, init: str) -> dict[str, Any]:
    """The largest differences from float64."""
    import vae_fast

    train, test = vae_fast.datasets.mnist()
    samples, curves, bounds = 100 * steps, {}, {}
    for name, made in {
        "native exact": trainer(0, device=device, init=init),
        "modules": trainer(0, engine="modules", device=device, init=init),
        "float64": trainer(0, engine="reference", dtype=torch.float64, device=device, init=init),
    }.items():
        history = made.fit(train, max_samples=samples, report_every=100 * BLOCK, progress=False)
        curves[name] = np.array([row.train_bound for row in history])
        prepared = vae_fast.datasets.prepare(test, likelihood="bernoulli")
        bounds[name] = vae_fast.evaluation.bound(made.model, prepared, seed=0).elbo
    return {
        name: {
            "largest difference of a mean over 100 steps": float(
                np.abs(curves[name] - curves["float64"]).max()
            ),
            "difference of the test bound": abs(bounds[name] - bounds["float64"]),
            "test bound": bounds[name],
        }
        for name in curves
    }


def fast(steps: int, seeds: int, device: str, init: str) -> dict[str, Any]:
    """Differences of the test bound, fast - exact, seed by seed."""
    import vae_fast

    train, test = vae_fast.datasets.mnist()
    precisions = ("exact", "fast")
    pairs = [(seed, each) for seed in range(seeds) for each in precisions]
    trainers = [trainer(*pair, device=device, init=init) for pair in pairs]
    histories = vae_fast.sweep(
        trainers, train, test, max_samples=100 * steps, report_every=100 * steps, progress=False
    )
    bounds = np.array([history.last.test_bound for history in histories]).reshape(seeds, 2)
    differences = bounds[:, 1] - bounds[:, 0]
    half = student_quantile(seeds - 1) * differences.std(ddof=1) / math.sqrt(seeds)
    return {
        "exact": bounds[:, 0].tolist(),
        "fast": bounds[:, 1].tolist(),
        "mean difference": float(differences.mean()),
        "95 % interval": [float(differences.mean() - half), float(differences.mean() + half)],
        "standard deviation of a difference": float(differences.std(ddof=1)),
    }


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 1e-3 from 10 degrees of freedom on.

    Abramowitz & Stegun 26.7.5.
    """
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.precision", description="What precisions do to a training."
    )
    parser.add_argument("what", choices=("exact", "fast"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--init", choices=("paper", "lecun"), default="paper", help="initial weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.what == "exact":
        found = exact(given.steps, given.device, given.init)
    else:
        found = fast(given.steps, given.seeds, given.device, given.init)
    command = "python -m bench.precision " + " ".join(sys.argv[1:] if arguments is None else arguments)
    result = {
        **machine.describe(command),
        "machine": machine.name(torch.device(given.device)),
        "results": found,
    }
    print(json.dumps(found, indent=2))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        name = given.what if given.init == "paper" else f"{given.what}-{given.init}"
        (given.out / f"precision-{name}.json").write_text(
            json.dumps(result, indent=2) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
