"""The whole training step, ours against the rivals, on this machine.

python -m bench.step [--batch M ...] [--hidden H ...] [--optimizer NAME ...] [--quick] [--out DIR]

Model, data, optimizers and rivals are those of rivals.py. Ours are the engines of vae_fast, driven as
Trainer.fit drives them: native in its two precisions and modules; what this version or machine does not have
is left out with a line that says why. Beside them, in the same turns, runs the matrix floor: the products of
the step alone, through torch.mm into memory that is there.

First every variant is checked: it follows float64 from minibatch to minibatch, and after 300 steps of the
paper's model its bound is float64's within the spread of seeds. Then they are timed in turns of many steps.
On a CPU all have the same --threads processors, and turns in which other processes took these are left out.

--out DIR receives a JSON file for each line, and REPORT.md with step.png from all such files that lie there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vae_fast
from vae_fast import engines
from vae_fast.batches import ArraySource
from vae_fast.datasets import prepare
from vae_fast.estimators import NOISE, step_seed
from vae_fast.optim import make_optimizer

from . import machine, rivals, step_report
from .rivals import GRAPH_STEPS, LATENT, LEARNING_RATES, Captured, Maker, Parameters, Source, Work
from .step_report import FLOOR
from .timing import _describe

OURS = {
    "native exact": ("native", "exact"),
    "native fast": ("native", "fast"),
    "modules": ("modules", "exact"),
}
CHECKED_STEPS = 300
PAPER = Work()  # what every optimizer is checked with over hundreds of steps
MOST_CHECKED_FLOP = 2e10  # of a step; following float64 in larger ones would take longer than timing them
BLOCK_SECONDS = {"cpu": 0.3, "cuda": 0.03}


class Ours:
    """An engine of vae_fast over the resident data set, in runs of as many steps as the trainer asks for."""

    unit = 1

    def __init__(self, work: Work, source: Source, seed: int, *, engine: str, precision: str) -> None:
        self.work, self.data = work, source.data
        pixels = (self.data * 255).round()  # as the trainer has them: bytes, wherever the data are that
        whole = torch.equal(pixels / 255, self.data)
        self._resident = pixels.to(torch.uint8) if whole else self.data
        self._engine_name, self._precision = engine, precision
        self.restart(seed)

    def restart(self, seed: int) -> None:
        work, device = self.work, self.data.device
        self.seed = seed
        self.model = vae_fast.VAE(
            data_dim=self.data.shape[1],
            hidden_dims=[work.hidden],
            latent_dim=LATENT,
            likelihood="bernoulli",
            seed=seed,
        ).to(device)
        self._set(rivals.initial(self.data.shape[1], work.hidden, seed))
        options = {"accumulate_steps": 0} if work.optimizer == "adagrad" else {}
        optimizer = make_optimizer(
            work.optimizer, self.model.parameters(), LEARNING_RATES[work.optimizer], **options
        )
        prepared = prepare(self._resident, likelihood="bernoulli", targets="real")
        self.source = ArraySource(
            prepared, batch_size=work.batch, seed=seed, order="replacement", device=device
        )
        self.engine, self.why = engines.make_engine(
            self._engine_name,
            self.model,
            optimizer,
            self.source,
            engines.Plan(seed),
            device,
            precision=self._precision,
        )
        self._most = self.engine.chunk_steps

    def _layers(self) -> dict[str, list[torch.nn.Linear]]:
        encoder, decoder = self.model.encoder, self.model.decoder
        return {
            "1": [encoder.hidden[0]],
            "2": [encoder.mu, encoder.logvar],
            "3": [decoder.hidden[0]],
            "4": [decoder.logits],
        }

    @torch.no_grad()
    def _set(self, start: Parameters) -> None:
        for name, layers in self._layers().items():
            for i, layer in enumerate(layers):
                layer.weight.copy_(start[f"w{name}"].chunk(len(layers))[i])
                layer.bias.copy_(start[f"b{name}"].chunk(len(layers))[i])

    def run(self, calls: int) -> None:
        while calls:
            n = min(calls, self._most)
            self.engine.run(n)
            calls -= n

    def finish(self) -> None:
        """A run returns when its steps are done."""

    def result(self) -> Parameters:
        found: Parameters = {}
        for name, layers in self._layers().items():
            found[f"w{name}"] = torch.cat([layer.weight for layer in layers]).detach().double().cpu()
            found[f"b{name}"] = torch.cat([layer.bias for layer in layers]).detach().double().cpu()
        return found

    def draws(self) -> OurDraws:
        """Of all steps from the first on: minibatches and noise are functions of (seed, step)."""
        return OurDraws(self)


class OurDraws:
    """What an engine of ours drew, again in float64 and without it."""

    def __init__(self, ours: Ours) -> None:
        self.data, self.ours, self.step = ours.data.double(), ours, 0

    def draw(self) -> tuple[Tensor, Tensor]:
        ours, device = self.ours, self.data.device
        rows = torch.from_numpy(ours.source.rows(self.step, 1)[0]).to(device)
        seed, shape = step_seed(ours.seed, self.step, NOISE), (ours.work.batch, LATENT)
        self.step += 1
        return self.data[rows], vae_fast.philox_normal(shape, seed=seed, dtype=torch.float64, device=device)


class Products:
    """The matrix products of a step and nothing else; on CUDA to be captured like a rival."""

    unit = 1

    def __init__(self, work: Work, source: Source, seed: int) -> None:
        self.device = source.data.device
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        products = []
        start = rivals.initial(source.data.shape[1], work.hidden, seed)
        for i in range(1, 5):
            weight = start[f"w{i}"].to(self.device)
            fan_out, fan_in = weight.shape
            x, gradient = normal(work.batch, fan_in), normal(work.batch, fan_out)
            products += [(x, weight.t()), (gradient.t(), x)]
            if i > 1:  # nobody asks for the gradient in the data
                products.append((gradient, weight))
        self.products = [(a, b, a.new_empty(a.shape[0], b.shape[1])) for a, b in products]

    def run(self, calls: int) -> None:
        for _ in range(calls):
            for a, b, out in self.products:
                torch.mm(a, b, out=out)

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def restart(self, seed: int) -> None:
        pass

    def result(self) -> Parameters:
        return {}


def flop(work: Work, width: int) -> int:
    """Of the products of a step: forward, in the weights, in the inputs of all layers but the first."""
    weights = [p.numel() for name, p in rivals.initial(width, work.hidden, 0).items() if name[0] == "w"]
    return 2 * work.batch * (3 * sum(weights) - weights[0])


# ---- who takes part ----------------------------------------------------------------------------------------


def _engine(engine: str, precision: str) -> Maker:
    return lambda work, source, seed, _: Ours(work, source, seed, engine=engine, precision=precision)


def _floor(work: Work, source: Source, seed: int, epoch: int) -> rivals.Rival:
    products = Products(work, source, seed)
    return Captured(products, seed) if source.data.is_cuda else products


def makers() -> Mapping[str, Maker]:
    ours = {name: _engine(*how) for name, how in OURS.items()}
    return {**ours, FLOOR: _floor, **rivals.MAKERS}


def ours_here(device: torch.device) -> tuple[dict[str, str], list[str]]:
    """How each of our variants computes on this device, and a line for each that there is not."""
    found, missing = {}, []
    source = Source(torch.zeros((4, 8), device=device), 2)
    for name in OURS:
        try:
            found[name] = makers()[name](Work(batch=2, hidden=4), source, 0, 1).why
        except Exception as error:
            missing.append(f"{name}: {_describe(error)}")
    return found, missing


def works(batches: Sequence[int], hidden: Sequence[int], optimizers: Sequence[str]) -> list[Work]:
    """The paper's sizes first."""
    return [Work(m, h, name) for h, name, m in product(hidden, optimizers, batches)]


