"""The last linear layer fused with the Bernoulli log-likelihood: the same numbers as the two one after the
other, by either way to its gradients, in a fraction of the memory."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import vae_fast as vf

sys.path.append(str(Path(__file__).resolve().parent.parent))  # at the end: the installed vae_fast stays first

from bench.timing import peak_memory

ops = torch.ops.vae_fast
fused, plain = vf.linear_bernoulli_log_likelihood, vf.reference.linear_bernoulli_log_likelihood

# rows, hidden, outputs: one tile, several of them both ways with a rest, rows only, columns only, one element
SHAPES = [(6, 5, 37), (700, 20, 1100), (1500, 7, 100), (3, 33, 90001), (1, 1, 1)]


def layer(rows, hidden, outputs, dtype=torch.float64, device="cpu", seed=0):
    """h, weight, bias and soft targets, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (*((rows,) if isinstance(rows, int) else rows), hidden),
        (outputs, hidden),
        (outputs,),
    )
    h, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    x = torch.rand((*shapes[0][:-1], outputs), generator=generator, dtype=torch.float64)
    return [t.to(dtype).to(device) for t in (h, 4 * weight / hidden**0.5, bias, x)]


def value_and_grads(function, h, weight, bias, x, upstream=None, reduction="none"):
    """The value, and the gradients of <upstream, value> in h, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (h, weight, bias) if t is not None]
    out = function(*leaves, *([None] if bias is None else []), x, reduction=reduction)
    upstream = torch.ones_like(out) if upstream is None else upstream.to(out.dtype).to(out.device)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(shape, reduction, dtype, device):
    inputs = layer(*shape, dtype, device)
    upstream = torch.randn(shape[0] if reduction == "none" else (), dtype=dtype).double()
    exact = value_and_grads(plain, *(t.double() for t in inputs), upstream, reduction)
    ours = value_and_grads(fused, *inputs, upstream, reduction)
    theirs = value_and_grads(plain, *inputs, upstream, reduction)
    for right, a, b in zip(exact, ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == right.shape
        error, plain_error = (a.double() - right).abs(), (b.double() - right).abs()
        allowance = 3 * torch.finfo(a.dtype).eps * right.abs().max()  # a few roundings of the largest
        assert error.max() <= 2 * plain_error.max() + allowance
        assert error.norm() <= 2 * plain_error.norm() + allowance


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_derivatives_with_samples_in_front(with_bias, reduction, device):
    h, weight, bias, _ = layer((3, 2, 4), 5, 6, device=device)
    x = torch.rand(4, 6, dtype=torch.float64, device=device)
    inputs = [t.requires_grad_() for t in (h, weight, *([bias] if with_bias else []), x)]

    def function(h, weight, *rest):
        return fused(h, weight, rest[0] if with_bias else None, rest[-1], reduction=reduction)

    assert gradcheck(function, inputs)
    expected = plain(h, weight, bias if with_bias else None, x, reduction=reduction)
    torch.testing.assert_close(function(*inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_samples_meet_their_datapoint_in_every_tile(reduction, device):
    h, weight, bias, _ = layer((30, 50), 4, 700, device=device)  # more than one block of rows, none of 50
    x = torch.rand(50, 700, dtype=torch.float64, device=device)
    upstream = torch.randn((30, 50) if reduction == "none" else (), dtype=torch.float64)
    ours = value_and_grads(fused, h, weight, bias, x, upstream, reduction)
    theirs = value_and_grads(plain, h, weight, bias, x, upstream, reduction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


TARGETS = {
    "uint8": lambda x: x.round().byte(),
    "bool": lambda x: x > 0.5,
    "float32": lambda x: x.float(),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "transposed": lambda x: x.float().t().contiguous().t(),
    "transposed bytes": lambda x: x.round().byte().t().contiguous().t(),
    "every second column": lambda x: torch.stack((x, -x), -1).flatten(-2)[:, ::2],
    "columns of a wider one": lambda x: torch.cat((x, x), -1)[:, 3 : 3 + x.shape[1]],
    "one row for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_targets_of_every_type_and_layout(target, h_dtype, device):
    h, weight, bias, x = layer(300, 4, 1500, h_dtype, device)
    x = TARGETS[target](x)
    wide = x.double().contiguous()
    exact = value_and_grads(plain, h.double(), weight.double(), bias.double(), wide)
    half = h_dtype == torch.bfloat16
    for reduction in ("none", "sum"):
        ours = value_and_grads(fused, h, weight, bias, x, reduction=reduction)
        for a, b in zip(ours, exact, strict=True):
            b = b.sum() if reduction == "sum" and b is exact[0] else b
            scale = float(b.abs().max())
            torch.testing.assert_close(
                a.double(), b, rtol=2e-2 if half else 1e-5, atol=(1e-2 if half else 1e-6) * scale
            )


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_memory_layout_of_the_layer_does_not_matter(reduction, device, dtype):
    h, weight, bias, x = layer(600, 24, 600, dtype, device)
    upstream = torch.randn(600 if reduction == "none" else ())
    straight = value_and_grads(fused, h, weight, bias, x, upstream, reduction)
    strided = (h.t().contiguous().t(), weight.t().contiguous().t(), torch.stack((bias, bias), -1)[:, 0])
    for a, b in zip(value_and_grads(fused, *strided, x, upstream, reduction), straight, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-3)
    expanded = torch.ones((), device=device).expand(straight[0].shape)
    for a, b in zip(
        value_and_grads(fused, h, weight, bias, x, expanded, reduction),
        value_and_grads(fused, h, weight, bias, x, expanded.contiguous(), reduction),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 4, 5), (4, 0, 5), (4, 3, 0), (0, 0, 0)], ids=str)
def test_empty_batches_layers_and_outputs(shape, reduction, device):
    inputs = layer(*shape, torch.float32, device)
    for a, b in zip(
        value_and_grads(fused, *inputs, None, reduction),
        value_and_grads(plain, *inputs, None, reduction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, equal_nan=True)  # the mean over no datapoints is NaN


def test_one_datapoint_without_a_batch(device):
    h, weight, bias, x = layer((), 5, 9, device=device)
    assert fused(h, weight, bias, x).shape == ()
    torch.testing.assert_close(fused(h, weight, bias, x), plain(h, weight, bias, x))
    torch.testing.assert_close(
        fused(h, weight, bias, x, reduction="mean"), plain(h, weight, bias, x, reduction="mean")
    )


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_extreme_logits_give_finite_values_and_exact_gradients(reduction, device):
    h = torch.tensor([[1e4], [-1e4], [1.0]], device=device)
    weight, x = (
        torch.tensor([[1.0], [-1.0], [0.01]], device=device),
        torch.tensor([1.0, 0.0, 1.0], device=device),
    )
    upstream = torch.ones(3 if reduction == "none" else ())
    value, grad_h, grad_weight, grad_bias = value_and_grads(
        fused, h, weight, torch.zeros(3, device=device), x.expand(3, 3), upstream, reduction
    )
    wide = value_and_grads(
        plain,
        h.double(),
        weight.double(),
        torch.zeros(3, device=device).double(),
        x.expand(3, 3),
        upstream,
        reduction,
    )
    for a, b in zip((value, grad_h, grad_weight, grad_bias), wide, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-30)


def test_nan_stays_in_its_row(device):
    h, weight, bias, x = layer(5, 4, 600, torch.float32, device)
    h[2, 1] = float("nan")
    assert fused(h, weight, bias, x).isnan().tolist() == [False, False, True, False, False]


class Calls(TorchDispatchMode):
    """The operators of vae_fast that are called, and what they were asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vae_fast":
            needs = args[-1] if function._schema.arguments[-1].name == "needs" else None
            self.seen.append((function._schema.name.rpartition("likelihood_")[2], needs))
        return function(*args, **(kwargs or {}))


