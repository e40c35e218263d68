"""float64 is the judge: no operator errs by more than twice what plain PyTorch errs in the same dtype."""

from __future__ import annotations

import math
import random

import pytest
import torch
from operators import CASES, Case
from torch import Tensor

import vae_fast as vf


def run(
    function, inputs: list[Tensor], upstream: list[Tensor] | None, constants: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of <upstream, outputs> in the inputs that take one."""
    leaves = [t.clone().requires_grad_(i < len(inputs) - constants) for i, t in enumerate(inputs)]
    outputs = function(*leaves)
    if upstream is None:
        upstream = [torch.ones_like(out) for out in outputs]
    grads = torch.autograd.grad(
        outputs,
        [leaf for leaf in leaves if leaf.requires_grad],
        [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)],
    )
    return [out.detach() for out in outputs], list(grads)


def judged(
    case: Case, inputs: list[Tensor], dtype: torch.dtype, device: torch.device, generator: torch.Generator
):
    """For every output and gradient: (exact, ours, plain), from inputs that are exact in ``dtype``."""
    rounded = [t.to(dtype).to(device) for t in inputs]
    exact_inputs = [t.double() for t in rounded]
    shapes = [out.shape for out in case.plain(*exact_inputs)]
    upstream = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device).double() for s in shapes
    ]
    exact = [t for part in run(case.plain, exact_inputs, upstream, case.constants) for t in part]
    ours = [t for part in run(case.fused, rounded, upstream, case.constants) for t in part]
    plain = [t for part in run(case.plain, rounded, upstream, case.constants) for t in part]
    return list(zip(exact, ours, plain, strict=True))


def random_shape(rng: random.Random) -> tuple[int, ...]:
    width = rng.choice([1, 2, 3, 7, 8, 15, 16, 17, 20, 31, 33, 64, 100, 128, 255, 784, 1025, 3000])
    leading = rng.choice([(), (1,), (2,), (5,), (13,), (2, 3), (1, 4, 2)])
    return (*leading, width)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_is_at_most_twice_that_of_plain_pytorch_on_random_shapes(case, dtype, device):
    rng = random.Random(case.name + str(dtype))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    squares: dict[int, list[float]] = {}
    for _ in range(500 // len(CASES) + 1):
        shape = random_shape(rng)
        for place, (exact, ours, plain) in enumerate(
            judged(case, case.inputs(shape, generator), dtype, device, generator)
        ):
            assert ours.dtype == plain.dtype and ours.shape == exact.shape
            error, plain_error = (ours.double() - exact).abs(), (plain.double() - exact).abs()
            # One shape is a draw of luck for either side, and a row may hang on one large term: the few
            # roundings of that term are allowed for. (The gradient of one shared variance cancels over rows:
            # only its sum below is judged.)
            allowance = 3 * torch.finfo(ours.dtype).eps * exact.abs().max()
            if exact.dim() > 0 or "one variance" not in case.name:
                assert error.max() <= 2 * plain_error.max() + allowance, f"shape {shape}, place {place}"
            scale = exact.abs().max().clamp_min(1e-30) ** 2
            ours_sum, plain_sum = squares.setdefault(place, [0.0, 0.0])
            squares[place] = [
                ours_sum + float((error**2).mean() / scale),
                plain_sum + float((plain_error**2).mean() / scale),
            ]
    for place, (ours_sum, plain_sum) in squares.items():  # over all shapes no allowance is needed
        assert math.sqrt(ours_sum) <= 2 * math.sqrt(plain_sum), f"place {place}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64_agrees_with_the_oracle(case, device):
    generator = torch.Generator().manual_seed(1)
    inputs = [t.to(device) for t in case.inputs((6, 37), generator)]
    names = {"reparameterize": "reparameterize", "reparameterize_with_kl": "reparameterize_with_kl"}
    if case.name in names:  # here the oracle makes its own float64 noise
        plain = getattr(vf.reference, names[case.name])
        ours = case.fused(*inputs)
        from operators import SEED

        theirs = plain(*inputs, seed=SEED)
        theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    else:
        if "samples" in case.name and case.name.startswith("reparam"):
            pytest.skip("its noise is float32 in the table")
        ours, theirs = case.fused(*inputs), case.plain(*inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def gradients(function, inputs: list[Tensor], wanted: int) -> list[Tensor]:
    """Of the last output's sum in the first ``wanted`` inputs, in float64."""
    leaves = [t.clone().requires_grad_(i < wanted) for i, t in enumerate(inputs)]
    return [g.double() for g in torch.autograd.grad(function(*leaves).sum(), leaves[:wanted])]


def worse(ours: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The root mean square error over that of plain PyTorch."""
    errors = [(t.double() - exact).square().mean().sqrt() for t in (ours, plain)]
    return float(errors[0] / errors[1].clamp_min(1e-300))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48,), (512, 1)])
def test_a_variance_that_is_repeated_has_a_gradient_that_is_rounded_once(half, shape, device):
    """At its optimum, where the datapoints' own gradients cancel."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(512, 48, generator=generator)
    x /= x.square().mean(0 if len(shape) == 1 else 1, keepdim=True).sqrt()
    inputs = [torch.zeros(shape, dtype=half), torch.zeros(512, 48, dtype=half), x]
    inputs = [t.to(device) for t in inputs]

    def of(ops):
        return lambda logvar, mean, x: ops.gaussian_log_likelihood(mean, logvar, x)

    found = [gradients(of(ops), inputs, 2) for ops in (vf, vf.reference)]
    exact = gradients(of(vf.reference), [t.double() for t in inputs], 2)
    for ours, plain, true in zip(*found, exact, strict=True):
        assert worse(ours, plain, true) <= 2


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_float32_target_of_a_half_precision_mean_has_a_float32_gradient(half, device):
    generator = torch.Generator().manual_seed(6)
    x, mean, logvar = (torch.randn(4, 33, generator=generator).to(device) for _ in range(3))
    mean, logvar = (torch.stack((t, t / 2)).to(half) for t in (mean, logvar))

    def of(ops):
        return lambda x, mean, logvar: ops.gaussian_log_likelihood(mean, logvar, x).square()

    found = [gradients(of(ops), [x, mean, logvar], 1) for ops in (vf, vf.reference)]
    exact = gradients(of(vf.reference), [t.double() for t in (x, mean, logvar)], 1)
    assert worse(found[0][0], found[1][0], exact[0]) <= 2


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_gradient_in_the_target_of_a_half_precision_layer_survives_a_large_factor(reduction, device):
    generator = torch.Generator().manual_seed(7)
    h, weight, x = (torch.randn(n, k, generator=generator) for n, k in ((64, 16), (10, 16), (64, 10)))
    inputs = [x.sigmoid().to(device), h.half().to(device), weight.half().to(device)]

    def of(ops):
        return lambda x, h, weight: (
            65536 * ops.linear_bernoulli_log_likelihood(h, weight, None, x, reduction=reduction)
        )

    found = [gradients(of(ops), inputs, 1) for ops in (vf, vf.reference)]
    exact = gradients(of(vf.reference), [t.double() for t in inputs], 1)
    assert worse(found[0][0], found[1][0], exact[0]) <= 2


@pytest.mark.parametrize("width", [3000, 200_000])
def test_in_float64_too_the_error_of_a_sum_does_not_grow_with_its_width(width, device):
    generator = torch.Generator().manual_seed(8)
    mu, logvar, x = (torch.randn(6, width, generator=generator, dtype=torch.float64) for _ in range(3))
    calls = {
        "gaussian_kl": (mu, logvar),
        "bernoulli_log_likelihood": (mu, x.sigmoid()),
        "gaussian_log_likelihood": (mu, logvar, x),
    }
    for name, inputs in calls.items():
        inputs = [t.to(device) for t in inputs]
        ours, plain = (getattr(ops, name)(*inputs).cpu() for ops in (vf, vf.reference))
        terms = getattr(vf.reference, name)(*(t.unsqueeze(-1) for t in inputs)).cpu()
        exact = torch.tensor([math.fsum(row) for row in terms.tolist()], dtype=torch.float64)
        error, theirs = (((t - exact) / exact).square().mean().sqrt() for t in (ours, plain))
        assert error <= 2 * theirs + 3e-16, name  # the terms themselves may be rounded otherwise


@pytest.mark.parametrize(
    ("value", "grad_of"), [(-80.0, "mean"), (-95.0, "mean"), (89.0, "mu"), (200.0, "mu")]
)
def test_a_slope_that_is_infinite_does_not_reach_a_direction_that_nobody_asked_for(value, grad_of, device):
    first = torch.zeros(3, 5, device=device, requires_grad=True)
    logvar = torch.full((3, 5), value, device=device, requires_grad=True)
    if grad_of == "mean":
        out = vf.gaussian_log_likelihood(first, logvar, torch.full((3, 5), 1e5, device=device))
        expected = -torch.exp(-logvar.detach().double())
    else:
        out, expected = vf.gaussian_kl(first, logvar), torch.ones(3, 5, dtype=torch.float64, device=device)
    (grad,) = torch.autograd.grad(out.sum(), first, create_graph=True)
    curvature, mixed = torch.autograd.grad(grad.sum(), (first, logvar))
    torch.testing.assert_close(curvature.double(), expected.float().double(), rtol=1e-6, atol=0)
    if grad_of == "mu":
        assert torch.equal(mixed, torch.zeros_like(mixed))


HARD_LOGITS = [
    0.0,
    -0.0,
    1e-40,
    -1e-40,
    1e-5,
    17.0,
    -17.0,
    40.0,
    -40.0,
    88.0,
    -88.0,
    100.0,
    -100.0,
    104.0,
    -150.0,
    1e4,
    -1e4,
]


@pytest.mark.parametrize("target", [0.0, 1.0, 0.25])
def test_bernoulli_is_finite_and_exact_at_extreme_logits(target, device):
    logits = torch.tensor(HARD_LOGITS, device=device).reshape(-1, 1).requires_grad_()
    x = torch.full_like(logits, target)
    out = vf.bernoulli_log_likelihood(logits, x)
    (grad,) = torch.autograd.grad(out.sum(), logits)
    wide = logits.detach().double().requires_grad_()
    tail = torch.exp(-wide.abs())
    exact = torch.where(wide > 0, (target - 1) * wide, target * wide).squeeze(1) - torch.log1p(tail).squeeze(
        1
    )
    exact_grad = torch.where(wide > 0, (target - 1) + tail / (1 + tail), target - tail / (1 + tail))
    assert torch.isfinite(out).all() and torch.isfinite(grad).all()
    torch.testing.assert_close(out.double(), exact, rtol=3e-7, atol=1e-45)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=5e-7, atol=3e-45)


def test_bernoulli_at_infinite_logits(device):
    inf = float("inf")
    logits = torch.tensor([[inf], [-inf], [inf], [-inf]], device=device, requires_grad=True)
    x = torch.tensor([[1.0], [0.0], [0.0], [1.0]], device=device)
    out = vf.bernoulli_log_likelihood(logits, x)
    assert out.tolist() == [0.0, 0.0, -inf, -inf]
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert grad.flatten().tolist() == [0.0, 0.0, -1.0, 1.0]


def test_infinite_logits_that_predict_right_cost_nothing_in_a_wide_row(device):
    generator = torch.Generator().manual_seed(7)
    logits, x = torch.randn(2, 500, generator=generator), torch.rand(2, 500, generator=generator)
    logits[0, 3], x[0, 3] = float("inf"), 1.0
    logits[0, 498], x[0, 498] = -float("inf"), 0.0
    others = torch.ones(500, dtype=torch.bool)
    others[[3, 498]] = False
    out = vf.bernoulli_log_likelihood(logits.to(device), x.to(device)).cpu().double()
    exact = vf.reference.bernoulli_log_likelihood(logits[:, others].double(), x[:, others].double())
    torch.testing.assert_close(out[0], exact[0], rtol=1e-6, atol=0)


def test_a_wide_row_of_undecided_logits_does_not_overflow(device):
    """exp(-|l|) is 1 there, so products of 1 + exp(-|l|) grow fastest."""
    out = vf.bernoulli_log_likelihood(
        torch.zeros(1, 20_000, device=device), torch.full((1, 20_000), 0.5, device=device)
    )
    torch.testing.assert_close(out.cpu().double(), torch.tensor([-20_000 * math.log(2)]).double())


def test_half_precision_logits_keep_their_gradient_where_sigmoid_then_bce_gives_nan(device):
    logits = torch.tensor([[9.0, 12.0, -12.0]], dtype=torch.float16, device=device, requires_grad=True)
    x = torch.tensor([[0.0, 1.0, 0.0]], device=device)
    (grad,) = torch.autograd.grad(vf.bernoulli_log_likelihood(logits, x).sum(), logits)
    exact = x.double() - torch.sigmoid(logits.detach().double())
    torch.testing.assert_close(grad.double(), exact, rtol=1e-3, atol=6e-8)


@pytest.mark.parametrize("value", [-80.0, -40.0, -1e-3, 0.0, 1e-6, 1e-3, 40.0, 80.0])
def test_gaussian_terms_at_extreme_log_variances(value, device):
    logvar = torch.full((1, 1), value, device=device, requires_grad=True)
    mu = torch.full((1, 1), 0.5, device=device, requires_grad=True)
    z, kl = vf.reparameterize_with_kl(mu, logvar, seed=3)
    wide_logvar = logvar.detach().double().requires_grad_()
    wide_mu = mu.detach().double().requires_grad_()
    eps = vf.philox_normal((1, 1), seed=3, device=device).double()
    exact_z = wide_mu + torch.exp(0.5 * wide_logvar) * eps
    exact_kl = 0.5 * (wide_mu**2 + torch.expm1(wide_logvar) - wide_logvar).sum(-1)
    torch.testing.assert_close(z.double(), exact_z, rtol=5e-7, atol=0)
    torch.testing.assert_close(kl.double(), exact_kl, rtol=5e-7, atol=0)
    ours = torch.autograd.grad((z.sum() + kl.sum()), (mu, logvar))
    exact = torch.autograd.grad((exact_z.sum() + exact_kl.sum()), (wide_mu, wide_logvar))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=5e-7, atol=1e-7 if abs(value) < 1 else 0)


