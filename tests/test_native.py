"""The native engine computes the steps of the reference engine: in float32 against float64, whatever the
model."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vae_fast as vf
from vae_fast import _C, datasets, native
from vae_fast.algorithms import wake_sleep
from vae_fast.batches import ArraySource, StreamSource
from vae_fast.engines import AutogradEngine, Plan, StepProgram, make_engine
from vae_fast.native import NativeEngine, _CudaSteps, run_together
from vae_fast.optim import Adagrad, make_optimizer

CPU = torch.device("cpu")


def pixels(count: int = 150, dim: int = 37, zeros: float = 0.8) -> Tensor:
    """With as many zeros as images have the native engine reads lists of the others."""
    x = torch.rand(count, dim, generator=torch.Generator().manual_seed(1))
    return (x * 255).to(torch.uint8) * (x > zeros)


def train(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    steps: int = 7,
    data: Tensor | None = None,
    batch: int = 32,
    order: str = "shuffle",
    targets: str = "real",
    precision: str = "exact",
    optimizer: str = "adagrad",
    lr: float = 0.02,
    options: dict[str, Any] | None = None,
    algorithm: type[StepProgram] = StepProgram,
    seed: int = 7,
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor], AutogradEngine]:
    """The terms of some steps, and everything that they changed."""
    model_keys = ("hidden_dims", "latent_dim", "activation", "likelihood", "mean_activation", "logvar_scale")
    model = {
        "hidden_dims": [19],
        "latent_dim": 5,
        **{k: settings.pop(k) for k in model_keys if k in settings},
    }
    x = pixels() if data is None else data
    vae = vf.VAE(x.shape[1], init="torch", seed=3, **model).to(dtype)
    options = {"accumulate_steps": 2} if optimizer == "adagrad" and options is None else options or {}
    made = make_optimizer(optimizer, vae.parameters(), lr, **options)
    prepared = datasets.prepare(x, likelihood=vae.likelihood, targets=targets)
    source = ArraySource(prepared, batch_size=batch, seed=5, order=order, device=CPU)
    plan = Plan(seed, **settings)
    engine, _ = make_engine(name, vae, made, source, plan, CPU, algorithm, precision=precision)
    terms = engine.run(steps)
    state = engine.snapshot().tensors
    return terms.double(), {k: v.double() for k, v in state.items() if not k.startswith("random.")}, engine


WAKE_SLEEP = {"algorithm": wake_sleep._Program, "logvar_scale": 0.3, "weight_prior": True}
CASES: dict[str, dict[str, Any]] = {
    "paper's": {},
    "two hidden layers": {"hidden_dims": [19, 33]},
    "no hidden layer": {"hidden_dims": []},
    "one unit and one latent": {"hidden_dims": [1], "latent_dim": 1},
    "relu": {"activation": "relu"},
    "softplus": {"activation": "softplus", "hidden_dims": [19, 33]},
    "three samples": {"num_samples": 3},
    "SGVB-A": {"estimator": "sgvb_a", "num_samples": 2},
    "beta": {"beta": 0.3},
    "weight prior": {"weight_prior": True},
    "gaussian": {"likelihood": "gaussian"},
    "gaussian, sigmoid mean": {"likelihood": "gaussian", "mean_activation": "sigmoid"},
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "options": {"momentum": 0.9, "weight_decay": 0.1}},
    "adam": {"optimizer": "adam", "lr": 1e-3},
    "adam, weight decay": {"optimizer": "adam", "lr": 1e-3, "options": {"weight_decay": 0.1}},
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
    "dynamic": {"targets": "dynamic"},
    "with replacement": {"order": "replacement"},
    "minibatches of one": {"batch": 1},
    "one smaller minibatch": {"batch": 149, "steps": 4},
    "many row blocks": {"data": pixels(1400), "batch": 700, "steps": 3},
    "many row blocks, few zeros": {"data": pixels(1400, zeros=0.5), "batch": 700, "steps": 3},
    "many columns": {"data": pixels(60, 1101), "hidden_dims": [130], "batch": 35, "lr": 1e-3, "steps": 4},
    "few zeros": {"data": pixels(zeros=0.5)},
    "deep sums": {
        "data": pixels(60, 1100, zeros=0.4),
        "hidden_dims": [530],
        "batch": 35,
        "lr": 1e-3,
        "steps": 4,
    },
    "long sums of inputs": {"data": pixels(80, 5000, zeros=0.3), "batch": 40, "lr": 1e-3, "steps": 2},
    "long sums of rows": {"data": pixels(5000, 37, zeros=0.3), "batch": 5000, "steps": 2},
    "float data": {"data": torch.rand(150, 37)},
    "log-variance scale": {"logvar_scale": 0.1, "lr": 0.1},
    "log-variance scale, SGVB-A, sgd": {"logvar_scale": 2.0, "estimator": "sgvb_a", "optimizer": "sgd"},
    "wake-sleep": WAKE_SLEEP,
    "wake-sleep, sgd, two hidden layers": {**WAKE_SLEEP, "optimizer": "sgd", "hidden_dims": [19, 33]},
    "wake-sleep, no hidden layer": {**WAKE_SLEEP, "hidden_dims": [], "latent_dim": 20},
    "wake-sleep, gaussian": {**WAKE_SLEEP, "likelihood": "gaussian"},
    "wake-sleep, sigmoid mean": {**WAKE_SLEEP, "likelihood": "gaussian", "mean_activation": "sigmoid"},
    "wake-sleep, softplus": {**WAKE_SLEEP, "activation": "softplus"},
    "wake-sleep, many rows": {**WAKE_SLEEP, "data": pixels(1400), "batch": 700, "steps": 3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_errs_no_more_than_twice_as_much_as_autograd_in_float32(case: dict[str, Any]) -> None:
    wanted, state, _ = train("reference", torch.float64, **case)
    errors = {}
    for name in ("native", "modules"):
        terms, changed, _ = train(name, **case)
        assert changed.keys() == state.keys()
        of_terms = ((terms - wanted).abs() / wanted.abs().clamp_min(1)).max()
        of_state = max(
            (changed[k] - v).abs().max() / v.abs().max().clamp_min(1e-3)
            for k, v in state.items()
            if v.numel()
        )
        errors[name] = (float(of_terms), float(of_state))
    # the floor: a unit or two in the last place, where autograd happens to be exact
    assert errors["native"][0] <= max(2 * errors["modules"][0], 5e-7), errors
    assert errors["native"][1] <= max(2 * errors["modules"][1], 2e-6), errors


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"targets": "dynamic"},
        {"weight_prior": True},
        {"optimizer": "adam", "lr": 1e-3},
        {"optimizer": "sgd", "options": {"momentum": 0.9}},
        {"optimizer": "sgd", "options": {"weight_decay": 0.1}},
        {"optimizer": "adamw", "lr": 1e-3},
    ],
    ids=str,
)
def test_data_of_images_with_margins_give_the_same_steps_as_without_lists(case: dict[str, Any]) -> None:
    """Blank columns, blank rows and dense ones: a term that is left out must be zero, and a weight that no
    pixel asks anything of still has its prior, its decay and its momentum."""
    x = pixels(80, 63)
    x[:, 10:40] = 0
    x[5:20] = 0
    x[::3, 50:] = 200
    x[:, 42:44] = 0
    x[0, 42:44] = 99  # columns that have pixels in one minibatch of an epoch
    wanted, state, _ = train("reference", torch.float64, data=x, batch=20, **case)
    terms, changed, _ = train("native", data=x, batch=20, **case)
    torch.testing.assert_close(terms, wanted, rtol=1e-6, atol=1e-6)
    for name, value in state.items():
        torch.testing.assert_close(changed[name], value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"algorithm": type("Other", (wake_sleep._Program,), {})}, "its step is another algorithm's"),
        ({"algorithm": wake_sleep._Program, "precision": "fast"}, "its wake-sleep step is exact"),
        ({"logvar_scale": 1e-9}, "the encoder has logvar_scale=1e-09"),
    ],
)
def test_says_what_it_does_not_take(case: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"engine: got 'native', but {reason}"):
        train("native", steps=1, **case)
    assert train("auto", steps=1, **case)[2].name == "modules"


def test_packed_data_give_the_steps_of_unpacked() -> None:
    x = (pixels(60, 37) > 100).to(torch.uint8)
    packed = torch.from_numpy(np.packbits(x.numpy(), axis=1, bitorder="little"))
    results = []
    for values in (x, packed):
        vae = vf.VAE(37, [8], 3, seed=0)
        parameters = [p.detach() for p in vae.parameters()]
        step = _C.CpuStep(
            data_dim=37,
            encoder_hidden=[8],
            latent_dim=3,
            decoder_hidden=[8],
            activation="tanh",
            likelihood="bernoulli",
            estimator="sgvb_b",
            num_samples=1,
            beta=1.0,
            weight_prior=0.0,
            precision="exact",
        )
        run = step.prepare(
            parameters=parameters,
            states=[],
            optimizer="sgd",
            options={"lr": 0.01},
            data=values,
            packed=values is packed,
            dynamic=False,
            scale=1.0,
            rows=torch.arange(60).reshape(3, 20),
            sizes=torch.full((3,), 20),
            seeds=torch.arange(6).reshape(3, 2),
            updates=0,
        )
        results.append([_C.run([run])[0], *parameters])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_fast_is_the_step_with_operands_rounded_to_bfloat16() -> None:
    """Of the size of the rounding, 2^-9, and not of float32's."""
    wanted, _, _ = train("reference", torch.float64, steps=1)
    terms, _, _ = train("native", precision="fast", steps=1)
    error = ((terms - wanted).abs() / wanted.abs())[:, 0].max()
    assert 1e-7 < error < 2**-9
    how: dict[str, Any] = {"optimizer": "sgd", "steps": 1, "logvar_scale": 0.3}
    before, exact, fast = (
        train("reference", torch.float64, lr=0.0, **how)[1],
        train("reference", torch.float64, lr=1.0, **how)[1],
        train("native", precision="fast", lr=1.0, **how)[1],
    )
    for name, value in exact.items():  # value - before is the gradient
        error = (fast[name] - value).norm() / (value - before[name]).norm()
        assert 1e-7 < error < 2**-6, name


