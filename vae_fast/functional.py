"""Drop-in functions: the terms of the variational bound, fused.

All functions take ``[..., D]`` tensors, sum over the last dimension and speak nats. float32, float64,
float16 and bfloat16 are computed in float32 (float64 in float64) and accumulated there; losses come back in
float32 (float64). Every function is differentiable twice (but for
:func:`linear_bernoulli_log_likelihood`), and works under ``torch.compile(fullgraph=True)``, autocast and CUDA
graphs. The same functions in plain PyTorch are in :mod:`vae_fast.reference`.

Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114; equation numbers are the
paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import _extension  # noqa: F401  (registers torch.ops.vae_fast)
from .reference import ELBO, average_samples, reduce, signed64

__all__ = [
    "ELBO",
    "average_samples",
    "bernoulli_log_likelihood",
    "elbo",
    "gaussian_kl",
    "gaussian_log_likelihood",
    "linear_bernoulli_log_likelihood",
    "pack_bits",
    "philox_normal",
    "reparameterize",
    "reparameterize_with_kl",
]

_ops: Any = torch.ops.vae_fast


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample of N(mu, diag(exp(logvar))): z = mu + exp(logvar / 2) * eps, eps ~ N(0, I) (equation 4,
    section 2.4).

    Args:
        mu, logvar: ``[..., Z]``, of one shape, dtype and device.
        num_samples: None for one sample per datapoint; an integer L for L of them, in a new leading
            dimension.
        seed: makes eps a pure function of (seed, element index), the same on every device:
            ``philox_normal(z.shape, seed=seed)``. A Python int (its 64 low bits) or an int64 tensor of one
            element on the device of ``mu``. None draws one from ``generator``, or from torch's default
            generator of the device.
        generator: where the seed comes from when there is none.

    Returns:
        z ``[..., Z]`` or ``[num_samples, ..., Z]``, in the dtype of ``mu``. eps is not stored: backward
        makes it again.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    seed = _seed_tensor(seed, mu.device, generator)
    return cast(Tensor, _ops.reparameterize_forward(mu, logvar, seed, num_samples))


def gaussian_kl(mu: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """KL(N(mu, diag(exp(logvar))) || N(0, I)) = -1/2 sum_j (1 + logvar_j - mu_j^2 - exp(logvar_j)) (equation
    10).

    Args:
        mu, logvar: ``[..., Z]``, of one shape, dtype and device.
        reduction: "none" gives one value per datapoint; "mean" and "sum" reduce over datapoints (never over
        latents).

    Returns:
        ``[...]`` in nats, or a scalar.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or an unknown reduction.
    """
    return reduce(_ops.gaussian_kl_forward(mu, logvar), reduction)


def reparameterize_with_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """``(reparameterize(mu, logvar, ...), gaussian_kl(mu, logvar))`` in one pass over mu and logvar, each
    way.

    Arguments and errors are those of :func:`reparameterize`; the divergence is ``[...]``, one value per
    datapoint.
    """
    z, kl = _ops.reparameterize_with_kl_forward(
        mu, logvar, _seed_tensor(seed, mu.device, generator), num_samples
    )
    return z, kl


def bernoulli_log_likelihood(
    logits: Tensor, x: Tensor, *, reduction: str = "none", packed: bool = False
) -> Tensor:
    """log p(x|z) = sum_i x_i log y_i + (1 - x_i) log(1 - y_i), y = sigmoid(logits) (equation 11).

    Finite, with exact gradients, for logits of any size. ``-bernoulli_log_likelihood`` is the binary
    cross-entropy with logits, summed over features.

    Args:
        logits: ``[..., D]``; may carry latent samples in front: ``[L, ..., D]`` against x ``[..., D]``.
        x: ``[..., D]``, floating-point in [0, 1] (soft targets are legal), or uint8 of 0 and 1, or bool; with
            ``packed`` uint8 ``[..., ceil(D / 8)]`` from :func:`pack_bits`, an eighth of the memory.
        reduction: "none" gives one value per datapoint (and sample); "mean" and "sum" reduce over those.
        packed: x holds eight targets to a byte. The result has the same bits as without.

    Returns:
        log p(x|z), ``[...]`` of logits, in nats, or a scalar.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or an unknown reduction.
    """
    return reduce(_ops.bernoulli_log_likelihood_forward(logits, x, packed), reduction)


def pack_bits(x: Tensor) -> Tensor:
    """Binary targets, eight to a byte, for :func:`bernoulli_log_likelihood` with ``packed=True``.

    Bit j of byte k is feature 8 k + j, as in ``numpy.packbits(x, axis=-1, bitorder="little")``; the unused
    bits of the last byte are zero.

    Args:
        x: ``[..., D]``, bool, or of any other dtype with the values 0 and 1 alone. On a GPU checking them
            waits for the device.

    Returns:
        uint8 ``[..., ceil(D / 8)]`` on the device of x.

    Raises:
        ValueError: x has no dimensions, or holds a value other than 0 and 1.
    """
    if x.dim() == 0:
        raise ValueError("x: got a tensor without dimensions, wanted [..., D]")
    if x.dtype != torch.bool:
        other = (x != 0) & (x != 1)  # NaN among them
        if other.any():
            raise ValueError(f"x: got the value {x[other][0].item()}, wanted 0 and 1 alone")
    width = (x.shape[-1] + 7) // 8
    bits = torch.nn.functional.pad(x.to(torch.uint8), (0, 8 * width - x.shape[-1]))
    bits = bits.reshape(*x.shape[:-1], width, 8) << torch.arange(8, dtype=torch.uint8, device=x.device)
    return bits.sum(-1, dtype=torch.uint8)


def linear_bernoulli_log_likelihood(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, *, reduction: str = "none"
) -> Tensor:
    """log p(x|z) of a Bernoulli decoder (equation 11) from its last hidden layer:
    ``bernoulli_log_likelihood(F.linear(h, weight, bias), x)``, without storing the logits.

    Beside inputs, outputs and gradients it needs a few megabytes where the logits would take ``rows * D``
    values, several times over: for wide outputs (genes, items), and for many latent samples. "sum" and "mean"
    compute the gradients in the forward pass, with no more work than the layer alone. "none", where each
    datapoint may have an upstream gradient of its own, as importance-weighted bounds need, computes the
    logits again in the backward pass.

    Args:
        h: ``[..., H]``; may carry latent samples in front: ``[L, ..., H]`` against x ``[..., D]``.
        weight: ``[D, H]``, as in ``torch.nn.Linear``, in the dtype of h.
        bias: ``[D]``, or None.
        x: ``[..., D]``, as in :func:`bernoulli_log_likelihood`. One whose last dimension is not contiguous,
            or of a floating-point dtype that is neither float32 nor that of h, is copied a block of columns
            at a time.
        reduction: "none" gives one value per datapoint (and sample); "mean" and "sum" reduce over those.

    Returns:
        log p(x|z), ``[...]`` of h, in nats, or a scalar; float32 (float64), as are all sums inside. Autocast
        casts h, weight and bias as it does for a linear layer.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or an unknown reduction.
        NotImplementedError: a second derivative is asked for.
    """
    rows = math.prod(h.shape[:-1])
    if reduction not in ("sum", "mean") or rows == 0:
        return reduce(_ops.linear_bernoulli_log_likelihood_forward(h, weight, bias, x), reduction)
    total = cast(Tensor, _ops.linear_bernoulli_log_likelihood_sum(h, weight, bias, x))
    return total if reduction == "sum" else total / rows


def gaussian_log_likelihood(mean: Tensor, logvar: Tensor, x: Tensor, *, reduction: str = "none") -> Tensor:
    """log p(x|z) = -1/2 sum_i (log 2 pi + logvar_i + (x_i - mean_i)^2 / exp(logvar_i)) (equation 12).

    Args:
        mean: ``[..., D]``; may carry latent samples in front: ``[L, ..., D]`` against x ``[..., D]``.
        logvar: like mean, or broadcast to it; one element for a variance shared by everything, learned or
            fixed (squared error, correctly scaled), which costs no memory. A repeated one of half precision
            makes mean float32, so that its gradient is rounded once.
        x: ``[..., D]``, floating-point, uint8 or bool.
        reduction: "none" gives one value per datapoint (and sample); "mean" and "sum" reduce over those.

    Returns:
        log p(x|z), ``[...]`` of mean, in nats, or a scalar.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or an unknown reduction.
    """
    if not isinstance(logvar, Tensor):
        raise TypeError(f"logvar: got {type(logvar).__name__}, wanted a tensor, such as torch.tensor(0.0)")
    repeated = logvar.dim() > 0 and logvar.shape != mean.shape and logvar.numel() != 1
    summed = (repeated and logvar.requires_grad) or x.requires_grad
    if summed and mean.dtype == logvar.dtype and mean.dtype in (torch.float16, torch.bfloat16):
        # Their gradients are sums, or belong to a float32 x: they are not to be rounded before.
        mean, logvar = mean.float(), logvar.float()
    if repeated:
        logvar = _broadcast("logvar", logvar, "mean", mean)
    elif logvar.numel() == 1 and logvar.shape != mean.shape:
        logvar = logvar.reshape(())
    return reduce(_ops.gaussian_log_likelihood_forward(mean, logvar, x), reduction)


def elbo(
    logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, *, beta: float = 1.0, reduction: str = "mean"
) -> ELBO:
    """The variational bound by SGVB-B, log p(x|z) - beta * KL(q(z|x) || p(z)), for a Bernoulli decoder
    (equations 7, 10).

    The loss to minimise is ``-elbo(...).elbo``.

    Args:
        logits: ``[..., D]`` or ``[L, ..., D]``; log p(x|z) is averaged over the L samples.
        x: ``[..., D]``, as in :func:`bernoulli_log_likelihood`.
        mu, logvar: ``[..., Z]``, as in :func:`gaussian_kl`.
        beta: weight of the divergence; 1 gives the bound.
        reduction: "mean", "sum" (over datapoints) or "none".

    Returns:
        ``ELBO(elbo, log_likelihood, kl)`` in nats.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or an unknown reduction.
    """
    kl = gaussian_kl(mu, logvar)
    if x.shape[:-1] != kl.shape:
        raise ValueError(
            f"mu: got shape {tuple(mu.shape)}, wanted {(*x.shape[:-1], 'Z')}, the datapoints of x"
        )
    log_likelihood = average_samples(bernoulli_log_likelihood(logits, x), kl.dim())
    terms = (log_likelihood - beta * kl, log_likelihood, kl)
    return ELBO(*(reduce(term, reduction) for term in terms))


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The noise that :func:`reparameterize` uses: standard normals, a pure function of (seed, element index).

    Element i, counted in row-major order, comes from lane i mod 4 of Philox4x32-10 counter i div 4 (Salmon
    et al., SC 2011) through the Box-Muller transform, so a longer draw begins with the shorter one, and CPU
    and CUDA agree (the transform to within 2 units in the last place). float16 and bfloat16 are rounded from
    float32.

    Raises:
        TypeError: dtype is not floating-point, or a seed tensor is not int64.
        ValueError: a seed tensor has more than one element, or is on another device.
    """
    device = torch.device(device)
    if isinstance(seed, Tensor) and device not in (seed.device, torch.device(seed.device.type)):
        raise ValueError(f"seed: got device {seed.device}, wanted {device}, the device of the noise")
    return cast(Tensor, _ops.philox_normal(shape, _seed_tensor(seed, device, None), dtype))


def _seed_tensor(
    seed: int | Tensor | None, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        # randint's upper bound is exclusive: 2**63 - 1 itself is never drawn.
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)
    return torch.full(
        (1,), signed64(seed), dtype=torch.int64, device=device
    )  # a fill: no copy from the host, no sync


def _broadcast(name: str, tensor: Tensor, other_name: str, other: Tensor) -> Tensor:
    try:
        return tensor.expand(other.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, wanted {tuple(other.shape)}, "
            f"the shape of {other_name}, or one that broadcasts to it, or one element"
        ) from error