def test_kl_keeps_its_digits_where_the_posterior_is_close_to_the_prior(device):
    logvar = torch.full((1, 64), 1e-4, device=device, requires_grad=True)
    kl = vf.gaussian_kl(torch.zeros_like(logvar), logvar)
    (grad,) = torch.autograd.grad(kl.sum(), logvar)
    exact = 0.5 * torch.expm1(logvar.detach().double())
    torch.testing.assert_close(grad.double(), exact, rtol=3e-7, atol=0)  # plain PyTorch errs by 1e-4 here


@pytest.mark.parametrize("value", [-80.0, -20.0, 0.0, 20.0, 80.0])
@pytest.mark.parametrize("residual", [0.0, 0.5, -3.0])
def test_gaussian_log_likelihood_at_extreme_log_variances(value, residual, device):
    logvar = torch.full((1, 1), value, device=device, requires_grad=True)
    mean = torch.full((1, 1), 0.25, device=device, requires_grad=True)
    x = mean.detach() + residual
    out = vf.gaussian_log_likelihood(mean, logvar, x)
    wide = [t.detach().double().requires_grad_() for t in (mean, logvar)]
    exact = vf.reference.gaussian_log_likelihood(*wide, x.double())
    torch.testing.assert_close(out.double(), exact, rtol=5e-7, atol=0)
    for a, b in zip(
        torch.autograd.grad(out.sum(), (mean, logvar)), torch.autograd.grad(exact.sum(), wide), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=5e-7, atol=0)


