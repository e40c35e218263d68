"""The estimators against the paper's formulas, and against a model whose evidence is known exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from vae_fast import VAE, functional, reference
from vae_fast.estimators import (
    ESTIMATORS,
    RUNNING_DECAY,
    Estimate,
    initial_state,
    iwae,
    score_function,
    score_function_leave_one_out,
    score_function_running,
    sgvb_a,
    sgvb_b,
    splitmix64,
    step_seed,
)

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

    def exact_bound(self, x: Tensor, beta: float) -> Tensor:
        """E_q[log p(x|z)] - beta KL(q || p) in closed form: the log-likelihood is quadratic in z."""
        mu, logvar = self.encoder(x)
        mean, x_logvar = self.decoder(mu)
        spread = self.decoder.linear.weight[:, 0] ** 2 * logvar.exp()
        squares = ((x - mean) ** 2 + spread) / x_logvar.exp()
        likelihood = -0.5 * (math.log(2 * math.pi) + x_logvar + squares).sum(-1)
        return likelihood + 0.5 * beta * (1 + logvar - mu**2 - logvar.exp()).sum(-1)

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


def estimates(
    name: str,
    model: VAE,
    x: Tensor,
    seeds: range,
    num_samples: int,
    beta: float = 1.0,
    ops: ModuleType = reference,
) -> Iterator[Estimate]:
    """One after another, with what the estimator remembers of those before."""
    state = initial_state(name)
    for seed in seeds:
        yield ESTIMATORS[name](model, x, seed, num_samples, beta, ops, **state)


def gradients(model: VAE, objectives: Iterator[Tensor]) -> Tensor:
    """Of each objective, with respect to all parameters; ``[n, P]``."""
    params = list(model.parameters())
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(o, params)]) for o in objectives])


@OPS
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "iwae"])
def test_every_estimator_of_the_bound_has_the_exact_gradient_on_average(
    model: LinearGaussian, x: Tensor, name: str, ops: ModuleType
) -> None:
    exact = gradients(model, iter([model.exact_bound(x, 0.7).mean()]))[0]
    objectives = (e.objective.mean() for e in estimates(name, model, x, range(100), 400, 0.7, ops))
    ours = gradients(model, objectives)
    assert ((ours.mean(0) - exact).abs() < 5 * ours.std(0) / 10 + 1e-12).all()


@OPS
@pytest.mark.parametrize("num_samples", [1, 2, 7])
@pytest.mark.parametrize("beta", [1.0, 0.7])
def test_the_importance_weighted_bound_is_that_of_equation_8_and_its_gradient_that_of_13(
    model: LinearGaussian, x: Tensor, ops: ModuleType, num_samples: int, beta: float
) -> None:
    mu, logvar = model.encoder(x)
    eps = reference.philox_normal((num_samples, *mu.shape), seed=7, dtype=torch.float64)
    z = mu + (0.5 * logvar).exp() * eps
    mean, x_logvar = model.decoder(z)
    likelihood = torch.distributions.Normal(mean, (0.5 * x_logvar).exp()).log_prob(x).sum(-1)
    log_q = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(-1)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_weight = likelihood + beta * (log_p - log_q)
    share = (log_weight.detach() - log_weight.detach().logsumexp(0)).exp()
    objectives = [(share * log_weight).sum(0).mean()]
    estimate = iwae(model, x, 7, num_samples, beta, ops)
    torch.testing.assert_close(estimate.objective, log_weight.exp().mean(0).log())
    torch.testing.assert_close(estimate.log_likelihood, likelihood.mean(0))
    torch.testing.assert_close(estimate.log_likelihood - beta * estimate.kl, estimate.objective)
    exact, ours = gradients(model, iter([*objectives, estimate.objective.mean()]))
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def test_the_importance_weighted_bound_rises_to_the_evidence(model: LinearGaussian, x: Tensor) -> None:
    def mean(num_samples: int) -> float:
        found = estimates("iwae", model, x, range(200), num_samples)
        return float(torch.stack([e.objective.mean() for e in found]).detach().mean())

    bounds = [mean(count) for count in (1, 5, 50)]
    evidence, exact = (float(t.detach().mean()) for t in (model.evidence(x), model.exact_bound(x, 1.0)))
    assert exact < bounds[1] < bounds[2] <= evidence + 0.01
    assert evidence - bounds[2] < 0.2 * (evidence - bounds[0])


def variance(model: LinearGaussian, x: Tensor, name: str, num_samples: int) -> Tensor:
    """Of each datapoint's gradient with respect to mu, over 2000 draws; what is remembered has settled."""
    state = initial_state(name)
    for seed in range(50 if state else 0):
        ESTIMATORS[name](model, x, seed, num_samples, 1.0, functional, **state)
    means: list[Tensor] = []
    hook = model.encoder.register_forward_hook(lambda _, __, out: means.append(out[0]))
    estimate = ESTIMATORS[name](model, x.repeat(2000, 1), 7, num_samples, 1.0, functional, **state)
    hook.remove()
    return torch.autograd.grad(estimate.objective.sum(), means[0])[0].view(2000, len(x)).var(0)


