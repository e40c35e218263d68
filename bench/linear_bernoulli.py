"""The last linear layer fused with the Bernoulli log-likelihood, against the two one after the other.

python -m bench.linear_bernoulli [--rows 5000] [--hidden 200] [--outputs 20000] [--dtype float32]
                                 [--device cpu] [--threads 2] [--seconds 60] [--out FILE]

Forward and backward, gradients of h, weight and bias. "none" weighs every row's log-likelihood, "sum" adds
them up. Times are those of timing.py, variants in turns; memory is the peak beyond inputs and gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .timing import Timing, Variant, measure, peak_memory

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    logits = F.linear(h, weight, bias)
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="sum")


def losses(compiled: bool) -> dict[str, Loss]:
    import vae_fast as vf

    def ours_none(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        rows = vf.linear_bernoulli_log_likelihood(h, weight, bias, x)
        return (rows * torch.ones_like(rows)).sum()  # an upstream gradient for every row

    def ours_sum(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return vf.linear_bernoulli_log_likelihood(h, weight, bias, x, reduction="sum")

    rivals: dict[str, Loss] = {"eager": eager}
    if compiled:
        rivals["compile"] = torch.compile(eager)
    return {"ours, sum": ours_sum, "ours, none": ours_none, **rivals}


def bench(
    rows: int,
    hidden: int,
    outputs: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    compiled: bool = True,
) -> dict[str, dict[str, object]]:
    """For every variant microseconds of forward + backward, and peak bytes beyond inputs and gradients."""
    h = torch.randn(rows, hidden, device=device).tanh().to(dtype).requires_grad_()
    weight = (torch.randn(outputs, hidden, device=device) / hidden**0.5).to(dtype).requires_grad_()
    bias = torch.zeros(outputs, device=device, dtype=dtype, requires_grad=True)
    x = (torch.rand(rows, outputs, device=device) < 0.1).to(dtype)
    leaves = (h, weight, bias)
    gradients = sum(t.numel() * t.element_size() for t in leaves)

    def both(loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(h, weight, bias, x), leaves)

    calls = {name: both(loss) for name, loss in losses(compiled).items()}
    variants = [Variant(name, lambda i: None, lambda _, call=call: call()) for name, call in calls.items()]
    timings = measure(variants, 1, device, seconds)
    report: dict[str, dict[str, object]] = {}
    for name, timing in timings.items():
        if isinstance(timing, Timing):
            report[name] = {**timing.to_dict(), "extra_bytes": peak_memory(calls[name], device) - gradients}
        else:
            report[name] = {"error": timing}
    return report


def table(report: dict[str, dict[str, object]]) -> str:
    lines = [f"{'':<12} {'ms':>9} {'10 %':>9} {'90 %':>9} {'extra MB':>9}"]
    for name, line in report.items():
        if "error" in line:
            lines.append(f"{name:<12} {line['error']}")
            continue
        times = " ".join(f"{float(str(line[key])) / 1e3:>9.2f}" for key in ("median", "low", "high"))
        lines.append(f"{name:<12} {times} {float(str(line['extra_bytes'])) / 1e6:>9.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--outputs", type=int, default=20000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    report = bench(
        arguments.rows,
        arguments.hidden,
        arguments.outputs,
        getattr(torch, arguments.dtype),
        torch.device(arguments.device),
        arguments.seconds,
    )
    print(table(report))
    if arguments.out:
        what = {name: value for name, value in vars(arguments).items() if name != "out"}
        arguments.out.write_text(
            json.dumps({"torch": torch.__version__, **what, "variants": report}, indent=1)
        )


if __name__ == "__main__":
    main()
