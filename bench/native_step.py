"""The native engine's CUDA step on this GPU: first whether it is right, then microseconds per step.

python -m bench.native_step [--out DIR] [--quick]    writes DIR/native_step.json and native_step.txt
python -m bench.native_step --once                   small networks of every kind, for compute-sanitizer

Right: the paper's model on MNIST, exact and fast, against the reference engine in float64 on the same GPU,
with the same seed, order and noise. The exit status is 1 where `exact` strays by more than 0.05 nat in the
mean of 100 steps, or two equal runs differ in a bit. Timed is run() as the trainer calls it, copies of rows
and terms included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import machine

SEED = 0
TOLERANCE = 0.05  # nats, of means over 100 steps
STATES = {"sgd": 0, "adagrad": 1, "adam": 2, "adamw": 2}
OPTIONS = {"lr": 0.02, "eps": 1e-8, "beta1": 0.9, "beta2": 0.999, "momentum": 0.0, "weight_decay": 0.0}


def make_step(model: Any, data: Tensor, **given: Any) -> tuple[Any, list[Tensor]]:
    """A CudaStep of this VAE on a copy of its parameters, and the copy."""
    from vae_fast import _C

    parameters = [p.detach().to(data.device, torch.float32, copy=True) for p in model.parameters()]
    optimizer = given.get("optimizer", "adagrad")
    widths = {
        half: [layer.out_features for layer in net.hidden if isinstance(layer, torch.nn.Linear)]
        for half, net in (("encoder", model.encoder), ("decoder", model.decoder))
    }
    arguments: dict[str, Any] = {
        "data_dim": model.data_dim,
        "latent_dim": model.latent_dim,
        "encoder_hidden": widths["encoder"],
        "decoder_hidden": widths["decoder"],
        "activation": model.config["activation"],
        "likelihood": model.likelihood + ("_sigmoid_mean" if model.config["mean_activation"] else ""),
        "estimator": "sgvb_b",
        "num_samples": 1,
        "beta": 1.0,
        "weight_prior": 0.0,
        "optimizer": optimizer,
        "options": {**OPTIONS, "accumulate_steps": 100},
        "precision": "exact",
        "parameters": parameters,
        "states": [[torch.zeros_like(p) for p in parameters] for _ in range(STATES[optimizer])],
        "data": data,
        "packed": False,
        "dynamic": False,
        "scale": 1 / 255,
        "batch_size": 100,
    }
    return _C.CudaStep(**{**arguments, **given}), parameters


def steps_of(count: int, batch_size: int, first: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, sizes and seeds of n steps."""
    from vae_fast.batches import MinibatchOrder
    from vae_fast.estimators import BINARISE, NOISE, step_seed

    order = MinibatchOrder(count, batch_size, SEED)
    steps = range(first, first + n)
    seeds = [[step_seed(SEED, step, stream) for stream in (NOISE, BINARISE)] for step in steps]
    return (
        torch.from_numpy(order.rows(first, n)),
        torch.from_numpy(order.sizes(first, n)),
        torch.tensor(seeds, dtype=torch.int64),
    )


def paper_model(hidden: int = 500) -> Any:
    import vae_fast as vf

    return vf.VAE(data_dim=784, hidden_dims=[hidden], latent_dim=20, likelihood="bernoulli", seed=SEED)


def check(data: Tensor, n: int) -> dict[str, float]:
    """Largest differences from the reference in means over 100 steps, nats; nan if a repeat differs."""
    from vae_fast import reference
    from vae_fast.batches import ArraySource
    from vae_fast.datasets import Prepared
    from vae_fast.engines import AutogradEngine, Plan, StepProgram
    from vae_fast.optim import make_optimizer

    model = paper_model().double().to(data.device)
    source = ArraySource(
        Prepared(data, "real", 255.0, ""), batch_size=100, seed=SEED, order="shuffle", device=data.device
    )
    optimizer = make_optimizer("adagrad", model.parameters(), 0.02)
    program = StepProgram(reference, model, optimizer, source, Plan(SEED), data.device)
    wanted = AutogradEngine("reference", program).run(n).double()
    found = {}
    for precision in ("exact", "fast"):
        runs = []
        for _ in range(2):
            step, parameters = make_step(paper_model(), data, precision=precision)
            runs.append([step.run(*steps_of(len(data), 100, 0, n), 0), *(p.cpu() for p in parameters)])
        means = (runs[0][0].double() - wanted).reshape(-1, min(n, 100), 3).mean(dim=1)
        same = all(torch.equal(*pair) for pair in zip(*runs, strict=True))
        found[precision] = float(means.abs().max()) if same else math.nan
    return found


