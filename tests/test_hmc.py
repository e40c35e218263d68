"""Hamiltonian Monte Carlo: the density it keeps, the order of its integrator, and chains that stay apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vae_fast import VAE, hmc

MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.8, 0.0], [0.8, 2.0, -0.5], [0.0, -0.5, 0.7]], dtype=torch.float64)
GAUSSIAN = torch.distributions.MultivariateNormal(MEAN, COVARIANCE, validate_args=False)


def quartic(z: Tensor) -> Tensor:
    """A density whose dynamics have no closed form."""
    return -(z**4).sum(-1) / 4 - (z[:, 0] * z[:, 1]) ** 2 / 2


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energy(state: hmc.State, momentum: Tensor) -> Tensor:
    return (momentum**2).sum(-1) / 2 - state.log_density


def test_the_samples_have_the_mean_and_covariance_of_a_correlated_gaussian() -> None:
    chains = 4000
    samples = hmc.sample(
        GAUSSIAN.log_prob, torch.zeros(chains, 3).double(), num_samples=5, burn_in=60, leapfrog_steps=8
    )
    last = samples.z[-1]  # one state of each chain: independent draws
    assert ((last.mean(0) - MEAN).abs() < 4 * (COVARIANCE.diagonal() / chains).sqrt()).all()
    spread = COVARIANCE.diagonal().outer(COVARIANCE.diagonal()) + COVARIANCE**2
    assert ((last.T.cov() - COVARIANCE).abs() < 4 * (spread / chains).sqrt()).all()


def test_a_large_step_size_changes_the_acceptance_and_not_the_density() -> None:
    """Without Metropolis' rule the variance would be 1 / (1 - step_size^2 / 4): 2.3 here."""
    state = hmc.state_at(lambda z: -(z**2).sum(-1) / 2, normals(20_000, 1))
    rate = []
    for seed in range(10):
        state, moved = hmc.transition(
            lambda z: -(z**2).sum(-1) / 2, state, 1.5, leapfrog_steps=3, seed=seed + 1
        )
        rate.append(moved.double().mean())
    assert torch.stack(rate).mean() < 0.95
    assert (state.z**2).mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 20_000))


