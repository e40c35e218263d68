"""Figure 4: the manifold that a model of two latent variables has learned, for Frey Face and MNIST.

Images are E[x|z] at the quantiles z = Phi^-1((i + 1/2) / n) of the prior, so that each stands for an equal
share of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import plots, uses
from . import curves, figure2, sheets
from .curves import FIRST, FULL, CurveError

GRIDS = {"frey-2": ("Frey Face", 10), "mnist-2": ("MNIST", 20)}  # images on a side, as in the paper


def run(
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    mnist: str | os.PathLike[str] | None = None,
    frey: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    engine: str = "auto",
    first: int = FIRST,
    progress: bool = True,
    command: str = "",
    draw_only: bool = False,
) -> dict[str, Any]:
    """Trains what is missing, and writes figure4.json, .png and .html into ``out``; returns what the JSON
    holds.

    Arguments and errors are those of :func:`vae_fast.experiments.figure2.run`; a model that another figure
    has trained in the same ``out`` is taken from there.
    """
    data, notes = curves.load_data(["frey", "mnist"], mnist, frey)
    chosen = [key for key in GRIDS if key.split("-")[0] in data]
    if not chosen:
        raise CurveError(" ".join(notes))
    samples = round(scale * FULL)
    made, short = sheets.train(chosen, out, data, samples, first, seed, device, engine, progress, draw_only)
    pictures = {}
    for key, model in made.items():
        name, n = GRIDS[key]
        pictures[f"{name}, {n} × {n}"] = plots.tile(uses.manifold(model, n), None, n, gap=0)
    settings = curves.settings(
        [figure2.curve(key) for key in chosen], Path(out), scale=scale, seed=seed, device=device
    )
    return sheets.write(
        "figure4",
        "Figure 4: learned manifolds",
        "E[x | z] at the quantiles (i + ½) / n of the prior of two latent variables.",
        pictures,
        settings,
        [*notes, *short],
        Path(out),
        command,
    )
