"""What a trained model is worth: the variational bound over a data set, its log-likelihood by importance
sampling and by the estimator of appendix D, and the latent variables in use.

Evaluation is deterministic. The noise of the bound belongs to the datapoint: rows [100 b, 100 (b + 1)) use
``philox_normal((100, L, latent_dim), seed=step_seed(seed, b, EVALUATE))`` (a posterior other than the
Gaussian: its own noise of this shape and seed), so the batch size and the device change results by rounding
only, and other models see the same noise. So does that of importance sampling: samples [10 j, 10 (j + 1)) of
those rows are
``philox_normal((10, 100, latent_dim), seed=step_seed(step_seed(seed, b, EVALUATE_IMPORTANCE), j))``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, hmc
from .batches import binarise, uniform_words
from .datasets import Prepared, prepare
from .distributions import Posterior, posterior_of
from .estimators import EVALUATE, EVALUATE_BINARISE, EVALUATE_CHAIN, EVALUATE_IMPORTANCE, log_prior, step_seed

NOISE_ROWS = 100  # rows that share a seed
NOISE_SAMPLES = 10  # importance samples that do
STARTS = ("resampled", "prior", "encoder")
PRIOR_DRAWS = 1000  # of which "resampled" takes one


@dataclass(frozen=True)
class Bound:
    """Means over ``count`` datapoints, in nats: elbo = log_likelihood - kl, higher is better."""

    elbo: float
    log_likelihood: float
    kl: float
    count: int

    @property
    def rate(self) -> float:
        """E_x[KL(q(z|x) || p(z))]: nats that the code z takes (Alemi et al., arXiv:1711.00464)."""
        return self.kl

    @property
    def distortion(self) -> float:
        """-E_x[E_q[log p(x|z)]]: nats that x takes once z is known. elbo = -(rate + distortion)."""
        return -self.log_likelihood


@dataclass(frozen=True)
class LogLikelihood:
    """Estimates of log p(x), in nats; higher is better.

    ``mean`` is over ``count`` datapoints, and ``standard_error`` its Monte Carlo error alone: how far another
    seed would bring it, not how far other datapoints would. ``per_datapoint`` and
    ``per_datapoint_standard_error`` are float64 ``[N]`` on the CPU. An error is that of a log of a mean of L
    numbers w by the delta method, sd(w) / (mean(w) sqrt(L)); NaN for L = 1.
    """

    mean: float
    standard_error: float
    count: int
    per_datapoint: Tensor
    per_datapoint_standard_error: Tensor


@dataclass(frozen=True)
class MarginalLikelihood(LogLikelihood):
    """Those of appendix D. ``acceptance``, float64 ``[N]``, is the share of proposals each chain took."""

    acceptance: Tensor


@dataclass(frozen=True)
class ActiveUnits:
    """How many latent variables are in use, and Var_x(E_q[z]) of each, float64 ``[latent_dim]``."""

    count: int
    variance: Tensor


@torch.no_grad()
def bound(
    model: Any,
    data: Any,
    *,
    num_samples: int = 1,
    use_mean: bool = False,
    batch_size: int = 1000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> Bound:
    """The variational bound, averaged over datapoints: 1/L sum_l log p(x|z_l) - KL(q(z|x) || p(z)) (equation
    7); where the divergence has no closed form, 1/L sum_l [log q(z_l|x) - log p(z_l)] in its place (equation
    6).

    Args:
        model: a :class:`vae_fast.VAE`, or anything with its ``encoder``, ``decoder`` and ``log_likelihood``.
        data: an array or tensor ``[N, D]``, or what :func:`vae_fast.datasets.prepare` returned.
        num_samples: L, the draws of z per datapoint; each datapoint is encoded once however many.
        use_mean: put z = E_q[z], mu(x) of a Gaussian, in the place of draws: a score of reconstructions
            without noise, not a bound.
        batch_size: how many draws of z are decoded at a time. It changes the results by rounding only.
        seed: of the noise.
        targets, pixel_scale: how to read an array; see :func:`vae_fast.datasets.prepare`.
    """
    _positive(num_samples=num_samples, batch_size=batch_size)
    samples = 1 if use_mean else num_samples
    data = _prepared(model, data, targets, pixel_scale)
    posterior = posterior_of(model)
    totals: list[Tensor] = []
    with evaluating(model):
        for rows, x in _batches(model, data, max(1, batch_size // samples), seed):
            mu, logvar = model.encoder(x)
            if use_mean:
                z = posterior.mean(mu, logvar)
            else:
                eps = _by_row(rows, partial(_block_noise, posterior, seed, samples, mu)).transpose(0, 1)
                z = posterior.map(eps, mu, logvar)
            log_likelihood = functional.average_samples(model.log_likelihood(model.decoder(z), x), 1)
            if posterior.closed_kl:
                kl = posterior.kl(mu, logvar)
            else:
                kl = functional.average_samples(posterior.log_density(z, mu, logvar) - log_prior(z), 1)
            totals.append(torch.stack((log_likelihood.double().sum(), kl.double().sum())))
    log_likelihood_mean, kl_mean = (torch.stack(totals).sum(dim=0) / len(data)).tolist()
    return Bound(log_likelihood_mean - kl_mean, log_likelihood_mean, kl_mean, len(data))


@torch.no_grad()
def squared_error(
    model: Any,
    data: Any,
    *,
    batch_size: int = 1000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> float:
    """|x - y|^2 of the reconstruction y = E[x|z] at z = mu(x): summed over features, averaged over
    datapoints.

    ``seed`` matters to targets="dynamic" only.
    """
    _positive(batch_size=batch_size)
    data = _prepared(model, data, targets, pixel_scale)
    with evaluating(model):
        errors = [
            ((x - model.decode_mean(model.encoder(x)[0])) ** 2).double().sum()
            for _, x in _batches(model, data, batch_size, seed)
        ]
    return float(torch.stack(errors).sum() / len(data))


@torch.no_grad()
def complete_data(
    model: Any,
    data: Any,
    *,
    leapfrog_steps: int = 10,
    burn_in: int = 20,
    batch_size: int = 1000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> Bound:
    """log p(x, z) at one sample z of the posterior, averaged over datapoints: what Monte Carlo EM ascends.

    ``elbo`` is log p(x, z), which is log p(x) + log p(z|x) and no bound; ``log_likelihood`` is log p(x|z) and
    ``kl`` -log p(z). Chains begin at draws of the prior; the arguments are those of
    :func:`marginal_likelihood`.
    """
    _positive(leapfrog_steps=leapfrog_steps, batch_size=batch_size)
    data = _prepared(model, data, targets, pixel_scale)
    totals: list[Tensor] = []
    with evaluating(model):
        for rows, x in _batches(model, data, batch_size, seed):
            samples = _posterior(model, x, "prior", 1, burn_in, leapfrog_steps, rows, seed)
            prior = log_prior(samples.z[0])
            totals.append(torch.stack((samples.log_density[0] - prior, -prior)).double().sum(dim=1))
    log_likelihood_mean, kl_mean = (torch.stack(totals).sum(dim=0) / len(data)).tolist()
    return Bound(log_likelihood_mean - kl_mean, log_likelihood_mean, kl_mean, len(data))


@torch.no_grad()
def importance_log_likelihood(
    model: Any,
    data: Any,
    *,
    num_samples: int = 5000,
    batch_size: int = 10_000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> LogLikelihood:
    """log p(x) by importance sampling: log 1/L sum_l p(x|z_l) p(z_l) / q(z_l|x), z_l ~ q(z|x).

    The mean inside the log is unbiased for p(x), so its log is below log p(x) on average, and rises to it
    with L (Burda, Grosse & Salakhutdinov, arXiv:1509.00519, section 3; Rezende, Mohamed & Wierstra,
    arXiv:1401.4082, appendix E). Each datapoint is encoded once however many samples; sums are kept in
    float64, and memory does not grow with L.

    Args:
        model: a :class:`vae_fast.VAE`, or anything with its ``encoder``, ``decoder`` and ``log_likelihood``.
        data: an array or tensor ``[N, D]``, or what :func:`vae_fast.datasets.prepare` returned.
        num_samples: L, the draws of z per datapoint.
        batch_size: how many draws of z are decoded at a time, if it is 1,000 or more. It changes the results
            by rounding only.
        seed: of the noise.
        targets, pixel_scale: how to read an array; see :func:`vae_fast.datasets.prepare`.
    """
    _positive(num_samples=num_samples, batch_size=batch_size)
    data = _prepared(model, data, targets, pixel_scale)
    posterior = posterior_of(model)
    blocks_at_once = max(1, batch_size // (NOISE_ROWS * NOISE_SAMPLES))
    estimates: list[tuple[Tensor, Tensor]] = []
    with evaluating(model):
        for rows, x in _batches(model, data, NOISE_ROWS, seed):
            mu, logvar = model.encoder(x)
            row_seed = step_seed(seed, rows.start // NOISE_ROWS, EVALUATE_IMPORTANCE)
            log_mean = _LogMeanExp()
            for first in range(0, num_samples, NOISE_SAMPLES * blocks_at_once):
                samples = min(NOISE_SAMPLES * blocks_at_once, num_samples - first)
                eps = _importance_noise(posterior, row_seed, first // NOISE_SAMPLES, samples, mu)
                z = posterior.map(eps, mu, logvar)
                log_ratio = log_prior(z).double() - posterior.log_density(z, mu, logvar).double()
                log_mean.add(model.log_likelihood(model.decoder(z), x).double() + log_ratio)
            estimates.append((log_mean.value.cpu(), log_mean.standard_error.cpu()))
    return LogLikelihood(*_summary(estimates))


@torch.no_grad()
def marginal_likelihood(
    model: Any,
    data: Any,
    *,
    num_samples: int = 200,
    leapfrog_steps: int = 4,
    burn_in: int = 100,
    start: str = "resampled",
    batch_size: int = 1000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> MarginalLikelihood:
    """log p(x) by the estimator of appendix D, which needs no encoder; for few latent variables (the paper
    says fewer than 5).

    1. Draw ``num_samples`` values z from the posterior p(z|x) by Hamiltonian Monte Carlo, step size tuned to
       90 % acceptance.
    2. Fit a density q(z) to the first half of them: a kernel density with their covariance, whose bandwidth
       is the best of 10 by 2-fold cross-validation.
    3. With the L others, 1 / p(x) = E_{p(z|x)}[q(z) / (p(z) p(x|z))], so
       log p(x) = -log 1/L sum_l q(z_l) / (p(z_l) p(x|z_l)).

    The mean is unbiased for 1 / p(x), so its -log is above log p(x) on average: by 0.21 nats with 50 samples
    of a Gaussian posterior in 3 dimensions, by 0.06 with 100, 0.03 with 150, 0.02 with 200 and 0.01 with 400.
    The jackknife takes away a fifth of it at 50 samples and no more, because a few weights q / p carry the
    mean: more samples are the remedy. A chain that never leaves one mode of the posterior misses the others,
    and is below. One that leaves it between the halves finds q(z) = 0, and would be above by thousands of
    nats: an estimate is cut to the largest log p(x|z_l). For samples of the posterior that is no less than
    log p(x), which their mean of log p(x|z) exceeds by a divergence. Neighbours in a chain are not
    independent, so the standard errors are too small.

    Args:
        model: a :class:`vae_fast.VAE`, or anything with its ``encoder``, ``decoder`` and ``log_likelihood``.
        data: an array or tensor ``[N, D]``, or what :func:`vae_fast.datasets.prepare` returned.
        num_samples: draws of z per datapoint. The default is accurate; the paper's 50 is what
            :func:`figure3_likelihoods` takes, to be compared with its drawing.
        leapfrog_steps: of one transition; the paper's.
        burn_in: transitions before the first sample, in which the step size is tuned.
        start: where the chains begin. "resampled": one of 1000 draws of the prior, taken with probability
            proportional to p(x|z) (no encoder needed); "prior": a draw of the prior; "encoder": its mean. A
            chain that begins far from the posterior may not arrive: for figure 3's models "prior" was up to
            19 nats too low.
        batch_size: how many chains run at a time. They share a step size and seeds, so the estimates depend
            on it, within their error.
        seed: of the noise.
        targets, pixel_scale: how to read an array; see :func:`vae_fast.datasets.prepare`.

    Raises:
        ValueError: too few samples to fit a density of that many latent variables.
    """
    _positive(num_samples=num_samples, leapfrog_steps=leapfrog_steps, batch_size=batch_size)
    if start not in STARTS:
        raise ValueError(f"start: got {start!r}, wanted one of {', '.join(map(repr, STARTS))}")
    data = _prepared(model, data, targets, pixel_scale)
    estimates: list[tuple[Tensor, Tensor]] = []
    acceptance: list[Tensor] = []
    with evaluating(model):
        for rows, x in _batches(model, data, batch_size, seed):
            samples = _posterior(model, x, start, num_samples, burn_in, leapfrog_steps, rows, seed)
            least = 4 * (samples.z.shape[-1] + 2)
            if num_samples < least:
                raise ValueError(
                    f"num_samples: got {num_samples}, wanted at least {least} for {samples.z.shape[-1]} "
                    "latent variables: half of the samples are split in two, and each part has a covariance"
                )
            z, log_joint = samples.z.double(), samples.log_density.double()
            half = num_samples // 2
            log_mean = _LogMeanExp()
            log_mean.add(_kernel_density(z[:half])(z[half:]) - log_joint[half:])
            most = (log_joint - log_prior(z)).amax(dim=0)  # of log p(x|z)
            estimates.append((-torch.maximum(log_mean.value, -most).cpu(), log_mean.standard_error.cpu()))
            acceptance.append(samples.acceptance.cpu())
    still = int((torch.cat(acceptance) == 0).sum())
    if still:
        warnings.warn(f"marginal_likelihood: {still} of {len(data)} chains never moved", stacklevel=3)
    return MarginalLikelihood(*_summary(estimates), torch.cat(acceptance))


def figure3_likelihoods(
    model: Any, train: Any, test: Any, *, seed: int = 0, targets: str = "auto", pixel_scale: float = 256
) -> tuple[MarginalLikelihood, MarginalLikelihood]:
    """(train, test) as in figure 3: appendix D's estimate on the first 1000 datapoints of each, with the
    paper's 50 samples and 4 leapfrog steps. With 50 it is about 0.2 nats high (:func:`marginal_likelihood`).

    The figure's model is ``VAE(data_dim=784, hidden_dims=[100], latent_dim=3)``. Chains begin at resampled
    draws of the prior, so that models with and without an encoder are treated alike.
    """

    def estimate(data: Any) -> MarginalLikelihood:
        data = _prepared(model, data, targets, pixel_scale)
        first = replace(data, values=data.values[:1000])
        return marginal_likelihood(model, first, num_samples=50, leapfrog_steps=4, seed=seed)

    return estimate(train), estimate(test)


@torch.no_grad()
def active_units(
    model: Any,
    data: Any,
    *,
    threshold: float = 0.01,
    batch_size: int = 1000,
    seed: int = 0,
    targets: str = "auto",
    pixel_scale: float = 255,
) -> ActiveUnits:
    """The latent variables z_j with Var_x(E_q[z_j]) > threshold (Burda, Grosse & Salakhutdinov,
    arXiv:1509.00519).

    E_q[z] = mu(x) of a Gaussian; the variance is over the N datapoints, divided by N. ``seed`` matters to
    targets="dynamic" only.
    """
    data = _prepared(model, data, targets, pixel_scale)
    with evaluating(model):
        means = [
            posterior_of(model).mean(*model.encoder(x)).double().cpu()
            for _, x in _batches(model, data, batch_size, seed)
        ]
    variance = torch.cat(means).var(dim=0, correction=0)
    return ActiveUnits(int((variance > threshold).sum()), variance)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then each of its modules as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, wanted an integer of 1 or more")


def _prepared(model: Any, data: Any, targets: str, pixel_scale: float) -> Prepared:
    return prepare(
        data,
        likelihood=model.likelihood,
        targets=targets,
        pixel_scale=pixel_scale,
        name="data",
        width=getattr(model, "data_dim", None),
    )


def _batches(model: Any, data: Prepared, size: int, seed: int) -> Iterator[tuple[range, Tensor]]:
    """Every datapoint once, the last minibatch too, with its rows."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    for first in range(0, len(data), size):
        rows = range(first, min(first + size, len(data)))
        x = data.batch(torch.arange(rows.start, rows.stop, device=data.values.device)).to(like)
        if data.kind == "dynamic":
            x = binarise(x, _by_row(rows, partial(_block_words, seed, x)))
        yield rows, x


