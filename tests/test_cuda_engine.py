"""The CUDA engine without a GPU: its kernels and its schedule on the emulated device of tests/cuda_emulation,
buffer by buffer and step by step against the reference engine in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cuda_engine import EmulatedEngine, Trained, compile_engine
from cuda_schedule import Twin
from cuda_schedule import run as run_twin
from numpy.typing import NDArray
from torch import Tensor, nn

from vae_fast import reference
from vae_fast.algorithms import wake_sleep
from vae_fast.batches import ArraySource
from vae_fast.datasets import Prepared
from vae_fast.engines import AutogradEngine, Plan, StepProgram
from vae_fast.estimators import BINARISE, NOISE, step_seed
from vae_fast.nn import ACTIVATIONS, VAE, MLPDecoder, MLPEncoder
from vae_fast.optim import make_optimizer

pytestmark = pytest.mark.slow
SEED = 5


@dataclass(frozen=True)
class Case:
    data_dim: int = 13
    encoder_hidden: tuple[int, ...] = (18,)
    decoder_hidden: tuple[int, ...] = (18,)
    latent_dim: int = 3
    activation: str = "tanh"
    likelihood: str = "bernoulli"
    mean_activation: str | None = None
    estimator: str = "sgvb_b"
    num_samples: int = 1
    beta: float = 1.0
    weight_prior: bool = False
    optimizer: str = "adagrad"
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05, "accumulate_steps": 1})
    kind: str = "real"
    data_dtype: str = "u8"
    count: int = 23
    batch_size: int = 9
    steps: int = 4
    multiprocessors: int = 132
    shared_bytes: int = 227 << 10
    precision: str = "exact"
    logvar_scale: float = 1.0


CASES = {
    "the paper's model": Case(784, (500,), (500,), 20, batch_size=5, steps=2, kind="binary"),
    "widths of fours": Case(16, (20,), (20,), 4),
    "two hidden layers, ReLU": Case(30, (40, 12), (7, 33), 6, activation="relu", batch_size=35, count=80),
    "two hidden layers, softplus": Case(
        30, (40, 13), (7, 33), 6, activation="softplus", batch_size=35, count=80, weight_prior=True
    ),
    "no hidden layers": Case(encoder_hidden=(), decoder_hidden=()),
    "Gaussian": Case(likelihood="gaussian", data_dtype="f32", encoder_hidden=(70,)),
    "Gaussian, sigmoid mean": Case(likelihood="gaussian", mean_activation="sigmoid", num_samples=2),
    "Gaussian straight from z": Case(
        likelihood="gaussian", decoder_hidden=(), num_samples=3, estimator="sgvb_a"
    ),
    "three samples": Case(num_samples=3, beta=0.7, weight_prior=True),
    "SGVB-A": Case(estimator="sgvb_a", beta=1.3, latent_dim=18),
    "log-variance scale": Case(logvar_scale=0.2, num_samples=2),
    "SGVB-A, three samples": Case(estimator="sgvb_a", num_samples=3),
    "dynamic": Case(kind="dynamic", data_dtype="u8"),
    "dynamic floats": Case(kind="dynamic", data_dtype="f32"),
    "bits": Case(kind="binary", data_dtype="bits"),
    "SGD": Case(optimizer="sgd", options={"lr": 0.02, "weight_decay": 0.1}, weight_prior=True),
    "SGD with momentum": Case(optimizer="sgd", options={"lr": 0.02, "momentum": 0.9}),
    "Adam": Case(optimizer="adam", options={"lr": 0.01, "weight_decay": 0.1}),
    "AdamW": Case(optimizer="adamw", options={"lr": 0.01, "weight_decay": 0.5, "betas": (0.8, 0.95)}),
    "many rows": Case(encoder_hidden=(70,), decoder_hidden=(66,), batch_size=150, count=200, steps=2),
    "little shared memory": Case(70, (70,), (66,), batch_size=40, count=60, steps=2, shared_bytes=99 << 10),
    # Few multiprocessors are filled by large tiles, more of them by middling ones.
    "middling tiles": Case(130, (70,), (66,), 40, batch_size=70, count=100, steps=2, multiprocessors=5),
    "large tiles": Case(130, (70,), (66,), 40, batch_size=70, count=100, steps=2, multiprocessors=1),
    "large tiles, Gaussian": Case(
        70,
        (66, 65),
        (70, 35),
        33,
        "relu",
        "gaussian",
        num_samples=2,
        batch_size=40,
        steps=2,
        multiprocessors=1,
    ),
}
WAKE_SLEEP = {
    "wake-sleep": Case(estimator="wake_sleep", logvar_scale=0.1, weight_prior=True),
    "wake-sleep, Gaussian": Case(
        likelihood="gaussian", mean_activation="sigmoid", estimator="wake_sleep", latent_dim=20
    ),
    "wake-sleep, softplus": Case(activation="softplus", estimator="wake_sleep", latent_dim=6),
    "wake-sleep, no hidden layers": Case(
        encoder_hidden=(), decoder_hidden=(), estimator="wake_sleep", likelihood="gaussian", logvar_scale=0.3
    ),
    "wake-sleep, two hidden layers, large tiles": Case(
        130,
        (70, 33),
        (66, 35),
        40,
        "relu",
        batch_size=70,
        count=100,
        multiprocessors=1,
        estimator="wake_sleep",
        optimizer="sgd",
        options={"lr": 0.01},
    ),
}
# With SGD, whose moves are in proportion to the gradient, where dividing by it magnifies small ones, and with
# tanh, where a rounded sum near zero does not switch a unit off.
SMOOTH = {"optimizer": "sgd", "options": {"lr": 0.02}, "activation": "tanh"}
FAST = {
    f"{name}, fast": replace(CASES[name], precision="fast", **SMOOTH)
    for name in ("the paper's model", "three samples", "large tiles, Gaussian")
}
EVERY = {**CASES, **FAST, **WAKE_SLEEP}
# What the persistent kernel takes: every row group of its warps in part, more than one chunk of units and of
# pixels, pixels that fill no block, several datapoints to a block, a last minibatch that is smaller.
_WIDE = Case(133, (75,), (70,), 5, batch_size=101, count=190)
PERSISTENT = {
    **{
        name: CASES[name]
        for name in (
            "the paper's model",
            "widths of fours",
            "dynamic",
            "bits",
            "SGD",
            "SGD with momentum",
            "Adam",
            "AdamW",
        )
    },
    "wide": replace(_WIDE, weight_prior=True, beta=0.7),
    "wide, ReLU, log-variance scale": replace(_WIDE, activation="relu", logvar_scale=0.2),
    "wide, softplus, SGVB-A": replace(_WIDE, activation="softplus", estimator="sgvb_a", beta=1.3),
    "more pixels than units": Case(70, (11,), (9,), 2, batch_size=40, count=60),
    "more units than pixels": Case(9, (20,), (139,), 64, batch_size=17, count=40),
    "the paper's model, fast": FAST["the paper's model, fast"],
    "wide, fast": replace(_WIDE, precision="fast", **SMOOTH),
}


def data_of(case: Case) -> tuple[Prepared, NDArray[Any]]:
    """The data as the reference takes them, and as the engine does."""
    random = np.random.default_rng(1)
    shape = (case.count, case.data_dim)
    if case.kind == "binary":
        values = random.integers(0, 2, shape, dtype=np.uint8)
        packed = np.packbits(values, axis=1, bitorder="little") if case.data_dtype == "bits" else values
        return Prepared(torch.from_numpy(values), "binary", 1.0, ""), packed
    if case.data_dtype == "f32":
        floats = random.random(shape, dtype=np.float32)
        return Prepared(torch.from_numpy(floats), case.kind, 1.0, ""), floats
    values = random.integers(0, 256, shape, dtype=np.uint8)
    return Prepared(torch.from_numpy(values), case.kind, 255.0, ""), values


def model_of(case: Case) -> VAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder = MLPEncoder(
            case.data_dim,
            case.encoder_hidden,
            case.latent_dim,
            case.activation,
            logvar_scale=case.logvar_scale,
        )
        decoder = MLPDecoder(
            case.latent_dim,
            case.decoder_hidden,
            case.data_dim,
            case.likelihood,
            case.activation,
            case.mean_activation,
        )
    return VAE(encoder=encoder, decoder=decoder, likelihood=case.likelihood)


class Reference:
    """The reference engine in float64, and what every linear layer gives and gets back in its first step."""

    def __init__(self, case: Case) -> None:
        prepared, _ = data_of(case)
        self.case = case
        self.model = model_of(case).double()
        self.source = ArraySource(
            prepared, batch_size=case.batch_size, seed=SEED, order="shuffle", device=torch.device("cpu")
        )
        asleep = case.estimator == "wake_sleep"
        estimator = "sgvb_b" if asleep else case.estimator
        plan = Plan(SEED, estimator, case.num_samples, case.beta, case.weight_prior)
        self.optimizer = make_optimizer(case.optimizer, self.model.parameters(), **case.options)
        self.program = (wake_sleep._Program if asleep else StepProgram)(
            reference, self.model, self.optimizer, self.source, plan, torch.device("cpu")
        )
        self.engine = AutogradEngine("reference", self.program)

    def buffers(self) -> dict[str, NDArray[np.float64]]:
        """Of the first step, under the names of Schedule::lay_out; the optimizer takes none."""
        seen: dict[nn.Module, list[Tensor]] = {}
        layers = [m for m in self.model.modules() if isinstance(m, (nn.Linear, *ACTIVATIONS.values()))]

        def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[module] = [args[0], output]

        hooks = [layer.register_forward_hook(see) for layer in layers]
        self.program.load(0, 1)
        size = int(self.source.sizes(0, 1)[0])
        estimate = self.program.estimate(size)
        (-estimate.objective.mean()).backward()
        for hook in hooks:
            hook.remove()
        self.model.zero_grad()

        def both(first: Tensor, second: Tensor) -> Tensor:
            return torch.stack((first, second), dim=-1).flatten(-2)

        found: dict[str, Tensor] = {"x": self.program.minibatch(size)[1]}
        for half, net in (("encoder", self.model.encoder), ("decoder", self.model.decoder)):
            scale = -size * (1 if half == "encoder" else self.case.num_samples)
            for i in range(len(net.hidden) // 2):
                found[f"{half}.{i}"] = seen[net.hidden[2 * i + 1]][1]
                found[f"grad {half}.{i}"] = scale * seen[net.hidden[2 * i]][1].grad
        encoder, decoder = self.model.encoder, self.model.decoder
        mu, logvar = seen[encoder.mu][1], seen[encoder.logvar][1]
        found["encoder.heads"] = both(mu, logvar)
        # as a product of weights takes it
        found["grad encoder.heads"] = -size * both(mu.grad, self.case.logvar_scale * logvar.grad)
        outputs = [decoder.logits] if self.case.likelihood == "bernoulli" else [decoder.mean, decoder.logvar]
        grads = [-size * self.case.num_samples * seen[layer][1].grad for layer in outputs]
        found["grad decoder.output"] = grads[0] if len(grads) == 1 else both(*grads)
        found["z"] = seen[decoder.hidden[0] if len(decoder.hidden) else outputs[0]][0]
        found["eps"] = reference.philox_normal(
            (*found["z"].shape,), seed=step_seed(SEED, 0, NOISE), dtype=torch.float64
        )
        return {name: value.detach().flatten(0, -2).double().numpy() for name, value in found.items()}

    def states(self) -> list[list[NDArray[np.float64]]]:
        names = {"adagrad": ("sum",), "sgd": ("momentum_buffer",)}.get(
            self.case.optimizer, ("exp_avg", "exp_avg_sq")
        )
        found = []
        for name in names:
            kept = [self.optimizer.state[p].get(name) for p in self.model.parameters()]
            if kept[0] is not None:
                found.append([value.detach().numpy() for value in kept])
        return found


def engine_of(
    library: ctypes.CDLL,
    case: Case,
    most_steps: int = 3,
    weights: list[NDArray[np.float32]] | None = None,
    models: list[Trained] | None = None,
    persistent: bool = False,
) -> EmulatedEngine:
    prepared, values = data_of(case)
    options = {"eps": 1e-8, **case.options}
    weights = weights or [p.detach().numpy() for p in model_of(case).parameters()]
    model = Trained(case.latent_dim, case.beta, options.pop("lr"), weights)
    options["beta1"], options["beta2"] = options.pop("betas", (0.9, 0.999))
    likelihood = case.likelihood + ("_sigmoid_mean" if case.mean_activation else "")
    return EmulatedEngine(
        library,
        models=models or [model],
        encoder_hidden=case.encoder_hidden,
        decoder_hidden=case.decoder_hidden,
        activation=case.activation,
        likelihood=likelihood,
        estimator=case.estimator,
        num_samples=case.num_samples,
        weight_prior=1 / case.count if case.weight_prior else 0.0,
        logvar_scale=case.logvar_scale,
        optimizer=case.optimizer,
        options=options,
        precision=case.precision,
        data=values,
        data_dim=case.data_dim,
        data_dtype=case.data_dtype,
        dynamic=case.kind == "dynamic",
        scale=1 / prepared.scale,
        most_size=min(case.batch_size, case.count),
        most_steps=most_steps,
        multiprocessors=case.multiprocessors,
        shared_bytes=case.shared_bytes,
        persistent=persistent,
    )


def schedule_of(source: ArraySource, first: int, n: int, seed: int = SEED) -> tuple[NDArray[np.int64], ...]:
    seeds = [
        [step_seed(seed, step, stream) for stream in (NOISE, BINARISE)] for step in range(first, first + n)
    ]
    return source.rows(first, n), source.sizes(first, n), np.array(seeds, dtype=np.int64)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_engine(tmp_path_factory.mktemp("cuda_engine"))


@pytest.fixture
def made() -> Iterator[list[EmulatedEngine]]:
    engines: list[EmulatedEngine] = []
    yield engines
    for engine in engines:
        engine.close()


def assert_close(name: str, ours: NDArray[Any], exact: NDArray[Any], bound: float) -> None:
    """Within ``bound`` times the largest magnitude."""
    error = np.abs(ours.astype(np.float64) - exact).max(initial=0)
    scale = np.abs(exact).max(initial=0)
    assert error <= bound * scale + 1e-30, f"{name}: error {error:.3g} of {scale:.3g}"


def precision_of(case: Case) -> float:
    return 2e-6 if case.precision == "exact" else 2e-2


@pytest.mark.parametrize("name", [*CASES, *FAST])
def test_every_buffer_of_a_step_is_that_of_the_reference(
    library: ctypes.CDLL, made: list[EmulatedEngine], name: str
) -> None:
    case = {**CASES, **FAST}[name]
    wanted = Reference(case)
    buffers = wanted.buffers()
    made.append(engine := engine_of(library, case))
    terms = engine.run(*schedule_of(wanted.source, 0, 1))
    found = engine.buffers()
    assert set(buffers) | {"ll_parts", "kl_parts"} == set(found)
    for key, value in buffers.items():
        assert_close(
            key, found[key][: len(value)], value, 1e-6 if key in ("x", "eps") else precision_of(case)
        )
    assert_close("terms", terms, wanted.engine.run(1).numpy(), precision_of(case))


class DeviceEngine:
    """vae_fast._C.CudaStep on a GPU, with the methods of EmulatedEngine that the steps' tests use."""

    def __init__(self, cases: Sequence[Case], persistent: bool = False) -> None:
        """Of several cases, which may differ in latents, beta and lr, the models are trained side by side."""
        from vae_fast import _C

        case = cases[0]
        prepared, values = data_of(case)
        options = {"eps": 1e-8, **case.options}
        del options["lr"]
        options["beta1"], options["beta2"] = options.pop("betas", (0.9, 0.999))
        device = torch.device("cuda")
        count = {"sgd": int("momentum" in options), "adagrad": 1}.get(case.optimizer, 2)
        self._tensors, models = [], []
        for each in cases:
            parameters = [p.detach().to(device, copy=True) for p in model_of(each).parameters()]
            states = [[torch.zeros_like(p) for p in parameters] for _ in range(count)]
            self._tensors.append([parameters, *states])
            models.append(
                {
                    "latent_dim": each.latent_dim,
                    "beta": each.beta,
                    "lr": each.options["lr"],
                    "parameters": parameters,
                    "states": states,
                }
            )
        self._updates = 0
        self._step = _C.CudaStep(
            data_dim=case.data_dim,
            encoder_hidden=list(case.encoder_hidden),
            decoder_hidden=list(case.decoder_hidden),
            activation=case.activation,
            likelihood=case.likelihood + ("_sigmoid_mean" if case.mean_activation else ""),
            estimator=case.estimator,
            num_samples=case.num_samples,
            weight_prior=1 / case.count if case.weight_prior else 0.0,
            optimizer=case.optimizer,
            options=options,
            precision=case.precision,
            models=models,
            logvar_scale=case.logvar_scale,
            data=torch.from_numpy(values).to(device),
            packed=case.data_dtype == "bits",
            dynamic=case.kind == "dynamic",
            scale=1 / prepared.scale,
            batch_size=min(case.batch_size, case.count),
            most_steps=3,
            persistent=persistent,
        )

    def why_not_persistent(self) -> str:
        return self._step.why_not_persistent

    def run(self, *steps: NDArray[np.int64]) -> NDArray[np.float32]:
        """As EmulatedEngine's: of several models all arrays begin with an axis of models."""
        one = len(self._tensors) == 1
        given = [torch.from_numpy(array[None] if one else array) for array in steps]
        terms = self._step.run(*given, [self._updates] * len(self._tensors))
        self._updates += terms.shape[1]
        found: NDArray[np.float32] = (terms[0] if one else terms).numpy()
        return found

    def parameters(self, which: int = 0, model: int = 0) -> list[NDArray[np.float32]]:
        return [tensor.cpu().numpy() for tensor in self._tensors[model][which]]


