"""What a model is of use for: the formulas, and that they help on digits that were not trained on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vae_fast import VAE, Trainer, datasets, uses
from vae_fast.distributions import POSTERIORS, Posterior

LATENTS = 10


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> VAE:
    """Two epochs of MNIST: some seconds."""
    model = VAE(784, [200], LATENTS, init="torch", seed=0)
    trainer = Trainer(model, optimizer="adam", lr=1e-3, batch_size=100, seed=0)
    trainer.fit(datasets.mnist()[0], max_samples=120_000, progress=False)
    return model


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """Evenly spaced test images."""
    return datasets.mnist()[1][::20].float() / 255


def small(likelihood: str = "bernoulli", posterior: str | Posterior = "gaussian") -> VAE:
    model = VAE(8, [6], 2, likelihood, posterior=posterior, init="torch", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def rows(count: int = 7) -> Tensor:
    return torch.rand(count, 8, generator=torch.Generator().manual_seed(0))


def mean_squared_error(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().item()


# --- recognition and representation -------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(POSTERIORS))
def test_the_code_of_a_datapoint_is_the_mean_of_its_posterior(family: str) -> None:
    model, x = small(posterior=family), rows()
    codes = uses.encode(model, x, batch_size=3)
    draws = model.posterior.sample(codes.mu, codes.logvar, num_samples=40_000, seed=1)
    error = draws.std(dim=0) / 40_000**0.5
    assert ((codes.mean - draws.mean(dim=0)).abs() < 5 * error).all()
    for found, wanted in zip((codes.mu, codes.logvar), model.encoder(x), strict=True):
        torch.testing.assert_close(found, wanted.detach())


def test_data_are_read_as_in_training() -> None:
    pixels = (255 * rows()).round().to(torch.uint8)
    torch.testing.assert_close(
        uses.encode(small(), pixels).mean, uses.encode(small(), pixels.float() / 255).mean
    )


def test_a_reconstruction_is_decoded_at_the_posterior_mean() -> None:
    model, x = small(posterior="log_normal"), rows()
    wanted = model.decode_mean(uses.encode(model, x).mean).detach()
    torch.testing.assert_close(uses.reconstruct(model, x, batch_size=3), wanted)


def test_a_linear_classifier_on_the_codes_beats_one_on_as_many_principal_components(trained: VAE) -> None:
    (train, test), (labels, test_labels) = datasets.mnist(), datasets.mnist_labels()
    of_codes = accuracy(
        uses.encode(trained, train).mean, labels, uses.encode(trained, test).mean, test_labels
    )
    x, x_test = train.float() / 255, test.float() / 255
    centre = x.mean(dim=0)
    _, vectors = torch.linalg.eigh((x - centre).T @ (x - centre))
    axes = vectors[:, -LATENTS:]
    of_components = accuracy((x - centre) @ axes, labels, (x_test - centre) @ axes, test_labels)
    said = f"{of_codes:.4f} of the test digits on codes, {of_components:.4f} on principal components"
    assert of_codes > of_components + 0.02, said
    assert of_components == pytest.approx(0.7175, abs=0.005), said  # the baseline is the known one


def accuracy(x: Tensor, labels: Tensor, x_test: Tensor, test_labels: Tensor) -> float:
    """Of least squares, one against all, with an intercept."""
    with_one, test_with_one = (
        torch.cat([part, torch.ones(len(part), 1)], dim=1).double() for part in (x, x_test)
    )
    targets = torch.nn.functional.one_hot(labels.long(), 10).double()
    weight = torch.linalg.lstsq(with_one, targets).solution
    return ((test_with_one @ weight).argmax(dim=1) == test_labels).double().mean().item()


# --- denoising ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "amount", "most"), [("salt_and_pepper", 0.3, 0.3), ("masking", 0.5, 0.8), ("gaussian", 0.5, 0.4)]
)
def test_denoising_lowers_the_error(
    trained: VAE, digits: Tensor, kind: str, amount: float, most: float
) -> None:
    noisy = uses.corrupt(digits, amount, kind=kind, seed=1)
    before = mean_squared_error(noisy.clamp(0, 1), digits)
    after = mean_squared_error(uses.denoise(trained, noisy, amount, kind=kind), digits)
    assert after < most * before, f"{before:.4f} noisy, {after:.4f} denoised"


def test_the_search_for_z_is_what_denoises(trained: VAE, digits: Tensor) -> None:
    noisy = uses.corrupt(digits, 0.3)
    encoder_alone = mean_squared_error(uses.denoise(trained, noisy, 0.3, steps=0), digits)
    found = mean_squared_error(uses.denoise(trained, noisy, 0.3), digits)
    assert found < 0.6 * encoder_alone, f"{encoder_alone:.4f} by the encoder, {found:.4f} by the search"


def test_without_steps_it_is_the_reconstruction_of_the_noisy_data() -> None:
    model, x = small(), rows()
    torch.testing.assert_close(uses.denoise(model, x, 0.3, steps=0), uses.reconstruct(model, x))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("kind", uses.CORRUPTIONS)
def test_the_z_of_the_search_is_the_best_on_a_fine_grid(kind: str, likelihood: str) -> None:
    """The documented log posterior, written out with torch.distributions, over all z in reach."""
    model = small(likelihood)
    amount = 0.4
    x = uses.corrupt(rows(1).round() if likelihood == "bernoulli" else rows(1), amount, kind=kind, seed=2)
    axis = torch.linspace(-3, 3, 601)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        decoded = model.decoder(z)
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        likelihoods = prior + noisy_log_likelihood(likelihood, decoded, x, amount, kind).sum(-1)
        best = model.decode_mean(z[likelihoods.argmax()])
    found = uses.denoise(model, x, amount, kind=kind, steps=400)
    torch.testing.assert_close(found[0], best, atol=0.01, rtol=0)


def noisy_log_likelihood(likelihood: str, decoded: object, x: Tensor, r: float, kind: str) -> Tensor:
    if likelihood == "bernoulli":
        p = torch.distributions.Bernoulli(logits=decoded)  # type: ignore[arg-type]
        if kind == "gaussian":
            return torch.distributions.Normal(p.mean, r).log_prob(x)
        by_noise = {"salt_and_pepper": torch.full_like(x, r / 2), "masking": r * (x == 0)}[kind]
        return ((1 - r) * p.log_prob(x).exp() + by_noise).log()
    mean, logvar = decoded  # type: ignore[misc]
    if kind == "gaussian":
        return torch.distributions.Normal(mean, (logvar.exp() + r**2).sqrt()).log_prob(x)
    told = (x != 0) & ((x != 1) | (kind == "masking"))
    return told * torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(x)


def test_noise_is_of_the_kind_and_amount_asked_for() -> None:
    x = torch.full((200, 500), 0.5)
    salted = uses.corrupt(x, 0.3, seed=1)
    shares = [(salted == value).double().mean().item() for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.15, 0.7, 0.15], abs=0.006)
    masked = uses.corrupt(x, 0.3, kind="masking", seed=1)
    assert [(masked == v).double().mean().item() for v in (0.0, 0.5)] == pytest.approx([0.3, 0.7], abs=0.006)
    added = uses.corrupt(x, 0.3, kind="gaussian", seed=1) - x
    assert added.mean().item() == pytest.approx(0, abs=0.004)
    assert added.std().item() == pytest.approx(0.3, abs=0.003)


@pytest.mark.parametrize("kind", uses.CORRUPTIONS)
def test_noise_is_a_function_of_the_seed(kind: str) -> None:
    x = rows(50)
    assert torch.equal(uses.corrupt(x, 0.3, kind=kind, seed=4), uses.corrupt(x, 0.3, kind=kind, seed=4))
    assert not torch.equal(uses.corrupt(x, 0.3, kind=kind, seed=4), uses.corrupt(x, 0.3, kind=kind, seed=5))


def test_the_model_is_left_as_it_was() -> None:
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    uses.denoise(model, rows(), 0.3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rain"}, "kind: got 'rain', wanted one of 'salt_and_pepper'"),
        ({"amount": 1.0}, "amount: got 1.0, wanted a share between 0 and 1"),
        ({"amount": 0.0, "kind": "gaussian"}, "amount: got 0.0, wanted a positive number"),
        ({"amount": float("nan")}, "amount: got nan"),
        ({"steps": -1}, "steps: got -1"),
    ],
)
def test_a_bad_argument_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uses.denoise(small(), rows(), **{"amount": 0.3, **options})  # type: ignore[arg-type]


def test_data_that_are_not_finite_are_refused() -> None:
    with pytest.raises(datasets.DataError, match="nan"):
        uses.denoise(small(), torch.full((2, 8), torch.nan), 0.3)


# --- visualisation ------------------------------------------------------------------------------------------


def test_images_of_the_manifold_stand_at_the_quantiles_of_the_prior() -> None:
    model = small()
    z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([1 / 6, 3 / 6, 5 / 6]))
    for row in range(3):
        for column in range(3):
            wanted = model.decode_mean(torch.stack([z[column], z[2 - row]])).detach()
            torch.testing.assert_close(uses.manifold(model, 3)[3 * row + column], wanted)
