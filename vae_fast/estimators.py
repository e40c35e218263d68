"""Estimators of the variational bound and its gradient, and the seeds that make their noise a function of the
step.

An estimator is a function ``estimator(model, x, seed, num_samples, beta, ops) -> Estimate``. ``objective`` is
what a trainer ascends: its gradient estimates the gradient of the bound, and so does its value except for the
    score function's.
``log_likelihood`` and ``kl`` always estimate the two terms of the bound. All are per datapoint, in nats;
``ops`` is :mod:`vae_fast.functional` or :mod:`vae_fast.reference`.

Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114 (equation numbers below).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

_MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of splitmix64
_STREAM = 0xD1B54A32D192ED03

# Every use of randomness has a stream of its own, so that no two ever share a seed.
NOISE, ORDER, BINARISE, MODULES, EVALUATE, EVALUATE_BINARISE = range(6)
CHAIN, EVALUATE_CHAIN, EVALUATE_IMPORTANCE = range(16, 19)


def splitmix64(state: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA 2014): a bijection that scrambles 64 bits."""
    state &= _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def step_seed(seed: int, step: int, stream: int = NOISE) -> int:
    """The seed of training step ``step``: splitmix64(seed + (step + 1) * GOLDEN + stream *
    0xD1B54A32D192ED03).

    All arithmetic is modulo 2**64; the result is the signed int64 that holds those bits, so that it fits a
    tensor.
    """
    mixed = splitmix64(seed + (step + 1) * GOLDEN + stream * _STREAM)
    return mixed - 2**64 if mixed >= 2**63 else mixed


class Estimate(NamedTuple):
    """What an estimator returns for B datapoints; each ``[B]``."""

    objective: Tensor
    log_likelihood: Tensor
    kl: Tensor


Estimator = Callable[[Any, Tensor, "int | Tensor", int, float, ModuleType], Estimate]


def log_likelihood(model: Any, decoded: Tensor | tuple[Tensor, Tensor], x: Tensor, ops: ModuleType) -> Tensor:
    """log p(x|z) by the model's likelihood, with the operators of ``ops``; ``[..., B]``."""
    if model.likelihood == "bernoulli":
        result: Tensor = ops.bernoulli_log_likelihood(decoded, x)
    else:
        mean, logvar = decoded
        result = ops.gaussian_log_likelihood(mean, logvar, x)
    return result


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, diag(exp(logvar))), summed over the last dimension."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 * (-logvar).exp()).sum(dim=-1)


def log_prior(z: Tensor) -> Tensor:
    """log p(z) = log N(z; 0, I), summed over the last dimension."""
    return -0.5 * (math.log(2 * math.pi) + z**2).sum(dim=-1)


def sgvb_b(
    model: Any, x: Tensor, seed: int | Tensor, num_samples: int, beta: float, ops: ModuleType
) -> Estimate:
    """-beta KL(q(z|x) || p(z)) + 1/L sum_l log p(x|z_l), z_l = mu + sigma * eps_l (equations 7 and 10)."""
    mu, logvar = model.encoder(x)
    z, kl = ops.reparameterize_with_kl(mu, logvar, num_samples=_leading(num_samples), seed=seed)
    likelihood = _average(log_likelihood(model, model.decoder(z), x, ops), num_samples)
    return Estimate(likelihood - beta * kl, likelihood, kl)


def sgvb_a(
    model: Any, x: Tensor, seed: int | Tensor, num_samples: int, beta: float, ops: ModuleType
) -> Estimate:
    """1/L sum_l [log p(x|z_l) + beta (log p(z_l) - log q(z_l|x))], z_l = mu + sigma * eps_l (equation 6).

    ``kl`` is 1/L sum_l [log q(z_l|x) - log p(z_l)]: unbiased, and negative now and then.
    """
    mu, logvar = model.encoder(x)
    z = ops.reparameterize(mu, logvar, num_samples=_leading(num_samples), seed=seed)
    likelihood = _average(log_likelihood(model, model.decoder(z), x, ops), num_samples)
    kl = _average(log_normal(z, mu, logvar) - log_prior(z), num_samples)
    return Estimate(likelihood - beta * kl, likelihood, kl)


def score_function(
    model: Any, x: Tensor, seed: int | Tensor, num_samples: int, beta: float, ops: ModuleType
) -> Estimate:
    """The naive Monte Carlo gradient of section 2.2: 1/L sum_l f(z_l) grad log q(z_l|x), with z_l held fixed.

    f(z) = log p(x|z) + beta (log p(z) - log q(z|x)). The objective is a surrogate,
    1/L sum_l [log p(x|z_l) + constant(f(z_l)) log q(z_l|x)]: its gradient is the estimator's (for the
    decoder, the usual one), its value means nothing. No baseline is subtracted.
    """
    mu, logvar = model.encoder(x)
    z = ops.reparameterize(mu.detach(), logvar.detach(), num_samples=_leading(num_samples), seed=seed)
    likelihood = log_likelihood(model, model.decoder(z), x, ops)
    log_q = log_normal(z, mu, logvar)
    kl = (log_q - log_prior(z)).detach()
    f = likelihood.detach() - beta * kl
    surrogate = likelihood + f * log_q
    return Estimate(*(_average(term, num_samples) for term in (surrogate, likelihood, kl)))


ESTIMATORS: Mapping[str, Estimator] = {"sgvb_b": sgvb_b, "sgvb_a": sgvb_a, "score_function": score_function}


def weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a prior on the weights covers: those of two or more dimensions, so no biases."""
    return [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]


def _leading(num_samples: int) -> int | None:
    """One sample needs no sample dimension; its noise is the same with and without."""
    return None if num_samples == 1 else num_samples


def _average(per_sample: Tensor, num_samples: int) -> Tensor:
    return per_sample if num_samples == 1 else per_sample.mean(dim=0)