def assert_steps_of_the_reference(engine: EmulatedEngine | DeviceEngine, case: Case) -> None:
    wanted = Reference(case)
    terms = engine.run(*schedule_of(wanted.source, 0, case.steps))
    assert_close("terms", terms, wanted.engine.run(case.steps).numpy(), 3 * precision_of(case))
    before = [p.detach().double().numpy() for p in model_of(case).parameters()]
    for i, (ours, p) in enumerate(zip(engine.parameters(), wanted.model.parameters(), strict=True)):
        moved = p.detach().numpy() - before[i]
        assert np.abs(moved).max() > 0
        # of the distance moved, and of the rounding of the parameter itself
        bound = (5e-4 if case.precision == "exact" else 0.3) * np.abs(moved).max() + 2e-7 * np.abs(
            before[i]
        ).max()
        error = np.abs(ours - p.detach().numpy()).max()
        assert error <= bound, f"parameter {i}: error {error:.3g}, moved {np.abs(moved).max():.3g}"
    for which, states in enumerate(wanted.states(), 1):
        for ours, state in zip(engine.parameters(which), states, strict=True):
            assert_close(f"state {which}", ours, state, 10 * precision_of(case))


@pytest.mark.parametrize("name", EVERY)
def test_steps_leave_what_the_reference_leaves(
    library: ctypes.CDLL, made: list[EmulatedEngine], name: str
) -> None:
    case = EVERY[name]
    made.append(engine := engine_of(library, case))
    assert_steps_of_the_reference(engine, case)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", EVERY)
