"""Which pixels did the paper train on? Figure 2's MNIST curve of 20 latents, with each treatment of them.

A Bernoulli decoder takes real pixels in [0, 1] as targets, or pixels of 0 and 1 drawn from them: anew
whenever an image is used (dynamic), or once for all (static). The paper does not say which it took. Static
pixels can be learned by heart, so the gap between the training and the test bound tells them apart, and so
does the height of the curve.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import curves, figure2, page
from .curves import FIRST, FULL, Curve, Point
from .page import Panel, Result, Verdict

PANEL = "mnist-20"
DRAWN = "MNIST Nz=20"
TREATMENTS = ("real", "dynamic", "static")
HEIGHT, GAP = 2.0, 1.0  # nats; two seeds of such a curve differ by as much


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
) -> Result:
    """Trains what is missing of the curves, and writes pixels.csv, .json, .md, .png and .html into ``out``.

    Arguments and errors are those of :func:`vae_fast.experiments.figure2.run`, whose curve of real pixels
    this one is.
    """
    data, notes = curves.load_data([data_of(treatment) for treatment in TREATMENTS], mnist, None)
    folder = Path(out)
    wanted = [curve(treatment) for treatment in TREATMENTS]
    points = curves.advance(
        wanted,
        folder,
        data,
        figure2.bounds,
        samples=round(scale * FULL),
        first=first,
        seed=seed,
        device=device,
        engine=engine,
        progress=progress,
        draw_only=draw_only,
    )
    result = Result(
        name="pixels",
        title="Which pixels did the paper train on?",
        caption="Colour: ours, with pixels as they are, drawn anew at each use, or drawn once; grey: the "
        "paper’s drawing, MNIST with 20 latents. Test: the bound over the test data, one sample of z each. "
        "Train: the mean bound of the minibatches since the point before. One seed.",
        rows=[[Panel(curve(name).panel, f"{name} pixels", DRAWN) for name in TREATMENTS]],
        points=points,
        verdicts=verdicts(points),
        settings=curves.settings(wanted, folder, scale=scale, seed=seed, device=device),
        notes=[*notes, *curves.unfinished(points, round(scale * FULL))],
        figure="figure2",
    )
    page.write(result, folder, command)
    return result


def data_of(treatment: str) -> str:
    """Its name in :func:`vae_fast.experiments.curves.load_data`."""
    return "mnist" if treatment == "real" else f"mnist-{treatment}"


def curve(treatment: str) -> Curve:
    like = figure2.curve(PANEL)
    panel = PANEL if treatment == "real" else f"{PANEL}-{treatment}"
    return Curve(panel, like.algorithm, like.preset, data_of(treatment))


def verdicts(points: dict[tuple[str, str], list[Point]]) -> list[Verdict]:
    """Of each treatment: could the drawing be of it? By the test bound, and by what training is above it."""
    found = []
    for treatment in TREATMENTS:
        panel = Panel(curve(treatment).panel, "", DRAWN)
        bar = f"{treatment} pixels: test within {HEIGHT:g} of the paper’s, train − test within {GAP:g}"
        ours = points.get((panel.key, "aevb"), [])
        drawn = [page.paper("figure2", panel, "aevb", part) for part in ("train", "test")]
        theirs = [None if d is None or not ours else d.at(ours[-1].samples) for d in drawn]
        if theirs[0] is None or theirs[1] is None:
            found.append(Verdict(bar, f"trained for {ours[-1].samples if ours else 0:,} samples", None))
            continue
        last = ours[-1]
        off, gap, drawn_gap = last.test - theirs[1], last.train - last.test, theirs[0] - theirs[1]
        said = f"test {off:+.2f}, train − test {gap:+.2f} for {drawn_gap:+.2f}, at {last.samples:,}"
        near = abs(off) <= HEIGHT and abs(gap - drawn_gap) <= GAP
        judged = last.samples >= figure2.JUDGED_AT
        found.append(Verdict(bar, said.replace("-", "−"), near if judged else None))
    return found
