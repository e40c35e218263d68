"""Families of posteriors: samples, densities, moments and divergences are those of one distribution, and
gradients flow through the map.

Integrals are sums over a grid in u, z = mu + s sinh(u), which reaches the heaviest tails in few points.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_estimators import LinearGaussian
from torch import Tensor

from vae_fast import VAE, Trainer, datasets, evaluation, functional, reference
from vae_fast.distributions import (
    POSTERIORS,
    Gaussian,
    LocationScale,
    Logistic,
    Posterior,
    StudentT,
    log_normal,
)
from vae_fast.estimators import ESTIMATORS, log_prior, sgvb_a, sgvb_b

FAMILIES = pytest.mark.parametrize("family", [*POSTERIORS.values(), StudentT(3)], ids=lambda f: f.name)
MU, LOGVAR = (torch.tensor([value], dtype=torch.float64) for value in (0.4, -0.7))


class Grid:
    """Points z of one latent variable ``[n, 1]``, and integrals over them by the trapezoidal rule."""

    def __init__(self, family: Posterior) -> None:
        u = torch.linspace(-14, 14, 200_001, dtype=torch.float64)[:, None]
        scale = torch.exp(0.5 * LOGVAR)
        positive = family.name == "log_normal"
        self.z = torch.exp(MU + scale * u) if positive else MU + scale * torch.sinh(u)
        self.width = (self.z if positive else torch.cosh(u)) * scale * (u[1] - u[0])
        near = family.log_density(self.z, MU, LOGVAR) > -700  # the rest is 0, and 0 times infinity is nothing
        self.z, self.width = self.z[near], self.width[near]
        self.log_density = family.log_density(self.z, MU, LOGVAR)
        self.weight = self.log_density.exp() * self.width[:, 0]

    def mean(self, values: Tensor) -> Tensor:
        return (self.weight * values).sum()


def draws(family: Posterior, count: int = 20_000, seed: int = 5) -> Tensor:
    return family.sample(MU, LOGVAR, num_samples=count, seed=seed)[:, 0]


@FAMILIES
def test_the_density_integrates_to_one(family: Posterior) -> None:
    assert Grid(family).weight.sum().item() == pytest.approx(1, abs=1e-6)


@FAMILIES
def test_samples_are_of_the_density(family: Posterior) -> None:
    """Kolmogorov and Smirnov's largest distance between distribution functions; p < 1e-6 beyond 0.0191."""
    grid, z = Grid(family), draws(family).sort().values
    after = grid.weight.cumsum(0)
    place = torch.searchsorted(grid.z[:, 0].contiguous(), z).clamp_max(len(after) - 1)
    ranks = torch.arange(1, len(z) + 1, dtype=torch.float64) / len(z)
    assert (after[place] - ranks).abs().max() < 0.0191


@FAMILIES
def test_samples_have_the_moments_of_the_density(family: Posterior) -> None:
    """The first, which ``mean`` gives, and those of tanh: that of the second power may have no error bar."""
    grid, z = Grid(family), draws(family)
    assert family.mean(MU, LOGVAR).item() == pytest.approx(grid.mean(grid.z[:, 0]).item(), abs=1e-4)
    for power in (1, 2, 3, 4):
        ours, wanted = torch.tanh(z) ** power, grid.mean(torch.tanh(grid.z[:, 0]) ** power)
        assert (ours.mean() - wanted).abs() < 5 * ours.std() / math.sqrt(len(z))
    assert (z.mean() - family.mean(MU, LOGVAR)).abs() < 5 * z.std() / math.sqrt(len(z))


@FAMILIES
def test_the_divergence_is_the_integral_of_the_log_ratio(family: Posterior) -> None:
    grid = Grid(family)
    wanted = grid.mean(grid.log_density - log_prior(grid.z))
    torch.testing.assert_close(family.kl(MU, LOGVAR), wanted, rtol=2e-4, atol=1e-6)


@FAMILIES
def test_densities_and_divergences_add_up_over_latent_variables(family: Posterior) -> None:
    mu, logvar = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = family.sample(mu, logvar, seed=1)
    for got, each in (
        (
            family.log_density(z, mu, logvar),
            family.log_density(z[..., None], mu[..., None], logvar[..., None]),
        ),
        (family.kl(mu, logvar), family.kl(mu[..., None], logvar[..., None])),
    ):
        assert got.shape == (4,)
        torch.testing.assert_close(got, each.sum(dim=-1))


