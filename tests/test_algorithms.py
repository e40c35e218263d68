"""Wake-sleep, Monte Carlo EM, the auto-encoder and full variational Bayes: gradients, limits, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor, nn

from vae_fast import (
    VAE,
    AutoEncoder,
    FullVB,
    MonteCarloEM,
    Trainer,
    WakeSleep,
    datasets,
    evaluation,
    functional,
    reference,
)
from vae_fast.algorithms.common import Algorithm, substream
from vae_fast.algorithms.full_vb import parameters_to_vector
from vae_fast.batches import MinibatchOrder
from vae_fast.checkpoint import CheckpointError
from vae_fast.engines import Plan, StepProgram
from vae_fast.estimators import sgvb_b

FREY = Path(__file__).resolve().parents[1] / "../shared/data/frey/freyface_1965x28x20_uint8.npz"
ALL = pytest.mark.parametrize("algorithm", [WakeSleep, MonteCarloEM, AutoEncoder, FullVB])


def data(count: int = 130, dim: int = 12) -> Tensor:
    """Rows near one of three patterns: there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(3, dim, generator=generator).round()
    rows = patterns[torch.randint(3, (count,), generator=generator)]
    return 0.1 + 0.8 * rows + 0.05 * torch.rand(count, dim, generator=generator)


def small_model(likelihood: str = "bernoulli") -> VAE:
    return VAE(data_dim=12, hidden_dims=[8], latent_dim=2, likelihood=likelihood, init="torch", seed=0)


def small(algorithm: type[Algorithm], model: VAE | None = None, **options: Any) -> Algorithm:
    few = {"leapfrog_steps": 3, "updates": 2} if algorithm is MonteCarloEM else {}
    how = {"optimizer": "adam", "lr": 0.01, "batch_size": 20, **few, **options}
    return algorithm(model or small_model(), **how)


def fit(trainer: Trainer, train: Any = None, test: Any = None, **options: Any) -> Any:
    how = {"progress": False, "max_samples": 600, **options}
    return trainer.fit(data() if train is None else train, test, **how)


def program(trainer: Trainer, x: Tensor, ops: Any = functional) -> StepProgram:
    """The trainer's step, about to take the first minibatch of x."""
    source = trainer._source(x)
    made = trainer._program_type()(ops, trainer.model, trainer.optimizer, source, Plan(), trainer.device)
    made.load(0, 1)
    return made


def gradients(objective: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(objective.mean(), list(module.parameters()), retain_graph=True))


