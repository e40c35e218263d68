"""What figures 2 and 3 show and write: panels in the paper's arrangement, ours over the paper's curves."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import plots, report
from ..plots import DrawnCurve
from ..report import write_atomically
from .curves import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {"test": plots.TEST, "train": plots.TRAIN}
LABELS = {"aevb": "AEVB", "wake-sleep": "wake-sleep", "mcem": "Monte Carlo EM"}
_IN_THE_PAPER = {"aevb": ("AEVB",), "wake-sleep": ("WS", "Wake-Sleep"), "mcem": ("MCEM",)}
_DASHES: dict[str, Any] = {"aevb": "-", "wake-sleep": (0, (4, 1.6)), "mcem": (0, (1, 1.2))}
_PAPER = "paper: "
_STATES = {True: "holds", False: "does not hold", None: "open"}


@dataclass(frozen=True)
class Panel:
    """``key`` is ours, ``drawn`` the name that the panel has in the paper's drawing."""

    key: str
    title: str
    drawn: str


@dataclass(frozen=True)
class Verdict:
    """A bar, what was found, and whether it holds; None where training has not come so far."""

    bar: str
    found: str
    holds: bool | None

    def __str__(self) -> str:
        return f"{_STATES[self.holds]:<14}  {self.bar}: {self.found}"


@dataclass(frozen=True)
class Result:
    """A figure of curves. ``rows`` are panels as they are arranged; ``points`` by (panel, algorithm)."""

    name: str
    title: str
    caption: str
    rows: list[list[Panel]]
    points: dict[tuple[str, str], list[Point]]
    verdicts: list[Verdict]
    settings: dict[str, Any]
    notes: list[str]
    log_axis: bool = True
    figure: str = ""  # of the paper's, whose curves are drawn; the name's own where that is one

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row]

    def lines(self, panel: Panel) -> Iterator[tuple[str, str, list[Point], DrawnCurve | None]]:
        """(algorithm, part, our points, the paper's curve): test first."""
        for part in PARTS:
            for (key, algorithm), points in self.points.items():
                if key == panel.key:
                    yield algorithm, part, points, paper(self.figure or self.name, panel, algorithm, part)

    def table(self) -> str:
        """Verdicts, then values at every decade, as Markdown."""
        tables = [_markdown(_verdict_rows(self.verdicts))]
        tables += [f"{panel.title}\n\n{_markdown(self.values(panel))}" for panel in self.panels]
        return "\n".join(tables)

    def values(self, panel: Panel) -> list[list[str]]:
        """At every power of ten and at the end: each curve, and what it is above the paper's."""
        columns = list(self.lines(panel))
        at = {p.samples for *_, points, _ in columns for p in points if _is_decade(p.samples)}
        at |= {points[-1].samples for *_, points, _ in columns if points}
        head = ["samples"]
        for algorithm, part, *_ in columns:
            head += [f"{LABELS[algorithm]} {part}", "− paper"]
        rows = [head]
        for samples in sorted(at):
            cells = [f"{samples:,}"]
            for _, part, points, drawn in columns:
                ours = next((getattr(p, part) for p in points if p.samples == samples), None)
                theirs = None if drawn is None else drawn.at(samples)
                cells.append("" if ours is None else report._signed(ours))
                cells.append("" if ours is None or theirs is None else _difference(ours - theirs))
            rows.append(cells)
        return rows


def paper(figure: str, panel: Panel, algorithm: str, part: str) -> DrawnCurve | None:
    """The curve as the paper draws it; None where it has none."""
    drawn = plots.drawn_curves(figure)
    names = (f"{name}({part})" for name in _IN_THE_PAPER[algorithm])
    return next((drawn[panel.drawn, name] for name in names if (panel.drawn, name) in drawn), None)


