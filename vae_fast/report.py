"""The report of a training run: one HTML file that needs nothing but a browser.

Curves are inline SVG in the page's own colours, so they follow a light or dark theme; pictures lie in them as
PNG. No script, no font, no style sheet is fetched from anywhere. All text that comes from outside is escaped.
"""

from __future__ import annotations

import datetime
import io
import os
import platform
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import datasets, evaluation, plots, uses
from .datasets import Prepared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .trainer import HistoryRow, Trainer

PAPER_END = 100_000_000  # samples; where the paper's values are compared
_PAIRS = 20
_POINTS = 2000  # in the picture of the latents
_NOISE = 0.3
_TABLE_ROWS = 12  # datapoints in the heat maps of data that are no images
_COLOURS = {
    plots.INK: "var(--ink)",
    plots.QUIET: "var(--quiet)",
    plots.FAINT: "var(--faint)",
    plots.TEST: "var(--test)",
    plots.TRAIN: "var(--train)",
}


def write_report(
    path: str | os.PathLike[str],
    trainer: Trainer,
    train: Any = None,
    test: Any = None,
    *,
    name: str = "data",
    image_shape: Sequence[int] | str | None = "guess",
    reproduce: str = "",
    resume: str = "",
    notes: Iterable[str] = (),
    labels: Any = None,
) -> None:
    """Writes what was trained, how well, how fast, on what and with what, to one HTML file, whole or not at
    all.

    Args:
        path: the file; one that is there is replaced.
        trainer: after ``fit``.
        train, test: the data of that training, as ``fit`` takes them (not streams); pictures and the latent
            activity
            are of the test data where there are any. Without either they are left out.
        name: of the data, for the headline. "MNIST" has the paper's values set beside ours where the model is
            the
            paper's, too.
        image_shape: (height, width) or (height, width, 3) of a datapoint; "guess" takes a square of 8 x 8
            pixels or
            more, and 28 x 20; None says that the data are no images.
        reproduce, resume: commands to print.
        notes: sentences for the section on the data.
        labels: classes of the datapoints shown, ``[N]``, to colour their latents by.

    Raises:
        IndexError: the trainer has no history yet.
        ValueError: image_shape does not fit the data.
        DataError: train or test cannot be read as the trainer reads them.
        OSError: the file cannot be written; the previous one is then whole.
    """
    write_atomically(
        path, _page(trainer, train, test, name, image_shape, reproduce, resume, notes, labels).encode()
    )


def write_atomically(path: str | os.PathLike[str], payload: bytes) -> None:
    """Writes a file that is the old one or the new one at any moment, never half of one."""
    target = os.path.realpath(path)
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _page(
    trainer: Trainer,
    train: Any,
    test: Any,
    name: str,
    image_shape: Sequence[int] | str | None,
    reproduce: str,
    resume: str,
    notes: Iterable[str],
    labels: Any,
) -> str:
    last = trainer.history.last
    train_data, test_data = _prepared(trainer, train, "train", None), None
    if test is not None:
        test_data = _prepared(trainer, test, "test", None if train_data is None else train_data.kind)
    shown = train_data if test_data is None else test_data
    paper = _comparable(trainer, name, shown)
    activity = None if shown is None else evaluation.active_units(trainer.model, shown)
    sections = [
        _section("Training curves", _inline(plots.curves(trainer.history, paper)), _curve_caption(paper)),
        _paper_section(trainer, last, paper),
    ]
    if shown is not None and activity is not None:
        sections += _pictures(
            trainer, shown, activity, image_shape, "training" if test_data is None else "test", labels
        )
    data_notes = [data.note for data in (train_data, test_data) if data is not None]
    sections += [
        _section("Data", _list([*data_notes, *notes, *_incidents(trainer)])),
        _section("Settings", _settings(trainer)),
        _section("Made with", _table(_machine(trainer))),
        _commands(reproduce, resume),
        _numbers(trainer.history),
    ]
    headline = _headline(trainer, name, last, train_data, activity)
    written = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    paper_title = "<cite>Auto-Encoding Variational Bayes</cite>"
    footer = f"<footer>Written {written}. Kingma &amp; Welling, {paper_title}, arXiv:1312.6114.</footer>"
    body = "\n".join([headline, *filter(None, sections), footer])
    return document(f"VAE on {name}", body)


