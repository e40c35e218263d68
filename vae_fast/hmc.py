"""Hamiltonian Monte Carlo, many chains at once.

A density is a function ``log_density(z)`` from ``[B, Z]`` to ``[B]`` in nats, up to a constant for each
chain; row b of its result may depend on row b of z alone. One gradient of the whole batch is taken per
leapfrog step, and nothing waits for the device, so that a transition can be part of a CUDA graph.

Sources: Duane, Kennedy, Pendleton & Roweth, *Hybrid Monte Carlo*, Physics Letters B 195, 1987; Neal, *MCMC
using Hamiltonian dynamics*, arXiv:1206.1901. The rule for the step size is that of the published code of the
authors of arXiv:1312.6114.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batches import uniform_words
from .estimators import CHAIN, log_prior, step_seed
from .functional import philox_normal
from .reference import signed64

LogDensity = Callable[[Tensor], Tensor]

TARGET_ACCEPTANCE = 0.9
# Each step size is scaled by a number from [1 - JITTER, 1 + JITTER], new for every chain and transition.
# Without it a chain whose trajectories are half a period of a Gaussian long goes between two points for ever.
JITTER = 0.3


class State(NamedTuple):
    """Where B chains are: z ``[B, Z]``, the log-density there ``[B]`` and its gradient ``[B, Z]``."""

    z: Tensor
    log_density: Tensor
    grad: Tensor


class Samples(NamedTuple):
    """What :func:`sample` returns: z ``[L, B, Z]``, their log-density ``[L, B]``, and how the chains went.

    ``acceptance`` ``[B]`` is the share of each chain's L proposals that it took; ``step_size`` ``[B]`` what
    they were made with.
    """

    z: Tensor
    log_density: Tensor
    acceptance: Tensor
    step_size: Tensor


def log_joint(model: Any, x: Tensor) -> LogDensity:
    """z -> log p(x, z) = log p(x|z) + log p(z): the posterior's density, up to the constant log p(x).

    x: ``[B, D]``; model: a :class:`vae_fast.VAE`, or anything with its ``decoder`` and ``log_likelihood``.
    """

    def log_density(z: Tensor) -> Tensor:
        log_likelihood: Tensor = model.log_likelihood(model.decoder(z), x)
        return log_likelihood + log_prior(z)

    return log_density


def state_at(log_density: LogDensity, z: Tensor) -> State:
    """The chains at z ``[B, Z]``, which is not changed."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        values = log_density(z)
        (grad,) = torch.autograd.grad(values.sum(), z)
    return State(z.detach(), values.detach(), grad)


def leapfrog(
    log_density: LogDensity, state: State, momentum: Tensor, step_size: float | Tensor, steps: int
) -> tuple[State, Tensor]:
    """``steps`` leapfrog steps of the dynamics with energy H = -log p(z) + |momentum|^2 / 2, unit masses.

    Half a step of the momentum, then steps of z and of the momentum by turns, then the other half: reversible
    (negate the momentum and go back), it keeps volumes, and its error in H goes with step_size^2, which is
    one number or ``[B, 1]``.
    """
    momentum = momentum + 0.5 * step_size * state.grad
    for step in range(steps):
        state = state_at(log_density, state.z + step_size * momentum)
        momentum = momentum + (0.5 if step == steps - 1 else 1.0) * step_size * state.grad
    return state, momentum


