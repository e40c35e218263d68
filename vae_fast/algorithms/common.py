"""What the algorithms share: their constructor, and seeds for several kinds of noise in one step."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..distributions import posterior_of
from ..estimators import GOLDEN, default_estimator
from ..nn import VAE
from ..reference import signed64
from ..trainer import Trainer


class Algorithm(Trainer):
    """A trainer with a training step of its own.

    ``options`` are those of :class:`vae_fast.Trainer` in ``shared``: an estimator of the bound, its number of
    samples and beta belong to algorithm 1.
    """

    shared: tuple[str, ...] = (
        "optimizer",
        "lr",
        "batch_size",
        "seed",
        "engine",
        "weight_prior",
        "order",
        "targets",
        "pixel_scale",
        "device",
        "on_nan",
    )

    def __init__(self, model: VAE, **options: Any) -> None:
        of_trainer = {name: p.default for name, p in inspect.signature(Trainer.__init__).parameters.items()}
        of_trainer["estimator"] = default_estimator(model)
        for name, value in options.items():
            # A checkpoint holds all settings: those that are not for this algorithm have their default.
            if name not in self.shared and (name not in of_trainer or value != of_trainer[name]):
                raise TypeError(
                    f"{name}: got {value!r}, but {type(self).__name__} has no such choice; its options are "
                    f"{', '.join(self.shared)}"
                )
        if posterior_of(model).name != "gaussian":
            raise ValueError(
                f"model: got the posterior {posterior_of(model).name!r}, but {type(self).__name__} is of "
                f"Gaussian posteriors; wanted a model with posterior='gaussian'"
            )
        super().__init__(model, **{"order": "replacement", **options})


def substream(seed: int | Tensor, stream: int, device: torch.device) -> Tensor:
    """The seed of one more kind of noise in a step whose noise has ``seed``; int64 ``[1]``.

    It is seed XOR (stream * GOLDEN mod 2**64): another key for every stream > 0.
    """
    if not isinstance(seed, Tensor):
        seed = torch.full((1,), signed64(seed), dtype=torch.int64, device=device)
    return seed ^ signed64(stream * GOLDEN)