def document(title: str, body: str) -> str:
    """A whole HTML page, with the style that all reports share; title is text, body is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _prepared(trainer: Trainer, data: Any, name: str, kind: str | None) -> Prepared | None:
    """As the trainer's fit reads it, on the model's device."""
    if data is None:
        return None
    settings = trainer.settings
    prepared = datasets.prepare(
        data,
        likelihood=trainer.model.likelihood,
        targets=kind or settings.targets,
        pixel_scale=settings.pixel_scale,
        name=name,
        width=trainer.model.data_dim,
    )
    return prepared.to(trainer.device)


# ---- sections ----------------------------------------------------------------------------------------------


def _headline(
    trainer: Trainer,
    name: str,
    last: HistoryRow,
    train: Prepared | None,
    activity: evaluation.ActiveUnits | None,
) -> str:
    seen = f"{last.samples:,} samples"
    epochs = "" if train is None else f", {last.samples / len(train):.3g} epochs of {len(train):,} datapoints"
    which, bound = (
        ("Test", last.test_bound) if last.test_bound is not None else ("Training", last.train_bound)
    )
    facts = [(f"{which} bound", _signed(bound), "nats per datapoint, higher is better")]
    facts.append(("Training time", _duration(last.seconds), f"{last.steps:,} steps, evaluation not counted"))
    if last.seconds > 0:
        rate = last.samples / last.seconds
        facts.append(
            ("Speed", f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}", "training samples per second")
        )
    if activity is not None:
        total = len(activity.variance)
        facts.append(("Latents in use", f"{activity.count} of {total}", "variance of E[z | x] above 0.01"))
    cards = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd><small>{escape(unit)}</small></div>"
        for label, value, unit in facts
    )
    return (
        f"<header>\n<h1>VAE on {escape(name)}</h1>\n<p>{escape(_model(trainer))}<br>"
        f"{escape(seen + epochs)}</p>\n<dl>{cards}</dl>\n</header>"
    )


def _model(trainer: Trainer) -> str:
    model, config = trainer.model, trainer.model.config
    if config is None:
        return f"Own encoder and decoder, {model.latent_dim} latents, {model.likelihood} likelihood"
    hidden = config["hidden_dims"]
    widths = [config["data_dim"], *hidden, config["latent_dim"], *hidden[::-1], config["data_dim"]]
    chain = " – ".join(map(str, widths))
    return f"{chain}, {config['activation']}, {str(model.likelihood).capitalize()} likelihood"


def _curve_caption(paper: plots.PaperCurve | None) -> str:
    caption = (
        "Train: mean over the minibatches since the point before, as the parameters moved. "
        "Test: the whole test set, one posterior sample per datapoint. Numbers are the last values."
    )
    if paper is not None:
        caption += f" Dashed: the paper’s figure 2 for {paper.latent_dim} latents."
    return caption


def _comparable(trainer: Trainer, name: str, data: Prepared | None) -> plots.PaperCurve | None:
    """The paper's curve, if model and data are: MNIST, real pixels, 500 tanh units, Bernoulli."""
    config = trainer.model.config
    if name != "MNIST" or config is None or data is None or data.kind != "real":
        return None
    ours = (config["hidden_dims"], config["activation"], config["likelihood"])
    return plots.paper_curve(config["latent_dim"]) if ours == ([500], "tanh", "bernoulli") else None


