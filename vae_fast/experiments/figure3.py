"""Figure 3: the marginal likelihood against training samples, for 1000 and 50,000 training datapoints of
MNIST; auto-encoding variational Bayes, wake-sleep and Monte Carlo EM, 100 hidden units and 3 latents.

Samples are datapoints of minibatches. A step of Monte Carlo EM takes the whole training set and looks at
every datapoint 15 times, which count: as in the paper's drawing, whose points are multiples of 15 N samples
apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .. import evaluation, presets
from ..datasets import Prepared
from ..trainer import Trainer
from . import curves, page
from .curves import FULL, Curve, CurveError, Point
from .page import Panel, Result, Verdict

PANELS = {"n-1000": 1000, "n-50000": 50_000}
ALGORITHMS = ("aevb", "wake-sleep", "mcem")
FIRST = 100_000  # a look takes seconds
JUDGED_AT = 10_000_000
TOLERANCE = 3.0  # nats
LR = 0.1  # of 0.01, 0.02 and 0.1, which the paper chose from by the first iterations
MCEM_PASSES = 15  # 10 leapfrog steps and 5 updates


def run(
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    panels: Sequence[str] = tuple(PANELS),
    mnist: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    engine: str = "auto",
    first: int = FIRST,
    progress: bool = True,
    command: str = "",
    draw_only: bool = False,
) -> Result:
    """Trains what is missing of the curves, and writes figure3.csv, .json, .md, .png and .html into ``out``.

    Arguments and errors are those of :func:`vae_fast.experiments.figure2.run`; scale 1 is 10^8 samples, of
    which the paper draws 60 to 116 millions.
    """
    for panel in panels:
        if panel not in PANELS:
            raise CurveError(f"panels: got {panel!r}, wanted some of {', '.join(PANELS)}")
    chosen = [panel for panel in PANELS if panel in panels]
    if not chosen:
        raise CurveError("panels: got none, wanted one or more")
    data, notes = curves.load_data(["mnist"], mnist, None)
    folder = Path(out)
    wanted = [curve(panel, algorithm) for panel in chosen for algorithm in ALGORITHMS]
    points = curves.advance(
        wanted,
        folder,
        data,
        likelihoods,
        samples=round(scale * FULL),
        first=first,
        seed=seed,
        device=device,
        engine=engine,
        progress=progress,
        draw_only=draw_only,
    )
    result = Result(
        name="figure3",
        title="Figure 3: the marginal likelihood while training",
        caption="Colour: ours; grey: the paper’s drawing. Appendix D’s estimate of log p(x) over the first "
        "1000 datapoints of the training and of the test data. One seed.",
        rows=[[Panel(key, f"N = {PANELS[key]:,}", f"Ntrain={PANELS[key]}") for key in chosen]],
        points=points,
        verdicts=verdicts(points),
        settings=curves.settings(wanted, folder, scale=scale, seed=seed, device=device),
        notes=[*notes, *curves.unfinished(points, round(scale * FULL))],
        log_axis=False,
    )
    page.write(result, folder, command)
    return result


def curve(panel: str, algorithm: str) -> Curve:
    """Such as ("n-1000", "mcem")."""
    preset = presets.paper_mnist(3, hidden_dim=100, wake_sleep=algorithm == "wake-sleep").but(lr=LR)
    rows, passes = PANELS[panel], 1
    if algorithm == "mcem":
        preset, passes = preset.but(batch_size=rows, order="shuffle"), MCEM_PASSES
    return Curve(panel, algorithm, preset, "mnist", rows, passes)


def likelihoods(trainer: Trainer, train: Prepared, test: Prepared, online: float) -> tuple[float, float]:
    """(train, test) of a point."""
    found = evaluation.figure3_likelihoods(trainer.model, train, test, seed=trainer.settings.seed)
    return found[0].mean, found[1].mean


def verdicts(points: dict[tuple[str, str], list[Point]]) -> list[Verdict]:
    """With 1000 training datapoints: near the paper's curves, and Monte Carlo EM no worse than AEVB."""
    panel = Panel("n-1000", "N = 1,000", "Ntrain=1000")
    mine = {algorithm: ps for (key, algorithm), ps in points.items() if key == panel.key and ps}
    found = []
    for algorithm, ps in mine.items():
        for part in page.PARTS:
            drawn = page.paper("figure3", panel, algorithm, part)
            theirs = None if drawn is None else drawn.at(JUDGED_AT)
            ours = next((getattr(p, part) for p in ps if p.samples == JUDGED_AT), None)
            bar = f"{panel.title}: {page.LABELS[algorithm]} {part} within 3 of the paper at 10⁷"
            if ours is None or theirs is None:
                found.append(Verdict(bar, f"trained for {ps[-1].samples:,} samples", None))
            else:
                off = ours - theirs
                side = "above" if off >= 0 else "below"
                found.append(Verdict(bar, f"{abs(off):.2f} {side}", abs(off) <= TOLERANCE))
    if {"aevb", "mcem"} <= mine.keys():
        aevb = {p.samples: p.test for p in mine["aevb"]}
        for last in [p for p in mine["mcem"] if p.samples in aevb][-1:]:
            off = last.test - aevb[last.samples]
            side = "above" if off >= 0 else "below"
            found.append(
                Verdict(
                    f"{panel.title}: Monte Carlo EM test at or above AEVB at the end",
                    f"{abs(off):.2f} {side}, at {last.samples:,}",
                    off >= 0 if last.samples >= JUDGED_AT else None,
                )
            )
    return found
