"""The bound over a data set: every datapoint once, the same noise whatever the batch size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vae_fast import VAE, datasets, reference
from vae_fast.batches import binarise, uniform_words
from vae_fast.datasets import prepare
from vae_fast.estimators import EVALUATE, EVALUATE_BINARISE, step_seed
from vae_fast.evaluation import active_units, bound


@pytest.fixture
def model() -> VAE:
    model = VAE(data_dim=8, hidden_dims=[6], latent_dim=3, seed=0)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.rand(257, 8, generator=torch.Generator().manual_seed(1))


def noise(rows: int, samples: int, seed: int) -> Tensor:
    """As the module's docstring says; [L, rows, 3]."""
    blocks = [reference.philox_normal((100, samples, 3), seed=step_seed(seed, b, EVALUATE)) for b in range(3)]
    return torch.cat(blocks)[:rows].transpose(0, 1)


@pytest.mark.parametrize("samples", [1, 4])
def test_the_bound_is_equation_7_with_the_documented_noise(model: VAE, x: Tensor, samples: int) -> None:
    result = bound(model, x, num_samples=samples, seed=5)
    with torch.no_grad():
        mu, logvar = model.encoder(x)
        z = mu + (0.5 * logvar).exp() * noise(257, samples, 5)
        p = torch.distributions.Bernoulli(logits=model.decoder(z), validate_args=False)
        log_likelihood = p.log_prob(x).sum(-1).mean().item()
        q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean().item()
    assert result.log_likelihood == pytest.approx(log_likelihood, rel=1e-5)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.elbo == pytest.approx(log_likelihood - kl, rel=1e-5)
    assert result.count == 257
    assert (result.rate, result.distortion) == (result.kl, -result.log_likelihood)


@pytest.mark.parametrize("batch_size", [1, 30, 100, 128, 256, 257, 5000])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_batch_size_changes_nothing_but_rounding(
    model: VAE, x: Tensor, batch_size: int, samples: int
) -> None:
    wanted = bound(model, x, num_samples=samples)
    result = bound(model, x, num_samples=samples, batch_size=batch_size)
    assert result.elbo == pytest.approx(wanted.elbo, rel=1e-6)


def test_the_last_minibatch_of_one_is_counted(model: VAE, x: Tensor) -> None:
    first, last = bound(model, x[:256]), bound(model, x)
    with torch.no_grad():
        mu, logvar = model.encoder(x[256:])
        z = mu + (0.5 * logvar).exp() * noise(257, 1, 0)[0, 256:]
        only = reference.bernoulli_log_likelihood(model.decoder(z), x[256:]) - reference.gaussian_kl(
            mu, logvar
        )
    assert last.elbo == pytest.approx((256 * first.elbo + only.item()) / 257, rel=1e-6)


def test_the_bound_is_the_same_each_time_and_leaves_torchs_generator_alone(model: VAE, x: Tensor) -> None:
    state = torch.get_rng_state()
    assert bound(model, x) == bound(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert bound(model, x, seed=1) != bound(model, x)


def test_use_mean_puts_mu_in_the_place_of_z(model: VAE, x: Tensor) -> None:
    with torch.no_grad():
        wanted = reference.bernoulli_log_likelihood(model.decoder(model.encoder(x)[0]), x).mean().item()
    assert bound(model, x, use_mean=True).log_likelihood == pytest.approx(wanted, rel=1e-6)


def test_the_bound_does_not_exceed_an_exact_evidence() -> None:
    """x = W z + noise, so p(x) is a Gaussian; q is any Gaussian."""
    torch.manual_seed(0)
    decoder, encoder = _Split(2, 5), _Split(5, 2)
    model = VAE(encoder=encoder, decoder=decoder, likelihood="gaussian")
    with torch.no_grad():
        decoder.logvar.weight.zero_()
    x = torch.randn(50, 5)
    covariance = decoder.mean.weight @ decoder.mean.weight.T + torch.diag(decoder.logvar.bias.exp())
    evidence = torch.distributions.MultivariateNormal(decoder.mean.bias, covariance).log_prob(x).mean().item()
    assert bound(model, x, num_samples=2000).elbo < evidence


class _Split(nn.Module):
    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.mean, self.logvar = nn.Linear(fan_in, fan_out), nn.Linear(fan_in, fan_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), self.logvar(x)


def test_pixels_are_read_as_in_training(model: VAE, x: Tensor) -> None:
    pixels = (255 * x).round().to(torch.uint8)
    assert bound(model, pixels).elbo == pytest.approx(bound(model, pixels.float() / 255).elbo, rel=1e-6)
    assert bound(model, pixels, pixel_scale=256).elbo != bound(model, pixels).elbo


def test_dynamic_pixels_are_drawn_from_the_documented_words(model: VAE, x: Tensor) -> None:
    words = [uniform_words((100, 8), torch.tensor([step_seed(3, b, EVALUATE_BINARISE)])) for b in range(3)]
    drawn = binarise(x, torch.cat(words)[:257])
    data = prepare(x, likelihood="bernoulli", targets="dynamic")
    wanted = bound(model, drawn, seed=3).elbo
    for batch_size in (33, 1000):
        assert bound(model, data, seed=3, batch_size=batch_size).elbo == pytest.approx(wanted, rel=1e-6)


def test_evaluation_is_in_evaluation_mode_and_gives_every_module_its_mode_back(x: Tensor) -> None:
    encoder = nn.Sequential(nn.Dropout(0.5), _Split(8, 3))
    model = VAE(encoder=encoder, decoder=nn.Linear(3, 8))
    encoder[1].eval()
    assert bound(model, x) == bound(model, x)
    assert model.training and encoder[0].training and not encoder[1].training


def test_active_units_are_those_whose_posterior_mean_moves_with_the_data(x: Tensor) -> None:
    encoder = _Split(8, 3)
    with torch.no_grad():
        encoder.mean.weight.zero_()
        encoder.mean.weight[0, 0], encoder.mean.weight[1, 1] = 10.0, 0.01
    model = VAE(encoder=encoder, decoder=nn.Linear(3, 8))
    units = active_units(model, x, batch_size=50)
    assert units.count == 1
    wanted = torch.stack(
        [100 * x[:, 0].double().var(correction=0), 1e-4 * x[:, 1].double().var(correction=0)]
    )
    torch.testing.assert_close(units.variance[:2], wanted, rtol=1e-4, atol=1e-9)
    assert units.variance[2] < 1e-12
    assert active_units(model, x, threshold=1e-7).count == 2


@pytest.mark.parametrize(("name", "value"), [("num_samples", 0), ("batch_size", 0)])
def test_a_bad_argument_is_named(model: VAE, x: Tensor, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0"):
        bound(model, x, **{name: value})  # type: ignore[arg-type]


def test_data_that_cannot_be_are_refused(model: VAE) -> None:
    with pytest.raises(datasets.DataError):
        bound(model, torch.full((3, 8), 2.0))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_and_cpu_agree(model: VAE, x: Tensor) -> None:
    on_cpu = bound(model, x, num_samples=3)
    assert bound(model.cuda(), x, num_samples=3).elbo == pytest.approx(on_cpu.elbo, rel=1e-5)
