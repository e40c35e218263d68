"""The operators of vae_fast against eager PyTorch, torch.compile and a copy of the same bytes.

python -m bench.operators [--device cpu|cuda] [--quick] [--out DIR] [--operators NAME ...]

`vae-fast bench` is the same from an installed package, and `pytest bench/ --benchmark-only` the same work
under pytest-benchmark. Every line of the table is one operator, shape, dtype and direction; its variants are
timed in turns in one run (see timing.py), on random data. "copy" moves the fewest bytes that the operator
must move, half of them read and half written. Directions: forward under no_grad, backward alone, and both.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accuracy, machine, report, resources
from .timing import Timing, Variant, buffer_sets, host_time, measure, peak_memory

Outputs = tuple[Tensor, ...]
DIRECTIONS = ("forward", "backward", "both")

# rows, columns; those that matter most come first: time may run out
DATA_SHAPES = [(4096, 784), (128, 784), (65536, 1024), (512, 12288), (128, 20000), (100, 784)]
LATENT_SHAPES = [(4096, 128), (128, 20), (32768, 2048), (128, 2048)]
QUICK = {
    "cpu": [(4096, 784), (128, 784), (4096, 128), (128, 20)],
    "cuda": [(128, 784), (65536, 1024), (128, 20), (32768, 2048)],
}
DTYPES = [torch.float32, torch.bfloat16]
SMALL = 2**17  # elements up to which a GPU is done with a call before the host is with the next


@dataclass(frozen=True)
class Operator:
    """An operator, what people write instead, and how many tensors of input size it must read and write."""

    name: str
    inputs: Callable[[tuple[int, int], torch.dtype, torch.device], list[Tensor]]
    gradients: int  # the first so many inputs have one
    ours: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    forward: int
    backward: int
    shapes: Sequence[tuple[int, int]]
    rivals: dict[str, Callable[..., Outputs]] = field(default_factory=dict)


def _normal(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def _uniform(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.rand(shape, device=device, dtype=torch.float32).to(dtype)


def _posterior(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    seed = torch.randint(2**62, (1,), device=device)
    return [_normal(shape, dtype, device), _normal(shape, dtype, device), seed]


def _logits_and_targets(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [3 * _normal(shape, dtype, device), _uniform(shape, dtype, device)]


def _gaussian(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [_normal(shape, dtype, device), _normal(shape, dtype, device), _uniform(shape, dtype, device)]


def _gaussian_fixed(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    logvar = torch.zeros((), dtype=dtype, device=device)
    return [_normal(shape, dtype, device), _uniform(shape, dtype, device), logvar]


def _eager_sample(mu: Tensor, logvar: Tensor, seed: Tensor) -> Outputs:
    return (mu + torch.exp(0.5 * logvar) * torch.randn_like(mu),)


def _eager_kl(mu: Tensor, logvar: Tensor, seed: Tensor) -> Outputs:
    mu, logvar = mu.float(), logvar.float()
    return (-0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(-1),)


def _eager_bernoulli(logits: Tensor, x: Tensor) -> Outputs:
    return (-F.binary_cross_entropy_with_logits(logits.float(), x.float(), reduction="none").sum(-1),)


def _eager_bernoulli_sum(logits: Tensor, x: Tensor) -> Outputs:
    return (-F.binary_cross_entropy_with_logits(logits, x, reduction="sum"),)


def _distributions_bernoulli(logits: Tensor, x: Tensor) -> Outputs:
    return (torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1),)


def _sigmoid_bernoulli(logits: Tensor, x: Tensor) -> Outputs:
    return (-F.binary_cross_entropy(torch.sigmoid(logits), x, reduction="sum"),)


def _eager_gaussian(mean: Tensor, logvar: Tensor, x: Tensor) -> Outputs:
    mean, logvar, x = mean.float(), logvar.float(), x.float()
    return (-0.5 * (1.8378770664093453 + logvar + (x - mean).square() / logvar.exp()).sum(-1),)


def operators() -> list[Operator]:
    from vae_fast import functional as ours

    return [
        Operator(
            "bernoulli_log_likelihood",
            _logits_and_targets,
            1,
            lambda logits, x: (ours.bernoulli_log_likelihood(logits, x),),
            _eager_bernoulli,
            forward=2,
            backward=3,
            shapes=DATA_SHAPES,
            rivals={
                "eager, summed": _eager_bernoulli_sum,
                "distributions": _distributions_bernoulli,
                "sigmoid + BCE": _sigmoid_bernoulli,
            },
        ),
        Operator(
            "reparameterize_with_kl",
            _posterior,
            2,
            lambda mu, logvar, seed: ours.reparameterize_with_kl(mu, logvar, seed=seed),
            lambda mu, logvar, seed: _eager_sample(mu, logvar, seed) + _eager_kl(mu, logvar, seed),
            forward=3,
            backward=5,
            shapes=LATENT_SHAPES,
        ),
        Operator(
            "gaussian_log_likelihood",
            _gaussian,
            2,
            lambda mean, logvar, x: (ours.gaussian_log_likelihood(mean, logvar, x),),
            _eager_gaussian,
            forward=3,
            backward=5,
            shapes=DATA_SHAPES,
        ),
        Operator(
            "gaussian_kl",
            _posterior,
            2,
            lambda mu, logvar, seed: (ours.gaussian_kl(mu, logvar),),
            _eager_kl,
            forward=2,
            backward=4,
            shapes=LATENT_SHAPES,
        ),
        Operator(
            "reparameterize",
            _posterior,
            2,
            lambda mu, logvar, seed: (ours.reparameterize(mu, logvar, seed=seed),),
            _eager_sample,
            forward=3,
            backward=4,
            shapes=LATENT_SHAPES,
        ),
        Operator(
            "gaussian_log_likelihood, one variance",
            _gaussian_fixed,
            1,
            lambda mean, x, logvar: (ours.gaussian_log_likelihood(mean, logvar, x),),
            lambda mean, x, logvar: _eager_gaussian(mean, logvar, x),
            forward=2,
            backward=3,
            shapes=DATA_SHAPES,
        ),
    ]


class Sets:
    """The buffer sets of one operator, shape and dtype: inputs, and upstream gradients for every variant."""

    def __init__(
        self, op: Operator, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.op = op
        element = torch.empty(0, dtype=dtype).element_size()
        self.bytes = {
            "forward": op.forward * shape[0] * shape[1] * element,
            "backward": op.backward * shape[0] * shape[1] * element,
        }
        self.bytes["both"] = sum(self.bytes.values())
        self.count = buffer_sets(self.bytes["forward"], device)
        self.inputs = []
        for _ in range(self.count):
            inputs = op.inputs(shape, dtype, device)
            for t in inputs[: op.gradients]:
                t.requires_grad_()
            self.inputs.append(inputs)

    def upstream(self, outputs: Outputs) -> list[Tensor]:
        return [torch.randn_like(output) for output in outputs]

    def variant(self, name: str, call: Callable[..., Outputs], direction: str) -> Variant:
        leaves = [inputs[: self.op.gradients] for inputs in self.inputs]
        upstream: dict[int, list[Tensor]] = {}

        def forward(i: int) -> Outputs:
            with torch.no_grad():
                return call(*self.inputs[i])

        def prepare_backward(i: int) -> tuple[Outputs, list[Tensor], list[Tensor]]:
            outputs = call(*self.inputs[i])
            if i not in upstream:
                upstream[i] = self.upstream(outputs)
            return outputs, leaves[i], upstream[i]

        def backward(state: tuple[Outputs, list[Tensor], list[Tensor]]) -> Outputs:
            outputs, inputs, gradients = state
            return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

        def prepare_both(i: int) -> tuple[int, list[Tensor]]:
            if i not in upstream:
                with torch.no_grad():
                    upstream[i] = self.upstream(call(*self.inputs[i]))
            return i, upstream[i]

        def both(state: tuple[int, list[Tensor]]) -> tuple[Outputs, Outputs]:
            i, gradients = state
            outputs = call(*self.inputs[i])
            return outputs, torch.autograd.grad(outputs, leaves[i], gradients)

        if direction == "forward":
            return Variant(name, lambda i: i, forward)
        if direction == "backward":
            return Variant(name, prepare_backward, backward)
        return Variant(name, prepare_both, both)

    def host_time(self, name: str, call: Callable[..., Outputs], direction: str) -> Timing:
        variant = self.variant(name, call, direction)
        state = variant.prepare(0)
        return host_time(lambda: variant.run(state), self.inputs[0][0].device)

    def copy(self, direction: str) -> Variant:
        shape, device = (self.bytes[direction] // 2,), self.inputs[0][0].device
        sources = [torch.randint(255, shape, dtype=torch.uint8, device=device) for _ in range(self.count)]
        targets = [torch.empty_like(source) for source in sources]
        return Variant("copy", lambda i: i, lambda i: targets[i].copy_(sources[i]))


def compiled(call: Callable[..., Outputs], device: torch.device) -> dict[str, Callable[..., Outputs]]:
    """torch.compile as it comes and, on a GPU, with the search for the best launch."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # or backward could not be timed alone
    torch._dynamo.reset()
    calls = {"compile": torch.compile(call, dynamic=False)}
    if device.type == "cuda":  # of a CPU's code it searches matrix products only
        mode = "max-autotune-no-cudagraphs"
        calls["compile, max-autotune"] = torch.compile(call, dynamic=False, mode=mode)
    return calls