@FAMILIES
def test_the_gradient_flows_through_the_sample(family: Posterior) -> None:
    """Against a finite difference with the same noise, and within its error that of the integral."""
    mu, logvar = (t.clone().requires_grad_() for t in (MU, LOGVAR))

    def mean(mu: Tensor, logvar: Tensor) -> Tensor:
        return torch.tanh(family.sample(mu, logvar, num_samples=20_000, seed=3)).mean()

    for got, step in zip(
        torch.autograd.grad(mean(mu, logvar), (mu, logvar)), ((1e-5, 0.0), (0.0, 1e-5)), strict=True
    ):
        up, down = (mean(MU + sign * step[0], LOGVAR + sign * step[1]) for sign in (1, -1))
        torch.testing.assert_close(got[0], (up - down) / 2e-5, rtol=1e-6, atol=1e-8)
    grid = Grid(family)
    values = torch.tanh(grid.z[:, 0])
    weight = family.log_density(grid.z, mu, logvar).exp() * grid.width[:, 0]
    exact = torch.autograd.grad((weight * values).sum(), (mu, logvar))
    for got, wanted in zip(torch.autograd.grad(mean(mu, logvar), (mu, logvar)), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.02)


@FAMILIES
def test_the_noise_is_a_function_of_seed_and_element(family: Posterior) -> None:
    how = {"dtype": torch.float64, "device": torch.device("cpu")}
    short, long = (family.draw((n, 3), seed=7, **how) for n in (5, 9))
    assert torch.equal(long[:5], short)
    assert not torch.equal(family.draw((5, 3), seed=8, **how), short)
    assert len(long.unique()) == 27
    torch.testing.assert_close(
        family.draw((5, 3), seed=7, **how, ops=reference), short, rtol=1e-12, atol=1e-12
    )
    rounded = family.draw((5, 3), seed=7, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(rounded.double(), short, rtol=1e-6, atol=1e-6)


@FAMILIES
def test_without_a_seed_the_noise_follows_torchs_generator(family: Posterior) -> None:
    def sample() -> Tensor:
        return family.sample(MU, LOGVAR, num_samples=3)

    torch.manual_seed(1)
    first = sample()
    assert not torch.equal(sample(), first)
    torch.manual_seed(1)
    assert torch.equal(sample(), first)


@pytest.mark.parametrize("name", ["logistic", "gumbel", "laplace"])
def test_the_farthest_noise_is_finite(name: str) -> None:
    """A Box-Muller normal of 32-bit words reaches 6.8."""
    normals = torch.linspace(-7, 7, 1001, dtype=torch.float64)[:, None]
    eps = POSTERIORS[name].noise(normals)
    assert eps.isfinite().all()
    assert (eps.diff() > 0).all()


def test_a_student_t_without_a_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="degrees: got 2, wanted an integer of 3 or more"):
        StudentT(2)


# ---- in a model --------------------------------------------------------------------------------------------


class NoClosedForm(Logistic):
    """A logistic posterior that knows no divergence."""

    name = "own"
    closed_kl = False

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        raise AssertionError("there is none")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def linear_gaussian(family: Posterior) -> LinearGaussian:
    model = LinearGaussian()
    model.posterior = family
    with torch.no_grad():
        model.encoder.logvar.fill_(-1.5)  # where a log-normal has moments that a sample can show
    return model


@pytest.mark.parametrize("ops", [functional, reference], ids=["functional", "reference"])
@pytest.mark.parametrize("name", [name for name in POSTERIORS if name != "gaussian"])
def test_estimators_agree_on_the_gradient_of_a_bound_below_the_evidence(
    name: str, ops: ModuleType, x: Tensor
) -> None:
    model = linear_gaussian(POSTERIORS[name])
    params = list(model.parameters())

    def moments(estimator: str) -> tuple[Tensor, Tensor]:
        found = []
        for seed in range(40):
            objective = ESTIMATORS[estimator](model, x, seed, 300, 1.0, ops).objective.mean()
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(objective, params)]))
        return torch.stack(found).mean(0), torch.stack(found).var(0) / 40

    wanted, error = moments("sgvb_b")
    for estimator in ("sgvb_a", "score_function_leave_one_out"):
        mean, its_error = moments(estimator)
        assert ((mean - wanted).abs() < 5 * (error + its_error).sqrt() + 1e-12).all(), estimator
    for bound in (sgvb_a, sgvb_b):
        assert (bound(model, x, 1, 20_000, 1.0, ops).objective < model.evidence(x)).all()


