"""Noise: the known answers of Philox, one sequence on every device and path, and the statistics of a
normal."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import vae_fast as vf
from vae_fast.reference import philox4x32


def test_philox_gives_the_known_answers_of_random123():
    # Random123's kat_vectors, philox 4x32 10: (counter, key) -> output. The counter's upper half and, in
    # these, every word is free; ours has the upper half zero, so the generator itself is checked through its
    # raw rounds.
    words = philox4x32(torch.tensor([0]), 0)
    assert [f"{int(w):08x}" for w in words[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def normals_of(words: list[int]) -> list[float]:
    out = []
    for radius_word, angle_word in (words[0:2], words[2:4]):
        radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
        signed = angle_word - 2**32 if angle_word >= 2**31 else angle_word
        out += [radius * math.cos(math.pi * signed / 2**31), radius * math.sin(math.pi * signed / 2**31)]
    return out


def test_the_operator_turns_the_known_answers_into_normals(device):
    exact = normals_of([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    ours = vf.philox_normal((4,), seed=0, dtype=torch.float64, device=device)
    assert ours.tolist() == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 63, 64, 65, 1023, 1025, 5001])
def test_every_length_and_seed_gives_the_sequence_of_the_oracle(count, seed, device):
    exact = vf.reference.philox_normal((count,), seed=seed, dtype=torch.float64)
    for dtype, tolerance in (
        (torch.float64, 1e-13),
        (torch.float32, 6e-7),
        (torch.bfloat16, 8e-3),
        (torch.float16, 1e-3),
    ):
        ours = vf.philox_normal((count,), seed=seed, dtype=dtype, device=device).cpu()
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=1e-12)


def test_float32_normals_are_within_four_units_in_the_last_place_of_exact(device):
    ours = vf.philox_normal((1 << 21,), seed=7, device=device).cpu().double()
    exact = vf.reference.philox_normal((1 << 21,), seed=7, dtype=torch.float64)
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 23)
    error = (ours - exact).abs() / ulp
    assert error.max() < 4.5 and error.mean() < 0.6


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64])
def test_numpys_integers_are_seeds(kind):
    for seed in (0, 7, 2**31 - 1):
        assert torch.equal(vf.philox_normal((9,), seed=kind(seed)), vf.philox_normal((9,), seed=seed))
        models = [vf.VAE(data_dim=5, hidden_dims=[3], latent_dim=2, seed=s) for s in (kind(seed), seed)]
        trainers = [vf.Trainer(model, seed=s) for model, s in zip(models, (kind(seed), seed), strict=True)]
        assert all(map(torch.equal, *(model.parameters() for model in models)))
        assert trainers[0].settings == trainers[1].settings


def test_a_longer_draw_begins_with_the_shorter_one_and_shape_does_not_matter(device):
    long = vf.philox_normal((3000,), seed=5, device=device)
    assert torch.equal(vf.philox_normal((37, 20), seed=5, device=device).flatten(), long[:740])
    assert torch.equal(vf.philox_normal((7,), seed=5, device=device), long[:7])


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 20), (3, 784), (2, 1500), (2, 3, 5)])
@pytest.mark.parametrize("num_samples", [None, 1, 3])
def test_reparameterize_uses_exactly_this_noise(shape, num_samples, device, dtype):
    mu, logvar = (
        torch.zeros(shape, dtype=dtype, device=device),
        torch.zeros(shape, dtype=dtype, device=device),
    )
    z = vf.reparameterize(mu, logvar, num_samples=num_samples, seed=11)
    full = shape if num_samples is None else (num_samples, *shape)
    assert torch.equal(z, vf.philox_normal(full, seed=11, device=device).to(dtype))
    assert torch.equal(z, vf.reparameterize_with_kl(mu, logvar, num_samples=num_samples, seed=11)[0])


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; run `python -m bench.gpu` where there is one"
)
def test_cpu_and_cuda_agree_to_two_units_in_the_last_place():
    cpu = vf.philox_normal((1 << 22,), seed=3)
    cuda = vf.philox_normal((1 << 22,), seed=3, device="cuda").cpu()
    ulp = torch.exp2(torch.floor(torch.log2(cpu.abs())) - 23)
    assert ((cpu - cuda).abs() / ulp).max() <= 2


@pytest.mark.parametrize("capability", ["plain", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_gives_the_same_noise(capability, tmp_path):
    code = (
        "import torch, sys, vae_fast as vf\n"
        "torch.save(vf.philox_normal((100_003,), seed=9), sys.argv[1])\n"
        "print(vf.build_info()['cpu_capability'])"
    )
    path = tmp_path / "eps.pt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "VAE_FAST_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    if "VAE_FAST_CPU_CAPABILITY: got" in done.stderr and capability != "plain":
        pytest.skip(f"this processor has no {capability}")
    assert done.stdout.strip() == capability, done.stderr
    theirs, ours = torch.load(path), vf.philox_normal((100_003,), seed=9)
    ulp = torch.exp2(torch.floor(torch.log2(ours.abs())) - 23)
    # without fused multiply-add, as on the plainest processors, each step of the transform rounds once more
    assert ((ours - theirs).abs() / ulp).max() <= (4 if capability == "plain" else 2)


P_VALUE = 1e-6  # seeds are fixed: a test that passes once always passes


def draws() -> torch.Tensor:
    return vf.philox_normal((1 << 21,), seed=2024, dtype=torch.float64)


def test_kolmogorov_smirnov():
    x = draws().sort().values
    n = x.numel()
    cdf = torch.special.ndtr(x)
    steps = torch.arange(n, dtype=torch.float64)
    d = max(float(((steps + 1) / n - cdf).max()), float((cdf - steps / n).max()))
    assert 2 * math.exp(-2 * n * d * d) > P_VALUE  # the asymptotic tail of the Kolmogorov distribution


def test_chi_square_of_equal_probability_bins():
    bins = 1024
    index = (torch.special.ndtr(draws()) * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins).double()
    expected = index.numel() / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    z = (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))
    assert abs(z) < 5  # p about 6e-7


def test_moments_to_the_fourth():
    x = draws()
    n = x.numel()
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(float((x**power).mean()) - mean) < 5 * math.sqrt(variance / n), f"moment {power}"


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 1024])
def test_elements_of_one_sequence_are_uncorrelated(lag):
    x = draws()
    assert abs(float((x[:-lag] * x[lag:]).mean())) < 5 / math.sqrt(x.numel())


def test_neighbouring_seeds_are_uncorrelated():
    n = 1 << 18
    rows = torch.stack([vf.philox_normal((n,), seed=s) for s in (0, 1, 2, 2**32, 2**32 + 1, 2**63)])
    correlation = (rows @ rows.T) / n
    off_diagonal = correlation - torch.diag(torch.diag(correlation))
    assert off_diagonal.abs().max() < 5 / math.sqrt(n)


def test_manual_seed_and_generator_decide_the_noise(device):
    mu = torch.zeros(4, 8, device=device)
    torch.manual_seed(1)
    first = vf.reparameterize(mu, mu)
    second = vf.reparameterize(mu, mu)
    torch.manual_seed(1)
    assert torch.equal(first, vf.reparameterize(mu, mu)) and not torch.equal(first, second)
    generator = torch.Generator(device).manual_seed(3)
    with_generator = vf.reparameterize(mu, mu, generator=generator)
    assert torch.equal(
        with_generator, vf.reparameterize(mu, mu, generator=torch.Generator(device).manual_seed(3))
    )


def test_seed_may_be_a_tensor_or_any_integer(device):
    mu = torch.zeros(4, 8, device=device)
    from_int = vf.reparameterize(mu, mu, seed=-5)
    assert torch.equal(from_int, vf.reparameterize(mu, mu, seed=torch.tensor([-5], device=device)))
    assert torch.equal(from_int, vf.reparameterize(mu, mu, seed=2**64 - 5))


class Draws(torch.utils.data.Dataset):
    """Each datapoint is a draw, large enough that the kernels would share it among threads."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        mu = torch.zeros(64, 1000)
        return vf.reparameterize(mu, mu)


def draws_of_workers(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(
        Draws(), batch_size=None, num_workers=2, generator=generator, multiprocessing_context="fork"
    )
    return list(loader)


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_workers_draw_different_noise_that_the_loaders_seed_decides():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Draws()[0]  # the parent has threads of its own when it forks
        first, again, other = (draws_of_workers(seed) for seed in (1, 1, 2))
    finally:
        torch.set_num_threads(threads)
    every = [*first, *other]
    assert not any(torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