def _paper_section(trainer: Trainer, last: HistoryRow, paper: plots.PaperCurve | None) -> str:
    if paper is None or last.test_bound is None:
        return ""
    theirs, end = paper.at(last.samples), paper.at(PAPER_END)
    rows = [["samples seen", "this run", "paper", "difference"]]
    if theirs is not None:
        difference = last.test_bound - theirs
        word = "better" if difference >= 0 else "worse"
        said = (
            f"After {last.samples:,} samples the test bound is {_signed(last.test_bound)}; the paper’s drawn "
            f"curve is at {_signed(theirs)} there: {abs(difference):.2f} nats {word} here."
        )
        rows.append(
            [
                f"{last.samples:,}",
                _signed(last.test_bound),
                _signed(theirs),
                f"{'+' if difference >= 0 else '−'}{abs(difference):.2f}",
            ]
        )
    else:
        side = "begins" if last.samples < paper.samples[0] else "ends"
        where = paper.samples[0] if side == "begins" else paper.samples[-1]
        said = (
            f"The paper’s drawn curve {side} at {where:,.0f} samples; this run has seen {last.samples:,}, "
            "so there is nothing to compare at equal samples."
        )
    if end is not None:
        rows.append(
            [f"{PAPER_END:,}", "not trained so long" if last.samples < PAPER_END else "", _signed(end), ""]
        )
        if last.samples < PAPER_END:
            times = f"{PAPER_END / last.samples:,.3g} times as many"
            said += f" The paper’s goes on to {_signed(end)} at {PAPER_END:,} samples, {times}."
    differences = _differences(trainer)
    listed = f"<p>Not quite the same work. Here: {escape('; '.join(differences))}.</p>" if differences else ""
    return _section(
        "Beside the paper",
        f"<p>{escape(said)}</p>{_grid(rows)}{listed}",
        f"Paper: figure 2, MNIST, {paper.latent_dim} latents, AEVB test curve, read from the drawing. "
        "One seed each; at a million samples seeds differ by about 2 nats.",
    )


def _differences(trainer: Trainer) -> list[str]:
    """What the paper or its authors' code did otherwise."""
    settings = trainer.settings
    found = []
    if settings.optimizer != "adagrad":
        found.append(f"optimizer {settings.optimizer or type(trainer.optimizer).__name__} (theirs: Adagrad)")
    elif settings.lr not in (0.01, 0.02, 0.1):
        found.append(f"step size {settings.lr:g} (theirs: 0.01, 0.02 or 0.1)")
    if settings.batch_size != 100:
        found.append(f"minibatches of {settings.batch_size} (theirs: 100)")
    if settings.num_samples != 1:
        found.append(f"{settings.num_samples} posterior samples (theirs: 1)")
    if settings.beta != 1:
        found.append(f"β = {settings.beta:g} in the objective (theirs: 1)")
    if settings.order != "replacement":
        found.append("every datapoint once per epoch (theirs: drawn with replacement)")
    if settings.pixel_scale != 256:
        found.append(f"pixels over {settings.pixel_scale:g} (theirs: 256)")
    if not settings.weight_prior:
        found.append("no prior on the weights (theirs: N(0, I))")
    return found


def _pictures(
    trainer: Trainer,
    data: Prepared,
    activity: evaluation.ActiveUnits,
    image_shape: Sequence[int] | str | None,
    which: str,
    labels: Any,
) -> list[str]:
    model = trainer.model
    like = next(model.parameters())
    with torch.no_grad(), evaluation.evaluating(model):
        x = data.batch(spread(len(data), _PAIRS).to(data.values.device)).to(like)
        xhat = model.reconstruct(x)
        has_prior = model.latent_dim is not None
        drawn = model.sample(100, seed=trainer.settings.seed) if has_prior else None
    guessed = image_shape == "guess"
    shape = plots.image_shape(data.width) if guessed else image_shape
    bars = _figure_section(
        plots.latent_activity(activity.variance),
        "Each bar is Var<sub>x</sub>(E<sub>q</sub>[z]), the variance over the data of a posterior mean; "
        "units above the dashed line, 0.01, are in use.",
    )
    if shape is None:
        few = _TABLE_ROWS
        panels = {f"Data ({which})": x[:few], "Reconstructions": xhat[:few]}
        if drawn is not None:
            panels["Samples from the prior"] = drawn[:few]
        why = (
            f"{data.width} values are no square image, nor 28 × 20"
            if guessed
            else "the data are said to be no images"
        )
        caption = (
            f"No pictures: {why}. Rows are datapoints, in one order above and below; columns are features."
        )
        return [
            _section("Data, reconstructions and samples", _inline(plots.feature_rows(panels)), caption),
            bars,
            _latents(model, data, labels, activity.variance),
        ]
    assert not isinstance(shape, str)
    # Real numbers that are no pixels have no black and white of their own.
    pixels = (
        model.likelihood == "bernoulli" or data.scale != 1 or (float(x.min()) >= 0 and float(x.max()) <= 1)
    )
    options: dict[str, Any] = {
        "image_shape": shape,
        "value_range": (0.0, 1.0) if pixels else (float(x.min()), float(x.max())),
    }
    size = " × ".join(map(str, shape))
    said = (
        f"Evenly spaced rows of the {which} data, {size}; reconstructions are E[x | z] at the posterior mean."
    )
    found = [_figure_section(plots.reconstructions(x, xhat, **options), said)]
    if options["value_range"] == (0.0, 1.0):
        found.append(_denoising(model, x, which, trainer.settings.seed, options))
    if drawn is not None:
        found += [
            '<div class="columns">',
            _figure_section(
                plots.samples(model, seed=trainer.settings.seed, **options),
                "E[x | z] for draws of z from N(0, I).",
            ),
            _figure_section(
                plots.manifold(model, 20, variance=activity.variance, **options),
                "E[x | z] at the quantiles (i + ½) / 20 of the prior: images stand for equal shares of it.",
            ),
            "</div>",
        ]
    return [*found, bars, _latents(model, data, labels, activity.variance)]


