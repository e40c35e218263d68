"""The wake-sleep algorithm, with minibatches: what the paper compares auto-encoding variational Bayes with.

Source: Hinton, Dayan, Frey & Neal, *The wake-sleep algorithm for unsupervised neural networks*, Science 268,
1995; Kingma & Welling, arXiv:1312.6114, section 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batches import binarise, uniform_words
from ..engines import ProgramType, StepProgram
from ..estimators import Estimate, log_likelihood, log_normal, log_prior
from ..nn import VAE
from .common import Algorithm, substream


class WakeSleep(Algorithm):
    """Trains a VAE's decoder on the data and its encoder on dreams::

        trainer = WakeSleep(model, optimizer="adagrad", lr=0.02, batch_size=100, seed=0)
        history = trainer.fit(train, test, max_samples=1_000_000)

    For each datapoint x of a minibatch,

    * wake: z ~ q(z|x), held fixed, and the decoder ascends log p(x, z);
    * sleep: z' ~ p(z) and x' ~ p(x|z'), held fixed, and the encoder ascends log q(z'|x').

    Both gradients are taken at the same parameters. A Bernoulli decoder dreams pixels of 0 and 1, as in the
    authors' code, whatever the data are.

    The bound in the history's ``train_bound`` is log p(x, z) - log q(z|x) of the wake phase (equation 6, one
    sample); ``test_bound`` is that of :func:`vae_fast.evaluation.bound`, whose KL divergence is exact. The
    encoder does not ascend either, so neither need rise.

    Args:
        model, options: as for :class:`vae_fast.Trainer`, with ``order="replacement"``; no ``estimator``,
            ``num_samples`` or ``beta``. ``weight_prior`` is on the weights of both networks.
    """

    kind = "vae_fast.WakeSleep"

    def __init__(self, model: VAE, **options: Any) -> None:
        super().__init__(model, **options)

    def _program_type(self) -> ProgramType:
        return _Program


class _Program(StepProgram):
    @property
    def native_step(self) -> str | None:
        return "wake_sleep" if type(self) is _Program else None

    def estimate_batch(self, x: Tensor, seed: int | Tensor) -> Estimate:
        """``objective`` has the wake gradient for the decoder and the sleep gradient for the encoder."""
        model, ops = self.model, self.ops
        x = x.to(self.dtype)
        with torch.no_grad():
            mu, logvar = model.encoder(x)
            z = ops.reparameterize(mu, logvar, seed=seed)
            divergence = log_normal(z, mu, logvar) - log_prior(z)
            dreamed_z, dreamed_x = self._dream(mu.shape, seed)
        likelihood = log_likelihood(model, model.decoder(z), x, ops)
        recognised = log_normal(dreamed_z, *model.encoder(dreamed_x))
        # log p(z) has no gradient; with it, the wake term is the log p(x, z) that its documentation names
        return Estimate(likelihood + log_prior(z) + recognised, likelihood, divergence)

    def _dream(self, shape: torch.Size, seed: int | Tensor) -> tuple[Tensor, Tensor]:
        """(z', x') from the model: z' ~ N(0, I), x' ~ p(x|z')."""
        z = self.ops.philox_normal(shape, seed=substream(seed, 1, self.device), dtype=self.dtype)
        decoded = self.model.decoder(z)
        of_x = substream(seed, 2, self.device)
        if self.model.likelihood == "gaussian":
            mean, logvar = decoded
            return z, self.ops.reparameterize(mean, logvar.expand_as(mean).contiguous(), seed=of_x)
        return z, binarise(torch.sigmoid(decoded), uniform_words(decoded.shape, of_x))
