"""What a trained model is of use for: recognition, denoising, representation, visualisation (section 1).

Data are what :func:`vae_fast.evaluation.bound` takes: an array or tensor ``[N, D]``, or what
:func:`vae_fast.datasets.prepare` returned. Results are on the model's device and carry no gradients; the
model is put into evaluation mode and then back.

Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114, sections 1 and 2.1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import functional
from .batches import uniform_words
from .datasets import prepare
from .distributions import posterior_of
from .evaluation import _batches, _prepared, evaluating

CORRUPTIONS = ("salt_and_pepper", "masking", "gaussian")


class Codes(NamedTuple):
    """The posterior q(z|x) of N datapoints, ``[N, latent_dim]`` each.

    ``mean`` is E_q[z]; ``mu`` and ``logvar`` are the encoder's outputs, location and 2 log(scale). Of a
    Gaussian mu is the mean and logvar the log-variance; of other families they are not.
    """

    mean: Tensor
    mu: Tensor
    logvar: Tensor


@torch.no_grad()
def encode(
    model: Any,
    data: Any,
    *,
    batch_size: int = 1000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> Codes:
    """Recognition and representation: the posterior of every datapoint, row by row.

    ``seed`` matters to targets="dynamic" only. Arguments otherwise as for
    :func:`vae_fast.evaluation.bound`.
    """
    data = _prepared(model, data, targets, pixel_scale)
    with evaluating(model):
        parts = [model.encoder(x) for _, x in _batches(model, data, batch_size, seed)]
    mu, logvar = (torch.cat(column) for column in zip(*parts, strict=True))
    return Codes(posterior_of(model).mean(mu, logvar), mu, logvar)


@torch.no_grad()
def reconstruct(
    model: Any,
    data: Any,
    *,
    batch_size: int = 1000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> Tensor:
    """E[x|z] at z = E_q[z] for every datapoint, ``[N, D]``; arguments as for :func:`encode`."""
    data = _prepared(model, data, targets, pixel_scale)
    with evaluating(model):
        return torch.cat([model.reconstruct(x) for _, x in _batches(model, data, batch_size, seed)])


def corrupt(x: Tensor, amount: float, *, kind: str = "salt_and_pepper", seed: int = 0) -> Tensor:
    """Noise on data: a pure function of (seed, element), on any device.

    Args:
        x: floating point, ``[..., D]``; pixels run from 0 to 1.
        amount: r. "salt_and_pepper" sets a share r of the values to 0 or 1, either as often as the other;
            "masking" sets a share r to 0; "gaussian" adds N(0, r**2), and nothing is clipped.

    Raises:
        ValueError: kind is another; amount is not positive, or not below 1 where it is a share.
    """
    _check_corruption(kind, amount)
    if kind == "gaussian":
        return x + amount * functional.philox_normal(x.shape, seed=seed, device=x.device).to(x.dtype)
    u = uniform_words(x.shape, torch.tensor([seed], device=x.device)).double() / 2**32
    noisy = torch.where(u < amount, torch.zeros_like(x), x)
    return noisy if kind == "masking" else torch.where(u < amount / 2, torch.ones_like(x), noisy)


def denoise(
    model: Any,
    data: Any,
    amount: float,
    *,
    kind: str = "salt_and_pepper",
    steps: int = 50,
    batch_size: int = 1000,
    pixel_scale: float = 255,
) -> Tensor:
    """E[x|z] of every datapoint, ``[N, D]``, at a z that the noisy x' tells, without its noise.

    The encoder's z = E_q[z] at x' comes first; ``steps=0`` leaves it at that. But an encoder that was trained
    on clean data takes noise for features, so z then ascends the log posterior of section 2.1's "approximate
    posterior inference", with the decoder as it is and the corruption c in the likelihood::

        log p(z) + log p(x'|z),    p(x'|z) = prod_d integral c(x'_d|x_d) p(x_d|z) dx_d

    With r = ``amount``: salt and pepper (1 - r) p(x'_d|z) + r/2 [x'_d is 0 or 1]; masking
    (1 - r) p(x'_d|z) + r [x'_d is 0]; a density p, of a Gaussian decoder, is nothing beside a point mass, so
    such x'_d then say nothing of z. Gaussian: N(x'_d; E[x_d|z], r**2), plus the decoder's variance if it is
    Gaussian itself.

    On 1000 test digits after ``vae-fast train``, mean squared error of the noisy images, the encoder alone,
    and 50 steps: salt and pepper 0.3: 0.144, 0.074, 0.021; masking 0.5: 0.052, 0.046, 0.025; Gaussian 0.3:
    0.090, 0.027, 0.018. Reconstructions of the clean images are at 0.019.

    Args:
        data: noisy; floats may lie outside [0, 1].
        amount, kind: of the noise, as for :func:`corrupt`; it need not be known exactly.
        steps: of Adam on z, step size 0.1 in units of the prior's standard deviation.

    Raises:
        ValueError: as :func:`corrupt`, or steps is negative.
        DataError: the data are not finite, or of another width.
    """
    _check_corruption(kind, amount)
    if steps < 0:
        raise ValueError(f"steps: got {steps}, wanted an integer of 0 or more")
    data = prepare(data, likelihood="gaussian", pixel_scale=pixel_scale, name="data", width=model.data_dim)
    with evaluating(model):
        parts = [_denoised(model, x, amount, kind, steps) for _, x in _batches(model, data, batch_size, 0)]
    return torch.cat(parts)


def _denoised(model: Any, x: Tensor, amount: float, kind: str, steps: int) -> Tensor:
    with torch.no_grad():
        z = posterior_of(model).mean(*model.encoder(x))
    z = z.detach().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(steps):
        with torch.enable_grad():
            likelihood = _noisy_log_likelihood(model, model.decoder(z), x, amount, kind)
            loss = 0.5 * z.square().sum() - likelihood.sum()
        (z.grad,) = torch.autograd.grad(loss, z)
        optimizer.step()
    with torch.no_grad():
        found: Tensor = model.decode_mean(z)
    return found


def _noisy_log_likelihood(model: Any, decoded: Any, x: Tensor, amount: float, kind: str) -> Tensor:
    """log p(x'_d|z) but for constants, elementwise; the formulas are those of :func:`denoise`."""
    bernoulli = model.likelihood == "bernoulli"
    if kind == "gaussian":
        mean = torch.sigmoid(decoded) if bernoulli else decoded[0]
        variance = amount**2 + (torch.zeros_like(mean) if bernoulli else decoded[1].exp())
        return -0.5 * ((x - mean).square() / variance + variance.log())
    replaced = (x == 0) | (x == 1) if kind == "salt_and_pepper" else x == 0
    if not bernoulli:
        mean, logvar = decoded
        return -0.5 * torch.where(replaced, 0.0, logvar + (x - mean).square() * torch.exp(-logvar))
    kept = math.log1p(-amount) + x * decoded - softplus(decoded)
    share = amount / 2 if kind == "salt_and_pepper" else amount
    return torch.where(replaced, torch.logaddexp(kept, torch.full_like(kept, math.log(share))), kept)


def _check_corruption(kind: str, amount: float) -> None:
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(map(repr, CORRUPTIONS))}")
    most = math.inf if kind == "gaussian" else 1
    if not 0 < amount < most:
        wanted = "a positive number" if kind == "gaussian" else "a share between 0 and 1"
        raise ValueError(f"amount: got {amount}, wanted {wanted}")


