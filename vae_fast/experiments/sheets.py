"""What figures 4 and 5 show and write: pictures of trained models, side by side."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import plots, report
from ..nn import VAE
from ..report import write_atomically
from . import curves, figure2
from .page import settings_section

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def train(
    keys: Sequence[str],
    out: str | os.PathLike[str],
    data: curves.Data,
    samples: int,
    first: int,
    seed: int,
    device: str,
    engine: str,
    progress: bool,
    draw_only: bool,
) -> tuple[dict[str, VAE], list[str]]:
    """The models of these panels of figure 2, trained so far as they are not, and notes for the page.

    With ``draw_only`` they are as they are, and what has not begun is left out.
    """
    wanted = [figure2.curve(key) for key in keys]
    how: dict[str, Any] = {"samples": samples, "first": first, "seed": seed, "device": device}
    how["engine"] = engine
    how |= {"progress": progress, "draw_only": draw_only}
    points = curves.advance(wanted, Path(out), data, figure2.bounds, **how)
    models = {c.panel: curves.model(c, Path(out)) for c in wanted if points[c.panel, c.algorithm]}
    return models, curves.unfinished(points, samples)


def write(
    name: str,
    title: str,
    caption: str,
    pictures: Mapping[str, NDArray[np.uint8]],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    folder: Path,
    command: str,
) -> dict[str, Any]:
    """<name>.json, .png and .html; what the JSON holds."""
    payload = io.BytesIO()
    plot(pictures).savefig(payload, format="png")
    content = {**settings, "notes": list(notes)}
    text = json.dumps(content, indent=1) + "\n"
    body = [
        f"<header>\n<h1>{escape(title)}</h1>\n<p>Kingma &amp; Welling, arXiv:1312.6114</p>\n</header>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        report._section("Ours", report._inline(plot(pictures)), escape(caption)),
        settings_section(settings),
        report._commands(command, ""),
    ]
    html = report.document(title, "\n".join(filter(None, body)))
    for suffix, whole in (("json", text.encode()), ("png", payload.getvalue()), ("html", html.encode())):
        write_atomically(folder / f"{name}.{suffix}", whole)
    return content


def plot(pictures: Mapping[str, NDArray[np.uint8]]) -> Figure:
    """Side by side, of one height."""
    shapes = [pixels.shape[1] / pixels.shape[0] for pixels in pictures.values()]
    width = min(10.4, 5.2 * len(shapes))
    figure = plots._figure(width, width / sum(shapes) + 0.4)
    axes = figure.subplots(1, len(shapes), squeeze=False, width_ratios=shapes)[0]
    for ax, (title, pixels) in zip(axes, pictures.items(), strict=True):
        ax.set_axis_off()
        ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=plots.INK, pad=8)
        ax.imshow(pixels, interpolation="none")
    return figure