def posterior(model: LinearGaussian, x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of p(z|x)."""
    exact = LinearGaussian()
    exact.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("chains")})
    exact.use_exact_posterior()
    with torch.no_grad():
        mean, logvar = exact.encoder(x)
    return mean, (0.5 * logvar).exp()


def test_monte_carlo_em_accumulates_for_ten_updates() -> None:
    trainer = small(MonteCarloEM, optimizer="adagrad", updates=5)
    before = trainer.model.decoder.logits.weight.detach().clone()
    fit(trainer, max_samples=40)
    assert torch.equal(trainer.model.decoder.logits.weight, before)
    fit(trainer, max_samples=20)
    assert not torch.equal(trainer.model.decoder.logits.weight, before)


# --- what all share -----------------------------------------------------------------------------------------


@ALL
def test_training_raises_what_it_ascends(algorithm: type[Algorithm]) -> None:
    trainer = small(algorithm, lr=0.02)
    history = fit(trainer, data(400)[:300], data(400)[300:], max_samples=4000, report_every=400)
    assert history.last.train_bound > history[0].train_bound + 0.5
    assert history.last.test_bound > history[0].test_bound
    assert trainer.samples_seen == 4000


@ALL
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_killed_run_goes_on_bit_for_bit(
    algorithm: type[Algorithm], likelihood: str, tmp_path: Path
) -> None:
    whole = small(algorithm, small_model(likelihood))
    fit(whole, max_samples=1000, report_every=250)
    first = small(algorithm, small_model(likelihood))
    fit(first, max_samples=500, report_every=250, checkpoint=tmp_path / "run.safetensors")
    second = algorithm.load(tmp_path / "run.safetensors")
    assert type(second) is algorithm
    fit(second, max_samples=500, report_every=250)
    tensors = whole.state_dict()["tensors"]
    assert tensors.keys() == second.state_dict()["tensors"].keys()
    assert all(torch.equal(t, second.state_dict()["tensors"][name]) for name, t in tensors.items())
    assert [r.train_bound for r in whole.history] == [r.train_bound for r in second.history]


@ALL
def test_the_engines_give_the_same_curve(algorithm: type[Algorithm]) -> None:
    curves = []
    for engine in ("modules", "reference"):
        trainer = small(algorithm, small_model().double(), engine=engine, optimizer="sgd")
        curves.append(fit(trainer, max_samples=400, report_every=100).to_dict()["train_bound"])
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-6, atol=0)


@ALL
def test_minibatches_are_drawn_with_replacement(algorithm: type[Algorithm]) -> None:
    assert small(algorithm).settings.order == "replacement"
    assert small(algorithm, order="shuffle").settings.order == "shuffle"


@ALL
@pytest.mark.parametrize(("name", "value"), [("estimator", "sgvb_a"), ("beta", 2.0), ("nonsense", 1)])
def test_options_that_an_algorithm_has_not_are_refused(
    algorithm: type[Algorithm], name: str, value: Any
) -> None:
    with pytest.raises(
        TypeError, match=f"{name}: got {value!r}, but {algorithm.__name__} has no such choice"
    ):
        small(algorithm, **{name: value})


@ALL
def test_a_checkpoint_of_another_algorithm_is_refused(algorithm: type[Algorithm], tmp_path: Path) -> None:
    fit(small(algorithm), max_samples=20, checkpoint=tmp_path / "run.safetensors")
    with pytest.raises(CheckpointError, match="wanted a checkpoint of a Trainer"):
        Trainer.load(tmp_path / "run.safetensors")


def test_substreams_do_not_repeat() -> None:
    seeds = [int(substream(seed, k, torch.device("cpu"))) for seed in (-5, 0, 7) for k in range(50)]
    assert len(set(seeds)) == len(seeds)
    tensor = substream(torch.tensor([7]), 3, torch.device("cpu"))
    assert int(tensor) == int(substream(7, 3, torch.device("cpu")))


# --- wake-sleep ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("ops", [functional, reference], ids=["functional", "reference"])
def test_the_wake_gradient_is_that_of_sgvb_for_the_decoder(likelihood: str, ops: Any) -> None:
    model, x = small_model(likelihood).double(), data(20).double()
    estimate = program(small(WakeSleep, model), x, ops).estimate_batch(x, 7)
    wanted = sgvb_b(model, x, 7, 1, 1.0, ops)
    for got, want in zip(
        gradients(estimate.objective, model.decoder), gradients(wanted.objective, model.decoder), strict=True
    ):
        torch.testing.assert_close(got, want)
        assert got.abs().max() > 0
    torch.testing.assert_close(estimate.log_likelihood, wanted.log_likelihood)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_sleep_gradient_is_that_of_log_q_of_a_dream(likelihood: str) -> None:
    """And of nothing else: the data do not reach the encoder's gradient."""
    model, x = small_model(likelihood).double(), data(20).double()
    step = program(small(WakeSleep, model), x)
    dreamed_z, dreamed_x = step._dream(torch.Size((20, 2)), 7)  # type: ignore[attr-defined]
    mu, logvar = model.encoder(dreamed_x.detach())
    log_q = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(dreamed_z).sum(-1)
    for other in (x, x.flip(0) / 2):
        got = gradients(step.estimate_batch(other, 7).objective, model.encoder)
        for ours, wanted in zip(got, gradients(log_q, model.encoder), strict=True):
            torch.testing.assert_close(ours, wanted)


def test_the_bound_is_log_p_of_x_and_z_minus_log_q() -> None:
    model, x = small_model().double(), data(20).double()
    estimate = program(small(WakeSleep, model), x).estimate_batch(x, 7)
    mu, logvar = model.encoder(x)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    z = reference.reparameterize(mu, logvar, seed=7)
    log_p = torch.distributions.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).sum(-1)
    log_p = log_p + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(estimate.log_likelihood - estimate.kl, log_p - q.log_prob(z).sum(-1))


def test_dreams_are_draws_of_the_model() -> None:
    model = small_model().double()
    step = program(small(WakeSleep, model), data())
    z, x = step._dream(torch.Size((20_000, 2)), 3)  # type: ignore[attr-defined]
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert (z.mean(0).abs() < 4 / math.sqrt(20_000)).all()
    p = torch.sigmoid(model.decoder(z))
    assert ((x - p).mean(0).abs() < 4 * (p * (1 - p)).mean(0).sqrt() / math.sqrt(20_000)).all()
    assert ((x - p) * z[:, :1]).mean().abs() < 0.01


