"""What every operator promises beside its value: derivatives, registration, compilation, memory layout,
determinism."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy
import pytest
import torch
from operators import CASES
from torch.autograd import gradcheck, gradgradcheck

import vae_fast as vf

ops = torch.ops.vae_fast


def case_ids(case):
    return case.name


def doubles(case, shape=(3, 5), device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [t.to(device).requires_grad_() for t in case.inputs(shape, generator)]


@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_first_derivatives(case, device):
    assert gradcheck(case.fused, doubles(case, device=device))


@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_second_derivatives(case, device):
    assert gradgradcheck(case.fused, doubles(case, device=device))


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_derivatives_when_only_one_argument_wants_them(case, wanted, device):
    inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(doubles(case, device=device))]
    assert gradcheck(case.fused, inputs) and gradgradcheck(case.fused, inputs)


def test_third_derivatives_are_an_error(device):
    mu = torch.randn(2, 3, device=device, requires_grad=True)
    logvar = torch.randn(2, 3, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(vf.gaussian_kl(mu, logvar).sum(), logvar, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), logvar, create_graph=True)
    with pytest.raises(RuntimeError, match="gaussian_kl_double_backward is not implemented"):
        gg.sum().backward()


def samples(device):
    """Arguments of every registered operator."""

    def randn(*shape, grad=False):
        return torch.randn(shape, device=device, requires_grad=grad)

    seed = torch.tensor([5], device=device)
    mu, logvar = randn(4, 6, grad=True), randn(4, 6, grad=True)
    z3, logits, x = randn(3, 4, 6, grad=True), randn(2, 4, 6, grad=True), torch.rand(4, 6, device=device)
    loss, loss2 = randn(4, grad=True), randn(2, 4, grad=True)
    h, weight, bias = randn(2, 4, 5, grad=True), randn(6, 5, grad=True), randn(6, grad=True)
    given = [t.detach() for t in (h, weight, bias)]  # for operators without derivatives
    both = [True, True]
    v = randn(2, 4, 6)
    packed = vf.pack_bits(x.round())
    return [
        (ops.philox_normal, ([4, 6], seed, torch.float32)),
        (ops.reparameterize_forward, (mu, logvar, seed, None)),
        (ops.reparameterize_forward, (mu, logvar, seed, 3)),
        (ops.reparameterize_backward, (z3, logvar, seed, both)),
        (ops.reparameterize_backward, (z3, logvar, seed, [True, False])),
        (ops.reparameterize_double_backward, (randn(4, 6), randn(4, 6), randn(3, 4, 6), randn(4, 6), seed)),
        (ops.reparameterize_with_kl_forward, (mu, logvar, seed, 3)),
        (ops.reparameterize_with_kl_backward, (z3, loss, mu, logvar, seed, both)),
        (ops.reparameterize_with_kl_backward, (None, loss, mu, logvar, seed, both)),
        (ops.gaussian_kl_forward, (mu, logvar)),
        (ops.gaussian_kl_backward, (loss, mu, logvar, both)),
        (ops.gaussian_kl_double_backward, (randn(4, 6), randn(4, 6), randn(4), randn(4, 6), randn(4, 6))),
        (ops.bernoulli_log_likelihood_forward, (logits, x)),
        (ops.bernoulli_log_likelihood_forward, (logits, x.round().bool())),
        (ops.bernoulli_log_likelihood_forward, (logits, packed, True)),
        (ops.bernoulli_log_likelihood_backward, (loss2, logits, x)),
        (ops.bernoulli_log_likelihood_backward, (loss2, logits, packed, True)),
        (ops.bernoulli_log_likelihood_double_backward, (v, randn(2, 4), randn(2, 4, 6), x)),
        (ops.linear_bernoulli_log_likelihood_forward, (h, weight, bias, x)),
        (ops.linear_bernoulli_log_likelihood_forward, (h, weight, None, x.round().bool())),
        (ops.linear_bernoulli_log_likelihood_backward, (v[..., 0], *given, x, [True, False, True])),
        (ops.linear_bernoulli_log_likelihood_sum, (h, weight, bias, x)),
        (ops.linear_bernoulli_log_likelihood_sum, (h, weight, None, x)),
        (ops.linear_bernoulli_log_likelihood_sum_and_grads, (*given, x, [True, True, False])),
        (ops.bernoulli_log_likelihood_double_backward, (v, randn(2, 4), randn(2, 4, 6), packed, True)),
        (ops.gaussian_log_likelihood_forward, (logits, randn(2, 4, 6, grad=True), x)),
        (ops.gaussian_log_likelihood_forward, (logits, randn(grad=True), x)),
        (ops.gaussian_log_likelihood_backward, (loss2, logits, randn(2, 4, 6, grad=True), x, both)),
        (ops.gaussian_log_likelihood_backward, (loss2, logits, randn(grad=True), x, both)),
        (ops.gaussian_log_likelihood_double_backward, (v, v, randn(2, 4), randn(2, 4, 6), v, x)),
    ]


@pytest.mark.parametrize("index", range(30))
def test_opcheck(index, device):
    op, args = samples(device)[index]
    torch.library.opcheck(op.default, args)


def test_opcheck_covers_every_operator():
    names = {
        str(name).split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vae_fast::")
    }
    assert names == {op.default._schema.name.split("::")[1] for op, _ in samples("cpu")}


def step(mu, logvar, weight, x):
    z, kl = vf.reparameterize_with_kl(mu, logvar, seed=7)
    logits = z @ weight
    bound = vf.elbo(logits, x, mu, logvar, beta=0.5)
    gaussian = vf.gaussian_log_likelihood(logits, torch.zeros((), device=mu.device), x, reduction="sum")
    other = vf.reparameterize(mu, logvar, seed=8, num_samples=2)
    return (
        bound.elbo + kl.mean() + gaussian + other.square().sum() + vf.gaussian_kl(mu, logvar, reduction="sum")
    )


@pytest.mark.parametrize("backend, dynamic", [("aot_eager", None), ("aot_eager", True), ("inductor", None)])
def test_compiles_into_one_graph_and_gives_the_same_gradients(backend, dynamic, device):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (8, 12) if dynamic else (8,):
        torch.manual_seed(0)
        args = [torch.randn(s, device=device, requires_grad=True) for s in ((rows, 4), (rows, 4), (4, 10))]
        x = torch.rand(rows, 10, device=device)
        plain, ours = step(*args, x), compiled(*args, x)
        torch.testing.assert_close(ours, plain)
        for a, b in zip(torch.autograd.grad(ours, args), torch.autograd.grad(plain, args), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_draws_in_one_compiled_graph_are_different(backend, device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def two(mu, logvar):
        return vf.reparameterize(mu, logvar), vf.reparameterize(mu, logvar)

    mu = torch.zeros(16, 16, device=device)
    first, second = two(mu, mu)
    third, _ = two(mu, mu)
    assert not torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_exports(case):
    inputs = tuple(t.detach().float() for t in doubles(case))

    class Module(torch.nn.Module):
        def forward(self, *args):
            return case.fused(*args)

    exported = torch.export.export(Module(), inputs)
    for a, b in zip(exported.module()(*inputs), case.fused(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_functorch_transforms_give_the_right_value_or_refuse(case):
    inputs = [t.detach().float() for t in doubles(case)]
    stacked = [torch.stack([t, t]) for t in inputs]
    try:
        result = torch.vmap(case.fused)(*stacked)
    except RuntimeError as error:
        assert "functorch" in str(error) or "vmap" in str(error)
        return
    for a, b in zip(result, case.fused(*inputs), strict=True):
        torch.testing.assert_close(a[0], b)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast_losses_stay_float32_and_mixed_arguments_are_promoted(low, device):
    mu, logvar = torch.randn(4, 6, device=device).to(low), torch.randn(4, 6, device=device)
    x = torch.rand(4, 6, device=device)
    with torch.autocast(device.type, dtype=low):
        assert vf.gaussian_kl(mu, mu).dtype == torch.float32
        assert vf.bernoulli_log_likelihood(mu, x).dtype == torch.float32
        assert torch.equal(vf.gaussian_kl(mu, logvar), vf.gaussian_kl(mu.float(), logvar))
        assert torch.equal(
            vf.reparameterize(mu, logvar, seed=1), vf.reparameterize(mu.float(), logvar, seed=1)
        )
        assert torch.equal(
            vf.gaussian_log_likelihood(mu, logvar, x), vf.gaussian_log_likelihood(mu.float(), logvar, x)
        )


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_autocast_changes_no_operator_and_every_gradient_has_the_dtype_of_its_argument(case, low, device):
    dtypes = [low, torch.float32, torch.float32]  # what a network under autocast and a loss in float32 make
    inputs = [t.detach().to(d) for t, d in zip(doubles(case, device=device), dtypes, strict=False)]
    promoted = "bernoulli" not in case.name  # arguments that must agree, which float32 then is for both

    def gradients(convert):
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = case.fused(*[convert(t) for t in leaves])
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])]

    plain = gradients(lambda t: t.float() if promoted else t)
    with torch.autocast(device.type, dtype=low):
        under_autocast = gradients(lambda t: t)
    for a, b in zip(under_autocast, plain, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    outputs = len(under_autocast) - len(inputs)
    assert [g.dtype for g in under_autocast[outputs:]] == dtypes[: len(inputs)]


def test_vmap_over_a_draw_asks_whether_the_noise_is_one_or_many():
    def draw(mu):
        return vf.reparameterize(mu, mu)

    mu = torch.zeros(3, 50)
    with pytest.raises(RuntimeError, match="'same' or 'different' randomness"):
        torch.vmap(draw)(mu)
    same, different = (torch.vmap(draw, randomness=r)(mu) for r in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


def test_data_parallel_training_takes_the_step_of_a_single_process(tmp_path):
    """One process of a group of one: hooks on every parameter, gradients in shared buckets."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    # Python's reference must be the last: torch lets go of the GIL there alone, while it waits for threads
    # that want it (pytorch/pytorch#56297); else the test hangs now and then.
    group = torch.distributed.group.WORLD
    alone, parallel = (vf.VAE(12, [7], 3, seed=0) for _ in range(2))
    x = torch.rand(5, 12)

    def step(model):
        (-model(x, seed=1).elbo.mean()).backward()

    try:
        step(alone)
        step(torch.nn.parallel.DistributedDataParallel(parallel))
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
        del group
    for a, b in zip(alone.parameters(), parallel.parameters(), strict=True):
        assert b.grad.any() or not a.grad.any()
        assert torch.equal(a.grad, b.grad)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every second column": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2] if t.dim() else t,
    "one element off alignment": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "expanded from one row": lambda t: t[..., :1, :].expand(t.shape) if t.dim() > 1 else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_memory_layout_does_not_matter(case, layout, device, dtype):
    generator = torch.Generator().manual_seed(2)
    strided = [LAYOUTS[layout](t.to(dtype).to(device)) for t in case.inputs((6, 37), generator)]
    plain = [t.clone(memory_format=torch.contiguous_format) for t in strided]
    results = []
    for inputs in (strided, plain):
        leaves = [t.detach().requires_grad_(i < len(inputs) - case.constants) for i, t in enumerate(inputs)]
        outputs = case.fused(*leaves)
        upstream = [
            out.new_ones(()).expand(out.shape) for out in outputs
        ]  # stride 0, as .sum().backward() sends
        results.append(
            [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], upstream)]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0,), (1, 1), (2, 0, 3)])
