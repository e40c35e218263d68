"""Figures of a training run, each a pure function that returns a matplotlib Figure.

Nothing is shown and no global state of pyplot is touched: ``figure.savefig("curves.svg")`` draws one.
matplotlib is imported when a figure is made, so the package works without it.

Colours say whose numbers they are: blue the test data, vermilion the training data, grey the paper. They are
from the palette of Okabe & Ito, which colour-blind readers can tell apart. Every bound is in nats per
datapoint.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from . import uses
from .uses import most_active as most_active

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .trainer import History

_Floats: TypeAlias = NDArray[np.float64]
_Pixels: TypeAlias = NDArray[np.uint8]

INK = "#1f2328"  # text
QUIET = "#6e7781"  # axes, ticks, and the paper's curve
FAINT = "#e3e6ea"  # grid lines and what is switched off
TEST = "#0072b2"
TRAIN = "#d55e00"
ACTIVE_THRESHOLD = 0.01  # Var_x(E_q[z]) of a unit in use; Burda, Grosse & Salakhutdinov, arXiv:1509.00519

_SMALLEST_GUESS = 8  # a table of 16 columns is no 4 x 4 image; 8 x 8 digits are images


class DrawnCurve(NamedTuple):
    """A curve as the paper's figures 2 and 3 draw it: float64 ``[n]`` each, samples increasing."""

    samples: _Floats
    values: _Floats

    def at(self, samples: float) -> float | None:
        """The drawn value at a number of samples, linear in log(samples); None outside the drawing."""
        if not self.samples[0] <= samples <= self.samples[-1]:
            return None
        return float(np.interp(math.log(samples), np.log(self.samples), self.values))


@functools.cache
def drawn_curves(figure: str) -> dict[tuple[str, str], DrawnCurve]:
    """All curves of the paper's "figure2" or "figure3", by the names of panel and curve in its drawing.

    Such names are ("MNIST Nz=20", "AEVB(test)") and ("Ntrain=1000", "MCEM(train)"); values are nats per
    datapoint.

    Source: Kingma & Welling, arXiv:1312.6114, figures 2 and 3, read from the vector drawings.
    """
    file = importlib.resources.files("vae_fast") / "data" / "paper" / f"{figure}.csv"
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with file.open(encoding="utf-8") as lines:
        for panel, curve, samples, value in list(csv.reader(lines))[1:]:
            found.setdefault((panel, curve), []).append((float(samples), float(value)))
    return {key: DrawnCurve(*np.array(points).T) for key, points in found.items()}


class PaperCurve(NamedTuple):
    """The paper's test bound of AEVB on MNIST as drawn in its figure 2: float64 ``[n]`` each, samples
    increasing.
    """

    latent_dim: int
    samples: _Floats
    test_bound: _Floats

    def at(self, samples: float) -> float | None:
        """As :meth:`DrawnCurve.at`."""
        return DrawnCurve(self.samples, self.test_bound).at(samples)


def paper_curve(latent_dim: int | None) -> PaperCurve | None:
    """The paper's curve for so many latent variables: 3, 5, 10, 20 or 200; None for others.

    It is of :func:`drawn_curves`. 500 hidden units, real-valued pixels, minibatches of 100, one posterior
    sample.
    """
    drawn = drawn_curves("figure2").get((f"MNIST Nz={latent_dim}", "AEVB(test)"))
    return None if latent_dim is None or drawn is None else PaperCurve(latent_dim, *drawn)


# ---- curves ------------------------------------------------------------------------------------------------


