"""What a trained model is worth: the variational bound over a data set, and the latent variables in use.

Evaluation is deterministic. Its noise belongs to the datapoint: rows [100 b, 100 (b + 1)) use
``philox_normal((100, L, latent_dim), seed=step_seed(seed, b, EVALUATE))`` (a posterior other than the
Gaussian: its own noise of this shape and seed), so the batch size and the device change results by rounding
only, and other models see the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .batches import binarise, uniform_words
from .datasets import Prepared, prepare
from .distributions import Posterior, posterior_of
from .estimators import EVALUATE, EVALUATE_BINARISE, log_prior, step_seed

NOISE_ROWS = 100  # rows that share a seed


@dataclass(frozen=True)
class Bound:
    """Means over ``count`` datapoints, in nats: elbo = log_likelihood - kl, higher is better."""

    elbo: float
    log_likelihood: float
    kl: float
    count: int


@dataclass(frozen=True)
class ActiveUnits:
    """How many latent variables are in use, and Var_x(E_q[z]) of each, float64 ``[latent_dim]``."""

    count: int
    variance: Tensor


@torch.no_grad()
def bound(
    model: Any,
    data: Any,
    *,
    num_samples: int = 1,
    use_mean: bool = False,
    batch_size: int = 1000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> Bound:
    """The variational bound, averaged over datapoints: 1/L sum_l log p(x|z_l) - KL(q(z|x) || p(z)) (equation
    7); where the divergence has no closed form, 1/L sum_l [log q(z_l|x) - log p(z_l)] in its place (equation
    6).

    Args:
        model: a :class:`vae_fast.VAE`, or anything with its ``encoder``, ``decoder`` and ``log_likelihood``.
        data: an array or tensor ``[N, D]``, or what :func:`vae_fast.datasets.prepare` returned.
        num_samples: L, the draws of z per datapoint; each datapoint is encoded once however many.
        use_mean: put z = E_q[z], mu(x) of a Gaussian, in the place of draws: a score of reconstructions
            without noise, not a bound.
        batch_size: how many draws of z are decoded at a time. It changes the results by rounding only.
        seed: of the noise.
        targets, pixel_scale: how to read an array; see :func:`vae_fast.datasets.prepare`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples}, wanted an integer of 1 or more")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, wanted an integer of 1 or more")
    samples = 1 if use_mean else num_samples
    data = _prepared(model, data, targets, pixel_scale)
    posterior = posterior_of(model)
    totals: list[Tensor] = []
    with evaluating(model):
        for rows, x in _batches(model, data, max(1, batch_size // samples), seed):
            mu, logvar = model.encoder(x)
            if use_mean:
                z = posterior.mean(mu, logvar)
            else:
                eps = _by_row(rows, partial(_block_noise, posterior, seed, samples, mu)).transpose(0, 1)
                z = posterior.map(eps, mu, logvar)
            log_likelihood = functional.average_samples(model.log_likelihood(model.decoder(z), x), 1)
            if posterior.closed_kl:
                kl = posterior.kl(mu, logvar)
            else:
                kl = functional.average_samples(posterior.log_density(z, mu, logvar) - log_prior(z), 1)
            totals.append(torch.stack((log_likelihood.double().sum(), kl.double().sum())))
    log_likelihood_mean, kl_mean = (torch.stack(totals).sum(dim=0) / len(data)).tolist()
    return Bound(log_likelihood_mean - kl_mean, log_likelihood_mean, kl_mean, len(data))


@torch.no_grad()
def active_units(
    model: Any,
    data: Any,
    *,
    threshold: float = 0.01,
    batch_size: int = 1000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> ActiveUnits:
    """The latent variables z_j with Var_x(E_q[z_j]) > threshold (Burda, Grosse & Salakhutdinov,
    arXiv:1509.00519).

    E_q[z] = mu(x) of a Gaussian; the variance is over the N datapoints, divided by N. ``seed`` matters to
    targets="dynamic" only.
    """
    data = _prepared(model, data, targets, pixel_scale)
    with evaluating(model):
        means = [
            posterior_of(model).mean(*model.encoder(x)).double().cpu()
            for _, x in _batches(model, data, batch_size, seed)
        ]
    variance = torch.cat(means).var(dim=0, correction=0)
    return ActiveUnits(int((variance > threshold).sum()), variance)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then each of its modules as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _prepared(model: Any, data: Any, targets: str, pixel_scale: float) -> Prepared:
    if isinstance(data, Prepared):
        return data
    return prepare(data, likelihood=model.likelihood, targets=targets, pixel_scale=pixel_scale, name="data")


def _batches(model: Any, data: Prepared, size: int, seed: int) -> Iterator[tuple[range, Tensor]]:
    """Every datapoint once, the last minibatch too, with its rows."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    for first in range(0, len(data), size):
        rows = range(first, min(first + size, len(data)))
        x = data.batch(torch.arange(rows.start, rows.stop, device=data.values.device)).to(like)
        if data.kind == "dynamic":
            x = binarise(x, _by_row(rows, partial(_block_words, seed, x)))
        yield rows, x


def _by_row(rows: range, of_block: Callable[[int], Tensor]) -> Tensor:
    """These rows of the noise whose block b is ``of_block(b)``, ``[NOISE_ROWS, ...]``."""
    blocks = range(rows.start // NOISE_ROWS, (rows.stop - 1) // NOISE_ROWS + 1)
    noise = torch.cat([of_block(block) for block in blocks])
    skipped = blocks.start * NOISE_ROWS
    return noise[rows.start - skipped : rows.stop - skipped]


def _block_noise(posterior: Posterior, seed: int, samples: int, mu: Tensor, block: int) -> Tensor:
    shape = (NOISE_ROWS, samples, mu.shape[-1])
    return posterior.draw(shape, seed=step_seed(seed, block, EVALUATE), dtype=mu.dtype, device=mu.device)


def _block_words(seed: int, x: Tensor, block: int) -> Tensor:
    block_seed = torch.full((1,), step_seed(seed, block, EVALUATE_BINARISE), device=x.device)
    return uniform_words((NOISE_ROWS, x.shape[-1]), block_seed)
