"""The launches of a CUDA step in Python: the same buffers, order and tiles as csrc/engine/cuda/schedule.cpp,
in float64.

Blocks of a launch run in any order on a GPU, so the twin runs them in a random one. It refuses a schedule in
which two blocks write one element, a block reads what another block of its launch writes, or a launch reads
what no launch before it has written or what a launch after it, of the same step, writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Writes = Iterator[tuple[str, Any, Array]]  # buffer, index, values
PRODUCT = Path(__file__).resolve().parent.parent / "csrc" / "engine" / "cuda" / "product.cuh"
TILES = {
    name: (int(rows), int(cols), int(depth))
    for name, rows, cols, depth in re.findall(
        r"using (\w+) = TileShape<(\d+), (\d+), (\d+),", PRODUCT.read_text(encoding="utf-8")
    )
}

# Name to (of what comes in, its derivative from what comes out)
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "tanh": (np.tanh, lambda out: 1 - out**2),
    "relu": (lambda a: np.maximum(a, 0), lambda out: np.where(out > 0, 1.0, 0.0)),
    "softplus": (lambda a: np.logaddexp(0, a), lambda out: -np.expm1(-out)),
}
(PART_COLS,) = (int(cols) for cols in re.findall(r"kPartCols = (\d+);", PRODUCT.read_text(encoding="utf-8")))


@dataclass
class Launch:
    """C = A B^T over ``ks``, cut into tiles; ``epilogue(rows, cols, C)`` says what a tile's block writes."""

    name: str
    shape: tuple[int, int, int]  # rows, cols, ks
    tile: tuple[int, int, int]
    a: Callable[[slice, slice], Array]  # (rows, ks)
    b: Callable[[slice, slice], Array]  # (cols, ks)
    epilogue: Callable[[slice, slice, Array], Writes]
    reads: set[str]
    writes: set[str]
    in_place: set[str] = field(default_factory=set)  # of writes: a block reads the elements that it writes


def pairs(first: Array, second: Array) -> Array:
    """Rows of two matrices, or elements of two vectors, in turn: Matrix::paired of product.cuh."""
    return np.stack((first, second), axis=1).reshape(2 * len(first), *first.shape[1:])


