"""Table 1 of those who came after: Burda, Grosse & Salakhutdinov, *Importance Weighted Autoencoders*,
arXiv:1509.00519, MNIST with one stochastic layer; log p(x) by importance sampling, and active units.

3280 passes over the data: 3^i of them with step size 10^(-3 - i / 7), i = 0 ... 7. Adam with beta1 = 0.99 and
epsilon = 1e-4. The decoder's output biases begin at the logit of the training data's mean. Pixels are drawn
anew at each use, those of the test data once. Unlike in their code, Adam's second moments begin at 0, and
weights at N(0, 1 / inputs).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import datasets, evaluation, presets
from .._extension import build_info
from ..datasets import Prepared
from ..report import write_atomically
from ..trainer import Trainer
from .curves import CurveError

# (negative log-likelihood in nats, active units), as published; one sample makes both bounds the same
PUBLISHED: dict[str, tuple[float, int]] = {
    "vae-1": (86.76, 19),
    "vae-5": (86.47, 20),
    "vae-50": (86.35, 20),
    "iwae-5": (85.54, 22),
    "iwae-50": (84.78, 25),
}
PANELS = tuple(PUBLISHED)
ESTIMATORS = {"vae": "sgvb_b", "iwae": "iwae"}
STAGES = 8
ADAM = {"betas": (0.99, 0.999), "eps": 1e-4}
IMPORTANCE_SAMPLES = 5000
TABLE, SETTINGS = "table1.md", "table1.json"


@dataclass(frozen=True)
class Row:
    """``nll``: the mean of -log p(x) over the test data, nats."""

    name: str
    nll: float
    active_units: int
    samples: int
    seconds: float


@dataclass(frozen=True)
class Result:
    rows: list[Row]
    settings: dict[str, Any]

    def table(self) -> str:
        """As Markdown, the published values beside ours."""
        lines = [
            "| bound | samples of z | −log p(x), nats | published | difference | active units | published |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            kind, _, count = row.name.partition("-")
            nll, units = PUBLISHED[row.name]
            lines.append(
                f"| {kind.upper()} | {count} | {row.nll:.2f} | {nll:.2f} | {row.nll - nll:+.2f} "
                f"| {row.active_units} | {units} |"
            )
        passes, samples = self.settings["passes"], self.settings["importance_samples"]
        lines += ["", f"{passes:,.3g} of 3280 passes; log p(x) by {samples:,} samples of z."]
        return "\n".join(lines) + "\n"


def run(
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    panels: Sequence[str] = PANELS,
    mnist: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    engine: str = "auto",
    progress: bool = True,
) -> Result:
    """Trains what is missing of the rows, and writes table1.md and table1.json into ``out``.

    Args:
        out: the folder. A row goes on where it stopped; a finished one is not trained again.
        scale: fraction of the 3280 passes, with each step size as much; of the 5000 importance samples,
            too, but 100 at least.
        panels: some of ``PANELS``: "vae-5" has five samples of z to a datapoint.
        mnist: a folder as :func:`vae_fast.datasets.mnist` takes it; None: the bundled one.
        seed: of initial values, minibatches and noise.
        device, engine: where and how to train; "native" has no importance-weighted bound, and "auto" is
            taken for it.
        progress: a bar on stderr if that is a terminal.

    Raises:
        CurveError: unknown panels, none, or a folder with rows of another scale or seed.
        KeyboardInterrupt: after Ctrl-C; the same call goes on.
    """
    if unknown := [name for name in panels if name not in PANELS]:
        raise CurveError(f"panels: got {unknown[0]!r}, wanted some of {', '.join(PANELS)}")
    if not panels:
        raise CurveError("panels: got none, wanted one or more")
    train, test = (
        datasets.prepare(part, likelihood="bernoulli", targets="dynamic", name=name)
        for part, name in zip(datasets.mnist(mnist), ("train", "test"), strict=True)
    )
    folder = Path(out)
    importance_samples = max(100, round(min(scale, 1) * IMPORTANCE_SAMPLES))
    rows = []
    for name in (name for name in PANELS if name in panels):
        trainer = _trained(name, folder, train, scale, seed, device, engine, progress)
        likelihood = evaluation.importance_log_likelihood(
            trainer.model, test.to(trainer.device), num_samples=importance_samples, seed=seed
        )
        units = evaluation.active_units(trainer.model, test.to(trainer.device), seed=seed)
        rows.append(Row(name, -likelihood.mean, units.count, trainer.samples_seen, trainer.seconds))
    settings = {
        "scale": scale,
        "seed": seed,
        "device": device,
        "importance_samples": importance_samples,
        "passes": rows[-1].samples / len(train),
        "adam": ADAM,
        "versions": build_info(),
    }
    result = Result(rows, settings)
    content = {"rows": [asdict(row) for row in rows], "published": PUBLISHED, "settings": settings}
    write_atomically(folder / SETTINGS, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(folder / TABLE, result.table().encode())
    return result


def stages(scale: float, count: int, batch_size: int) -> list[tuple[int, float]]:
    """(samples after which it ends, step size) of each, whole minibatches and one at least."""
    found, end = [], 0
    for i in range(STAGES):
        end += max(1, round(scale * 3**i * count / batch_size)) * batch_size
        found.append((end, 10 ** (-3 - i / 7)))
    return found


def _trained(
    name: str,
    folder: Path,
    train: Prepared,
    scale: float,
    seed: int,
    device: str,
    engine: str,
    progress: bool,
) -> Trainer:
    kind, _, samples = name.partition("-")
    preset = presets.iwae_mnist(int(samples), estimator=ESTIMATORS[kind])
    if kind == "iwae" and engine == "native":
        engine = "auto"
    trainer = preset.trainer(seed=seed, device=device, engine=engine)
    mean = train.values.mean(dim=0, dtype=torch.float64).div(train.scale).clamp(1e-3, 1 - 1e-3)
    decoder: Any = trainer.model.decoder
    with torch.no_grad():
        decoder.logits.bias.copy_(torch.logit(mean))
    trainer.optimizer.param_groups[0].update(ADAM)
    where = folder / "table1" / name
    checkpoint, spec = where / "checkpoint.safetensors", {"scale": scale, "seed": seed}
    if checkpoint.exists():
        found = json.loads((where / "row.json").read_text(encoding="utf-8"))
        if found != spec:
            raise CurveError(f"{where}: found a row of {found}, wanted {spec}; choose another --out")
        trainer.resume(checkpoint)
    else:
        where.mkdir(parents=True, exist_ok=True)
        write_atomically(where / "row.json", json.dumps(spec).encode())
    for end, lr in stages(scale, len(train), trainer.settings.batch_size):
        if trainer.samples_seen < end:
            trainer.optimizer.param_groups[0]["lr"] = lr  # of a resumed optimizer this is another dict
            left = end - trainer.samples_seen
            trainer.fit(train, max_samples=left, checkpoint=checkpoint, progress=progress)
    return trainer