def test_asleep_a_linear_encoder_learns_the_exact_posterior() -> None:
    model = LinearGaussian()
    model.decoder.requires_grad_(False)
    model.use_exact_posterior()
    model.encoder.linear.weight.data *= 0.7
    model.encoder.logvar.data += 0.7
    trainer = small(WakeSleep, model, batch_size=500, lr=0.02)
    fit(trainer, model.draw(500).float(), max_samples=500 * 200)
    x = model.draw(50)
    mean, deviation = posterior(model, x)
    with torch.no_grad():
        mu, logvar = model.encoder(x)
    assert ((mu - mean) / deviation).abs().max() < 0.5
    torch.testing.assert_close((0.5 * logvar).exp(), deviation, rtol=0.1, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(not FREY.exists(), reason=f"needs {FREY}")
def test_on_frey_face_it_collapses_to_one_gaussian_per_pixel() -> None:
    """Which scores 577 nats on the paper's training set; the paper's wake-sleep curve is at 577 to 579."""
    train, _ = datasets.split(datasets.frey_face(FREY), 365)
    pixels = train.double() / 256
    per_pixel = torch.distributions.Normal(pixels.mean(0), pixels.std(0, correction=0)).log_prob(pixels)
    assert per_pixel.sum(1).mean().item() == pytest.approx(577, abs=2)
    model = VAE(560, [50], 2, "gaussian", mean_activation="sigmoid", seed=0)
    trainer = WakeSleep(model, lr=0.02, pixel_scale=256)
    history = fit(trainer, train, max_samples=100_000, report_every=20_000)
    assert history.last.train_bound == pytest.approx(577, abs=5)


# --- Monte Carlo EM -----------------------------------------------------------------------------------------


def frozen(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-20)


def test_its_chains_sample_the_posterior_of_every_datapoint() -> None:
    model = LinearGaussian()
    x = model.draw(400).float()
    trainer = MonteCarloEM(model, optimizer=frozen, batch_size=200, order="shuffle", updates=1)
    fit(trainer, x, max_samples=400 * 60)
    mean, deviation = posterior(model, x.double())
    standard = (model.chains.z - mean) / deviation
    assert (standard.mean(0).abs() < 4 / math.sqrt(400)).all()
    assert ((standard**2).mean(0) - 1).abs().max() < 4 * math.sqrt(2 / 400)


def test_a_step_moves_the_chains_of_its_minibatch_alone() -> None:
    trainer = small(MonteCarloEM, batch_size=30)
    step = program(trainer, data(100))
    chains = trainer.model.chains
    chains.step_size.fill_(0.1)
    before = chains.z.clone()
    step(30)
    rows = set(MinibatchOrder(100, 30, 0, "replacement").rows(0, 1)[0].tolist())
    moved = (chains.z != before).any(1).nonzero().flatten().tolist()
    assert len(rows) < 30, "a row was drawn twice"
    assert set(moved) <= rows and len(moved) > len(rows) / 2


def test_there_are_as_many_weight_updates_as_asked_for_and_one_minibatch() -> None:
    trainer = small(MonteCarloEM, optimizer="adagrad", updates=5)
    fit(trainer, max_samples=200)
    steps = {int(trainer.optimizer.state[p]["step"]) for p in trainer.model.decoder.parameters()}
    assert (steps, trainer.step_count, trainer.samples_seen) == ({50}, 10, 200)


def test_the_encoder_stays_as_it_is() -> None:
    model = small_model()
    before = [p.clone() for p in model.encoder.parameters()]
    fit(small(MonteCarloEM, model))
    assert all(torch.equal(p, b) for p, b in zip(model.encoder.parameters(), before, strict=True))


def test_the_columns_are_the_complete_datas_log_likelihood() -> None:
    trainer = MonteCarloEM(small_model(), optimizer=frozen, batch_size=130, order="shuffle")
    row = fit(trainer, max_samples=130).last
    z = trainer.model.chains.z[MinibatchOrder(130, 130, 0).rows(0, 1)[0]]
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1).mean().item()
    assert row.train_kl == pytest.approx(-prior, rel=1e-5)
    assert row.train_bound == pytest.approx(row.train_log_likelihood + prior, rel=1e-5)


def test_monte_carlo_em_raises_the_likelihood_of_1000_images() -> None:
    train = datasets.mnist()[0][:1000]
    model = VAE(data_dim=784, hidden_dims=[30], latent_dim=2, seed=0)

    def likelihood() -> float:
        return evaluation.marginal_likelihood(model, train[:50], burn_in=30, num_samples=20).mean

    before = likelihood()
    fit(MonteCarloEM(model, lr=0.05), train, max_samples=100 * 50)
    assert likelihood() > before + 300


