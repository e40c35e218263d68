"""Training engines: what carries out a run of training steps.

``reference`` is plain PyTorch. ``modules`` is the same program over the fused operators; on CUDA it becomes
one graph per minibatch size. ``native`` is the whole step in C++ (:mod:`vae_fast.native`). All compute the
same curve, because minibatches and noise are functions of (seed, step) alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import functional, reference
from .batches import Source
from .estimators import BINARISE, ESTIMATORS, MODULES, NOISE, Estimate, step_seed, step_seeds, weights
from .optim import KINDS

CHUNK_STEPS = {"cpu": 50, "cuda": 1000}  # the host looks at a training so often: a few times a second
ENGINES = ("auto", "reference", "modules", "native")
PRECISIONS = ("exact", "fast")


class StepTerms(NamedTuple):
    """Means over a minibatch, in nats: elbo = log_likelihood - beta * kl."""

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Plan:
    """What a step computes, whatever engine does it."""

    seed: int = 0
    estimator: str = "sgvb_b"
    num_samples: int = 1
    beta: float = 1.0
    weight_prior: bool = False
    estimator_state: Mapping[str, Tensor] = field(default_factory=dict)  # see estimators.initial_state


@dataclass(frozen=True)
class State:
    """Copies of all that a step changes: parameters, buffers, the optimizer's and the estimator's state, and
    torch's random state.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, float]


@dataclass(frozen=True)
class Incident:
    """The first thing in a step that was not finite."""

    step: int
    term: str
    value: float
    datapoint: str | None

    def __str__(self) -> str:
        where = "" if self.datapoint is None else f", first at {self.datapoint}"
        return f"step {self.step}: {self.term} is {self.value}{where}"


class Engine(Protocol):
    """Trains a model in place. The trainer asks for nothing else; how a step is done is its own affair."""

    name: str
    chunk_steps: int  # the host looks at a training after so many steps, or fewer
    next_step: int  # the step that run() begins with; the trainer may set it

    def step(self, batch: Tensor, seed: int) -> StepTerms:
        """One update by the minibatch ``[B, D]`` with the noise of ``seed``."""

    def run(self, n_steps: int) -> Tensor:
        """The next steps of the source: their (elbo, log_likelihood, kl), ``[n_steps, 3]`` on the host."""

    def finite(self) -> bool:
        """Whether every parameter and all state of the optimizer and the estimator are finite."""

    def snapshot(self) -> State: ...

    def restore(self, state: State) -> None: ...

    def diagnose(self) -> Incident:
        """What is not finite in the next step, which is not taken."""


