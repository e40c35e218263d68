"""REPORT.md for bench/results/<machine>/, from what latency, rivals and the operators' sizes wrote there.

python -m bench.summary --run DIR [DIR ...] [--run DIR [DIR ...]] --out bench/results/h200

A run is one or several folders that together hold latency.json, sizes.json and rivals.json, or some of them
(bench.gpu --plan makes several). Numbers are the first run's; the second says how far they can be trusted.
The JSON files are copied to run-1 and run-2 beside the report.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_fast import plots
from vae_fast.report import write_atomically

from . import report, rivals
from .rivals import Work

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = dict[str, dict[str, Any]]  # stem of the file to its content
Rows = list[list[str]]
Numbers = dict[tuple[str, ...], float]  # what was measured to the median in microseconds

TITLES = {"latency": "Waiting", "rivals": "The whole training step", "sizes": "The operators"}


def read(folders: Sequence[Path]) -> Run:
    """The files of one run; a ValueError where there is none, or one twice."""
    found: Run = {}
    for folder in folders:
        for stem in TITLES:
            path = folder / f"{stem}.json"
            if path.exists():
                if stem in found:
                    raise ValueError(f"--run: got two files {path.name}, wanted one: the second is {path}")
                found[stem] = json.loads(path.read_text(encoding="utf-8"))
    if not found:
        names = ", ".join(f"{stem}.json" for stem in TITLES)
        raise ValueError(f"--run: got {', '.join(map(str, folders))}, wanted folders with {names}")
    return found


def numbers(stem: str, content: dict[str, Any]) -> Numbers:
    """Every median of a file."""
    found: Numbers = {}
    if stem == "latency":
        for line in content["lines"]:
            if "us" in line:
                found[_latency_key(line)] = line["us"]["median"]
    elif stem == "rivals":
        for line in content["steps"]:
            for name, entry in line["rivals"].items():
                if "median" in entry:
                    found[str(Work(**line["work"])), name] = entry["median"]
    else:
        for line in content["operators"]:
            for name in line["variants"]:
                if (time := report.time_of(line, name)) is not None:
                    found[(*report._key(line), name)] = time
    return found


def _latency_key(line: dict[str, Any]) -> tuple[str, ...]:
    """What, how, and the settings: numbers chosen before measuring, so that two runs have the same."""
    chosen = ("bytes", "cluster", "blocks", "threads", "pair")
    if "elements" in line:
        chosen = ("elements",)
    settings = [f"{name} {line[name]:,.0f}" for name in chosen if name in line]
    return line["what"], line.get("how", ""), ", ".join(settings)


def spread(first: Numbers, second: Numbers) -> str:
    """How far two runs are apart: the median over what both measured, and the worst."""
    apart = {key: max(a, second[key]) / min(a, second[key]) - 1 for key, a in first.items() if key in second}
    if not apart:
        return "The two runs have no number in common."
    worst = max(apart, key=apart.__getitem__)
    return (
        f"Two runs, {len(apart)} in common: medians are {statistics.median(apart.values()):.1%} apart in the "
        f"middle, at worst {apart[worst]:.1%} ({', '.join(filter(None, worst))})."
    )


def markdown(rows: Rows) -> str:
    head, *body = [["" if cell is None else cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def facts(run: Run) -> Rows:
    """Where every number comes from."""
    rows = [["file", "commit", "versions", "driver", "date", "command"]]
    for stem, content in run.items():
        found = content["versions"] | {"nvcc": content.get("nvcc")}
        versions = ", ".join(f"{name} {v}" for name, v in found.items() if v)
        changed = " with uncommitted changes" if content["uncommitted_changes"] else ""
        commit = (content["commit"] or "unknown")[:12] + changed
        command = f"`{content['command']}`"
        rows.append([f"{stem}.json", commit, versions, content["driver"] or "none", content["date"], command])
    return rows


def latency_rows(content: dict[str, Any], second: Numbers) -> Rows:
    rows = [["what", "how", "settings", "µs", "10 % to 90 %", "per second", "second run"]]
    for line in content["lines"]:
        if "us" not in line:
            continue
        key, us = _latency_key(line), line["us"]
        what, how, settings = key
        if "to_sm" in line:
            how = f"SM {line['from_sm']} to {line['to_sm']}"
        rates = [f"{line['elements_per_us'] / 1e6:.3f}·10¹² elements"] if "elements_per_us" in line else []
        rates += [f"{line['gigabytes_per_s']:.0f} GB"] if line.get("gigabytes_per_s") else []
        again = f"{second[key]:.3f}" if key in second else "-"
        quantiles = f"{us['low']:.3f} to {us['high']:.3f}"
        rows.append([what, how, settings, f"{us['median']:.3f}", quantiles, ", ".join(rates), again])
    return rows


def seating_rows(content: dict[str, Any]) -> Rows:
    rows = [["blocks per cluster", "clusters at once", "on so many SMs"]]
    for line in content["lines"]:
        if line["what"] == "cluster seating":
            seen = f"{line['multiprocessors']:g}" if "multiprocessors" in line else "-"
            rows.append([f"{line['cluster']:g}", f"{line['clusters_at_once']:g}", seen])
    return rows


def size_rows(content: dict[str, Any]) -> Rows:
    """Forward and backward together; sizes.json has each alone."""
    columns = {"ours": ("ours",), "eager": ("eager",), "compile": report.COMPILED, "copy": ("copy",)}
    rows = [["operator", "shape", "dtype", *(f"{name}, µs" for name in columns), "copy, GB/s", "ours/copy"]]
    for line in content["operators"]:
        if line["direction"] != "both":
            continue
        times = [report.time_of(line, *variants) for variants in columns.values()]
        ours, copy = times[0], times[-1]
        rate = f"{line['bytes'] / copy / 1e3:.0f}" if copy else "-"
        rows.append([*report._key(line)[:3], *map(report._number, times), rate, report._ratio(ours, copy)])
    return rows


def _failures(stem: str, content: dict[str, Any]) -> list[str]:
    if stem == "latency":
        return list(content["failures"])
    if stem == "sizes":
        return report.notes(content)
    failed = [
        f"{Work(**line['work'])}, {name}: {entry.get('error') or entry['note']}"
        for line in content["steps"]
        for name, entry in line["rivals"].items()
        if "error" in entry or "note" in entry
    ]
    return failed + [f"not measured: {what}" for what in content["skipped"]]


def text(runs: Sequence[Run]) -> str:
    """The report; pictures are named latency.png and so on."""
    first = runs[0]
    machine = next(content["machine"] for content in first.values())
    parts = [f"# Measured on {machine}"]
    parts.append(
        "Medians, with the 10 % and 90 % quantiles. All numbers are in the JSON files of the folders beside "
        "this page."
    )
    for stem, content in first.items():
        second = numbers(stem, runs[1][stem]) if len(runs) > 1 and stem in runs[1] else {}
        parts.append(f"## {TITLES[stem]}")
        parts.append(
            spread(numbers(stem, content), second) if second else "One run only: no spread is known."
        )
        if stem == "latency":
            tables = [latency_rows(content, second), seating_rows(content)]
        elif stem == "rivals":
            parts.append("Wall time per step, µs.")
            tables = [_turned(rivals.rows(content)), rivals.check_rows(content)]
        else:
            parts.append("Forward and backward together.")
            tables = [size_rows(content), report.host_rows(content)]
        parts += [markdown(rows) for rows in tables if len(rows) > 1]
        if figure_of(stem, content) is not None:
            parts.append(f"![{TITLES[stem]}]({stem}.png)")
        if failed := _failures(stem, content):
            parts.append("Failed or left out:\n\n" + "\n".join(f"* {entry}" for entry in failed))
    parts.append("## Made with")
    for i, run in enumerate(runs, 1):
        parts.append(f"Run {i}:\n\n{markdown(facts(run))}")
    return "\n\n".join(parts) + "\n"


def _turned(rows: Rows) -> Rows:
    """Rows as columns: there are few works in a run that was in haste, and many rivals."""
    return [list(row) for row in zip(*rows, strict=True)]


# ---- figures -----------------------------------------------------------------------------------------------


def figure_of(stem: str, content: dict[str, Any]) -> Figure | None:
    """None where there is nothing to draw."""
    found = numbers(stem, content)
    if not found:
        return None
    return _sizes_figure(content) if stem == "sizes" else _bars(stem, found)


def _bars(stem: str, found: Numbers) -> Figure:
    """A bar for every number, a panel for each work or each thing that was waited for."""
    panels: dict[str, dict[str, float]] = {}
    for key, value in found.items():
        panels.setdefault(key[0], {})[", ".join(filter(None, key[1:])) or key[0]] = value
    heights = [0.6 + 0.22 * len(bars) for bars in panels.values()]
    page = plots._figure(8.4, sum(heights) + 0.3)
    axes = page.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, bars) in zip(axes, panels.items(), strict=True):
        plots._style(ax, title)
        ax.grid(False, axis="y")
        ax.barh(range(len(bars)), list(bars.values()), color=plots.TEST)
        ax.set_yticks(range(len(bars)), list(bars), fontsize=8)
        ax.invert_yaxis()
        for row, value in enumerate(bars.values()):
            ax.annotate(
                f"{value:.3g}" if value < 1000 else f"{value:,.0f}",
                (value, row),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        ax.set_xlim(0, 1.12 * max(bars.values()))
    axes[-1].set_xlabel("µs" if stem == "latency" else "µs per step", color=plots.QUIET)
    return page


def _sizes_figure(content: dict[str, Any]) -> Figure | None:
    """Time over the copy's, by size; a panel per operator and type."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for line in content["operators"]:
        if line["direction"] == "both" and report.time_of(line, "copy"):
            panels.setdefault(f"{line['operator']}, {line['dtype']}", []).append(line)
    if not panels:
        return None
    page = plots._figure(8.4, 2.6 * len(panels))
    axes = page.subplots(len(panels), 1, squeeze=False)[:, 0]
    colours = {
        "ours": plots.TEST, "eager": plots.QUIET, "compile": plots.TRAIN, "compile, max-autotune": plots.INK
    }  # fmt: skip
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        plots._style(ax, title)
        lines.sort(key=lambda line: line["rows"] * line["cols"])
        for name, colour in colours.items():
            points = [
                (line["rows"] * line["cols"], time / report.time_of(line, "copy"))
                for line in lines
                if (time := report.time_of(line, name)) is not None
            ]
            if points:
                ax.plot(*zip(*points, strict=True), "o-", color=colour, label=name, ms=3, lw=1.2)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.axhline(1, color=plots.INK, lw=0.8)
        ax.set_ylabel("time ÷ copy", color=plots.QUIET)
    axes[0].legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("elements", color=plots.QUIET)
    return page


def write(runs: Sequence[Run], folder: Path) -> None:
    """REPORT.md, its pictures, and the JSON files of every run; each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, run in enumerate(runs, 1):
        (folder / f"run-{i}").mkdir(exist_ok=True)
        for stem, content in run.items():
            payload = json.dumps(content, indent=1) + "\n"
            write_atomically(folder / f"run-{i}" / f"{stem}.json", payload.encode())
    for stem, content in runs[0].items():
        if (page := figure_of(stem, content)) is not None:
            picture = io.BytesIO()
            page.savefig(picture, format="png", dpi=110)
            write_atomically(folder / f"{stem}.png", picture.getvalue())
    write_atomically(folder / "REPORT.md", text(runs).encode())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, nargs="+", action="append", required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        runs = [read(folders) for folders in arguments.run]
    except ValueError as error:
        parser.error(str(error))
    write(runs, arguments.out)
    print(f"wrote {arguments.out / 'REPORT.md'}")


if __name__ == "__main__":
    main()
