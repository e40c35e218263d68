"""What step.py measured, as text, a page and a picture: pure functions of its results, one for each work.

Times are medians of microseconds per step, with the 10 % and 90 % quantiles. "÷ best rival" is a time over
that of the fastest variant that is not ours; "of floor" the time of the matrix floor over a variant's, so
1.00 is a step that takes no longer than its products do through torch.mm.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_fast import plots
from vae_fast.report import write_atomically

from . import report, rivals, summary
from .rivals import Work

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]  # of one work
Rows = list[list[str]]

FLOOR = "matrix floor"
NATIVE = "native exact"
OURS = (NATIVE, "native fast", "modules")
COMPILED = tuple(name for name in rivals.MAKERS if name.startswith("compile"))


def times(result: Result) -> dict[str, float]:
    """Of all variants that were timed; the floor is no variant."""
    entries = result["rivals"].items()
    return {name: entry["median"] for name, entry in entries if name != FLOOR and "median" in entry}


def floor(result: Result) -> float | None:
    return result["rivals"].get(FLOOR, {}).get("median")


def best(result: Result, names: Sequence[str] | None = None) -> tuple[str, float] | None:
    """The fastest rival, or of those named, and its time."""
    found = {
        name: time
        for name, time in times(result).items()
        if (name not in OURS if names is None else name in names)
    }
    return min(found.items(), key=lambda entry: entry[1], default=None)


def title(result: Result) -> str:
    return str(Work(**result["work"]))


def losses(results: Sequence[Result]) -> list[tuple[str, str, list[str], float]]:
    """(work, ours, faster rivals, our time over the fastest's) wherever there are such, the worst first."""
    found = []
    for result in results:
        measured = times(result)
        theirs = sorted((time, name) for name, time in measured.items() if name not in OURS)
        for ours in OURS:
            faster = [(time, name) for time, name in theirs if time < measured.get(ours, 0)]
            if faster:
                names = [name for _, name in faster]
                found.append((title(result), ours, names, measured[ours] / faster[0][0]))
    return sorted(found, key=lambda entry: -entry[3])


# ---- tables ------------------------------------------------------------------------------------------------


def rows(result: Result) -> Rows:
    """The fastest first, the floor above all."""
    rival, least = best(result), floor(result)
    table = [[title(result), "µs per step", "10 % to 90 %", "samples/s", "÷ best rival", "of floor"]]
    timed = sorted(times(result).items(), key=lambda entry: entry[1])
    for name, time in [*([(FLOOR, least)] if least else []), *timed]:
        entry = result["rivals"][name]
        table.append(
            [
                f"{name} ({result['flop'] / time / 1e3:.0f} GFLOP/s)" if name == FLOOR else name,
                _time(time),
                f"{_time(entry['low'])} to {_time(entry['high'])}",
                "" if name == FLOOR else f"{1e6 * result['work']['batch'] / time:,.0f}",
                "" if name == FLOOR else report._ratio(time, rival and rival[1]),
                report._ratio(least, time),
            ]
        )
    return table


def native_rows(results: Sequence[Result]) -> Rows:
    """The native step over what it is measured by."""
    table = [
        [NATIVE, "µs per step", "÷ JAX scan", "÷ best compile", "÷ best rival", "best rival", "of floor"]
    ]
    for result in results:
        own, scan = times(result).get(NATIVE), times(result).get("JAX scan")
        compiled, rival = best(result, COMPILED), best(result)
        if own is not None:
            table.append(
                [
                    title(result),
                    _time(own),
                    report._ratio(own, scan),
                    report._ratio(own, compiled and compiled[1]),
                    report._ratio(own, rival and rival[1]),
                    rival[0] if rival else "-",
                    report._ratio(floor(result), own),
                ]
            )
    return table


def loss_rows(results: Sequence[Result]) -> Rows:
    table = [["work", "ours", "our time ÷ the best rival's", "faster rivals"]]
    for work, ours, faster, ratio in losses(results):
        table.append([work, ours, f"{ratio:.2f}", "; ".join(faster)])
    return table


def distance_rows(results: Sequence[Result]) -> Rows:
    table = [["after a few steps", "variant", "distance to float64", "right"]]
    for result in results:
        for name, entry in result["distances"].items():
            value = "-" if entry["distance"] is None else f"{entry['distance']:.1e}"
            table.append([title(result), name, value, "yes" if entry["right"] else entry.get("error", "NO")])
    return table


def _time(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def notes(result: Result) -> list[str]:
    """What there is to say of single variants: what is missing, failed, or was disturbed."""
    said = [f"left out: {reason}" for reason in result["missing"]]
    for name, entry in result["rivals"].items():
        for key in ("error", "note"):
            if key in entry:
                said.append(f"{title(result)}, {name}: {entry[key]}")
        if entry.get("how", "clock") != "clock":
            said.append(f"{title(result)}, {name}: {entry['how']}")
    if result["checks"] and not result["distances"]:
        said.append(f"{title(result)}: too large to follow in float64, timed only")
    return said


def text(result: Result) -> str:
    """For a terminal."""
    lost = report.aligned(loss_rows([result]))
    timed = [
        report.aligned(rows(result)),
        report.aligned(native_rows([result])),
        f"Where we lose:\n{lost}" if lost else "Where we lose: nowhere here.",
    ]
    parts = [
        *(timed if times(result) else []),
        report.aligned(rivals.check_rows(result)),
        report.aligned(distance_rows([result])),
        "\n".join(notes(result)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# ---- the page ----------------------------------------------------------------------------------------------


def page(results: Sequence[Result]) -> str:
    lost, timed = loss_rows(results), [result for result in results if times(result)]
    parts = [
        f"# The training step on {results[0]['machine']}",
        (__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " "),
        "![Microseconds per step](step.png)",
    ]
    if len(table := native_rows(results)) > 1:
        parts += ["## The native step", summary.markdown(table)]
    parts += ["## Where we lose", summary.markdown(lost) if len(lost) > 1 else "Nowhere in these runs."]
    parts += ["## All variants", *(summary.markdown(rows(result)) for result in timed)]
    checks = {check["work"]["optimizer"]: check for result in results for check in result["checks"]}
    if len(table := rivals.check_rows({"checks": [*checks.values()]})) > 1:
        parts += ["## Are they right?", summary.markdown(table)]
    else:
        parts += ["## Are they right?", "Not checked in these runs; `--check-only` does it."]
    if len(table := distance_rows(results)) > 1:
        parts.append(summary.markdown(table))
    how = {name: why for result in results for name, why in result["ours"].items()}
    said = list(dict.fromkeys(note for result in results for note in notes(result)))
    parts += ["## Notes", _listed([*(f"{name}: {why}" for name, why in how.items()), *said])]
    made = {file_name(result): result for result in results}
    parts += ["## Made with", summary.markdown(summary.facts(made))]
    return "\n\n".join(parts) + "\n"


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


# ---- the picture -------------------------------------------------------------------------------------------


def figure(results: Sequence[Result]) -> Figure:
    """A panel per work: bars of time per step, the fastest first, ours in blue; the line is the floor."""
    results = [result for result in results if times(result)]
    heights = [0.85 + 0.24 * len(times(result)) for result in results]
    drawing = plots._figure(8.4, sum(heights) + 0.3)
    axes = drawing.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, result in zip(axes, results, strict=True):
        _bars(ax, result)
    axes[-1].set_xlabel("per step, with the 10 % and 90 % quantiles", color=plots.QUIET)
    return drawing


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _bars(ax: Axes, result: Result) -> None:
    timed = sorted(times(result).items(), key=lambda entry: entry[1])
    slowest = max(time for _, time in timed)
    unit, scale = ("ms", 1e3) if slowest >= 2000 else ("µs", 1.0)
    least = floor(result)
    line = "" if least is None else f" (line: the matrix floor, {_three_digits(least / scale)})"
    plots._style(ax, f"{title(result)}: {unit}{line}")
    ax.grid(False, axis="y")
    for row, (name, time) in enumerate(timed):
        entry = result["rivals"][name]
        low, high = (abs(entry[end] - time) / scale for end in ("low", "high"))
        colour = plots.TEST if name in OURS else plots.FAINT
        ax.barh(row, time / scale, 0.72, color=colour, zorder=2)
        ax.errorbar(time / scale, row, xerr=[[low], [high]], color=plots.QUIET, lw=1, zorder=3)
        ax.annotate(
            _three_digits(time / scale),
            (max(time, entry["high"]) / scale, row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=plots.INK,
        )
    if least is not None:
        ax.axvline(least / scale, color=plots.TRAIN, lw=1.2, zorder=4)
    ax.set_yticks(range(len(timed)), [name for name, _ in timed], fontsize=8)
    for label, (name, _) in zip(ax.get_yticklabels(), timed, strict=True):
        label.set_color(plots.TEST if name in OURS else plots.INK)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * max(result["rivals"][name]["high"] for name, _ in timed) / scale)


# ---- files -------------------------------------------------------------------------------------------------


def file_name(result: Result) -> str:
    work, kind = result["work"], "" if times(result) else "check-"
    return f"{kind}batch-{work['batch']}-hidden-{work['hidden']}-{work['optimizer']}"


def read(folder: Path) -> list[Result]:
    """All results that lie in a folder, the paper's size first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*batch-*.json")]

    def order(result: Result) -> tuple[str, int, int]:
        return result["work"]["optimizer"], result["work"]["hidden"], result["work"]["batch"]

    return sorted(found, key=order)


def write(result: Result, folder: Path) -> None:
    """The result's JSON file, and REPORT.md and step.png of all that lie in the folder; each whole or not at
    all."""
    folder.mkdir(parents=True, exist_ok=True)
    payload = json.dumps(result, indent=1) + "\n"
    write_atomically(folder / f"{file_name(result)}.json", payload.encode())
    results = read(folder)
    if any(times(result) for result in results):
        picture = io.BytesIO()
        figure(results).savefig(picture, format="png", dpi=110)
        write_atomically(folder / "step.png", picture.getvalue())
    write_atomically(folder / "REPORT.md", page(results).encode())