class StepProgram:
    """One training step as a function of device buffers: what it reads and writes never changes its address.

    ``load`` writes the rows and seeds of a chunk of steps; every call then does the step that the device's
    counter points to, leaves its terms in a buffer, and moves the counter on. Nothing waits for the device,
    so a call can be captured in a CUDA graph. ``generation`` changes when buffers had to be allocated anew,
    and a capture is then out of date.
    """

    def __init__(
        self,
        ops: ModuleType,
        model: Any,
        optimizer: torch.optim.Optimizer,
        source: Source,
        plan: Plan,
        device: torch.device,
    ) -> None:
        self.ops = ops
        self.model = model
        self.optimizer = optimizer
        self.source = source
        self.plan = plan
        self.device = device
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.generation = 0
        self._estimator = ESTIMATORS[plan.estimator]
        self._weights = weights(model) if plan.weight_prior else []
        self._allocate(0, 0)

    @property
    def native_step(self) -> str | None:
        """What the native engine calls this step (``estimator`` in csrc/engine/network.h); None: nothing."""
        known = type(self) is StepProgram and self.plan.estimator in ("sgvb_b", "sgvb_a")
        return self.plan.estimator if known else None

    def _allocate(self, n_steps: int, width: int) -> None:
        self.rows = torch.zeros(n_steps, width, dtype=torch.int64, device=self.device)
        self.seeds = torch.zeros(n_steps, 2, dtype=torch.int64, device=self.device)
        self.terms = torch.zeros(n_steps, 3, dtype=reference.loss_dtype(self.dtype), device=self.device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._source_version = self.source.version
        self.generation += 1

    def load(self, first_step: int, n_steps: int) -> None:
        rows = torch.from_numpy(self.source.rows(first_step, n_steps))
        outgrown = n_steps > len(self.rows) or rows.shape[1] > self.rows.shape[1]
        if outgrown or self.source.version != self._source_version:
            most = max(n_steps, len(self.rows), min(CHUNK_STEPS[self.device.type], self.source.steps_at_once))
            self._allocate(most, max(rows.shape[1], self.rows.shape[1]))
        seeds = step_seeds(self.plan.seed, first_step, n_steps, NOISE, BINARISE)
        self.rows[:n_steps, : rows.shape[1]].copy_(rows)
        self.seeds[:n_steps].copy_(torch.from_numpy(seeds))
        self.cursor.zero_()

    def __call__(self, size: int) -> None:
        estimate = self.estimate(size)
        self.update(estimate)
        self.record(estimate)

    def record(self, estimate: Estimate) -> None:
        """Leaves the step's terms in the buffer and moves the counter on."""
        terms = torch.stack(self.means(estimate)).to(self.terms.dtype)
        self.terms.index_copy_(0, self.cursor, terms.unsqueeze(0))
        self.cursor += 1

    def minibatch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, x, the seed of the noise) of the step that the counter points to."""
        rows = self.rows.index_select(0, self.cursor)[0, :size]
        seeds = self.seeds.index_select(0, self.cursor)[0]
        noise_seed, binarise_seed = seeds[:1], seeds[1:]
        return rows, self.source.batch(rows, binarise_seed), noise_seed

    def estimate(self, size: int) -> Estimate:
        """The estimator's terms for the step that the counter points to."""
        _, x, seed = self.minibatch(size)
        return self.estimate_batch(x, seed)

    def estimate_batch(self, x: Tensor, seed: int | Tensor) -> Estimate:
        plan = self.plan
        x, state = x.to(self.dtype), plan.estimator_state
        return self._estimator(self.model, x, seed, plan.num_samples, plan.beta, self.ops, **state)

    def update(self, estimate: Estimate) -> None:
        """Ascends the minibatch mean of the objective, plus (1/N) log p(theta) if there is a weight prior."""
        self.optimizer.zero_grad(set_to_none=True)  # so that backward writes gradients, and adds to nothing
        (-estimate.objective.mean()).backward()  # type: ignore[no-untyped-call]
        if self._weights:
            assert self.source.count is not None
            # log p(theta) = log N(theta; 0, I), and the loss descends: the gradient has theta / N more
            used = [(w.grad, w.detach()) for w in self._weights if w.grad is not None]
            grads, values = [grad for grad, _ in used], [value for _, value in used]
            torch._foreach_add_(grads, values, alpha=1 / self.source.count)
        self.optimizer.step()

    def means(self, estimate: Estimate) -> StepTerms:
        log_likelihood, kl = estimate.log_likelihood.detach().mean(), estimate.kl.detach().mean()
        return StepTerms(log_likelihood - self.plan.beta * kl, log_likelihood, kl)


ProgramType = Callable[[ModuleType, Any, torch.optim.Optimizer, Source, Plan, torch.device], StepProgram]


class Recorder(Protocol):
    """How a program is captured; :class:`CudaGraphs`, or a stand-in that tests use where there is no GPU."""

    def warm_up(self, body: Callable[[], None]) -> None:
        """Carries ``body`` out as a capture would find it: on a side stream."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """What carries ``body`` out from now on; recording itself computes nothing."""


class CudaGraphs:
    """Captures on one side stream of a device, the one that warm-up steps ran on."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, body: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls can spoil the capture: a DataLoader's pinning thread goes on as it likes.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            body()
        return graph.replay