@pytest.mark.parametrize("algorithm", [MonteCarloEM, FullVB])
def test_streams_are_refused_where_the_number_of_datapoints_matters(algorithm: type[Algorithm]) -> None:
    with pytest.raises(ValueError, match="train: got a stream, wanted an array"):
        fit(small(algorithm), iter([data()]))


def test_chains_belong_to_their_datapoints() -> None:
    trainer = small(MonteCarloEM)
    fit(trainer)
    with pytest.raises(ValueError, match="train: got 100 datapoints, wanted the 130"):
        fit(trainer, data(100))


@pytest.mark.parametrize(("name", "value"), [("leapfrog_steps", 0), ("updates", 0), ("acceptance", 1.0)])
def test_a_bad_argument_of_monte_carlo_em_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        small(MonteCarloEM, **{name: value})


# --- the auto-encoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_auto_encoder_descends_the_squared_error_summed_over_features(likelihood: str) -> None:
    model, x = small_model(likelihood).double(), data(20).double()
    estimate = program(small(AutoEncoder, model), x).estimate_batch(x, 7)
    decoded = model.decoder(model.encoder(x)[0])
    y = torch.sigmoid(decoded) if likelihood == "bernoulli" else decoded[0]
    torch.testing.assert_close(estimate.objective, -((x - y) ** 2).sum(-1))
    assert (estimate.kl == 0).all()
    assert evaluation.squared_error(model, x.float()) == pytest.approx(((x - y) ** 2).sum(-1).mean().item())


def test_a_linear_auto_encoder_comes_to_the_error_of_principal_components() -> None:
    x = data(100).float()
    x = (x - x.mean(0)) * 3
    encoder, decoder = _Heads(12, 2, bias=False), _Heads(2, 12, bias=False)
    model = VAE(encoder=encoder, decoder=decoder, likelihood="gaussian")
    trainer = small(AutoEncoder, model, batch_size=100, order="shuffle", lr=0.02)
    row = fit(trainer, x, x, max_samples=100 * 600).last
    discarded = torch.linalg.svdvals(x)[2:].square().sum().item() / 100
    assert discarded * 0.999 < -row.test_bound < discarded * 1.15


class _Heads(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, bias: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(fan_in)
        self.mean, self.logvar = (nn.Linear(fan_in, fan_out, bias=bias) for _ in range(2))
        for p in self.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), self.logvar(x)


# --- full variational Bayes ---------------------------------------------------------------------------------