def test_the_score_function_has_the_higher_variance(model: LinearGaussian, x: Tensor) -> None:
    assert (variance(model, x, "score_function", 1) > 10 * variance(model, x, "sgvb_b", 1)).all()


def test_baselines_lower_the_variance_of_the_score_function(model: LinearGaussian, x: Tensor) -> None:
    plain, running, two, left_out = (
        variance(model, x, name, num_samples)
        for name, num_samples in (
            ("score_function", 1),
            ("score_function_running", 1),
            ("score_function", 2),
            ("score_function_leave_one_out", 2),
        )
    )
    assert running.mean() < 0.7 * plain.mean()
    assert left_out.mean() < 0.7 * two.mean()


def surrogate(model: LinearGaussian, x: Tensor, num_samples: int, baseline: Tensor) -> Tensor:
    """1/L sum_l [log p(x|z_l) + (f_l - baseline_l) log q(z_l|x)], written out."""
    mu, logvar = model.encoder(x)
    z = reference.reparameterize(mu, logvar, num_samples=num_samples, seed=4).detach()
    likelihood, log_q, f = parts(model, x, z, mu, logvar)
    return (likelihood + (f - baseline) * log_q).mean(0)


def parts(
    model: LinearGaussian, x: Tensor, z: Tensor, mu: Tensor, logvar: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    likelihood = reference.gaussian_log_likelihood(*model.decoder(z), x)
    log_q = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(-1)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    return likelihood, log_q, (likelihood + log_p - log_q).detach()


def test_the_baseline_that_leaves_one_out_is_the_mean_of_the_others(model: LinearGaussian, x: Tensor) -> None:
    mu, logvar = model.encoder(x)
    z = reference.reparameterize(mu, logvar, num_samples=3, seed=4)
    f = parts(model, x, z, mu, logvar)[2]
    others = torch.stack([(f[1] + f[2]) / 2, (f[0] + f[2]) / 2, (f[0] + f[1]) / 2])
    got = score_function_leave_one_out(model, x, 4, 3, 1.0, functional)
    torch.testing.assert_close(got.objective, surrogate(model, x, 3, others))


def test_the_running_baseline_is_a_mean_over_the_steps_before(model: LinearGaussian, x: Tensor) -> None:
    state = initial_state("score_function_running")
    torch.testing.assert_close(
        score_function_running(model, x, 4, 3, 1.0, functional, **state).objective,
        surrogate(model, x, 3, torch.zeros(())),
    )
    means = []
    for seed in (4, 5):
        mu, logvar = model.encoder(x)
        z = reference.reparameterize(mu, logvar, num_samples=3, seed=seed)
        means.append(parts(model, x, z, mu, logvar)[2].mean())
    score_function_running(model, x, 5, 3, 1.0, functional, **state)
    wanted = (RUNNING_DECAY * means[0] + means[1]) / (RUNNING_DECAY + 1)
    torch.testing.assert_close(
        score_function_running(model, x, 4, 3, 1.0, functional, **state).objective,
        surrogate(model, x, 3, wanted),
    )


def test_one_sample_cannot_be_left_out(model: LinearGaussian, x: Tensor) -> None:
    with pytest.raises(ValueError, match="num_samples: got 1, wanted an integer of 2 or more"):
        score_function_leave_one_out(model, x, 0, 1, 1.0, functional)


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("num_samples", [2, 7])
def test_the_number_of_samples_asked_for_is_the_number_decoded(
    model: LinearGaussian, x: Tensor, name: str, num_samples: int
) -> None:
    decoded: list[Tensor] = []
    model.decoder.register_forward_hook(lambda _, inputs, __: decoded.append(inputs[0]))
    next(estimates(name, model, x, range(1), num_samples, ops=functional))
    assert [len(z.unique()) for z in decoded] == [num_samples * len(x)]


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
    next(estimates(name, model, x, range(1), 50, ops=functional))
    assert model.encoder.calls == 1


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_a_seed_tensor_and_the_number_in_it_give_the_same_estimate(
    model: LinearGaussian, x: Tensor, name: str
) -> None:
    number, tensor = (
        ESTIMATORS[name](model, x, seed, 2, 1.0, functional, **initial_state(name)).objective
        for seed in (-9, torch.tensor([-9]))
    )
    assert torch.equal(number, tensor)
