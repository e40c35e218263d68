"""The worst error of every operator against float64, in units in the last place, beside plain PyTorch's.

python -m bench.accuracy [--device cpu|cuda] [--count N]

One element per row, so that nothing averages out. bfloat16 and float16: every finite value there is.
float32: every sign and exponent, each with as many random fractions, so magnitudes are log-uniform. Where a
quantity has several inputs one of them is swept and the others are held. The worst error is taken where the
operators promise their digits: logits of any size, |logvar| <= 80, |mean| <= 1e18; outside, where a float
overflows on the way to a result that does not, it stands apart. An ulp is that of the result's own type
(losses of half-precision inputs are float32), at the exact value; below the smallest normal number it is the
smallest denormal one. The float64 formulas are written so that nothing cancels in them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vae_fast import functional, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNT = 2**20  # of float32 values
SEED = 7  # of the noise and of the fractions

Results = dict[str, Tensor]  # quantity to values [n]


@dataclass(frozen=True)
class Sweep:
    """One operator over all values v of a type: its name, what the columns of its inputs are, and the truth.

    inputs: from v ``[n]`` the inputs ``[n]`` that take a gradient, then the others, all in the type of v.
    fused, plain: the operator of ours and of plain PyTorch, on inputs ``[n, 1]``.
    exact: from the same in float64, everything that results: outputs under their names, then the gradients
        of the sum of the outputs.
    promised: from the same, where the operator promises its digits.
    """

    function: str
    inputs: Callable[[Tensor], list[Tensor]]
    gradients: int
    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    exact: Callable[..., Results]
    promised: Callable[..., Tensor]


def values(dtype: torch.dtype, count: int = COUNT) -> Tensor:
    """Every finite value of a half-precision type; of float32 about ``count``, of every sign and exponent."""
    if dtype != torch.float32:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        return every[every.isfinite()]
    exponents = torch.arange(0, 255, dtype=torch.int64).repeat_interleave(max(1, count // 510)).repeat(2)
    fractions = torch.randint(2**23, exponents.shape, generator=torch.Generator().manual_seed(SEED))
    signs = torch.arange(2, dtype=torch.int64).repeat_interleave(len(exponents) // 2)
    bits = (signs << 31) | (exponents << 23) | fractions
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)


def ulps(result: Tensor, exact: Tensor) -> Tensor:
    """|result - exact| in units in the last place of the result's type, at the float64 value ``exact``.

    Beyond the largest finite number both count as the power of two after it: an overflow where there should
    be none is an error of some ulps at the edge, and a huge one elsewhere. NaN is infinitely wrong.
    """
    info = torch.finfo(result.dtype)
    limit = 2.0 ** (math.frexp(info.max)[1])
    exact, found = exact.clamp(-limit, limit), result.double().clamp(-limit, limit)
    exponent = torch.frexp(exact.abs().clamp(info.tiny, info.max)).exponent - 1
    unit = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    return ((found - exact).abs() / unit).nan_to_num(nan=math.inf)


# --- float64, without cancellation --------------------------------------------------------------------------


def _exact_bernoulli(logits: Tensor, x: Tensor) -> Results:
    tail = torch.exp(-logits.abs())
    value = torch.where(logits > 0, (x - 1) * logits, x * logits) - torch.log1p(tail)
    # x - y; around y = 1/2 by the hyperbolic tangent, else by the tail that remains
    certain = torch.where(logits > 0, (x - 1) + tail / (1 + tail), x - tail / (1 + tail))
    gradient = torch.where(x == 0.5, -0.5 * torch.tanh(0.5 * logits), certain)
    return {"log-likelihood": value, "gradient": gradient}


def _expm1_less(v: Tensor) -> Tensor:
    """expm1(v) - v, by its series where that would cancel."""
    series = torch.ones_like(v)
    for k in range(14, 2, -1):
        series = 1 + v / k * series
    return torch.where(v.abs() < 0.5, 0.5 * v * v * series, torch.expm1(v) - v)


def _exact_kl(mu: Tensor, logvar: Tensor) -> Results:
    value = 0.5 * (mu * mu + _expm1_less(logvar))
    return {"KL": value, "gradient in mu": mu, "gradient in logvar": 0.5 * torch.expm1(logvar)}


def _noise(like: Tensor) -> Tensor:
    """The noise of the operator, which the judge takes as given."""
    return functional.philox_normal(like.shape, seed=SEED, device=like.device)


def _exact_sample(mu: Tensor, logvar: Tensor) -> Results:
    noise = torch.exp(0.5 * logvar) * _noise(mu).double()
    return {"z": mu + noise, "gradient in mu": torch.ones_like(mu), "gradient in logvar": 0.5 * noise}


def _plain_sample(mu: Tensor, logvar: Tensor) -> Tensor:
    dtype = reference.loss_dtype(mu.dtype)
    return (mu.to(dtype) + torch.exp(0.5 * logvar.to(dtype)) * _noise(mu)).to(mu.dtype)


def _exact_gaussian(mean: Tensor, logvar: Tensor, x: Tensor) -> Results:
    precision = torch.exp(-logvar)
    residual = x - mean
    # 0 inf is 0 here: a certain and right prediction
    scaled = torch.where(residual == 0, residual, residual * precision)
    square = torch.where(residual == 0, residual, residual * scaled)
    return {
        "log-likelihood": -0.5 * (math.log(2 * math.pi) + logvar + square),
        "gradient in mean": scaled,
        "gradient in logvar": 0.5 * (square - 1),
    }


# --- what is swept ------------------------------------------------------------------------------------------


def _bernoulli(name: str, targets: Sequence[float]) -> tuple[str, Sweep]:
    def inputs(v: Tensor) -> list[Tensor]:
        return [v.repeat(len(targets)), torch.tensor(targets, dtype=v.dtype).repeat_interleave(len(v))]

    return name, Sweep(
        "bernoulli_log_likelihood",
        inputs,
        1,
        functional.bernoulli_log_likelihood,
        reference.bernoulli_log_likelihood,
        _exact_bernoulli,
        lambda logits, x: logits.isfinite(),
    )


def _kl(name: str, mu: float) -> tuple[str, Sweep]:
    return name, Sweep(
        "gaussian_kl",
        lambda v: [torch.full_like(v, mu), v],
        2,
        functional.gaussian_kl,
        reference.gaussian_kl,
        _exact_kl,
        lambda mu, logvar: logvar.abs() <= 80,
    )


def _sample(name: str, mu: float) -> tuple[str, Sweep]:
    return name, Sweep(
        "reparameterize",
        lambda v: [torch.full_like(v, mu), v],
        2,
        lambda mu, logvar: functional.reparameterize(mu, logvar, seed=SEED),
        _plain_sample,
        _exact_sample,
        lambda mu, logvar: logvar.abs() <= 80,
    )


def _gaussian(name: str, inputs: Callable[[Tensor], list[Tensor]]) -> tuple[str, Sweep]:
    return name, Sweep(
        "gaussian_log_likelihood",
        inputs,
        2,
        functional.gaussian_log_likelihood,
        reference.gaussian_log_likelihood,
        _exact_gaussian,
        lambda mean, logvar, x: (logvar.abs() <= 80) & (mean.abs() <= 1e18),
    )


SWEEPS: dict[str, Sweep] = dict(
    [
        _bernoulli("Bernoulli, x = 0 and 1, all logits", [0.0, 1.0]),
        _bernoulli("Bernoulli, x = 1/2, all logits", [0.5]),
        _kl("KL, mu = 0, all logvar", 0.0),
        _kl("KL, mu = 1, all logvar", 1.0),
        _sample("sample, mu = 0, all logvar", 0.0),
        _sample("sample, mu = 1, all logvar", 1.0),
        _gaussian(
            "Gaussian, x - mean = 1/2, all logvar",
            lambda v: [torch.full_like(v, 0.25), v, torch.full_like(v, 0.75)],
        ),
        _gaussian(
            "Gaussian, logvar = 0, x = 1/2, all means",
            lambda v: [v, torch.zeros_like(v), torch.full_like(v, 0.5)],
        ),
    ]
)


def judge(
    sweep: Sweep, dtype: torch.dtype, device: torch.device | str, count: int = COUNT
) -> dict[str, dict[str, Any]]:
    """For every quantity of a sweep: how many inputs, and the worst error in ulps, ours and PyTorch's, with
    the inputs where it is; None for infinity."""
    inputs = [column.to(device).unsqueeze(1) for column in sweep.inputs(values(dtype, count))]
    exact = {name: t.reshape(-1) for name, t in sweep.exact(*(t.double() for t in inputs)).items()}
    promised = sweep.promised(*(t.double() for t in inputs)).reshape(-1)
    lines: dict[str, dict[str, Any]] = {name: {"count": len(inputs[0])} for name in exact}
    for side, call in {"ours": sweep.fused, "plain": sweep.plain}.items():
        leaves = [t.clone().requires_grad_(i < sweep.gradients) for i, t in enumerate(inputs)]
        output = call(*leaves)
        gradients = torch.autograd.grad(output.sum(), leaves[: sweep.gradients])
        for name, found in zip(exact, (output, *gradients), strict=True):
            error = ulps(found.detach().reshape(-1), exact[name])
            worst, at = _worst(error, promised)
            lines[name][side] = {"worst": worst, "at": ", ".join(f"{float(t[at]):.9g}" for t in inputs)}
            if not promised.all():
                lines[name][side]["outside"] = _worst(error, ~promised)[0]
    return lines


def _worst(error: Tensor, where: Tensor) -> tuple[float | None, int]:
    """The largest error there, None for infinity, and its index."""
    at = int(torch.where(where, error, -1).argmax())
    return (float(error[at]) if error[at].isfinite() else None), at


def run(device: torch.device, *, only: Sequence[str] = (), count: int = COUNT) -> list[dict[str, Any]]:
    """A line per quantity and type, of all functions or only of these, ready for JSON."""
    return [
        {"quantity": f"{name}: {quantity}", "dtype": str(dtype).removeprefix("torch."), **line}
        for name, sweep in SWEEPS.items()
        if not only or sweep.function in only
        for dtype in DTYPES
        for quantity, line in judge(sweep, dtype, device, count).items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    from . import report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=COUNT, help="of float32 values")
    arguments = parser.parse_args(argv)
    lines = run(torch.device(arguments.device), count=arguments.count)
    print(report.aligned(report.accuracy_rows({"accuracy": lines})))


if __name__ == "__main__":
    main()