ON_A_MATRIX_UNIT = {
    "paper's": {"data": pixels(120, 784), "hidden_dims": [500], "latent_dim": 20, "batch": 100},
    "odd sizes": {"hidden_dims": [33, 1, 65], "latent_dim": 3, "batch": 31, "num_samples": 3},
    "several blocks of rows": {"data": pixels(900, 70), "hidden_dims": [40], "batch": 613},
    "dense": {"data": pixels(300, 270, zeros=0.1), "hidden_dims": [300], "batch": 260},
    "Gaussian": {"likelihood": "gaussian", "mean_activation": "sigmoid", "activation": "relu", "batch": 33},
    "one row": {"batch": 1},
    "long sums": {"data": pixels(40, 40_000, zeros=0.1), "hidden_dims": [40], "batch": 40},
    "no hidden layers": {"hidden_dims": [], "estimator": "sgvb_a", "weight_prior": True},
}


def steps_of(path: str, precision: str) -> None:
    """Parameters before and after one step of SGD, of each of these. The moves are the gradients, 1024 times
    so that the rounding of parameters does not count."""
    how: dict[str, Any] = {"precision": precision, "optimizer": "sgd", "steps": 1}
    found = {
        name: [train("native", lr=lr, **how, **case)[1] for lr in (0.0, 1024.0)]
        for name, case in ON_A_MATRIX_UNIT.items()
    }
    torch.save(found, path)


