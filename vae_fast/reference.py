"""The operators of vae_fast in plain PyTorch, written as the paper writes them.

This module is the oracle of the tests and the baseline of the benchmarks. It has the public names and
signatures of :mod:`vae_fast.functional` and imports nothing of ours.

Sources: Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114 (equation numbers below);
Salmon, Moraes, Dror & Shaw, *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011 (Philox4x32-10).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor


class ELBO(NamedTuple):
    """The variational bound and its two terms, in nats: ``elbo = log_likelihood - beta * kl``."""

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor


def reduce(per_datapoint: Tensor, reduction: str) -> Tensor:
    """Reduce over datapoints; the sum over features has been taken before and is never averaged."""
    if reduction == "none":
        return per_datapoint
    if reduction == "mean":
        return per_datapoint.mean()
    if reduction == "sum":
        return per_datapoint.sum()
    raise ValueError(f'reduction: got {reduction!r}, wanted "none", "mean" or "sum" (over datapoints)')


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed and accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- noise
# -----------------------------------------------------------------------------------------------------------

_MASK32 = 0xFFFFFFFF


def philox4x32(counter: Tensor, seed: int | Tensor, rounds: int = 10) -> Tensor:
    """Philox4x32: four 32-bit words for every 64-bit counter, as int64 values in [0, 2**32).

    counter: int64 ``[n]``, used as the counter words (low, high, 0, 0). seed: the 64-bit key. Returns ``[n,
    4]``.
    """
    key = seed if isinstance(seed, Tensor) else torch.tensor(signed64(seed))
    key = key.to(counter.device).reshape(())
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(rounds):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2**64: every bit is right
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def signed64(seed: int) -> int:
    """The 64 low bits of an integer, as the int64 that holds them."""
    return ((integer("seed", seed) + 2**63) % 2**64) - 2**63


def integer(name: str, value: SupportsIndex) -> int:
    """As a Python int, which does not overflow; NumPy's integers are some, 1.0 is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, wanted an integer") from None


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise that is a pure function of (seed, element index in row-major order).

    Element i comes from lane i mod 4 of Philox counter i div 4. Lanes 0, 1 and lanes 2, 3 are Box-Muller
    pairs (w, w'): u = (w + 1/2) / 2**32 in (0, 1), angle = pi * int32(w') / 2**31, and the pair of normals is
    sqrt(-2 ln u) * (cos angle, sin angle). Computed in float64 here and rounded once.
    """
    count = math.prod(shape)
    words = philox4x32(torch.arange((count + 3) // 4, device=device), seed)
    radius_word, angle_word = words[:, 0::2].double(), words[:, 1::2]
    radius = torch.sqrt(-2 * torch.log((radius_word + 0.5) / 2**32))
    signed_word = torch.where(angle_word >= 2**31, angle_word - 2**32, angle_word).double()
    # Adding an exact multiple of a quarter turn outside cos and sin keeps them accurate near their zeros.
    quarter = torch.round(signed_word / 2**30)
    rest = (signed_word / 2**30 - quarter) * (math.pi / 2)
    c, s = torch.cos(rest), torch.sin(rest)
    quadrant = quarter.long() & 3
    cos = torch.where(quadrant == 0, c, torch.where(quadrant == 1, -s, torch.where(quadrant == 2, -c, s)))
    sin = torch.where(quadrant == 0, s, torch.where(quadrant == 1, c, torch.where(quadrant == 2, -s, -c)))
    normals = torch.stack((radius * cos, radius * sin), dim=-1)
    return normals.reshape(-1)[:count].reshape(tuple(shape)).to(dtype)


# --- the estimator's terms
# -------------------------------------------------------------------------------------------


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """z = mu + exp(logvar / 2) * eps, eps ~ N(0, I) (equation 4, section 2.4)."""
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=mu.device, generator=generator)
    shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
    eps = philox_normal(shape, seed=seed, dtype=loss_dtype(mu.dtype), device=mu.device)
    compute = eps.dtype
    return (mu.to(compute) + torch.exp(0.5 * logvar.to(compute)) * eps).to(mu.dtype)


def gaussian_kl(mu: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) = -1/2 sum_j (1 + logvar_j - mu_j^2 - exp(logvar_j)), equation 10."""
    mu, logvar = mu.to(loss_dtype(mu.dtype)), logvar.to(loss_dtype(logvar.dtype))
    return reduce(-0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar), dim=-1), reduction)


def reparameterize_with_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """``(reparameterize(mu, logvar, ...), gaussian_kl(mu, logvar))``."""
    z = reparameterize(mu, logvar, num_samples=num_samples, seed=seed, generator=generator)
    return z, gaussian_kl(mu, logvar)


def bernoulli_log_likelihood(
    logits: Tensor, x: Tensor, *, reduction: str = "none", packed: bool = False
) -> Tensor:
    """log p(x|z) = sum_i x_i log y_i + (1 - x_i) log(1 - y_i), y = sigmoid(logits) (equation 11).

    packed: bit j of byte k of x is feature 8 k + j.
    """
    dtype = loss_dtype(logits.dtype)
    if packed:
        bits = (x.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1
        x = bits.flatten(-2)[..., : logits.shape[-1]]
    nll = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.to(dtype), x.to(dtype).expand(logits.shape), reduction="none"
    )
    return reduce(-nll.sum(dim=-1), reduction)


def linear_bernoulli_log_likelihood(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, *, reduction: str = "none"
) -> Tensor:
    """log p(x|z) of equation 11 from the last hidden layer, logits = h weight^T + bias."""
    return bernoulli_log_likelihood(torch.nn.functional.linear(h, weight, bias), x, reduction=reduction)


def gaussian_log_likelihood(mean: Tensor, logvar: Tensor, x: Tensor, *, reduction: str = "none") -> Tensor:
    """log p(x|z) = -1/2 sum_i (log 2 pi + logvar_i + (x_i - mean_i)^2 / exp(logvar_i)) (equation 12)."""
    dtype = loss_dtype(mean.dtype)
    mean, logvar, x = mean.to(dtype), logvar.to(dtype), x.to(dtype)
    return reduce(
        -0.5 * torch.sum(math.log(2 * math.pi) + logvar + (x - mean) ** 2 / logvar.exp(), -1), reduction
    )


def elbo(
    logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, *, beta: float = 1.0, reduction: str = "mean"
) -> ELBO:
    """SGVB-B: log p(x|z) averaged over latent samples, minus beta times the KL (equations 7, 10)."""
    kl = gaussian_kl(mu, logvar)
    log_likelihood = average_samples(bernoulli_log_likelihood(logits, x), kl.dim())
    terms = (log_likelihood - beta * kl, log_likelihood, kl)
    return ELBO(*(reduce(term, reduction) for term in terms))


def average_samples(per_sample: Tensor, datapoint_dims: int) -> Tensor:
    """1/L sum_l over the leading sample dimensions: all but the last ``datapoint_dims``."""
    extra = per_sample.dim() - datapoint_dims
    return per_sample.mean(dim=tuple(range(extra))) if extra > 0 else per_sample
