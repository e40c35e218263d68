"""log p(x) by importance sampling and by appendix D, against a model whose evidence is known exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor, nn

from vae_fast import VAE, hmc, reference
from vae_fast.estimators import EVALUATE_IMPORTANCE, log_prior, step_seed
from vae_fast.evaluation import bound, figure3_likelihoods, importance_log_likelihood, marginal_likelihood


@pytest.fixture
def model() -> LinearGaussian:
    return LinearGaussian()


@pytest.fixture
def near(model: LinearGaussian) -> LinearGaussian:
    """An encoder near the posterior: a little wider, a little off."""
    model.use_exact_posterior()
    model.encoder.logvar.data += 0.3
    model.encoder.linear.bias.data += 0.1
    return model


@pytest.fixture
def x(model: LinearGaussian) -> Tensor:
    return model.draw(230).float().double()  # data are float32 on their way to a model


def log_weights(model: VAE, x: Tensor, samples: int, seed: int) -> Tensor:
    """log p(x, z) - log q(z|x) with the documented noise, ``[L, N]``; written with distributions."""
    rows, draws = -(-len(x) // 100), -(-samples // 10)
    with torch.no_grad():
        mu, logvar = model.encoder(x)
        eps = torch.cat(
            [
                torch.cat(
                    [
                        reference.philox_normal(
                            (10, 100, mu.shape[1]),
                            seed=step_seed(step_seed(seed, b, EVALUATE_IMPORTANCE), j),
                            dtype=mu.dtype,
                        )
                        for j in range(draws)
                    ]
                )
                for b in range(rows)
            ],
            dim=1,
        )[:samples, : len(x)]
        q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
        z = q.loc + q.scale * eps
        mean, x_logvar = model.decoder(z)
        likelihood = torch.distributions.Normal(mean, (0.5 * x_logvar).exp()).log_prob(x).sum(-1)
        return likelihood + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)


# --- importance sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 7, 10, 37])
def test_it_is_the_log_of_the_mean_weight_of_as_many_samples_as_were_asked_for(
    near: LinearGaussian, x: Tensor, samples: int
) -> None:
    """Not the mean of the logs, and with the sample's own log q(z|x) - log p(z), not the analytic KL."""
    weights = log_weights(near, x, samples, seed=5)
    result = importance_log_likelihood(near, x, num_samples=samples, seed=5)
    torch.testing.assert_close(result.per_datapoint, weights.logsumexp(0) - math.log(samples))
    assert result.mean == pytest.approx(result.per_datapoint.mean().item())
    assert result.count == len(x)


def test_the_standard_error_is_that_of_the_delta_method(near: LinearGaussian, x: Tensor) -> None:
    w = log_weights(near, x, 50, seed=0).exp()
    result = importance_log_likelihood(near, x, num_samples=50)
    torch.testing.assert_close(result.per_datapoint_standard_error, w.std(0) / w.mean(0) / math.sqrt(50))
    assert result.standard_error == pytest.approx(
        (result.per_datapoint_standard_error**2).sum().sqrt().item() / len(x)
    )


def test_it_is_unbiased_for_p_of_x_within_its_standard_errors(near: LinearGaussian, x: Tensor) -> None:
    """The mean of p-hat / p over 40 seeds and all datapoints is 1."""
    runs = [importance_log_likelihood(near, x, num_samples=10, seed=s).per_datapoint for s in range(40)]
    ratios = (torch.stack(runs) - near.evidence(x)).exp()
    error = ratios.mean(1).std() / math.sqrt(len(ratios))
    assert abs(ratios.mean() - 1) < 3 * error
    assert error < 0.01


def test_the_standard_error_covers_the_distance_to_the_evidence(near: LinearGaussian, x: Tensor) -> None:
    result = importance_log_likelihood(near, x, num_samples=2000)
    z_scores = (result.per_datapoint - near.evidence(x)) / result.per_datapoint_standard_error
    assert z_scores.std().item() == pytest.approx(1, abs=0.2)
    assert abs(result.mean - near.evidence(x).mean().item()) < 4 * result.standard_error
    assert result.standard_error < 0.005


def test_with_the_exact_posterior_one_sample_is_the_evidence(model: LinearGaussian, x: Tensor) -> None:
    model.use_exact_posterior()
    torch.testing.assert_close(
        importance_log_likelihood(model, x, num_samples=1).per_datapoint, model.evidence(x)
    )
    several = importance_log_likelihood(model, x, num_samples=20)
    torch.testing.assert_close(several.per_datapoint, model.evidence(x))
    assert several.standard_error < 1e-8