class _Design(nn.Module):
    """z is the first columns of x, without uncertainty."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.device = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = x[:, : self.columns].contiguous()
        return z, torch.full_like(z, -60.0)


class _Regression(nn.Module):
    """p(x|z): the columns of the design are noise, the others W z plus noise of variance 1/4."""

    def __init__(self, columns: int, outputs: int) -> None:
        super().__init__()
        self.columns = columns
        self.weight = nn.Parameter(torch.zeros(outputs, columns, dtype=torch.float64))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.cat((torch.zeros_like(z), z @ self.weight.T), dim=-1)
        return mean, torch.full_like(mean, math.log(0.25))


def test_the_posterior_over_the_weights_of_a_linear_gaussian_decoder_is_the_exact_one() -> None:
    """With z known and an orthogonal design, p(W|X) is a Gaussian with a diagonal covariance: what q can be.

    Z^T Z = N I: the precision of every weight is N / sigma^2 + 1, its mean (Z^T Y / sigma^2) / precision.
    """
    count, generator = 8, torch.Generator().manual_seed(0)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    z = signs.repeat(count // 4, 1)
    weight = torch.tensor([[1.0, -0.7]]).double()
    y = z @ weight.T + 0.5 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    x = torch.cat((z, y), dim=1).float()
    precision = count / 0.25 + 1
    mean = (z.T @ x[:, 2:].double() / 0.25 / precision).T

    model = VAE(encoder=_Design(2), decoder=_Regression(2, 1), likelihood="gaussian")
    options = {"batch_size": count, "order": "shuffle", "weight_samples": count, "initial_logvar": -3.0}
    trainer = FullVB(model, optimizer="adam", lr=0.02, **options)
    fit(trainer, x, max_samples=150 * count)
    means, variances = [], []
    for _ in range(80):  # the average over the path of stochastic ascent
        fit(trainer, x, max_samples=10 * count)
        means.append(model.decoder.weight.detach().clone())
        variances.append(model.decoder_logvar.detach().exp())
    torch.testing.assert_close(torch.stack(means).mean(0), mean, rtol=0.05, atol=0)
    variance = torch.stack(variances).mean(0)
    torch.testing.assert_close(variance, torch.full_like(variance, 1 / precision), rtol=0.05, atol=0)


@pytest.mark.parametrize("weight_samples", [1, 3, 12, 20])
def test_the_terms_are_those_of_equation_24(weight_samples: int) -> None:
    """Each part of the minibatch with a draw of theta of its own, and both divergences exact."""
    model, x = small_model().double(), data(20).double()
    trainer = small(FullVB, model, weight_samples=weight_samples, initial_logvar=-3.0)
    estimate = program(trainer, x).estimate_batch(x, 7)
    flat, deviation = parameters_to_vector(model.decoder), math.exp(-1.5)
    mu, logvar = model.encoder(x)
    z = mu + (0.5 * logvar).exp() * reference.philox_normal((20, 2), seed=7, dtype=torch.float64)
    log_likelihood = []
    parts = [part.tensor_split(weight_samples) for part in (x, z)]
    assert len(parts[0]) == weight_samples
    for i, (part, z_part) in enumerate(zip(*parts, strict=True)):
        zeta = reference.philox_normal(
            flat.shape, seed=substream(7, i + 1, torch.device("cpu")), dtype=torch.float64
        )
        decoder = VAE(12, [8], 2).decoder.double()
        nn.utils.vector_to_parameters(flat.detach() + deviation * zeta, decoder.parameters())
        p = torch.distributions.Bernoulli(logits=decoder(z_part), validate_args=False)
        log_likelihood.append(p.log_prob(part).sum(-1))
    normal, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(flat, deviation)
    kl_theta = torch.distributions.kl_divergence(q, normal).sum() / 20
    kl_z = torch.distributions.kl_divergence(torch.distributions.Normal(mu, (0.5 * logvar).exp()), normal)
    torch.testing.assert_close(estimate.log_likelihood, torch.cat(log_likelihood))
    torch.testing.assert_close(estimate.kl, kl_z.sum(-1) + kl_theta)
    torch.testing.assert_close(estimate.objective, estimate.log_likelihood - estimate.kl)


def test_a_draw_is_a_model_of_its_own_weights_and_the_shared_encoder() -> None:
    model = small_model()
    trainer = small(FullVB, model, initial_logvar=-2.0)
    draws = torch.stack([parameters_to_vector(trainer.draw(s).decoder).detach() for s in range(200)])
    flat = parameters_to_vector(model.decoder).detach()
    assert trainer.draw(0).encoder is model.encoder
    assert ((draws.mean(0) - flat).abs() < 5 * math.exp(-1) / math.sqrt(200)).all()
    assert draws.std(0).mean().item() == pytest.approx(math.exp(-1), rel=0.05)
    assert torch.equal(parameters_to_vector(trainer.draw(3).decoder), draws[3])


def test_full_variational_bayes_raises_its_bound_on_mnist() -> None:
    """Both bounds: with the price of the weights over all training data, and of the test data without."""
    train, test = (part[:n] for part, n in zip(datasets.mnist(), (20_000, 1000), strict=True))
    model = VAE(data_dim=784, hidden_dims=[50], latent_dim=5, init="paper", seed=0)
    trainer = FullVB(model, lr=0.02, pixel_scale=256)
    history = fit(trainer, train, test, max_samples=100 * 1000, report_every=100 * 500)
    assert -160 > history.last.test_bound > -200
    assert history.last.test_bound > history[0].test_bound + 5
    assert history.last.train_bound > history[0].train_bound + 50
    assert history.last.train_kl > history.last.test_kl + 1
    assert evaluation.bound(model, test, pixel_scale=256).elbo > -200


def test_full_variational_bayes_has_its_own_prior() -> None:
    with pytest.raises(TypeError, match="weight_prior: got True, but FullVB has no such choice"):
        small(FullVB, weight_prior=True)


def test_more_weight_samples_than_datapoints_are_refused() -> None:
    with pytest.raises(ValueError, match="weight_samples: got 21, wanted 1 to batch_size = 20"):
        small(FullVB, weight_samples=21)


@pytest.mark.parametrize("algorithm", [WakeSleep, MonteCarloEM, FullVB, AutoEncoder])
def test_another_posterior_is_refused(algorithm):
    model = VAE(data_dim=4, hidden_dims=[3], latent_dim=2, posterior="logistic")
    with pytest.raises(ValueError, match="model: got the posterior 'logistic'"):
        algorithm(model)