def test_steps_on_a_gpu_leave_what_the_reference_leaves(name: str) -> None:
    case = EVERY[name]
    assert_steps_of_the_reference(DeviceEngine([case]), case)


SWEPT = ("three samples", "SGVB-A, three samples", "Gaussian straight from z", "large tiles")
SWEPT += ("wake-sleep", "wake-sleep, Gaussian", "log-variance scale")
SWEPT += ("no hidden layers", "dynamic", "SGD with momentum", "AdamW", "three samples, fast")


@pytest.mark.parametrize("name", PERSISTENT)
def test_steps_of_the_persistent_kernel_leave_what_the_reference_leaves(
    library: ctypes.CDLL, made: list[EmulatedEngine], name: str
) -> None:
    case = PERSISTENT[name]
    made.append(engine := engine_of(library, case, persistent=True))
    assert not engine.why_not_persistent()
    assert_steps_of_the_reference(engine, case)
    assert not engine.why_not_persistent()  # nothing was out of range


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PERSISTENT)
def test_steps_of_the_persistent_kernel_on_a_gpu_leave_what_the_reference_leaves(name: str) -> None:
    engine = DeviceEngine([PERSISTENT[name]], persistent=True)
    if why := engine.why_not_persistent():
        pytest.skip(f"the persistent kernel does not take {why}")
    assert_steps_of_the_reference(engine, PERSISTENT[name])
    assert not engine.why_not_persistent()