def most_active(variance: Any, count: int = 2) -> list[int]:
    """Indices of the units of largest Var_x(E_q[z]), largest first."""
    sizes = torch.as_tensor(variance, dtype=torch.float64).flatten()
    order: list[int] = torch.argsort(sizes, descending=True, stable=True)[:count].tolist()
    return order


@torch.no_grad()
def manifold(model: Any, n: int = 20, *, variance: Any = None) -> Tensor:
    """Visualisation: E[x|z] over a grid of latent values, as in the paper's figure 4.

    The values are the quantiles Phi^-1((i + 1/2) / n) of the prior, i = 0 ... n-1, so each image stands for
    an equal share of it. With more than two latents the two most active ones move and the others stay at 0.

    Args:
        variance: Var_x(E_q[z]) per unit, ``[latent_dim]``, needed with more than two latents; from
            :func:`vae_fast.evaluation.active_units`.

    Returns:
        ``[n * n, D]``, row by row from the top; the first unit grows from left to right, the second from
        bottom to top. ``[n, D]`` for one latent.
    """
    if n < 1:
        raise ValueError(f"n: got {n}, wanted a positive integer")
    if model.latent_dim is None:
        raise ValueError(
            "latent_dim: got None, wanted the number of latent variables: pass latent_dim= to VAE"
        )
    if variance is None and model.latent_dim > 2:
        raise ValueError(
            f"variance: got None, wanted Var_x(E_q[z]) of each of the {model.latent_dim} latents, "
            "to choose the two most active"
        )
    units = most_active(variance) if model.latent_dim > 2 else list(range(model.latent_dim))
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    z = torch.zeros(n ** len(units), model.latent_dim, dtype=torch.float64)
    z[:, units[0]] = quantiles.repeat(n ** (len(units) - 1))
    if len(units) == 2:
        z[:, units[1]] = quantiles.flip(0).repeat_interleave(n)
    with evaluating(model):
        images: Tensor = model.decode_mean(z.to(next(model.parameters())))
    return images
