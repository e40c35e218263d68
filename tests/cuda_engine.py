"""The CUDA engine on the emulated device, from Python: compiled once, called through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "csrc" / "engine" / "cuda"
EMULATION = ROOT / "tests" / "cuda_emulation"
SOURCES = (
    *(ENGINE / name for name in ("layers.cu", "update.cu", "persistent.cu", "schedule.cpp")),
    EMULATION / "engine.cpp",
)
FLAGS = (
    "-std=c++20",
    "-w",
    "-O1",
    "-fPIC",
    "-DVAE_FAST_CUDA_EMULATION",
    f"-I{EMULATION}",
    "-fsanitize=alignment,bounds,signed-integer-overflow,shift",
    "-fsanitize-undefined-trap-on-error",
)

ACTIVATIONS = ("tanh", "relu", "softplus")
LIKELIHOODS = ("bernoulli", "gaussian", "gaussian_sigmoid_mean")
ESTIMATORS = ("sgvb_b", "sgvb_a", "wake_sleep")
OPTIMIZERS = ("sgd", "adagrad", "adam", "adamw")
PRECISIONS = ("exact", "fast")
DTYPES = {"f32": 0, "u8": 4, "bits": 5}
OPTIONS = {
    "eps": 0.0,
    "beta1": 0.0,
    "beta2": 0.0,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "accumulate_steps": 0,
}


def compile_engine(build: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX or install g++")

    def run(*command: str | Path) -> None:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def compile_one(source: Path) -> Path:
        output = build / (source.name + ".o")
        run(compiler, "-x", "c++", *FLAGS, "-c", source, "-o", output)
        return output

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = build / "engine.so"
    run(compiler, "-shared", *objects, "-o", library)
    loaded = ctypes.CDLL(str(library))
    loaded.engine_create.restype = ctypes.c_void_p
    loaded.engine_buffer.restype = ctypes.c_char_p
    loaded.engine_launches_per_step.restype = ctypes.c_int64
    loaded.engine_why_not_persistent.restype = ctypes.c_char_p
    return loaded


INT, REAL, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Description(ctypes.Structure):
    """The struct of the same name in engine.cpp."""

    _fields_ = (
        *((name, INT) for name in ("data_dim", "encoder_layers", "decoder_layers")),
        *((name, POINTER) for name in ("encoder_hidden", "decoder_hidden")),
        *((name, INT) for name in ("activation", "likelihood", "estimator", "num_samples", "precision")),
        ("weight_prior", REAL),
        ("logvar_scale", REAL),
        ("optimizer", INT),
        *((name, REAL) for name in OPTIONS if name != "accumulate_steps"),
        *((name, INT) for name in ("accumulate_steps", "data_dtype", "dynamic", "data_rows", "data_bytes")),
        ("scale", REAL),
        ("data", POINTER),
        *((name, INT) for name in ("most_size", "most_steps", "multiprocessors", "shared_bytes")),
        ("persistent", INT),
        *((name, INT) for name in ("n_models", "n_parameters")),
        *((name, POINTER) for name in ("latents", "betas", "lrs", "counts", "parameters")),
    )


@dataclass(frozen=True)
class Trained:
    """One of the models that an engine trains side by side."""

    latent_dim: int
    beta: float
    lr: float
    parameters: Sequence[NDArray[np.float32]]


class EmulatedEngine:
    """A Schedule of csrc/engine/cuda/schedule.h, its arguments by name; arrays are copied to its device."""

    def __init__(
        self,
        library: ctypes.CDLL,
        *,
        models: Sequence[Trained],
        encoder_hidden: Sequence[int],
        decoder_hidden: Sequence[int],
        activation: str,
        likelihood: str,
        estimator: str,
        num_samples: int,
        weight_prior: float,
        logvar_scale: float,
        optimizer: str,
        options: Mapping[str, Any],
        precision: str,
        data: NDArray[Any],
        data_dim: int,
        data_dtype: str,
        dynamic: bool,
        scale: float,
        most_size: int,
        most_steps: int,
        multiprocessors: int,
        shared_bytes: int,
        persistent: bool = False,
    ) -> None:
        self._library = library
        self.shapes = [[parameter.shape for parameter in model.parameters] for model in models]
        flat = [np.ascontiguousarray(p, dtype=np.float32) for model in models for p in model.parameters]
        latents = np.array([model.latent_dim for model in models], dtype=np.int64)
        betas, lrs = np.array([model.beta for model in models]), np.array([model.lr for model in models])
        encoder = np.array(encoder_hidden, dtype=np.int64)
        decoder = np.array(decoder_hidden, dtype=np.int64)
        counts = np.array([parameter.size for parameter in flat], dtype=np.int64)
        pointers = (ctypes.c_void_p * len(flat))(*(parameter.ctypes.data for parameter in flat))
        values = np.ascontiguousarray(data)
        described = Description(
            data_dim=data_dim,
            encoder_layers=len(encoder),
            decoder_layers=len(decoder),
            encoder_hidden=encoder.ctypes.data,
            decoder_hidden=decoder.ctypes.data,
            activation=ACTIVATIONS.index(activation),
            likelihood=LIKELIHOODS.index(likelihood),
            estimator=ESTIMATORS.index(estimator),
            num_samples=num_samples,
            precision=PRECISIONS.index(precision),
            weight_prior=weight_prior,
            logvar_scale=logvar_scale,
            optimizer=OPTIMIZERS.index(optimizer),
            data_dtype=DTYPES[data_dtype],
            dynamic=dynamic,
            data_rows=len(values),
            data_bytes=values.nbytes,
            scale=scale,
            data=values.ctypes.data,
            most_size=most_size,
            most_steps=most_steps,
            multiprocessors=multiprocessors,
            shared_bytes=shared_bytes,
            persistent=persistent,
            n_models=len(models),
            n_parameters=len(flat) // len(models),
            latents=latents.ctypes.data,
            betas=betas.ctypes.data,
            lrs=lrs.ctypes.data,
            counts=counts.ctypes.data,
            parameters=ctypes.cast(pointers, ctypes.c_void_p),
            **{**OPTIONS, **options},
        )
        self._handle = ctypes.c_void_p(library.engine_create(ctypes.byref(described)))
        self._updates = 0

    def run(
        self, rows: NDArray[np.int64], sizes: NDArray[np.int64], seeds: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The terms of the steps; of several models all arrays begin with an axis of models."""
        rows, sizes, seeds = (np.ascontiguousarray(a, dtype=np.int64) for a in (rows, sizes, seeds))
        terms = np.full((*sizes.shape, 3), np.nan, dtype=np.float32)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (rows, sizes, seeds, terms)]
        error = self._library.engine_run(
            self._handle,
            pointers[0],
            INT(rows.shape[-1]),
            pointers[1],
            pointers[2],
            INT(sizes.shape[-1]),
            INT(self._updates),
            pointers[3],
        )
        assert error == 0
        self._updates += sizes.shape[-1]
        return terms

    def parameters(self, which: int = 0, model: int = 0) -> list[NDArray[np.float32]]:
        """The parameters of a model, or state number 1 or 2 of each."""
        found = []
        for index, shape in enumerate(self.shapes[model]):
            values = np.empty(shape, dtype=np.float32)
            pointer = ctypes.c_void_p(values.ctypes.data)
            self._library.engine_parameter(
                self._handle, INT(model), INT(index), INT(which), INT(values.size), pointer
            )
            found.append(values)
        return found

    def buffers(self) -> dict[str, NDArray[np.float32]]:
        """Every buffer by name, ``[rows, cols]``, as the last step left it."""
        found = {}
        place, rows, cols, stride = ctypes.c_void_p(), INT(), INT(), INT()
        pointers = [ctypes.byref(value) for value in (place, rows, cols, stride)]
        while name := self._library.engine_buffer(self._handle, INT(len(found)), *pointers):
            floats = ctypes.cast(place, ctypes.POINTER(ctypes.c_float))
            padded = np.ctypeslib.as_array(floats, (rows.value, stride.value))
            found[name.decode()] = padded[:, : cols.value].copy()
        return found

    def launches_per_step(self) -> int:
        launches: int = self._library.engine_launches_per_step(self._handle)
        return launches

    def why_not_persistent(self) -> str:
        why: bytes = self._library.engine_why_not_persistent(self._handle)
        return why.decode()

    def close(self) -> None:
        self._library.engine_destroy(self._handle)
