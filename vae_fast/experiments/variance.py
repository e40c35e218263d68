"""The variance of the gradient estimators on one model and one minibatch: the paper's reason for
reparameterization ("very high variance", section 2.2), in numbers.

The paper's MNIST model is trained by SGVB-B for a number of steps. Then, with the parameters and a minibatch
held fixed, each estimator draws its gradient many times. What is reported is over the coordinates of the
gradient with respect to the encoder's parameters; the decoder's is the same Monte Carlo mean for all of them.

The encoder runs once: a draw's gradient with respect to its parameters is that with respect to (mu, logvar),
times a Jacobian that stays.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import functional, plots, presets
from .._extension import build_info
from ..datasets import mnist, prepare
from ..estimators import ESTIMATORS, EVALUATE, initial_state, step_seed
from ..nn import VAE
from ..report import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = (1, 2, 5)  # L
EXACT_SAMPLES = 2000  # of SGVB-B, whose mean stands for the exact gradient
SETTLING_STEPS = 50  # of a running baseline, before its variance is measured
CSV, SETTINGS, TABLE, FIGURE = "variance.csv", "variance.json", "variance.md", "variance.png"

_LABELS = {
    "sgvb_b": "SGVB-B",
    "sgvb_a": "SGVB-A",
    "score_function": "score function",
    "score_function_running": "… running baseline",
    "score_function_leave_one_out": "… leave-one-out baseline",
}
_QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
_MOST_ROWS = 1000  # decoded at a time
_MOST_DRAWS = 10  # whose gradients are held at a time


@dataclass(frozen=True)
class Row:
    """One estimator with L samples, over the coordinates whose gradient SGVB-B does not know for certain.

    ``variance`` is the median of Var(g). ``ratio_*`` are quantiles, in per cent, of Var(g) over that of
    SGVB-B with the same L.
    ``bias`` is the root of the mean of squares of (mean of g - exact gradient) / its standard error: about 1
    where there is no bias.
    """

    estimator: str
    num_samples: int
    draws: int
    variance: float
    ratio_5: float
    ratio_25: float
    ratio_50: float
    ratio_75: float
    ratio_95: float
    bias: float


@dataclass(frozen=True)
class Result:
    rows: list[Row]
    settings: dict[str, Any]

    def row(self, estimator: str, num_samples: int = 1) -> Row:
        return next(r for r in self.rows if (r.estimator, r.num_samples) == (estimator, num_samples))

    def table(self) -> str:
        """A table in Markdown."""
        lines = [
            "| estimator | L | median Var | Var / Var of SGVB-B: median | 5 to 95 % | bias / its error |",
            "|---|---|---|---|---|---|",
        ]
        for r in self.rows:
            label = _LABELS[r.estimator].replace("…", "score function,")
            lines.append(
                f"| {label} | {r.num_samples} | {r.variance:.2e} | {_short(r.ratio_50)} "
                f"| {_short(r.ratio_5)} to {_short(r.ratio_95)} | {r.bias:.2f} |"
            )
        return "\n".join(lines) + "\n"


def run(
    out: str | os.PathLike[str],
    *,
    train: Any = None,
    steps: int = 1000,
    draws: int = 300,
    samples: Sequence[int] = SAMPLES,
    exact_samples: int = EXACT_SAMPLES,
    latent_dim: int = 20,
    seed: int = 0,
    scale: float = 1.0,
    device: str = "cpu",
    progress: bool = True,
) -> Result:
    """Trains, measures, and writes variance.csv, .json, .md and .png into the folder ``out``.

    Args:
        out: the folder, made if it is not there.
        train: data ``[N, 784]``; MNIST when left out.
        steps: of training before the measurement.
        draws: gradients per estimator and L, times ``scale``.
        samples: the L to measure at; the leave-one-out baseline is left out of L = 1.
        exact_samples: of SGVB-B, whose mean stands for the exact gradient.
        seed: of all random numbers.
        scale: fraction of the draws; less is faster and less exact.
        progress: a bar on stderr if that is a terminal.
    """
    draws = round(draws * scale)
    if draws < 2:
        raise ValueError(f"draws, scale: got {draws} draws in all, wanted 2 or more")
    began = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    preset = presets.paper_mnist(latent_dim)
    trainer = preset.trainer(seed=seed, device=device)
    data = prepare(mnist()[0] if train is None else train, likelihood="bernoulli", pixel_scale=256, width=784)
    size = preset.trainer_options["batch_size"]
    trainer.fit(data, max_samples=steps * size, progress=progress)
    x = data.batch(torch.arange(min(size, len(data)))).to(trainer.device)
    how: dict[str, Any] = {
        "draws": draws,
        "samples": list(samples),
        "exact_samples": exact_samples,
        "seed": seed,
    }
    rows = measure(trainer.model, x, **how, progress=progress)
    settings = {
        "steps": steps,
        **how,
        "minibatch": f"the first {len(x)} training datapoints",
        "parameters": "the encoder's",
        "train_bound": trainer.history.last.train_bound,
        "model": preset.model_options,
        "training": preset.trainer_options,
        "versions": build_info(),
        "seconds": time.perf_counter() - began,
    }
    result = Result(rows, settings)
    write(result, folder)
    return result


def measure(
    model: VAE,
    x: Tensor,
    *,
    draws: int,
    samples: Sequence[int] = SAMPLES,
    estimators: Sequence[str] = tuple(_LABELS),
    exact_samples: int = EXACT_SAMPLES,
    seed: int = 0,
    progress: bool = False,
) -> list[Row]:
    """The rows of a model and a minibatch ``[B, D]``: of each number of samples, of each estimator."""
    pairs = [
        (count, name)
        for count in samples
        for name in (
            "sgvb_b",
            *(name for name in estimators if name != "sgvb_b"),
        )  # what ratios are to: first
        if count > 1 or name != "score_function_leave_one_out"
    ]
    gradient = _EncoderGradient(model, x)
    exact = gradient.exact(exact_samples, seed)
    rows: list[Row] = []
    reference = torch.empty(0)
    for count, name in tqdm(
        pairs, disable=None if progress else True, file=sys.stderr, unit=" estimators", dynamic_ncols=True
    ):
        deviation, variance = _moments(gradient.draws(name, count, draws, seed), exact)
        if name == "sgvb_b":
            reference = variance
        live = reference > 0  # where a pixel is 0 in all of the minibatch, gradients are 0
        error = (variance / draws + reference * count / exact_samples).sqrt()
        bias = (deviation / error)[live & (variance > 0)].square().mean().sqrt()
        q5, q25, q50, q75, q95 = torch.quantile((variance / reference)[live], _QUANTILES).tolist()
        median = float(variance[live].median())
        rows.append(Row(name, count, draws, median, q5, q25, q50, q75, q95, float(bias)))
    return rows


class _EncoderGradient:
    """Gradients of a minibatch's mean objective with respect to all parameters of the encoder, P in all."""

    def __init__(self, model: VAE, x: Tensor) -> None:
        self._model, self._x = model, x
        self._params = [p for p in model.encoder.parameters() if p.requires_grad]
        self._outputs: tuple[Tensor, Tensor] = model.encoder(x)

    def draws(self, name: str, num_samples: int, count: int, seed: int) -> Iterator[Tensor]:
        """``count`` draws of the gradient, some at a time; ``[n, P]``."""
        state = initial_state(name, self._x.device)
        for step in range(SETTLING_STEPS if state else 0):
            self._at_outputs(name, num_samples, 1, step_seed(seed + 1, step, EVALUATE), state)
        most = max(1, min(_MOST_DRAWS, _MOST_ROWS // (num_samples * len(self._x))))
        for first in range(0, count, most):
            copies = min(most, count - first)
            noise = step_seed(seed, first, EVALUATE)
            yield self._at_parameters(self._at_outputs(name, num_samples, copies, noise, state))

    def exact(self, num_samples: int, seed: int) -> Tensor:
        """The mean of SGVB-B over so many samples of z, none of which ``draws`` has; ``[P]``."""
        total = [torch.zeros_like(t, dtype=torch.float64) for t in self._outputs]
        done, most = 0, max(1, _MOST_ROWS // len(self._x))
        while done < num_samples:
            count = min(most, num_samples - done)
            found = self._at_outputs("sgvb_b", count, 1, step_seed(seed + 2, done, EVALUATE), {})
            for sum_, part in zip(total, found, strict=True):
                sum_ += count * part[0]
            done += count
        means = [(t / num_samples).to(self._x.dtype).unsqueeze(0) for t in total]
        return self._at_parameters(means)[0]

    def _at_outputs(
        self, name: str, num_samples: int, copies: int, seed: int, state: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        """With respect to mu and logvar, of several draws; each ``[copies, B, Z]``.

        The estimator takes the draws as so many times the datapoints, whose noise is then their own.
        """
        mu, logvar = (t.detach().repeat(copies, 1).requires_grad_() for t in self._outputs)
        outputs_as_leaves = SimpleNamespace(
            encoder=lambda x: (mu, logvar),
            decoder=self._model.decoder,
            likelihood=self._model.likelihood,
            posterior=self._model.posterior,
        )
        x = self._x.repeat(copies, 1)
        estimate = ESTIMATORS[name](outputs_as_leaves, x, seed, num_samples, 1.0, functional, **state)
        found = torch.autograd.grad(estimate.objective.sum() / len(self._x), (mu, logvar))
        return [g.view(copies, *own.shape) for g, own in zip(found, self._outputs, strict=True)]

    def _at_parameters(self, at_outputs: Sequence[Tensor]) -> Tensor:
        """``[n, B, Z]`` twice to ``[n, P]``, through the encoder's one pass."""
        found = torch.autograd.grad(
            self._outputs, self._params, at_outputs, retain_graph=True, is_grads_batched=True
        )
        return torch.cat([g.flatten(1) for g in found], dim=1)


def _moments(draws: Iterator[Tensor], origin: Tensor) -> tuple[Tensor, Tensor]:
    """Mean minus ``origin``, and the unbiased variance, in float64; ``[P]`` each.

    ``origin`` is so near the mean that nothing cancels in a sum of squares of deviations from it.
    """
    count = 0
    total, squares = (torch.zeros_like(origin, dtype=torch.float64) for _ in range(2))
    for some in draws:
        deviation = some - origin
        total += deviation.sum(dim=0, dtype=torch.float64)
        squares += deviation.square_().sum(dim=0, dtype=torch.float64)
        count += len(some)
    variance = (squares - total**2 / count) / (count - 1)
    return (total / count).cpu(), variance.clamp_min(0).cpu()


# ---- what is written ---------------------------------------------------------------------------------------


def write(result: Result, folder: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in result.rows)
    picture = io.BytesIO()
    plot(result).savefig(picture, format="png")
    for name, payload in (
        (CSV, text.getvalue().encode()),
        (SETTINGS, (json.dumps(result.settings, indent=1) + "\n").encode()),
        (TABLE, result.table().encode()),
        (FIGURE, picture.getvalue()),
    ):
        write_atomically(folder / name, payload)


def plot(result: Result) -> Figure:
    """Each estimator's variance over that of SGVB-B: the median, half and nine tenths of the coordinates."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    groups: dict[int, list[Row]] = {}
    for row in result.rows:
        groups.setdefault(row.num_samples, []).append(row)
    figure = plots._figure(7.4, 0.9 + 0.3 * len(result.rows) + 0.3 * len(groups))
    ax = figure.add_subplot()
    plots._style(ax, f"Variance of the encoder's gradient after {result.settings['steps']:,} steps")
    y, places, labels = 0.0, [], []
    for count, rows in groups.items():
        for row in rows:
            colour = plots.TEST if row.estimator.startswith("sgvb") else plots.TRAIN
            ax.plot([row.ratio_5, row.ratio_95], [y, y], color=colour, lw=1.2, zorder=3)
            ax.plot([row.ratio_25, row.ratio_75], [y, y], color=colour, lw=6, solid_capstyle="butt", zorder=3)
            ax.plot(row.ratio_50, y, "o", ms=5, mfc="white", mec=colour, mew=1.4, zorder=4)
            ax.annotate(
                f"{_short(row.ratio_50)}×",
                (max(row.ratio_95, row.ratio_50), y),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=plots.INK,
            )
            places.append(y)
            labels.append(f"{_LABELS[row.estimator]}, L = {count}")
            y += 1
        y += 0.6
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * (high / low) ** 0.09)  # room for the last number
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(False, axis="y")
    ax.grid(True, axis="x", color=plots.FAINT, lw=0.8)
    ax.set_xlabel(
        "Var / Var of SGVB-B with the same L: median, half, nine tenths of the coordinates", color=plots.QUIET
    )
    return figure


def _short(value: float) -> str:
    """Three digits, without an exponent where it is no longer than that: 1.23, 15.5, 13,900."""
    return f"{float(f'{value:.3g}'):,g}" if value < 1e6 else f"{value:.2g}"