@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_empty_batches_and_zero_features(case, shape, device):
    inputs = doubles(case, shape, device)
    exact = case.plain(*inputs)
    outputs = case.fused(*inputs)
    for ours, theirs in zip(outputs, exact, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), check_dtype=False, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(sum(out.sum() for out in outputs), inputs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_results_are_bit_identical_from_run_to_run(case, device):
    inputs = [t.float().detach().requires_grad_() for t in doubles(case, (64, 784), device)]

    def once():
        outputs = case.fused(*inputs)
        return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), inputs)]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_results_do_not_depend_on_the_number_of_threads(case):
    inputs = [t.float().detach().requires_grad_() for t in doubles(case, (64, 784))]
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            outputs = case.fused(*inputs)
            results.append([*outputs, *torch.autograd.grad(outputs, inputs, outputs)])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_reductions_are_over_datapoints_only(device):
    torch.manual_seed(0)
    mu, logvar, x = (
        torch.randn(7, 3, device=device),
        torch.randn(7, 3, device=device),
        torch.rand(7, 3, device=device),
    )
    for function, args in (
        (vf.gaussian_kl, (mu, logvar)),
        (vf.bernoulli_log_likelihood, (mu, x)),
        (vf.gaussian_log_likelihood, (mu, logvar, x)),
    ):
        rows = function(*args)
        assert rows.shape == (7,)
        torch.testing.assert_close(function(*args, reduction="mean"), rows.mean())
        torch.testing.assert_close(function(*args, reduction="sum"), rows.sum())


