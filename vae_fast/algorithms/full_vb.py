"""Full variational Bayes: a posterior over the decoder's parameters, too (appendix F, algorithm 2).

Source: Kingma & Welling, arXiv:1312.6114, appendix F.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import functional
from ..datasets import Prepared
from ..engines import ProgramType, StepProgram
from ..estimators import EVALUATE, Estimate, log_likelihood, step_seed
from ..evaluation import Bound, bound
from ..nn import VAE
from ..trainer import Settings
from .common import Algorithm, substream


@dataclass(frozen=True)
class FullVBSettings(Settings):
    weight_samples: int
    initial_logvar: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.weight_samples <= self.batch_size:
            raise ValueError(
                f"weight_samples: got {self.weight_samples}, wanted 1 to batch_size = {self.batch_size}"
            )


class FullVB(Algorithm):
    """Trains q(z|x) and q(theta) = N(mu, diag(sigma^2)) over all parameters theta of a VAE's decoder::

        trainer = FullVB(model, optimizer="adagrad", lr=0.02, batch_size=100, seed=0)
        history = trainer.fit(train, test, max_samples=1_000_000)

    A step ascends, per datapoint and in nats, 1/N of the estimator of appendix F with both divergences in
    closed form (equation 24)::

        -KL(q(theta) || N(0, I)) / N  +  1/M sum_i [-KL(q(z|x_i) || p(z)) + log p_theta(x_i|z_i)]

    with theta = mu + sigma * zeta and z_i = mu(x_i) + sigma(x_i) * eps_i, N the number of datapoints. Its
    mean over both noises is a lower bound on log p(X) / N, the marginal likelihood in which the parameters
    are integrated out.

    mu is the decoder's own parameters, so the model is used as ever, at the posterior mean; log sigma^2 is
    the new parameter ``model.decoder_logvar``, in the order of ``model.decoder.parameters()``.

    The history's ``train_`` columns are the terms above, both divergences in ``train_kl``. The ``test_``
    columns are :func:`vae_fast.evaluation.bound` of one draw of theta; KL(q(theta) || p(theta)) is a price of
    the training data, and not in ``test_kl``.

    Args:
        model: its decoder becomes a distribution of decoders.
        weight_samples: how many draws of theta a minibatch is divided among (a last one of fewer datapoints:
            as many as it has); M of them is algorithm 2 to the letter, a draw for each datapoint. The
            gradient is unbiased with any number, and one draw costs least.
        initial_logvar: of every parameter. The default, a standard deviation of 0.01, is that of the initial
            values.
        options: as for :class:`vae_fast.Trainer`, with ``order="replacement"``; no ``estimator``,
            ``num_samples``, ``beta`` or ``weight_prior``: the prior is part of the algorithm. A training is
            of one array: the prior is weighed by its size.
    """

    kind = "vae_fast.FullVB"
    settings: FullVBSettings
    shared = tuple(name for name in Algorithm.shared if name != "weight_prior")

    def __init__(
        self, model: VAE, *, weight_samples: int = 1, initial_logvar: float = -9.2, **options: Any
    ) -> None:
        flat = parameters_to_vector(model.decoder)
        model.decoder_logvar = nn.Parameter(torch.full_like(flat, initial_logvar))
        super().__init__(model, **options)
        self.settings = FullVBSettings(
            **asdict(self.settings), weight_samples=weight_samples, initial_logvar=initial_logvar
        )

    def draw(self, seed: int = 0) -> VAE:
        """The model with a draw of q(theta) for its decoder's parameters; the encoder is shared."""
        decoder = copy.deepcopy(self.model.decoder)
        with torch.no_grad():
            logvar: Any = self.model.decoder_logvar
            flat = functional.reparameterize(parameters_to_vector(decoder), logvar, seed=seed)
            for p, value in zip(decoder.parameters(), _views(decoder, flat).values(), strict=True):
                p.copy_(value)
        drawn = VAE(encoder=self.model.encoder, decoder=decoder, likelihood=self.model.likelihood)
        drawn.data_dim, drawn.latent_dim = self.model.data_dim, self.model.latent_dim
        return drawn

    def _source(self, train: Any) -> Any:
        source = super()._source(train)
        if source.count is None:
            raise ValueError("train: got a stream, wanted an array: the prior is weighed by its size")
        return source

    def _program_type(self) -> ProgramType:
        return partial(_Program, weight_samples=self.settings.weight_samples)

    def _evaluate(self, test: Prepared) -> Bound:
        seed = self.settings.seed
        return bound(self.draw(step_seed(seed, 0, EVALUATE)), test, seed=seed)


class _Program(StepProgram):
    def __init__(self, *args: Any, weight_samples: int) -> None:
        super().__init__(*args)
        self._weight_samples = weight_samples

    def estimate_batch(self, x: Tensor, seed: int | Tensor) -> Estimate:
        model, ops = self.model, self.ops
        assert self.source.count is not None
        x = x.to(self.dtype)
        mu, logvar = model.encoder(x)
        z, kl = ops.reparameterize_with_kl(mu, logvar, seed=seed)
        mean = parameters_to_vector(model.decoder)
        likelihoods = []
        parts = min(self._weight_samples, len(x))
        for i, (x_part, z_part) in enumerate(zip(x.tensor_split(parts), z.tensor_split(parts), strict=True)):
            theta = ops.reparameterize(mean, model.decoder_logvar, seed=substream(seed, i + 1, self.device))
            decoded = functional_call(model.decoder, _views(model.decoder, theta), (z_part,))
            likelihoods.append(log_likelihood(model, decoded, x_part, ops))
        likelihood = torch.cat(likelihoods)
        kl = kl + ops.gaussian_kl(mean, model.decoder_logvar) / self.source.count
        return Estimate(likelihood - kl, likelihood, kl)


def parameters_to_vector(module: nn.Module) -> Tensor:
    """All parameters in one row, ``[P]``."""
    return torch.cat([p.flatten() for p in module.parameters()])


def _views(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """That row as parameters by name."""
    named = dict(module.named_parameters())
    parts = torch.split(flat, [p.numel() for p in named.values()])
    return {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
