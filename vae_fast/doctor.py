"""Checks of an installation, each with its finding and, where something is wrong, what to do about it."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

OK, NOTE, FAIL = "ok", "note", "FAIL"
TOLERANCE = 1e-5  # of the largest value; float32 operators stay two orders below it
_REINSTALL = "Install again: pip install --force-reinstall --no-deps . in the source folder."


class Finding(NamedTuple):
    """state: "ok", "note" (works, but worth knowing) or "FAIL"."""

    state: str
    subject: str
    text: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Every check, in an order in which the first failure is the cause of those that follow."""
    yield Finding(OK, "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        import torch
    except ImportError as error:
        yield Finding(FAIL, "torch", f"does not load: {error}", "Install it: pip install torch")
        return
    try:
        from ._extension import build_info

        info = build_info()
    except ImportError as error:
        yield Finding(OK, "torch", torch.__version__)
        yield Finding(FAIL, "vae-fast", str(error))
        return
    yield Finding(OK, "torch", f"{info['torch']}, vae-fast was built with {info['torch_built_with']}")
    yield Finding(OK, "vae-fast", f"{info['version']}, compiled by {info['compiler']}")
    yield _cpu(str(info["cpu_capability"]))
    yield _cuda(info)
    devices = ["cpu"]
    if info["cuda"] and torch.cuda.is_available():
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        yield _guarded(f"numbers, {device}", partial(_numbers, device))
    yield _guarded("MNIST", _mnist)
    for package in ("matplotlib", "safetensors", "tqdm", "click"):
        yield _guarded(package, partial(_package, package))


def _guarded(subject: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever it is, it is what the reader came to learn
        return Finding(FAIL, subject, f"{type(error).__name__}: {' '.join(str(error).split())}", _REINSTALL)


def _cpu(capability: str) -> Finding:
    import torch

    text = f"{capability} instructions, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    if capability == "plain":
        return Finding(NOTE, "CPU", text, "No AVX2 on this processor: everything works, at a lower speed.")
    return Finding(OK, "CPU", text)


def _cuda(info: dict[str, Any]) -> Finding:
    import torch

    seen = torch.cuda.is_available()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if seen else ""
    if not info["cuda"]:
        text = f"no CUDA kernels in this build: {info['why_no_cuda']}"
        if seen:
            return Finding(NOTE, "CUDA", f"{text} (torch sees {names})", f"To use it: {_REINSTALL}")
        return Finding(OK, "CUDA", text)
    built = ", ".join(map(str, info["cuda_archs"]))
    if not seen:
        remedy = "Training runs on the CPU. With a GPU in this machine, look at nvidia-smi and its driver."
        return Finding(NOTE, "CUDA", f"built for {built}, but torch sees no GPU", remedy)
    return Finding(OK, "CUDA", f"{names}; built for {built} with nvcc {info['nvcc']}")


def _numbers(device: str) -> Finding:
    """Every operator, forward and backward, in float32 against float64."""
    errors = {name: _error(name, device) for name in ("kl", "noise", "bernoulli", "gaussian", "elbo")}
    worst = max(errors, key=lambda name: errors[name])
    text = f"operators and gradients within {errors[worst]:.1e} of float64"
    if not errors[worst] <= TOLERANCE:  # NaN fails
        text = f"{worst}: off by {errors[worst]:.1e} of float64, wanted at most {TOLERANCE:g}"
        return Finding(FAIL, f"numbers, {device}", text, _REINSTALL)
    return Finding(OK, f"numbers, {device}", text)


def _error(name: str, device: str) -> float:
    """The largest difference from float64, relative to the largest value, over results and gradients."""
    import torch

    from . import functional, reference

    generator = torch.Generator().manual_seed(1)
    rows, width, latents = 65, 131, 33  # odd, so that the ends of vectors are looked at, too

    def draw(columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    x = torch.rand(rows, width, generator=generator)
    cases: dict[str, tuple[str, dict[str, Any], tuple[Tensor, ...]]] = {
        "kl": ("gaussian_kl", {}, (draw(latents), draw(latents))),
        "noise": ("reparameterize_with_kl", {"seed": 7}, (draw(latents), draw(latents))),
        "bernoulli": ("bernoulli_log_likelihood", {}, (8 * draw(width), x)),
        "gaussian": ("gaussian_log_likelihood", {}, (draw(width), draw(width), x)),
        "elbo": ("elbo", {"reduction": "none"}, (8 * draw(width), x, draw(latents), draw(latents))),
    }
    function, options, inputs = cases[name]

    def results(ops: Any, dtype: torch.dtype, where: str) -> list[Tensor]:
        given = [tensor.to(where, dtype).requires_grad_(tensor is not x) for tensor in inputs]
        result = getattr(ops, function)(*given, **options)
        outputs: tuple[Tensor, ...] = result if isinstance(result, tuple) else (result,)
        upstream = [
            torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).reshape(o.shape).to(o) for o in outputs
        ]
        gradients = torch.autograd.grad(outputs, [t for t in given if t.requires_grad], upstream)
        return [t.detach().cpu().double() for t in (*outputs, *gradients)]

    ours = results(functional, torch.float32, device)
    judge = results(reference, torch.float64, "cpu")
    differences = [
        (a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in zip(ours, judge, strict=True)
    ]
    return float(torch.stack(differences).max())


def _mnist() -> Finding:
    from . import datasets

    train, test = datasets.mnist()
    return Finding(OK, "MNIST", f"{len(train):,} training and {len(test):,} test images are bundled")


def _package(name: str) -> Finding:
    from importlib.metadata import version

    try:
        importlib.import_module(name)
    except ImportError as error:
        return Finding(FAIL, name, f"does not load: {error}", f"Install it: pip install {name}")
    return Finding(OK, name, version(name))
