"""The operators under pytest-benchmark: what the modules bench/test_*.py share.

pytest bench/ --benchmark-only [-k "4096x784 and float32 and forward"]

A group is one line of bench.operators' table: ours, eager PyTorch, its rivals, torch.compile and a copy of
the same bytes side by side. On a GPU a round ends with a synchronisation, so that it is the latency of one
call, host and device; bench.operators times the device alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .operators import (
    DIRECTIONS,
    DTYPES,
    Operator,
    Sets,
    compiled,
    function_of,
    label,
    operators,
    refusal,
    variants,
)
from .report import COMPILED
from .timing import Variant

SECONDS = 0.3  # of rounds per benchmark
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def cases(function: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrizes a test by all that is timed of a public function, as ``case``."""
    found = [
        Case(op, shape, dtype, torch.device(device), direction, variant)
        for op in operators()
        if function_of(op) == function
        for device in DEVICES
        for shape in sorted(op.shapes, key=lambda shape: shape[0] * shape[1])
        for dtype in DTYPES
        for direction in DIRECTIONS
        for variant in ("ours", "eager", *op.rivals, *COMPILED[: 2 if device == "cuda" else 1], "copy")
    ]
    return pytest.mark.parametrize("case", found, ids=lambda case: f"{case.group} {case.variant}")


@dataclass(frozen=True)
class Case:
    op: Operator
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    direction: str
    variant: str

    @property
    def group(self) -> str:
        return f"{label(self.op, self.shape, self.dtype)} {self.direction} {self.device.type}"

    def run(self, benchmark: Any) -> None:
        """extra_info holds the bytes that must move, and what rate follows from the median."""
        if why_not := refusal(self.op, self.shape, self.dtype, self.device):
            pytest.skip(why_not)
        sets, variant = prepared(self)

        def call(state: Any) -> object:
            result = variant.run(state)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return result

        took = 0.0
        for i in (*range(sets.count), 0):  # warm-up: compiles, allocates
            state = variant.prepare(i)
            start = time.perf_counter()
            call(state)
            took = time.perf_counter() - start
        rounds = max(5, min(1000, int(SECONDS / took)))
        turns = itertools.cycle(range(sets.count))
        benchmark.group = self.group
        benchmark.pedantic(call, setup=lambda: ((variant.prepare(next(turns)),), {}), rounds=rounds)
        size = sets.bytes[self.direction]
        benchmark.extra_info["bytes"] = size
        if benchmark.stats is not None:  # as with --benchmark-disable
            benchmark.extra_info["GB/s"] = round(size / benchmark.stats.stats.median / 1e9, 3)


# The last operator, shape and dtype only: tensors of 2**26 elements fit once.
_kept: dict[str, tuple[Sets, dict[str, Callable[..., Any]]]] = {}


def prepared(case: Case) -> tuple[Sets, Variant]:
    key = f"{label(case.op, case.shape, case.dtype)} {case.device}"
    if key not in _kept:
        _kept.clear()
        torch.manual_seed(0)
        sets = Sets(case.op, case.shape, case.dtype, case.device)
        _kept[key] = sets, variants(case.op, case.device, compile=False)
    sets, calls = _kept[key]
    if case.variant in COMPILED and case.variant not in calls:
        calls |= compiled(case.op.eager, case.device)
    if case.variant == "copy":
        return sets, sets.copy(case.direction)
    return sets, sets.variant(case.variant, calls[case.variant], case.direction)
