"""The whole training step of the paper's MNIST model as an expert writes it with what is there already.

python -m bench.rivals [--device cpu|cuda] [--check] [--quick] [--only NAME ...] [--out DIR]

The model is 784-H-20-H-784, tanh, Bernoulli (appendix C.1), the objective SGVB-B with one sample (equation
10), the data real MNIST as float32 on the device. A step draws its minibatch (with replacement) and its
noise, takes the gradient and updates the parameters; nothing comes from the host. Every rival is in its best
form: both heads of the encoder one matrix, everything in place, no synchronisation. "captured" ones are CUDA
graphs made by hand, of several steps each; "JAX scan" is one call per epoch.

Times are of the host's clock over a block of steps that ends in a synchronisation, rivals in turns.
--check shows that each is right: with a given minibatch and noise it follows float64, and with its own it
reaches float64's bound after 600 steps, within the spread of seeds. TF32 is timed, not checked.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import machine
from .timing import Timing, Variant, _describe, measure

LATENT = 20
LEARNING_RATES = {"adagrad": 0.02, "adam": 0.001}
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8  # torch's, and everybody's
ADAGRAD_START = 1e-8  # of the sum of squares, nothing added to its root: then all are vae_fast.optim.Adagrad
GRAPH_STEPS = 10  # in a graph captured by hand: what lies between two graphs is no longer seen
CHECKED_STEPS = 600
BLOCK_SECONDS = 0.03  # of steps between two synchronisations

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """precision: of matrix products on a GPU, "float32" or "tf32"."""

    batch: int = 100
    hidden: int = 500
    optimizer: str = "adagrad"
    precision: str = "float32"

    def __str__(self) -> str:
        return f"batch {self.batch}, hidden {self.hidden}, {self.optimizer}, {self.precision}"


# What matters most comes first: time may run out.
WORKS = [
    *(Work(batch=batch) for batch in (100, 1000, 8192)),
    Work(optimizer="adam"),
    Work(precision="tf32"),
    *(Work(batch=batch, hidden=2000) for batch in (100, 1000, 8192)),
    *(Work(batch=batch, optimizer="adam") for batch in (1000, 8192)),
    *(Work(batch=batch, precision="tf32") for batch in (1000, 8192)),
    *(Work(batch=batch, hidden=2000, optimizer="adam") for batch in (100, 1000, 8192)),
]


class Draws(Protocol):
    """Data ``[N, D]``, and the minibatch ``[M, D]`` and noise ``[M, Z]`` of one step after another."""

    @property
    def data(self) -> Tensor: ...

    def draw(self) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Source:
    """Where minibatches ``[M, D]`` and noise ``[M, Z]`` come from: drawn anew, or given and always the
    same."""

    data: Tensor
    batch: int
    given: tuple[Tensor, Tensor] | None = None

    def draw(self) -> tuple[Tensor, Tensor]:
        if self.given is not None:
            return self.given
        device, dtype = self.data.device, self.data.dtype
        index = torch.randint(self.data.shape[0], (self.batch,), device=device)
        return self.data[index], torch.randn((self.batch, LATENT), device=device, dtype=dtype)


def initial(width: int, hidden: int, seed: int) -> Parameters:
    """N(0, 0.01**2), biases zero; float32 on the CPU. "w2" and "b2" make mu and then logvar."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(width, hidden), (hidden, 2 * LATENT), (LATENT, hidden), (hidden, width)]
    found = {}
    for i, (fan_in, fan_out) in enumerate(sizes, 1):
        found[f"w{i}"] = 0.01 * torch.randn((fan_out, fan_in), generator=generator)
        found[f"b{i}"] = torch.zeros(fan_out)
    return found


# ---- PyTorch -----------------------------------------------------------------------------------------------


def negative_bound(p: Parameters, x: Tensor, eps: Tensor) -> Tensor:
    """Mean over datapoints, nats."""
    h = torch.tanh(F.linear(x, p["w1"], p["b1"]))
    mu, logvar = F.linear(h, p["w2"], p["b2"]).chunk(2, dim=1)
    z = mu + eps * torch.exp(0.5 * logvar)
    h = torch.tanh(F.linear(z, p["w3"], p["b3"]))
    logits = F.linear(h, p["w4"], p["b4"])
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
    return (reconstruction + kl) / x.shape[0]


