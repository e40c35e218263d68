"""The paper's models with the settings that they were trained with::

    preset = vae_fast.presets.paper_mnist(latent_dim=20)
    trainer = preset.trainer(seed=0)
    train, test = vae_fast.datasets.mnist()
    history = trainer.fit(train, test, max_samples=10_000_000)

Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114, section 5 and appendix C; what
it leaves open is taken from the authors' published code (initial values, Adagrad's start, minibatches with
replacement, pixels over 256).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .nn import VAE
from .trainer import Trainer


@dataclass(frozen=True)
class Preset:
    """Arguments of :class:`vae_fast.VAE` and of :class:`vae_fast.Trainer`."""

    model_options: dict[str, Any]
    trainer_options: dict[str, Any]

    def model(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> VAE:
        """A new model; the authors computed in float64."""
        return VAE(**self.model_options, seed=seed).to(dtype)

    def but(self, model: Mapping[str, Any] | None = None, **trainer: Any) -> Preset:
        """The same with other arguments of the model or of the trainer."""
        return Preset({**self.model_options, **(model or {})}, {**self.trainer_options, **trainer})

    def trainer(self, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Trainer:
        """A trainer of a new model; ``changes`` are arguments of :class:`vae_fast.Trainer`."""
        return Trainer(
            self.model(seed=seed, dtype=dtype), **{**self.trainer_options, "seed": seed, **changes}
        )


def iwae_mnist(num_samples: int = 1, *, estimator: str = "iwae") -> Preset:
    """Binarised MNIST of Burda, Grosse & Salakhutdinov, arXiv:1509.00519, section 5: one stochastic
    layer, 784-200-200-50 and back, tanh, pixels drawn anew at each use, Adam, minibatches of 20.

    ``estimator="sgvb_b"`` is their "VAE". The step size is that of their first epoch;
    :mod:`vae_fast.experiments.table1` has the others, and Adam's options.
    """
    return Preset(
        {"data_dim": 784, "hidden_dims": [200, 200], "latent_dim": 50, "activation": "tanh", "init": "lecun"},
        {
            "optimizer": "adam",
            "lr": 1e-3,
            "batch_size": 20,
            "targets": "dynamic",
            "estimator": estimator,
            "num_samples": num_samples,
        },
    )


WAKE_SLEEP_LOGVAR_SCALE = 0.1  # of the recognition model that the authors' code trains by wake-sleep


def paper_mnist(latent_dim: int, *, hidden_dim: int = 500, wake_sleep: bool = False) -> Preset:
    """MNIST: 784-500-latent_dim and back, tanh, Bernoulli; figure 2 has 3, 5, 10, 20 and 200 latents.

    The data are ``datasets.mnist()``. Figure 3 has ``latent_dim=3, hidden_dim=100`` and ``.but(lr=0.1)``.
    ``wake_sleep`` is the model that the authors trained by wake-sleep: its encoder has ``logvar_scale=0.1``.
    """
    return _paper(latent_dim, hidden_dim, wake_sleep, data_dim=784, likelihood="bernoulli")


def paper_frey(latent_dim: int, *, hidden_dim: int = 200, wake_sleep: bool = False) -> Preset:
    """Frey Face: 560-200-latent_dim and back, tanh, Gaussian with its mean through a sigmoid.

    The data are ``datasets.frey(path)``; figure 2 has 2, 5, 10 and 20 latents. ``wake_sleep``: as above.
    """
    return _paper(
        latent_dim, hidden_dim, wake_sleep, data_dim=560, likelihood="gaussian", mean_activation="sigmoid"
    )


def _paper(latent_dim: int, hidden_dim: int, wake_sleep: bool, **model: Any) -> Preset:
    return Preset(
        {
            **model,
            **({"logvar_scale": WAKE_SLEEP_LOGVAR_SCALE} if wake_sleep else {}),
            "hidden_dims": [hidden_dim],
            "latent_dim": latent_dim,
            "activation": "tanh",
            "init": "paper",
        },
        {
            "optimizer": "adagrad",  # by name: its first 100 steps only accumulate
            "lr": 0.02,  # of 0.01, 0.02 and 0.1, which the paper chose from
            "batch_size": 100,
            "num_samples": 1,
            "weight_prior": True,
            "order": "replacement",
            "pixel_scale": 256,
        },
    )