def spread(count: int, most: int) -> Tensor:
    """Indices of at most so many evenly spaced rows of ``count``."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def _latents(model: Any, data: Prepared, labels: Any, variance: Tensor) -> str:
    """The posterior means of some of the data."""
    rows = spread(len(data), _POINTS)
    chosen = replace(data, values=data.values[rows.to(data.values.device)])
    mean = uses.encode(model, chosen).mean
    return _figure_section(
        plots.latents(mean, None if labels is None else torch.as_tensor(labels)[rows], variance=variance),
        f"E<sub>q</sub>[z] of {len(rows):,} datapoints. The prior has mean 0 and variance 1.",
    )


def _denoising(model: Any, x: Tensor, which: str, seed: int, options: Mapping[str, Any]) -> str:
    """Of pixels in [0, 1]: noisy, denoised and clean images, and the errors."""
    noisy = uses.corrupt(x, _NOISE, seed=seed)
    alone, found = (uses.denoise(model, noisy, _NOISE, steps=steps) for steps in (0, 50))
    before, encoded, after = (float((part - x).square().mean()) for part in (noisy, alone, found))
    rows = {"noisy": noisy, "denoised": found, "clean": x}
    return _figure_section(
        plots.stacked(rows, **options),
        f"Salt and pepper on {100 * _NOISE:g} % of the pixels of the {which} data above, then E[x | z] at "
        f"the likeliest z given the noisy image. Mean squared error of these {len(x)}: {before:.4f} noisy, "
        f"{after:.4f} denoised; {encoded:.4f} by encoder and decoder alone.",
    )


def _incidents(trainer: Trainer) -> list[str]:
    return [f"During training: {incident}" for incident in trainer.incidents]


def _settings(trainer: Trainer) -> str:
    config = trainer.model.config or {
        "encoder": "own",
        "decoder": "own",
        "likelihood": trainer.model.likelihood,
    }
    options = {
        key: value
        for key, value in trainer.optimizer.param_groups[0].items()
        if key not in ("params", "lr", "foreach", "fused", "capturable", "differentiable", "maximize")
    }
    settings = vars(trainer.settings)
    model, training = {**config}, {**settings}
    training["optimizer"] = settings["optimizer"] or type(trainer.optimizer).__name__
    training["optimizer options"] = ", ".join(f"{key} {_shown(value)}" for key, value in options.items())
    training["engine"] = f"{trainer.engine_name}: {trainer.engine_reason}"
    return f'<div class="columns">{_table(model, "Model")}{_table(training, "Training")}</div>'


def _machine(trainer: Trainer) -> dict[str, object]:
    from ._extension import build_info

    info = build_info()
    device = trainer.device
    machine = {"device": str(device), "processor": f"{_processor()}, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        machine["GPU"] = torch.cuda.get_device_name(device)
    cuda = (
        f"yes, for {', '.join(map(str, _items(info['cuda_archs'])))}"
        if info["cuda"]
        else f"no: {info['why_no_cuda']}"
    )
    return {
        **machine,
        "system": f"{platform.system()} {platform.machine()}",
        "vae-fast": info["version"],
        "torch": f"{info['torch']} (built with {info['torch_built_with']})",
        "Python": platform.python_version(),
        "CPU instructions in use": info["cpu_capability"],
        "CUDA kernels": cuda,
        "compiler": info["compiler"],
    }


def _items(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commands(reproduce: str, resume: str) -> str:
    parts = [("The same training again", reproduce), ("To go on", resume)]
    html = "".join(
        f"<p>{escape(what)}</p><pre><code>{escape(command)}</code></pre>"
        for what, command in parts
        if command
    )
    return _section("Commands", html) if html else ""


def _numbers(history: Iterable[HistoryRow]) -> str:
    columns = (
        "test_bound",
        "train_bound",
        "test_log_likelihood",
        "test_kl",
        "train_log_likelihood",
        "train_kl",
    )
    heads = [
        "samples",
        "seconds",
        *(
            column.replace("_", " ").replace("log likelihood", "log p(x|z)").replace("kl", "KL")
            for column in columns
        ),
    ]
    rows = [heads]
    for row in history:
        values = [getattr(row, column) for column in columns]
        rows.append(
            [
                f"{row.samples:,}",
                f"{row.seconds:.1f}",
                *("" if value is None else _signed(value) for value in values),
            ]
        )
    return f"<details><summary>All numbers of the curves</summary>{_grid(rows)}</details>"


# ---- HTML --------------------------------------------------------------------------------------------------


def _section(title: str, html: str, caption: str = "") -> str:
    """title is text, html and caption are HTML."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n<figure>{html}{below}</figure>\n</section>"


