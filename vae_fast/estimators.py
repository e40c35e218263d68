"""Estimators of the variational bound and its gradient, and the seeds that make their noise a function of the
step.

An estimator is a function ``estimator(model, x, seed, num_samples, beta, ops, **state) -> Estimate``.
``objective`` is what a trainer ascends: its gradient estimates the gradient of the bound, and so does its
value except for the score function's. ``log_likelihood`` and ``kl`` always estimate the two terms of the
bound. All are per datapoint, in nats; ``ops`` is :mod:`vae_fast.functional` or :mod:`vae_fast.reference`.
``state`` is what :func:`initial_state` gave: tensors that the estimator updates in place, part of the state
of a training.

Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114 (equation numbers below).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .distributions import log_normal as log_normal  # of use to algorithms that call no estimator
from .distributions import posterior_of
from .reference import integer

RUNNING_DECAY = 0.9  # of the running baseline, per step: it looks back over about ten minibatches

_MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of splitmix64
_STREAM = 0xD1B54A32D192ED03

# Every use of randomness has a stream of its own, so that no two ever share a seed.
NOISE, ORDER, BINARISE, MODULES, EVALUATE, EVALUATE_BINARISE = range(6)
CHAIN, EVALUATE_CHAIN, EVALUATE_IMPORTANCE = range(16, 19)


Words = TypeVar("Words", int, NDArray[np.uint64])


def splitmix64(state: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA 2014): a bijection that scrambles 64 bits; of
    one word or of many.
    """
    word: Any = state
    word = word & _MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    scrambled: Words = word ^ (word >> 31)
    return scrambled


def step_seed(seed: int, step: int, stream: int = NOISE) -> int:
    """The seed of training step ``step``: splitmix64(seed + (step + 1) * GOLDEN + stream *
    0xD1B54A32D192ED03).

    All arithmetic is modulo 2**64; the result is the signed int64 that holds those bits, so that it fits a
    tensor.
    """
    return int(step_seeds(seed, step, 1, stream)[0, 0])


def step_seeds(seed: int, first_step: int, n_steps: int, *streams: int) -> NDArray[np.int64]:
    """:func:`step_seed` of consecutive steps, ``[n_steps, len(streams)]``."""
    seed = integer("seed", seed)
    first = [(seed + (first_step + 1) * GOLDEN + stream * _STREAM) & _MASK64 for stream in streams]
    later = np.arange(n_steps, dtype=np.uint64) * np.uint64(GOLDEN)
    return splitmix64(np.array(first, dtype=np.uint64) + later[:, None]).view(np.int64)


class Estimate(NamedTuple):
    """What an estimator returns for B datapoints; each ``[B]``."""

    objective: Tensor
    log_likelihood: Tensor
    kl: Tensor


Estimator = Callable[..., Estimate]


def log_likelihood(model: Any, decoded: Tensor | tuple[Tensor, Tensor], x: Tensor, ops: ModuleType) -> Tensor:
    """log p(x|z) by the model's likelihood, with the operators of ``ops``; ``[..., B]``."""
    if model.likelihood == "bernoulli":
        result: Tensor = ops.bernoulli_log_likelihood(decoded, x)
    else:
        mean, logvar = decoded
        result = ops.gaussian_log_likelihood(mean, logvar, x)
    return result


def log_prior(z: Tensor) -> Tensor:
    """log p(z) = log N(z; 0, I), summed over the last dimension."""
    return -0.5 * (math.log(2 * math.pi) + z**2).sum(dim=-1)


def sgvb_b(
    model: Any, x: Tensor, seed: int | Tensor, num_samples: int, beta: float, ops: ModuleType
) -> Estimate:
    """-beta KL(q(z|x) || p(z)) + 1/L sum_l log p(x|z_l), z_l = g(eps_l) (equations 7 and 10).

    Raises:
        ValueError: the divergence of the model's posterior has no closed form.
    """
    check_estimator("sgvb_b", model)
    mu, logvar = model.encoder(x)
    z, kl = posterior_of(model).sample_with_kl(
        mu, logvar, num_samples=_leading(num_samples), seed=seed, ops=ops
    )
    likelihood = _average(log_likelihood(model, model.decoder(z), x, ops), num_samples)
    return Estimate(likelihood - beta * kl, likelihood, kl)


