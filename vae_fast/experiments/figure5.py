"""Figure 5: samples from models of MNIST with 2, 5, 10 and 20 latent variables: E[x|z] for z ~ N(0, I)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import plots
from . import curves, figure2, sheets
from .curves import FIRST, FULL

LATENTS = (2, 5, 10, 20)
SIDE = 10  # images on a side


def run(
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    mnist: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    engine: str = "auto",
    first: int = FIRST,
    progress: bool = True,
    command: str = "",
    draw_only: bool = False,
) -> dict[str, Any]:
    """Trains what is missing, and writes figure5.json, .png and .html into ``out``; returns what the JSON
    holds.

    Arguments and errors are those of :func:`vae_fast.experiments.figure2.run`; a model that another figure
    has trained in the same ``out`` is taken from there.
    """
    data, notes = curves.load_data(["mnist"], mnist, None)
    keys = [f"mnist-{latent}" for latent in LATENTS]
    samples = round(scale * FULL)
    made, short = sheets.train(keys, out, data, samples, first, seed, device, engine, progress, draw_only)
    pictures = {
        f"{model.latent_dim} latents": plots.tile(model.sample(SIDE**2, seed=seed), None, SIDE, gap=0)
        for model in made.values()
    }
    settings = curves.settings(
        [figure2.curve(key) for key in keys], Path(out), scale=scale, seed=seed, device=device
    )
    return sheets.write(
        "figure5",
        "Figure 5: samples from the prior",
        "E[x | z] for draws of z from N(0, I).",
        pictures,
        settings,
        [*notes, *short],
        Path(out),
        command,
    )