def transition(
    log_density: LogDensity,
    state: State,
    step_size: float | Tensor,
    *,
    leapfrog_steps: int,
    seed: int | Tensor,
) -> tuple[State, Tensor]:
    """One step of every chain: fresh momenta, leapfrog steps, and Metropolis' rule for each chain by itself.

    Args:
        log_density: the density that the chains leave invariant.
        state: where they are.
        step_size: of the leapfrog steps, before its jitter; one number or ``[B]``.
        leapfrog_steps: how many of them; each takes one gradient.
        seed: momenta are ``philox_normal(z.shape, seed)``. With u = (w + 1/2) / 2**32 for the words w
            ``[2, B]`` of :func:`vae_fast.batches.uniform_words` and the same seed, chain b moves if u_0b <
            exp(H before - H after), and its steps have size ``step_size * (1 + JITTER (2 u_1b - 1))``.

    Returns:
        Where they are now, and which of them moved, bool ``[B]``. A proposal whose energy is not finite is
        not taken, and the other chains do not notice.
    """
    if not isinstance(seed, Tensor):
        seed = torch.full((1,), signed64(seed), dtype=torch.int64, device=state.z.device)
    momentum = philox_normal(state.z.shape, seed=seed, dtype=state.z.dtype)
    uniform = (uniform_words((2, len(state.z)), seed).double() + 0.5) / 2**32
    jittered = (step_size * (1 + JITTER * (2 * uniform[1] - 1)).to(state.z)).unsqueeze(-1)
    proposal, last = leapfrog(log_density, state, momentum, jittered, leapfrog_steps)
    kinetic_gain = 0.5 * (last**2 - momentum**2).sum(dim=-1)
    log_ratio = proposal.log_density - state.log_density - kinetic_gain
    # A comparison with NaN is false. No chain could leave a place of density +inf, or of a gradient of NaN.
    allowed = proposal.log_density.isfinite() & proposal.grad.isfinite().all(dim=-1)
    moved = allowed & (uniform[0].log() < log_ratio)
    row = moved.unsqueeze(-1)
    return State(
        torch.where(row, proposal.z, state.z),
        torch.where(moved, proposal.log_density, state.log_density),
        torch.where(row, proposal.grad, state.grad),
    ), moved


def tuned(step_size: Tensor, moved: Tensor, state: State, target: float = TARGET_ACCEPTANCE) -> Tensor:
    """The next step size: times f if at least the share ``target`` of the chains moved, else divided by f.

    f = min(1.25, 1.02^B) for B chains: the more of them, the surer their share. A chain whose density is not
    finite where it is (``state``) never moves, whatever the step size, and does not count.
    """
    factor = min(1.25, 1.02 ** min(moved.numel(), 100))
    live = state.log_density.isfinite().sum()
    return torch.where(moved.sum() < target * live, step_size / factor, step_size * factor)


def sample(
    log_density: LogDensity,
    z: Tensor,
    *,
    num_samples: int,
    burn_in: int,
    leapfrog_steps: int,
    step_size: float = 0.1,
    target: float = TARGET_ACCEPTANCE,
    seed: int = 0,
) -> Samples:
    """``num_samples`` states of every chain, one per transition, after ``burn_in`` transitions.

    Step sizes are tuned to an acceptance rate of ``target`` during the burn-in and then stay: a chain that
    goes on tuning does not keep its density. The first half of the burn-in tunes one for all chains
    (:func:`tuned`), which is quick; the second gives each chain its own, because posteriors differ in width::

        log step_size_b += 0.5 (moved_b - target)

    Args:
        log_density: see the module.
        z: where the chains begin, ``[B, Z]``.
        num_samples, burn_in, leapfrog_steps: how long.
        step_size: the first one, of all.
        seed: transition t has the seed ``step_seed(seed, t, CHAIN)``.
    """
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("burn_in", burn_in, 0),
        ("leapfrog_steps", leapfrog_steps, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: got {value}, wanted an integer of {least} or more")
    if not step_size > 0:
        raise ValueError(f"step_size: got {step_size}, wanted a number above 0")
    if not 0 < target < 1:
        raise ValueError(f"target: got {target}, wanted a number between 0 and 1")
    state = state_at(log_density, z)
    size = torch.full(z.shape[:1], step_size, dtype=z.dtype, device=z.device)
    zs: list[Tensor] = []
    log_densities: list[Tensor] = []
    moves: list[Tensor] = []
    for t in range(burn_in + num_samples):
        state, moved = transition(
            log_density, state, size, leapfrog_steps=leapfrog_steps, seed=step_seed(seed, t, CHAIN)
        )
        if t < burn_in // 2:
            size = tuned(size, moved, state, target)
        elif t < burn_in:
            size = size * (0.5 * (moved.to(size) - target)).exp()
        else:
            zs.append(state.z)
            log_densities.append(state.log_density)
            moves.append(moved)
    acceptance = torch.stack(moves).double().mean(dim=0)
    return Samples(torch.stack(zs), torch.stack(log_densities), acceptance, size)