def parts(name: str, r: slice, c: slice, summands: Array) -> Writes:
    """Sums over each PART_COLS of the columns c; a summand has one of them or, where they are paired, two."""
    columns = np.arange(c.start, c.stop, (c.stop - c.start) // summands.shape[1])
    for part in np.unique(columns // PART_COLS):
        yield name, (part, r), summands[:, columns // PART_COLS == part].sum(1)


class Twin:
    """A step of SGD. ``parameters`` are in the order of named_parameters(); words are those of CudaStep."""

    def __init__(
        self,
        parameters: Sequence[Array],
        *,
        encoder_layers: int,
        decoder_layers: int,
        activation: str,
        likelihood: str,
        estimator: str,
        samples: int,
        beta: float,
        weight_prior: float,
        lr: float,
        multiprocessors: int,
    ) -> None:
        self.memory: dict[str, Array] = {f"parameter {i}": p.copy() for i, p in enumerate(parameters)}
        self.encoder_layers, self.decoder_layers = encoder_layers, decoder_layers
        self.activation, self.likelihood, self.estimator = activation, likelihood, estimator
        self.samples, self.beta, self.weight_prior, self.lr = samples, beta, weight_prior, lr
        self.multiprocessors = multiprocessors

    def layer(self, half: str, i: int) -> tuple[list[str], list[str], str]:
        """Names of a layer's weights and biases, two each where they are paired, and of what it gives."""
        encoder = half == "encoder"
        last = i == (self.encoder_layers if encoder else self.decoder_layers)
        first = 2 * i if encoder else 2 * self.encoder_layers + 4 + 2 * i
        count = 2 if last and (encoder or self.likelihood != "bernoulli") else 1
        weights = [f"parameter {first + 2 * k}" for k in range(count)]
        biases = [f"parameter {first + 2 * k + 1}" for k in range(count)]
        return weights, biases, f"{half}.{i}" if not last else f"{half}.{'heads' if encoder else 'output'}"

    def matrix(self, names: list[str]) -> Array:
        found = [self.memory[name] for name in names]
        return found[0] if len(found) == 1 else pairs(*found)

    def tile(self, rows: int, cols: int) -> tuple[int, int, int]:
        for name in ("Wide", "Medium"):
            tiles = -(-rows // TILES[name][0]) * -(-cols // TILES[name][1])
            if 4 * tiles >= 3 * self.multiprocessors:
                return TILES[name]
        return TILES["Narrow"]

    # --- the launches ---------------------------------------------------------------------------------------

    def schedule(self, size: int) -> Iterator[Launch]:
        rows = size * self.samples
        inputs = {"encoder": "x", "decoder": "z"}
        taken: dict[tuple[str, int], str] = {}  # what each layer takes
        for half, layers, count in (
            ("encoder", self.encoder_layers, size),
            ("decoder", self.decoder_layers, rows),
        ):
            source = inputs[half]
            for i in range(layers + 1):
                taken[half, i] = source
                yield self.forward(half, i, source, count, size)
                source = self.layer(half, i)[2]
        for i in range(self.decoder_layers, 0, -1):
            yield self.backward("decoder", i, taken["decoder", i], rows)
        yield self.latent_backward(size)
        for i in range(self.encoder_layers, 0, -1):
            yield self.backward("encoder", i, taken["encoder", i], size)
        for half, layers in (("decoder", self.decoder_layers), ("encoder", self.encoder_layers)):
            for i in range(layers + 1):  # in the engine's one launch
                yield self.update(half, i, taken[half, i])

    def forward(self, half: str, i: int, source: str, rows: int, size: int) -> Launch:
        memory, (weights, biases, out) = self.memory, self.layer(half, i)
        cols, ks = self.matrix(weights).shape
        reads, writes = {source, *weights, *biases}, {out}
        tile = TILES["Narrow"] if out == "encoder.heads" else self.tile(rows, cols)
        if out == "encoder.heads":
            reads, writes = reads | {"eps"}, {out, "z", "kl_parts"}
        elif out == "decoder.output":
            reads, writes = reads | {"x"}, {"grad decoder.output", "ll_parts"}

        def epilogue(r: slice, c: slice, sums: Array) -> Writes:
            value = sums + self.matrix(biases)[c]
            if out == "encoder.heads":
                yield from self.latents(r, c, value, size)
            elif out == "decoder.output":
                yield from self.output(r, c, value, size)
            else:
                yield out, (r, c), ACTIVATIONS[self.activation][0](value)

        return Launch(
            f"forward {out}",
            (rows, cols, ks),
            tile,
            lambda r, k: memory[source][r, k],
            lambda c, k: self.matrix(weights)[c, k],
            epilogue,
            reads,
            writes,
        )

    def latents(self, r: slice, c: slice, heads: Array, size: int) -> Writes:
        mu, logvar = heads[:, 0::2], heads[:, 1::2]
        latents = slice(c.start // 2, c.stop // 2)
        kl = 0.5 * (mu**2 + np.expm1(logvar) - logvar)
        if self.estimator == "sgvb_a":
            kl[:] = 0
        for sample in range(self.samples):
            at = (slice(sample * size + r.start, sample * size + r.stop), latents)
            eps = self.memory["eps"][at]
            z = mu + np.exp(logvar / 2) * eps
            if self.estimator == "sgvb_a":
                kl += 0.5 * (z**2 - eps**2 - logvar) / self.samples
            yield "z", at, z
        yield "encoder.heads", (r, c), heads
        yield from parts("kl_parts", r, c, kl)

    def output(self, r: slice, c: slice, value: Array, size: int) -> Writes:
        data = np.arange(r.start, r.stop) % size
        if self.likelihood == "bernoulli":
            x = self.memory["x"][data, c]
            y = 1 / (1 + np.exp(-value))
            yield from parts("ll_parts", r, c, x * value - np.logaddexp(0, value))
            yield "grad decoder.output", (r, c), x - y
            return
        x = self.memory["x"][data, c.start // 2 : c.stop // 2]
        linear, logvar = value[:, 0::2], value[:, 1::2]
        sigmoid = self.likelihood == "gaussian_sigmoid_mean"
        mean = 1 / (1 + np.exp(-linear)) if sigmoid else linear
        residual = (x - mean) / np.exp(logvar)
        log_likelihood = -0.5 * (np.log(2 * np.pi) + logvar + (x - mean) * residual)
        grad = np.empty_like(value)
        grad[:, 0::2] = residual * (mean * (1 - mean) if sigmoid else 1)
        grad[:, 1::2] = 0.5 * ((x - mean) * residual - 1)
        yield from parts("ll_parts", r, c, log_likelihood)
        yield "grad decoder.output", (r, c), grad

    def backward(self, half: str, i: int, source: str, rows: int) -> Launch:
        memory, (weights, _, out) = self.memory, self.layer(half, i)
        ks, cols = self.matrix(weights).shape

        def epilogue(r: slice, c: slice, sums: Array) -> Writes:
            a = memory[source][r, c]
            yield f"grad {source}", (r, c), sums * ACTIVATIONS[self.activation][1](a)

        return Launch(
            f"backward {out}",
            (rows, cols, ks),
            self.tile(rows, cols),
            lambda r, k: memory[f"grad {out}"][r, k],
            lambda c, k: self.matrix(weights)[k, c].T,
            epilogue,
            {f"grad {out}", source, *weights},
            {f"grad {source}"},
        )

    def latent_backward(self, size: int) -> Launch:
        memory, (weights, _, out) = self.memory, self.layer("decoder", 0)
        cols = self.matrix(weights).shape[1]

        # The block goes through the samples itself: A has them side by side, the product one after another.
        def epilogue(r: slice, c: slice, _: Array) -> Writes:
            heads = memory["encoder.heads"][r]
            mu, logvar = heads[:, 0::2][:, c], heads[:, 1::2][:, c]
            grad, grad_eps = np.zeros_like(mu), np.zeros_like(mu)
            for sample in range(self.samples):
                at = slice(sample * size + r.start, sample * size + r.stop)
                g = memory[f"grad {out}"][at] @ self.matrix(weights)[:, c]
                if self.estimator == "sgvb_a":
                    g = g - self.beta * memory["z"][at, c]
                grad += g / self.samples
                grad_eps += g * memory["eps"][at, c] / self.samples
            grad_logvar = 0.5 * np.exp(logvar / 2) * grad_eps
            if self.estimator == "sgvb_b":
                grad -= self.beta * mu
                grad_logvar -= self.beta * np.expm1(logvar) / 2
            else:
                grad_logvar += self.beta / 2
            columns = slice(2 * c.start, 2 * c.stop)
            yield (
                "grad encoder.heads",
                (r, columns),
                np.stack((grad, grad_logvar), axis=-1).reshape(len(mu), -1),
            )

        return Launch(
            "backward z",
            (size, cols, 0),
            TILES["Narrow"],
            lambda r, k: np.zeros((r.stop - r.start, 0)),
            lambda c, k: np.zeros((c.stop - c.start, 0)),
            epilogue,
            {f"grad {out}", "encoder.heads", "z", "eps", *weights},
            {"grad encoder.heads"},
        )

    def update(self, half: str, i: int, source: str) -> Launch:
        memory, (weights, biases, out) = self.memory, self.layer(half, i)
        grad = f"grad {out}"
        outs, ins = self.matrix(weights).shape
        count = len(memory[grad])

        def step(w: Array, ascent: Array, prior: float) -> Array:
            return w - self.lr * (-ascent / len(memory[grad]) + prior * w)

        def epilogue(r: slice, c: slice, sums: Array) -> Writes:
            n = len(weights)
            for row in range(r.start, r.stop):
                weight = weights[row % n]
                at = (row // n, c)
                yield weight, at, step(memory[weight][at], sums[row - r.start], self.weight_prior)
                if c.start == 0:
                    bias = biases[row % n]
                    yield bias, row // n, step(memory[bias][row // n], memory[grad][:, row].sum(), 0.0)

        return Launch(
            f"update {out}",
            (outs, ins, count),
            TILES["Updates"],
            lambda r, k: memory[grad][k, r].T,
            lambda c, k: memory[source][k, c].T,
            epilogue,
            {grad, source},
            {*weights, *biases},
            in_place={*weights, *biases},
        )

    # --- the device -----------------------------------------------------------------------------------------

    def step(self, x: Array, eps: Array, random: np.random.Generator) -> tuple[float, float, float]:
        """One step; (elbo, log_likelihood, kl)."""
        memory, size = self.memory, len(x)
        for name in [name for name in memory if not name.startswith("parameter")]:
            del memory[name]  # what a step before left is of no use
        memory.update(x=x, eps=eps)
        self._allocate(size)
        written = {"x", "eps", *(name for name in memory if name.startswith("parameter"))}
        read: set[str] = set()
        in_place: set[str] = set()
        for launch in self.schedule(size):
            assert launch.reads <= written, f"{launch.name} reads {launch.reads - written} too early"
            assert not launch.reads & launch.writes, f"{launch.name}: blocks read what others write"
            assert not launch.reads & in_place, f"{launch.name} reads what was updated in this step"
            late = (launch.writes - launch.in_place) & (read | written)
            assert not late, f"{launch.name} writes {late}, which the step has used"
            self._run(launch, random)
            written |= launch.writes
            read |= launch.reads
            in_place |= launch.in_place
        log_likelihood = memory["ll_parts"].sum() / (size * self.samples)
        kl = memory["kl_parts"].sum() / size
        return log_likelihood - self.beta * kl, log_likelihood, kl

    def _allocate(self, size: int) -> None:
        rows = {"encoder": size, "decoder": size * self.samples}
        shapes: dict[str, tuple[int, int]] = {}
        for half, layers in (("encoder", self.encoder_layers), ("decoder", self.decoder_layers)):
            for i in range(layers + 1):
                weights, _, out = self.layer(half, i)
                cols = len(self.matrix(weights))
                shapes[out] = shapes[f"grad {out}"] = (rows[half], cols)
                if out == "encoder.heads":
                    shapes["z"] = (rows["decoder"], cols // 2)
                    shapes["kl_parts"] = (-(-cols // PART_COLS), size)
                if out == "decoder.output":
                    shapes["ll_parts"] = (-(-cols // PART_COLS), rows[half])
        del shapes["decoder.output"]  # the logits are never stored
        self.memory.update({name: np.full(shape, np.nan) for name, shape in shapes.items()})

    def _run(self, launch: Launch, random: np.random.Generator) -> None:
        (rows, cols, ks), (tile_rows, tile_cols, depth) = launch.shape, launch.tile
        blocks = [(r, c) for r in range(0, rows, tile_rows) for c in range(0, cols, tile_cols)]
        owned = {name: np.zeros(self.memory[name].shape, dtype=bool) for name in launch.writes}
        for position in random.permutation(len(blocks)):
            r, c = blocks[position]
            row, col = slice(r, min(r + tile_rows, rows)), slice(c, min(c + tile_cols, cols))
            sums = np.zeros((row.stop - row.start, col.stop - col.start))
            for k in range(0, ks, depth):
                chunk = slice(k, min(k + depth, ks))
                sums += launch.a(row, chunk) @ launch.b(col, chunk).T
            for name, index, values in launch.epilogue(row, col, sums):
                assert name in owned, f"{launch.name} writes {name} and does not say so"
                assert not owned[name][index].any(), f"{launch.name}: two blocks write {name}"
                owned[name][index] = True
                self.memory[name][index] = values
        for name, whole in owned.items():
            assert whole.all(), f"{launch.name} leaves some of {name} unwritten"


def run(twin: Twin, minibatches: Sequence[Mapping[str, Array]], seed: int) -> Array:
    """Steps over minibatches of x and eps; their terms, ``[n, 3]``."""
    random = np.random.default_rng(seed)
    return np.array([twin.step(each["x"], each["eps"], random) for each in minibatches])