# A product of parts that is left out is 2e-6 of the whole or more; 40,000 terms in one accumulator err by
# 8e-7. In bfloat16, sums of another order are sometimes rounded to the other side: an error of 2^-9, in few.
@pytest.mark.parametrize(
    ("unit", "precision", "most"),
    [("amx", "exact", 5e-7), ("amx", "fast", 2e-3), ("avx512_bf16", "fast", 2e-3)],
)
def test_a_matrix_unit_rounds_as_vectors_do(tmp_path: Path, unit: str, precision: str, most: float) -> None:
    if _C.cpu_capability() not in ("amx", unit):
        pytest.skip(f"no {unit}, or not to be used")
    found = []
    for capability in (unit, "avx512"):
        path = str(tmp_path / capability)
        done = subprocess.run(
            [sys.executable, "-c", f"import test_native; test_native.steps_of({path!r}, {precision!r})"],
            env={**os.environ, "VAE_FAST_CPU_CAPABILITY": capability},
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(torch.load(path))
    for name in ON_A_MATRIX_UNIT:
        (before, computed), (_, vectors) = found[0][name], found[1][name]
        for key, value in vectors.items():
            error, moved = (computed[key] - value).norm(), (value - before[key]).norm()
            assert moved > 0 and error / moved < most, (name, key, float(error / moved))
        if precision == "fast" and name != "one row":  # it was the unit: sums have another order
            assert any(not torch.equal(computed[key], value) for key, value in vectors.items()), name


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_repeats_bit_for_bit_whatever_the_number_of_threads(precision: str) -> None:
    runs = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            runs.append(
                train("native", hidden_dims=[70, 40], data=pixels(900, 200), batch=300, precision=precision)
            )
    finally:
        torch.set_num_threads(threads)
    for terms, state, _ in runs[1:]:
        assert torch.equal(terms, runs[0][0])
        assert all(torch.equal(state[name], runs[0][1][name]) for name in state)


def test_one_run_is_many_runs() -> None:
    whole, state, _ = train("native", steps=9)
    _, _, engine = train("native", steps=4)
    assert torch.equal(torch.cat([whole[:4], engine.run(5).double()]), whole)
    after = engine.snapshot().tensors
    assert all(torch.equal(after[name].double(), value) for name, value in state.items())


def test_the_state_goes_from_one_engine_to_another() -> None:
    for optimizer in ("adagrad", "adam", "sgd"):
        options = {"momentum": 0.9} if optimizer == "sgd" else None
        wanted, _, _ = train("modules", steps=8, optimizer=optimizer, lr=1e-3, options=options)
        _, _, first = train("native", steps=4, optimizer=optimizer, lr=1e-3, options=options)
        saved = first.snapshot()
        _, _, second = train("modules", steps=1, optimizer=optimizer, lr=1e-3, options=options)
        second.restore(saved)
        second.next_step = 4
        torch.testing.assert_close(second.run(4).double(), wanted[4:], rtol=1e-5, atol=1e-4)


# With 0.74 some minibatches go through lists and some do not, where there is AMX.
@pytest.mark.parametrize("zeros", [0.8, 0.74, 0.5])
@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_numbers_that_are_not_finite_do_not_outlive_the_parameters(optimizer: str, zeros: float) -> None:
    """Nor where memory is filled up to whole vectors, which a matrix unit reads."""
    how: dict[str, Any] = {"data": pixels(zeros=zeros), "hidden_dims": [40, 19], "optimizer": optimizer}
    _, _, engine = train("native", steps=3, lr=1e-3, **how)
    start = engine.snapshot()
    wanted = engine.run(5)
    after = engine.snapshot().tensors
    with torch.no_grad():
        for parameter in engine._program.model.parameters():
            parameter.fill_(torch.inf)
    assert not engine.run(6).isfinite().all()
    engine.restore(start)
    engine.next_step = 3
    assert torch.equal(engine.run(5), wanted)
    for name, value in engine.snapshot().tensors.items():
        assert torch.equal(value, after[name])


def stream_of(batches: Iterable[Tensor]) -> Any:
    return StreamSource(
        iter(batches),
        likelihood="bernoulli",
        targets="auto",
        pixel_scale=255,
        data_dim=37,
        device=CPU,
        first_step=0,
    )


def test_a_stream_gives_the_steps_of_its_array() -> None:
    x = pixels(96)
    vae, other = vf.VAE(37, [8], 3, seed=0), vf.VAE(37, [8], 3, seed=0)
    terms = []
    for model in (vae, other):
        source = stream_of(x.split(32))
        source.sizes(0, 3)
        made = make_optimizer("adagrad", model.parameters(), 0.01, accumulate_steps=0)
        name = "native" if model is vae else "modules"
        terms.append(make_engine(name, model, made, source, Plan(1), CPU)[0].run(3))
    torch.testing.assert_close(*terms, rtol=1e-6, atol=1e-4)


def test_autograd_notices_that_the_parameters_have_changed() -> None:
    _, _, engine = train("native", steps=1)
    (weight, *_) = engine._program.model.parameters()
    loss = (weight**2).sum()
    engine.run(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class StandIn:
    """What ``_C.CudaStep`` promises Python (csrc/engine/cuda/step.cpp), by the step on the CPU."""

    made = 0

    def __init__(
        self,
        *,
        models: Sequence[Mapping[str, Any]],
        options: dict[str, float],
        batch_size: int,
        most_steps: int,
        persistent: bool,
        **given: Any,
    ) -> None:
        self.why_not_persistent = "several models" if persistent else "nobody asked for it"
        StandIn.made += 1
        network = ("data_dim", "encoder_hidden", "decoder_hidden", "activation", "likelihood")
        objective = ("estimator", "num_samples", "weight_prior", "precision", "logvar_scale")
        common = {name: given.pop(name) for name in (*network, *objective)}
        assert "lr" not in options
        self._models = []
        for model in models:
            own = {name: model[name] for name in ("parameters", "states")}
            step = _C.CpuStep(**common, latent_dim=model["latent_dim"], beta=model["beta"])
            self._models.append((step, {**given, **own, "options": {**options, "lr": model["lr"]}}))
        self._room = (most_steps, batch_size)

    def run(self, rows: Tensor, sizes: Tensor, seeds: Tensor, updates: Sequence[int]) -> Tensor:
        assert rows.shape[1] <= self._room[0] and rows.shape[2] <= self._room[1]
        terms = []
        for m, (step, given) in enumerate(self._models):
            how = {"rows": rows[m], "sizes": sizes[m], "seeds": seeds[m], "updates": updates[m]}
            terms += _C.run([step.prepare(**given, **how)])
        return torch.stack(terms)


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "sgd"])
def test_on_cuda_the_step_is_made_once_and_again_where_something_moved(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "CudaStep", StandIn, raising=False)
    wanted, state, _ = train("native", steps=9, optimizer=optimizer, lr=1e-3)
    _, _, engine = train("native", steps=2, optimizer=optimizer, lr=1e-3)
    assert isinstance(engine, NativeEngine)
    engine._on_cuda, engine.chunk_steps, StandIn.made = True, 2, 0
    terms = [engine.run(2), engine.run(2)]
    assert StandIn.made == 1
    terms.append(engine.run(3))  # more than there is room for
    assert StandIn.made == 2
    assert torch.equal(torch.cat(terms).double(), wanted[2:])
    after = engine.snapshot().tensors
    assert all(torch.equal(after[name].double(), value) for name, value in state.items())
    engine._program.optimizer.param_groups[0]["lr"] = 2e-3
    engine.run(1)
    assert StandIn.made == 3


