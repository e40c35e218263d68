"""The native engine: the whole training step in C++, for multi-layer perceptrons.

It computes what ``modules`` computes, from the same minibatches and the same noise; parameters and optimizer
state are torch's own before and after every run, so checkpoints, evaluation and the other engines see nothing
new.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .datasets import Prepared
from .distributions import posterior_of
from .engines import AutogradEngine, StepProgram
from .estimators import BINARISE, NOISE, step_seeds
from .nn import ACTIVATIONS, MLPDecoder, MLPEncoder, shares_memory
from .optim import Adagrad

# Of one run, in which nobody looks at Ctrl-C, on a CPU: about a second
RUN_FLOPS = 2e11
MOST_STEPS = 1000
PERSISTENT = "VAE_FAST_CUDA_PERSISTENT"  # an environment variable
MOST_ROWS = 2**22  # on a GPU, where all rows of a run lie there: 32 MB

Minibatches = tuple[Tensor, Tensor, Tensor]
_HOST = ThreadPoolExecutor(1, "vae-fast minibatches")  # what a GPU's next steps need, while it is busy

# How the engine names an optimizer, and what that keeps of a parameter, in the engine's order
_KINDS: dict[type[torch.optim.Optimizer], tuple[str, tuple[str, ...]]] = {
    Adagrad: ("adagrad", ("sum",)),
    torch.optim.SGD: ("sgd", ("momentum_buffer",)),
    torch.optim.Adam: ("adam", ("exp_avg", "exp_avg_sq")),
    torch.optim.AdamW: ("adamw", ("exp_avg", "exp_avg_sq")),
}
# Options of torch's that must be off
_OFF = ("nesterov", "dampening", "amsgrad", "maximize", "differentiable")


def why_not(program: StepProgram, precision: str = "exact") -> str | None:
    """Why the native engine cannot take these steps, in a few words; None: it can."""
    model, optimizer, plan = program.model, program.optimizer, program.plan
    on_cuda = _is_cuda(program.device)
    if program.native_step is None:
        if type(program) is StepProgram:
            return f"the estimator is {plan.estimator}"
        return "its step is another algorithm's"
    if program.native_step == "wake_sleep" and precision != "exact":
        return "its wake-sleep step is exact"
    if on_cuda and not hasattr(_C, "CudaStep"):
        return f"the model is on {program.device}, and this build has no CUDA"
    if program.device.type not in ("cpu", "cuda"):
        return f"the model is on {program.device}"
    if type(getattr(model, "encoder", None)) is not MLPEncoder or type(model.decoder) is not MLPDecoder:
        return "the encoder or the decoder is a module of your own"
    if _activation(model) is None:
        return "the hidden layers do not all have the same known activation"
    # The bias's gradient is that of the scaled product over the scale.
    if model.encoder.logvar_scale < 1e-6:
        return f"the encoder has logvar_scale={model.encoder.logvar_scale}"
    if posterior_of(model).name != "gaussian":
        return f"the posterior is {posterior_of(model).name}, not gaussian"
    if hooked := _hooked(model, optimizer):
        return hooked
    if any(type(model.get_submodule(name)) is not nn.Linear for name in _layers(model)):
        return "the last layers of the encoder or the decoder are modules of your own"
    if [name for name, _ in model.named_parameters()] != _names(model):
        return "the model has parameters of its own"
    for name, p in model.named_parameters():
        if p.dtype != torch.float32 or not p.requires_grad or not p.is_contiguous():
            return f"{name} is not a contiguous float32 tensor that is trained"
    if shares_memory(model):
        return "parameters share their memory"
    return _why_not_optimizer(optimizer, list(model.parameters()))


def _why_not_optimizer(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> str | None:
    kind = type(optimizer).__name__
    if type(optimizer) not in _KINDS:
        return f"the optimizer is {kind}"
    if len(optimizer.param_groups) != 1:
        return "the optimizer has several parameter groups"
    (group,) = optimizer.param_groups
    if [id(p) for p in group["params"]] != [id(p) for p in parameters]:
        return "the optimizer does not have the model's parameters in their order"
    for option in _OFF:
        if group.get(option):
            return f"{kind} has {option}={group[option]}"
    if type(optimizer) is torch.optim.Adam and group.get("decoupled_weight_decay"):
        return f"{kind} has decoupled_weight_decay=True"
    counts = {int(optimizer.state.get(p, {}).get("step", 0)) for p in parameters}
    if len(counts) > 1:
        return f"{kind} has updated some parameters {min(counts)} times and others {max(counts)}"
    if group.get("eps", 1) < torch.finfo(torch.float32).tiny:  # then 0 / 0 in what fills a panel up
        return f"{kind} has eps={group['eps']}"
    return None


_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def _hooked(model: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """What of the model or the optimizer is to be called in a step that the native engine would not call."""
    modules = list(model.modules())
    for what, objects, names in (
        ("model", modules, _OF_MODULES),
        ("model's parameters", list(model.parameters()), _OF_PARAMETERS),
        ("optimizer", [optimizer], _OF_OPTIMIZERS),
    ):
        if any(getattr(one, name, None) for one in objects for name in names):
            return f"the {what} {'have' if what.endswith('s') else 'has'} hooks"
    if any("forward" in vars(module) for module in modules):
        return "the model has a forward method that was replaced"
    return None


def _wants_persistent() -> bool:
    """Whether steps are to be taken by one kernel that stays on the GPU, where it can take them."""
    return os.environ.get(PERSISTENT) == "1"


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _names(model: Any) -> list[str]:
    """The parameters of an MLP variational auto-encoder, in the order of csrc/engine/network.h."""
    return [f"{layer}.{kind}" for layer in _layers(model) for kind in ("weight", "bias")]


def _layers(model: Any) -> list[str]:
    """Its layers, in that order."""
    decoder = ("logits",) if model.likelihood == "bernoulli" else ("mean", "logvar")
    layers = [f"encoder.hidden.{2 * i}" for i in range(len(model.encoder.hidden) // 2)]
    layers += ["encoder.mu", "encoder.logvar"]
    layers += [f"decoder.hidden.{2 * i}" for i in range(len(model.decoder.hidden) // 2)]
    return [*layers, *(f"decoder.{name}" for name in decoder)]


def _activation(model: Any) -> str | None:
    """That of all hidden layers, "tanh" where there are none; None: they differ, or are not known."""
    halves = (model.encoder.hidden, model.decoder.hidden)
    if any(type(layer) is not nn.Linear for half in halves for layer in half[::2]):
        return None
    kinds = {(type(layer), layer.extra_repr()) for half in halves for layer in half[1::2]}
    for name, kind in ACTIVATIONS.items():
        if kinds <= {(kind, kind().extra_repr())}:
            return name
    return None


def _widths(hidden: nn.Module) -> list[int]:
    return [layer.out_features for layer in hidden.modules() if isinstance(layer, nn.Linear)]


class NativeEngine(AutogradEngine):
    """Runs steps in C++ (csrc/engine); a single ``step`` on a caller's minibatch, and the search for what
    was not finite, are the ``modules`` engine's.
    """

    def __init__(self, program: StepProgram, precision: str = "exact") -> None:
        super().__init__("native", program)
        model, plan, source = program.model, program.plan, program.source
        self.precision = precision
        self._parameters = list(model.parameters())
        self._kind, self._keys = _KINDS[type(program.optimizer)]
        likelihood = model.likelihood
        if likelihood == "gaussian" and model.decoder.mean_activation == "sigmoid":
            likelihood = "gaussian_sigmoid_mean"
        encoder, decoder = _widths(model.encoder.hidden), _widths(model.decoder.hidden)
        weights = sum(p.numel() for p in self._parameters if p.dim() == 2)
        flops = 6 * plan.num_samples * weights * source.most_rows  # of a step, or fewer
        self._network = {
            "data_dim": model.encoder.hidden[0].in_features if encoder else model.encoder.mu.in_features,
            "encoder_hidden": encoder,
            "latent_dim": model.encoder.mu.out_features,
            "decoder_hidden": decoder,
            "activation": _activation(model),
            "likelihood": likelihood,
            "estimator": program.native_step,
            "num_samples": plan.num_samples,
            "beta": plan.beta,
            "weight_prior": 1 / source.count if plan.weight_prior and source.count else 0.0,
            "precision": precision,
            "logvar_scale": model.encoder.logvar_scale,
        }
        self._on_cuda = _is_cuda(program.device)
        # On a GPU whatever the latents: models that differ in them are to take the same steps at once.
        run = MOST_ROWS / source.most_rows if self._on_cuda else RUN_FLOPS / flops
        self.chunk_steps = int(min(max(run, 1), MOST_STEPS, source.steps_at_once))
        self._step = None
        if not self._on_cuda:
            self._step = _C.CpuStep(**self._network)
        self._cuda_steps = _CudaSteps()
        self._ahead: dict[tuple[int, int], Future[Minibatches]] = {}

    @property
    def note(self) -> str:
        """How it computes, for people."""
        if self._on_cuda:
            products = (
                "three TF32 products for one of float32" if self.precision == "exact" else "one product"
            )
            if _wants_persistent():
                return f"one kernel for many steps where it can take them, else graphs with {products}"
            return f"many steps to a graph, {products}"
        capability = _C.cpu_capability()
        if self.precision == "exact":
            if capability == "amx":
                return "float32, products of 32 rows and more through AMX in three bfloat16 parts"
            return f"float32 on {capability}"
        if capability in ("amx", "avx512_bf16"):
            return f"bfloat16 products through {capability.upper()}"
        return "bfloat16 products, emulated in float32: no faster than 'exact' on this processor"

    def run(self, n_steps: int) -> Tensor:
        return run_together([self], [n_steps])[0]

    def prepare(self, n_steps: int) -> _C.Run:
        """The next steps, checked and ready to be run on the CPU."""
        assert self._step is not None
        rows, sizes, seeds = self._minibatches(n_steps)
        states, counters = self._states()
        data = self._program.source.data
        return self._step.prepare(
            parameters=[p.detach() for p in self._parameters],
            states=states,
            optimizer=self._kind,
            options=self._options(),
            data=_values(data),
            packed=False,
            dynamic=data.kind == "dynamic",
            scale=1 / data.scale,
            rows=rows,
            sizes=sizes,
            seeds=seeds,
            updates=int(counters[0]) if counters else 0,
        )

    @property
    def alike(self) -> tuple[Any, ...]:
        """What engines on CUDA must have in common so that their models can be trained side by side."""
        data, group = self._program.source.data, self._program.optimizer.param_groups[0]
        network = {**self._network, "latent_dim": None, "beta": None}
        options = self._options()
        if self._kind != "adamw" or not group["weight_decay"]:  # its decay goes by its lr
            del options["lr"]
        return (
            str(network),
            self._kind,
            str(options),
            str(self._program.device),
            data.values.data_ptr(),
            data.kind,
            data.scale,
        )

    def _minibatches(self, n_steps: int) -> Minibatches:
        """(rows, sizes, seeds) of the next steps, int64 on the CPU."""
        asked = self.next_step, n_steps
        found = self._ahead.pop(asked).result() if asked in self._ahead else self._drawn(*asked)
        self._ahead.clear()
        return found

    def _drawn(self, first_step: int, n_steps: int) -> Minibatches:
        source = self._program.source
        sizes = source.sizes(first_step, n_steps)
        if len(sizes) < n_steps:
            have = len(sizes)
            raise ValueError(f"n_steps: got {n_steps}, but the stream has only {have} minibatches left")
        rows = source.rows(first_step, n_steps)
        seeds = step_seeds(self._program.plan.seed, first_step, n_steps, NOISE, BINARISE)
        return torch.from_numpy(rows).contiguous(), torch.from_numpy(sizes), torch.from_numpy(seeds)

    def draw_ahead(self, n_steps: int) -> None:
        """Draws the minibatches of the steps after the next ``n_steps``, likely as many, while these run."""
        if self._program.source.count is not None:  # a stream is not asked before it must be
            later = self.next_step + n_steps, n_steps
            self._ahead[later] = _HOST.submit(self._drawn, *later)

    def count(self, n_steps: int) -> None:
        """Notes that steps have been taken."""
        for counter in self._states()[1]:
            counter += n_steps
        self.next_step += n_steps

    def _options(self) -> dict[str, float]:
        (group,) = self._program.optimizer.param_groups
        options: dict[str, float] = {
            key: float(group[key])
            for key in ("lr", "eps", "momentum", "weight_decay", "accumulate_steps")
            if key in group
        }
        if "betas" in group:
            options["beta1"], options["beta2"] = (float(beta) for beta in group["betas"])
        return options

    def _states(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """For each thing that the optimizer keeps a tensor for each parameter, made where there is none, and
        its step counters.
        """
        optimizer = self._program.optimizer
        if self._kind == "sgd" and not optimizer.param_groups[0]["momentum"]:
            return [], []
        for p in self._parameters:
            state = optimizer.state[p]
            for key in self._keys:
                if state.get(key) is None:
                    state[key] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            if self._kind in ("adam", "adamw") and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        states = [[optimizer.state[p][key] for p in self._parameters] for key in self._keys]
        counters = [optimizer.state[p]["step"] for p in self._parameters] if self._kind != "sgd" else []
        return states, counters


def _values(data: Prepared) -> Tensor:
    """The data as the steps read them: bytes or float32."""
    values = data.values
    return (values if values.dtype == torch.uint8 else values.to(torch.float32)).contiguous()


class _CudaSteps:
    """Steps of one model on a GPU, or of several that are alike, by a ``CudaStep`` that is made anew where
    what it holds on to has moved.
    """

    def __init__(self) -> None:
        self._step: Any = None
        self._made_for: Any = None
        self._values, self._read = torch.empty(0), 0  # the data, and where they were read
        self._room = (0, 0)  # datapoints of a minibatch, steps
        self._told = ""  # why the persistent kernel does not take them

    def run(self, engines: Sequence[NativeEngine], minibatches: Sequence[Minibatches]) -> Tensor:
        """The terms of each engine's steps, ``[engines, steps, 3]``."""
        first = engines[0]
        data = first._program.source.data
        if self._read != data.values.data_ptr():
            self._values, self._read = _values(data), data.values.data_ptr()
        elif first._program.source.count is None and self._values.data_ptr() != self._read:
            self._values.copy_(data.values)  # a stream writes its data in place, and these are a copy
        models, updates = [], []
        for engine in engines:
            states, counters = engine._states()
            updates.append(int(counters[0]) if counters else 0)
            models.append(
                {
                    "latent_dim": engine._network["latent_dim"],
                    "beta": engine._network["beta"],
                    "lr": engine._options()["lr"],
                    "parameters": [p.detach() for p in engine._parameters],
                    "states": states,
                }
            )
        options = {key: value for key, value in first._options().items() if key != "lr"}
        tensors = [t for model in models for part in (model["parameters"], *model["states"]) for t in part]
        kept = [(model["latent_dim"], model["beta"], model["lr"]) for model in models]
        needs = (options, kept, [t.data_ptr() for t in (self._values, *tensors)])
        rows, sizes, seeds = (torch.stack(parts) for parts in zip(*minibatches, strict=True))
        n_steps, width = rows.shape[1:]
        if width > self._room[0] or n_steps > self._room[1] or needs != self._made_for:
            room = (max(width, self._room[0]), max(n_steps, first.chunk_steps, self._room[1]))
            self._step = self._made_for = None  # its memory is wanted for the next
            self._step = _C.CudaStep(
                **{name: what for name, what in first._network.items() if name not in ("latent_dim", "beta")},
                optimizer=first._kind,
                options=options,
                models=models,
                data=self._values,
                packed=False,
                dynamic=data.kind == "dynamic",
                scale=1 / data.scale,
                batch_size=room[0],
                most_steps=room[1],
                persistent=_wants_persistent(),
            )
            self._made_for, self._room = needs, room
        terms: Tensor = self._step.run(rows, sizes, seeds, updates)
        why = self._step.why_not_persistent if _wants_persistent() else ""
        if why and why != self._told:
            warnings.warn(
                f"{PERSISTENT}=1: steps are launched, because the persistent kernel does not take {why}",
                stacklevel=2,
            )
        self._told = why
        return terms


