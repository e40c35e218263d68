"""Calls every operator once in every way, for tools that watch a GPU program (compute-sanitizer): forward,
backward and double backward, float32 and bfloat16, rows that are narrow, odd, wide and misaligned.

python -m bench.every_operator [--device cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHAPES = [((7, 20), 0), ((7, 20), 1), ((3, 5), 1), ((5, 784), 0), ((2, 5000), 0)]  # and how far off alignment


def second_order(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Backward, and backward of that; everything must be finite."""
    upstream = [torch.randn_like(output).requires_grad_() for output in outputs]
    first = torch.autograd.grad(outputs, inputs, upstream, create_graph=True)
    weights = [torch.randn_like(gradient) for gradient in first]
    second = torch.autograd.grad(first, [*inputs, *upstream], weights, allow_unused=True)
    for tensor in (*outputs, *first, *second):
        assert tensor is None or tensor.isfinite().all()


def fused_layer(h: Tensor, weight: Tensor, x: Tensor) -> None:
    """The last linear layer with its log-likelihood, both ways; it has no second derivatives."""
    import vae_fast as vf

    for reduction in ("none", "sum"):
        out = vf.linear_bernoulli_log_likelihood(h, weight, None, x, reduction=reduction)
        for tensor in (out, *torch.autograd.grad(out.sum(), [h, weight])):
            assert tensor.isfinite().all()


def calls(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, offset: int
) -> list[Callable[[], None]]:
    import vae_fast as vf

    def leaf(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.randn(count + offset, device=device).to(dtype)[offset:].view(shape).requires_grad_()

    mu, logvar, several = leaf(*shape), leaf(*shape), leaf(3, *shape)
    scalar = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
    hidden, weight = leaf(3, shape[0], 5), leaf(shape[1], 5)
    soft, hard = torch.rand(shape, device=device), torch.rand(shape, device=device) < 0.5
    bits, seed = vf.pack_bits(hard), torch.tensor([11], device=device)
    return [
        lambda: second_order([vf.gaussian_kl(mu, logvar)], [mu, logvar]),
        lambda: second_order([vf.reparameterize(mu, logvar, seed=seed)], [mu, logvar]),
        lambda: second_order([vf.reparameterize(mu, logvar, num_samples=3, seed=seed)], [mu, logvar]),
        lambda: second_order(vf.reparameterize_with_kl(mu, logvar, seed=seed), [mu, logvar]),
        lambda: second_order([vf.bernoulli_log_likelihood(mu, soft)], [mu]),
        lambda: second_order([vf.bernoulli_log_likelihood(several, soft.to(dtype))], [several]),
        lambda: second_order([vf.bernoulli_log_likelihood(several, hard)], [several]),
        lambda: fused_layer(hidden, weight, soft),
        lambda: fused_layer(hidden, weight, hard),
        lambda: second_order([vf.bernoulli_log_likelihood(several, bits, packed=True)], [several]),
        lambda: second_order([vf.gaussian_log_likelihood(mu, logvar, soft)], [mu, logvar]),
        lambda: second_order([vf.gaussian_log_likelihood(several, scalar, soft)], [several, scalar]),
        lambda: second_order([vf.elbo(several, hard, mu, logvar).elbo], [several, mu, logvar]),
        lambda: vf.philox_normal((3, *shape), seed=seed, dtype=dtype).sum().item() and None,
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args(argv).device)
    torch.manual_seed(0)
    done = 0
    for dtype in (torch.float32, torch.bfloat16):
        for shape, offset in SHAPES:
            for call in calls(shape, dtype, device, offset):
                call()
                done += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{done} calls, all finite")


if __name__ == "__main__":
    main()
