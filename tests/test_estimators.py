"""The estimators against the paper's formulas, and against a model whose evidence is known exactly."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from vae_fast import VAE, functional, reference
from vae_fast.estimators import ESTIMATORS, score_function, sgvb_a, sgvb_b, splitmix64, step_seed

OPS = pytest.mark.parametrize("ops", [functional, reference], ids=["functional", "reference"])


class LinearGaussian(VAE):
    """x = w z + b + sigma noise with one latent: its evidence is a Gaussian, and so is its posterior."""

    def __init__(self, dim: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)
        encoder, decoder = _Encoder(dim), _Decoder(dim)
        super().__init__(encoder=encoder, decoder=decoder, likelihood="gaussian")
        self.double()
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64)

    def evidence(self, x: Tensor) -> Tensor:
        w, b = self.decoder.linear.weight[:, 0], self.decoder.linear.bias
        covariance = torch.outer(w, w) + torch.diag(self.decoder.logvar.exp())
        return torch.distributions.MultivariateNormal(b, covariance).log_prob(x)

    @torch.no_grad()
    def use_exact_posterior(self) -> None:
        """1/s2 = 1 + sum w^2 / sigma^2, mu = s2 sum w (x - b) / sigma^2."""
        w, b = self.decoder.linear.weight[:, 0], self.decoder.linear.bias
        precision = (-self.decoder.logvar).exp()
        variance = 1 / (1 + (w**2 * precision).sum())
        self.encoder.linear.weight.copy_((variance * w * precision)[None])
        self.encoder.linear.bias.copy_(-(variance * w * precision * b).sum())
        self.encoder.logvar.copy_(variance.log())


class _Encoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 1)
        self.logvar = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        mu = self.linear(x)
        return mu, self.logvar.expand_as(mu).contiguous()


class _Decoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, dim)
        self.logvar = nn.Parameter(torch.zeros(dim))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.linear(z)
        return mean, self.logvar.expand_as(mean).contiguous()


@pytest.fixture
def model() -> LinearGaussian:
    return LinearGaussian()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_step_seed_is_the_documented_formula() -> None:
    seed, step, stream = 12345, 678, 3
    state = (seed + (step + 1) * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03) % 2**64
    assert step_seed(seed, step, stream) % 2**64 == splitmix64(state)


def test_splitmix64_gives_its_published_first_outputs() -> None:
    """Those of the generator of this name started at 1234567: its state grows by the golden constant."""
    golden = 0x9E3779B97F4A7C15
    outputs = [splitmix64(1234567 + (i + 1) * golden) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_step_seeds_fit_an_int64_and_do_not_repeat_over_steps_and_streams() -> None:
    seeds = [step_seed(-5, step, stream) for step in range(1000) for stream in range(6)]
    assert len(set(seeds)) == len(seeds)
    assert torch.tensor(seeds, dtype=torch.int64).tolist() == seeds


@OPS
def test_sgvb_b_is_equation_7(model: LinearGaussian, x: Tensor, ops: ModuleType) -> None:
    estimate = sgvb_b(model, x, 7, 4, 1.0, ops)
    mu, logvar = model.encoder(x)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    z = mu + q.scale * reference.philox_normal((4, 5, 1), seed=7, dtype=torch.float64)
    mean, x_logvar = model.decoder(z)
    likelihood = torch.distributions.Normal(mean, (0.5 * x_logvar).exp()).log_prob(x).sum(-1).mean(0)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(estimate.log_likelihood, likelihood)
    torch.testing.assert_close(estimate.kl, kl)
    torch.testing.assert_close(estimate.objective, likelihood - kl)


@OPS
def test_sgvb_a_is_equation_6(model: LinearGaussian, x: Tensor, ops: ModuleType) -> None:
    estimate = sgvb_a(model, x, 7, 4, 1.0, ops)
    mu, logvar = model.encoder(x)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    z = mu + q.scale * reference.philox_normal((4, 5, 1), seed=7, dtype=torch.float64)
    mean, x_logvar = model.decoder(z)
    joint = torch.distributions.Normal(mean, (0.5 * x_logvar).exp()).log_prob(x).sum(-1)
    joint = joint + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(estimate.objective, (joint - q.log_prob(z).sum(-1)).mean(0))


@OPS
def test_with_the_exact_posterior_every_sgvb_a_sample_is_the_evidence(
    model: LinearGaussian, x: Tensor, ops: ModuleType
) -> None:
    model.use_exact_posterior()
    for seed in range(3):
        torch.testing.assert_close(sgvb_a(model, x, seed, 1, 1.0, ops).objective, model.evidence(x))


def test_the_bound_does_not_exceed_the_evidence(model: LinearGaussian, x: Tensor) -> None:
    for estimator in (sgvb_a, sgvb_b):
        assert (estimator(model, x, 3, 20_000, 1.0, reference).objective < model.evidence(x)).all()


@OPS
@pytest.mark.parametrize("name", ["sgvb_a", "score_function"])
def test_every_estimator_has_the_gradient_of_sgvb_b_on_average(
    model: LinearGaussian, x: Tensor, name: str, ops: ModuleType
) -> None:
    def gradient(estimator: str, seed: int) -> Tensor:
        objective = ESTIMATORS[estimator](model, x, seed, 400, 0.7, ops).objective.mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(model.parameters()))])

    ours = torch.stack([gradient(name, seed) for seed in range(100)])
    exact = torch.stack([gradient("sgvb_b", seed) for seed in range(1000, 1100)])
    error = (ours.var(0) / 100 + exact.var(0) / 100).sqrt()
    assert ((ours.mean(0) - exact.mean(0)).abs() < 5 * error + 1e-12).all()


def test_the_score_function_has_the_higher_variance(model: LinearGaussian, x: Tensor) -> None:
    def gradients(name: str) -> Tensor:
        weight = model.encoder.linear.weight
        objectives = (
            ESTIMATORS[name](model, x, seed, 1, 1.0, reference).objective.mean() for seed in range(200)
        )
        return torch.stack([torch.autograd.grad(objective, weight)[0] for objective in objectives])

    assert (gradients("score_function").var(0) > 10 * gradients("sgvb_b").var(0)).all()


def test_no_gradient_of_the_score_function_flows_through_the_sample(model: LinearGaussian, x: Tensor) -> None:
    """log q's own gradient at fixed z, times f: written out for one datapoint."""
    mu, logvar = (t.detach().requires_grad_() for t in model.encoder(x))
    z = reference.reparameterize(mu, logvar, seed=2).detach()
    log_q = -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(-1)
    log_p = -0.5 * (math.log(2 * math.pi) + z**2).sum(-1)
    f = reference.gaussian_log_likelihood(*model.decoder(z), x).detach() + log_p - log_q.detach()
    wanted = torch.autograd.grad((f * log_q).sum(), mu)[0]
    weight = model.encoder.linear.bias
    got = torch.autograd.grad(score_function(model, x, 2, 1, 1.0, reference).objective.sum(), weight)[0]
    torch.testing.assert_close(got, wanted.sum(0))


@pytest.mark.parametrize("name", ["sgvb_a", "sgvb_b"])
def test_beta_weighs_the_divergence_in_the_objective_alone(
    model: LinearGaussian, x: Tensor, name: str
) -> None:
    one, three = (ESTIMATORS[name](model, x, 1, 2, beta, functional) for beta in (1.0, 3.0))
    torch.testing.assert_close(three.objective, one.objective - 2 * one.kl)
    torch.testing.assert_close(three.kl, one.kl)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_a_datapoint_is_encoded_once_however_many_samples(
    model: LinearGaussian, x: Tensor, name: str
) -> None:
    model.encoder.calls = 0
    ESTIMATORS[name](model, x, 1, 50, 1.0, functional)
    assert model.encoder.calls == 1


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_a_seed_tensor_and_the_number_in_it_give_the_same_estimate(
    model: LinearGaussian, x: Tensor, name: str
) -> None:
    number = ESTIMATORS[name](model, x, -9, 2, 1.0, functional).objective
    assert torch.equal(ESTIMATORS[name](model, x, torch.tensor([-9]), 2, 1.0, functional).objective, number)