def test_bound_below_importance_below_evidence(model: LinearGaussian, x: Tensor) -> None:
    """On average over noise, for an encoder that is no posterior: bound, L = 5, L = 100, evidence."""
    evidence = model.evidence(x).mean().item()
    five, hundred = (importance_log_likelihood(model, x, num_samples=n).mean for n in (5, 100))
    assert bound(model, x, num_samples=50).elbo < five < hundred < evidence


def test_a_datapoint_is_encoded_once_and_no_more_is_decoded_than_asked(
    near: LinearGaussian, x: Tensor
) -> None:
    near.encoder.calls = 0
    importance_log_likelihood(near, x[:100], num_samples=345, batch_size=2000)
    assert near.encoder.calls == 1
    assert near.decoder.most == 2000


@pytest.mark.parametrize("batch_size", [1, 2000, 3500, 10**6])
def test_the_batch_size_changes_nothing_but_rounding(
    near: LinearGaussian, x: Tensor, batch_size: int
) -> None:
    wanted = importance_log_likelihood(near, x, num_samples=57)
    result = importance_log_likelihood(near, x, num_samples=57, batch_size=batch_size)
    torch.testing.assert_close(result.per_datapoint, wanted.per_datapoint)
    torch.testing.assert_close(result.per_datapoint_standard_error, wanted.per_datapoint_standard_error)


def test_the_last_minibatch_is_counted(near: LinearGaussian, x: Tensor) -> None:
    whole = importance_log_likelihood(near, x[:201], num_samples=10)
    assert whole.count == len(whole.per_datapoint) == 201
    torch.testing.assert_close(
        whole.per_datapoint, importance_log_likelihood(near, x, num_samples=10).per_datapoint[:201]
    )


def test_evidences_far_outside_the_range_of_exp_are_no_matter(near: LinearGaussian, x: Tensor) -> None:
    near.decoder.logvar.data -= 12.0
    near.use_exact_posterior()
    result = importance_log_likelihood(near, x, num_samples=20)
    assert near.evidence(x).max() < -1000
    torch.testing.assert_close(result.per_datapoint, near.evidence(x), rtol=1e-6, atol=0)


def test_nan_is_nan_for_that_datapoint_alone(near: LinearGaussian, x: Tensor) -> None:
    near.encoder.register_forward_hook(lambda module, args, out: (_spoilt(out[0]), out[1]))
    result = importance_log_likelihood(near, x[:50], num_samples=30)
    assert result.per_datapoint.isnan().nonzero().flatten().tolist() == [3]


def _spoilt(mu: Tensor) -> Tensor:
    mu = mu.clone()
    mu[3] = math.nan
    return mu


def test_it_is_the_same_each_time_and_leaves_torchs_generator_alone(near: LinearGaussian, x: Tensor) -> None:
    state = torch.get_rng_state()
    one, two = (importance_log_likelihood(near, x, num_samples=20, seed=s).mean for s in (1, 1))
    assert one == two != importance_log_likelihood(near, x, num_samples=20, seed=2).mean
    assert torch.equal(torch.get_rng_state(), state)


# --- appendix D ---------------------------------------------------------------------------------------------


def test_appendix_d_is_within_a_tenth_of_a_nat_of_the_exact_evidence(
    model: LinearGaussian, x: Tensor
) -> None:
    """3 latent variables, as it is called by default; the encoder is far from the posterior, and not used."""
    result = marginal_likelihood(model, x)
    assert result.mean == pytest.approx(model.evidence(x).mean().item(), abs=0.1)
    assert result.acceptance.mean().item() == pytest.approx(0.9, abs=0.08)
    assert 0 < result.standard_error < 0.05


def test_appendix_d_with_the_papers_fifty_samples_is_a_little_high(model: LinearGaussian, x: Tensor) -> None:
    """Jensen's inequality: the mean is of 1 / p(x)."""
    difference = marginal_likelihood(model, x, num_samples=50).per_datapoint - model.evidence(x)
    assert 0.1 < difference.mean() < 0.35
    assert difference.abs().median() < 0.4


