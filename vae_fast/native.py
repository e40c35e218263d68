"""The native engine: the whole training step in C++, for multi-layer perceptrons.

It computes what ``modules`` computes, from the same minibatches and the same noise; parameters and optimizer
state are torch's own before and after every run, so checkpoints, evaluation and the other engines see nothing
new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .distributions import posterior_of
from .engines import AutogradEngine, StepProgram
from .estimators import BINARISE, NOISE, step_seed
from .nn import MLPDecoder, MLPEncoder
from .optim import Adagrad

RUN_FLOPS = 2e11  # of one run: about a second, in which nobody looks at Ctrl-C
MOST_STEPS = 1000

# How the engine names an optimizer, and what that keeps of a parameter, in the engine's order
_KINDS: dict[type[torch.optim.Optimizer], tuple[str, tuple[str, ...]]] = {
    Adagrad: ("adagrad", ("sum",)),
    torch.optim.SGD: ("sgd", ("momentum_buffer",)),
    torch.optim.Adam: ("adam", ("exp_avg", "exp_avg_sq")),
    torch.optim.AdamW: ("adamw", ("exp_avg", "exp_avg_sq")),
}
# Options of torch's that must be off
_OFF = ("nesterov", "dampening", "amsgrad", "maximize", "differentiable")


def why_not(program: StepProgram) -> str | None:
    """Why the native engine cannot take these steps, in a few words; None: it can."""
    model, optimizer, plan = program.model, program.optimizer, program.plan
    if type(program) is not StepProgram:
        return "its step is another algorithm's"
    if program.device.type != "cpu":
        return f"the model is on {program.device}, and there is a native step for the CPU alone"
    if type(getattr(model, "encoder", None)) is not MLPEncoder or type(model.decoder) is not MLPDecoder:
        return "the encoder or the decoder is a module of your own"
    if posterior_of(model).name != "gaussian":
        return f"the posterior is {posterior_of(model).name}, not gaussian"
    if plan.estimator not in ("sgvb_b", "sgvb_a"):
        return f"the estimator is {plan.estimator}"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "the model has forward hooks"
    if [name for name, _ in model.named_parameters()] != _names(model):
        return "the model has parameters of its own"
    for name, p in model.named_parameters():
        if p.dtype != torch.float32 or not p.requires_grad or not p.is_contiguous():
            return f"{name} is not a contiguous float32 tensor that is trained"
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
    if "betas" in group and not group["eps"] > 0:
        return f"{kind} has eps={group['eps']}"
    return None


def _names(model: Any) -> list[str]:
    """The parameters of an MLP variational auto-encoder, in the order of csrc/engine/network.h."""
    decoder = ("logits",) if model.likelihood == "bernoulli" else ("mean", "logvar")
    layers = [f"encoder.hidden.{2 * i}" for i in range(len(model.encoder.hidden) // 2)]
    layers += ["encoder.mu", "encoder.logvar"]
    layers += [f"decoder.hidden.{2 * i}" for i in range(len(model.decoder.hidden) // 2)]
    layers += [f"decoder.{name}" for name in decoder]
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


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
        activations = [m for m in model.modules() if isinstance(m, (nn.Tanh, nn.ReLU))]
        encoder, decoder = _widths(model.encoder.hidden), _widths(model.decoder.hidden)
        weights = sum(p.numel() for p in self._parameters if p.dim() == 2)
        flops = 6 * plan.num_samples * weights * source.most_rows  # of a step, or fewer
        self.chunk_steps = int(min(max(RUN_FLOPS / flops, 1), MOST_STEPS))
        self._step = _C.CpuStep(
            data_dim=model.encoder.hidden[0].in_features if encoder else model.encoder.mu.in_features,
            encoder_hidden=encoder,
            latent_dim=model.encoder.mu.out_features,
            decoder_hidden=decoder,
            activation="relu" if activations and isinstance(activations[0], nn.ReLU) else "tanh",
            likelihood=likelihood,
            estimator=plan.estimator,
            num_samples=plan.num_samples,
            beta=plan.beta,
            weight_prior=1 / source.count if plan.weight_prior and source.count else 0.0,
            precision=precision,
        )

    @property
    def note(self) -> str:
        """How it computes, for people."""
        if self.precision == "exact":
            return f"float32 on {_C.cpu_capability()}"
        return "bfloat16 products, emulated in float32: no faster than 'exact' on this processor"

    def run(self, n_steps: int) -> Tensor:
        return run_together([self], [n_steps])[0]

    def prepare(self, n_steps: int) -> _C.Run:
        """The next steps, checked and ready to be run."""
        program, source = self._program, self._program.source
        sizes = source.sizes(self.next_step, n_steps)
        if len(sizes) < n_steps:
            raise ValueError(f"n_steps: got {n_steps}, but the stream has only {len(sizes)} minibatches left")
        rows = torch.from_numpy(source.rows(self.next_step, n_steps))
        steps = range(self.next_step, self.next_step + n_steps)
        seeds = [
            [step_seed(program.plan.seed, step, stream) for stream in (NOISE, BINARISE)] for step in steps
        ]
        data = source.data
        values = data.values if data.values.dtype == torch.uint8 else data.values.to(torch.float32)
        states, counters = self._states()
        return self._step.prepare(
            parameters=[p.detach() for p in self._parameters],
            states=states,
            optimizer=self._kind,
            numbers=self._numbers(),
            updates_before=int(counters[0]) if counters else 0,
            values=values.contiguous(),
            packed=False,
            dynamic=data.kind == "dynamic",
            scale=1 / data.scale,
            rows=rows.contiguous(),
            sizes=torch.from_numpy(sizes).contiguous(),
            seeds=torch.tensor(seeds, dtype=torch.int64),
        )

    def count(self, n_steps: int) -> None:
        """Notes that steps have been taken."""
        for counter in self._states()[1]:
            counter += n_steps
        self.next_step += n_steps

    def _numbers(self) -> dict[str, float]:
        (group,) = self._program.optimizer.param_groups
        numbers: dict[str, float] = {
            key: float(group[key])
            for key in ("lr", "eps", "momentum", "weight_decay", "accumulate_steps")
            if key in group
        }
        if "betas" in group:
            numbers["beta1"], numbers["beta2"] = (float(beta) for beta in group["betas"])
        return numbers

    def _states(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """What the optimizer keeps of each parameter, made where there is nothing yet, and its counters."""
        optimizer = self._program.optimizer
        if self._kind == "sgd" and not optimizer.param_groups[0]["momentum"]:
            return [[] for _ in self._parameters], []
        states = []
        for p in self._parameters:
            state = optimizer.state[p]
            for key in self._keys:
                if state.get(key) is None:
                    state[key] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            if self._kind in ("adam", "adamw") and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            states.append([state[key] for key in self._keys])
        counters = [optimizer.state[p]["step"] for p in self._parameters] if self._kind != "sgd" else []
        return states, counters


def run_together(engines: Sequence[NativeEngine], n_steps: Sequence[int]) -> list[Tensor]:
    """The next steps of several models at once, a thread for each; one model has all threads. Their terms.

    Every model's are those of its own ``run``, bit for bit: its sums do not depend on the number of threads.
    """
    runs = [engine.prepare(n) for engine, n in zip(engines, n_steps, strict=True)]
    terms = _C.run(runs)
    for engine, n in zip(engines, n_steps, strict=True):
        engine.count(n)
    return terms
