"""What operators.py measured, as text, figures and one HTML page: pure functions of its result.

Every number is a median; "copy" in a line moves the fewest bytes that this line must move.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_fast import plots
from vae_fast.report import _grid, _inline, _list, _section, _table, document, write_atomically

from . import resources

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = dict[str, Any]
Rows = list[list[str]]

COMPILED = ("compile", "compile, max-autotune")
_KEY = ("operator", "shape", "dtype", "direction")
FACTS = ("machine", "device", "date", "commit", "command", "python", "system", "cpus", "driver")


def time_of(line: Line, *variants: str) -> float | None:
    """Microseconds of the fastest of these variants; None where none was measured."""
    found = [line["variants"].get(name, {}).get("median") for name in variants]
    return min((float(value) for value in found if value is not None), default=None)


def _key(line: Line) -> list[str]:
    return [line["operator"], f"{line['rows']}x{line['cols']}", line["dtype"], line["direction"]]


def losses(result: dict[str, Any]) -> list[tuple[Line, str, float]]:
    """Every line and rival that is faster than ours, and our time over the rival's; the worst first."""
    found = []
    for line in result["operators"]:
        ours = time_of(line, "ours")
        for rival in line["variants"]:
            theirs = time_of(line, rival)
            if rival not in ("ours", "copy") and ours and theirs and theirs < ours:
                found.append((line, rival, ours / theirs))
    return sorted(found, key=lambda entry: -entry[2])


# ---- tables ------------------------------------------------------------------------------------------------


def operator_rows(result: dict[str, Any]) -> Rows:
    # the first size of each: on a CPU one element
    elsewhere = {(line["operator"], line["direction"]): line for line in reversed(result.get("host", []))}
    autotuned = any(COMPILED[1] in line["variants"] for line in result["operators"])
    columns = ["ours", "eager", COMPILED[0], *([COMPILED[1]] if autotuned else []), "copy"]
    ratios, memory = ["ours/copy", "eager/ours", "compile/ours"], ["MB", "eager MB", "compile MB"]
    rows = [[*_KEY, *columns, *ratios, "GB/s", "host us", *memory]]
    for line in result["operators"]:
        ours, peaks = time_of(line, "ours"), line.get("peak_bytes", {})
        calls = line.get("host") or elsewhere.get((line["operator"], line["direction"]), {})
        rows.append(
            [*_key(line), *(_number(time_of(line, name)) for name in columns)]
            + [_ratio(ours, time_of(line, "copy"))]
            + [_ratio(time_of(line, *names), ours) for names in (("eager",), COMPILED)]
            + ["-" if not ours else f"{line['bytes'] / ours / 1e3:.3g}"]
            + [_number(calls.get("ours", {}).get("median"))]
            + [_megabytes(peaks.get(name)) for name in ("ours", "eager", "compile")]
        )
    return rows


def rival_rows(result: dict[str, Any]) -> Rows:
    """What has no column of its own."""
    rows = [[*_KEY, "rival", "us", "rival/ours"]]
    for line in result["operators"]:
        for name in line["variants"]:
            if name not in ("ours", "eager", "copy", *COMPILED):
                theirs = time_of(line, name)
                rows.append([*_key(line), name, _number(theirs), _ratio(theirs, time_of(line, "ours"))])
    return rows


def host_rows(result: dict[str, Any]) -> Rows:
    """On a GPU with torch.compile's, from the line of the same shape."""
    names = ["ours", "eager", "compile", "native"]
    rows = [["host us per call", "shape", "direction", *names]]
    for line in result.get("host", []):
        shape = "{}x{}".format(*line["shape"])
        key = [line["operator"], shape, "float32", line["direction"]]
        measured = next((x["host"] for x in result["operators"] if "host" in x and _key(x) == key), {})
        cells = [_number((line | measured).get(name, {}).get("median")) for name in names]
        rows.append([line["operator"], shape, line["direction"], *cells])
    return rows


def loss_rows(result: dict[str, Any]) -> Rows:
    rows = [["rival", *_KEY, "ours", "rival's", "ours/rival"]]
    for line, rival, ratio in losses(result):
        times = [_number(time_of(line, name)) for name in ("ours", rival)]
        rows.append([rival, *_key(line), *times, f"{ratio:.2f}"])
    return rows


