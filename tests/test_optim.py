"""Adagrad against its formula in float64, and optimizers by name."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from vae_fast import _C, optim
from vae_fast.optim import OPTIMIZERS, Adagrad, make_optimizer


def parameters(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3,), ()]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def gradients(step: int, params: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator).to(p) for p in params]


def take(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        for p, grad in zip(params, gradients(step, params), strict=True):
            p.grad = grad
        optimizer.step()


def test_adagrad_is_its_formula_with_eps_inside_the_root() -> None:
    params = parameters()
    by_hand = [p.detach().clone() for p in params]
    sums = [torch.zeros_like(w) for w in by_hand]
    take(Adagrad(params, lr=0.1, eps=0.5), params, range(6))
    for step in range(6):
        for w, total, g in zip(by_hand, sums, gradients(step, by_hand), strict=True):
            total += g * g
            w -= 0.1 * g / torch.sqrt(total + 0.5)
    for p, w in zip(params, by_hand, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-14, atol=0)


def test_accumulate_steps_leave_every_bit_of_the_parameters_but_count_in_the_sum() -> None:
    params = parameters(torch.float32)
    before = [p.detach().clone() for p in params]
    optimizer = Adagrad(params, lr=0.1, accumulate_steps=3)
    take(optimizer, params, range(3))
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    take(optimizer, params, range(3, 4))
    for i, (p, w) in enumerate(zip(params, before, strict=True)):
        total = sum(gradients(step, params)[i] ** 2 for step in range(4))
        wanted = w - 0.1 * gradients(3, params)[i] / torch.sqrt(total + 1e-8)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-7)


SHAPES = [(), (1,), (7,), (8,), (33, 5), (16,), (101, 257)]


def float32_steps(steps: int, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    optimizer = Adagrad(params, lr=0.1, **options)
    take(optimizer, params, range(steps))
    return [t.detach() for p in params for t in (p, optimizer.state[p]["sum"])]


@pytest.mark.parametrize("options", [{}, {"eps": 0.5}, {"accumulate_steps": 4}], ids=str)
def test_adagrad_in_one_pass_errs_no_more_than_twice_as_much_as_operations_on_whole_tensors(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = float32_steps(6, **options)
    assert optim._in_one_pass(found, 1e-8)
    monkeypatch.setattr(optim, "_in_one_pass", lambda *_: False)
    whole = float32_steps(6, **options)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).double().requires_grad_() for shape in SHAPES]
    optimizer = Adagrad(params, lr=0.1, **options)
    for step in range(6):
        for p, grad in zip(params, gradients(step, [p.detach().float() for p in params]), strict=True):
            p.grad = grad.double()
        optimizer.step()
    wanted = [t.detach() for p in params for t in (p, optimizer.state[p]["sum"])]
    for ours, theirs, exact in zip(found, whole, wanted, strict=True):
        error, bar = (ours - exact).abs().max(), (theirs - exact).abs().max()
        assert error <= max(2 * bar, 2e-7 * exact.abs().max())


def test_adagrad_in_one_pass_does_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = float32_steps(3)
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(alone, float32_steps(3), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_adagrad_takes_parameters_with_gaps_and_gradients_of_another_order() -> None:
    (found,), (wanted,) = [
        [torch.arange(24.0, dtype=dtype).reshape(4, 6).t().requires_grad_()]
        for dtype in (torch.float32, torch.float64)
    ]
    take(Adagrad([found], lr=0.1), [found], range(3))
    take(Adagrad([wanted], lr=0.1), [wanted], range(3))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6, check_stride=False)


def test_a_backward_pass_notices_that_adagrad_has_changed_its_parameters() -> None:
    w = torch.ones(3, requires_grad=True)
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    Adagrad([w], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_kernel_names_the_tensor_that_it_does_not_take() -> None:
    three = [torch.ones(3)]
    for grads, found in (
        ([torch.ones(4)], "grads[0]: got torch.FloatTensor [4]"),
        ([torch.ones(3).double()], "grads[0]: got torch.DoubleTensor"),
        ([], "0 grads"),
    ):
        with pytest.raises(ValueError, match=re.escape(found)):
            _C.adagrad_update(three, grads, three, torch.ones(()), lr=0.1, eps=1e-8, accumulate_steps=0)
    with pytest.raises(ValueError, match="step: got "):
        _C.adagrad_update(three, three, three, torch.ones(2), lr=0.1, eps=1e-8, accumulate_steps=0)


def test_adagrad_agrees_with_torch_where_eps_does_not_matter() -> None:
    ours, theirs = parameters(), parameters()
    take(Adagrad(ours, lr=0.1, eps=1e-30), ours, range(10))
    take(torch.optim.Adagrad(theirs, lr=0.1, eps=1e-30), theirs, range(10))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=0)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters()
    before = params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    Adagrad(params, lr=0.1).step()
    assert torch.equal(params[1].detach(), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit_from_its_state_dict(name: str) -> None:
    straight = parameters(torch.float32)
    take(make_optimizer(name, straight, 0.05), straight, range(120))

    halfway = parameters(torch.float32)
    first = make_optimizer(name, halfway, 0.05)
    take(first, halfway, range(60))
    saved = copy.deepcopy(first.state_dict())
    second = make_optimizer(name, halfway, 0.05)
    second.load_state_dict(saved)
    take(second, halfway, range(60, 120))
    assert all(torch.equal(p, q) for p, q in zip(straight, halfway, strict=True))


def test_an_adagrad_can_be_copied() -> None:
    params = parameters()
    optimizer = copy.deepcopy(Adagrad(params, lr=0.1))
    copied = optimizer.param_groups[0]["params"]
    take(optimizer, copied, range(2))
    assert not torch.equal(copied[0], params[0])


def test_the_default_adagrad_starts_with_the_papers_hundred_accumulating_steps() -> None:
    params = parameters()
    before = params[0].detach().clone()
    optimizer = make_optimizer("adagrad", params, 0.02)
    take(optimizer, params, range(100))
    assert torch.equal(params[0].detach(), before)
    take(optimizer, params, range(100, 101))
    assert not torch.equal(params[0].detach(), before)


def test_a_function_may_make_the_optimizer() -> None:
    optimizer = make_optimizer(lambda params: torch.optim.RMSprop(params, lr=1e-3), parameters(), 5.0)
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"eps": 0.0}, "eps: got 0.0"),
        ({"accumulate_steps": -1}, "accumulate_steps: got -1"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adagrad(parameters(), **options)  # type: ignore[arg-type]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"optimizer: got 'lion', wanted one of 'sgd', 'adagrad'"):
        make_optimizer("lion", parameters(), 0.1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_step_is_the_eager_step(name: str) -> None:
    eager, captured = parameters(torch.float32, "cuda"), parameters(torch.float32, "cuda")
    options = {"accumulate_steps": 4} if name == "adagrad" else {}
    take(make_optimizer(name, eager, 0.05, **options), eager, range(10))

    optimizer = make_optimizer(name, captured, 0.05, **options)
    take(optimizer, captured, range(3))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 10):
        for p, grad in zip(captured, gradients(step, captured), strict=True):
            assert p.grad is not None
            p.grad.copy_(grad)
        graph.replay()
    assert all(torch.equal(p, q) for p, q in zip(eager, captured, strict=True))
