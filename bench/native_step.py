"""The native engine's CUDA step on this GPU: first whether it is right, then microseconds per step.

python -m bench.native_step [--out DIR] [--quick]    writes DIR/native_step.json and native_step.txt
python -m bench.native_step --once                   small networks of every kind, for compute-sanitizer
python -m bench.native_step --timeline               where the microseconds of a step go, launch by launch
python -m bench.native_step --persistent ...         the same of steps by the persistent kernel, which stays
                                                     on the GPU for many: persistent.json and .txt, phases

Right: the paper's model on MNIST, exact and fast, against the reference engine in float64 on the same GPU,
with the same seed, order and noise. The exit status is 1 where `exact` strays by more than 0.05 nat in the
mean of 100 steps, two equal runs differ in a bit, or a model beside others does from the same model alone.
Timed is run() as the trainer calls it, copies of rows and terms included. What is known is written after
every line. Where a GPU of sm_90 or later does not take the persistent kernel, that is a failure, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
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
OPTIONS = {"eps": 1e-8, "beta1": 0.9, "beta2": 0.999, "momentum": 0.0, "weight_decay": 0.0}


def make_step(models: Sequence[Any], data: Tensor, **given: Any) -> tuple[Any, list[Tensor]]:
    """A CudaStep of VAEs that are alike on copies of their parameters, and the copies."""
    from vae_fast import _C

    optimizer = given.get("optimizer", "adagrad")
    lr = given.pop("lr", 0.02)
    trained = []
    for model in models:
        parameters = [p.detach().to(data.device, torch.float32, copy=True) for p in model.parameters()]
        states = [[torch.zeros_like(p) for p in parameters] for _ in range(STATES[optimizer])]
        own = {"latent_dim": model.latent_dim, "beta": 1.0, "lr": lr}
        trained.append({**own, "parameters": parameters, "states": states})
    model = models[0]
    widths = {
        half: [layer.out_features for layer in net.hidden if isinstance(layer, torch.nn.Linear)]
        for half, net in (("encoder", model.encoder), ("decoder", model.decoder))
    }
    arguments: dict[str, Any] = {
        "data_dim": model.data_dim,
        "encoder_hidden": widths["encoder"],
        "decoder_hidden": widths["decoder"],
        "activation": model.config["activation"],
        "likelihood": model.likelihood + ("_sigmoid_mean" if model.config["mean_activation"] else ""),
        "estimator": "sgvb_b",
        "num_samples": 1,
        "weight_prior": 0.0,
        "optimizer": optimizer,
        "options": {**OPTIONS, "accumulate_steps": 100},
        "precision": "exact",
        "models": trained,
        "data": data,
        "packed": False,
        "dynamic": False,
        "scale": 1 / 255,
        "batch_size": 100,
    }
    return _C.CudaStep(**{**arguments, **given}), [p for own in trained for p in own["parameters"]]


def steps_of(
    count: int, batch_size: int, first: int, n: int, models: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, sizes and seeds of n steps of each model, whose seeds are SEED, SEED + 1, ..."""
    from vae_fast.batches import MinibatchOrder
    from vae_fast.estimators import BINARISE, NOISE, step_seed

    found = []
    for seed in range(SEED, SEED + models):
        order = MinibatchOrder(count, batch_size, seed)
        steps = range(first, first + n)
        seeds = [[step_seed(seed, step, stream) for stream in (NOISE, BINARISE)] for step in steps]
        parts = order.rows(first, n), order.sizes(first, n), seeds
        found.append([torch.as_tensor(part, dtype=torch.int64) for part in parts])
    rows, sizes, seeds_of_all = (torch.stack(parts) for parts in zip(*found, strict=True))
    return rows, sizes, seeds_of_all


def paper_model(hidden: int = 500, latent: int = 20) -> Any:
    import vae_fast as vf

    return vf.VAE(data_dim=784, hidden_dims=[hidden], latent_dim=latent, likelihood="bernoulli", seed=SEED)


