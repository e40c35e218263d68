from collections.abc import Sequence

from torch import Tensor

def cpu_capability() -> str: ...

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
    ) -> None: ...
    def prepare(
        self,
        *,
        parameters: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        optimizer: str,
        numbers: dict[str, float],
        updates_before: int,
        values: Tensor,
        packed: bool,
        dynamic: bool,
        scale: float,
        rows: Tensor,
        sizes: Tensor,
        seeds: Tensor,
    ) -> Run: ...

def run(runs: Sequence[Run]) -> list[Tensor]: ...
