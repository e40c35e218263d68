"""Families of approximate posteriors q(z|x): one noise and one map each (section 2.4).

z = g(eps; mu, logvar) with eps from a distribution that has no parameters, so the gradient of an expectation
over z is an expectation of gradients. Every family takes the encoder's two outputs, a location mu and
logvar = 2 log(scale), and is independent over the latent variables. The prior stays N(0, I), so that the KL
divergence has a closed form for all families here.

============  ======================================  ==================================================
name          noise, of normals n                     map
============  ======================================  ==================================================
gaussian      n                                       location and scale
logistic      log u - log(1 - u), u = Phi(n)          location and scale (an inverse CDF)
gumbel        -log(-log u), u = Phi(n)                location and scale (an inverse CDF)
laplace       -sign(n) log(2 Phi(-abs(n)))            location and scale (an inverse CDF)
student_t     n_0 / sqrt((n_1^2 + ... + n_v^2) / v)   location and scale; v = 5 degrees of freedom
log_normal    n                                       exp of location and scale (a composition)
============  ======================================  ==================================================

The Cauchy distribution is not among them: it has no second moment, so its divergence from N(0, I) is
infinite. A log-normal z is positive, while half of the prior's mass is at negative values of each z_j: the
bound is valid, and the divergence at least log 2 per latent variable.

The noise is a pure function of (seed, element index): that of element i is made of the k normals
i k ... i k + k - 1 of ``philox_normal((..., k), seed=seed)``, in float64, and rounded once.

Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114, section 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import functional

_LOG_2PI = math.log(2 * math.pi)
_EULER = 0.57721566490153286


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, diag(exp(logvar))), summed over the last dimension."""
    return -0.5 * (_LOG_2PI + logvar + (z - mu) ** 2 * (-logvar).exp()).sum(dim=-1)


