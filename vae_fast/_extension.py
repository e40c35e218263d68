"""Loads the compiled part of vae_fast, and says what to do when that fails."""

from __future__ import annotations

import torch

try:
    from . import _build_config as build
except ImportError as error:
    raise ImportError(
        "vae_fast has not been built: the compiled extension is missing. "
        "In the source folder run `pip install .` (or `pip install -e .` to work on it)."
    ) from error


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


_REBUILD = (
    "Rebuild it against the torch that is installed now: "
    "`pip install --force-reinstall --no-deps .` in the source folder."
)

if _release(torch.__version__) != _release(build.TORCH_VERSION) or (
    build.CUDA and torch.version.cuda != build.TORCH_CUDA
):
    raise ImportError(
        f"vae_fast was built for torch {build.TORCH_VERSION} (CUDA {build.TORCH_CUDA}), "
        f"but torch {torch.__version__} (CUDA {torch.version.cuda}) is installed. {_REBUILD}"
    )

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"vae_fast's compiled extension, built for torch {build.TORCH_VERSION}, does not load with torch "
        f"{torch.__version__}: {error}. {_REBUILD}"
    ) from error


def build_info() -> dict[str, object]:
    """What this installation is made of.

    Keys: ``version``; ``torch`` and ``torch_built_with``; ``cuda`` (whether CUDA kernels are in this build),
    ``cuda_archs``, ``nvcc``, ``why_no_cuda``; ``cpu_capability``, the instruction set in use ("amx",
    "avx512_bf16", "avx512", "avx2" or "plain"); ``compiler``.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        own_version = version("vae-fast")
    except PackageNotFoundError:
        own_version = "not installed: run from the source folder"
    return {
        "version": own_version,
        "torch": torch.__version__,
        "torch_built_with": build.TORCH_VERSION,
        "cuda": build.CUDA,
        "cuda_archs": list(build.CUDA_ARCHS),
        "nvcc": build.NVCC_VERSION,
        "why_no_cuda": build.WHY_NO_CUDA,
        "cpu_capability": _C.cpu_capability(),
        "compiler": build.CXX,
    }
