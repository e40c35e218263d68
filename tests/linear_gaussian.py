"""A model whose evidence and posterior are known: x = W z + b + noise of a variance for each feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae_fast import VAE


class LinearGaussian(VAE):
    """p(x) = N(b, W W^T + S), p(z|x) = N(V W^T S^-1 (x - b), V), V = (I + W^T S^-1 W)^-1; all float64.

    The encoder is linear with a variance of its own; W's columns are orthogonal in the metric S^-1, so V is
    diagonal and ``use_exact_posterior`` makes q the posterior itself.
    """

    def __init__(self, latent_dim: int = 3, dim: int = 6) -> None:
        generator = torch.Generator().manual_seed(1)
        super().__init__(
            encoder=_Encoder(dim, latent_dim), decoder=_Decoder(latent_dim, dim), likelihood="gaussian"
        )
        self.double()
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        deviation = (0.5 * self.decoder.logvar.data).exp()
        orthogonal, _ = torch.linalg.qr(
            torch.randn(dim, latent_dim, generator=generator, dtype=torch.float64)
        )
        lengths = torch.linspace(0.5, 3, latent_dim, dtype=torch.float64)
        self.decoder.linear.weight.data = deviation[:, None] * orthogonal * lengths

    @torch.no_grad()
    def draw(self, count: int) -> Tensor:
        w, b, logvar = self.decoder.linear.weight, self.decoder.linear.bias, self.decoder.logvar
        generator = torch.Generator().manual_seed(2)
        z, noise = (
            torch.randn(count, n, generator=generator, dtype=torch.float64) for n in (w.shape[1], w.shape[0])
        )
        return z @ w.T + b + (0.5 * logvar).exp() * noise

    @torch.no_grad()
    def evidence(self, x: Tensor) -> Tensor:
        w, b = self.decoder.linear.weight, self.decoder.linear.bias
        covariance = w @ w.T + torch.diag(self.decoder.logvar.exp())
        return torch.distributions.MultivariateNormal(b, covariance).log_prob(x)

    @torch.no_grad()
    def use_exact_posterior(self) -> None:
        w, b = self.decoder.linear.weight, self.decoder.linear.bias
        precision = (-self.decoder.logvar).exp()
        inverse = torch.eye(w.shape[1]).to(w) + w.T @ (precision[:, None] * w)
        variance = inverse.diagonal().reciprocal()
        torch.testing.assert_close(torch.diag(variance), inverse.inverse(), rtol=1e-9, atol=1e-12)
        self.encoder.linear.weight.copy_(variance[:, None] * w.T * precision)
        self.encoder.linear.bias.copy_(-(variance[:, None] * w.T * precision) @ b)
        self.encoder.logvar.copy_(variance.log())


class _Encoder(nn.Module):
    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, latent_dim)
        self.logvar = nn.Parameter(torch.zeros(latent_dim))
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        mu = self.linear(x)
        return mu, self.logvar.expand_as(mu).contiguous()


class _Decoder(nn.Module):
    def __init__(self, latent_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(latent_dim, dim)
        self.logvar = nn.Parameter(torch.zeros(dim))
        self.most = 0  # draws in one call

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.most = max(self.most, z[..., 0].numel())
        mean = self.linear(z)
        return mean, self.logvar.expand_as(mean).contiguous()
