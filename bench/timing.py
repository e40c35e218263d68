"""Timing: variants of the same work interleaved, medians with quantiles, a cold cache.

On a GPU the runs of a variant over all buffer sets are captured in one CUDA graph, and its replays are timed
by events behind a backlog, so that neither the host nor a single launch is timed. Where a capture fails, the
runs themselves are queued behind a backlog.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

MAX_SETS = 64
COLD_BYTES = 192 * 2**20  # of all buffer sets together: three times the L2 cache of an H200
BACKLOG_CYCLES = 2_000_000  # about a millisecond
ROUNDS_IN_FLIGHT = 8
SHORTEST_JUDGED = 0.1  # seconds
CPUS_FOR_OTHERS = 0.15  # that nobody is ever without: timers, kernel threads
FEWEST_CALM = 5


@dataclass(frozen=True)
class Variant:
    """One way to do the work.

    prepare: what buffer set i needs before the clock starts. run: the timed work on what prepare returned;
    its result is kept until the clock has stopped.
    """

    name: str
    prepare: Callable[[int], Any]
    run: Callable[[Any], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds per run: the median, the 10 % and 90 % quantiles, how many were timed and how."""

    median: float
    low: float
    high: float
    count: int
    how: str

    def to_dict(self) -> dict[str, object]:
        return {name: round(v, 3) if isinstance(v, float) else v for name, v in asdict(self).items()}


def summarise(samples: Sequence[float], how: str) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return Timing(statistics.median(ordered), low, high, len(ordered), how)