def measure(data: Tensor, hidden: int, batch_size: int, precision: str, seconds: float) -> dict[str, Any]:
    """Microseconds per step of calls of run(), the first one left out: it captures graphs."""
    n = max(50, 100_000 // batch_size)
    step, _ = make_step(paper_model(hidden), data, precision=precision, batch_size=batch_size, most_steps=n)
    steps = steps_of(len(data), batch_size, 0, n)
    terms = step.run(*steps, 0)
    times: list[float] = []
    begin = time.perf_counter()
    for call in itertools.count(1):
        start = time.perf_counter()
        terms = step.run(*steps, call * n)
        times.append((time.perf_counter() - start) / n * 1e6)
        if len(times) >= 5 and time.perf_counter() - begin > seconds:
            break
    assert terms.isfinite().all()
    return {
        "hidden": hidden,
        "batch_size": batch_size,
        "precision": precision,
        "us_per_step": round(statistics.median(times), 2),
        "least": round(min(times), 2),
        "most": round(max(times), 2),
        "calls": len(times),
        "steps_per_call": n,
        "steps_per_graph": step.steps_per_graph,
        "launches_per_step": step.launches_per_step,
    }


def once(device: torch.device) -> int:
    """Networks of every kind, small and with tails, a few steps of each; how many."""
    import vae_fast as vf

    done = 0
    kinds = itertools.product(
        ("exact", "fast"), ("bernoulli", "gaussian"), ("tanh", "relu"), (1, 3), ((7, 18), (64,))
    )
    for precision, likelihood, activation, samples, hidden in kinds:
        model = vf.VAE(
            data_dim=29,
            hidden_dims=hidden,
            latent_dim=5,
            likelihood=likelihood,
            activation=activation,
            seed=SEED,
        )
        optimizer = tuple(STATES)[done % len(STATES)]
        values = torch.randint(0, 256, (23, 29), dtype=torch.uint8, device=device)
        step, parameters = make_step(
            model,
            values,
            precision=precision,
            num_samples=samples,
            estimator=("sgvb_a", "sgvb_b")[done % 2],
            optimizer=optimizer,
            options={**OPTIONS, "lr": 0.001},
            dynamic=likelihood == "bernoulli",
            batch_size=9 if done % 3 else 23,
        )
        terms = step.run(*steps_of(23, 9 if done % 3 else 23, 0, 5), 0)
        assert terms.isfinite().all() and all(p.isfinite().all() for p in parameters)
        done += 1
    return done


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a folder")
    parser.add_argument("--once", action="store_true", help="small networks only, untimed")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.native_step: torch sees no GPU; it needs one, and a CUDA build", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    if arguments.once:
        print(f"{once(device)} networks, all finite")
        return 0
    import vae_fast as vf

    train, _ = vf.datasets.mnist()
    data = torch.as_tensor(train).reshape(len(train), 784).to(device)
    strays = check(data, 300 if arguments.quick else 600)
    right = strays["exact"] <= TOLERANCE and not math.isnan(strays["fast"])
    lines = [torch.cuda.get_device_name()]
    lines += [
        f"{name}: at most {stray:.4f} nat from float64 in the mean of 100 steps"
        if not math.isnan(stray)
        else f"{name}: two equal runs differ"
        for name, stray in strays.items()
    ]
    measured = []
    lines.append(f"\n{'hidden':>6} {'batch':>6} {'precision':>9}  us per step (median, least, most)")
    shapes = itertools.product(
        (500,) if arguments.quick else (500, 2000), (100, 1000, 8192), ("exact", "fast")
    )
    for hidden, batch_size, precision in shapes:
        found = measure(data, hidden, batch_size, precision, 1.0)
        measured.append(found)
        lines.append(
            f"{hidden:>6} {batch_size:>6} {precision:>9}  "
            f"{found['us_per_step']:.2f}, {found['least']:.2f}, {found['most']:.2f}"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        facts = machine.describe(" ".join(["python -m bench.native_step", *argv]))
        facts |= {"gpu": torch.cuda.get_device_name(), "nats_from_float64": strays, "steps": measured}
        (arguments.out / "native_step.txt").write_text(text, encoding="utf-8")
        (arguments.out / "native_step.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