def test_elbo_averages_samples_and_weighs_the_divergence(device):
    torch.manual_seed(0)
    logits, x = torch.randn(5, 7, 9, device=device), torch.rand(7, 9, device=device)
    mu, logvar = torch.randn(7, 3, device=device), torch.randn(7, 3, device=device)
    bound = vf.elbo(logits, x, mu, logvar, beta=2.0, reduction="none")
    torch.testing.assert_close(bound.log_likelihood, vf.bernoulli_log_likelihood(logits, x).mean(0))
    torch.testing.assert_close(bound.elbo, bound.log_likelihood - 2 * vf.gaussian_kl(mu, logvar))
    assert vf.elbo(logits, x, mu, logvar).elbo != vf.elbo(logits, x, mu, logvar, beta=2.0).elbo


def test_a_variance_may_be_broadcast(device):
    torch.manual_seed(0)
    mean, x = torch.randn(4, 6, device=device), torch.rand(4, 6, device=device)
    per_feature = torch.randn(6, device=device, requires_grad=True)
    ours = vf.gaussian_log_likelihood(mean, per_feature, x)
    torch.testing.assert_close(ours, vf.reference.gaussian_log_likelihood(mean, per_feature, x))
    (grad,) = torch.autograd.grad(ours.sum(), per_feature)
    (exact,) = torch.autograd.grad(
        vf.reference.gaussian_log_likelihood(mean, per_feature, x).sum(), per_feature
    )
    torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("width", [1, 7, 8, 20, 37, 784, 1025])