class Posterior:
    """A family q(z|x): a noise and a map. One of your own defines the methods that raise here; without
    ``kl``, it leaves ``closed_kl`` False and is trained by SGVB-A.

    Tensors are ``[..., Z]``; densities and divergences are in nats and summed over the last dimension.
    """

    name: str
    normals = 1  # k: how many normals make the noise of one element
    closed_kl = False

    def noise(self, normals: Tensor) -> Tensor:
        """eps, ``[..., Z]``, of independent standard normals ``[..., Z, k]``."""
        raise NotImplementedError

    def map(self, eps: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        """z = g(eps; mu, logvar) (equation 4)."""
        raise NotImplementedError

    def log_density(self, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        """log q(z|x), ``[...]``."""
        raise NotImplementedError

    def mean(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """E_q[z], ``[..., Z]``."""
        raise NotImplementedError

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """KL(q(z|x) || N(0, I)), ``[...]``."""
        raise NotImplementedError(f"{self.name} has no closed form of its divergence")

    def draw(
        self,
        shape: Sequence[int],
        *,
        seed: int | Tensor,
        dtype: torch.dtype,
        device: torch.device,
        ops: ModuleType = functional,
    ) -> Tensor:
        """The noise of this shape, ``[..., Z]``; ``ops`` is :mod:`vae_fast.functional` or its reference."""
        normals = ops.philox_normal((*shape, self.normals), seed=seed, dtype=torch.float64, device=device)
        return self.noise(normals).to(dtype)

    def sample(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
        ops: ModuleType = functional,
    ) -> Tensor:
        """z, ``[..., Z]`` or ``[num_samples, ..., Z]``, with gradients in mu and logvar; see
        :func:`vae_fast.reparameterize` for the arguments.
        """
        if seed is None:
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=mu.device)
        shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
        return self.map(self.draw(shape, seed=seed, dtype=mu.dtype, device=mu.device, ops=ops), mu, logvar)

    def sample_with_kl(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
        ops: ModuleType = functional,
    ) -> tuple[Tensor, Tensor]:
        """``(sample(...), kl(mu, logvar))``."""
        z = self.sample(mu, logvar, num_samples=num_samples, seed=seed, ops=ops)
        return z, self.kl(mu, logvar)


class Gaussian(Posterior):
    """N(mu, diag(exp(logvar))), by the fused operators."""

    name = "gaussian"
    closed_kl = True

    def map(self, eps: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu + torch.exp(0.5 * logvar) * eps

    def log_density(self, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return log_normal(z, mu, logvar)

    def mean(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return functional.gaussian_kl(mu, logvar)

    def draw(
        self,
        shape: Sequence[int],
        *,
        seed: int | Tensor,
        dtype: torch.dtype,
        device: torch.device,
        ops: ModuleType = functional,
    ) -> Tensor:
        noise: Tensor = ops.philox_normal(shape, seed=seed, dtype=dtype, device=device)
        return noise

    def sample(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
        ops: ModuleType = functional,
    ) -> Tensor:
        z: Tensor = ops.reparameterize(mu, logvar, num_samples=num_samples, seed=seed)
        return z

    def sample_with_kl(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
        ops: ModuleType = functional,
    ) -> tuple[Tensor, Tensor]:
        z, kl = ops.reparameterize_with_kl(mu, logvar, num_samples=num_samples, seed=seed)
        return z, kl


class LocationScale(Posterior):
    """z = mu + exp(logvar / 2) * eps, for a noise whose entropy, mean and variance are known.

    KL(q || N(0, I)) = -H(q) + 1/2 log 2 pi + 1/2 E_q[z^2], H(q) = H(eps) + logvar / 2.
    """

    closed_kl = True
    noise_entropy: float
    noise_mean = 0.0
    noise_variance: float

    def log_density_of_noise(self, eps: Tensor) -> Tensor:
        """Elementwise."""
        raise NotImplementedError

    def map(self, eps: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu + torch.exp(0.5 * logvar) * eps

    def log_density(self, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        eps = (z - mu) * torch.exp(-0.5 * logvar)
        return (self.log_density_of_noise(eps) - 0.5 * logvar).sum(dim=-1)

    def mean(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu + torch.exp(0.5 * logvar) * self.noise_mean

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        squares = self.mean(mu, logvar) ** 2 + torch.exp(logvar) * self.noise_variance
        return (0.5 * (_LOG_2PI + squares - logvar) - self.noise_entropy).sum(dim=-1)


class Logistic(LocationScale):
    """Density 1/s e^-t / (1 + e^-t)^2, t = (z - mu) / s: close to a Gaussian, with heavier tails."""

    name = "logistic"
    noise_entropy = 2.0
    noise_variance = math.pi**2 / 3

    def noise(self, normals: Tensor) -> Tensor:
        n = normals[..., 0]
        eps: Tensor = torch.special.log_ndtr(n) - torch.special.log_ndtr(-n)
        return eps

    def log_density_of_noise(self, eps: Tensor) -> Tensor:
        return -eps - 2 * torch.nn.functional.softplus(-eps)


class Gumbel(LocationScale):
    """Density 1/s e^(-t - e^-t), t = (z - mu) / s: skewed, mu is its mode."""

    name = "gumbel"
    noise_entropy = 1 + _EULER
    noise_mean = _EULER
    noise_variance = math.pi**2 / 6

    def noise(self, normals: Tensor) -> Tensor:
        return -torch.log(-torch.special.log_ndtr(normals[..., 0]))

    def log_density_of_noise(self, eps: Tensor) -> Tensor:
        return -eps - torch.exp(-eps)


class Laplace(LocationScale):
    """Density 1/(2 s) e^-|t|, t = (z - mu) / s."""

    name = "laplace"
    noise_entropy = 1 + math.log(2)
    noise_variance = 2.0

    def noise(self, normals: Tensor) -> Tensor:
        n = normals[..., 0]
        eps: Tensor = -torch.sign(n) * (math.log(2) + torch.special.log_ndtr(-n.abs()))
        return eps

    def log_density_of_noise(self, eps: Tensor) -> Tensor:
        return -eps.abs() - math.log(2)


class StudentT(LocationScale):
    """Student's t with v degrees of freedom: density proportional to (1 + t^2 / v)^(-(v + 1) / 2) / s.

    Args:
        degrees: v, an integer of 3 or more, so that the variance, v / (v - 2) s^2, is finite.
    """

    name = "student_t"

    def __init__(self, degrees: int = 5) -> None:
        if degrees != int(degrees) or degrees < 3:
            raise ValueError(f"degrees: got {degrees}, wanted an integer of 3 or more")
        self.degrees, self.normals = degrees, degrees + 1
        half, next_half = 0.5 * degrees, 0.5 * (degrees + 1)
        self._log_constant = math.lgamma(next_half) - math.lgamma(half) - 0.5 * math.log(math.pi * degrees)
        ends = torch.digamma(torch.tensor([half, next_half], dtype=torch.float64))
        self.noise_entropy = next_half * float(ends[1] - ends[0]) - self._log_constant
        self.noise_variance = degrees / (degrees - 2)

    def noise(self, normals: Tensor) -> Tensor:
        chi_squared = normals[..., 1:].square().sum(dim=-1)
        return normals[..., 0] / (chi_squared / self.degrees).sqrt()

    def log_density_of_noise(self, eps: Tensor) -> Tensor:
        return self._log_constant - 0.5 * (self.degrees + 1) * torch.log1p(eps**2 / self.degrees)


class LogNormal(Posterior):
    """z = exp(mu + exp(logvar / 2) * n): the exponential of a Gaussian, positive."""

    name = "log_normal"
    closed_kl = True

    def noise(self, normals: Tensor) -> Tensor:
        return normals[..., 0]

    def map(self, eps: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return torch.exp(mu + torch.exp(0.5 * logvar) * eps)

    def log_density(self, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        log_z = z.log()
        return log_normal(log_z, mu, logvar) - log_z.sum(dim=-1)

    def mean(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return torch.exp(mu + 0.5 * torch.exp(logvar))

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """-H(q) + 1/2 log 2 pi + 1/2 E_q[z^2], E_q[z^2] = exp(2 mu + 2 exp(logvar))."""
        squares = torch.exp(2 * (mu + torch.exp(logvar)))
        return (0.5 * (squares - logvar - 1) - mu).sum(dim=-1)


GAUSSIAN = Gaussian()
POSTERIORS: Mapping[str, Posterior] = {
    family.name: family for family in (GAUSSIAN, Logistic(), Gumbel(), Laplace(), StudentT(), LogNormal())
}


def posterior_of(model: Any) -> Posterior:
    """The family of a model's q(z|x); Gaussian where it does not say."""
    family: Posterior = getattr(model, "posterior", GAUSSIAN)
    return family