@pytest.mark.parametrize("name", ["widths of fours", "more pixels than units", "more units than pixels"])
def test_the_persistent_kernel_has_the_same_bits_in_whatever_order_its_blocks_run(
    library: ctypes.CDLL, made: list[EmulatedEngine], name: str
) -> None:
    case = PERSISTENT[name]
    steps = schedule_of(Reference(case).source, 0, 5)
    found = []
    encoder = -(-case.encoder_hidden[0] // 8)
    decoder = max(-(-case.decoder_hidden[0] // 8), -(-case.data_dim // 16))
    slow_ones = (0, encoder - 1, encoder, encoder + decoder - 1)
    turns = [(0, -1, (0, 5)), (1, -1, (0, 1, 4, 5)), *((0, slow, (0, 5)) for slow in slow_ones)]
    for backwards, slow, cuts in turns:
        library.engine_turns(ctypes.c_int64(backwards), ctypes.c_int64(slow))
        made.append(engine := engine_of(library, case, most_steps=5, persistent=True))
        terms = [engine.run(*(part[a:b] for part in steps)) for a, b in pairwise(cuts)]
        found.append([np.concatenate(terms), *engine.parameters(), *engine.parameters(1)])
    library.engine_turns(ctypes.c_int64(0), ctypes.c_int64(-1))
    for other in found[1:]:
        assert all(np.array_equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("index", [0, 2, 8])
def test_a_number_beyond_a_half_hands_the_steps_to_the_launches(
    library: ctypes.CDLL, made: list[EmulatedEngine], index: int
) -> None:
    case = replace(PERSISTENT["widths of fours"], steps=2)
    weights = [p.detach().numpy() for p in model_of(case).parameters()]
    weights[index] = weights[index].copy()
    # Scaled by 256 it has no half; mu's weights come to their own layer's gradient first.
    weights[index].flat[1] = 300.0 if index != 2 else 3e5
    engines = [engine_of(library, case, weights=weights, persistent=yes) for yes in (True, False)]
    made.extend(engines)
    steps = schedule_of(Reference(case).source, 0, case.steps)
    found = []
    for engine in engines:
        terms = engine.run(*steps)
        found.append([terms, *engine.parameters(), *engine.parameters(1)])
    assert "range of a half" in engines[0].why_not_persistent()
    assert all(np.array_equal(*pair, equal_nan=True) for pair in zip(*found, strict=True))


def test_a_number_that_leaves_the_range_of_a_half_midway_hands_over_from_there(
    library: ctypes.CDLL, made: list[EmulatedEngine]
) -> None:
    case = replace(PERSISTENT["SGD"], options={"lr": 0.5, "weight_decay": 6.0}, steps=12)
    steps = schedule_of(Reference(case).source, 0, case.steps)
    made.append(probe := engine_of(library, case, persistent=True))
    taken, found = 0, []
    while not probe.why_not_persistent() and taken < case.steps:  # two steps to a launch
        kept = probe.parameters()
        found.append(probe.run(*(part[taken : taken + 2] for part in steps)))
        taken += 2
    taken -= 2
    assert 0 < taken < case.steps
    made.append(whole := engine_of(library, case, most_steps=case.steps, persistent=True))
    terms = whole.run(*steps)
    assert "range of a half" in whole.why_not_persistent()
    assert np.array_equal(terms[:taken], np.concatenate(found[:-1]))
    made.append(rest := engine_of(library, case, weights=kept))
    assert np.array_equal(terms[taken:], rest.run(*(part[taken:] for part in steps)), equal_nan=True)
    for pair in zip(whole.parameters(), rest.parameters(), strict=True):
        assert np.array_equal(*pair, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"encoder_hidden": (20, 20)}, "more than one hidden layer"),
        ({"likelihood": "gaussian"}, "a Gaussian decoder"),
        ({"num_samples": 2}, "several samples of z"),
        ({"data_dtype": "f32"}, "data that are not bytes or bits"),
        ({"batch_size": 129, "count": 140}, "minibatches of more than 128 datapoints"),
        ({"latent_dim": 65}, "more than 64 latents"),
        ({"decoder_hidden": (520,)}, "too many hidden units"),
        ({"multiprocessors": 5}, "more blocks than multiprocessors"),
        ({"shared_bytes": 8 << 10}, "a GPU of little shared memory"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_what_the_persistent_kernel_cannot_take_is_left_to_the_launches(
    library: ctypes.CDLL, made: list[EmulatedEngine], change: dict[str, Any], why: str
) -> None:
    case = replace(Case(16, (20,), (20,), 4), **change)
    made.append(engine := engine_of(library, case, persistent=True))
    assert engine.why_not_persistent() == why


def swept(name: str) -> list[Case]:
    """Models to be trained side by side: other latents, more and fewer than a tile has, beta and lr."""
    # With three multiprocessors one model is done in small tiles, the three in large ones.
    case = EVERY[name]
    case = replace(case, multiprocessors=min(case.multiprocessors, 3))
    lr = case.options["lr"]
    rates = (lr, lr, lr) if case.optimizer == "adamw" else (lr, lr / 2, lr / 3)
    betas = (1.0, 1.0, 1.0) if case.estimator == "wake_sleep" else (case.beta, 0.5, 2.0)
    kinds = zip((case.latent_dim, case.latent_dim + 17, 1), betas, rates, strict=True)
    return [
        replace(case, latent_dim=z, beta=beta, options={**case.options, "lr": lr}) for z, beta, lr in kinds
    ]


def source_of(case: Case, seed: int) -> ArraySource:
    return ArraySource(
        data_of(case)[0], batch_size=case.batch_size, seed=seed, order="shuffle", device=torch.device("cpu")
    )


def assert_side_by_side_as_alone(together: Any, alone: Sequence[Any], cases: Sequence[Case]) -> None:
    steps = [schedule_of(source_of(case, seed), 0, 5, seed) for seed, case in enumerate(cases)]
    terms = together.run(*(np.stack(arrays) for arrays in zip(*steps, strict=True)))
    assert np.isfinite(terms).all()
    for model, engine in enumerate(alone):
        np.testing.assert_array_equal(terms[model], engine.run(*steps[model]))
        for which in range(1 if cases[0].optimizer == "sgd" and "momentum" not in cases[0].options else 2):
            ours = together.parameters(which, model)
            for one, other in zip(ours, engine.parameters(which), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", SWEPT)
def test_models_side_by_side_have_the_bits_of_each_alone(
    library: ctypes.CDLL, made: list[EmulatedEngine], name: str
) -> None:
    cases = swept(name)
    models = [
        Trained(
            case.latent_dim,
            case.beta,
            case.options["lr"],
            [p.detach().numpy() for p in model_of(case).parameters()],
        )
        for case in cases
    ]
    made += [engine_of(library, cases[0], models=models), *(engine_of(library, case) for case in cases)]
    assert_side_by_side_as_alone(made[0], made[1:], cases)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SWEPT)
def test_models_side_by_side_on_a_gpu_have_the_bits_of_each_alone(name: str) -> None:
    cases = swept(name)
    assert_side_by_side_as_alone(DeviceEngine(cases), [DeviceEngine([case]) for case in cases], cases)


@pytest.mark.parametrize("name", ["three samples", "large tiles, Gaussian", "wake-sleep"])
def test_steps_have_the_same_bits_however_they_are_cut_into_calls_and_graphs(
    library: ctypes.CDLL, made: list[EmulatedEngine], name: str
) -> None:
    case = replace(EVERY[name], batch_size=9)
    source = Reference(case).source
    n = 7
    made += [engine_of(library, case, most_steps) for most_steps in (7, 3, 1)]
    whole, threes, ones = made
    terms = whole.run(*schedule_of(source, 0, n))
    assert np.isfinite(terms).all()
    np.testing.assert_array_equal(threes.run(*schedule_of(source, 0, n)), terms)  # in graphs of 3, 3 and 1
    np.testing.assert_array_equal(
        np.concatenate([ones.run(*schedule_of(source, step, 1)) for step in range(n)]), terms
    )
    for which in (0, 1):
        for same in zip(*(engine.parameters(which) for engine in made), strict=True):
            np.testing.assert_array_equal(same[1], same[0])
            np.testing.assert_array_equal(same[2], same[0])


def test_adagrad_that_only_accumulates_leaves_every_bit(
    library: ctypes.CDLL, made: list[EmulatedEngine]
) -> None:
    case = Case(options={"lr": 0.05, "accumulate_steps": 2})
    source = Reference(case).source
    made.append(engine := engine_of(library, case))
    before = engine.parameters()
    engine.run(*schedule_of(source, 0, 2))
    for ours, start, state in zip(engine.parameters(), before, engine.parameters(1), strict=True):
        np.testing.assert_array_equal(ours, start)
        assert state.any()
    engine.run(*schedule_of(source, 2, 1))
    assert any((ours != start).any() for ours, start in zip(engine.parameters(), before, strict=True))


def test_a_parameter_that_is_nan_shows_in_every_term(
    library: ctypes.CDLL, made: list[EmulatedEngine]
) -> None:
    case = Case(data_dtype="f32", activation="relu")
    source = Reference(case).source
    made.append(engine := engine_of(library, case))
    rows, sizes, seeds = schedule_of(source, 0, 1)
    assert np.isfinite(engine.run(rows, sizes, seeds)).all()
    weight = [p.detach().numpy().copy() for p in model_of(case).parameters()]
    weight[0][0, 0] = np.nan
    made.append(spoilt := engine_of(library, case, weights=weight))
    assert np.isnan(spoilt.run(rows, sizes, seeds)).all()


def test_the_papers_model_takes_eight_launches_a_step(
    library: ctypes.CDLL, made: list[EmulatedEngine]
) -> None:
    case = Case()  # one hidden layer in either half, as in the paper
    made.append(engine := engine_of(library, case))
    engine.run(*schedule_of(Reference(case).source, 0, 1))
    assert engine.launches_per_step() == 8


SCHEDULES = (
    "two hidden layers, ReLU",
    "two hidden layers, softplus",
    "no hidden layers",
    "three samples",
    "SGVB-A, three samples",
    "large tiles",
)
SCHEDULES += ("Gaussian straight from z", "Gaussian, sigmoid mean", "large tiles, Gaussian", "SGVB-A")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_in_python_has_no_hazard_and_takes_the_steps_of_the_reference(name: str) -> None:
    case = replace(CASES[name], optimizer="sgd", options={"lr": 0.02})
    wanted = Reference(case)
    twin = Twin(
        [p.detach().numpy() for p in wanted.model.parameters()],
        encoder_layers=len(case.encoder_hidden),
        decoder_layers=len(case.decoder_hidden),
        activation=case.activation,
        likelihood=case.likelihood + ("_sigmoid_mean" if case.mean_activation else ""),
        estimator=case.estimator,
        samples=case.num_samples,
        beta=case.beta,
        weight_prior=1 / case.count if case.weight_prior else 0.0,
        lr=0.02,
        multiprocessors=case.multiprocessors,
    )
    minibatches = []
    wanted.program.load(0, case.steps)
    for step, size in enumerate(wanted.source.sizes(0, case.steps).tolist()):
        wanted.program.cursor.fill_(step)
        shape = (case.num_samples * size, case.latent_dim)
        eps = reference.philox_normal(shape, seed=step_seed(SEED, step, NOISE), dtype=torch.float64)
        minibatches.append({"x": wanted.program.minibatch(size)[1].double().numpy(), "eps": eps.numpy()})
    terms = run_twin(twin, minibatches, seed=0)
    np.testing.assert_allclose(terms, wanted.engine.run(case.steps).numpy(), rtol=1e-12)
    for i, p in enumerate(wanted.model.parameters()):
        np.testing.assert_allclose(twin.memory[f"parameter {i}"], p.detach().numpy(), rtol=1e-10, atol=1e-13)