def curves(history: History, paper: PaperCurve | None = None) -> Figure:
    """The bound against samples seen, on the logarithmic axis of the paper's figure 2, and its two terms
    beside it.

    Args:
        history: of a training; train values are means since the row before, test values are over the whole
            test set.
        paper: drawn as a thin grey line where it overlaps the history; see :func:`paper_curve`.

    Raises:
        ValueError: the history is empty.
    """
    if not len(history):
        raise ValueError("history: got an empty one, wanted at least one row: call fit first")
    columns = history.to_dict()
    samples = np.array(columns["samples"], dtype=np.float64)
    figure = _figure(9.4, 4.0)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.75, 1))
    whole = figure.add_subplot(grid[:, 0])
    rest = [figure.add_subplot(grid[row, 1]) for row in (0, 1)]
    panels = [
        (whole, "bound", 1, "Variational bound"),
        (rest[0], "log_likelihood", -1, "Reconstruction term, −log p(x|z)"),
        (rest[1], "kl", 1, "KL divergence from the prior"),
    ]
    shared: dict[str, Any] = {}
    for ax, term, sign, title in panels:
        _style(ax, title)
        drawn = []
        for name, colour in (("train", TRAIN), ("test", TEST)):
            values = sign * np.array(columns[f"{name}_{term}"], dtype=np.float64)
            if np.isfinite(values).any():
                drawn.append(values)
                marker = "o" if len(samples) <= 40 else ""
                label = f"{name}  {_nats(_last(values))}"
                ax.plot(samples, values, color=colour, lw=1.8, marker=marker, ms=3, label=label, zorder=3)
        _sample_axis(ax, samples)
        _frame_values(ax, samples, drawn)
        if ax is whole and paper is not None:
            _draw_paper(ax, paper, samples)
        shared[term] = ax
    whole.set_ylabel("nats per datapoint", color=QUIET)
    for ax in rest:
        ax.set_ylabel("nats", color=QUIET)
    for ax in (whole, rest[1]):
        ax.set_xlabel("training samples seen", color=QUIET)
    rest[0].tick_params(labelbottom=False)
    order = whole.get_legend_handles_labels()
    if order[0]:
        ranked = sorted(zip(*order, strict=True), key=lambda item: item[1].split()[0] != "test")
        handles, labels = zip(*ranked, strict=True)
        whole.legend(
            handles, labels, loc="lower right", frameon=False, fontsize=9, labelcolor=INK, handlelength=1.6
        )
    return figure


def _draw_paper(ax: Axes, paper: PaperCurve, samples: _Floats) -> None:
    inside = (paper.samples >= samples.min()) & (paper.samples <= samples.max())
    x, y = paper.samples[inside], paper.test_bound[inside]
    end = paper.at(float(samples.max()))
    if end is None:
        return
    x, y = np.append(x, samples.max()), np.append(y, end)
    label = f"paper, test  {_nats(end)}"
    ax.plot(x, y, color=QUIET, lw=1.2, ls=(0, (4, 2)), label=label, zorder=2)


def _sample_axis(ax: Axes, samples: _Floats) -> None:
    """A logarithmic axis marked at 1, 2, 5, 10, ... or in equal steps where it is too short for those."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = float(samples.min()), float(samples.max())
    if low == high:
        low, high = low / 2, high * 2
    pad = (high / low) ** 0.03
    ax.set_xscale("log")
    ax.set_xlim(low / pad, high * pad)
    digits = (1, 2, 5) if high < 300 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [digit * 10.0**power for power in powers for digit in digits]
    marks = [mark for mark in marks if low / pad <= mark <= high * pad]
    if len(marks) < 2:
        marks = [float(mark) for mark in MaxNLocator(4).tick_values(low, high)]
    ax.xaxis.set_major_locator(FixedLocator(marks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    ax.xaxis.set_minor_locator(NullLocator())


def _frame_values(ax: Axes, samples: _Floats, curves: Sequence[_Floats]) -> None:
    """The first moves of a training are so large that they would flatten the rest: they leave the frame."""
    if not curves:
        return
    settled = np.concatenate([values[samples >= 0.1 * samples.max()] for values in curves])
    everything = np.concatenate(list(curves))
    settled, everything = settled[np.isfinite(settled)], everything[np.isfinite(everything)]
    if not settled.size:
        return
    span = max(float(np.ptp(settled)), 1e-2 * abs(float(settled[-1])), 1e-6)
    low = max(float(everything.min()), float(settled.min()) - 0.6 * span)
    high = min(float(everything.max()), float(settled.max()) + 0.6 * span)
    ax.set_ylim(low - 0.06 * span, high + 0.06 * span)


# ---- images ------------------------------------------------------------------------------------------------


def image_shape(data_dim: int) -> tuple[int, int] | None:
    """A guess at (height, width): a square of 8 x 8 pixels or more, Frey Face's 28 x 20; None if it is
    neither.
    """
    if data_dim == 560:
        return 28, 20
    side = math.isqrt(data_dim)
    return (side, side) if side >= _SMALLEST_GUESS and side * side == data_dim else None


def tile(
    images: Any,
    shape: Sequence[int] | None = None,
    ncols: int | None = None,
    *,
    gap: int = 1,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> _Pixels:
    """Images in rows, as pixels: image k stands in row k // ncols, column k % ncols.

    Args:
        images: ``[N, D]``; values of ``value_range`` run from black to white, others are clipped.
        shape: (height, width) or (height, width, 3), D being their product; guessed when left out, see
            :func:`image_shape`.
        ncols: images in a row; as square a picture as may be when left out.
        gap: transparent pixels between images.

    Returns:
        RGBA uint8 ``[rows * (height + gap) - gap, ncols * (width + gap) - gap, 4]``; places without an image
        are transparent.

    Raises:
        ValueError: D does not fit the shape, or no shape can be guessed.
    """
    rows = _rows("images", images)
    height, width, channels = _checked_shape(rows.shape[1], shape)
    columns = ncols or math.ceil(math.sqrt(len(rows) * height / width))
    if columns < 1:
        raise ValueError(f"ncols: got {ncols}, wanted a positive integer")
    columns = columns if ncols else min(columns, len(rows))
    lines = -(-len(rows) // columns)
    low, high = value_range
    scaled = np.nan_to_num((rows - low) / ((high - low) or 1.0))
    values = np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8).reshape(-1, height, width, channels)
    cells = np.zeros((lines * columns, height + gap, width + gap, 4), dtype=np.uint8)
    cells[: len(rows), :height, :width, :3] = values
    cells[: len(rows), :height, :width, 3] = 255
    picture = cells.reshape(lines, columns, height + gap, width + gap, 4).swapaxes(1, 2)
    picture = picture.reshape(lines * (height + gap), columns * (width + gap), 4)
    return np.ascontiguousarray(picture[: picture.shape[0] - gap, : picture.shape[1] - gap])


def png(pixels: _Pixels) -> bytes:
    """RGBA uint8 ``[height, width, 4]``, as :func:`tile` returns, as a PNG file of exactly these pixels."""
    _need_matplotlib()
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()


def image_grid(
    images: Any,
    shape: Sequence[int] | None = None,
    ncols: int | None = None,
    *,
    title: str = "",
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Images ``[N, D]`` in a grid, row by row; arguments as for :func:`tile`."""
    return _picture(tile(images, shape, ncols, value_range=value_range), title)


