"""The deterministic auto-encoder with squared error, the baseline that the text starts from.

Source: Kingma & Welling, arXiv:1312.6114, sections 2.3 and 4: an auto-encoder has the reconstruction term of
the bound and neither noise nor the divergence that regularises it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..datasets import Prepared
from ..engines import ProgramType, StepProgram
from ..estimators import Estimate
from ..evaluation import Bound, squared_error
from ..nn import VAE
from .common import Algorithm


class AutoEncoder(Algorithm):
    """Trains a VAE's networks as a plain auto-encoder: minimises |x - y|^2, y = E[x|z] at z = mu(x)::

        trainer = AutoEncoder(model, optimizer="adagrad", lr=0.02, batch_size=100, seed=0)
        history = trainer.fit(train, test, max_samples=1_000_000)

    There is no noise and no divergence; the layers of the log-variances stay as they are. In the history,
    ``train_bound``, ``train_log_likelihood`` and their ``test_`` twins are -|x - y|^2, summed over features
    and averaged over datapoints: the log-likelihood, up to a constant, of a Gaussian of variance 1/2, and no
    bound on that of ``model``. ``kl`` is 0.

    Args:
        model, options: as for :class:`vae_fast.Trainer`, with ``order="replacement"``; no ``estimator``,
            ``num_samples`` or ``beta``.
    """

    kind = "vae_fast.AutoEncoder"

    def __init__(self, model: VAE, **options: Any) -> None:
        super().__init__(model, **options)

    def _program_type(self) -> ProgramType:
        return _Program

    def _evaluate(self, test: Prepared) -> Bound:
        error = squared_error(self.model, test, seed=self.settings.seed)
        return Bound(-error, -error, 0.0, len(test))


class _Program(StepProgram):
    def estimate_batch(self, x: Tensor, seed: int | Tensor) -> Estimate:
        x = x.to(self.dtype)
        mu, _ = self.model.encoder(x)
        likelihood = -((x - self.model.decode_mean(mu)) ** 2).sum(dim=-1)
        return Estimate(likelihood, likelihood, torch.zeros_like(likelihood))