def buffer_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets to go round, so that each comes from memory again; on a CPU two, for speed."""
    if device.type != "cuda":
        return 2
    return max(2, min(MAX_SETS, -(-COLD_BYTES // max(bytes_per_set, 1))))


def measure(
    variants: Sequence[Variant], sets: int, device: torch.device, seconds: float
) -> dict[str, Timing | str]:
    """Times the variants in turns for about ``seconds``; one that fails has its error instead of a timing."""
    return (_measure_cuda if device.type == "cuda" else _measure_cpu)(variants, sets, seconds)


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _turns(items: Sequence[Any], round_number: int) -> list[Any]:
    """The items, a different one first every time: none always follows the same other."""
    start = round_number % len(items)
    return [*items[start:], *items[:start]]


def _measure_cpu(variants: Sequence[Variant], sets: int, seconds: float) -> dict[str, Timing | str]:
    results: dict[str, Timing | str] = {}
    working = []
    for variant in variants:
        try:
            for i in (*range(sets), 0):  # warm-up: compiles, allocates
                variant.run(variant.prepare(i))
            working.append(variant)
        except Exception as error:
            results[variant.name] = _describe(error)
    samples: dict[str, list[tuple[float, bool]]] = {variant.name: [] for variant in working}
    end, round_number = time.perf_counter() + seconds, 0
    while working and (round_number < 5 or time.perf_counter() < end):
        for variant in _turns(working, round_number):
            state = variant.prepare(round_number % sets)
            before, start = _cpu_seconds(), time.perf_counter_ns()
            kept = variant.run(state)
            taken = time.perf_counter_ns() - start
            disturbed = _disturbed(before, _cpu_seconds(), taken / 1e9)
            samples[variant.name].append((taken / 1e3, disturbed))
            del kept, state
        round_number += 1
    return results | {name: _undisturbed(values) for name, values in samples.items()}


def _cpu_seconds() -> tuple[float, float] | None:
    """CPU time so far, of all processes (and of a virtual machine's host where that took ours) and of this
    one; None where the system does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _wait, irq, softirq, stolen = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK"), time.process_time()


def _disturbed(before: tuple[float, float] | None, after: tuple[float, float] | None, seconds: float) -> bool:
    """Whether others had CPUs that this process wanted. Never so of a short time: the system counts in
    hundredths of a second."""
    if before is None or after is None or seconds < SHORTEST_JUDGED:
        return False
    others = (after[0] - before[0] - (after[1] - before[1])) / seconds
    spare = (os.cpu_count() or 1) - torch.get_num_threads()
    return others > spare + CPUS_FOR_OTHERS


def _undisturbed(samples: Sequence[tuple[float, bool]]) -> Timing:
    """A choice by what others did, not by what came out."""
    calm = [time for time, disturbed in samples if not disturbed]
    if len(calm) == len(samples):
        return summarise(calm, "clock")
    if len(calm) >= FEWEST_CALM:
        left_out = len(samples) - len(calm)
        return summarise(calm, f"clock, without {left_out} turns in which others had the CPUs")
    return summarise([time for time, _ in samples], "clock, while others had the CPUs")


def _measure_cuda(variants: Sequence[Variant], sets: int, seconds: float) -> dict[str, Timing | str]:
    results: dict[str, Timing | str] = {}
    replays: dict[str, Callable[[], None]] = {}
    # One stream for all: autograd ties the inputs' gradients to the stream of their first use.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which made the inputs
    for variant in variants:
        try:
            replays[variant.name] = _capture(variant, sets, stream)
        except Exception:
            try:
                results[variant.name] = summarise(_queue(variant, sets, stream), "queue")
            except Exception as error:
                results[variant.name] = _describe(error)

    samples: dict[str, list[float]] = {name: [] for name in replays}
    with torch.cuda.stream(stream):
        for replay in [*replays.values()] * 2:
            replay()
        stream.synchronize()
        end, round_number = time.perf_counter() + seconds, 0
        while replays and (round_number < 2 * ROUNDS_IN_FLIGHT or time.perf_counter() < end):
            torch.cuda._sleep(BACKLOG_CYCLES)
            events = []
            for _ in range(ROUNDS_IN_FLIGHT):
                for name, replay in _turns([*replays.items()], round_number):
                    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    replay()
                    stop.record()
                    events.append((name, start, stop))
                round_number += 1
            stream.synchronize()
            for name, start, stop in events:
                samples[name].append(start.elapsed_time(stop) * 1e3 / sets)
    return results | {name: summarise(values, "graph") for name, values in samples.items()}


@dataclass
class _Capture:
    """A graph of one run on every set, and what must live as long as it does: it refers to their memory."""

    graph: torch.cuda.CUDAGraph
    states: list[Any]
    results: list[object]

    def __call__(self) -> None:
        self.graph.replay()


def _capture(variant: Variant, sets: int, stream: torch.cuda.Stream) -> _Capture:
    with torch.cuda.stream(stream):
        for i in range(min(sets, 3)):  # warm-up: compiles, creates handles
            variant.run(variant.prepare(i))
        states = [variant.prepare(i) for i in range(sets)]
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            results = [variant.run(state) for state in states]  # outputs too are different memory every time
        finally:
            graph.capture_end()
    return _Capture(graph, states, results)


def _queue(variant: Variant, sets: int, stream: torch.cuda.Stream) -> list[float]:
    samples = []
    with torch.cuda.stream(stream):
        for _ in range(2 * ROUNDS_IN_FLIGHT):
            states = [variant.prepare(i) for i in range(sets)]
            stream.synchronize()
            torch.cuda._sleep(BACKLOG_CYCLES * max(1, sets // 8))
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            kept = [variant.run(state) for state in states]
            stop.record()
            stream.synchronize()
            samples.append(start.elapsed_time(stop) * 1e3 / sets)
            del kept, states
    return samples


def host_time(call: Callable[[], object], device: torch.device) -> Timing:
    """Microseconds of the host per call, the device's work left queued. Of a CPU: of the whole call."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    calls = 20  # with their launches they fit in the queue
    for _ in range(calls):
        call()
    samples = []
    for _ in range(30):
        synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter_ns() - start) / 1e3 / calls)
    synchronize()
    return summarise(samples, "host")


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of torch's allocators that a call takes at most, its result among them."""
    call()
    if device.type != "cuda":
        return _peak_memory_cpu(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def _peak_memory_cpu(call: Callable[[], object]) -> int:
    with (
        _quiet_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        kept = call()
    del kept
    events = profile.profiler.kineto_results.events()
    taken = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in taken), initial=0))


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler reports its starts and stops there, from C++."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
