"""Microseconds per training step of the paper's MNIST model (784-500-20-500-784, Adagrad), by engine.

python -m bench.training [--device cpu|cuda] [--steps N] [--out DIR]

Each engine trains through Trainer.fit for some blocks of steps; the first block, with warm-up and capture, is
not counted. Engines take turns, and the median over blocks is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import machine
from .timing import summarise

ENGINES = ("modules", "reference")


def step_times(engine: str, batch_size: int, device: torch.device, steps: int, blocks: int) -> list[float]:
    """Microseconds per step, for every block but the first."""
    import vae_fast

    data = torch.randint(0, 256, (20_000, 784), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = vae_fast.VAE(data_dim=784, hidden_dims=[500], latent_dim=20, likelihood="bernoulli", seed=0)
    settings = {"optimizer": "adagrad", "lr": 0.02, "seed": 0, "order": "replacement"}
    trainer = vae_fast.Trainer(model, engine=engine, batch_size=batch_size, device=device, **settings)
    every = steps * batch_size
    history = trainer.fit(data, max_samples=(blocks + 1) * every, report_every=every, progress=False)
    rows = list(history)
    return [
        1e6 * (after.seconds - before.seconds) / (after.steps - before.steps)
        for before, after in pairwise(rows)
    ]


def run(device: torch.device, steps: int, batch_sizes: Sequence[int]) -> dict[str, Any]:
    lines = []
    for batch_size in batch_sizes:
        samples: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for turn in range(2):
            for engine in ENGINES if turn % 2 == 0 else ENGINES[::-1]:
                samples[engine] += step_times(engine, batch_size, device, steps, blocks=4)
        engines = {name: summarise(values, "clock").to_dict() for name, values in samples.items()}
        lines.append({"batch_size": batch_size, "steps_per_block": steps, "engines": engines})
    return {"machine": machine.name(device), "torch": torch.__version__, "steps": lines}


def table(result: dict[str, Any]) -> str:
    lines = ["us per step  batch" + "".join(f"{name:>30}" for name in ENGINES) + "   reference/modules"]
    for line in result["steps"]:
        cells = [line["engines"][name] for name in ENGINES]
        text = [f"{c['median']:.1f} ({c['low']:.1f} to {c['high']:.1f})" for c in cells]
        ratio = line["engines"]["reference"]["median"] / line["engines"]["modules"]["median"]
        lines.append(f"{line['batch_size']:>18}" + "".join(f"{t:>30}" for t in text) + f"   {ratio:.2f}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--steps", type=int, help="per block (1000 on a GPU, 50 on a CPU)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[100])
    parser.add_argument("--out", type=Path, help="a folder for training.json and training.txt")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    result = run(device, arguments.steps or (1000 if device.type == "cuda" else 50), arguments.batch_sizes)
    result["command"] = " ".join(["python -m bench.training", *sys.argv[1:]])
    text = table(result)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "training.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
