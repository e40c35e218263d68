"""One element at a time, over every value of the half-precision types and every exponent of float32: the
worst error against float64 is a few units in the last place; where the result itself cancels, at most twice
that of plain PyTorch.

The sweeps are those of bench/accuracy.py; `python -m bench.accuracy` prints all their numbers.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # at the end: the installed vae_fast stays first

from bench import accuracy

COUNT = 2**18  # of float32 values: all 510 signs and exponents, 514 fractions each
FEW = 4  # ulps: three roundings, and a function that is right to one or two
CANCELS = {  # differences of nearly equal numbers at some of these inputs, already as the paper writes them
    ("Bernoulli, x = 1/2, all logits", "gradient"),  # x - y
    ("KL, mu = 0, all logvar", "KL"),  # exp(logvar) - 1 - logvar
    ("sample, mu = 1, all logvar", "z"),  # mu + sigma eps
    ("Gaussian, x - mean = 1/2, all logvar", "gradient in logvar"),  # (x - mean)^2 / variance - 1
    ("Gaussian, logvar = 0, x = 1/2, all means", "gradient in logvar"),
}


@pytest.mark.parametrize("name", accuracy.SWEEPS)
def test_worst_error_is_a_few_ulps_or_at_most_twice_that_of_plain_pytorch(name, dtype, device):
    for quantity, line in accuracy.judge(accuracy.SWEEPS[name], dtype, device, COUNT).items():
        ours, plain = (
            math.inf if side["worst"] is None else side["worst"] for side in (line["ours"], line["plain"])
        )
        allowed = max(FEW, 2 * plain) if (name, quantity) in CANCELS else FEW
        said = f"{quantity}: {ours:.3g} ulp at {line['ours']['at']}; PyTorch {plain:.3g}"
        assert ours <= allowed, said


def test_the_sweep_holds_every_finite_half_and_every_exponent_of_float32(dtype):
    values = accuracy.values(dtype, COUNT)
    assert values.isfinite().all()
    if dtype == torch.float32:
        bits = values.view(torch.int32)
        assert len(bits) >= COUNT - 510 and len(torch.unique(bits >> 23)) == 510
    else:
        infinite = 2 * 2 ** (7 if dtype == torch.bfloat16 else 10)  # of all 2**16, with NaN
        assert len(torch.unique(values.view(torch.int16))) == 2**16 - infinite


def test_an_ulp_is_that_of_the_results_type():
    one = torch.tensor([1.0], dtype=torch.float64)
    for dtype, digits in ((torch.float32, 23), (torch.bfloat16, 7), (torch.float16, 10)):
        next_up = torch.tensor([1 + 2.0**-digits], dtype=dtype)
        assert accuracy.ulps(next_up, one).item() == 1
        assert accuracy.ulps(torch.tensor([math.nan], dtype=dtype), one).item() == math.inf
        tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the smallest denormal number
        assert accuracy.ulps(torch.tensor([0.0], dtype=dtype), one * tiny).item() == 1
        assert (
            accuracy.ulps(torch.tensor([math.inf], dtype=dtype), torch.tensor([1e300]).double()).item() == 0
        )
