"""Engines: the same curve from the same seed, captured or not, and states that can be put back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vae_fast import VAE, datasets, functional, reference
from vae_fast.batches import ArraySource, StreamSource
from vae_fast.engines import AutogradEngine, CudaGraphs, Plan, StepProgram, check_engine, make_engine
from vae_fast.estimators import ESTIMATORS, initial_state, step_seed
from vae_fast.optim import OPTIMIZERS, make_optimizer

CPU = torch.device("cpu")


def data(count: int = 50, dim: int = 12) -> Tensor:
    return torch.rand(count, dim, generator=torch.Generator().manual_seed(0))


def small_model(seed: int = 0) -> VAE:
    return VAE(data_dim=12, hidden_dims=[8], latent_dim=2, init="torch", seed=seed)


class WithNoiseOfItsOwn(nn.Module):
    """Dropout draws from torch's generator, batch normalisation keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh())
        self.mu, self.logvar = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.mu(h), self.logvar(h)


def noisy_model() -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAE(encoder=WithNoiseOfItsOwn(), decoder=nn.Linear(2, 12))


def array_source(
    x: Tensor,
    batch_size: int = 20,
    device: torch.device = CPU,
    seed: int = 0,
    order: str = "shuffle",
    **how: Any,
) -> ArraySource:
    prepared = datasets.prepare(x, likelihood="bernoulli", **how)
    return ArraySource(prepared, batch_size=batch_size, seed=seed, order=order, device=device)


def engine_for(
    model: VAE,
    x: Tensor | None = None,
    *,
    name: str = "modules",
    optimizer: str = "adam",
    lr: float = 0.01,
    recorder: Any = None,
    device: torch.device = CPU,
    batch_size: int = 20,
    **plan: Any,
) -> AutogradEngine:
    source = array_source(data() if x is None else x, batch_size, device)
    options = {"accumulate_steps": 5} if optimizer == "adagrad" else {}
    made = make_optimizer(optimizer, list(model.parameters()), lr, **options)
    ops = reference if name == "reference" else functional
    state = initial_state(plan.get("estimator", ""), device)
    planned = Plan(**plan, estimator_state=state)
    return AutogradEngine(name, StepProgram(ops, model, made, source, planned, device), recorder)


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p.cpu(), q.cpu()) for p, q in pairs)


# --- one curve ----------------------------------------------------------------------------------------------