def test_the_error_in_the_energy_is_of_second_order() -> None:
    state, momentum = hmc.state_at(quartic, normals(50, 2)), normals(50, 2, seed=1)
    errors = []
    for steps in (50, 100, 200):
        end, last = hmc.leapfrog(quartic, state, momentum, 1.0 / steps, steps)
        errors.append((energy(end, last) - energy(state, momentum)).abs().mean().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_the_dynamics_can_be_reversed() -> None:
    state, momentum = hmc.state_at(quartic, normals(50, 2)), normals(50, 2, seed=1)
    there, last = hmc.leapfrog(quartic, state, momentum, 0.1, 20)
    back, first = hmc.leapfrog(quartic, there, -last, 0.1, 20)
    assert (there.z - state.z).abs().mean() > 0.5
    torch.testing.assert_close(back.z, state.z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(first, -momentum, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", [1e-3, 10.0])
def test_the_acceptance_rate_reaches_the_target(first: float) -> None:
    samples = hmc.sample(
        GAUSSIAN.log_prob,
        normals(1000, 3),
        num_samples=10,
        burn_in=60,
        leapfrog_steps=4,
        step_size=first,
    )
    assert samples.acceptance.mean().item() == pytest.approx(0.9, abs=0.06)


def test_a_narrow_density_among_wide_ones_has_a_step_size_of_its_own() -> None:
    width = torch.ones(100).double()
    width[7] = 0.02

    def log_density(z: Tensor) -> Tensor:
        return -((z / width[:, None]) ** 2).sum(-1) / 2

    samples = hmc.sample(
        log_density, width[:, None] * normals(100, 2), num_samples=50, burn_in=100, leapfrog_steps=4
    )
    assert samples.acceptance[7] > 0.5
    assert samples.step_size[7] < 0.1 * samples.step_size.median()


def test_the_step_size_moves_by_the_rule_of_the_authors() -> None:
    size = torch.tensor(1.0, dtype=torch.float64)
    for chains, factor in ((1, 1.02), (5, 1.02**5), (100, 1.25)):
        state = hmc.state_at(GAUSSIAN.log_prob, torch.zeros(chains, 3).double())
        for moved, wanted in ((True, factor), (False, 1 / factor)):
            got = hmc.tuned(size, torch.full((chains,), moved), state)
            assert got.item() == pytest.approx(wanted)


def test_a_chain_with_nan_stays_where_it_is_and_spoils_no_other() -> None:
    def log_density(z: Tensor) -> Tensor:
        return GAUSSIAN.log_prob(z) * torch.tensor([1.0, 1.0, math.nan, 1.0, 1.0])

    start = normals(5, 3)
    options = {"num_samples": 20, "burn_in": 20, "leapfrog_steps": 4}
    samples = hmc.sample(log_density, start, **options)
    others = [0, 1, 3, 4]
    assert torch.equal(samples.z[:, 2], start[2].expand(20, 3))
    assert samples.acceptance[2] == 0 and (samples.acceptance[others] > 0.5).all()
    assert samples.z[:, others].isfinite().all()


def test_a_proposal_outside_the_support_is_not_taken() -> None:
    def half_line(z: Tensor) -> Tensor:
        """z > 0 has the density exp(-z); the rest none, and no gradient."""
        return torch.where(z[:, 0] > 0, -z[:, 0], torch.full_like(z[:, 0], -math.inf))

    state = hmc.state_at(half_line, torch.ones(2000, 1).double())
    for seed in range(60):
        state, _ = hmc.transition(half_line, state, 0.5, leapfrog_steps=3, seed=seed)
        assert (state.z > 0).all()
    assert state.z.mean().item() == pytest.approx(1, abs=0.1)


def test_trajectories_of_half_a_period_do_not_lock_the_chains() -> None:
    """z -> -z, always: the mean would be right and |z| that of the start."""
    state = hmc.state_at(lambda z: -(z**2).sum(-1) / 2, torch.ones(2000, 1).double())
    for seed in range(15):
        step_size = math.pi / 20
        state, _ = hmc.transition(
            lambda z: -(z**2).sum(-1) / 2, state, step_size, leapfrog_steps=20, seed=seed
        )
    assert (state.z**2).var().item() == pytest.approx(2, abs=0.5)


def test_there_is_one_gradient_per_leapfrog_step_of_the_whole_batch() -> None:
    calls = []

    def counted(z: Tensor) -> Tensor:
        calls.append(len(z))
        return quartic(z)

    hmc.sample(counted, normals(7, 2), num_samples=3, burn_in=2, leapfrog_steps=4)
    assert calls == [7] * (1 + 5 * 4)


def test_chains_are_a_function_of_the_seed() -> None:
    def run(seed: int) -> Tensor:
        options = {"num_samples": 4, "burn_in": 4, "leapfrog_steps": 3}
        return hmc.sample(quartic, torch.ones(6, 2).double(), seed=seed, **options).z

    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_tensor_and_the_number_in_it_give_the_same_transition() -> None:
    state = hmc.state_at(quartic, normals(6, 2))
    options = {"leapfrog_steps": 3}
    number, _ = hmc.transition(quartic, state, 0.3, seed=-9, **options)
    tensor, _ = hmc.transition(quartic, state, 0.3, seed=torch.tensor([-9]), **options)
    assert torch.equal(number.z, tensor.z)


def test_log_joint_is_log_p_of_x_and_z() -> None:
    model = VAE(data_dim=8, hidden_dims=[6], latent_dim=3, init="torch", seed=0)
    x, z = torch.rand(4, 8), torch.randn(4, 3)
    likelihood = torch.distributions.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(hmc.log_joint(model, x)(z), likelihood.sum(-1) + prior.sum(-1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_samples", 0), ("burn_in", -1), ("leapfrog_steps", 0), ("step_size", 0.0), ("target", 1.0)],
)
def test_a_bad_argument_is_named(name: str, value: float) -> None:
    options: dict[str, float] = {"num_samples": 1, "burn_in": 1, "leapfrog_steps": 1, name: value}
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        hmc.sample(quartic, normals(2, 2), **options)  # type: ignore[arg-type]
