"""The drop-in modules and the VAE."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vae_fast as vf


def test_loss_modules_are_the_functions_averaged_over_datapoints():
    torch.manual_seed(0)
    mu, logvar, logits, x = torch.randn(6, 3), torch.randn(6, 3), torch.randn(6, 8), torch.rand(6, 8)
    assert torch.equal(vf.GaussianKL()(mu, logvar), vf.gaussian_kl(mu, logvar, reduction="mean"))
    assert torch.equal(
        vf.BernoulliNLL()(logits, x), -vf.bernoulli_log_likelihood(logits, x, reduction="mean")
    )
    assert torch.equal(
        vf.ELBOLoss(beta=3.0)(logits, x, mu, logvar), -vf.elbo(logits, x, mu, logvar, beta=3.0).elbo
    )
    assert torch.equal(vf.GaussianKL(reduction="none")(mu, logvar), vf.gaussian_kl(mu, logvar))
    assert torch.equal(
        vf.Reparameterize(num_samples=2)(mu, logvar, seed=1),
        vf.reparameterize(mu, logvar, num_samples=2, seed=1),
    )


def test_the_papers_initial_values():
    model = vf.VAE(data_dim=784, hidden_dims=[500], latent_dim=20, seed=3)
    assert sum(p.numel() for p in model.parameters()) == 815_824
    weight = model.encoder.hidden[0].weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.02) and abs(weight.mean().item()) < 1e-4
    assert model.encoder.hidden[0].bias.std() > 0.005
    for zero in (model.encoder.logvar.weight, model.encoder.logvar.bias, model.decoder.logits.bias):
        assert not zero.any()
    same, other = (vf.VAE(784, [500], 20, seed=s).encoder.hidden[0].weight for s in (3, 4))
    assert torch.equal(weight, same) and not torch.equal(weight, other)


def test_default_initial_values_follow_torchs_generator():
    torch.manual_seed(1)
    first = vf.VAE(10, [4], 2).decoder.logits.weight
    torch.manual_seed(1)
    assert torch.equal(first, vf.VAE(10, [4], 2).decoder.logits.weight)
    assert not torch.equal(first, vf.VAE(10, [4], 2).decoder.logits.weight)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("hidden_dims", [[], [7], [9, 5]])
def test_shapes_of_any_depth(likelihood, hidden_dims):
    model = vf.VAE(12, hidden_dims, 3, likelihood, activation="relu", init="torch", seed=0)
    x = torch.rand(5, 12)
    mu, logvar = model.encoder(x)
    assert mu.shape == logvar.shape == (5, 3)
    bound = model(x, num_samples=4, seed=1)
    assert all(term.shape == (5,) for term in bound)
    assert model.reconstruct(x).shape == (5, 12) and model.sample(2).shape == (2, 12)
    assert torch.equal(model.sample(2, seed=7), model.sample(2, seed=7))


def test_forward_is_sgvb_b():
    model = vf.VAE(12, [7], 3, seed=0)
    x = torch.rand(5, 12)
    mu, logvar = model.encoder(x)
    z = vf.reference.reparameterize(mu, logvar, num_samples=4, seed=1)
    log_likelihood = vf.reference.bernoulli_log_likelihood(model.decoder(z), x).mean(0)
    kl = vf.reference.gaussian_kl(mu, logvar)
    bound = model(x, num_samples=4, beta=2.0, seed=1)
    torch.testing.assert_close(bound.elbo, log_likelihood - 2 * kl)
    torch.testing.assert_close(bound.log_likelihood, log_likelihood)


def test_a_sigmoid_keeps_the_gaussian_mean_in_the_unit_interval():
    model = vf.VAE(6, [5], 2, "gaussian", mean_activation="sigmoid", init="torch", seed=0)
    mean, logvar = model.decoder(50 * torch.randn(100, 2))
    assert mean.min() >= 0 and mean.max() <= 1 and logvar.min() < 0


def test_the_papers_gaussian_decoder_is_equation_12():
    """N(x; sigmoid(W4 h + b4), exp(W5 h + b5)), h = tanh(W3 z + b3)."""
    model = vf.VAE(6, [5], 2, "gaussian", mean_activation="sigmoid", init="torch", seed=0).double()
    z, x = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    h = torch.tanh(z @ model.decoder.hidden[0].weight.T + model.decoder.hidden[0].bias)
    mean = torch.sigmoid(h @ model.decoder.mean.weight.T + model.decoder.mean.bias)
    logvar = h @ model.decoder.logvar.weight.T + model.decoder.logvar.bias
    wanted = torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(model.log_likelihood(model.decoder(z), x), wanted)
    torch.testing.assert_close(model.decode_mean(z), mean)


def test_the_encoders_log_variance_may_be_scaled():
    model = vf.VAE(12, [9], 3, logvar_scale=0.1, init="torch", seed=0)
    x = torch.rand(4, 12)
    head, h = model.encoder.logvar, model.encoder.hidden(x)
    mu, logvar = model.encoder(x)
    torch.testing.assert_close(logvar, 0.1 * (h @ head.weight.T) + head.bias)
    torch.testing.assert_close(mu, model.encoder.mu(h))


def test_lecuns_initial_values_have_variance_one_over_the_inputs():
    narrow, wide = (vf.VAE(12, [9], 3, init=init, seed=0) for init in ("paper", "lecun"))
    for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        factor = 100 / a.shape[1] ** 0.5 if a.dim() == 2 else 1
        torch.testing.assert_close(factor * a, b, msg=name)


def test_from_config_makes_the_same_architecture():
    how = {"mean_activation": "sigmoid", "logvar_scale": 0.3, "init": "torch"}
    model = vf.VAE(12, [9, 5], 3, "gaussian", seed=0, **how)
    assert {name: model.config[name] for name in how} == how
    other = vf.VAE.from_config(model.config)
    other.load_state_dict(model.state_dict())
    x = torch.rand(4, 12)
    assert torch.equal(other(x, seed=1).elbo, model(x, seed=1).elbo)


def test_any_pair_of_modules_will_do():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(x).chunk(2, dim=-1)

    model = vf.VAE(encoder=Encoder(), decoder=nn.Linear(2, 6), latent_dim=2)
    assert model.config is None
    loss = -model(torch.rand(3, 6), seed=0).elbo.mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data_dim": 4, "latent_dim": 2, "likelihood": "poisson"}, "likelihood: got 'poisson', wanted"),
        ({"data_dim": 4}, "data_dim, latent_dim: got 4 and None"),
        ({"data_dim": 0, "latent_dim": 2}, "data_dim: got 0, wanted a positive integer"),
        ({"data_dim": 4, "latent_dim": 2, "hidden_dims": [3, -1]}, "hidden_dims: got -1"),
        ({"data_dim": 4, "latent_dim": 2, "logvar_scale": 0.0}, "logvar_scale: got 0.0, wanted a number"),
        ({"data_dim": 4, "latent_dim": 2, "init": "he"}, "init: got 'he', wanted one of 'paper', 'lecun'"),
        ({"encoder": nn.Identity()}, "encoder, decoder: got one of them"),
        ({"data_dim": 4, "latent_dim": 2, "activation": "gelu"}, "activation: got 'gelu'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        vf.VAE(**arguments)