def test_no_gradient_is_computed_where_none_is_wanted(device):
    h, weight, bias, x = layer(4, 5, 6, device=device)
    with Calls() as calls:
        fused(h, weight, bias, x, reduction="sum")
        with torch.no_grad():
            fused(h.requires_grad_(), weight, bias, x, reduction="sum")
        with torch.inference_mode():
            fused(h, weight, bias, x, reduction="sum")
    nothing = ("sum_and_grads", [False, False, False])
    assert calls.seen == [nothing, nothing, ("sum", None)]


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_wanted_gradient_is_computed(wanted, device):
    inputs = layer(4, 5, 6, device=device)
    exact = value_and_grads(plain, *inputs)
    leaf = inputs[wanted].requires_grad_()
    needs = [i == wanted for i in range(3)]
    for reduction, expected in (
        ("none", [("forward", None), ("backward", needs)]),
        ("sum", [("sum_and_grads", needs)]),
    ):
        with Calls() as calls:
            (grad,) = torch.autograd.grad(fused(*inputs, reduction=reduction).sum(), leaf)
        assert calls.seen == expected
        torch.testing.assert_close(grad, exact[1 + wanted])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_backward_twice_over_the_same_graph(reduction, device):
    h, weight, bias, x = layer(40, 5, 600, torch.float32, device)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    loss = fused(*leaves, x, reduction=reduction).sum()
    first = [g.clone() for g in torch.autograd.grad(3 * loss, leaves, retain_graph=True)]
    for a, b in zip(torch.autograd.grad(3 * loss, leaves), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_second_derivatives_are_a_clear_error(reduction, device):
    h, weight, bias, x = layer(4, 5, 6, device=device)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    (grad,) = torch.autograd.grad(fused(*leaves, x, reduction=reduction).sum(), weight, create_graph=True)
    for leaf in leaves:
        with pytest.raises(
            NotImplementedError, match=r"second derivatives .* bernoulli_log_likelihood\(F.linear"
        ):
            torch.autograd.grad(grad.sum(), leaf, retain_graph=True)


def test_results_are_bit_identical_from_run_to_run(device, dtype):
    inputs = layer(700, 20, 1100, dtype, device)
    for reduction in ("none", "sum"):
        once, again = (value_and_grads(fused, *inputs, None, reduction) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend, dynamic", [("aot_eager", None), ("aot_eager", True), ("inductor", None)])
def test_compiles_into_one_graph_and_gives_the_same_gradients(backend, dynamic, reduction, device):
    torch._dynamo.reset()

    def loss(h, weight, bias, x):
        return (fused(h.tanh(), weight, bias, x, reduction=reduction) * 0.5).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (8, 12) if dynamic else (8,):
        *leaves, x = layer(rows, 5, 9, device=device)
        leaves = [t.requires_grad_() for t in leaves]
        ours, eager = compiled(*leaves, x), loss(*leaves, x)
        torch.testing.assert_close(ours, eager)
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_a_linear_layer(low, reduction, device):
    h, weight, bias, x = layer(6, 5, 37, torch.float32, device)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    with torch.autocast(device.type, dtype=low):
        out = fused(*leaves, x, reduction=reduction)
    cast = fused(*(t.to(low) for t in leaves), x, reduction=reduction)
    assert out.dtype == torch.float32 and torch.equal(out, cast)
    ours, theirs = (torch.autograd.grad(o.sum(), leaves) for o in (out, cast))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_the_logits_are_never_stored(reduction):
    rows, hidden, outputs = 2000, 8, 4000
    h, weight, bias, x = layer(rows, hidden, outputs, torch.float32)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    logits = 4 * rows * outputs

    def peak(function):
        return peak_memory(
            lambda: torch.autograd.grad(function(*leaves, x, reduction=reduction).sum(), leaves),
            torch.device("cpu"),
        )

    assert peak(plain) > 1.9 * logits  # so the measure works
    assert peak(fused) < 0.1 * logits


def test_the_module_is_a_linear_layer_with_its_loss(device):
    torch.manual_seed(0)
    layer_ = torch.nn.Linear(5, 9).to(device)
    module = vf.LinearBernoulliNLL(5, 9).to(device)
    module.load_state_dict(layer_.state_dict())
    h, x = torch.randn(4, 5, device=device), torch.rand(4, 9, device=device)
    expected = vf.BernoulliNLL()(layer_(h), x)
    torch.testing.assert_close(module(h, x), expected)
    grads = torch.autograd.grad(module(h, x), list(module.parameters()))
    for a, b in zip(grads, torch.autograd.grad(expected, list(layer_.parameters())), strict=True):
        torch.testing.assert_close(a, b)
    unbiased = vf.LinearBernoulliNLL(5, 9, bias=False, reduction="none").to(device)
    torch.testing.assert_close(unbiased(h, x), -vf.bernoulli_log_likelihood(h @ unbiased.weight.t(), x))


h4, w64, b6, x6 = torch.zeros(2, 4), torch.zeros(6, 4), torch.zeros(6), torch.zeros(2, 6)
REFUSALS = {
    "h's dtype": (lambda f: f(h4.int(), w64, b6, x6), TypeError, "h: got dtype Int, wanted float32"),
    "h's dimensions": (lambda f: f(h4[0, 0], w64, b6, x6), ValueError, r"h: .* wanted \[..., H\]"),
    "weight's shape": (
        lambda f: f(h4, w64.t(), b6, x6),
        ValueError,
        r"weight: got shape \[4, 6\], wanted \[D, 4\]",
    ),
    "weight's dtype": (
        lambda f: f(h4, w64.double(), b6, x6),
        TypeError,
        "weight: got dtype Double, wanted Float, the dtype of h",
    ),
    "weight's device": (
        lambda f: f(h4, w64.to("meta"), b6, x6),
        ValueError,
        "weight: got device meta, wanted cpu, where h is",
    ),
    "bias's shape": (lambda f: f(h4, w64, b6[:5], x6), ValueError, r"bias: got shape \[5\], wanted \[6\]"),
    "bias's dtype": (lambda f: f(h4, w64, b6.half(), x6), TypeError, "bias: got dtype Half, wanted Float"),
    "bias's device": (lambda f: f(h4, w64, b6.to("meta"), x6), ValueError, "bias: got device meta"),
    "x's shape": (
        lambda f: f(h4, w64, b6, x6[:, :5]),
        ValueError,
        r"x: got shape \[2, 5\], wanted the last dimensions of the logits, whose shape is \[2, 6\]",
    ),
    "x's dtype": (lambda f: f(h4, w64, b6, x6.long()), TypeError, "x: got dtype Long, wanted float32"),
    "x's device": (lambda f: f(h4, w64, b6, x6.to("meta")), ValueError, "x: got device meta, wanted cpu"),
    "reduction": (lambda f: f(h4, w64, b6, x6, reduction="avg"), ValueError, "reduction: got 'avg'"),
}


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("what", REFUSALS)
def test_wrong_arguments_are_named_with_what_came_and_what_was_wanted(what, reduction):
    call, error, message = REFUSALS[what]
    with pytest.raises(error, match=message):
        call(partial(fused, reduction=reduction))
