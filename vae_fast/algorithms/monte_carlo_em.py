"""Monte Carlo EM with Hamiltonian Monte Carlo, which needs no encoder.

Source: Kingma & Welling, arXiv:1312.6114, appendix E, and the authors' published code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import hmc
from ..datasets import Prepared
from ..engines import ProgramType, StepProgram
from ..estimators import CHAIN, Estimate, log_likelihood, log_prior, step_seed
from ..evaluation import Bound, complete_data
from ..functional import philox_normal
from ..nn import VAE
from ..trainer import Settings
from .common import Algorithm, substream

ACCUMULATED_UPDATES = 10


@dataclass(frozen=True)
class MonteCarloEMSettings(Settings):
    leapfrog_steps: int
    updates: int
    acceptance: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("leapfrog_steps", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted an integer of 1 or more")
        if not 0 < self.acceptance < 1:
            raise ValueError(f"acceptance: got {self.acceptance}, wanted a number between 0 and 1")


class MonteCarloEM(Algorithm):
    """Trains a VAE's decoder on samples of the posterior p(z|x)::

        trainer = MonteCarloEM(model, optimizer="adagrad", lr=0.02, batch_size=100, seed=0)
        history = trainer.fit(train, max_samples=1_000_000)

    A step takes a minibatch and makes

    * an E-step: one transition of Hamiltonian Monte Carlo for each of its datapoints;
    * an M-step: ``updates`` ascents of the mean of log p(x, z) in the decoder's parameters, at these z.

    Every datapoint has a chain of its own, which begins at a draw of the prior and goes on when the datapoint
    is drawn again. The step size of all follows :func:`vae_fast.hmc.tuned`. Both are buffers of
    ``model.chains`` while training, and part of checkpoints. The encoder is neither used nor changed.

    In the history, bound = log p(x, z), the log-likelihood of the complete data, with log_likelihood =
    log p(x|z) and kl = -log p(z): z is the chain's state before the M-step. It is not a bound on log p(x);
    for that, see :func:`vae_fast.evaluation.marginal_likelihood`. The ``test_`` columns are the same for new
    chains, after 20 transitions.

    Args:
        model: its decoder is trained.
        leapfrog_steps: of one transition.
        updates: of the weights, for one transition.
        acceptance: the rate to which the step size is tuned.
        options: as for :class:`vae_fast.Trainer`, with ``order="replacement"``; no ``estimator``,
            ``num_samples`` or ``beta``. A training is of one array: chains belong to its rows. Of
            ``optimizer="adagrad"`` the first 10 updates only accumulate, as in the authors' code.
    """

    kind = "vae_fast.MonteCarloEM"
    settings: MonteCarloEMSettings

    def __init__(
        self,
        model: VAE,
        *,
        leapfrog_steps: int = 10,
        updates: int = 5,
        acceptance: float = hmc.TARGET_ACCEPTANCE,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if self.settings.optimizer == "adagrad":
            for group in self.optimizer.param_groups:
                group["accumulate_steps"] = ACCUMULATED_UPDATES
        self.settings = MonteCarloEMSettings(
            **asdict(self.settings), leapfrog_steps=leapfrog_steps, updates=updates, acceptance=acceptance
        )
        model.chains = None  # type: ignore[assignment]

    def load_state_dict(self, state: Any) -> None:
        saved = state["tensors"].get("model.chains.z")
        if saved is not None:
            self.model.chains = _Chains(torch.empty_like(saved)).to(self.device)
        super().load_state_dict(state)

    def _source(self, train: Any) -> Any:
        source = super()._source(train)
        if source.count is None:
            raise ValueError("train: got a stream, wanted an array: each datapoint has a chain of its own")
        chains: Any = self.model.chains
        if chains is None:
            like = next(self.model.parameters())
            width = self.model.latent_dim or self._latent_dim(source)
            seed = step_seed(self.settings.seed, 0, CHAIN)
            z = philox_normal((source.count, width), seed=seed, dtype=like.dtype, device=self.device)
            self.model.chains = _Chains(z)
        elif len(chains.z) != source.count:
            raise ValueError(
                f"train: got {source.count} datapoints, wanted the {len(chains.z)} whose chains this "
                "training has"
            )
        return source

    @torch.no_grad()
    def _latent_dim(self, source: Any) -> int:
        x = source.data.batch(slice(0, 1)).to(next(self.model.parameters()).dtype)
        return int(self.model.encoder(x)[0].shape[-1])

    def _program_type(self) -> ProgramType:
        return partial(_Program, settings=self.settings)

    def _evaluate(self, test: Prepared) -> Bound:
        steps = self.settings.leapfrog_steps
        return complete_data(self.model, test, leapfrog_steps=steps, burn_in=20, seed=self.settings.seed)


class _Chains(nn.Module):
    """Where the chain of every datapoint is, ``[N, Z]``, and the step size of all."""

    z: Tensor
    step_size: Tensor

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.register_buffer("z", z)
        self.register_buffer("step_size", torch.full((), 0.01, dtype=z.dtype, device=z.device))


class _Program(StepProgram):
    def __init__(self, *args: Any, settings: MonteCarloEMSettings) -> None:
        super().__init__(*args)
        self._settings = settings

    def __call__(self, size: int) -> None:
        x, z = self._expectation(size)
        for update in range(self._settings.updates):
            estimate = self._complete(x, z)
            if update == 0:
                first = estimate
            self.update(estimate)
        self.record(first)

    def estimate(self, size: int) -> Estimate:
        return self._complete(*self._expectation(size))

    def estimate_batch(self, x: Tensor, seed: int | Tensor) -> Estimate:
        raise NotImplementedError(
            "step(batch): Monte Carlo EM needs the rows of the datapoints; wanted run()"
        )

    def _complete(self, x: Tensor, z: Tensor) -> Estimate:
        likelihood = log_likelihood(self.model, self.model.decoder(z), x, self.ops)
        prior = log_prior(z)
        return Estimate(likelihood + prior, likelihood, -prior)

    def _expectation(self, size: int) -> tuple[Tensor, Tensor]:
        """The minibatch, and z after one transition of its chains."""
        rows, x, seed = self.minibatch(size)
        x = x.to(self.dtype)
        chains = self.model.chains

        def log_density(z: Tensor) -> Tensor:
            return log_likelihood(self.model, self.model.decoder(z), x, self.ops) + log_prior(z)

        state, moved = hmc.transition(
            log_density,
            hmc.state_at(log_density, chains.z.index_select(0, rows)),
            chains.step_size,
            leapfrog_steps=self._settings.leapfrog_steps,
            seed=substream(seed, 1, self.device),
        )
        # A datapoint drawn twice ran two chains from one place: all keep the first's, so that what is written
        # does not depend on the order of writing.
        order = torch.arange(len(rows), device=rows.device)
        first = order.new_full((len(chains.z),), len(rows)).scatter_reduce(0, rows, order, "amin")[rows]
        chains.z.index_copy_(0, rows, state.z.index_select(0, first))
        chains.step_size.copy_(hmc.tuned(chains.step_size, moved, state, self._settings.acceptance))
        return x, state.z
