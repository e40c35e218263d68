"""Wake-sleep on Frey Face in plain PyTorch, beside the library: when does it leave the plateau?

python wake_sleep_plateau.py FREY.npz same|authors LATENTS SAMPLES SEED    a line now and then
python wake_sleep_plateau.py FREY.npz compare LATENTS    how far gradients are from the library's, at most

same: both gradients at the same parameters, as in the library; authors: the decoder is updated before it
dreams.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from vae_fast import presets, reference
from vae_fast.algorithms import wake_sleep
from vae_fast.algorithms.common import substream
from vae_fast.batches import ArraySource
from vae_fast.engines import Plan
from vae_fast.experiments import curves
from vae_fast.optim import make_optimizer


def log_normal(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean) ** 2 * torch.exp(-logvar)).sum(-1)


def drawn(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mean + eps * torch.exp(0.5 * logvar)


def train(x_all: Tensor, order: str, latents: int, samples: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = presets.paper_frey(latents, wake_sleep=True).model(seed=seed)
    halves = [list(half.parameters()) for half in (model.encoder, model.decoder)]
    optimizers = [make_optimizer("adagrad", half, 0.02) for half in halves]

    def descend(half: int, loss: Tensor) -> None:
        optimizers[half].zero_grad(set_to_none=True)
        loss.backward()
        for p in halves[half]:
            if p.dim() == 2 and p.grad is not None:
                p.grad.add_(p.detach(), alpha=1 / len(x_all))  # the prior N(0, I) on weights

    total, steps, next_line = 0.0, 0, 1e5
    for step in range(1, samples // 100 + 1):
        x = x_all[torch.randint(len(x_all), (100,))]
        with torch.no_grad():
            mu, logvar = model.encoder(x)
            z = drawn(mu, logvar, torch.randn_like(mu))
        likelihood = log_normal(x, *model.decoder(z))
        descend(1, -likelihood.mean())
        if order == "authors":
            optimizers[1].step()
        with torch.no_grad():
            dreamed_z = torch.randn_like(z)
            mean, spread = model.decoder(dreamed_z)
            dreamed_x = drawn(mean, spread, torch.randn_like(mean))
        descend(0, -log_normal(dreamed_z, *model.encoder(dreamed_x)).mean())
        for i in (0,) if order == "authors" else (1, 0):
            optimizers[i].step()
        zero = torch.zeros_like(z)
        bound = likelihood.detach() + log_normal(z, zero, zero) - log_normal(z, mu, logvar)
        total, steps = total + float(bound.mean()), steps + 1
        if 100 * step >= next_line:
            print(latents, order, seed, f"{100 * step:.3g} bound {total / steps:.1f}", flush=True)
            total, steps, next_line = 0.0, 0, next_line * (1.26 if next_line < 1e6 else 1.1)


def compare(data: curves.Prepared, x_all: Tensor, latents: int) -> None:
    """One step from the same numbers, in float64."""
    cpu, seed = torch.device("cpu"), 12345
    model = presets.paper_frey(latents, wake_sleep=True).model(seed=0).double()
    source = ArraySource(data, batch_size=100, seed=0, order="replacement", device=cpu)
    optimizer = make_optimizer("adagrad", model.parameters(), 0.02)
    program = wake_sleep._Program(reference, model, optimizer, source, Plan(0), cpu)
    x, parameters = x_all[:100].double(), list(model.parameters())
    theirs = torch.autograd.grad(-program.estimate_batch(x, seed).objective.mean(), parameters)

    def normals(like: Tensor, stream: int) -> Tensor:
        key = substream(seed, stream, cpu) if stream else torch.tensor([seed])
        return reference.philox_normal(like.shape, seed=key, dtype=torch.float64)

    with torch.no_grad():
        mu, logvar = model.encoder(x)
        z, dreamed_z = drawn(mu, logvar, normals(mu, 0)), normals(mu, 1)
        mean, spread = model.decoder(dreamed_z)
        dreamed_x = drawn(mean, spread, normals(mean, 2))
    loss = -log_normal(x, *model.decoder(z)).mean() - log_normal(dreamed_z, *model.encoder(dreamed_x)).mean()
    ours = torch.autograd.grad(loss, parameters)
    print(max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)))


def main(argv: Sequence[str]) -> None:
    torch.set_num_threads(1)
    prepared = curves.load_data(["frey"], None, argv[0])[0]["frey"][0]
    x_all = prepared.values.float() / 256
    if argv[1] == "compare":
        compare(prepared, x_all, int(argv[2]))
    else:
        train(x_all, argv[1], int(argv[2]), int(float(argv[3])), int(argv[4]))


if __name__ == "__main__":
    main(sys.argv[1:])
