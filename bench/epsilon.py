"""How backward should come by eps of z = mu + sigma eps: make it again from the seed, store it, or take
sigma eps from z - mu.

python -m bench.epsilon [--device cpu|cuda] [--seconds S] [--out DIR]

Needs the sources and a C++ compiler (with a GPU nvcc too): the last two ways are epsilon.cpp and epsilon.cu,
as fused as ours, one pass each way. "recompute" is the package's own operator. Times are of the bare
operators, without autograd; the error is that of the gradient in logvar, grad_z sigma eps / 2, which alone
needs eps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_fast import functional
from vae_fast.report import write_atomically

from . import accuracy, machine, report
from .timing import Timing, Variant, buffer_sets, measure, peak_memory

SHAPES = [(4096, 128), (128, 20), (32768, 2048)]
SEED = 11


@dataclass(frozen=True)
class Way:
    """forward: (mu, logvar, seed) to (z, and what backward needs of it); backward: (grad_z, mu, logvar, seed,
    z, that) to both gradients. kept: bytes per element that live from the one to the other and are no input
    or output."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
    backward: Callable[..., tuple[Tensor, Tensor]]
    kept: int


def build(device: torch.device) -> Any:
    """torch.ops.vae_fast_epsilon, compiled for this processor, and with a GPU for that."""
    from torch.utils.cpp_extension import load

    sources = ["bench/epsilon.cpp"]
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    cuda = device.type == "cuda"
    if cuda:
        sources.append("bench/epsilon.cu")
        flags.append("-DVAE_FAST_WITH_CUDA")
    folder = machine.ROOT / "build/epsilon"
    folder.mkdir(parents=True, exist_ok=True)
    load(
        "vae_fast_epsilon",
        [str(machine.ROOT / source) for source in sources],
        extra_cflags=[*flags, "-Wno-maybe-uninitialized"],
        extra_cuda_cflags=["-O3"],
        extra_ldflags=["-fopenmp"],
        build_directory=str(folder),
        with_cuda=cuda,
        is_python_module=False,
    )
    return torch.ops.vae_fast_epsilon


def ways(ops: Any, dtype: torch.dtype) -> dict[str, Way]:
    ours = torch.ops.vae_fast

    def store(eps_dtype: torch.dtype) -> Way:
        return Way(
            lambda mu, logvar, seed: ops.store_forward(mu, logvar, seed, eps_dtype),
            lambda grad, mu, logvar, seed, z, eps: ops.store_backward(grad, logvar, eps),
            eps_dtype.itemsize,
        )

    def forward(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, None]:
        return ours.reparameterize_forward(mu, logvar, seed, None), None

    found = {
        "recompute": Way(
            forward,
            lambda grad, mu, logvar, seed, z, _: ours.reparameterize_backward(
                grad, logvar, seed, [True, True]
            ),
            0,
        ),
        "store": store(torch.float32),
        "z - mu": Way(forward, lambda grad, mu, logvar, seed, z, _: ops.difference_backward(grad, mu, z), 0),
    }
    if dtype != torch.float32:
        found["store, rounded"] = store(dtype)
    return found


def times(
    found: dict[str, Way], shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seconds: float
) -> dict[str, dict[str, Any]]:
    """Microseconds of forward, backward and both, and the peak memory of both, for every way."""
    seed = torch.tensor([SEED], device=device)
    sets = buffer_sets(3 * shape[0] * shape[1] * dtype.itemsize, device)
    inputs = [
        [torch.randn(shape, device=device, dtype=torch.float32).to(dtype) for _ in range(3)]
        for _ in range(sets)
    ]

    def variants(name: str, way: Way) -> dict[str, Variant]:
        def forward(i: int) -> tuple[Tensor, Tensor | None]:
            return way.forward(*inputs[i][:2], seed)

        def both(i: int) -> tuple[object, ...]:
            mu, logvar, grad = inputs[i]
            z, kept = forward(i)
            return z, way.backward(grad, mu, logvar, seed, z, kept)

        def backward(state: tuple[int, Tensor, Tensor | None]) -> object:
            i, z, kept = state
            mu, logvar, grad = inputs[i]
            return way.backward(grad, mu, logvar, seed, z, kept)

        return {
            "forward": Variant(name, lambda i: i, forward),
            "backward": Variant(name, lambda i: (i, *forward(i)), backward),
            "both": Variant(name, lambda i: i, both),
        }

    every = {name: variants(name, way) for name, way in found.items()}
    lines: dict[str, dict[str, Any]] = {name: {"kept": way.kept} for name, way in found.items()}
    for direction in ("forward", "backward", "both"):
        timed = measure([every[name][direction] for name in found], sets, device, seconds)
        for name, timing in timed.items():
            lines[name][direction] = timing.to_dict() if isinstance(timing, Timing) else {"error": timing}
    for name in found:
        lines[name]["peak_bytes"] = peak_memory(lambda run=every[name]["both"].run: run(0), device)
    return lines