def test_appendix_d_may_begin_at_the_encoders_mean(near: LinearGaussian, x: Tensor) -> None:
    result = marginal_likelihood(near, x[:100], start="encoder", burn_in=40, num_samples=150)
    assert result.mean == pytest.approx(near.evidence(x[:100]).mean().item(), abs=0.15)


def test_appendix_d_finds_posteriors_that_a_chain_from_the_prior_does_not() -> None:
    """Against log p(x) by a million draws of the prior, for a decoder of steep units."""
    generator = torch.Generator().manual_seed(1)
    model = VAE(400, [20], 3, seed=1)
    hidden, logits = model.decoder.hidden[0], model.decoder.logits
    with torch.no_grad():
        for parameter, std in ((hidden.weight, 3.0), (hidden.bias, 1.0), (logits.weight, 2.0)):
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        x = torch.bernoulli(model.decode_mean(torch.randn(30, 3, generator=generator)), generator=generator)
        evidence = torch.full((30,), -math.inf)
        for _ in range(50):
            decoded = model.decoder(torch.randn(20_000, 3, generator=generator))
            log_likelihood = decoded @ x.T - nn.functional.softplus(decoded).sum(1, keepdim=True)
            evidence = torch.logaddexp(evidence, log_likelihood.logsumexp(0))
        wanted = (evidence - math.log(1e6)).mean().item()
    assert marginal_likelihood(model, x).mean == pytest.approx(wanted, abs=0.4)
    assert marginal_likelihood(model, x, start="prior").mean < wanted - 2


def test_a_chain_that_jumps_between_the_halves_is_not_believed(
    model: LinearGaussian, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q(z) is 0 where its second half is, and 1 / p(x) would be."""
    sample, drawn = hmc.sample, []

    def jumping(*args: Any, **how: Any) -> hmc.Samples:
        samples = sample(*args, **how)
        samples.z[len(samples.z) // 2 :] += 100
        drawn.append(samples)
        return samples

    monkeypatch.setattr(hmc, "sample", jumping)
    estimates = marginal_likelihood(model, x[:5], burn_in=20).per_datapoint
    (samples,) = drawn
    most = (samples.log_density.double() - log_prior(samples.z.double())).amax(dim=0)
    torch.testing.assert_close(estimates, most)


def test_appendix_d_is_the_same_each_time(model: LinearGaussian, x: Tensor) -> None:
    one, two, other = (marginal_likelihood(model, x[:10], burn_in=10, seed=s).mean for s in (1, 1, 2))
    assert one == two != other


def test_appendix_d_says_how_many_samples_it_needs(model: LinearGaussian, x: Tensor) -> None:
    with pytest.raises(ValueError, match="num_samples: got 19, wanted at least 20 for 3 latent variables"):
        marginal_likelihood(model, x, num_samples=19)


def test_figure_3_is_appendix_d_on_the_first_thousand_datapoints_of_each_set(model: LinearGaussian) -> None:
    x = model.draw(1100).float()
    train, test = figure3_likelihoods(model, x, x[:40], seed=3)
    assert (train.count, test.count) == (1000, 40)
    wanted = marginal_likelihood(model, x[:40], num_samples=50, leapfrog_steps=4, seed=3)
    assert torch.equal(test.per_datapoint, wanted.per_datapoint)
    exact = model.evidence(x[:1000].double()).mean().item()
    assert exact < train.mean < exact + 0.35


def test_chains_that_never_move_are_told(model: LinearGaussian, x: Tensor) -> None:
    with pytest.warns(UserWarning, match="5 of 5 chains never moved"):
        marginal_likelihood(_Infinite(model), x[:5], burn_in=0)


class _Infinite(VAE):
    """No z explains any x."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__(encoder=model.encoder, decoder=model.decoder, likelihood="gaussian")

    def log_likelihood(self, decoded: Tensor | tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return super().log_likelihood(decoded, x) - math.inf


# --- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", [importance_log_likelihood, marginal_likelihood])
@pytest.mark.parametrize("name", ["num_samples", "batch_size"])
def test_a_bad_argument_is_named(model: LinearGaussian, x: Tensor, estimate: object, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0"):
        estimate(model, x, **{name: 0})  # type: ignore[operator]


def test_an_unknown_start_is_refused(model: LinearGaussian, x: Tensor) -> None:
    with pytest.raises(ValueError, match="start: got 'x', wanted one of 'resampled', 'prior'"):
        marginal_likelihood(model, x, start="x")