def test_on_cuda_a_model_that_the_persistent_kernel_does_not_take_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_C, "CudaStep", StandIn, raising=False)
    _, _, engine = train("native", steps=1)
    assert isinstance(engine, NativeEngine)
    engine._on_cuda = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run(1)
    monkeypatch.setenv("VAE_FAST_CUDA_PERSISTENT", "1")
    engine._cuda_steps = _CudaSteps()
    with pytest.warns(UserWarning, match="^VAE_FAST_CUDA_PERSISTENT=1: .* not take several models$") as told:
        engine.run(1)
        engine.run(1)
    assert len(told) == 1


def test_on_cuda_models_that_are_alike_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "CudaStep", StandIn, raising=False)
    x = pixels()
    kinds: list[dict[str, Any]] = [
        {},
        {"seed": 5},
        {"lr": 3e-3},
        {"beta": 2.0},
        {"latent_dim": 9},
        {"optimizer": "adam"},
        {"optimizer": "adam", "lr": 3e-3},
        {"optimizer": "adamw", "options": {"weight_decay": 0.1}},
        {"optimizer": "adamw", "options": {"weight_decay": 0.1}, "lr": 3e-3},  # on its own
        {"hidden_dims": [70, 41]},  # likewise
        {"data": x.clone()},  # likewise
    ]

    def engines() -> list[NativeEngine]:
        made = []
        for kind in kinds:
            engine = train("native", steps=2, **{"lr": 1e-3, "data": x, **kind})[2]
            assert isinstance(engine, NativeEngine)
            engine._on_cuda = True
            made.append(engine)
        return made

    alone, together = engines(), engines()
    wanted = [engine.run(3) for engine in alone]
    StandIn.made = 0
    n_steps = [3] * len(kinds)
    found = run_together(together, n_steps)
    assert StandIn.made == 6
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(run_together(together, n_steps), [engine.run(3) for engine in alone], strict=True):
        assert torch.equal(one, other)
    assert StandIn.made == 6
    run_together(together[:2], [2, 1])  # other steps at once: not the same launches
    assert StandIn.made == 8