def accuracy_rows(result: dict[str, Any]) -> Rows:
    """Without the lines of what is exact by construction: the gradient in a mean that is passed on."""
    rows = [["worst error in ulp", "of", "inputs", "ours", "at", "PyTorch", "at", "outside", "PyTorch"]]
    for line in result.get("accuracy", []):
        ours, plain = line["ours"], line["plain"]
        if ours["worst"] == plain["worst"] == 0:
            continue
        cells = [line["quantity"], line["dtype"], f"{line['count']:,}"]
        for side in (ours, plain):
            cells += [_ulps(side["worst"]), side["at"]]
        cells += [_ulps(side["outside"]) if "outside" in side else "" for side in (ours, plain)]
        rows.append(cells)
    return rows


def accuracy_summary(result: dict[str, Any]) -> Rows:
    """A row per quantity, and ours and PyTorch's beside each other for every type."""
    lines = {(line["quantity"], line["dtype"]): line for line in result.get("accuracy", [])}
    dtypes = list(dict.fromkeys(dtype for _, dtype in lines))
    rows = [["worst error in ulp", *(f"{dtype}{side}" for dtype in dtypes for side in ("", ", PyTorch"))]]
    for quantity in dict.fromkeys(quantity for quantity, _ in lines):
        cells = [lines[quantity, dtype][side]["worst"] for dtype in dtypes for side in ("ours", "plain")]
        if any(cell != 0 for cell in cells):
            rows.append([quantity, *map(_ulps, cells)])
    return rows


def _ulps(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3g}"


def notes(result: dict[str, Any]) -> list[str]:
    """What failed and what was left out."""
    errors = {
        f"{' '.join(_key(line))} {name}: {value['error']}"
        for line in result["operators"]
        for name, value in line["variants"].items()
        if "error" in value
    }
    return sorted(errors) + [f"not measured: {left_out}" for left_out in result.get("skipped", [])]


def text(result: dict[str, Any]) -> str:
    """The tables as plain text; times in microseconds."""
    lost = loss_rows(result)
    parts = [
        aligned(operator_rows(result)),
        aligned(rival_rows(result)),
        "Where we lose:\n" + aligned(lost) if len(lost) > 1 else "Where we lose: nowhere in this run.",
        aligned(host_rows(result)),
        aligned(accuracy_rows(result)),
    ]
    return "\n\n".join([*filter(None, parts), *notes(result)]) + "\n"