def first_square(optimizer: str) -> float:
    """What the sum or the mean of squared gradients begins with."""
    return ADAGRAD_START if optimizer == "adagrad" else 0.0


class Update:
    """Adagrad or Adam in place: Adagrad as vae_fast.optim defines it, moving from the first step on, and Adam
    as torch.optim does."""

    def __init__(self, optimizer: str, parameters: Parameters) -> None:
        self.optimizer, self.lr = optimizer, LEARNING_RATES[optimizer]
        start = first_square(optimizer)
        self.squares = {name: torch.full_like(p, start) for name, p in parameters.items()}
        self.means = {name: torch.zeros_like(p) for name, p in parameters.items()}
        like = next(iter(parameters.values()))
        self.count = torch.zeros((), device=like.device, dtype=like.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.count, *self.squares.values(), *self.means.values()]

    def restart(self) -> None:
        for tensor in self.tensors():
            tensor.zero_()
        for square in self.squares.values():
            square.fill_(first_square(self.optimizer))

    def __call__(self, parameters: Parameters, gradients: Parameters) -> None:
        self.count.add_(1)
        for name, p in parameters.items():
            g, square, mean = gradients[name], self.squares[name], self.means[name]
            if self.optimizer == "adagrad":
                square.addcmul_(g, g)
                p.sub_(self.lr * g / square.sqrt())
            else:
                mean.lerp_(g, 1 - BETA1)
                square.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
                corrected = (square / (1 - BETA2**self.count)).sqrt() + ADAM_EPS
                p.sub_(self.lr / (1 - BETA1**self.count) * mean / corrected)