def sgvb_a(
    model: Any, x: Tensor, seed: int | Tensor, num_samples: int, beta: float, ops: ModuleType
) -> Estimate:
    """1/L sum_l [log p(x|z_l) + beta (log p(z_l) - log q(z_l|x))], z_l = g(eps_l) (equation 6).

    ``kl`` is 1/L sum_l [log q(z_l|x) - log p(z_l)]: unbiased, and negative now and then.
    """
    posterior = posterior_of(model)
    mu, logvar = model.encoder(x)
    z = posterior.sample(mu, logvar, num_samples=_leading(num_samples), seed=seed, ops=ops)
    likelihood = _average(log_likelihood(model, model.decoder(z), x, ops), num_samples)
    kl = _average(posterior.log_density(z, mu, logvar) - log_prior(z), num_samples)
    return Estimate(likelihood - beta * kl, likelihood, kl)


def score_function(
    model: Any, x: Tensor, seed: int | Tensor, num_samples: int, beta: float, ops: ModuleType
) -> Estimate:
    """The naive Monte Carlo gradient of section 2.2: 1/L sum_l f(z_l) grad log q(z_l|x), with z_l held fixed.

    f(z) = log p(x|z) + beta (log p(z) - log q(z|x)). The objective is a surrogate,
    1/L sum_l [log p(x|z_l) + constant(f(z_l)) log q(z_l|x)]: its gradient is the estimator's (for the
    decoder, the usual one), its value means nothing. No baseline is subtracted.
    """
    return _score_function(model, x, seed, num_samples, beta, ops, lambda f: 0.0)


def score_function_running(
    model: Any,
    x: Tensor,
    seed: int | Tensor,
    num_samples: int,
    beta: float,
    ops: ModuleType,
    *,
    baseline: Tensor,
) -> Estimate:
    """:func:`score_function` with f(z_l) - b for f(z_l), b a running mean of f over the steps before.

    No sample of this step is in b, so the gradient stays unbiased: E_q[grad log q(z|x)] = 0. ``baseline`` is
    the state, float64 ``[2]``: running means of f and of 1, both begun at 0 and multiplied by
    ``RUNNING_DECAY`` at each step. b is their ratio, and 0 in the first step.
    """

    def of(f: Tensor) -> Tensor:
        b = (baseline[0] / baseline[1].clamp_min(torch.finfo(torch.float64).tiny)).to(f.dtype)
        step = torch.stack((f.mean().to(baseline.dtype), torch.ones_like(baseline[1])))
        baseline.lerp_(step, 1 - RUNNING_DECAY)  # in place: a graph may hold its address
        return b

    return _score_function(model, x, seed, num_samples, beta, ops, of)


def score_function_leave_one_out(
    model: Any, x: Tensor, seed: int | Tensor, num_samples: int, beta: float, ops: ModuleType
) -> Estimate:
    """:func:`score_function` with f(z_l) - b_l for f(z_l), b_l the mean of f over the other samples.

    b_l = 1/(L-1) sum_{k != l} f(z_k) of the same datapoint: independent of z_l, so the gradient stays
    unbiased.

    Raises:
        ValueError: num_samples is below 2.

    Source: Mnih & Rezende, *Variational inference for Monte Carlo objectives*, arXiv:1602.06725; Kool, van
    Hoof & Welling, *Buy 4 REINFORCE samples, get a baseline for free!*, 2019.
    """
    check_num_samples("score_function_leave_one_out", num_samples)
    return _score_function(
        model, x, seed, num_samples, beta, ops, lambda f: (f.sum(dim=0) - f) / (num_samples - 1)
    )


