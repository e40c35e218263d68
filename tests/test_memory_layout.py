"""Memory: where tensors may lie, what is read and what is written. Every operator, forward, backward and
double backward, gives the same bits for a tensor at any offset and in any order as for its plain copy, fills
its outputs to the last element and leaves its inputs alone."""

from __future__ import annotations

import pytest
import torch
from operators import CASES, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OFFSETS = range(17)  # elements: one more than the widest vector holds


@pytest.fixture(autouse=True)
def nan_in_new_memory(device):
    """Outputs hold NaN until the operator writes them, so an element left out shows."""
    torch.use_deterministic_algorithms(True)  # torch fills memory only then
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8, device=device).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs_of(case: Case, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [t.to(dtype).to(device) for t in case.inputs(shape, generator)]


def upstream_of(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device)
        for out in case.fused(*inputs)
    ]


def everything(case: Case, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients, and gradients of the gradients' sum of squares."""
    differentiable = len(inputs) - case.constants
    leaves = [t.detach().requires_grad_(i < differentiable) for i, t in enumerate(inputs)]
    outputs = case.fused(*leaves)
    grads = torch.autograd.grad(outputs, leaves[:differentiable], upstream, create_graph=True)
    second = torch.autograd.grad(
        [g.float().square().sum() for g in grads if g.requires_grad],
        leaves[:differentiable],
        allow_unused=True,
    )
    return [t.detach() for t in (*outputs, *grads, *second) if t is not None]


def at_offset(t: Tensor, offset: int) -> Tensor:
    """The same values, ``offset`` elements into memory that is NaN around them."""
    storage = t.new_full((offset + t.numel() + 16,), float("nan"))
    view = storage[offset : offset + t.numel()].view(t.shape)
    view.copy_(t)
    return view


def assert_same_bits(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert not b.isnan().any()
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_offset_of_a_misaligned_view(case, device, dtype):
    inputs = inputs_of(case, (3, 37), dtype, device)
    upstream = upstream_of(case, inputs)
    wanted = everything(case, inputs, upstream)
    for offset in OFFSETS:
        views = [at_offset(t, offset) for t in inputs]
        views[0] = at_offset(inputs[0], 16 - offset)  # not all misaligned alike
        got = everything(case, views, [at_offset(u, offset + 1) for u in upstream])
        assert_same_bits(got, wanted)


UPSTREAM = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else torch.stack((t, t), -1)[..., 0],
    "expanded from one value": lambda t: t.flatten()[:1].view([1] * t.dim()).expand(t.shape),
    "expanded over rows": lambda t: t[:1].expand(t.shape),
    "reversed by a gather": lambda t: t.flip(0),
}


@pytest.mark.parametrize("layout", UPSTREAM)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_memory_layout_of_upstream_gradients_does_not_matter(case, layout, device, dtype):
    inputs = inputs_of(case, (5, 37), dtype, device)
    strided = [UPSTREAM[layout](u) for u in upstream_of(case, inputs)]
    plain = [u.clone(memory_format=torch.contiguous_format) for u in strided]
    assert_same_bits(everything(case, inputs, strided), everything(case, inputs, plain))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inputs_are_never_written(case, device, dtype):
    inputs = inputs_of(case, (3, 37), dtype, device)
    upstream = upstream_of(case, inputs)
    read = inputs + upstream
    before = [(t.clone(), t._version) for t in read]
    everything(case, inputs, upstream)
    for t, (copy, version) in zip(read, before, strict=True):
        assert torch.equal(t.reshape(-1).view(torch.uint8), copy.reshape(-1).view(torch.uint8))
        assert t._version == version


class Backwards(TorchDispatchMode):
    """Records how many elements each backward operator gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name().startswith("vae_fast::") and func.name().endswith("_backward"):
            self.sizes.append([t.numel() for t in (result if isinstance(result, tuple) else (result,))])
        return result


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("case", [c for c in CASES if "bernoulli" not in c.name], ids=lambda case: case.name)
def test_only_needed_gradients_are_computed(case, wanted, device):
    inputs = inputs_of(case, (3, 37), torch.float32, device)
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    with Backwards() as backwards:
        sum(out.sum() for out in case.fused(*leaves)).backward()
    (sizes,) = backwards.sizes
    assert sizes[wanted] > 0 and sizes[1 - wanted] == 0
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(len(leaves))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_differentiated_where_nobody_asks(case, device):
    with Backwards() as backwards:
        outputs = case.fused(*inputs_of(case, (3, 37), torch.float32, device))
    assert not any(out.requires_grad for out in outputs) and backwards.sizes == []
