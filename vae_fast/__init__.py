"""vae-fast: the fastest correct way to train a variational auto-encoder.

Drop-in functions and modules for any PyTorch model, and a complete trainer of the system of Kingma & Welling,
*Auto-Encoding Variational Bayes*, arXiv:1312.6114.
"""

from __future__ import annotations

from . import checkpoint, datasets, distributions, evaluation, hmc, presets, reference, uses
from ._extension import build_info
from .algorithms import AutoEncoder, FullVB, MonteCarloEM, WakeSleep
from .functional import (
    ELBO,
    bernoulli_log_likelihood,
    elbo,
    gaussian_kl,
    gaussian_log_likelihood,
    linear_bernoulli_log_likelihood,
    pack_bits,
    philox_normal,
    reparameterize,
    reparameterize_with_kl,
)
from .nn import (
    VAE,
    BernoulliNLL,
    ELBOLoss,
    GaussianKL,
    LinearBernoulliNLL,
    MLPDecoder,
    MLPEncoder,
    Reparameterize,
)
from .sweep import sweep
from .trainer import History, Trainer, TrainingError

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "VAE",
    "AutoEncoder",
    "BernoulliNLL",
    "ELBOLoss",
    "FullVB",
    "GaussianKL",
    "History",
    "LinearBernoulliNLL",
    "MLPDecoder",
    "MLPEncoder",
    "MonteCarloEM",
    "Reparameterize",
    "Trainer",
    "TrainingError",
    "WakeSleep",
    "bernoulli_log_likelihood",
    "build_info",
    "checkpoint",
    "datasets",
    "distributions",
    "elbo",
    "evaluation",
    "gaussian_kl",
    "gaussian_log_likelihood",
    "hmc",
    "linear_bernoulli_log_likelihood",
    "pack_bits",
    "philox_normal",
    "presets",
    "reference",
    "reparameterize",
    "reparameterize_with_kl",
    "sweep",
    "uses",
]