@lru_cache
def has_fused_adagrad(device: torch.device) -> bool:
    """torch 2.11 has none on a GPU, and says so at the first step; then the one for lists is the best."""
    parameter = torch.ones(1, device=device, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    try:
        torch.optim.Adagrad([parameter], fused=True).step()
    except RuntimeError:
        return False
    return True


class Eager:
    """An nn.Module's parameters, autograd, and an optimizer of torch.optim."""

    unit = 1  # steps per call

    def __init__(self, work: Work, source: Source, seed: int, *, fused: bool, captured: bool = False) -> None:
        device = source.data.device
        self.source = source
        start = initial(source.data.shape[1], work.hidden, seed)
        self.parameters = {name: p.to(device).requires_grad_() for name, p in start.items()}
        fused = fused and (work.optimizer == "adam" or has_fused_adagrad(device))
        options: dict[str, Any] = {"lr": LEARNING_RATES[work.optimizer], "fused": fused or None}
        if work.optimizer == "adam":
            kind: type[torch.optim.Optimizer] = torch.optim.Adam
            options["capturable"] = captured
        else:
            kind = torch.optim.Adagrad
            options |= {"initial_accumulator_value": ADAGRAD_START, "eps": 0.0}
        self.optimizer = kind(self.parameters.values(), **options)

    def restart_optimizer(self) -> None:
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.fill_(ADAGRAD_START if key == "sum" else 0.0)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Back to the start, with another seed, in the same memory."""
        start = initial(self.source.data.shape[1], self.parameters["b1"].shape[0], seed)
        for name, p in self.parameters.items():
            p.copy_(start[name])
        self.restart_optimizer()
        torch.manual_seed(seed)

    def step(self) -> None:
        x, eps = self.source.draw()
        self.optimizer.zero_grad(set_to_none=True)
        negative_bound(self.parameters, x, eps).backward()
        self.optimizer.step()

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.step()

    def finish(self) -> None:
        if self.source.data.is_cuda:
            torch.cuda.synchronize()

    def result(self) -> Parameters:
        return {name: p.detach().double().cpu() for name, p in self.parameters.items()}


class Compiled(Eager):
    """The whole step, optimizer and all, as one function for torch.compile; mode None leaves it as it is.

    cpp_wrapper: what calls the kernels is C++ too, not Python.
    """

    def __init__(
        self, work: Work, source: Source, seed: int, *, mode: str | None, cpp_wrapper: bool = False
    ) -> None:
        start = initial(source.data.shape[1], work.hidden, seed)
        self.source = source
        self.parameters = {name: p.to(source.data.device) for name, p in start.items()}
        self.update = Update(work.optimizer, self.parameters)
        for tensor in [source.data, *self.parameters.values(), *self.update.tensors()]:
            torch._dynamo.mark_static_address(tensor)  # or a graph would copy it in at every step
        self.call: Callable[[], Tensor] = self._whole
        if mode is not None:
            options = torch._inductor.list_mode_options(mode) | {"cpp_wrapper": cpp_wrapper}
            self.call = torch.compile(self._whole, options=options, dynamic=False, fullgraph=True)

    def restart_optimizer(self) -> None:
        self.update.restart()

    def _whole(self) -> Tensor:
        x, eps = self.source.draw()
        gradients, loss = torch.func.grad_and_value(negative_bound)(self.parameters, x, eps)
        self.update(self.parameters, gradients)
        return loss  # for whoever wants to look at it; without it less would be computed than elsewhere

    def step(self) -> None:
        with torch.no_grad():
            self.call()


class Captured:
    """GRAPH_STEPS steps of another rival in one CUDA graph."""

    unit = GRAPH_STEPS

    def __init__(self, rival: Eager, seed: int) -> None:
        self.rival = rival
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            rival.run(3)  # warm-up: compiles, creates handles and the optimizer's state
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            rival.run(GRAPH_STEPS)
        rival.restart(seed)  # as if the warm-up had not been

    def restart(self, seed: int) -> None:
        self.rival.restart(seed)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.graph.replay()

    def finish(self) -> None:
        self.rival.finish()

    def result(self) -> Parameters:
        return self.rival.result()


# ---- JAX ---------------------------------------------------------------------------------------------------


class Jax:
    """jit of one step, or of lax.scan over ``unit`` of them; parameters and state are donated.

    The scan draws all its indices and noise before the first step, which is faster than a few in each; the
    minibatch itself is gathered in its step, which is faster than a copy of the data in another order.
    """

    def __init__(self, work: Work, source: Source, seed: int, *, unit: int = 1) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
        import jax
        import jax.numpy as jnp

        self.unit, self._jax = unit, jax
        highest = {"float32": "highest", "tf32": "tensorfloat32"}[work.precision]
        jax.config.update("jax_default_matmul_precision", highest)
        device = jax.devices("gpu" if source.data.is_cuda else "cpu")[0]
        lr, given = LEARNING_RATES[work.optimizer], source.given

        def put(tensor: Tensor) -> Any:
            return jax.device_put(tensor.cpu().numpy(), device)

        def negative_bound(p: Any, x: Any, eps: Any) -> Any:
            h = jnp.tanh(x @ p["w1"].T + p["b1"])
            mu, logvar = jnp.split(h @ p["w2"].T + p["b2"], 2, axis=1)
            z = mu + eps * jnp.exp(0.5 * logvar)
            h = jnp.tanh(z @ p["w3"].T + p["b3"])
            logits = h @ p["w4"].T + p["b4"]
            softplus = jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
            kl = -0.5 * (1 + logvar - mu**2 - jnp.exp(logvar)).sum()
            return ((softplus - logits * x).sum() + kl) / x.shape[0]

        def draw(key: Any) -> Any:
            """Indices ``[unit, M]`` and noise ``[unit, M, Z]``."""
            if given is not None:
                return None
            for_index, for_noise = jax.random.split(key)
            index = jax.random.randint(for_index, (unit, source.batch), 0, source.data.shape[0])
            return index, jax.random.normal(for_noise, (unit, source.batch, LATENT))

        def step(carry: Any, drawn: Any, data: Any) -> Any:
            p, square, mean, count, _ = carry
            if given is None:
                index, eps = drawn
                x = data.at[index].get(mode="promise_in_bounds")
            else:
                x, eps = data
            loss, g = jax.value_and_grad(negative_bound)(p, x, eps)
            each, count = jax.tree.map, count + 1
            if work.optimizer == "adagrad":
                square = each(lambda s, g: s + g * g, square, g)
                p = each(lambda p, g, s: p - lr * g / jnp.sqrt(s), p, g, square)
            else:
                mean = each(lambda m, g: BETA1 * m + (1 - BETA1) * g, mean, g)
                square = each(lambda s, g: BETA2 * s + (1 - BETA2) * g * g, square, g)
                rate, scale = lr / (1 - BETA1**count), 1 / (1 - BETA2**count)
                p = each(lambda p, m, s: p - rate * m / (jnp.sqrt(s * scale) + ADAM_EPS), p, mean, square)
            return p, square, mean, count, loss

        def steps(carry: Any, key: Any, data: Any) -> Any:
            key, now = jax.random.split(key)
            drawn = draw(now)
            if unit == 1:
                return step(carry, jax.tree.map(lambda d: d[0], drawn), data), key
            return jax.lax.scan(lambda c, d: (step(c, d, data), None), carry, drawn, length=unit)[0], key

        self._steps = jax.jit(steps, donate_argnums=(0, 1))
        self._data = put(source.data) if given is None else tuple(put(t) for t in given)

        def beginning(seed: int) -> Any:
            start = initial(source.data.shape[1], work.hidden, seed)

            def all_of(value: float) -> Any:
                return {name: put(torch.full_like(p, value)) for name, p in start.items()}

            # XLA's own generator: on a GPU several times as fast as the default one.
            key = jax.device_put(jax.random.key(seed, impl="rbg"), device)
            parameters = {name: put(p) for name, p in start.items()}
            squares = all_of(first_square(work.optimizer))
            means = all_of(0.0) if work.optimizer == "adam" else {name: () for name in start}
            nothing = put(torch.zeros(()))
            return (parameters, squares, means, nothing, jnp.zeros_like(nothing)), key

        self._beginning = beginning
        self.restart(seed)

    def restart(self, seed: int) -> None:
        self._carry, self._key = self._beginning(seed)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._carry, self._key = self._steps(self._carry, self._key, self._data)

    def finish(self) -> None:
        self._jax.block_until_ready(self._carry[0])

    def result(self) -> Parameters:
        import numpy as np

        return {name: torch.from_numpy(np.array(p)).double() for name, p in self._carry[0].items()}


# ---- who takes part ----------------------------------------------------------------------------------------


class Rival(Protocol):
    """A training that is under way."""

    unit: int  # steps per call

    def run(self, calls: int) -> None: ...

    def finish(self) -> None:
        """Waits for the device."""

    def restart(self, seed: int) -> None: ...

    def result(self) -> Parameters: ...


# (work, source, seed, steps of an epoch) to a rival
Maker = Callable[[Work, Source, int, int], Rival]
Makers = Mapping[str, Maker]

MAKERS: Makers = {
    "eager": lambda w, s, seed, _: Eager(w, s, seed, fused=False),
    "fused optimizer": lambda w, s, seed, _: Eager(w, s, seed, fused=True),
    "compile": lambda w, s, seed, _: Compiled(w, s, seed, mode="default"),
    "compile, C++ wrapper": lambda w, s, seed, _: Compiled(w, s, seed, mode="default", cpp_wrapper=True),
    "compile, reduce-overhead": lambda w, s, seed, _: Compiled(w, s, seed, mode="reduce-overhead"),
    "captured eager": lambda w, s, seed, _: Captured(Eager(w, s, seed, fused=True, captured=True), seed),
    "captured compile": lambda w, s, seed, _: Captured(Compiled(w, s, seed, mode="default"), seed),
    "JAX jit": lambda w, s, seed, _: Jax(w, s, seed),
    "JAX scan": lambda w, s, seed, epoch: Jax(w, s, seed, unit=epoch),
    "compile, max-autotune": lambda w, s, seed, _: Compiled(w, s, seed, mode="max-autotune"),
    "captured compile, max-autotune": lambda w, s, seed, _: Captured(
        Compiled(w, s, seed, mode="max-autotune-no-cudagraphs"), seed
    ),
}


def names(device: torch.device) -> list[str]:
    """Those that can take part here: graphs need a GPU, which leaves the host's calls uncounted, and JAX must
    be installed."""
    not_here = ["C++ wrapper"] if device.type == "cuda" else ["captured", "reduce-overhead"]
    if find_spec("jax") is None:
        not_here.append("JAX")
    return [name for name in MAKERS if not any(word in name for word in not_here)]


def make(name: str, work: Work, source: Source, seed: int, epoch: int, makers: Makers | None = None) -> Rival:
    """A rival at its start, the random numbers of torch seeded too."""
    torch.set_float32_matmul_precision("high" if work.precision == "tf32" else "highest")
    torch.manual_seed(seed)
    return (MAKERS if makers is None else makers)[name](work, source, seed, epoch)


# ---- are they right? ---------------------------------------------------------------------------------------


def paper_bound(p: Parameters, x: Tensor, eps: Tensor) -> Tensor:
    """The bound of each datapoint ``[M]`` as the paper writes it (equation 10, appendix C), by
    vae_fast.reference; nats."""
    from vae_fast import reference as paper

    mu, logvar = (torch.tanh(x @ p["w1"].T + p["b1"]) @ p["w2"].T + p["b2"]).split(LATENT, dim=1)
    sigma = logvar.exp().sqrt()
    logits = torch.tanh((mu + sigma * eps) @ p["w3"].T + p["b3"]) @ p["w4"].T + p["b4"]
    return paper.bernoulli_log_likelihood(logits, x) - paper.gaussian_kl(mu, logvar)


def reference(work: Work, source: Draws, seed: int, steps: int) -> Parameters:
    """The same training by the paper's formulas, in the dtype of source; float64 is the judge."""
    torch.manual_seed(seed)
    start = initial(source.data.shape[1], work.hidden, seed)
    parameters = {name: p.to(source.data).requires_grad_() for name, p in start.items()}
    update = Update(work.optimizer, parameters)
    for _ in range(steps):
        loss = -paper_bound(parameters, *source.draw()).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            update(parameters, dict(zip(parameters, gradients, strict=True)))
    return {name: p.detach().double().cpu() for name, p in parameters.items()}


def bound(parameters: Parameters, x: Tensor) -> float:
    """The mean bound on x ``[N, D]``, one sample each, in float64, always with the same noise; nats."""
    eps = torch.randn((x.shape[0], LATENT), generator=torch.Generator().manual_seed(7)).double()
    on = {name: p.to(x.device) for name, p in parameters.items()}
    return float(paper_bound(on, x.double(), eps.to(x.device)).mean())


def distance(
    name: str, work: Work, data: Tensor, *, steps: int = 2 * GRAPH_STEPS, makers: Makers | None = None
) -> float:
    """How far the rival's parameters end from float64's, over the way that float64's went, after steps on one
    minibatch and noise; or on the rival's own if it can tell them (``draws``)."""
    given = one_minibatch(work, data)
    rival = make(name, work, given, 0, steps, makers)
    rival.run(steps // rival.unit)
    rival.finish()
    draws: Callable[[], Draws] = getattr(rival, "draws", lambda: in_double(given))
    return apart(rival.result(), reference(work, draws(), 0, steps), work)


def rounding(work: Work, data: Tensor, *, steps: int = 2 * GRAPH_STEPS) -> float:
    """``distance`` of the paper's formulas in float32: on one minibatch twenty steps of Adagrad magnify a
    difference a thousandfold, and a rival that is past the limit may be no further than this.
    """
    given = one_minibatch(work, data)
    return apart(reference(work, given, 0, steps), reference(work, in_double(given), 0, steps), work)


def one_minibatch(work: Work, data: Tensor) -> Source:
    eps = torch.randn((work.batch, LATENT), generator=torch.Generator().manual_seed(3)).to(data.device)
    return Source(data, work.batch, (data[: work.batch], eps))


def in_double(source: Source) -> Source:
    assert source.given is not None
    x, eps = source.given
    return replace(source, data=source.data.double(), given=(x.double(), eps.double()))


def apart(got: Parameters, exact: Parameters, work: Work) -> float:
    start = initial(exact["w1"].shape[1], work.hidden, 0)
    wrong = sum(float((got[key] - exact[key]).square().sum()) for key in exact)
    way = sum(float((exact[key] - start[key].double()).square().sum()) for key in exact)
    return (wrong / way) ** 0.5


# With any term of a formula missing it is of order 1.
MAX_DISTANCE = 2e-3


def check(
    chosen: Sequence[str],
    work: Work,
    train: Tensor,
    test: Tensor,
    *,
    steps: int = CHECKED_STEPS,
    reference_seeds: int = 8,
    seeds: int = 4,
    makers: Makers | None = None,
    farthest: Callable[[str], float] = lambda name: MAX_DISTANCE,
) -> dict[str, Any]:
    """Follows each rival as the head of this file says. It is right when its mean bound over ``seeds`` lies
    within two standard deviations (of single seeds) of that of float64, and its distance is at most
    ``farthest`` of its name. Beside them stands how far plain float32 strays."""

    def summary(bounds: Sequence[float]) -> dict[str, Any]:
        values = torch.tensor(bounds, dtype=torch.float64)
        return {"mean": float(values.mean()), "sd": float(values.std()), "bounds": list(bounds)}

    double = Source(train.double(), work.batch)
    found = [bound(reference(work, double, seed, steps), test) for seed in range(reference_seeds)]
    del double
    exact = summary(found)
    result: dict[str, Any] = {"work": asdict(work), "steps": steps, "reference": exact, "rivals": {}}
    result["float32_distance"] = rounding(work, train)
    for name in chosen:
        try:
            bounds = []
            rival = make(name, work, Source(train, work.batch), 0, steps, makers)
            for seed in range(seeds):
                rival.restart(seed)
                rival.run(steps // rival.unit)
                rival.finish()
                bounds.append(bound(rival.result(), test))
            line = summary(bounds)
            line["distance"] = distance(name, work, train, makers=makers)
            near = line["distance"] <= farthest(name)
            line["right"] = near and abs(line["mean"] - exact["mean"]) <= 2 * exact["sd"]
        except Exception as error:
            line = {"error": _describe(error), "right": False}
        result["rivals"][name] = line
        _forget()
    return result


# ---- how fast are they? ------------------------------------------------------------------------------------


def _forget() -> None:
    """What the last rival compiled and held."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _calls(rival: Rival, seconds: float) -> int:
    """How many calls make a block of so many seconds; warms up."""
    rival.run(2 if rival.unit <= GRAPH_STEPS else 1)  # one epoch is warm-up enough
    rival.finish()
    calls = 1
    while True:
        start = time.perf_counter()
        rival.run(calls)
        rival.finish()
        taken = time.perf_counter() - start
        if taken >= 0.5 * seconds:
            return max(1, round(calls * seconds / taken))
        calls *= 2


def bench(
    chosen: Sequence[str],
    work: Work,
    data: Tensor,
    *,
    seconds: float,
    block: float = BLOCK_SECONDS,
    makers: Makers | None = None,
) -> dict[str, Any]:
    """Microseconds per step of every rival, timed in turns for about ``seconds`` per rival."""
    source = Source(data, work.batch)
    epoch = max(1, data.shape[0] // work.batch)
    line: dict[str, Any] = {"work": asdict(work), "rivals": {}}
    rivals: dict[str, tuple[Rival, int]] = {}
    for name in chosen:
        start = time.perf_counter()
        before = _graphs_refused()
        try:
            rival = make(name, work, source, 0, epoch, makers)
            rivals[name] = rival, _calls(rival, block)
        except Exception as error:
            line["rivals"][name] = {"error": _describe(error)}
            continue
        entry = line["rivals"][name] = {"prepared_s": round(time.perf_counter() - start, 1)}
        if data.is_cuda and _graphs_refused() > before:
            entry["note"] = "torch.compile refused to make a CUDA graph"

    def variant(name: str, rival: Rival, calls: int) -> Variant:
        def settle(_: int) -> None:
            """A step before the clock starts: the threads and caches are this rival's again."""
            if rival.unit == 1:  # of many steps, the first does not matter
                rival.run(1)
                rival.finish()

        return Variant(name, settle, lambda _: (rival.run(calls), rival.finish()))

    # The CPU's way of timing, whatever the device: wall time from the first call to the last result.
    clock = [variant(name, rival, calls) for name, (rival, calls) in rivals.items()]
    timed = measure(clock, 1, torch.device("cpu"), seconds * len(clock))
    for name, timing in timed.items():
        rival, calls = rivals[name]
        if isinstance(timing, Timing):
            n = rival.unit * calls
            per_step = replace(timing, median=timing.median / n, low=timing.low / n, high=timing.high / n)
            line["rivals"][name] |= {**per_step.to_dict(), "steps_per_block": n}
        else:
            line["rivals"][name]["error"] = timing
    return line


def _graphs_refused() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Microseconds per step: a row per work, a column per rival."""
    columns = [name for name in MAKERS if any(name in line["rivals"] for line in result["steps"])]
    table = [["us per step", *columns]]
    for line in result["steps"]:
        cells = [str(Work(**line["work"]))]
        for name in columns:
            entry = line["rivals"].get(name, {})
            if "median" in entry:
                cells.append(f"{entry['median']:.1f} ({entry['low']:.1f} to {entry['high']:.1f})")
            else:
                cells.append("failed" if "error" in entry else "-")
        table.append(cells)
    return table


def check_rows(result: dict[str, Any]) -> list[list[str]]:
    """Test bounds after the check's steps, by seed, beside float64's."""
    table = [["bound after the check", "rival", "mean", "sd", "distance to float64", "right"]]
    for checked in result["checks"]:
        work, exact = str(Work(**checked["work"])), checked["reference"]
        table.append([work, "float64", f"{exact['mean']:.2f}", f"{exact['sd']:.2f}", "", ""])
        if "float32_distance" in checked:
            table.append([work, "float32, no rival", "", "", f"{checked['float32_distance']:.1e}", ""])
        for name, line in checked["rivals"].items():
            if "error" in line:
                table.append([work, name, "-", "-", "-", line["error"]])
            else:
                numbers = [f"{line['mean']:.2f}", f"{line['sd']:.2f}", f"{line['distance']:.1e}"]
                table.append([work, name, *numbers, "yes" if line["right"] else "NO"])
    return table


def text(result: dict[str, Any]) -> str:
    from .report import aligned

    errors = [
        f"{Work(**line['work'])}, {name}: {entry.get('error') or entry['note']}"
        for line in result["steps"]
        for name, entry in line["rivals"].items()
        if "error" in entry or "note" in entry
    ]
    tables = [aligned(rows(result)), aligned(check_rows(result))]
    left_out = [f"not measured: {what}" for what in result["skipped"]]
    return "\n\n".join([*filter(None, tables), *errors, *left_out]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--check", action="store_true", help="show that each rival is right, too")
    parser.add_argument("--quick", action="store_true", help="batch 100, hidden 500 only")
    parser.add_argument("--only", nargs="+", choices=list(MAKERS), help="these rivals")
    parser.add_argument("--without-jax", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.5, help="per rival and line")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no line is begun")
    parser.add_argument("--out", type=Path, help="a folder for rivals.json and rivals.txt")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    from vae_fast import datasets

    start = time.perf_counter()
    train, test = (images.to(device).float() / 255 for images in datasets.mnist())
    chosen = [name for name in names(device) if not arguments.only or name in arguments.only]
    if arguments.without_jax:
        chosen = [name for name in chosen if "JAX" not in name]
    works = [work for work in WORKS if device.type == "cuda" or work.precision == "float32"]
    if arguments.quick:
        works = [work for work in works if (work.batch, work.hidden) == (100, 500)]
    result: dict[str, Any] = {
        **machine.describe(" ".join(["python -m bench.rivals", *argv])),
        "machine": machine.name(device),
        "device": str(device),
        "graph_steps": GRAPH_STEPS,
        "checks": [],
        "steps": [],
        "skipped": [],
    }

    def say(what: object) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {what}", file=sys.stderr, flush=True)
        if arguments.out:  # after every line: whatever stops this program later, that much is there
            arguments.out.mkdir(parents=True, exist_ok=True)
            content = json.dumps(result, indent=1) + "\n"
            (arguments.out / "rivals.json").write_text(content, encoding="utf-8")
            (arguments.out / "rivals.txt").write_text(text(result), encoding="utf-8")

    def check_all(names: Sequence[str]) -> None:
        for work in works[:1] if device.type == "cpu" else (Work(), Work(optimizer="adam")):
            if not names or time.perf_counter() - start > arguments.budget:
                result["skipped"] += [f"{work}, {name}: not checked, no time left" for name in names]
                continue
            result["checks"].append(check(names, work, train, test))
            say(f"checked {work}")

    # What is searched for long is checked last: each rival is compiled anew for that.
    searched = [name for name in chosen if "max-autotune" in name]
    for i, work in enumerate(works):
        if i == 1 and arguments.check:
            check_all([name for name in chosen if name not in searched])
        used = time.perf_counter() - start
        if used > arguments.budget:
            result["skipped"].append(f"{work}: no time left")
            continue
        # The search for the best kernels takes most of the time, and is given up first.
        now = [name for name in chosen if used < 0.6 * arguments.budget or "max-autotune" not in name]
        result["skipped"] += [f"{work}, {name}: no time left" for name in chosen if name not in now]
        result["steps"].append(bench(now, work, train, seconds=arguments.seconds))
        _forget()
        say(work)
    if arguments.check:
        check_all(searched if len(works) > 1 else chosen)
    say("done")
    print(text(result))
    if any(not line["right"] for checked in result["checks"] for line in checked["rivals"].values()):
        raise SystemExit("a rival is not right: see the column of that name")


if __name__ == "__main__":
    main()