def _score_function(
    model: Any,
    x: Tensor,
    seed: int | Tensor,
    num_samples: int,
    beta: float,
    ops: ModuleType,
    baseline: Callable[[Tensor], Tensor | float],
) -> Estimate:
    """1/L sum_l [log p(x|z_l) + constant(f_l - baseline(f)_l) log q(z_l|x)]; f is ``[L, B]``, or ``[B]``."""
    posterior = posterior_of(model)
    mu, logvar = model.encoder(x)
    with torch.no_grad():
        z = posterior.sample(mu, logvar, num_samples=_leading(num_samples), seed=seed, ops=ops)
    likelihood = log_likelihood(model, model.decoder(z), x, ops)
    log_q = posterior.log_density(z, mu, logvar)
    kl = (log_q - log_prior(z)).detach()
    f = likelihood.detach() - beta * kl
    surrogate = likelihood + (f - baseline(f)) * log_q
    return Estimate(*(_average(term, num_samples) for term in (surrogate, likelihood, kl)))


def iwae(
    model: Any, x: Tensor, seed: int | Tensor, num_samples: int, beta: float, ops: ModuleType
) -> Estimate:
    """The importance-weighted bound, log 1/L sum_l w_l with log w_l = log p(x|z_l) + beta (log p(z_l) -
    log q(z_l|x)) and z_l = g(eps_l): another objective than the others, between them and log p(x). With one
    sample it is SGVB-A's.

    Its gradient is sum_l w_l grad log w_l / sum_l w_l: the weights are what the logarithm's derivative makes
    them, and nothing is detached. ``log_likelihood`` is 1/L sum_l log p(x|z_l), and ``kl`` what the bound is
    below it, over beta.

    Source: Burda, Grosse & Salakhutdinov, *Importance Weighted Autoencoders*, arXiv:1509.00519, equations 8
    and 13.
    """
    posterior = posterior_of(model)
    mu, logvar = model.encoder(x)
    z = posterior.sample(mu, logvar, num_samples=num_samples, seed=seed, ops=ops)
    likelihood = log_likelihood(model, model.decoder(z), x, ops)
    log_ratio = log_prior(z) - posterior.log_density(z, mu, logvar)
    bound = torch.logsumexp(likelihood + beta * log_ratio, dim=0) - math.log(num_samples)
    average = likelihood.mean(dim=0)
    return Estimate(bound, average, (average - bound) / beta if beta else -log_ratio.mean(dim=0))


ESTIMATORS: Mapping[str, Estimator] = {
    "sgvb_b": sgvb_b,
    "sgvb_a": sgvb_a,
    "score_function": score_function,
    "score_function_running": score_function_running,
    "score_function_leave_one_out": score_function_leave_one_out,
    "iwae": iwae,
}


def initial_state(estimator: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The keyword arguments that hold an estimator's state before its first step: none, for most."""
    if estimator == "score_function_running":
        return {"baseline": torch.zeros(2, dtype=torch.float64, device=device)}
    return {}


def default_estimator(model: Any) -> str:
    """SGVB-B, which usually has the lower variance, where the divergence has a closed form; else SGVB-A."""
    return "sgvb_b" if posterior_of(model).closed_kl else "sgvb_a"


def check_estimator(estimator: str, model: Any) -> None:
    """Refuses an estimator that needs the closed form of a divergence that has none."""
    posterior = posterior_of(model)
    if estimator == "sgvb_b" and not posterior.closed_kl:
        raise ValueError(
            "estimator: got 'sgvb_b', wanted 'sgvb_a' or a score function: the divergence of a "
            f"{posterior.name} posterior from the prior has no closed form"
        )


def check_num_samples(estimator: str, num_samples: int) -> None:
    """Refuses a number of latent samples that is too small for the estimator of this name."""
    least = 2 if estimator == "score_function_leave_one_out" else 1
    if num_samples < least:
        raise ValueError(
            f"num_samples: got {num_samples}, wanted an integer of {least} or more "
            f"for estimator={estimator!r}"
        )


def weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a prior on the weights covers: those of two or more dimensions, so no biases."""
    return [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]


def _leading(num_samples: int) -> int | None:
    """One sample needs no sample dimension; its noise is the same with and without."""
    return None if num_samples == 1 else num_samples


def _average(per_sample: Tensor, num_samples: int) -> Tensor:
    return per_sample if num_samples == 1 else per_sample.mean(dim=0)
