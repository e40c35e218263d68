"""What the tests share: devices, dtypes and the float64 judge."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Threads that wait asleep, not spinning: tests of small models then run well beside other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Away from the source tree: programs that tests start import the installed package."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="needs a GPU; run `python -m bench.gpu` where there is one"
        ),
    ],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(
    params=[torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).split(".")[1]
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