class CapturedProgram:
    """Carries a program out as one graph per minibatch size.

    The first ``WARM_UP`` steps of a size run as they are, which lets libraries and optimizers allocate what
    they keep. They are ordinary steps of the training, so nothing has to be undone before the capture, which
    computes nothing.
    """

    WARM_UP = 3
    MOST_GRAPHS = 4  # a stream may bring minibatches of any size: the rest run as they are

    def __init__(self, program: StepProgram, recorder: Recorder) -> None:
        self._program, self._recorder = program, recorder
        self.forget()

    def forget(self) -> None:
        """Drops the graphs: memory that they refer to has been replaced."""
        self._generation = self._program.generation
        self._warm_ups: Counter[int] = Counter()
        self._replays: dict[int, Callable[[], None]] = {}

    def __call__(self, size: int) -> None:
        if self._generation != self._program.generation:
            self.forget()
        if size not in self._replays:
            if self._warm_ups[size] < self.WARM_UP or len(self._replays) == self.MOST_GRAPHS:
                self._warm_ups[size] += 1
                self._recorder.warm_up(lambda: self._program(size))
                return
            self._replays[size] = self._recorder.record(lambda: self._program(size))
        self._replays[size]()


class AutogradEngine:
    """Runs a :class:`StepProgram`, as it is or captured."""

    def __init__(self, name: str, program: StepProgram, recorder: Recorder | None = None) -> None:
        self.name = name
        self.chunk_steps = CHUNK_STEPS[program.device.type]
        self.next_step = 0
        self._program = program
        self._captured = None if recorder is None else CapturedProgram(program, recorder)
        # Such as a mask of -inf: no step makes these.
        self._never_finite = {
            f"model.{name}"
            for name, buffer in program.model.named_buffers()
            if buffer.is_floating_point() and not buffer.isfinite().all()
        }

    def step(self, batch: Tensor, seed: int) -> StepTerms:
        estimate = self._program.estimate_batch(batch.to(self._program.device), seed)
        self._program.update(estimate)
        self.next_step += 1
        return self._program.means(estimate)

    def run(self, n_steps: int) -> Tensor:
        program = self._program
        sizes = program.source.sizes(self.next_step, n_steps)
        if len(sizes) < n_steps:
            raise ValueError(f"n_steps: got {n_steps}, but the stream has only {len(sizes)} minibatches left")
        on_cuda = program.device.type == "cuda"
        with torch.cuda.device(program.device) if on_cuda else nullcontext():
            program.load(self.next_step, n_steps)
            for size in sizes.tolist():
                (self._captured or program)(size)
            self.next_step += n_steps
            if on_cuda:
                program.source.prefetch(self.next_step, n_steps)  # the device is still busy
            return program.terms[:n_steps].to("cpu", copy=True)

    def finite(self) -> bool:
        program = self._program
        live = live_state(program.model, program.optimizer, program.plan.estimator_state).tensors.items()
        watched = [t for name, t in live if name not in self._never_finite]
        largest = torch._foreach_norm([t for t in watched if t.is_floating_point() and t.numel()], math.inf)
        device = program.device
        return bool(torch.stack([norm.to(device, torch.float64) for norm in largest]).isfinite().all())

    def snapshot(self) -> State:
        program = self._program
        return copy_state(program.model, program.optimizer, program.device, program.plan.estimator_state)

    def restore(self, state: State) -> None:
        program = self._program
        in_place = restore_state(
            program.model, program.optimizer, program.device, state, program.plan.estimator_state
        )
        if not in_place and self._captured is not None:
            self._captured.forget()

    def diagnose(self) -> Incident:
        program, step, before = self._program, self.next_step, self.snapshot()
        size = int(program.source.sizes(step, 1)[0])
        program.load(step, 1)
        inputs: list[Tensor] = []  # of the encoder, as leaves: their gradients keep datapoints apart

        def as_leaf(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs.append(args[0].detach().requires_grad_())
            return (inputs[-1], *args[1:])

        hook = program.model.encoder.register_forward_pre_hook(as_leaf)
        try:
            estimate = program.estimate(size)
        finally:
            hook.remove()
        term, value, position = self._not_finite(estimate, inputs)
        self.restore(before)  # the forward pass of a module may have moved its running statistics
        datapoint = None if position is None else program.source.datapoint(step, position)
        return Incident(step, term, value, datapoint)

    def _not_finite(self, estimate: Estimate, inputs: list[Tensor]) -> tuple[str, float, int | None]:
        """(term, its value, position in the minibatch) of the first thing that is not finite."""
        for term in ("log_likelihood", "kl", "objective"):
            values = getattr(estimate, term).detach()
            bad = values.isfinite().logical_not().nonzero()
            if len(bad):
                position = int(bad[0])
                return term, float(values[position]), position
        params = [p for p in self._program.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(-estimate.objective.mean(), [*inputs, *params], allow_unused=True)
        for i, grad in enumerate(grads):
            if grad is not None and not grad.isfinite().all():
                bad = grad.isfinite().logical_not().nonzero()
                # Of a parameter's gradient, a sum over datapoints, nobody can say which one spoilt it.
                return "the gradient", float(grad[tuple(bad[0])]), int(bad[0, 0]) if i < len(inputs) else None
        return "the optimizer's update", math.nan, None


def check_engine(name: str, precision: str = "exact") -> None:
    """Refuses an engine or a precision that there is none of."""
    for argument, got, wanted in (("engine", name, ENGINES), ("precision", precision, PRECISIONS)):
        if got not in wanted:
            raise ValueError(f"{argument}: got {got!r}, wanted one of {', '.join(map(repr, wanted))}")
    if precision == "fast" and name in ("reference", "modules"):
        raise ValueError(f"precision: got 'fast' with engine={name!r}, wanted 'exact': it has no other")


def make_engine(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Source,
    plan: Plan,
    device: torch.device,
    program_type: ProgramType = StepProgram,
    precision: str = "exact",
) -> tuple[Engine, str]:
    """An engine by name, and why this one. ``program_type`` makes the program of another algorithm's step.

    Raises:
        ValueError: there is no such engine, or it was asked for and cannot take these steps.
    """
    from . import native  # which builds on this module

    check_engine(name, precision)
    program = program_type(
        reference if name == "reference" else functional, model, optimizer, source, plan, device
    )
    if name == "reference":
        return AutogradEngine("reference", program), "asked for"
    why = "asked for"
    if name != "modules":
        why_not = native.why_not(program, precision)
        if why_not is None and name == "auto" and device.type == "cuda":
            why_not = "on CUDA no trainer has been run with it yet; engine='native' asks for it"
        if why_not is None:
            engine = native.NativeEngine(program, precision)
            return (
                engine,
                f"{why if name == 'native' else 'the fastest engine for this model'}; {engine.note}",
            )
        if name == "native":
            raise ValueError(f"engine: got 'native', but {why_not}; wanted 'modules' or 'auto'")
        why = f"not native: {why_not}"
        if precision == "fast":
            why += "; precision='fast' is native's alone, so this is 'exact'"
    if device.type != "cuda":
        return AutogradEngine("modules", program), why
    if not _capturable(optimizer):
        why += "; not captured in a CUDA graph, because the optimizer is not capturable"
        return AutogradEngine("modules", program), why
    return AutogradEngine("modules", program, CudaGraphs(device)), f"{why}; whole steps in CUDA graphs"


def _capturable(optimizer: torch.optim.Optimizer) -> bool:
    """What torch's optimizers say of themselves; SGD has no step counter, so it needs no such option."""
    return all(
        group.get("capturable", isinstance(optimizer, torch.optim.SGD)) for group in optimizer.param_groups
    )


# --- the state of a training --------------------------------------------------------------------------------


def live_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, estimator_state: Mapping[str, Tensor] | None = None
) -> State:
    """The model's, the optimizer's and the estimator's own tensors, under the names that checkpoints use."""
    tensors = {f"estimator.{name}": value for name, value in (estimator_state or {}).items()}
    numbers: dict[str, float] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            tensors[f"model.{name}"] = value
    for i, p in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{i}.{key}"] = value
            elif isinstance(value, (int, float)):
                numbers[f"optimizer.{i}.{key}"] = value
            elif value is not None:
                kind, found = type(optimizer).__name__, type(value).__name__
                raise TypeError(f"optimizer: {kind} keeps a {found} as {key!r}, wanted tensors or numbers")
    return State(tensors, numbers)


def copy_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    estimator_state: Mapping[str, Tensor] | None = None,
) -> State:
    """Copies of those, and of the random state that modules such as dropout draw from."""
    live = live_state(model, optimizer, estimator_state)
    tensors = {name: tensor.detach().clone() for name, tensor in live.tensors.items()}
    return State(tensors | random_state(device), dict(live.numbers))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's default generators, which modules such as dropout draw from."""
    state = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    return state