def test_on_cuda_a_stream_in_half_precision_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "CudaStep", StandIn, raising=False)
    monkeypatch.setattr(native, "_is_cuda", lambda device: True)
    x = (pixels(96) / 255).half()
    terms = []
    for batches in (x.split(32), x.float().split(32)):
        source = stream_of(batches)
        vae = vf.VAE(37, [8], 3, seed=0)
        made = make_optimizer("adagrad", vae.parameters(), 0.01, accumulate_steps=0)
        engine, _ = make_engine("native", vae, made, source, Plan(1), CPU)
        found = []
        for step in range(3):
            source.sizes(step, 1)
            found.append(engine.run(1))
        terms.append(torch.cat(found))
    assert torch.equal(*terms)


# --- what it does not take --------------------------------------------------------------------------------


def reason(model: vf.VAE, optimizer: Any = "adagrad", **settings: Any) -> str:
    made = make_optimizer(optimizer, model.parameters(), 0.01)
    source = ArraySource(
        datasets.prepare(pixels(), likelihood="bernoulli"), batch_size=20, seed=0, order="shuffle", device=CPU
    )
    engine, why = make_engine("auto", model, made, source, Plan(0, **settings), CPU)
    assert engine.name == "modules"
    with pytest.raises(ValueError, match="engine: got 'native', but "):
        make_engine("native", model, made, source, Plan(0, **settings), CPU)
    return why