def test_both_engines_agree_to_1e_4_over_200_steps_of_the_papers_model() -> None:
    train, _ = datasets.mnist()
    losses = []
    for name in ("reference", "modules"):
        model = VAE(data_dim=784, hidden_dims=[500], latent_dim=20, seed=0)
        source = array_source(train, batch_size=100)
        optimizer = make_optimizer("adagrad", list(model.parameters()), 0.02)
        engine, _ = make_engine(name, model, optimizer, source, Plan(), CPU)
        losses.append(engine.run(200)[:, 0])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert losses[0][-1] > losses[0][0] + 200  # they have learned, and agree


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_engines_agree_for_every_estimator_and_optimizer(estimator: str, optimizer: str) -> None:
    how: dict[str, Any] = {"estimator": estimator, "optimizer": optimizer, "num_samples": 2, "lr": 1e-3}
    ours, plain = (engine_for(small_model(), name=name, **how).run(200) for name in ("modules", "reference"))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_dynamic_pixels_are_drawn_anew_each_time_and_alike_by_both_engines() -> None:
    x = data(20)
    runs = []
    for ops in (functional, reference):
        model = small_model()
        source = array_source(x, 20, targets="dynamic")
        seen: list[Tensor] = []
        model.encoder.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0].detach()))
        program = StepProgram(ops, model, make_optimizer("sgd", model.parameters(), 0.1), source, Plan(), CPU)
        AutogradEngine("", program).run(300)
        runs.append(torch.stack(seen))
    assert torch.equal(runs[0], runs[1])
    assert set(runs[0].unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(runs[0][0].sort(0).values, runs[0][1].sort(0).values)
    assert runs[0].mean() == pytest.approx(x.mean().item(), abs=0.01)


def test_chunks_of_any_length_give_the_same_steps() -> None:
    a, b = small_model(), small_model()
    whole = engine_for(a).run(30)
    engine = engine_for(b)
    parts = torch.cat([engine.run(n) for n in (1, 7, 2, 20)])
    assert torch.equal(whole, parts)
    assert same_parameters(a, b)


def test_step_takes_the_same_step_as_run() -> None:
    a, b = small_model(), small_model()
    terms = engine_for(a, seed=4).run(1)[0]
    source = array_source(data())
    batch = source.batch(torch.from_numpy(source.rows(0, 1))[0], torch.tensor([0]))
    stepped = engine_for(b).step(batch, step_seed(4, 0))
    assert torch.equal(terms, torch.stack(tuple(stepped)))
    assert same_parameters(a, b)


def test_terms_are_means_over_the_minibatch_and_a_ragged_one_counts_in_full() -> None:
    model, x = small_model(), data(7)
    engine = engine_for(model, x, optimizer="sgd", lr=1e-12, batch_size=5, beta=2.0)
    terms = engine.run(2)
    rows = array_source(x, 5).rows(0, 2)
    for step, size in enumerate((5, 2)):
        batch = x[rows[step][:size]]
        wanted = model(batch, seed=step_seed(0, step), beta=2.0)
        for got, value in zip(terms[step], wanted, strict=True):
            torch.testing.assert_close(got, value.mean().detach())


def test_beta_changes_the_loss_and_what_is_learned() -> None:
    one, four = small_model(), small_model()
    first, second = engine_for(one).run(100), engine_for(four, beta=4.0).run(100)
    assert first[0, 0] != second[0, 0]
    assert second[-20:, 2].mean() < first[-20:, 2].mean()


@pytest.mark.parametrize("name", ["reference", "modules"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_weight_prior_adds_its_log_density_over_n_to_the_objective(name: str, likelihood: str) -> None:
    """N is the number of datapoints, 50, not that of the minibatch, 20; biases have no prior."""
    how: dict[str, Any] = {"likelihood": likelihood, "init": "torch", "seed": 0}
    if likelihood == "gaussian":
        how["mean_activation"] = "sigmoid"
    with_prior, by_hand = (VAE(12, [8], 2, **how) for _ in range(2))
    engine_for(with_prior, name=name, optimizer="sgd", lr=0.5, weight_prior=True, batch_size=20).run(1)

    rows = torch.from_numpy(array_source(data(), 20).rows(0, 1))[0]
    bound = by_hand(data()[rows], seed=step_seed(0, 0)).elbo.mean()
    weights = [p for name, p in by_hand.named_parameters() if name.endswith("weight")]
    log_prior = sum(torch.distributions.Normal(0.0, 1.0).log_prob(w).sum() for w in weights)
    (bound + log_prior / 50).backward()  # type: ignore[no-untyped-call]
    for p, q in zip(with_prior.parameters(), by_hand.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.detach(), q.detach() + 0.5 * q.grad, rtol=1e-5, atol=1e-7)


# --- what a step may not do ---------------------------------------------------------------------------------


class NoLookingBack(TorchDispatchMode):
    """Fails on the operators by which a host waits for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), str(
            func
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("targets", ["real", "dynamic"])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_no_step_reads_a_value_back_to_the_host(optimizer: str, targets: str, estimator: str) -> None:
    model = small_model()
    made = make_optimizer(optimizer, model.parameters(), 0.01)
    source = array_source(data(), targets=targets)
    plan = Plan(
        estimator=estimator, num_samples=2, weight_prior=True, estimator_state=initial_state(estimator)
    )
    program = StepProgram(functional, model, made, source, plan, CPU)
    program.load(0, 3)
    program(20)  # torch's optimizers make their state in the first step
    with NoLookingBack():
        program(20)
        program(10)


def test_steps_leak_no_tensors() -> None:
    engine = engine_for(small_model())

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    engine.run(20)
    before = tensors()
    for _ in range(10):
        engine.run(20)
    assert tensors() <= before


# --- captures -----------------------------------------------------------------------------------------------


class Replays:
    """Stands in for CUDA graphs: "replaying" is calling again, and the calls are counted."""

    def __init__(self) -> None:
        self.recorded = self.warmed = self.replayed = 0

    def warm_up(self, body: Callable[[], None]) -> None:
        self.warmed += 1
        body()

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            body()

        return replay


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", ["sgvb_b", "score_function_running"])
def test_a_captured_engine_takes_every_step_once(optimizer: str, estimator: str) -> None:
    """50 rows in batches of 20: every third minibatch has 10."""
    a, b = small_model(), small_model()
    recorder = Replays()
    how: dict[str, Any] = {"optimizer": optimizer, "estimator": estimator}
    eager = engine_for(a, **how).run(60)
    captured = engine_for(b, **how, recorder=recorder).run(60)
    assert torch.equal(eager, captured)
    assert same_parameters(a, b)
    assert (recorder.recorded, recorder.warmed, recorder.replayed) == (2, 6, 54)


def test_captures_are_dropped_when_an_optimizer_loses_its_state() -> None:
    """The state from before the first step has no moments: those that a graph refers to are gone."""
    recorder, model = Replays(), small_model()
    engine = engine_for(model, optimizer="adam", recorder=recorder)
    before = engine.snapshot()
    first = engine.run(20)
    engine.restore(before)
    engine.next_step = 0
    assert torch.equal(engine.run(20), first)
    assert recorder.recorded == 4


def test_captures_stay_when_a_state_is_put_back_in_place() -> None:
    recorder, model = Replays(), small_model()
    engine = engine_for(model, optimizer="adam", recorder=recorder)
    engine.run(20)
    engine.restore(engine.snapshot())
    engine.run(20)
    assert recorder.recorded == 2


def test_only_a_few_sizes_of_a_stream_are_captured() -> None:
    model, recorder = small_model(), Replays()
    sizes = [s for s in range(1, 9) for _ in range(5)]
    generator = torch.Generator().manual_seed(0)
    source = StreamSource(
        iter([torch.rand(s, 12, generator=generator) for s in sizes]),
        likelihood="bernoulli",
        targets="real",
        pixel_scale=255,
        data_dim=12,
        device=CPU,
        first_step=0,
    )
    program = StepProgram(
        functional, model, make_optimizer("adam", model.parameters(), 0.01), source, Plan(), CPU
    )
    engine = AutogradEngine("modules", program, recorder)
    for _ in range(2):
        assert engine.run(20).isfinite().all()
    assert recorder.warmed + recorder.replayed == 40
    assert recorder.recorded <= 8


# --- states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_model, noisy_model])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("taken", [0, 12])
@pytest.mark.parametrize("estimator", ["sgvb_b", "score_function_running"])
def test_steps_from_a_restored_state_are_the_same_bit_for_bit(
    make: Callable[[], VAE], optimizer: str, taken: int, estimator: str
) -> None:
    model = make()
    engine = engine_for(model, optimizer=optimizer, estimator=estimator, lr=1e-3)
    if taken:
        engine.run(taken)
    state = engine.snapshot()
    first = engine.run(10)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    engine.restore(state)
    engine.next_step = taken
    assert torch.equal(engine.run(10), first)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_a_state_of_another_model_is_refused_by_the_name_of_what_differs() -> None:
    state = engine_for(VAE(data_dim=12, hidden_dims=[9], latent_dim=2)).snapshot()
    with pytest.raises(ValueError, match=r"encoder\.hidden\.0\.weight has shape \(9, 12\).*\(8, 12\)"):
        engine_for(small_model()).restore(state)


def test_finite_looks_at_parameters_and_optimizer_state() -> None:
    model = small_model()
    engine = engine_for(model, optimizer="adam")
    engine.run(2)
    assert engine.finite()
    optimizer = engine._program.optimizer
    moment = optimizer.state[next(model.parameters())]["exp_avg"]
    moment[0, 0] = torch.inf
    assert not engine.finite()
    moment[0, 0] = 0
    next(model.parameters()).data[0, 0] = torch.nan
    assert not engine.finite()


# --- choice -------------------------------------------------------------------------------------------------


def choose(name: str) -> tuple[Any, str]:
    model = small_model()
    optimizer = make_optimizer("adam", model.parameters(), 0.01)
    return make_engine(name, model, optimizer, array_source(data()), Plan(), CPU)


def test_auto_takes_native_and_says_why() -> None:
    engine, why = choose("auto")
    assert engine.name == "native"
    assert "fastest" in why


def test_modules_and_reference_have_no_fast_precision() -> None:
    with pytest.raises(ValueError, match="precision: got 'fast' with engine='modules', wanted 'exact'"):
        check_engine("modules", "fast")
    with pytest.raises(ValueError, match="precision: got 'half', wanted one of 'exact', 'fast'"):
        check_engine("auto", "half")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="engine: got 'turbo', wanted one of 'auto'"):
        choose("turbo")


# --- CUDA ---------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [small_model, noisy_model])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_graphs_on_a_gpu_take_the_steps_that_run_without_them(
    make: Callable[[], VAE], optimizer: str
) -> None:
    device = torch.device("cuda", 0)
    runs = []
    for recorder in (None, CudaGraphs(device)):
        model = make().to(device)
        torch.cuda.manual_seed(0)
        runs.append((engine_for(model, optimizer=optimizer, recorder=recorder, device=device).run(60), model))
    (eager, a), (captured, b) = runs
    if make is small_model:
        assert torch.equal(eager, captured)
        assert same_parameters(a, b)
    else:  # dropout's numbers within a graph are other ones
        assert captured.isfinite().all()
        assert (captured[-10:, 0].mean() - eager[-10:, 0].mean()).abs() < 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("targets", ["real", "dynamic"])
@pytest.mark.parametrize("name", ["modules", "native"])
def test_a_gpu_gives_the_curve_of_the_cpu(name: str, targets: str) -> None:
    curves = []
    for device in (CPU, torch.device("cuda", 0)):
        model = small_model().to(device)
        source = array_source(data(), 20, device, targets=targets)
        made = make_optimizer("adagrad", model.parameters(), 0.01)
        engine, why = make_engine(name, model, made, source, Plan(), device)
        assert engine.name == name and ("graph" in why) == (device.type == "cuda")
        curves.append(engine.run(200))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_optimizer_that_cannot_be_captured_runs_without_a_graph_and_that_is_said() -> None:
    device = torch.device("cuda", 0)
    model = small_model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), capturable=False)
    engine, why = make_engine("modules", model, optimizer, array_source(data(), 20, device), Plan(), device)
    assert "not capturable" in why
    assert engine.run(10).isfinite().all()
