"""Which datapoints a training step sees: minibatches of an array, in an order of their own, or a stream.

A source gives the engines, for any run of steps, the size of each minibatch, a table of rows, and (on the
device) the datapoints of given rows. Engines read nothing else: an array and a stream look the same to them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .datasets import DataError, Prepared, prepare
from .estimators import GOLDEN, ORDER, splitmix64, step_seeds

ORDERS = ("shuffle", "replacement")


class Source(Protocol):
    """Where an engine's minibatches come from."""

    count: int | None  # number of datapoints N; None for a stream
    steps_at_once: int  # the most steps that sizes() and rows() can be asked for
    most_rows: int  # about the most datapoints of a minibatch
    version: int  # changes when the datapoints have moved to other memory
    note: str  # how the values are read
    kind: str  # "real", "binary" or "dynamic"; of a stream once its first minibatch was read

    @property
    def data(self) -> Prepared:
        """What the numbers of ``rows`` are rows of, on the device."""

    def sizes(self, first_step: int, n_steps: int, samples: int | None = None) -> NDArray[np.int64]:
        """Sizes of the minibatches from ``first_step`` on: ``n_steps``, or as few as make up ``samples``.

        Fewer still where a stream has ended. A stream forgets the minibatches before ``first_step``.
        """

    def rows(self, first_step: int, n_steps: int) -> NDArray[np.int64]:
        """Their rows ``[n_steps, width]``, zeros at the end of a smaller minibatch."""

    def prefetch(self, first_step: int, n_steps: int) -> None:
        """Does what the host can do ahead for these steps."""

    def batch(self, rows: Tensor, seed: Tensor) -> Tensor:
        """The datapoints of these rows, float ``[B, D]`` on the device; ``seed`` is for targets="dynamic"."""

    def datapoint(self, step: int, position: int) -> str:
        """Names a datapoint of a minibatch in a message."""

    def fingerprint(self) -> str | None:
        """What a checkpoint remembers the data by; None for a stream."""


@dataclass(frozen=True)
class MinibatchOrder:
    """Rows of every training step, as a pure function of (seed, step, number of datapoints, batch size).

    Let word(s, k) = splitmix64(s + (k + 1) GOLDEN mod 2**64), with :func:`vae_fast.estimators.splitmix64`.

    * ``kind="shuffle"``: an epoch is S = ceil(count / batch_size) steps, the last one as small as it must be.
      Epoch e visits the rows r = 0 .. count - 1 in the order of (word(s, r), r) with s = step_seed(seed, e,
      ORDER).
    * ``kind="replacement"`` (the paper's code): row k of step t is floor(high32(word(s, k)) count / 2**32)
      with s = step_seed(seed, t, ORDER); every minibatch is whole.
    """

    count: int
    batch_size: int
    seed: int
    kind: str = "shuffle"
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.batch_size)

    def sizes(self, first_step: int, n_steps: int) -> NDArray[np.int64]:
        if self.kind == "replacement":
            return np.full(n_steps, self.batch_size, dtype=np.int64)
        in_epoch = np.arange(first_step, first_step + n_steps) % self.steps_per_epoch
        return np.minimum(self.batch_size, self.count - in_epoch * self.batch_size)

    def rows(self, first_step: int, n_steps: int) -> NDArray[np.int64]:
        if self.kind == "replacement":
            seeds = step_seeds(self.seed, first_step, n_steps, ORDER)[:, 0]
            high = _words(seeds, self.batch_size) >> np.uint64(32)
            return ((high * np.uint64(self.count)) >> np.uint64(32)).astype(np.int64)
        parts = [np.empty((0, min(self.batch_size, self.count)), dtype=np.int64)]
        while n_steps > 0:
            epoch, step = divmod(first_step, self.steps_per_epoch)
            parts.append(self._epoch(epoch)[step : step + n_steps])
            first_step, n_steps = first_step + len(parts[-1]), n_steps - len(parts[-1])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch's minibatches, zeros at the end of the last; ``[steps, width]``."""
        found = self._epochs.get(epoch)
        if found is None:
            keys = _words(step_seeds(self.seed, epoch, 1, ORDER)[:, 0], self.count)[0]
            width = min(self.batch_size, self.count)
            padded = np.zeros(self.steps_per_epoch * width, dtype=np.int64)
            padded[: self.count] = order_of(keys)
            for old in sorted(tuple(self._epochs))[:-1]:  # one and the new one are enough
                self._epochs.pop(old, None)  # another thread, which prepares the next steps, may have
            found = self._epochs[epoch] = padded.reshape(-1, width)
        return found