def test_auto_says_why_it_is_not_native() -> None:
    def paper(**how: Any) -> vf.VAE:
        return vf.VAE(37, [8], 3, seed=0, **how)

    hooked, frozen, double = paper(), paper(), paper().double()
    hooked.encoder.register_forward_hook(lambda *_: None)
    next(frozen.parameters()).requires_grad_(False)
    own = vf.VAE(encoder=vf.MLPEncoder(37, [8], 3), decoder=nn.Linear(3, 37))
    assert "module of your own" in reason(own)
    mixed, sharper = paper(), paper(activation="softplus")
    mixed.decoder.hidden[1] = nn.ReLU()
    sharper.encoder.hidden[1] = nn.Softplus(beta=2)
    assert "same known activation" in reason(mixed)
    assert "same known activation" in reason(sharper)
    assert "posterior is laplace" in reason(paper(posterior="laplace"))
    assert "estimator is score_function" in reason(paper(), estimator="score_function")
    assert "model has hooks" in reason(hooked)
    backward, by_gradient, after_gradient = paper(), paper(), paper()
    backward.decoder.register_full_backward_hook(lambda *_: None)
    assert "model has hooks" in reason(backward)
    by_gradient.decoder.logits.weight.register_hook(lambda g: g * 0)
    after_gradient.decoder.logits.bias.register_post_accumulate_grad_hook(lambda p: None)
    assert "parameters have hooks" in reason(by_gradient)
    assert "parameters have hooks" in reason(after_gradient)
    for register in ("register_step_pre_hook", "register_step_post_hook"):

        def clipped(ps: Any, register: str = register) -> torch.optim.Optimizer:
            made = Adagrad(ps, 0.01)
            getattr(made, register)(lambda *_: None)
            return made

        assert "optimizer has hooks" in reason(paper(), clipped)
    head, replaced, shared = paper(), paper(), paper()
    head.encoder.mu = type("Doubled", (nn.Linear,), {"forward": lambda self, h: 2 * h[:, :3]})(8, 3)
    assert "modules of your own" in reason(head)
    replaced.decoder.logits.forward = lambda h: h.new_zeros(len(h), 37)
    assert "was replaced" in reason(replaced)
    shared.encoder.logvar.weight.data = shared.encoder.mu.weight.data
    assert "share their memory" in reason(shared)

    def uneven(ps: Any) -> torch.optim.Optimizer:
        ps = list(ps)
        made = torch.optim.Adam(ps, 0.01)
        made.state[ps[0]]["step"] = torch.tensor(3.0)
        return made

    assert "some parameters 0 times and others 3" in reason(paper(), uneven)
    assert "is not a contiguous float32 tensor" in reason(frozen)
    assert "is not a contiguous float32 tensor" in reason(double)
    assert "optimizer is RMSprop" in reason(paper(), lambda ps: torch.optim.RMSprop(ps, 0.01))
    assert "nesterov" in reason(paper(), lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9, nesterov=True))
    assert "eps=0" in reason(paper(), lambda ps: torch.optim.Adam(ps, 0.01, eps=0))
    assert "eps=1e-40" in reason(paper(), lambda ps: Adagrad(ps, 0.01, eps=1e-40))
    assert "amsgrad" in reason(paper(), lambda ps: torch.optim.Adam(ps, 0.01, amsgrad=True))


