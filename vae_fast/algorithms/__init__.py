"""What the paper compares its algorithm with, starts from, and extends it to; trained as a Trainer trains.

All are :class:`vae_fast.Trainer` with another training step, so ``fit``, the history, checkpoints, resuming
bit for bit and the engines "reference" and "modules" are the same. Minibatches are drawn with replacement
unless told otherwise, as in the authors' code.
"""

from __future__ import annotations

from .autoencoder import AutoEncoder
from .full_vb import FullVB
from .monte_carlo_em import MonteCarloEM
from .wake_sleep import WakeSleep

__all__ = ["AutoEncoder", "FullVB", "MonteCarloEM", "WakeSleep"]