def check(
    data: Tensor, n: int, batch_size: int = 100, accumulate_steps: int = 100, persistent: bool = False
) -> dict[str, float]:
    """Largest differences from the reference in means over up to 100 steps, nats; nan if a repeat differs.

    With ``persistent`` nan too if a number was out of its range.
    """
    from vae_fast import reference
    from vae_fast.batches import ArraySource
    from vae_fast.datasets import Prepared
    from vae_fast.engines import AutogradEngine, Plan, StepProgram
    from vae_fast.optim import make_optimizer

    model = paper_model().double().to(data.device)
    prepared = Prepared(data, "real", 255.0, "")
    source = ArraySource(prepared, batch_size=batch_size, seed=SEED, order="shuffle", device=data.device)
    optimizer = make_optimizer("adagrad", model.parameters(), 0.02, accumulate_steps=accumulate_steps)
    program = StepProgram(reference, model, optimizer, source, Plan(SEED), data.device)
    wanted = AutogradEngine("reference", program).run(n).double()
    found = {}
    for precision in ("exact", "fast"):
        runs = []
        for _ in range(2):
            step, parameters = make_step(
                [paper_model()],
                data,
                precision=precision,
                batch_size=batch_size,
                options={**OPTIONS, "accumulate_steps": accumulate_steps},
                persistent=persistent,
            )
            terms = step.run(*steps_of(len(data), batch_size, 0, n), [0])[0]
            runs.append([terms, *(p.cpu() for p in parameters)])
            if step.persistent != persistent:
                runs.append([terms * math.nan])
        means = (runs[0][0].double() - wanted).reshape(-1, min(n, 100), 3).mean(dim=1)
        same = len(runs) == 2 and all(torch.equal(*pair) for pair in zip(*runs, strict=True))
        found[precision] = float(means.abs().max()) if same else math.nan
    return found


def side_by_side(data: Tensor, n: int) -> list[str]:
    """Models of several numbers of latents, trained side by side: those whose bits differ from alone."""
    # enough to fill a GPU with large tiles
    models = [paper_model(latent=latent) for latent in (20, 3, 200) * 4]
    steps = steps_of(len(data), 100, 0, n, len(models))
    moving = {**OPTIONS, "accumulate_steps": 0}
    together, parameters = make_step(models, data, options=moving)
    terms = together.run(*steps, [0] * len(models))
    each = len(parameters) // len(models)
    differ = []
    for m, model in enumerate(models):
        step, own = make_step([model], data, options=moving)
        same = torch.equal(step.run(*(part[m : m + 1] for part in steps), [0])[0], terms[m])
        pairs = zip(own, parameters[m * each : (m + 1) * each], strict=True)
        if not same or not all(torch.equal(*pair) for pair in pairs):
            differ.append(f"model {m}, {model.latent_dim} latents")
    return differ