INF = float("inf")


def test_infinite_arguments_are_finite_where_mathematics_is_and_never_a_gain(device):
    def one(value):
        return torch.full((1, 1), value, device=device, requires_grad=True)

    mu, certain = one(0.5), one(-INF)  # a variance of zero: the sample is the mean
    z, kl = vf.reparameterize_with_kl(mu, certain, seed=3)
    assert z.item() == 0.5 and kl.item() == INF
    assert [g.item() for g in torch.autograd.grad(z.sum(), (mu, certain), retain_graph=True)] == [1.0, 0.0]
    assert [g.item() for g in torch.autograd.grad(kl.sum(), (mu, certain))] == [0.5, -0.5]
    for place in (INF, -INF):
        assert vf.gaussian_kl(one(place), one(0.0)).item() == INF
        assert vf.gaussian_log_likelihood(one(place), one(0.0), one(0.0)).item() == -INF
    assert vf.gaussian_log_likelihood(one(0.0), one(INF), one(1.0)).item() == -INF
    for logvar in (
        1e3,
        1e30,
        3e38,
        INF,
    ):  # past the largest float; plain PyTorch gives inf, and NaN at inf itself
        assert not vf.gaussian_kl(one(0.0), one(logvar)).item() < INF


NAN = float("nan")
ROW = 2


