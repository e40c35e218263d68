"""The operators of vae_fast against eager PyTorch, torch.compile and a copy of the same bytes.

python -m bench.operators [--device cpu|cuda] [--quick] [--out DIR] [--operators NAME ...]

Every line of the table is one operator, shape, dtype and direction; its variants are timed in turns in one
run (see timing.py), on random data. "copy" moves the fewest bytes that the operator must move, half of them
read and half written. Directions: forward under no_grad, backward alone, and both.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Timing, Variant, buffer_sets, host_time, measure, peak_memory

Outputs = tuple[Tensor, ...]
DIRECTIONS = ("forward", "backward", "both")

# rows, columns; those that matter most come first: time may run out
DATA_SHAPES = [(4096, 784), (128, 784), (65536, 1024), (512, 12288), (128, 20000), (100, 784)]
LATENT_SHAPES = [(128, 20), (32768, 2048), (4096, 128), (128, 2048)]
QUICK = {"cpu": [(4096, 784), (4096, 128)], "cuda": [(128, 784), (65536, 1024), (128, 20), (32768, 2048)]}
# Compiling takes seconds each time: not for every shape.
COMPILED = {(4096, 784), (128, 784), (65536, 1024), (128, 20), (32768, 2048), (4096, 128)}


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

    def copy(self, direction: str) -> Variant:
        shape, device = (self.bytes[direction] // 2,), self.inputs[0][0].device
        sources = [torch.randint(255, shape, dtype=torch.uint8, device=device) for _ in range(self.count)]
        targets = [torch.empty_like(source) for source in sources]
        return Variant("copy", lambda i: i, lambda i: targets[i].copy_(sources[i]))


def compiled(call: Callable[..., Outputs]) -> Callable[..., Outputs]:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # or backward could not be timed alone
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False)  # type: ignore[no-any-return]


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
    calls = {"ours": op.ours, "eager": op.eager, **op.rivals}
    if compile:
        calls["compile"] = compiled(op.eager)
    lines = []
    for direction in directions:
        variants = [sets.variant(name, call, direction) for name, call in calls.items()]
        timings = measure([*variants, sets.copy(direction)], sets.count, device, seconds)
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
    if device.type == "cuda":
        peaks = {}
        for name, call in calls.items():
            variant = sets.variant(name, call, "both")
            state = variant.prepare(0)
            try:
                peaks[name] = peak_memory(lambda run=variant.run, state=state: run(state))
            except Exception as error:
                peaks[name] = f"{type(error).__name__}: {error}"[:200]
        lines[-1]["peak_bytes"] = peaks
    return lines


def host_times(device: torch.device) -> list[dict[str, Any]]:
    """Host microseconds per call at the sizes of a VAE: ours, eager, and one native operator."""
    lines = []
    for op in operators():
        shape = (128, 784) if op.shapes is DATA_SHAPES else (128, 20)
        sets = Sets(op, shape, torch.float32, device)
        for direction in ("forward", "both"):
            line: dict[str, Any] = {"operator": op.name, "shape": shape, "direction": direction}
            for name, call in {"ours": op.ours, "eager": op.eager}.items():
                variant = sets.variant(name, call, direction)
                state = variant.prepare(0)
                line[name] = host_time(lambda run=variant.run, state=state: run(state), device).to_dict()
            lines.append(line)
    a, b = (torch.randn(128, 784, device=device, requires_grad=True) for _ in range(2))
    upstream = torch.randn(128, 784, device=device)

    def forward() -> Tensor:
        with torch.no_grad():
            return torch.mul(a, b)

    def both() -> Outputs:
        return torch.autograd.grad(torch.mul(a, b), (a, b), upstream)

    for direction, call in {"forward": forward, "both": both}.items():
        native = host_time(call, device).to_dict()
        lines.append({"operator": "torch.mul", "shape": (128, 784), "direction": direction, "native": native})
    return lines


def time_of(line: dict[str, Any], variant: str) -> float | None:
    value = line["variants"].get(variant, {}).get("median")
    return None if value is None else float(value)


def _ratio(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{a / b:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _print_rows(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """The result as text: microseconds (medians), and ratios of medians."""
    header = ["operator", "shape", "dtype", "direction", "ours", "eager", "compile", "copy"]
    header += ["eager/ours", "compile/ours", "copy/ours", "GB/s", "peak MB", "eager MB"]
    rows, rivals = [header], [["operator", "shape", "dtype", "direction", "rival", "us", "rival/ours"]]
    for line in result["operators"]:
        ours, eager, compile, copy = (time_of(line, name) for name in ("ours", "eager", "compile", "copy"))
        peaks = line.get("peak_bytes", {})
        key = [line["operator"], f"{line['rows']}x{line['cols']}", line["dtype"], line["direction"]]
        rows.append(
            key
            + [_number(value) for value in (ours, eager, compile, copy)]
            + [_ratio(eager, ours), _ratio(compile, ours), _ratio(copy, ours)]
            + ["-" if not ours else f"{line['bytes'] / ours / 1e3:.0f}"]
            + [
                f"{p / 2**20:.1f}" if isinstance(p := peaks.get(name), int) else "-"
                for name in ("ours", "eager")
            ]
        )
        for name in line["variants"]:
            if name not in ("ours", "eager", "compile", "copy"):
                rivals.append([*key, name, _number(time_of(line, name)), _ratio(time_of(line, name), ours)])
    parts = [_print_rows(rows)]
    if len(rivals) > 1:
        parts.append(_print_rows(rivals))
    if result.get("host"):
        header = ["host us per call", "shape", "direction", "ours", "eager", "native"]
        host = [header]
        for line in result["host"]:
            shape = "{}x{}".format(*line["shape"])
            cells = [_number(line.get(name, {}).get("median")) for name in ("ours", "eager", "native")]
            host.append([line["operator"], shape, line["direction"], *cells])
        parts.append(_print_rows(host))
    errors = {
        f"{line['operator']} {line['rows']}x{line['cols']} {line['dtype']} {line['direction']} {name}: "
        + v["error"]
        for line in result["operators"]
        for name, v in line["variants"].items()
        if "error" in v
    }
    parts += sorted(errors) + [f"not measured: {what}" for what in result.get("skipped", [])]
    return "\n\n".join(parts) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Copy time over time at the largest shapes: 1 is the speed of memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = {line["operator"]: 0 for line in result["operators"]}
    for line in result["operators"]:
        sizes[line["operator"]] = max(sizes[line["operator"]], line["rows"] * line["cols"])
    lines = [line for line in result["operators"] if line["rows"] * line["cols"] == sizes[line["operator"]]]
    names = ["ours", "compile", "eager"]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.34 * len(lines)), layout="constrained")
    names = [name for name in names if any(time_of(line, name) for line in lines)]
    for offset, name in enumerate(names):
        values = []
        for line in lines:
            own, copy = time_of(line, name), time_of(line, "copy")
            values.append(copy / own if own and copy else 0.0)
        positions = [i + 0.27 * (offset - 1) for i in range(len(lines))]
        axes.barh(positions, values, height=0.25, label=name)
    labels = [f"{x['operator']} {x['rows']}x{x['cols']} {x['dtype']} {x['direction']}" for x in lines]
    axes.set_yticks(range(len(lines)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of a copy of the fewest bytes / time")
    axes.set_title(result["machine"], fontsize=9)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next(
            line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    wanted = [op for op in operators() if not arguments.operators or op.name in arguments.operators]
    dtypes = [torch.float32, torch.bfloat16]
    if arguments.quick and device.type == "cpu":
        dtypes = dtypes[:1]
    result: dict[str, Any] = {
        "machine": machine(device),
        "torch": torch.__version__,
        "command": " ".join(["python -m bench.operators", *sys.argv[1:]]),
        "operators": [],
        "skipped": [],
    }
    if device.type == "cuda":
        result["host"] = host_times(device)
    # In the order of importance: a shape of every operator, then the next; float32 first.
    jobs = [
        (op, op.shapes[i], dtype)
        for i in range(max(len(op.shapes) for op in wanted))
        for dtype in dtypes
        for op in wanted
        if i < len(op.shapes) and (not arguments.quick or op.shapes[i] in QUICK[device.type])
    ]
    for op, shape, dtype in jobs:
        label = f"{op.name} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
        used = time.perf_counter() - start
        if used > arguments.budget:
            result["skipped"].append(label)
            continue
        # Compiling takes most of the time: given up first.
        compile = arguments.compile and shape in COMPILED and used < 0.7 * arguments.budget
        try:
            result["operators"] += bench(op, shape, dtype, device, seconds=arguments.seconds, compile=compile)
        except Exception as error:  # out of memory, say: the rest can still be measured
            result["skipped"].append(f"{label} ({type(error).__name__}: {error})"[:300])
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{time.perf_counter() - start:6.1f} s  {label}", file=sys.stderr, flush=True)
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
    parser.add_argument("--operators", nargs="*", help="only these")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--out", type=Path, help="a folder for operators.json, operators.txt and operators.png"
    )
    arguments = parser.parse_args(argv)
    if arguments.seconds is None:
        arguments.seconds = 0.06 if arguments.device.startswith("cuda") else 1.0
    result = run(arguments)
    text = table(result)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "operators.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "operators.txt").write_text(text, encoding="utf-8")
        if result["operators"]:
            plot(result, arguments.out / "operators.png")


if __name__ == "__main__":
    main()