@FAMILIES
def test_evaluation_gives_the_bound_of_the_family(family: Posterior, x: Tensor) -> None:
    model = linear_gaussian(family)
    with torch.no_grad():
        model.encoder.linear.bias.fill_(0.8)  # where exp(mu) is far from mu
        wanted = sgvb_b(model, x, 1, 20_000, 1.0, functional).objective.mean()
    got = evaluation.bound(model, x.float(), num_samples=2000)
    assert got.elbo == pytest.approx(wanted.item(), abs=0.03)
    mean = evaluation.bound(model, x.float(), use_mean=True)
    decoded = model.decoder(family.mean(*model.encoder(x)))
    assert mean.log_likelihood == pytest.approx(model.log_likelihood(decoded, x).mean().item(), rel=1e-5)


def test_without_a_closed_form_the_bound_is_that_of_sgvb_a(x: Tensor) -> None:
    own, logistic = linear_gaussian(NoClosedForm()), linear_gaussian(Logistic())
    torch.testing.assert_close(
        own(x, num_samples=4, seed=2).elbo, sgvb_a(own, x, 2, 4, 1.0, functional).objective
    )
    bounds = [evaluation.bound(model, x.float(), num_samples=2000).elbo for model in (own, logistic)]
    assert bounds[0] == pytest.approx(bounds[1], abs=0.03)
    assert bounds[0] != bounds[1]


def test_without_a_closed_form_the_trainer_takes_sgvb_a_and_refuses_sgvb_b() -> None:
    model = VAE(12, [8], 2, posterior=NoClosedForm(), seed=0)
    assert Trainer(model).settings.estimator == "sgvb_a"
    assert Trainer(VAE(12, [8], 2, posterior="logistic")).settings.estimator == "sgvb_b"
    with pytest.raises(ValueError, match=r"estimator: got 'sgvb_b', wanted 'sgvb_a'.* own posterior"):
        Trainer(model, estimator="sgvb_b")


@pytest.mark.parametrize("name", list(POSTERIORS))
def test_training_on_mnist_raises_the_bound(name: str) -> None:
    images = datasets.mnist()[0]
    model = VAE(784, [32], 4, posterior=name, init="torch", seed=0)
    before = evaluation.bound(model, images[2000:2500]).elbo
    trainer = Trainer(model, optimizer="adam", lr=3e-3)
    row = trainer.fit(images[:2000], images[2000:2500], max_samples=6000, progress=False).last
    assert row.test_bound is not None and row.test_bound > before + 200


def test_a_checkpoint_knows_the_posterior(tmp_path: Path) -> None:
    trainer = Trainer(VAE(12, [8], 2, posterior="student_t", seed=0), lr=0.01)
    trainer.fit(torch.rand(50, 12), max_samples=100, progress=False)
    trainer.save(tmp_path / "run")
    assert Trainer.load(tmp_path / "run").model.posterior is POSTERIORS["student_t"]


def test_an_unknown_posterior_is_refused() -> None:
    with pytest.raises(ValueError, match="posterior: got 'cauchy', wanted one of 'gaussian'"):
        VAE(12, [8], 2, posterior="cauchy")


def test_the_gaussian_family_is_a_location_and_a_scale() -> None:
    """Its fused divergence is the one that all location-scale families have."""

    class Plain(LocationScale):
        noise_entropy = 0.5 * math.log(2 * math.pi * math.e)
        noise_variance = 1.0

    torch.testing.assert_close(Gaussian().kl(MU, LOGVAR), Plain().kl(MU, LOGVAR))
    z = draws(Gaussian(), 4)[:, None]
    wanted = torch.distributions.Normal(MU, torch.exp(0.5 * LOGVAR)).log_prob(z).sum(-1)
    torch.testing.assert_close(log_normal(z, MU, LOGVAR), wanted)