def order_of(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The indices i in the order of (keys[i], i): a stable argsort."""
    # Sorting words is several times as fast as sorting indices: the index takes the place of the low bits.
    bits = np.uint64(len(keys).bit_length())
    packed = ((keys >> bits) << bits) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order = (packed & np.uint64((1 << int(bits)) - 1)).astype(np.int64)
    ordered = keys[order]
    if (ordered[1:] < ordered[:-1]).any():  # two keys differ in their low bits alone
        order = np.argsort(keys, kind="stable")
    return order


def _words(seeds: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """word(s, k) of :class:`MinibatchOrder` for every seed s and k < count; ``[len(seeds), count]``."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return splitmix64(seeds.view(np.uint64)[:, None] + steps)


def binarise(probabilities: Tensor, words: Tensor) -> Tensor:
    """Draws of Bernoulli(probabilities): 1 where a word of :func:`uniform_words` is < 2**32 probability."""
    return (words.double() < probabilities.double() * 2**32).to(probabilities.dtype)


def uniform_words(shape: Sequence[int], seed: Tensor) -> Tensor:
    """32-bit words, as int64: a pure function of (seed, element index i in row-major order), on any device.

    Element i is high32(word(seed, i)), word as in :class:`MinibatchOrder`. seed: int64, one element.
    """
    index: Tensor = torch.arange(1, math.prod(shape) + 1, device=seed.device)
    x = seed + index * _signed(GOLDEN)  # int64 arithmetic wraps modulo 2**64
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    words: Tensor = _shifted(x ^ _shifted(x, 31), 32)
    return words.reshape(tuple(shape))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """The logical right shift of 64 bits, which int64 does not have."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


class ArraySource:
    """Minibatches of an array that lies on the device."""

    steps_at_once = 2**31
    version = 0

    def __init__(
        self, data: Prepared, *, batch_size: int, seed: int, order: str, device: torch.device
    ) -> None:
        self.data = data.to(device)
        self.kind = data.kind
        self.order = MinibatchOrder(len(data), batch_size, seed, order)
        self.count: int | None = len(data)
        self.most_rows = min(batch_size, len(data)) if order == "shuffle" else batch_size
        self.note = data.note

    def sizes(self, first_step: int, n_steps: int, samples: int | None = None) -> NDArray[np.int64]:
        sizes = self.order.sizes(first_step, n_steps)
        if samples is None:
            return sizes
        return sizes[: int(np.searchsorted(np.cumsum(sizes), samples)) + 1]

    def rows(self, first_step: int, n_steps: int) -> NDArray[np.int64]:
        return self.order.rows(first_step, n_steps)

    def prefetch(self, first_step: int, n_steps: int) -> None:
        self.order.rows(first_step, n_steps)  # keeps the permutation of a new epoch

    def batch(self, rows: Tensor, seed: Tensor) -> Tensor:
        x = self.data.batch(rows)
        return binarise(x, uniform_words(x.shape, seed)) if self.kind == "dynamic" else x

    def datapoint(self, step: int, position: int) -> str:
        return f"row {self.order.rows(step, 1)[0, position]} of the training data"

    def fingerprint(self) -> str | None:
        values = self.data.values.cpu().contiguous()
        reading = f"{tuple(values.shape)} {values.dtype} {self.data.kind} {self.data.scale}"
        digest = hashlib.sha256(reading.encode())
        digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()


class StreamSource:
    """Minibatches of a DataLoader or any other iterable of batches, taken in the order in which they come.

    A batch is a tensor or array ``[b, ...]``, or a tuple or list that begins with one (labels after it are
    not read). Each is checked as it arrives; the first decides how all are read. An iterable that can be
    iterated again is, when it ends.
    """

    steps_at_once = 20  # so many minibatches are on the device at a time
    most_rows = 1000  # a guess; steps_at_once is what limits a run

    def __init__(
        self,
        stream: Iterable[Any],
        *,
        likelihood: str,
        targets: str,
        pixel_scale: float,
        data_dim: int | None,
        device: torch.device,
        first_step: int,
    ) -> None:
        self._stream = stream
        self._iterator: Iterator[Any] | None = None  # made when the training draws its random numbers
        self._prepare = partial(
            prepare, likelihood=likelihood, pixel_scale=pixel_scale, width=data_dim, name="train"
        )
        self._device = device
        self._waiting: list[Prepared] = []  # the minibatches of steps self._first, self._first + 1, ...
        self._first = first_step
        self._passed = 0  # datapoints that came before them
        self._on_device: Prepared | None = None
        self.count: int | None = None
        self.version = 0
        self.kind = targets
        self.note = "train: a stream of which nothing has been read"
        self._like: Prepared | None = None  # the first minibatch decides how all are read

    def sizes(self, first_step: int, n_steps: int, samples: int | None = None) -> NDArray[np.int64]:
        done = first_step - self._first
        self._passed += sum(len(minibatch) for minibatch in self._waiting[:done])
        del self._waiting[:done]
        self._first = first_step
        sizes: list[int] = []
        while len(sizes) < n_steps and (samples is None or sum(sizes) < samples):
            if len(sizes) == len(self._waiting):  # nothing is taken from the stream before it is needed
                minibatch = self._next()
                if minibatch is None:
                    break
                self._waiting.append(minibatch)
            sizes.append(len(self._waiting[len(sizes)]))
        return np.array(sizes, dtype=np.int64)

    def rows(self, first_step: int, n_steps: int) -> NDArray[np.int64]:
        """Puts these minibatches on the device, one after another, and returns where they lie."""
        chunk = self._waiting[first_step - self._first :][:n_steps]
        starts = np.cumsum([0, *(len(minibatch) for minibatch in chunk)])
        if self._on_device is None or len(self._on_device) < int(starts[-1]):
            slots = self.steps_at_once * max(len(minibatch) for minibatch in chunk)
            values = chunk[0].values.new_empty((slots, chunk[0].values.shape[1]), device=self._device)
            self._on_device = replace(chunk[0], values=values)
            self.version += 1
        for start, minibatch in zip(starts, chunk, strict=False):
            self._on_device.values[start : start + len(minibatch)].copy_(minibatch.values)
        rows = np.zeros((len(chunk), max(len(minibatch) for minibatch in chunk)), dtype=np.int64)
        for row, start, minibatch in zip(rows, starts, chunk, strict=False):
            row[: len(minibatch)] = np.arange(start, start + len(minibatch))
        return rows

    @property
    def data(self) -> Prepared:
        assert self._on_device is not None
        return self._on_device

    def prefetch(self, first_step: int, n_steps: int) -> None:
        pass  # batches are asked for when they are needed: a stream may be watched by whoever feeds it

    def batch(self, rows: Tensor, seed: Tensor) -> Tensor:
        x = self.data.batch(rows)
        return binarise(x, uniform_words(x.shape, seed)) if self.kind == "dynamic" else x

    def datapoint(self, step: int, position: int) -> str:
        before = sum(len(minibatch) for minibatch in self._waiting[: step - self._first])
        return f"datapoint {self._passed + before + position} of this stream"

    def fingerprint(self) -> str | None:
        return None

    def _next(self) -> Prepared | None:
        item = next(self._iterator, None) if self._iterator is not None else None
        if item is None and (self._iterator is None or not isinstance(self._stream, Iterator)):
            self._iterator = iter(self._stream)
            item = next(self._iterator, None)
        if item is None:
            return None
        values = item[0] if isinstance(item, (tuple, list)) else item
        minibatch = self._prepare(values, targets=self.kind)
        if self._like is None:
            self._like, self.kind, self.note = minibatch, minibatch.kind, minibatch.note
        found, wanted = minibatch.values, self._like.values
        if found.shape[1:] != wanted.shape[1:] or found.dtype != wanted.dtype:
            raise DataError(
                f"train: found a minibatch of {found.shape[1]} features and {found.dtype} in the stream, "
                f"wanted {wanted.shape[1]} and {wanted.dtype} as in the first"
            )
        return minibatch