def variants(op: Operator, device: torch.device, *, compile: bool) -> dict[str, Callable[..., Outputs]]:
    """Ours, and what people write instead."""
    return {
        "ours": op.ours,
        "eager": op.eager,
        **op.rivals,
        **(compiled(op.eager, device) if compile else {}),
    }


def refusal(op: Operator, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str:
    """Why this would not fit in memory, by a generous estimate; nothing where it does."""
    elements = shape[0] * shape[1]
    tensor = elements * dtype.itemsize
    # Inputs, upstream gradients, the copy's two buffers; a call's results, and eager's float32 temporaries.
    held = (2 * op.forward + op.backward) * tensor
    call = (op.forward + op.backward) * tensor + 6 * 4 * elements
    sets = buffer_sets(op.forward * tensor, device)
    # CUDA graphs keep the results of every variant and set.
    needed = sets * (held + call * (4 + len(op.rivals))) if device.type == "cuda" else sets * held + call
    free = machine.free_bytes(device)
    return "" if needed <= free else f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"


def label(op: Operator, shape: tuple[int, int], dtype: torch.dtype) -> str:
    return f"{op.name} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"


def bench(
    op: Operator,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    seconds: float,
    compile: bool,
    directions: Sequence[str] = DIRECTIONS,
) -> list[dict[str, Any]]:
    """The lines of the table for one operator, shape and dtype."""
    sets = Sets(op, shape, dtype, device)
    calls = variants(op, device, compile=compile)
    lines = []
    for direction in directions:
        timed = [sets.variant(name, call, direction) for name, call in calls.items()]
        timings = measure([*timed, sets.copy(direction)], sets.count, device, seconds)
        lines.append(
            {
                "operator": op.name,
                "rows": shape[0],
                "cols": shape[1],
                "dtype": str(dtype).removeprefix("torch."),
                "direction": direction,
                "bytes": sets.bytes[direction],
                "buffer_sets": sets.count,
                "cold": sets.count * sets.bytes["forward"] > 2 * 60 * 2**20 or device.type != "cuda",
                "variants": {
                    name: value.to_dict() if isinstance(value, Timing) else {"error": value}
                    for name, value in timings.items()
                },
            }
        )
        if device.type == "cuda" and direction != "backward" and shape[0] * shape[1] <= SMALL:
            compiled_ones = [name for name in calls if name in report.COMPILED]
            lines[-1]["host"] = {
                name: sets.host_time(name, calls[name], direction).to_dict()
                for name in ("ours", "eager", *compiled_ones)
                if isinstance(timings[name], Timing)
            }
    peaks: dict[str, int | str] = {}
    for name, call in calls.items():
        variant = sets.variant(name, call, "both")
        state = variant.prepare(0)
        try:
            peaks[name] = peak_memory(lambda run=variant.run, state=state: run(state), device)
        except Exception as error:
            peaks[name] = f"{type(error).__name__}: {error}"[:200]
    if "both" in directions:
        lines[directions.index("both")]["peak_bytes"] = peaks
    return lines


def host_times(ops: Sequence[Operator], device: torch.device) -> list[dict[str, Any]]:
    """Microseconds per call at the sizes of a VAE: ours, eager, and one native operator. On a GPU of the
    host, the device's work left queued; on a CPU of the whole call, so there also of one element, where next
    to nothing is left to compute."""
    lines = []
    elements = [] if device.type == "cuda" else [(1, 1)]
    for op in ops:
        for shape in [*elements, (128, 784) if op.shapes is DATA_SHAPES else (128, 20)]:
            sets = Sets(op, shape, torch.float32, device)
            for direction in ("forward", "both"):
                line: dict[str, Any] = {"operator": op.name, "shape": shape, "direction": direction}
                for name, call in {"ours": op.ours, "eager": op.eager}.items():
                    line[name] = sets.host_time(name, call, direction).to_dict()
                lines.append(line)
    for shape in [*elements, (128, 784), (128, 20)]:
        a, b = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
        upstream = torch.randn(shape, device=device)

        def forward(a: Tensor = a, b: Tensor = b) -> Tensor:
            with torch.no_grad():
                return torch.mul(a, b)

        def both(a: Tensor = a, b: Tensor = b, upstream: Tensor = upstream) -> Outputs:
            return torch.autograd.grad(torch.mul(a, b), (a, b), upstream)

        for direction, call in {"forward": forward, "both": both}.items():
            native = host_time(call, device).to_dict()
            lines.append({"operator": "torch.mul", "shape": shape, "direction": direction, "native": native})
    return lines


def function_of(op: Operator) -> str:
    """The public function: an operator may be here twice, "gaussian_log_likelihood, one variance"."""
    return op.name.split(",")[0]


def functions() -> list[str]:
    return list(dict.fromkeys(function_of(op) for op in operators()))


def run(
    device: torch.device,
    *,
    quick: bool,
    seconds: float | None = None,
    budget: float = 3600,
    only: Sequence[str] = (),
    shapes: Sequence[tuple[int, int]] = (),
    compile: bool = True,
    accurate: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Measures the operators, or only these functions, and their accuracy.

    Args:
        quick: the shapes that matter most.
        shapes: these for every operator, not its own.
        accurate: measure the accuracy too.
        seconds: per line of the table.
        budget: seconds after which no new line is begun; nothing new is compiled after 60 % of it.

    Returns:
        What report.py makes tables and pages of, ready for JSON.
    """
    if seconds is None:
        seconds = 0.06 if device.type == "cuda" else 0.3 if quick else 1.0
    torch.manual_seed(0)
    start = time.perf_counter()
    wanted = [op for op in operators() if not only or function_of(op) in only]
    result: dict[str, Any] = {
        **machine.describe(command),
        "machine": machine.name(device),
        "device": str(device),
        "operators": [],
        "skipped": [],
    }

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {what}", file=sys.stderr, flush=True)

    if accurate:
        result["accuracy"] = accuracy.run(device, only=only)
        say("accuracy")
    result["host"] = host_times(wanted, device)
    say("host times")
    if shapes:
        wanted = [replace(op, shapes=shapes) for op in wanted]
    if device.type == "cuda":
        result["kernels"] = resources.to_dicts(resources.of_extension(device))
    # In the order of importance: a shape of every operator, then the next; float32 first.
    jobs = [
        (op, op.shapes[i], dtype)
        for i in range(max(len(op.shapes) for op in wanted))
        for dtype in (DTYPES[:1] if quick and device.type == "cpu" else DTYPES)
        for op in wanted
        if i < len(op.shapes) and (shapes or not quick or op.shapes[i] in QUICK[device.type])
    ]
    for op, shape, dtype in jobs:
        what = label(op, shape, dtype)
        used = time.perf_counter() - start
        if used > budget:
            result["skipped"].append(f"{what}: no time left")
            continue
        if why_not := refusal(op, shape, dtype, device):
            result["skipped"].append(f"{what}: {why_not}")
            continue
        # Compiling takes most of the time: given up first, and done for one shape only by a CPU in haste.
        worth_it = used < 0.6 * budget and (not quick or device.type == "cuda" or shape == op.shapes[0])
        try:
            lines = bench(op, shape, dtype, device, seconds=seconds, compile=compile and worth_it)
            result["operators"] += lines
        except Exception as error:  # out of memory, say: the rest can still be measured
            result["skipped"].append(f"{what}: {type(error).__name__}: {error}"[:300])
        if device.type == "cuda":
            torch.cuda.empty_cache()
        say(what)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the shapes that matter most")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--seconds", type=float, default=None, help="per line of the table")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no new line is begun")
    parser.add_argument("--operators", nargs="*", choices=functions(), default=[], help="only these")
    parser.add_argument("--shapes", nargs="*", default=[], metavar="ROWSxCOLS", help="for every operator")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-accuracy", dest="accurate", action="store_false")
    parser.add_argument("--out", type=Path, help="a folder for operators.json, .txt, .png and .html")
    arguments = parser.parse_args(argv)
    for shape in arguments.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            parser.error(f"--shapes: got {shape!r}, wanted ROWSxCOLS such as 128x784")
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    result = run(
        device,
        quick=arguments.quick,
        seconds=arguments.seconds,
        budget=arguments.budget,
        only=arguments.operators,
        shapes=[(int(rows), int(cols)) for rows, cols in (shape.split("x") for shape in arguments.shapes)],
        compile=arguments.compile,
        accurate=arguments.accurate,
        command=" ".join(["python -m bench.operators", *(sys.argv[1:] if argv is None else argv)]),
    )
    print(report.text(result))
    if arguments.out:
        report.write(result, arguments.out)


if __name__ == "__main__":
    main()