def test_packed_targets_give_the_same_bits(width, dtype, device):
    generator = torch.Generator().manual_seed(6)
    x = (torch.rand((5, width), generator=generator) < 0.4).to(device)
    packed = vf.pack_bits(x)
    assert torch.equal(
        packed.cpu(), torch.from_numpy(numpy.packbits(x.cpu().numpy(), axis=-1, bitorder="little"))
    )
    if width % 8:
        packed[..., -1] |= 1 << 7  # an unused bit: ignored
    results = []
    for target, options in ((x, {}), (packed, {"packed": True})):
        generator.manual_seed(7)
        logits = (6 * torch.randn((3, 5, width), generator=generator)).to(dtype).to(device).requires_grad_()
        out = vf.bernoulli_log_likelihood(logits, target, **options)
        upstream = torch.randn(out.shape, generator=generator).to(device).requires_grad_()
        (first,) = torch.autograd.grad(out, logits, upstream, create_graph=True)
        weight = torch.randn(first.shape, generator=generator).to(dtype).to(device)
        results.append([out, first, *torch.autograd.grad(first, [logits, upstream], weight)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(
        results[1][0], vf.reference.bernoulli_log_likelihood(logits, packed, packed=True)
    )


def test_packed_targets_are_shared_among_threads_at_any_bit():
    generator = torch.Generator().manual_seed(8)
    x = torch.rand((37, 1001), generator=generator) < 0.5
    logits = torch.randn((37, 1001), generator=generator).requires_grad_()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        (packed,) = torch.autograd.grad(
            vf.bernoulli_log_likelihood(logits, vf.pack_bits(x), packed=True).sum(), logits
        )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(packed, torch.autograd.grad(vf.bernoulli_log_likelihood(logits, x).sum(), logits)[0])


def test_packed_targets_in_double_precision_and_in_a_compiled_graph(device):
    torch._dynamo.reset()
    logits = torch.randn(4, 13, dtype=torch.float64, device=device, requires_grad=True)
    packed = vf.pack_bits(torch.rand(4, 13, device=device).round())

    def loss(t):
        return vf.bernoulli_log_likelihood(t, packed, packed=True)

    assert gradcheck(loss, [logits]) and gradgradcheck(loss, [logits])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(
        compiled(logits), vf.reference.bernoulli_log_likelihood(logits, packed, packed=True)
    )


z4, z5 = torch.zeros(2, 4), torch.zeros(2, 5)
bytes1, bytes2 = torch.zeros(2, 1, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
REFUSALS = {
    "packed target's width": (
        lambda: vf.bernoulli_log_likelihood(z4, bytes2, packed=True),
        ValueError,
        r"x: got shape \[2, 2\], wanted .* logits, whose shape is \[2, 4\], with ceil\(D / 8\) bytes",
    ),
    "packed target's rows": (
        lambda: vf.bernoulli_log_likelihood(torch.zeros(3, 4), bytes1, packed=True),
        ValueError,
        r"x: got shape \[2, 1\]",
    ),
    "packed target larger than logits": (
        lambda: vf.bernoulli_log_likelihood(z4, bytes1[None], packed=True),
        ValueError,
        "x: got shape",
    ),
    "packed target's dtype": (
        lambda: vf.bernoulli_log_likelihood(z4, z4, packed=True),
        TypeError,
        "x: got dtype Float, wanted uint8 with packed=True",
    ),
    "values to pack": (
        lambda: vf.pack_bits(torch.tensor([0.0, 1.0, 0.5])),
        ValueError,
        "x: got the value 0.5, wanted 0 and 1",
    ),
    "NaN to pack": (lambda: vf.pack_bits(torch.tensor([float("nan")])), ValueError, "x: got the value nan"),
    "nothing to pack": (lambda: vf.pack_bits(torch.tensor(True)), ValueError, "x: .* wanted \\[..., D\\]"),
    "shapes of mu and logvar": (
        lambda: vf.gaussian_kl(z4, z5),
        ValueError,
        r"logvar: got shape \[2, 5\], wanted \[2, 4\]",
    ),
    "dtypes of mu and logvar": (
        lambda: vf.gaussian_kl(z4, z4.double()),
        TypeError,
        "logvar: got dtype Double, wanted Float",
    ),
    "integers": (lambda: vf.gaussian_kl(z4.int(), z4.int()), TypeError, "mu: got dtype Int, wanted float32"),
    "no features": (
        lambda: vf.gaussian_kl(torch.zeros(()), torch.zeros(())),
        ValueError,
        "mu: .* wanted \\[..., D\\]",
    ),
    "device": (lambda: vf.gaussian_kl(z4, z4.to("meta")), ValueError, "logvar: got device meta, wanted cpu"),
    "target's shape": (
        lambda: vf.bernoulli_log_likelihood(z4, z5),
        ValueError,
        r"x: got shape \[2, 5\], wanted the last",
    ),
    "target's dtype": (
        lambda: vf.bernoulli_log_likelihood(z4, z4.long()),
        TypeError,
        "x: got dtype Long, wanted",
    ),
    "target larger than logits": (
        lambda: vf.bernoulli_log_likelihood(z4, z4[None]),
        ValueError,
        "x: got shape",
    ),
    "variance's shape": (
        lambda: vf.gaussian_log_likelihood(z4, z5, z4),
        ValueError,
        r"logvar: got shape \(2, 5\)",
    ),
    "samples": (lambda: vf.reparameterize(z4, z4, num_samples=0), ValueError, "num_samples: got 0"),
    "seed's dtype": (
        lambda: vf.reparameterize(z4, z4, seed=torch.zeros(1)),
        TypeError,
        "seed: got dtype Float",
    ),
    "seed's size": (
        lambda: vf.reparameterize(z4, z4, seed=torch.zeros(2).long()),
        ValueError,
        "seed: got shape",
    ),
    "reduction": (lambda: vf.gaussian_kl(z4, z4, reduction="avg"), ValueError, "reduction: got 'avg'"),
    "datapoints of the bound": (
        lambda: vf.elbo(z4, z4, torch.zeros(3, 2), torch.zeros(3, 2)),
        ValueError,
        "mu: got shape",
    ),
    "noise beside its seed": (
        lambda: vf.philox_normal((3,), seed=torch.zeros(1).long(), device="meta"),
        ValueError,
        "seed: got device cpu, wanted meta",
    ),
    "a seed that is no integer": (lambda: vf.reparameterize(z4, z4, seed=1.0), TypeError, "seed: got 1.0"),
    "such a seed of a model": (
        lambda: vf.VAE(data_dim=3, latent_dim=2, seed=1.5),
        TypeError,
        "seed: got 1.5, wanted an integer",
    ),
    "such a seed of a training": (
        lambda: vf.Trainer(vf.VAE(data_dim=3, latent_dim=2), seed=1.5),
        TypeError,
        "seed: got 1.5, wanted an integer",
    ),
    "noise of integers": (
        lambda: vf.philox_normal((3,), seed=1, dtype=torch.int32),
        TypeError,
        "dtype: got dtype Int",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_wrong_arguments_are_named_with_what_came_and_what_was_wanted(what):
    call, error, message = REFUSALS[what]
    with pytest.raises(error, match=message):
        call()


def test_an_unknown_instruction_set_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import vae_fast; vae_fast.build_info()"],
        env={**os.environ, "VAE_FAST_CPU_CAPABILITY": "sse9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and 'VAE_FAST_CPU_CAPABILITY: got "sse9", wanted' in done.stderr


@pytest.mark.parametrize("logvar", [87.0, 87.6, 88.5])
def test_a_variance_near_the_largest_float_keeps_the_quadratic_term(
    logvar: float, device: torch.device
) -> None:
    x = torch.full((2, 5), 1e20, device=device)
    mean, logvars = torch.zeros_like(x), torch.full_like(x, logvar)
    found = vf.gaussian_log_likelihood(mean, logvars, x, reduction="none")
    exact = vf.reference.gaussian_log_likelihood(mean.double(), logvars.double(), x.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; run `python -m bench.gpu` where there is one"
)
class TestCuda:
    def test_each_replay_of_a_graph_draws_new_noise(self):
        mu = torch.zeros(8, 20, device="cuda")
        vf.reparameterize(mu, mu)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = vf.reparameterize(mu, mu)
        draws = []
        for _ in range(3):
            graph.replay()
            draws.append(z.clone())
        assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])

    def test_runs_on_the_current_stream(self):
        stream = torch.cuda.Stream()
        a = torch.zeros(4096, 784, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            a.fill_(1.0)
            kl = vf.gaussian_kl(a, a)
        stream.synchronize()
        torch.testing.assert_close(kl, vf.gaussian_kl(a, a))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_runs_on_a_second_gpu(self):
        a = torch.randn(64, 20, device="cuda:1")
        torch.testing.assert_close(vf.gaussian_kl(a, a).cpu(), vf.gaussian_kl(a.cpu(), a.cpu()))

    def test_compiles_with_cuda_graphs(self):
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
        args = [torch.randn(s, device="cuda", requires_grad=True) for s in ((8, 4), (8, 4), (4, 10))]
        x = torch.rand(8, 10, device="cuda")
        for _ in range(4):
            torch.testing.assert_close(
                torch.autograd.grad(compiled(*args, x), args), torch.autograd.grad(step(*args, x), args)
            )

    def test_more_than_two_to_the_31_elements(self):
        rows, cols = 2**22 + 1, 520
        if torch.cuda.mem_get_info()[0] < 5 * rows * cols * 2:
            pytest.skip("needs 22 GB of free GPU memory")
        logits = torch.zeros(rows, cols, device="cuda", dtype=torch.bfloat16)
        logits[-1] = 2.0
        x = torch.ones(cols, device="cuda", dtype=torch.uint8)
        out = vf.bernoulli_log_likelihood(logits, x)
        tail = torch.full((1, cols), 2.0)
        torch.testing.assert_close(out[-1:].cpu(), vf.bernoulli_log_likelihood(tail, x.cpu()))
        torch.testing.assert_close(out[0].cpu(), vf.bernoulli_log_likelihood(tail * 0, x.cpu())[0])

    @pytest.mark.parametrize("cols", [4096 * 4, 4096 * 4 + 1, 2**20 + 3])  # one block, two segments, many
    def test_wide_rows_keep_their_sum_alone_on_a_side_stream_and_in_a_graph(self, cols):
        torch.manual_seed(0)
        logits, x = 6 * torch.randn(3, cols), torch.rand(3, cols)
        on_gpu, targets = logits.cuda(), x.cuda()
        out = vf.bernoulli_log_likelihood(on_gpu, targets)
        exact = vf.reference.bernoulli_log_likelihood(logits.double(), x.double())
        torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-6, atol=0)
        assert torch.equal(out[:1], vf.bernoulli_log_likelihood(on_gpu[:1], targets[:1]))

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = vf.bernoulli_log_likelihood(on_gpu, targets)
        for _ in range(2):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, out)

        stream = torch.cuda.Stream()
        late = torch.zeros_like(on_gpu)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(on_gpu)
            on_stream = vf.bernoulli_log_likelihood(late, targets)
        stream.synchronize()
        assert torch.equal(on_stream, out)

    def test_one_row_of_more_than_two_to_the_31_elements_and_its_gradient(self):
        cols = 2**31 + 24
        if torch.cuda.mem_get_info()[0] < 6 * cols:
            pytest.skip("needs 13 GB of free GPU memory")
        logits = torch.full((1, cols), -200.0, device="cuda", dtype=torch.bfloat16)
        logits[0, -1] = 2.0
        x = torch.zeros((1, cols // 8), device="cuda", dtype=torch.uint8)
        exact = vf.bernoulli_log_likelihood(torch.tensor([[2.0]]), torch.zeros(1, 1))
        out = vf.bernoulli_log_likelihood(logits, x, packed=True)  # all other terms are zero
        torch.testing.assert_close(out.cpu(), exact)
        grad = torch.ops.vae_fast.bernoulli_log_likelihood_backward(torch.ones_like(out), logits, x, True)
        torch.testing.assert_close(
            grad[0, -1].float().cpu(), -torch.sigmoid(torch.tensor(2.0)), rtol=4e-3, atol=0
        )
        assert not grad[0, :-1].any()