def aligned(rows: Rows) -> str:
    """Columns of equal width; nothing where there is but the head."""
    if len(rows) < 2:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _ratio(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{a / b:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _megabytes(value: object) -> str:
    return f"{value / 2**20:.1f}" if isinstance(value, int) else "-"


# ---- figures -----------------------------------------------------------------------------------------------

_BARS = {"ours": ("ours", plots.TEST), "eager": ("eager", plots.QUIET), "compile": (COMPILED, plots.TRAIN)}


def _panels(result: dict[str, Any]) -> dict[str, list[Line]]:
    """The lines of each operator, in the order of shape, dtype and direction."""
    panels: dict[str, list[Line]] = {}
    for line in result["operators"]:
        if time_of(line, "copy"):
            panels.setdefault(line["operator"], []).append(line)
    order = {"float32": 0, "forward": 0, "backward": 1, "both": 2}
    for lines in panels.values():
        lines.sort(
            key=lambda x: (x["rows"] * x["cols"], order.get(x["dtype"], 1), order.get(x["direction"], 3))
        )
    return panels


def figure(panels: dict[str, Sequence[Line]]) -> Figure:
    """A panel per operator: bars of time over the time of a copy of the same bytes, on a logarithmic axis;
    they begin at 1, the copy, and those to the left are faster than it."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    heights = [0.75 + 0.42 * len(lines) for lines in panels.values()]
    page = plots._figure(9.4, sum(heights) + 0.3)
    axes = page.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (operator, lines) in zip(axes, panels.items(), strict=True):
        plots._style(ax, operator)
        _bars(ax, lines)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.9), high * 1.25)
        marks = [mark for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= mark <= high]
        ax.set_xticks(marks)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(False, axis="y")
        ax.grid(True, axis="x", color=plots.FAINT, lw=0.8)
        ax.axvline(1, color=plots.INK, lw=1)
        ax.set_yticks(range(len(lines)), [" ".join(_key(line)[1:]) for line in lines])
        ax.tick_params(axis="y", labelsize=8)
        ax.set_ylim(len(lines) - 0.4, -0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9,
        labelcolor=plots.INK,
    )  # fmt: skip
    axes[-1].set_xlabel("time ÷ time of a copy of the same bytes", color=plots.QUIET)
    return page


def _bars(ax: Axes, lines: Sequence[Line]) -> None:
    drawn = [name for name, (variants, _) in _BARS.items() if any(_over_copy(x, variants) for x in lines)]
    height = 0.8 / max(len(drawn), 1)
    for place, name in enumerate(drawn):
        variants, colour = _BARS[name]
        found = [(i, ratio) for i, line in enumerate(lines) if (ratio := _over_copy(line, variants))]
        rows = [i + (place - (len(drawn) - 1) / 2) * height for i, _ in found]
        ratios = [ratio for _, ratio in found]
        ax.barh(rows, [r - 1 for r in ratios], 0.9 * height, left=1, color=colour, label=name, zorder=3)
        for row, ratio in zip(rows, ratios, strict=True):
            ax.annotate(
                f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}",
                (max(ratio, 1), row),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=plots.INK,
            )


def _over_copy(line: Line, variants: str | tuple[str, ...]) -> float | None:
    own = time_of(line, *([variants] if isinstance(variants, str) else variants))
    copy = time_of(line, "copy")
    return own / copy if own and copy else None


# ---- the page ----------------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """The result as one HTML file that needs nothing but a browser."""
    host = (
        "the device's work left queued"
        if result["device"].startswith("cuda")
        else "of the whole call: the line of one element is what a call costs beside its arithmetic"
    )
    lost = loss_rows(result)
    sections = [
        _section(
            "Where we lose",
            _grid(lost) if len(lost) > 1 else "<p>Nowhere in this run.</p>",
            f"All lines of this run in which a rival's median is below ours: {len(lost) - 1} of "
            f"{sum(len(line['variants']) - 2 for line in result['operators'])} comparisons. Microseconds.",
        )
    ]
    for operator, lines in _panels(result).items():
        drawing = figure({operator: lines})
        drawing.axes[0].set_title("", loc="left")
        sections.append(
            _section(
                operator,
                _inline(drawing),
                "Bars begin at 1, the time of a copy of the fewest bytes that the line must move; shorter is "
                "better. compile is the faster of torch.compile's modes that were tried.",
            )
        )
    if result.get("host"):
        sections.append(_section("Host time", _grid(host_rows(result)), f"Microseconds per call, {host}."))
    if result.get("accuracy"):
        sections.append(
            _section(
                "Worst error",
                _grid(accuracy_summary(result)),
                "Against float64, in units in the last place of the result's own type, one element per row. "
                "bfloat16 and float16: every finite value there is; float32: every sign and exponent, random "
                "fractions. Losses of bfloat16 and float16 inputs are float32. Of the inputs for which the "
                "operators promise their digits: any logits, |logvar| ≤ 80, |mean| ≤ 10<sup>18</sup>. "
                "Where the worst is, and what is outside of that, stands in operators.txt.",
            )
        )
    if result.get("kernels"):
        kernels = resources.from_dicts(result["kernels"])
        sections.append(
            _section("What the CUDA compiler used", f"<pre>{escape(resources.table(kernels))}</pre>")
        )
    everything = "".join(_grid(rows) for rows in (operator_rows(result), rival_rows(result)) if len(rows) > 1)
    sections.append(
        _section(
            "All numbers", everything, "Microseconds, medians; MB: peak memory, of 2<sup>20</sup> bytes."
        )
    )
    if left := notes(result):
        sections.append(_section("Not measured", _list(left)))
    facts = {key: result[key] for key in FACTS if result.get(key)} | result.get("versions", {})
    sections.append(_section("Made with", _table({key: value for key, value in facts.items() if value})))
    title = "The operators of vae-fast"
    head = (
        f"<header>\n<h1>{title}</h1>\n<p>{escape(result['machine'])}<br>{escape(result['date'])}</p></header>"
    )
    return document(f"{title} on {result['machine']}", "\n".join([head, *sections]))


def write(result: dict[str, Any], folder: Path) -> None:
    """operators.json, .txt, .png and .html, each whole or not at all."""
    import io

    folder.mkdir(parents=True, exist_ok=True)
    files = {"json": json.dumps(result, indent=1) + "\n", "txt": text(result), "html": page(result)}
    for suffix, content in files.items():
        write_atomically(folder / f"operators.{suffix}", content.encode())
    if panels := _panels(result):
        picture = io.BytesIO()
        figure(panels).savefig(picture, format="png", dpi=110)
        write_atomically(folder / "operators.png", picture.getvalue())
