"""Drop-in modules and the variational auto-encoder of the paper.

Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114, section 3 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import functional as F
from .distributions import POSTERIORS, Posterior
from .estimators import ESTIMATORS, default_estimator
from .reference import integer

LIKELIHOODS = ("bernoulli", "gaussian")
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "softplus": nn.Softplus}


class Reparameterize(nn.Module):
    """z = mu + exp(logvar / 2) * eps as a module; see :func:`vae_fast.reparameterize`."""

    def __init__(self, *, num_samples: int | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.generator = generator

    def forward(self, mu: Tensor, logvar: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        return F.reparameterize(mu, logvar, num_samples=self.num_samples, seed=seed, generator=self.generator)


class GaussianKL(nn.Module):
    """KL(N(mu, exp(logvar)) || N(0, I)) as a loss module, in nats; see :func:`vae_fast.gaussian_kl`.

    The default averages over datapoints (and sums over latents, as always).
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return F.gaussian_kl(mu, logvar, reduction=self.reduction)


class BernoulliNLL(nn.Module):
    """-log p(x|z) of a Bernoulli decoder as a loss module, in nats; see
    :func:`vae_fast.bernoulli_log_likelihood`.

    The default averages over datapoints (and sums over features, as always).
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        return -F.bernoulli_log_likelihood(logits, x, reduction=self.reduction)


class LinearBernoulliNLL(nn.Linear):
    """The last linear layer of a Bernoulli decoder and its -log p(x|z) in one, in nats, the logits never
    stored; see :func:`vae_fast.linear_bernoulli_log_likelihood`.

    An ``nn.Linear(in_features, out_features)``, with its parameters, that takes the target too:
    h ``[..., H]`` and x ``[..., D]``. The default averages over datapoints (and sums over features, as
    always). For the logits themselves, ``nn.functional.linear(h, layer.weight, layer.bias)``.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, reduction: str = "mean"
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.reduction = reduction

    def forward(self, h: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return -F.linear_bernoulli_log_likelihood(h, self.weight, self.bias, x, reduction=self.reduction)


class ELBOLoss(nn.Module):
    """The negative variational bound, -(log p(x|z) - beta * KL), in nats; see :func:`vae_fast.elbo`."""

    def __init__(self, *, beta: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.beta = beta
        self.reduction = reduction

    def forward(self, logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return -F.elbo(logits, x, mu, logvar, beta=self.beta, reduction=self.reduction).elbo


def _hidden_layers(widths: Sequence[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class MLPEncoder(nn.Module):
    """q(z|x) = N(mu, diag(exp(logvar))): hidden layers, then one linear head each for mu and logvar
    (appendix C.2).

    x ``[..., data_dim]`` to ``(mu, logvar)``, each ``[..., latent_dim]``: mu = W h + b, and
    logvar = ``logvar_scale`` * W' h + b', where h are the last hidden units.
    """

    logvar_scale: float = 1.0

    def __init__(
        self,
        data_dim: int,
        hidden_dims: Sequence[int],
        latent_dim: int,
        activation: str = "tanh",
        logvar_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not (math.isfinite(logvar_scale) and logvar_scale > 0):
            raise ValueError(f"logvar_scale: got {logvar_scale}, wanted a number above 0")
        widths = [data_dim, *hidden_dims]
        self.logvar_scale = logvar_scale
        self.hidden = _hidden_layers(widths, activation)
        self.mu = nn.Linear(widths[-1], latent_dim)
        self.logvar = nn.Linear(widths[-1], latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden(x)
        return self.mu(h), self.logvar(h if self.logvar_scale == 1 else self.logvar_scale * h)


class MLPDecoder(nn.Module):
    """p(x|z): hidden layers, then the logits of a Bernoulli or the mean and log-variance of a Gaussian
    (appendix C).

    z ``[..., latent_dim]`` to logits ``[..., data_dim]``, or to ``(mean, logvar)``, each ``[..., data_dim]``.
    ``mean_activation="sigmoid"`` keeps the Gaussian mean in (0, 1), as the paper does for Frey Face.
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dims: Sequence[int],
        data_dim: int,
        likelihood: str = "bernoulli",
        activation: str = "tanh",
        mean_activation: str | None = None,
    ) -> None:
        super().__init__()
        widths = [latent_dim, *hidden_dims]
        self.hidden = _hidden_layers(widths, activation)
        self.likelihood = likelihood
        self.mean_activation = mean_activation
        if likelihood == "bernoulli":
            self.logits = nn.Linear(widths[-1], data_dim)
        else:
            self.mean = nn.Linear(widths[-1], data_dim)
            self.logvar = nn.Linear(widths[-1], data_dim)

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.hidden(z)
        if self.likelihood == "bernoulli":
            return cast(Tensor, self.logits(h))
        mean = self.mean(h)
        return torch.sigmoid(mean) if self.mean_activation == "sigmoid" else mean, self.logvar(h)


class VAE(nn.Module):
    """A variational auto-encoder: an encoder q(z|x), a decoder p(x|z) and the prior p(z) = N(0, I).

    Either the paper's multi-layer perceptrons::

        VAE(data_dim=784, hidden_dims=[500], latent_dim=20, likelihood="bernoulli")

    or any pair of modules, encoder(x) -> (mu, logvar) and decoder(z) -> logits or (mean, logvar)::

        VAE(encoder=my_encoder, decoder=my_decoder, likelihood="gaussian")

    x is ``[B, data_dim]`` there, however the data came, and the decoder returns as much: convolutions begin
    with ``nn.Unflatten(1, (1, 28, 28))``, and end with ``nn.Flatten()``.

    Args:
        data_dim: number of features D of a datapoint.
        hidden_dims: widths of the encoder's hidden layers; the decoder has them in reverse order.
        latent_dim: number of latent variables.
        likelihood: "bernoulli" (decoder returns logits) or "gaussian" (decoder returns mean and
        log-variance).
        activation: of the hidden layers, "tanh" (the paper's), "relu" or "softplus".
        mean_activation: "sigmoid" keeps a Gaussian mean in (0, 1); None leaves it linear.
        posterior: the family of q(z|x): "gaussian", "logistic", "gumbel", "laplace", "student_t",
            "log_normal", or a :class:`vae_fast.distributions.Posterior` of your own. Each takes the encoder's
            mu as its location and exp(logvar / 2) as its scale.
        init: "paper" draws weights and hidden biases from N(0, 0.01**2) and sets the encoder's log-variance
            layer and the biases of the outputs to zero; "lecun" does the same, but draws weights from
            N(0, 1 / inputs), as the authors' code did later: few latent variables are learned faster;
            "torch" keeps nn.Linear's own, the better choice for several hidden layers.
        logvar_scale: of the weights of the encoder's log-variance, see :class:`MLPEncoder`. Adagrad and Adam,
            whose steps do not depend on the size of the gradient, move that layer by so much of their own
            step; the authors' wake-sleep has 0.1.
        seed: makes the initial values a function of this number; None draws it from torch's default
            generator.
        encoder, decoder: modules to use instead; then the arguments above other than likelihood and posterior
            are not used.
    """

    def __init__(
        self,
        data_dim: int | None = None,
        hidden_dims: Sequence[int] = (500,),
        latent_dim: int | None = None,
        likelihood: str = "bernoulli",
        *,
        activation: str = "tanh",
        mean_activation: str | None = None,
        posterior: str | Posterior = "gaussian",
        init: str = "paper",
        logvar_scale: float = 1.0,
        seed: int | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _one_of("likelihood", likelihood, LIKELIHOODS)
        _one_of("activation", activation, tuple(ACTIVATIONS))
        _one_of("mean_activation", mean_activation, (None, "sigmoid"))
        _one_of("init", init, ("paper", "lecun", "torch"))
        seed = None if seed is None else integer("seed", seed)
        if (encoder is None) != (decoder is None):
            raise ValueError("encoder, decoder: got one of them, wanted both or neither")
        if not isinstance(posterior, Posterior):
            _one_of("posterior", posterior, tuple(POSTERIORS))
            posterior = POSTERIORS[posterior]
        self.posterior = posterior
        self.likelihood = likelihood
        self.data_dim = data_dim
        self.latent_dim = latent_dim
        self.config: dict[str, Any] | None = None
        if encoder is not None and decoder is not None:
            self.encoder, self.decoder = encoder, decoder
            return
        if data_dim is None or latent_dim is None:
            raise ValueError(
                f"data_dim, latent_dim: got {data_dim} and {latent_dim}, wanted two positive integers, "
                "or encoder= and decoder="
            )
        if not isinstance(hidden_dims, Iterable):
            raise TypeError(f"hidden_dims: got {hidden_dims!r}, wanted a sequence of widths, such as [500]")
        for name, width in (
            ("data_dim", data_dim),
            ("latent_dim", latent_dim),
            *(("hidden_dims", w) for w in hidden_dims),
        ):
            if width < 1:
                raise ValueError(f"{name}: got {width}, wanted a positive integer")
        if POSTERIORS.get(posterior.name) is posterior:
            self.config = {
                "data_dim": data_dim,
                "hidden_dims": [int(width) for width in hidden_dims],
                "latent_dim": latent_dim,
                "likelihood": likelihood,
                "activation": activation,
                "mean_activation": mean_activation,
                "posterior": posterior.name,
                "init": init,
                "logvar_scale": logvar_scale,
            }
        self.encoder = MLPEncoder(data_dim, hidden_dims, latent_dim, activation, logvar_scale)
        self.decoder = MLPDecoder(
            latent_dim, tuple(hidden_dims)[::-1], data_dim, likelihood, activation, mean_activation
        )
        if init != "torch":
            self._init_as_the_paper(seed, lecun=init == "lecun")
        elif seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for module in self.modules():
                    if isinstance(module, nn.Linear):
                        module.reset_parameters()

    def description(self) -> dict[str, Any] | None:
        """``config``, if a model made from it is still this one but for values and dtype; else None.

        It is not where a layer was replaced, parameters are shared or no longer trained.
        """
        if self.config is None:
            return None
        with torch.device("meta"):
            made = VAE.from_config({**self.config, "init": "torch"})
        halves = (self.encoder, self.decoder), (made.encoder, made.decoder)
        ours, theirs = ([_described(half) for half in each] for each in halves)
        same = ours == theirs and not shares_memory(self) and self.posterior is made.posterior
        return self.config if same and self.likelihood == made.likelihood else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VAE:
        """The model that ``config`` of another one describes (its parameters are new)."""
        return cls(**config)

    @torch.no_grad()
    def _init_as_the_paper(self, seed: int | None, *, lecun: bool) -> None:
        """N(0, 0.01**2) for weights and hidden biases, 0 for q's log-variance layer and output biases; with
        ``lecun`` N(0, 1 / inputs) for weights.
        """
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        for position, (name, parameter) in enumerate(self.named_parameters()):
            output_bias = name.endswith("bias") and ".hidden." not in name
            if name.startswith("encoder.logvar") or output_bias:
                parameter.zero_()
            else:
                stream = seed + 0x9E3779B97F4A7C15 * (position + 1)
                std = parameter.shape[1] ** -0.5 if lecun and parameter.dim() == 2 else 0.01
                parameter.copy_(std * F.philox_normal(parameter.shape, seed=stream))

    def forward(
        self,
        x: Tensor,
        *,
        num_samples: int | None = None,
        beta: float = 1.0,
        seed: int | Tensor | None = None,
    ) -> F.ELBO:
        """The bound of each datapoint by SGVB-B (equation 7), in nats; by SGVB-A (equation 6) where the
        posterior's divergence has no closed form.

        x ``[..., D]`` to ``ELBO(elbo, log_likelihood, kl)``, each ``[...]``.
        """
        estimator = ESTIMATORS[default_estimator(self)]
        return F.ELBO(*estimator(self, x, seed, 1 if num_samples is None else num_samples, beta, F))

    def log_likelihood(self, decoded: Tensor | tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """log p(x|z) of each datapoint, from what ``decoder(z)`` returned; ``[...]``, nats."""
        if self.likelihood == "bernoulli":
            return F.bernoulli_log_likelihood(cast(Tensor, decoded), x)
        mean, logvar = decoded
        return F.gaussian_log_likelihood(mean, logvar, x)

    def decode_mean(self, z: Tensor) -> Tensor:
        """E[x|z]: the Bernoulli's probabilities or the Gaussian's mean, ``[..., D]``."""
        decoded = self.decoder(z)
        return torch.sigmoid(decoded) if self.likelihood == "bernoulli" else decoded[0]

    @torch.no_grad()
    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """E[x|z] for n draws z from the prior N(0, I); ``[n, D]``."""
        if self.latent_dim is None:
            raise ValueError(
                "latent_dim: got None, wanted the number of latent variables: pass latent_dim= to VAE"
            )
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        like = next(self.parameters())
        z = F.philox_normal((n, self.latent_dim), seed=seed, device=like.device)
        return self.decode_mean(z.to(like.dtype))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x|z] at the posterior mean z = E_q[z], mu(x) of a Gaussian; ``[..., D]`` to ``[..., D]``."""
        return self.decode_mean(self.posterior.mean(*self.encoder(x)))


def shares_memory(model: nn.Module) -> bool:
    """Whether two of a model's parameters begin at the same place in memory."""
    parameters = list(model.parameters())
    return len({p.data_ptr() for p in parameters}) < len(parameters)


def _described(half: nn.Module) -> tuple[Any, ...]:
    """What a half of a model is, but for the values and the dtype of its parameters."""
    options = [getattr(half, name, None) for name in ("logvar_scale", "mean_activation", "likelihood")]
    parameters = [(name, tuple(p.shape), p.requires_grad) for name, p in half.named_parameters()]
    return type(half), repr(half), options, parameters, [name for name, _ in half.named_buffers()]


def _one_of(name: str, got: object, wanted: Sequence[object]) -> None:
    if got not in wanted:
        raise ValueError(f"{name}: got {got!r}, wanted one of {', '.join(repr(w) for w in wanted)}")