def hard_inputs(count: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """mu and logvar ``[1, count]``."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(scale: float = 1.0) -> Tensor:
        return (scale * torch.randn((1, count), generator=generator)).to(dtype)

    return {
        "random": (normal(), normal()),
        "mu ~ 100, logvar = -10": (normal(100), torch.full((1, count), -10.0, dtype=dtype)),
        "logvar = -20": (normal(), torch.full((1, count), -20.0, dtype=dtype)),
        "logvar = 10": (normal(), torch.full((1, count), 10.0, dtype=dtype)),
    }


def errors(found: dict[str, Way], dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Any]]:
    """Of the gradient in logvar: the root mean square of the error over that of the gradient, and the median
    error in units in the last place."""
    seed = torch.tensor([SEED], device=device)
    lines: dict[str, dict[str, Any]] = {name: {} for name in found}
    for what, (mu, logvar) in hard_inputs(2**16, dtype).items():
        mu, logvar = mu.to(device), logvar.to(device)
        grad = torch.randn(mu.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
        eps = functional.philox_normal(mu.shape, seed=seed, device=device).double()
        exact = 0.5 * grad.double() * torch.exp(0.5 * logvar.double()) * eps
        for name, way in found.items():
            z, kept = way.forward(mu, logvar, seed)
            result = way.backward(grad, mu, logvar, seed, z, kept)[1]
            error = result.double() - exact
            lines[name][what] = {
                "relative": float(error.square().mean().sqrt() / exact.square().mean().sqrt()),
                "ulp": float(accuracy.ulps(result, exact).median()),
            }
    return lines


def run(
    device: torch.device, seconds: float, shapes: Sequence[tuple[int, int]], command: str
) -> dict[str, Any]:
    ops = build(device)
    result: dict[str, Any] = {**machine.describe(command), "machine": machine.name(device)}
    result |= {"times": [], "errors": []}
    for dtype in (torch.float32, torch.bfloat16):
        name, found = str(dtype).removeprefix("torch."), ways(ops, dtype)
        result["errors"].append({"dtype": name, "ways": errors(found, dtype, device)})
        for shape in shapes:
            if 16 * 4 * shape[0] * shape[1] > machine.free_bytes(device):
                continue
            lines = times(found, shape, dtype, device, seconds)
            result["times"].append({"dtype": name, "rows": shape[0], "cols": shape[1], "ways": lines})
    return result


def text(result: dict[str, Any]) -> str:
    speed = [["way", "shape", "dtype", "forward us", "backward us", "both us", "/recompute"]]
    speed[0] += ["kept B/element", "peak MB"]
    for case in result["times"]:
        ours = case["ways"]["recompute"]["both"].get("median")
        for name, line in case["ways"].items():
            medians = [line[direction].get("median") for direction in ("forward", "backward", "both")]
            cells = ["-" if median is None else f"{median:.1f}" for median in medians]
            ratio = f"{medians[2] / ours:.2f}" if ours and medians[2] else "-"
            shape = f"{case['rows']}x{case['cols']}"
            peak = f"{line['peak_bytes'] / 2**20:.2f}"
            speed.append([name, shape, case["dtype"], *cells, ratio, str(line["kept"]), peak])
    inputs = list(result["errors"][0]["ways"]["recompute"])
    wrong = [["relative error (median ulp)", "dtype", *inputs]]
    for case in result["errors"]:
        for name, line in case["ways"].items():
            cells = [f"{line[what]['relative']:.1e} ({line[what]['ulp']:.2g})" for what in inputs]
            wrong.append([name, case["dtype"], *cells])
    return f"{report.aligned(speed)}\n\n{report.aligned(wrong)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--seconds", type=float, default=0.5, help="per direction, shape and dtype")
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="how many, the last being the largest"
    )
    parser.add_argument("--out", type=Path, help="a folder for epsilon.json and epsilon.txt")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    command = " ".join(["python -m bench.epsilon", *(sys.argv[1:] if argv is None else argv)])
    result = run(device, arguments.seconds, SHAPES[: arguments.shapes], command)
    print(text(result))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.out / "epsilon.json", (json.dumps(result, indent=1) + "\n").encode())
        write_atomically(arguments.out / "epsilon.txt", text(result).encode())


if __name__ == "__main__":
    main()