def _figure_section(figure: Figure, caption: str) -> str:
    """A figure whose title becomes the heading."""
    title = ""
    for ax in figure.axes:
        title = title or ax.get_title(loc="left")
        ax.set_title("", loc="left")
    return _section(title, _inline(figure), caption)


def _inline(figure: Figure) -> str:
    """The figure as an SVG element: text stays text, and colours are the page's."""
    import matplotlib

    file = io.StringIO()
    # "none" keeps text as text; the salt makes the ids inside the same from run to run.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "vae-fast", "svg.image_inline": True}
    ):
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            bbox_inches="tight",
            pad_inches=0.02,
            metadata={"Date": None},
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", '<svg role="img" ', 1)


def _table(rows: Mapping[str, object], title: str = "") -> str:
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    lines = "".join(
        f"<tr><th scope=row>{escape(key.replace('_', ' '))}</th><td>{escape(_shown(value))}</td></tr>"
        for key, value in rows.items()
    )
    return f'<table class="facts">{caption}{lines}</table>'


def _grid(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _list(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f6f8fa; --ink: #1f2328; --quiet: #6e7781;
  --faint: #e3e6ea; --test: #0072b2; --train: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --panel: #1c2026; --ink: #e6e9ed;
  --quiet: #98a2ad; --faint: #2c323a; --test: #56b4e9; --train: #f0833a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .4rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .9rem; }
header p { margin: 0; color: var(--quiet); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem;
  margin: 1.8rem 0 0; }
dl div { background: var(--panel); border-radius: .6rem; padding: .9rem 1.1rem 1rem; }
dt { font-size: .85rem; color: var(--quiet); }
dd { margin: 0; font-size: 1.65rem; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
small { display: block; font-size: .8rem; line-height: 1.35; color: var(--quiet); }
section, details { margin-top: 2.8rem; min-width: 0; }
figure { margin: 0; }
figure p { margin: 0 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }
figcaption { margin-top: .7rem; max-width: 46rem; font-size: .875rem; color: var(--quiet); }
svg { display: block; max-width: 100%; height: auto; }
svg text { font-family: inherit !important; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .38rem 1.2rem .38rem 0;
  border-bottom: 1px solid var(--faint); }
th { font-weight: 400; color: var(--quiet); white-space: nowrap; }
td { overflow-wrap: anywhere; }
.facts { width: 100%; }
.facts th { width: 11rem; }
.numbers th, .numbers td { text-align: right; padding: .38rem 0 .38rem 1.6rem; white-space: nowrap; }
.numbers th:first-child, .numbers td:first-child { text-align: left; padding-left: 0; }
.wide { overflow-x: auto; margin: 0 0 .8rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 1.5rem 3rem; align-items: start; }
section + .columns { gap: 0 3rem; }
pre { margin: .3rem 0 1rem; padding: .8rem 1rem; background: var(--panel); border-radius: .5rem;
  overflow-x: auto; font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .8rem; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--faint); font-size: .85rem;
  color: var(--quiet); }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""
