from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

def cpu_capability() -> str: ...
def adagrad_update(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    sums: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float,
    eps: float,
    accumulate_steps: int,
) -> None: ...

class Run: ...

class CpuStep:
    def __init__(
        self,
        *,
        data_dim: int,
        encoder_hidden: Sequence[int],
        latent_dim: int,
        decoder_hidden: Sequence[int],
        activation: str,
        likelihood: str,
        estimator: str,
        num_samples: int,
        beta: float,
        weight_prior: float,
        precision: str,
        logvar_scale: float = 1.0,
    ) -> None: ...
    def prepare(
        self,
        *,
        parameters: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        optimizer: str,
        options: dict[str, float],
        data: Tensor,
        packed: bool,
        dynamic: bool,
        scale: float,
        rows: Tensor,
        sizes: Tensor,
        seeds: Tensor,
        updates: int,
    ) -> Run: ...

class CudaStep:
    def __init__(
        self,
        *,
        data_dim: int,
        encoder_hidden: Sequence[int],
        decoder_hidden: Sequence[int],
        activation: str,
        likelihood: str,
        estimator: str,
        num_samples: int,
        weight_prior: float,
        optimizer: str,
        options: dict[str, float],
        precision: str,
        models: Sequence[Mapping[str, Any]],
        data: Tensor,
        packed: bool,
        dynamic: bool,
        scale: float,
        batch_size: int,
        most_steps: int,
        logvar_scale: float = 1.0,
        persistent: bool = False,
        timed: bool = False,
    ) -> None: ...
    def run(self, rows: Tensor, sizes: Tensor, seeds: Tensor, updates: Sequence[int]) -> Tensor: ...
    @property
    def persistent(self) -> bool: ...
    @property
    def why_not_persistent(self) -> str: ...
    @property
    def phases(self) -> list[tuple[str, str, list[float]]]: ...

def run(runs: Sequence[Run]) -> list[Tensor]: ...