def first_random_state(seed: int, device: torch.device) -> dict[str, Tensor]:
    """The state that a training with this seed begins with."""
    state = {"random.cpu": torch.Generator().manual_seed(step_seed(seed, 0, MODULES)).get_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.Generator(device).manual_seed(step_seed(seed, 0, MODULES)).get_state()
    return state


def restore_random(state: Mapping[str, Tensor], device: torch.device) -> None:
    if "random.cpu" in state:
        torch.set_rng_state(state["random.cpu"].cpu())
    if "random.cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["random.cuda"].cpu(), device)


@torch.no_grad()
def restore_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    state: State,
    estimator_state: Mapping[str, Tensor] | None = None,
) -> bool:
    """Puts a copied state back. Returns whether every tensor stayed where it was in memory.

    Raises:
        ValueError: the state is that of another model.
    """
    live = live_state(model, optimizer, estimator_state)
    _check_same_model(live.tensors, state.tensors)
    _check_optimizer_state(optimizer, state)
    in_place = (
        live.tensors.keys() == {name for name in state.tensors if not name.startswith("random.")}
        and not state.numbers
    )
    for name, tensor in live.tensors.items():
        if not name.startswith("optimizer.") or in_place:
            tensor.copy_(state.tensors[name])
    if not in_place:  # an optimizer that has its state only after the first step, before or after it
        packed: dict[int, dict[str, Any]] = {}
        for name, value in [*state.tensors.items(), *state.numbers.items()]:
            if name.startswith("optimizer."):
                _, i, key = name.split(".", 2)
                packed.setdefault(int(i), {})[key] = value.clone() if isinstance(value, Tensor) else value
        optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})
    restore_random(state.tensors, device)
    return in_place