def _by_row(rows: range, of_block: Callable[[int], Tensor]) -> Tensor:
    """These rows of the noise whose block b is ``of_block(b)``, ``[NOISE_ROWS, ...]``."""
    blocks = range(rows.start // NOISE_ROWS, (rows.stop - 1) // NOISE_ROWS + 1)
    noise = torch.cat([of_block(block) for block in blocks])
    skipped = blocks.start * NOISE_ROWS
    return noise[rows.start - skipped : rows.stop - skipped]


def _block_noise(posterior: Posterior, seed: int, samples: int, mu: Tensor, block: int) -> Tensor:
    shape = (NOISE_ROWS, samples, mu.shape[-1])
    return posterior.draw(shape, seed=step_seed(seed, block, EVALUATE), dtype=mu.dtype, device=mu.device)


def _block_words(seed: int, x: Tensor, block: int) -> Tensor:
    block_seed = torch.full((1,), step_seed(seed, block, EVALUATE_BINARISE), device=x.device)
    return uniform_words((NOISE_ROWS, x.shape[-1]), block_seed)


def _importance_noise(
    posterior: Posterior, row_seed: int, first_block: int, samples: int, mu: Tensor
) -> Tensor:
    """``[samples, B, Z]`` from block ``first_block`` on, for the B <= NOISE_ROWS rows of mu."""
    shape = (NOISE_SAMPLES, NOISE_ROWS, mu.shape[-1])
    blocks = range(first_block, first_block - (-samples // NOISE_SAMPLES))
    noise = [
        posterior.draw(shape, seed=step_seed(row_seed, j), dtype=mu.dtype, device=mu.device) for j in blocks
    ]
    return torch.cat(noise)[:samples, : len(mu)]


def _posterior(
    model: Any,
    x: Tensor,
    start: str,
    num_samples: int,
    burn_in: int,
    leapfrog_steps: int,
    rows: range,
    seed: int,
) -> hmc.Samples:
    """Samples of p(z|x) for these rows; their seed is that of the first of them."""
    seed = step_seed(seed, rows.start, EVALUATE_CHAIN)
    z = model.encoder(x)[0]
    if start == "prior":
        z = functional.philox_normal(z.shape, seed=seed, dtype=z.dtype, device=z.device)
    if start == "resampled":
        z = _resampled_prior(model, x, z.shape[-1], seed)
    return hmc.sample(
        hmc.log_joint(model, x),
        z,
        num_samples=num_samples,
        burn_in=burn_in,
        leapfrog_steps=leapfrog_steps,
        seed=seed,
    )


def _resampled_prior(model: Any, x: Tensor, latent_dim: int, seed: int) -> Tensor:
    """For each datapoint one of the same PRIOR_DRAWS draws z_k of the prior, with probability proportional to
    p(x|z_k); ``[B, Z]``.

    The largest of log p(x|z_k) - log(-log u_k), u_k = (w_k + 1/2) / 2**32, is such a choice (Gumbel's).
    """
    shape = (PRIOR_DRAWS, latent_dim)
    z = functional.philox_normal(shape, seed=seed, dtype=x.dtype, device=x.device)
    decoded = model.decoder(z)
    words = uniform_words((len(x), PRIOR_DRAWS), torch.full((1,), seed, device=x.device))
    noise = -(-((words.double() + 0.5) / 2**32).log()).log()
    chosen = [
        (model.log_likelihood(decoded, row.expand(PRIOR_DRAWS, *row.shape)) + of_row).argmax()
        for row, of_row in zip(x, noise, strict=True)
    ]
    return z[torch.stack(chosen)]


# --- log-likelihoods ----------------------------------------------------------------------------------------


class _LogMeanExp:
    """log 1/L sum_l exp(w_l) of numbers that come in chunks ``[l, B]``, and its standard error."""

    def __init__(self) -> None:
        self._count = 0
        self._largest = torch.tensor(-math.inf)
        self._sum = self._squares = torch.tensor(0.0)  # of exp(w - largest) and of its square

    def add(self, log_weights: Tensor) -> None:
        before = self._largest.to(log_weights)
        largest = torch.maximum(before, log_weights.amax(dim=0))
        shift = largest.nan_to_num(neginf=0.0, nan=math.nan)  # all weights 0 so far: nothing to scale
        scale, weights = (before - shift).exp(), (log_weights - shift).exp()
        self._sum = self._sum.to(scale) * scale + weights.sum(dim=0)
        self._squares = self._squares.to(scale) * scale**2 + (weights**2).sum(dim=0)
        self._largest = largest
        self._count += len(log_weights)

    @property
    def value(self) -> Tensor:
        shift = self._largest.nan_to_num(neginf=0.0, nan=math.nan)
        return shift + (self._sum / self._count).log()

    @property
    def standard_error(self) -> Tensor:
        """sd(w) / (mean(w) sqrt(L)), the variance divided by L - 1."""
        n = self._count
        relative = (n * self._squares / self._sum**2 - 1).clamp_min(0) / (n - 1 or math.nan)
        return relative.sqrt()


def _summary(estimates: list[tuple[Tensor, Tensor]]) -> tuple[float, float, int, Tensor, Tensor]:
    """The fields of :class:`LogLikelihood`. Datapoints have noise of their own, so variances add."""
    values = torch.cat([value for value, _ in estimates])
    errors = torch.cat([error for _, error in estimates])
    count = len(values)
    return float(values.mean()), float((errors**2).sum().sqrt() / count), count, values, errors


def _kernel_density(z: Tensor) -> Callable[[Tensor], Tensor]:
    """q(z) of each datapoint, fitted to ``[n, B, Z]``; log q of ``[m, B, Z]`` is ``[m, B]``.

    q is the mean of n Gaussians at the points of z, with covariance factor^2 Cov(z). The factor is n^(-1 /
    (Z + 4)) (Scott's) times one of exp((i - 5) / 2), i = 0 ... 9: the one under which each half of z is
    likeliest when q is fitted to the other.
    """
    n, _, dim = z.shape
    factors = [n ** (-1 / (dim + 4)) * math.exp((i - 5) / 2) for i in range(10)]
    one, other = z[: n // 2], z[n // 2 :]
    scores = [
        _log_kernel_density(one, other, factor).sum(dim=0)
        + _log_kernel_density(other, one, factor).sum(dim=0)
        for factor in factors
    ]
    best = torch.stack(scores).argmax(dim=0)  # of each datapoint
    return partial(_log_kernel_density, z, factor=torch.tensor(factors).to(z)[best])


def _log_kernel_density(fitted: Tensor, z: Tensor, factor: float | Tensor) -> Tensor:
    """log of the mean of Gaussians at the points of ``fitted``; factor: a number or ``[B]``."""
    n, _, dim = fitted.shape
    centred = fitted - fitted.mean(dim=0)
    covariance = torch.einsum("nbi,nbj->bij", centred, centred) / (n - 1)
    # A chain that stood still has no covariance: a tiny one in its place keeps the others going.
    tiny = 1e-9 * covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1) + 1e-12
    root, _ = torch.linalg.cholesky_ex(covariance + torch.diag_embed(tiny.unsqueeze(-1).expand(-1, dim)))
    factor = torch.as_tensor(factor).to(z)

    def whitened(points: Tensor) -> Tensor:
        """``[points, B, Z]`` in units of the kernels' width."""
        columns = torch.linalg.solve_triangular(root, points.permute(1, 2, 0), upper=False)
        result: Tensor = columns.permute(2, 0, 1) / factor.unsqueeze(-1)
        return result

    distances = (whitened(z).unsqueeze(1) - whitened(fitted)).square().sum(dim=-1)  # [m, n, B]
    log_volume = root.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1) + dim * factor.log()
    log_kernels = -0.5 * (distances + dim * math.log(2 * math.pi)) - log_volume
    log_density: Tensor = log_kernels.logsumexp(dim=1) - math.log(n)
    return log_density