def run_together(engines: Sequence[NativeEngine], n_steps: Sequence[int]) -> list[Tensor]:
    """The next steps of several models at once; the terms of each.

    On a CPU every model has a thread, and one model has all threads. On a GPU models that are alike in all
    but seed, lr, beta and the number of latent variables share every launch; others take turns. A model's
    terms are those of its own ``run``, bit for bit: its sums do not depend on threads or other models.
    """
    terms = [torch.empty(0)] * len(engines)
    on_cpu = [i for i, engine in enumerate(engines) if not engine._on_cuda]
    if on_cpu:
        found = _C.run([engines[i].prepare(n_steps[i]) for i in on_cpu])
        for i, own in zip(on_cpu, found, strict=True):
            terms[i] = own
    groups: dict[Any, list[int]] = {}
    minibatches = {}
    for i, engine in enumerate(engines):
        if engine._on_cuda:
            minibatches[i] = engine._minibatches(n_steps[i])
            groups.setdefault((engine.alike, minibatches[i][0].shape), []).append(i)
    for group in groups.values():
        for i in group:
            engines[i].draw_ahead(n_steps[i])
        steps = engines[group[0]]._cuda_steps
        of_all = steps.run([engines[i] for i in group], [minibatches[i] for i in group])
        for i, own in zip(group, of_all, strict=True):
            terms[i] = own
    for engine, n in zip(engines, n_steps, strict=True):
        engine.count(n)
    return terms