def samples(
    model: Any,
    n: int = 100,
    *,
    seed: int = 0,
    image_shape: Sequence[int] | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Pixel means of n draws from the prior, as in the paper's figure 5; a square number fills a square."""
    side = math.isqrt(n)
    images, title = model.sample(n, seed=seed), f"{n} samples from the prior"
    columns = side if side * side == n else None
    return image_grid(images, image_shape, columns, title=title, value_range=value_range)


def reconstructions(
    x: Any,
    xhat: Any,
    image_shape: Sequence[int] | None = None,
    ncols: int = 10,
    *,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Each datapoint above its reconstruction, ``ncols`` pairs side by side; x and xhat ``[N, D]``."""
    title = "Data, and below each its reconstruction"
    return stacked({"x": x, "xhat": xhat}, image_shape, ncols, title=title, value_range=value_range)


def stacked(
    parts: Mapping[str, Any],
    image_shape: Sequence[int] | None = None,
    ncols: int = 10,
    *,
    title: str | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Image k of every part below that of the part before, such as noisy, denoised, clean.

    Args:
        parts: name to images, ``[N, D]`` each.
        title: the names, when left out.
    """
    title = ", ".join(parts).capitalize() if title is None else title
    return _picture(_bands(parts, image_shape, ncols, value_range), title)


def _bands(
    parts: Mapping[str, Any], shape: Sequence[int] | None, ncols: int, value_range: tuple[float, float]
) -> _Pixels:
    """Bands of one row per part, image k of each below that of the other; wider gaps keep bands apart."""
    images = {name: _rows(name, part) for name, part in parts.items()}
    (first_name, data), *others = images.items()
    for name, part in others:
        if part.shape != data.shape:
            raise ValueError(
                f"{name}: got shape {list(part.shape)}, wanted that of {first_name}, {list(data.shape)}"
            )
    height, width, channels = _checked_shape(data.shape[1], shape)
    columns = min(ncols, len(data))
    lines: list[_Pixels] = []
    for first in range(0, len(data), columns):
        gap = max(3, height // 4)
        for part in images.values():
            line = part[first : first + columns]
            picture = tile(line, (height, width, channels), columns, value_range=value_range)
            lines += [np.zeros((gap, picture.shape[1], 4), dtype=np.uint8)] if lines else []
            lines.append(picture)
            gap = 1
    return np.concatenate(lines)


def manifold(
    model: Any,
    n: int = 20,
    *,
    variance: Any = None,
    image_shape: Sequence[int] | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Pixel means over an n x n grid of latent values; arguments as for :func:`vae_fast.uses.manifold`."""
    images = uses.manifold(model, n, variance=variance)
    title = "The latent axis" if model.latent_dim == 1 else "The latent plane"
    if model.latent_dim > 2:
        first, second = most_active(variance)
        title = f"Most active latents ({first}, {second}), others at 0"
    return _picture(tile(images, image_shape, n, gap=0, value_range=value_range), title)


# ---- data that are no images -------------------------------------------------------------------------------


def feature_rows(panels: Mapping[str, Any]) -> Figure:
    """Datapoints as rows of a heat map, features as columns, one panel per entry, all on one scale.

    For data that are no images. Values in [0, 1] are shown as they are; others in standard deviations from
    the mean of their feature, both taken from the first panel.

    Args:
        panels: title to values ``[n, D]``; the first are the data.
    """
    values = {title: _rows(title, rows).astype(np.float64) for title, rows in panels.items()}
    first = next(iter(values.values()))
    shares = all(part.min() >= 0 and part.max() <= 1 for part in values.values())
    label, colours, limits = "value", "cividis", (0.0, 1.0)
    if not shares:
        mean, deviation = first.mean(axis=0), first.std(axis=0)
        deviation[deviation == 0] = 1
        values = {title: (part - mean) / deviation for title, part in values.items()}
        label, colours, limits = "standard deviations from the mean", "RdBu_r", (-3.0, 3.0)
    heights = [len(part) for part in values.values()]
    figure = _figure(9.4, 0.9 + sum(0.5 + min(1.6, 0.11 * height) for height in heights))
    axes = figure.subplots(len(values), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    image = None
    for ax, (title, part) in zip(axes, values.items(), strict=True):
        _style(ax, title)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.set_yticks([])
        ax.tick_params(length=0)
        image = ax.imshow(
            part, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="none"
        )
    axes[-1].set_xlabel("feature", color=QUIET)
    assert image is not None
    bar = figure.colorbar(
        image, ax=list(axes), shrink=min(1.0, 2.2 / figure.get_figheight()), aspect=18, pad=0.015
    )
    bar.set_label(label, color=QUIET, fontsize=9)
    bar.ax.tick_params(colors=QUIET, labelsize=8, length=0)
    bar.outline.set_visible(False)
    return figure


# ---- latent variables --------------------------------------------------------------------------------------


def latent_activity(variance: Any) -> Figure:
    """Var_x(E_q[z]) of every latent unit as bars, most active first, with the line of 0.01 above which one is
    in use.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    sizes = _rows("variance", variance).reshape(-1)
    order = np.argsort(-sizes, kind="stable")
    ordered = np.maximum(sizes[order], 0)
    active = int((ordered > ACTIVE_THRESHOLD).sum())
    floor = 1e-4
    figure = _figure(min(9.4, max(4.0, 1.6 + 0.4 * len(sizes))), 2.7)
    ax = figure.add_subplot()
    _style(ax, f"{active} of {len(sizes)} latent units in use")
    colours = [TEST if size > ACTIVE_THRESHOLD else QUIET for size in ordered]
    places = np.arange(len(sizes))
    ax.bar(places, np.maximum(ordered, floor) - floor, 0.72, bottom=floor, color=colours, zorder=3)
    ax.axhline(ACTIVE_THRESHOLD, color=QUIET, lw=1.2, ls=(0, (4, 2)), zorder=4)
    ax.set_yscale("log")
    ax.set_ylim(floor, max(2.0, 1.5 * float(ordered.max(initial=0))))
    ax.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("variance of E[z | x]", color=QUIET)
    ax.set_xlim(-0.8, max(len(sizes), 5) - 0.2)
    if len(sizes) <= 30:
        ax.set_xticks(places, [str(unit) for unit in order])
        ax.set_xlabel("latent unit, most active first", color=QUIET)
    else:
        step = 10 ** math.floor(math.log10(len(sizes) / 3))
        ranks = range(step, len(sizes) + 1, step)
        ax.set_xticks([rank - 1 for rank in ranks], [str(rank) for rank in ranks])
        ax.set_xlabel("rank of the latent unit, most active first", color=QUIET)
    ax.tick_params(axis="x", length=0)
    ax.grid(False, axis="x")
    return figure


def latents(mean: Any, labels: Any = None, *, variance: Any = None) -> Figure:
    """Posterior means on the two latent units that vary most, a point per datapoint; a histogram of one unit.

    Args:
        mean: E_q[z], ``[N, latent_dim]``, from :func:`vae_fast.uses.encode`.
        labels: classes to colour by, ``[N]``; each is named at the median of its points.
        variance: of each unit, ``[latent_dim]``, where it is known of more data than these.

    Raises:
        ValueError: there are not as many labels as datapoints.
    """
    from matplotlib import colormaps

    values = _rows("mean", mean)
    many = values.shape[1] > 2
    units = list(range(values.shape[1]))  # as the manifold has them
    if many:
        units = most_active(values.var(axis=0) if variance is None else variance)
    figure = _figure(6.4, 5.6 if len(units) == 2 else 3.0)
    ax = figure.add_subplot()
    _style(ax, "Posterior means" + (" on the two most active latents" if many else ""))
    ax.set_xlabel(f"E[z | x], latent {units[0]}", color=QUIET)
    if len(units) == 1:
        ax.hist(values[:, 0], bins=60, color=TEST)
        ax.set_ylabel("datapoints", color=QUIET)
        return figure
    x, y = values[:, units[0]], values[:, units[1]]
    ax.set_ylabel(f"E[z | x], latent {units[1]}", color=QUIET)
    ax.set_aspect("equal", adjustable="datalim")
    style: dict[str, Any] = {"s": 5, "linewidths": 0, "alpha": 0.7, "rasterized": True}
    if labels is None:
        ax.scatter(x, y, color=TEST, **style)
        return figure
    classes = np.asarray(labels).reshape(-1)
    if len(classes) != len(values):
        raise ValueError(f"labels: got {len(classes)}, wanted one for each of the {len(values)} datapoints")
    names, number = np.unique(classes, return_inverse=True)
    colours = colormaps["tab10" if len(names) <= 10 else "turbo"](
        np.arange(len(names)) if len(names) <= 10 else np.linspace(0, 1, len(names))
    )
    ax.scatter(x, y, color=colours[number], **style)
    for k, name in enumerate(names):
        place = (float(np.median(x[number == k])), float(np.median(y[number == k])))
        ax.annotate(str(name), place, ha="center", va="center", color=colours[k], fontweight="bold").set_bbox(
            {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": colours[k], "alpha": 0.9}
        )
    return figure


# ---- shared ------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    _need_matplotlib()
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=150, facecolor="white", layout="constrained")


def _need_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"plots need matplotlib, which does not load ({error}): pip install matplotlib"
        ) from error


def _style(ax: Axes, title: str) -> None:
    """The look of every panel, set on the axes: it does not depend on anybody's matplotlibrc."""
    ax.set_facecolor("none")
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=8)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(QUIET)
    ax.spines["bottom"].set_linewidth(0.8)
    ax.grid(True, axis="y", color=FAINT, lw=0.8)
    ax.set_axisbelow(True)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.tick_params(colors=QUIET, labelsize=9, length=0)
    ax.tick_params(axis="x", length=3, width=0.8)
    ax.xaxis.label.set_fontsize(9)
    ax.yaxis.label.set_fontsize(9)


def _picture(pixels: _Pixels, title: str) -> Figure:
    height, width = pixels.shape[:2]
    inches = 6.4 if width < 2 * height else 9.4
    figure = _figure(inches, inches * height / width + (0.4 if title else 0))
    ax = figure.add_subplot()
    ax.set_axis_off()
    if title:
        ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=8)
    ax.imshow(pixels, interpolation="none")
    return figure


def _rows(name: str, data: Any) -> NDArray[np.float32]:
    """``[N, ...]`` as float32 ``[N, D]``, from a tensor on any device or an array."""
    array = data.detach().float().cpu().numpy() if isinstance(data, torch.Tensor) else np.asarray(data)
    if array.size == 0 or array.ndim == 0:
        raise ValueError(f"{name}: got shape {list(array.shape)}, wanted at least one value")
    return array.astype(np.float32).reshape(len(array), -1)


def _checked_shape(data_dim: int, shape: Sequence[int] | None) -> tuple[int, int, int]:
    found = shape or image_shape(data_dim)
    if found is None:
        raise ValueError(
            f"image_shape: got None and {data_dim} features, wanted (height, width); "
            f"it is guessed for squares of {_SMALLEST_GUESS} x {_SMALLEST_GUESS} or more, and 28 x 20"
        )
    sizes = tuple(int(size) for size in found)
    if len(sizes) == 2:
        sizes = (*sizes, 1)
    if len(sizes) != 3 or min(sizes) < 1 or sizes[2] not in (1, 3) or math.prod(sizes) != data_dim:
        raise ValueError(
            f"image_shape: got {tuple(found)}, wanted (height, width) or (height, width, 3) "
            f"of {data_dim} pixel values in all"
        )
    return sizes


def _last(values: _Floats) -> float:
    return float(values[np.isfinite(values)][-1])


def _nats(value: float) -> str:
    """Two decimals and a minus sign as wide as a plus."""
    return f"{value:.2f}".replace("-", "−")


def _count(value: float) -> str:
    """1,000 as 1k, 1,000,000 as 1M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