def test_a_bias_of_many_rows_has_a_gradient_as_exact_as_torchs() -> None:
    how = {"data": pixels(6000), "batch": 6000, "steps": 1, "optimizer": "sgd", "lr": 1.0, "hidden_dims": [4]}
    exact = train("reference", torch.float64, **how)[1]
    errors = {}
    for name in ("native", "modules"):
        state = train(name, **how)[1]
        biases = [key for key in exact if key.endswith("bias")]
        errors[name] = max(float((state[key] - exact[key]).abs().max()) for key in biases)
    assert errors["native"] <= max(2 * errors["modules"], 5e-7), errors


def test_auto_is_native_where_it_can_be() -> None:
    trainer = vf.Trainer(vf.VAE(37, [8], 3, seed=0), batch_size=20)
    trainer.fit(pixels(), max_samples=40, progress=False)
    assert trainer.engine_name == "native" and "float32" in trainer.engine_reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.full((1, 4), 60)}, r"rows\[0, 0\]: got 60, wanted 0 to 59"),
        ({"sizes": torch.tensor([5])}, r"sizes\[0\]: got 5, wanted 1 to 4"),
        (
            {"data": torch.zeros(60, 36, dtype=torch.uint8)},
            r"data: got shape \[60, 36\].*wanted contiguous \[N, 37\]",
        ),
        (
            {"data": torch.zeros(60, 37, dtype=torch.float64)},
            "data: got dtype Double, wanted uint8 or float32",
        ),
        ({"optimizer": "rmsprop"}, 'optimizer: got "rmsprop"'),
        ({"options": {"learning_rate": 0.1}}, 'options: got "learning_rate", wanted lr, eps'),
        ({"parameters": []}, "parameters: got 0"),
        ({"states": [[]]}, "states: got 1 lists, wanted 0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    _, _, engine = train("native", data=pixels(60), steps=1)
    assert isinstance(engine, NativeEngine)
    parameters = [p.detach() for p in engine._program.model.parameters()]
    arguments: dict[str, Any] = {
        "parameters": parameters,
        "states": [],
        "optimizer": "sgd",
        "options": {"lr": 0.1},
        "data": pixels(60),
        "packed": False,
        "dynamic": False,
        "scale": 1.0,
        "rows": torch.zeros(1, 4, dtype=torch.int64),
        "sizes": torch.tensor([4]),
        "seeds": torch.zeros(1, 2, dtype=torch.int64),
        "updates": 0,
    }
    with pytest.raises(ValueError, match=message):
        engine._step.prepare(**{**arguments, **change})


# --- trouble
# --------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_found_and_named() -> None:
    x = torch.rand(200, 6)
    x[150] = 1e30  # the Gaussian's squared residual overflows
    trainer = vf.Trainer(
        vf.VAE(6, [4], 2, "gaussian", seed=0), batch_size=10, engine="native", on_nan="skip", seed=1
    )
    with pytest.warns(UserWarning, match="row 150 of the training data"):
        trainer.fit(x, max_samples=200, progress=False)
    assert [incident.datapoint for incident in trainer.incidents] == ["row 150 of the training data"]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_memory_does_not_grow() -> None:
    _, _, engine = train("native", steps=200)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(30):
        engine.run(300)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "train.py"
    path.write_text(
        textwrap.dedent(
            """
            import os, sys, torch, vae_fast as vf
            x = (torch.rand(3000, 50, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
            path, samples = sys.argv[1], int(sys.argv[2])
            if os.path.exists(path):
                trainer = vf.Trainer.load(path, engine="native")
            else:
                model = vf.VAE(50, [40], 4, seed=0)
                trainer = vf.Trainer(model, engine="native", batch_size=50, optimizer="adam", lr=1e-3)
            left = samples - trainer.samples_seen
            trainer.fit(x, max_samples=left, report_every=10_000, checkpoint=path, progress=False)
            """
        )
    )
    yield path


@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(script: Path, tmp_path: Path) -> None:
    command, samples = [sys.executable, str(script)], "200000"
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    subprocess.run([*command, str(whole), samples], check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen([*command, str(killed), samples], stdout=subprocess.PIPE)
    while not killed.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, str(killed), samples], check=True, stdout=subprocess.DEVNULL)
    ours, theirs = (vf.Trainer.load(path) for path in (killed, whole))
    assert ours.samples_seen == theirs.samples_seen == 200_000
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row.train_bound for row in ours.history] == [row.train_bound for row in theirs.history]