def outside_the_row(t: Tensor) -> Tensor:
    """All of ``[..., 5, 33]`` or ``[..., 5]`` but row ROW."""
    rows = t if t.shape[-1] == 33 else t.unsqueeze(-1)
    return rows[..., [r for r in range(5) if r != ROW], :]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nan_and_infinities_stay_in_their_row_forward_and_backward(case, bad, device, dtype):
    generator = torch.Generator().manual_seed(4)
    inputs = [t.to(dtype).to(device) for t in case.inputs((5, 33), generator)]
    upstream = [torch.ones_like(out) for out in case.fused(*inputs)]
    outputs, grads = run(case.fused, inputs, upstream, case.constants)
    for place, t in enumerate(inputs):
        if t.dim() == 0:
            continue  # one variance is in every row
        worse = [other.clone() for other in inputs]
        worse[place][..., ROW, 7] = bad
        worse_outputs, worse_grads = run(case.fused, worse, upstream, case.constants)
        for before, after in zip(outputs + grads, worse_outputs + worse_grads, strict=True):
            if before.dim() > 0:  # the gradient of one variance sums over the rows
                assert torch.equal(outside_the_row(after), outside_the_row(before))
        if math.isnan(bad):  # nothing hides it, and nothing else is NaN
            plain_outputs, plain_grads = run(case.plain, worse, upstream, case.constants)
            for after, plain in zip(worse_outputs + worse_grads, plain_outputs + plain_grads, strict=True):
                assert torch.equal(after.isnan(), plain.isnan())
            assert all(out[..., ROW].isnan().any() for out in worse_outputs if out.shape[-1] != 33)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_denormals_are_right_with_and_without_flush_to_zero(case):
    """Denormal arguments, and logits and log-variances whose exponentials or reciprocals are denormal."""
    generator = torch.Generator().manual_seed(6)
    large = [60.0, 87.0, 88.0] if "gaussian_log" in case.name else [-88.0, -95.0, -103.0]
    hard = torch.tensor([1e-40, -1e-40, -3e-39, 1e-38, 0.0, -1.0, 17.0, *large])
    inputs = [
        hard[torch.randint(len(hard), t.shape, generator=generator)] for t in case.inputs((4, 33), generator)
    ]
    if "bernoulli" in case.name:
        inputs[1].clamp_(0, 1)
    outputs, grads = run(case.plain, [t.double() for t in inputs], None, case.constants)
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor does not flush denormals")
        try:
            ours, our_grads = run(case.fused, inputs, None, case.constants)
        finally:
            torch.set_flush_denormal(False)
        smallest = torch.finfo(torch.float32).tiny  # a row of 33 terms may each lose as much
        for got, exact in zip(ours + our_grads, outputs + grads, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=(40 if flush else 1) * smallest)


@pytest.mark.parametrize(
    "x_dtype", [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_targets_of_any_dtype_give_the_same_value(x_dtype, dtype, device):
    generator = torch.Generator().manual_seed(5)
    x = torch.rand((4, 50), generator=generator).round().to(device)
    logits = (3 * torch.randn((2, 4, 50), generator=generator)).to(dtype).to(device)
    logvar = torch.randn((2, 4, 50), generator=generator).to(dtype).to(device)
    assert torch.equal(
        vf.bernoulli_log_likelihood(logits, x.to(x_dtype)), vf.bernoulli_log_likelihood(logits, x)
    )
    assert torch.equal(
        vf.gaussian_log_likelihood(logits, logvar, x.to(x_dtype)),
        vf.gaussian_log_likelihood(logits, logvar, x),
    )