def write(result: Result, folder: Path, command: str = "") -> None:
    """<name>.csv, .json, .md, .png and .html."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["panel", "algorithm", "samples", "train", "test", "paper_train", "paper_test"])
    for panel in result.panels:
        for (key, algorithm), points in result.points.items():
            drawn = [paper(result.figure or result.name, panel, algorithm, p) for p in ("train", "test")]
            for p in points if key == panel.key else ():
                theirs = [None if d is None else d.at(p.samples) for d in drawn]
                short = ["" if value is None else f"{value:.2f}" for value in theirs]
                writer.writerow([key, algorithm, p.samples, p.train, p.test, *short])
    picture = io.BytesIO()
    plot(result).savefig(picture, format="png")
    said = {"notes": result.notes, "verdicts": [vars(verdict) for verdict in result.verdicts]}
    body = [
        f"<header>\n<h1>{escape(result.title)}</h1>\n<p>Kingma &amp; Welling, arXiv:1312.6114</p>\n</header>",
        *(f"<p>{escape(note)}</p>" for note in result.notes),
        report._section("Ours and the paper’s", report._inline(plot(result)), escape(result.caption)),
        report._section("What it shows", report._grid(_verdict_rows(result.verdicts))),
        *(
            report._section(panel.title, report._grid(result.values(panel)), "Nats per datapoint.")
            for panel in result.panels
        ),
        settings_section(result.settings),
        report._commands(command, ""),
    ]
    for suffix, payload in (
        ("csv", text.getvalue()),
        ("json", json.dumps({**result.settings, **said}, indent=1) + "\n"),
        ("md", result.table()),
        ("png", picture.getvalue()),
        ("html", report.document(result.title, "\n".join(filter(None, body)))),
    ):
        whole = payload if isinstance(payload, bytes) else payload.encode()
        write_atomically(folder / f"{result.name}.{suffix}", whole)


def settings_section(settings: Mapping[str, Any]) -> str:
    text = escape(json.dumps(settings, indent=1))
    return f"<details><summary>Settings</summary><pre><code>{text}</code></pre></details>"


def plot(result: Result) -> Figure:
    """All panels: a row of the paper's is a row here, panels of a row on one scale."""
    columns = max(len(row) for row in result.rows)
    width, height = (2.2, 2.6) if columns > 2 else (3.4, 3.2)  # inches of a panel
    figure = plots._figure(max(5.2, width * columns + 0.6), height * len(result.rows) + 0.5)
    grid = figure.add_gridspec(len(result.rows), columns)
    end = max(p.samples for points in result.points.values() for p in points)
    for i, row in enumerate(result.rows):
        limits = _limits(result, row, end)
        for j, panel in enumerate(row):
            ax = figure.add_subplot(grid[i, j])
            plots._style(ax, panel.title)
            _draw(ax, result, panel, end)
            ax.set_ylim(*limits)
            if j:
                ax.tick_params(labelleft=False)
            else:
                ax.set_ylabel("nats per datapoint", color=plots.QUIET)
            if i == len(result.rows) - 1:
                ax.set_xlabel("training samples", color=plots.QUIET)
    handles = {str(line.get_label()): line for ax in figure.axes for line in ax.get_lines()}
    ours = [label for label in handles if not label.startswith(_PAPER)]
    ours.sort(key=lambda label: [*LABELS.values()].index(label.split(",")[0]))  # by algorithm, test first
    theirs = [_PAPER + label for label in ours if _PAPER + label in handles]
    # A legend is filled column by column: where there is room, ours stand above the paper's, else beside.
    wide = columns > 2 and len(theirs) == len(ours)
    labels = [label for pair in zip(ours, theirs, strict=True) for label in pair] if wide else ours + theirs
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=len(ours) if wide else 2,
        frameon=False,
        fontsize=8.5,
        labelcolor=plots.INK,
        handlelength=2.6,
    )
    return figure


def _draw(ax: Axes, result: Result, panel: Panel, end: int) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = (min(1e5, end / 10), max(1e8, end)) if result.log_axis else (0.0, float(end))
    for algorithm, part, points, drawn in result.lines(panel):
        style: dict[str, Any] = {"color": PARTS[part], "ls": _DASHES[algorithm]}
        marker = "o" if 0 < len(points) < 3 else ""
        ax.plot(
            [p.samples for p in points],
            [getattr(p, part) for p in points],
            lw=1.7,
            marker=marker,
            ms=3,
            label=f"{LABELS[algorithm]}, {part}",
            zorder=3,
            **style,
        )
        if drawn is not None:
            style["color"] = plots.QUIET
            width = 1.1 if part == "test" else 0.6
            label = f"{_PAPER}{LABELS[algorithm]}, {part}"
            ax.plot(drawn.samples, drawn.values, lw=width, label=label, zorder=2, **style)
    if result.log_axis:
        ax.set_xscale("log")
        powers = range(int(np.ceil(np.log10(low))), int(np.floor(np.log10(high))) + 1)
        ax.xaxis.set_major_locator(FixedLocator([10.0**power for power in powers]))
        ax.xaxis.set_minor_locator(NullLocator())
        first, *_, last = ax.get_xticklabels()
        first.set_horizontalalignment("left")  # so that they keep clear of the next panel's
        last.set_horizontalalignment("right")
    ax.set_xlim(low, high)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plots._count(value)))


def _limits(result: Result, row: Sequence[Panel], end: int) -> tuple[float, float]:
    """From where the paper's test curves are at a million samples, and ours at their end, to the top."""
    seen: list[float] = []
    for panel in row:
        for _, part, points, drawn in result.lines(panel):
            if points:
                seen.append(getattr(points[-1], part))
            if drawn is not None and (result.log_axis or end > drawn.samples[0]):
                values = drawn.values[drawn.samples >= 1e6]
                seen += [float(values.max())] + ([float(values.min())] if part == "test" else [])
    low, high = min(seen), max(seen)
    pad = 0.06 * max(high - low, 1.0)
    return low - pad, high + pad


def _is_decade(samples: int) -> bool:
    return str(samples).strip("0") == "1"


def _difference(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _verdict_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    return [["bar", "found", ""], *([v.bar, v.found, _STATES[v.holds]] for v in verdicts)]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest]) + "\n"