# ---- a line ------------------------------------------------------------------------------------------------


def distances(chosen: Sequence[str], work: Work, data: Tensor) -> dict[str, dict[str, Any]]:
    """Of each variant at this size, see rivals.distance, and whether it is small."""
    found: dict[str, dict[str, Any]] = {}
    for name in chosen:
        try:
            value = rivals.distance(name, work, data, steps=GRAPH_STEPS, makers=makers())
            found[name] = {"distance": value, "right": value <= farthest(name)}
        except Exception as error:
            found[name] = {"distance": None, "right": False, "error": _describe(error)}
        rivals._forget()
    return found


def farthest(name: str) -> float:
    """Half-precision products are another curve, and only the bound after hundreds of steps is held to."""
    return float("inf") if name == "native fast" else rivals.MAX_DISTANCE


def line(
    chosen: Sequence[str], work: Work, data: Tensor, *, seconds: float | None, check: bool, block: float
) -> dict[str, Any]:
    """Everything measured of one work; ``chosen`` without the floor, which is always there. seconds: None
    times nothing."""
    found: dict[str, Any] = {"flop": flop(work, data.shape[1]), "distances": {}}
    if check and found["flop"] <= MOST_CHECKED_FLOP:
        found["distances"] = distances(chosen, work, data)
    if seconds is None:
        return found | {"work": asdict(work), "rivals": {}}
    names = [FLOOR, *chosen]
    return found | rivals.bench(names, work, data, seconds=seconds, block=block, makers=makers())