def measure(
    data: Tensor,
    hidden: int,
    batch_size: int,
    precision: str,
    seconds: float,
    models: int = 1,
    persistent: bool = False,
) -> dict[str, Any]:
    """Microseconds per step of a model, of calls of run(), the first one left out: it captures graphs."""
    n = max(50, 100_000 // batch_size // models)
    step, _ = make_step(
        [paper_model(hidden)] * models,
        data,
        precision=precision,
        batch_size=batch_size,
        most_steps=n,
        persistent=persistent,
    )
    steps = steps_of(len(data), batch_size, 0, n, models)
    terms = step.run(*steps, [0] * models)
    times: list[float] = []
    begin = time.perf_counter()
    for call in itertools.count(1):
        start = time.perf_counter()
        terms = step.run(*steps, [call * n] * models)
        times.append((time.perf_counter() - start) / (n * models) * 1e6)
        if len(times) >= 5 and time.perf_counter() - begin > seconds:
            break
    assert terms.isfinite().all()
    return {
        "hidden": hidden,
        "batch_size": batch_size,
        "precision": precision,
        "models": models,
        "persistent": step.persistent,
        "us_per_step": round(statistics.median(times), 2),
        "least": round(min(times), 2),
        "most": round(max(times), 2),
        "calls": len(times),
        "steps_per_call": n,
        "steps_per_graph": step.steps_per_graph,
        "launches_per_step": step.launches_per_step,
    }


def timeline(data: Tensor, precision: str, models: int = 1) -> list[tuple[str, float, float]]:
    """The launches of a step in their order: kernel, microseconds from the end of the launch ahead to its own
    end, and from its own beginning on; medians of steps in a graph, by torch's profiler, which adds a little.
    """
    n = 40
    step, _ = make_step([paper_model()] * models, data, precision=precision, most_steps=n)
    steps = steps_of(len(data), 100, 0, n, models)
    for _ in range(2):
        step.run(*steps, [0] * models)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.run(*steps, [0] * models)
        torch.cuda.synchronize()
    results = profile.profiler.kineto_results
    events = [(e.start_ns(), e.duration_ns(), e.name()) for e in results.events() if "kernel" in e.name()]
    return by_launch(sorted(events))


def phases(data: Tensor, precision: str) -> list[tuple[str, str, float, float]]:
    """The phases of a step of the persistent kernel in their order: half, phase, cycles of a block at the
    median and at most; none where this GPU or build does not take it.
    """
    n = 200
    step, _ = make_step([paper_model()], data, precision=precision, most_steps=n, persistent=True, timed=True)
    for _ in range(2):
        step.run(*steps_of(len(data), 100, 0, n), [0])
    return [(half, name, statistics.median(of), max(of)) for half, name, of in step.phases]


def by_launch(events: Sequence[tuple[int, int, str]]) -> list[tuple[str, float, float]]:
    """See :func:`timeline`; of (start, duration, name), nanoseconds, by start. A step ends with an update."""
    found: dict[int, tuple[str, list[float], list[float]]] = {}
    place, end = None, 0
    for start, duration, name in events:
        kernel = re.search(r"update_kernel|prepare_kernel|advance_kernel|(\w+)>\(", name)
        short = (kernel[1] or kernel[0]) if kernel else name
        if short in ("prepare_kernel", "advance_kernel"):
            place = None  # the first launch of a graph waits for these
        elif place is not None:
            _, gone, own = found.setdefault(place, (short, [], []))
            gone.append((start + duration - end) / 1e3)
            own.append(duration / 1e3)
        end = max(end, start + duration)
        if short == "update_kernel":
            place = 0
        elif place is not None:
            place += 1
    return [(name, statistics.median(gone), statistics.median(own)) for name, gone, own in found.values()]


def once(device: torch.device) -> int:
    """Networks of every kind, small and with tails, a few steps of each; how many."""
    import vae_fast as vf

    done = 0
    kinds = itertools.product(
        ("exact", "fast"), ("bernoulli", "gaussian"), ("tanh", "relu"), (1, 3), ((7, 18), (64,))
    )
    for precision, likelihood, activation, samples, hidden in kinds:
        asleep = precision == "exact" and samples == 1 and hidden == (64,)
        models, batch_size = 1 if done % 5 else 2, 9 if done % 3 else 23
        model = vf.VAE(
            data_dim=29,
            hidden_dims=hidden,
            latent_dim=5,
            likelihood=likelihood,
            activation=activation,
            logvar_scale=0.1 if asleep else 1.0,
            seed=SEED,
        )
        optimizer = tuple(STATES)[done % len(STATES)]
        values = torch.randint(0, 256, (23, 29), dtype=torch.uint8, device=device)
        step, parameters = make_step(
            [model] * models,
            values,
            precision=precision,
            num_samples=samples,
            estimator="wake_sleep" if asleep else ("sgvb_a", "sgvb_b")[done % 2],
            logvar_scale=0.1 if asleep else 1.0,
            optimizer=optimizer,
            options=OPTIONS,
            lr=0.001,
            dynamic=likelihood == "bernoulli",
            batch_size=batch_size,
        )
        terms = step.run(*steps_of(23, batch_size, 0, 5, models), [0] * models)
        assert terms.isfinite().all() and all(p.isfinite().all() for p in parameters)
        done += 1
    return done


def once_persistent(device: torch.device) -> int:
    """The same of the persistent kernel."""
    import vae_fast as vf

    done = 0
    for precision, optimizer in itertools.product(("exact", "fast"), STATES):
        values = torch.randint(0, 256, (64, 133), dtype=torch.uint8, device=device)
        step, parameters = make_step(
            [vf.VAE(data_dim=133, hidden_dims=[75], latent_dim=5, likelihood="bernoulli", seed=SEED)],
            values,
            precision=precision,
            estimator=("sgvb_a", "sgvb_b")[done % 2],
            optimizer=optimizer,
            options=OPTIONS,
            lr=0.001,
            batch_size=41,
            persistent=True,
        )
        terms = step.run(*steps_of(64, 41, 0, 5), [0])
        assert terms.isfinite().all() and all(p.isfinite().all() for p in parameters)
        assert step.persistent, f"the persistent kernel did not take {step.why_not_persistent}"
        done += 1
    return done


class Report:
    """What was found so far, in ``out``/NAME.txt and NAME.json after every line."""

    def __init__(self, out: Path | None, name: str, argv: Sequence[str]) -> None:
        self._out, self._name = out, name
        self._lines: list[str] = []
        self.facts: dict[str, Any] = machine.describe(" ".join(["python -m bench.native_step", *argv]))
        self.facts |= {"gpu": torch.cuda.get_device_name(), "nats_from_float64": {}, "steps": []}
        self.right = True
        self.say(self.facts["gpu"])

    def say(self, line: str) -> None:
        print(line, flush=True)
        self._lines.append(line)
        if self._out is not None:
            self._out.mkdir(parents=True, exist_ok=True)
            facts = self.facts | {"right": self.right}
            for suffix, text in (("txt", "\n".join(self._lines)), ("json", json.dumps(facts, indent=1))):
                (self._out / f"{self._name}.{suffix}").write_text(text + "\n", encoding="utf-8")

    def strays(self, found: dict[str, float], what: str = "") -> None:
        for precision, stray in found.items():
            name = precision + what
            self.facts["nats_from_float64"][name] = stray
            self.right &= not math.isnan(stray) and (precision != "exact" or stray <= TOLERANCE)
            if math.isnan(stray):
                self.say(f"{name}: two equal runs differ, or a number was out of range")
            else:
                self.say(f"{name}: at most {stray:.4f} nat from float64 in means over steps")

    def times(self, found: dict[str, Any]) -> None:
        if not self.facts["steps"]:
            self.say("models hidden  batch precision  us per step of a model (median, least, most)")
        self.facts["steps"].append(found)
        self.say(
            f"{found['models']:>6} {found['hidden']:>6} {found['batch_size']:>6} {found['precision']:>9}  "
            f"{found['us_per_step']:.2f}, {found['least']:.2f}, {found['most']:.2f}"
        )


def report_launches(report: Report, data: Tensor, quick: bool) -> None:
    report.strays(check(data, 300 if quick else 600))
    report.strays(check(data, 20, 2048, accumulate_steps=0), ", batch 2048")  # in large tiles
    differ = side_by_side(data, 100)
    report.facts["differ_side_by_side"] = differ
    report.right &= not differ
    report.say(f"side by side, bits that differ from alone: {', '.join(differ) or 'none'}")
    shapes = [(1, *shape) for shape in itertools.product((500,) if quick else (500, 2000), (100, 1000, 8192))]
    shapes += [(models, 500, 100) for models in (8, 32)]
    for (models, hidden, batch_size), precision in itertools.product(shapes, ("exact", "fast")):
        report.times(measure(data, hidden, batch_size, precision, 1.0, models))


def report_persistent(report: Report, data: Tensor, quick: bool) -> None:
    step, _ = make_step([paper_model()], data, persistent=True)
    if why := step.why_not_persistent:
        report.right = torch.cuda.get_device_capability() < (9, 0)
        report.say(f"the persistent kernel does not take {why}")
        return
    report.strays(check(data, 300 if quick else 600, persistent=True))
    for precision in ("exact", "fast"):
        report.times(measure(data, 500, 100, precision, 1.0, persistent=True))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a folder")
    parser.add_argument("--once", action="store_true", help="small networks only, untimed")
    parser.add_argument("--timeline", action="store_true", help="where the time of a step goes")
    parser.add_argument("--persistent", action="store_true", help="of steps by the persistent kernel")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.native_step: torch sees no GPU; it needs one, and a CUDA build", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    if arguments.once:
        print(f"{(once_persistent if arguments.persistent else once)(device)} networks, all finite")
        return 0
    import vae_fast as vf

    train, _ = vf.datasets.mnist()
    data = torch.as_tensor(train).reshape(len(train), 784).to(device)
    if arguments.timeline:
        for precision in ("exact", "fast"):
            if arguments.persistent:
                print(f"{precision}: cycles of a block, median and most")
                for half, name, median, most in phases(data, precision):
                    print(f"  {half} {name:<28} {median:8.0f} {most:8.0f}")
            else:
                print(f"{precision}: microseconds after the launch ahead, and of its own")
                for name, gone, own in timeline(data, precision):
                    print(f"  {name:<16} {gone:6.2f} {own:6.2f}")
        return 0
    report = Report(arguments.out, "persistent" if arguments.persistent else "native_step", argv)
    (report_persistent if arguments.persistent else report_launches)(report, data, arguments.quick)
    report.say("right" if report.right else "NOT RIGHT")
    return int(not report.right)


if __name__ == "__main__":
    sys.exit(main())