def _check_same_model(own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {
            name.removeprefix("model."): tuple(tensor.shape)
            for name, tensor in tensors.items()
            if name.startswith(("model.", "estimator."))
        }

    wanted, got = shapes(own), shapes(other)
    for name in [*wanted, *got]:
        if wanted.get(name) != got.get(name):
            raise ValueError(
                f"state: {name} has shape {got.get(name, 'none: it is missing')} in the saved model and "
                f"{wanted.get(name, 'none: it is missing')} in this one, wanted the same model"
            )


def _check_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """What is kept of a parameter has its shape, or is one number; and of each in a group as many things. Of
    optimizers that others wrote nobody knows what they keep.
    """
    if type(optimizer) not in KINDS:
        return
    parameters = _parameters(optimizer)
    groups = [g for g, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    kept: dict[int, set[str]] = {}
    for name, value in [*state.tensors.items(), *state.numbers.items()]:
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            kept.setdefault(int(i), set()).add(key)
            of = parameters[int(i)] if int(i) < len(parameters) else None
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if of is None or shape not in ((), tuple(of.shape)):
                wanted = "none" if of is None else f"{tuple(of.shape)}, the parameter's,"
                raise ValueError(f"state: {name} has shape {shape}, wanted {wanted} or another optimizer")
    if len({(groups[i], frozenset(keys)) for i, keys in kept.items()}) > len({groups[i] for i in kept}):
        raise ValueError("state: the optimizer keeps of some parameters what it does not of others")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