def wrong(result: dict[str, Any]) -> list[str]:
    """The variants that a check found wrong; they are slower or faster than nothing."""
    checks = [result["distances"], *(check["rivals"] for check in result["checks"])]
    return sorted({name for check in checks for name, entry in check.items() if not entry["right"]})


# ---- the command -------------------------------------------------------------------------------------------


def same_processors(threads: int) -> None:
    """As many as there are threads, for all: XLA has no other way to be told."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if threads < len(allowed):
            os.sched_setaffinity(0, allowed[:threads])
    torch.set_num_threads(threads)


def run(
    todo: Sequence[Work],
    chosen: Sequence[str],
    device: torch.device,
    *,
    seconds: float | None,
    check: bool,
    command: str,
    done: Callable[[dict[str, Any]], None],
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """A result for every work, in the order given; ``done`` receives each as soon as it is there."""
    from vae_fast import datasets

    train, test = (images.to(device).float() / 255 for images in datasets.mnist())
    facts = machine.describe(command)
    how, missing = ours_here(device)
    for reason in missing:
        say(f"left out: {reason}")
    here = [name for name in (*how, *rivals.names(device)) if name in chosen]
    checks: dict[str, dict[str, Any]] = {}
    results = []
    for work in todo:
        if check and work.optimizer not in checks:
            say(f"checking with {work.optimizer} over {CHECKED_STEPS} steps")
            paper = Work(optimizer=work.optimizer)
            checks[work.optimizer] = rivals.check(
                here,
                paper,
                train,
                test,
                steps=CHECKED_STEPS,
                reference_seeds=5,
                seeds=2,
                makers=makers(),
                farthest=farthest,
            )
        say(f"timing {work}" if seconds is not None else f"following float64 with {work}")
        result = {
            **facts,
            "machine": machine.name(device),
            "device": str(device),
            "ours": how,
            "missing": missing,
            "checks": [checks[work.optimizer]] if check else [],
            **line(here, work, train, seconds=seconds, check=check, block=BLOCK_SECONDS[device.type]),
        }
        rivals._forget()
        done(result)
        results.append(result)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everybody = [name for name in makers() if name != FLOOR]
    parser.add_argument("--batch", type=int, nargs="+", default=[100, 1000, 8192], metavar="M")
    parser.add_argument("--hidden", type=int, nargs="+", default=[500, 2000], metavar="H")
    parser.add_argument("--optimizer", nargs="+", default=list(LEARNING_RATES), choices=list(LEARNING_RATES))
    parser.add_argument("--quick", action="store_true", help="batch 100, hidden 500, Adagrad only, unchecked")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--only", nargs="+", choices=everybody, default=everybody, help="these variants")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--no-check", action="store_true", help="time only")
    either.add_argument("--check-only", action="store_true", help="time nothing: the machine may be busy")
    parser.add_argument("--seconds", type=float, help="per variant and line (0.5 on a GPU, 6 on a CPU)")
    parser.add_argument("--out", type=Path, help="a folder for JSON files, REPORT.md and step.png")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        same_processors(arguments.threads)
    todo = works(arguments.batch, arguments.hidden, arguments.optimizer)
    if arguments.quick:
        todo = [PAPER]
    start = time.perf_counter()

    def done(result: dict[str, Any]) -> None:
        print(step_report.text(result))
        if arguments.out:  # after every line: whatever stops this program later, that much is there
            step_report.write(result, arguments.out)

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {what}", file=sys.stderr, flush=True)

    default = 0.5 if device.type == "cuda" else 6.0
    seconds = default if arguments.seconds is None else arguments.seconds
    results = run(
        todo,
        arguments.only,
        device,
        seconds=None if arguments.check_only else seconds,
        check=not (arguments.no_check or arguments.quick),
        command=shlex.join(["python", "-m", "bench.step", *argv]),
        done=done,
        say=say,
    )
    if found := sorted({name for result in results for name in wrong(result)}):
        raise SystemExit(f"not right, see the distances and bounds: {', '.join(found)}")


if __name__ == "__main__":
    main()
