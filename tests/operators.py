"""Every operator in one table, so that a promise about all of them is one test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vae_fast import functional, reference

SEED = 2**63 + 12345


@dataclass
class Case:
    """An operator, a way to make its inputs for rows ``shape[:-1]`` of width ``shape[-1]``, and its outputs
    as a tuple."""

    name: str
    inputs: Callable[[tuple[int, ...], torch.Generator], list[Tensor]]
    fused: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    constants: int = 0  # how many inputs at the end take no gradient in the tests of accuracy


def normal(shape: tuple[int, ...], generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _pair(
    name: str, **options: object
) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    return (
        lambda *args: _tuple(getattr(functional, name)(*args, **options)),
        lambda *args: _tuple(getattr(reference, name)(*args, **options)),
    )


def _plain_sample(num_samples: int | None, with_kl: bool) -> Callable[..., tuple[Tensor, ...]]:
    """Plain PyTorch on the very noise that the operator takes as given: float32 for all but float64 ... and
    its upcasts."""

    def plain(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
        compute = reference.loss_dtype(mu.dtype)
        eps = functional.philox_normal(shape, seed=SEED, device=mu.device).to(compute)
        z = (mu.to(compute) + torch.exp(0.5 * logvar.to(compute)) * eps).to(mu.dtype)
        return (z, reference.gaussian_kl(mu, logvar)) if with_kl else (z,)

    return plain


def _posterior(shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    return [normal(shape, generator, 2.0), normal(shape, generator, 1.5)]


def _bernoulli(shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    return [normal(shape, generator, 6.0), uniform(shape, generator)]


def _bernoulli_samples(shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    return [normal((3, *shape), generator, 6.0), uniform(shape, generator).round()]


def _gaussian(shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    return [normal(shape, generator), normal(shape, generator, 2.0), uniform(shape, generator)]


def _gaussian_scalar(shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    return [normal((2, *shape), generator), normal((), generator), uniform(shape, generator)]


CASES = [
    Case("gaussian_kl", _posterior, *_pair("gaussian_kl")),
    Case("reparameterize", _posterior, _pair("reparameterize", seed=SEED)[0], _plain_sample(None, False)),
    Case(
        "reparameterize, 3 samples",
        _posterior,
        _pair("reparameterize", seed=SEED, num_samples=3)[0],
        _plain_sample(3, False),
    ),
    Case(
        "reparameterize_with_kl",
        _posterior,
        _pair("reparameterize_with_kl", seed=SEED)[0],
        _plain_sample(None, True),
    ),
    Case("bernoulli_log_likelihood", _bernoulli, *_pair("bernoulli_log_likelihood"), constants=1),
    Case(
        "bernoulli_log_likelihood, 3 samples",
        _bernoulli_samples,
        *_pair("bernoulli_log_likelihood"),
        constants=1,
    ),
    Case("gaussian_log_likelihood", _gaussian, *_pair("gaussian_log_likelihood"), constants=1),
    Case(
        "gaussian_log_likelihood, one variance",
        _gaussian_scalar,
        *_pair("gaussian_log_likelihood"),
        constants=1,
    ),
]
