"""Minibatch order against its documented formula; streams; noise for dynamic pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from vae_fast.batches import MinibatchOrder, StreamSource, binarise, order_of, uniform_words
from vae_fast.datasets import DataError
from vae_fast.estimators import GOLDEN, ORDER, splitmix64, step_seed, step_seeds


def word(seed: int, k: int) -> int:
    return splitmix64(seed + (k + 1) * GOLDEN)


def stream_source(stream: object, data_dim: int | None = None, first_step: int = 0) -> StreamSource:
    return StreamSource(
        stream,  # type: ignore[arg-type]
        likelihood="bernoulli",
        targets="auto",
        pixel_scale=255,
        data_dim=data_dim,
        device=torch.device("cpu"),
        first_step=first_step,
    )


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (12, 4), (1, 1), (5, 100), (7, 1), (101, 100)])
def test_every_epoch_visits_every_row_once(count: int, batch_size: int) -> None:
    order = MinibatchOrder(count, batch_size, seed=3)
    for epoch in range(4):
        first = epoch * order.steps_per_epoch
        sizes = order.sizes(first, order.steps_per_epoch)
        rows = order.rows(first, order.steps_per_epoch)
        seen = np.concatenate([row[:size] for row, size in zip(rows, sizes, strict=True)])
        assert sorted(seen) == list(range(count))
        assert sizes.sum() == count


def test_the_shuffle_is_its_documented_formula() -> None:
    order = MinibatchOrder(23, 5, seed=-8)
    for epoch in range(3):
        s = step_seed(-8, epoch, ORDER)
        wanted = sorted(range(23), key=lambda r, s=s: (word(s, r), r))
        rows = order.rows(epoch * 5, 5).ravel()[:23]
        assert rows.tolist() == wanted


@pytest.mark.parametrize("seed", [0, -8, 2**63 - 1, 2**64 + 5])
def test_the_seeds_of_steps_are_their_documented_formula(seed: int) -> None:
    found = step_seeds(seed, 7, 3, ORDER, 16)
    for i, step in enumerate(range(7, 10)):
        for j, stream in enumerate((ORDER, 16)):
            wanted = splitmix64(seed + (step + 1) * GOLDEN + stream * 0xD1B54A32D192ED03)
            assert int(found[i, j]) % 2**64 == wanted
            assert step_seed(seed, step, stream) == found[i, j]


@pytest.mark.parametrize("bits", [64, 9, 3])  # few: equal keys, and keys that differ in their low bits alone
def test_rows_are_ordered_by_key_and_then_by_number(bits: int) -> None:
    for count in (0, 1, 2, 300):
        keys = np.random.default_rng(count).integers(0, 2**bits - 1, count, dtype=np.uint64, endpoint=True)
        assert order_of(keys).tolist() == sorted(range(count), key=lambda i, keys=keys: (keys[i], i))


def test_drawing_with_replacement_is_its_documented_formula() -> None:
    order = MinibatchOrder(1000, 7, seed=11, kind="replacement")
    rows = order.rows(40, 3)
    for i, step in enumerate(range(40, 43)):
        s = step_seed(11, step, ORDER)
        assert rows[i].tolist() == [(word(s, k) >> 32) * 1000 >> 32 for k in range(7)]


def test_drawing_with_replacement_reaches_every_row_alike() -> None:
    rows = MinibatchOrder(10, 100, seed=0, kind="replacement").rows(0, 1000)
    counts = np.bincount(rows.ravel(), minlength=10)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 40  # chi-square, 9 degrees of freedom: p < 1e-5


def test_drawing_with_replacement_fills_the_minibatch_from_fewer_rows() -> None:
    order = MinibatchOrder(3, 8, seed=0, kind="replacement")
    assert order.sizes(0, 4).tolist() == [8] * 4
    assert order.rows(0, 4).max() == 2


@pytest.mark.parametrize("kind", ["shuffle", "replacement"])
def test_the_rows_of_a_step_do_not_depend_on_what_was_asked_before(kind: str) -> None:
    together = MinibatchOrder(11, 4, seed=5, kind=kind).rows(0, 30)
    fresh = [MinibatchOrder(11, 4, seed=5, kind=kind).rows(step, 1)[0] for step in range(30)]
    assert np.array_equal(together, np.stack(fresh))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [
        MinibatchOrder(50, 50, seed).rows(epoch, 1)[0].tolist() for seed in range(5) for epoch in range(5)
    ]
    assert len(set(map(tuple, orders))) == 25


def test_uniform_words_are_the_documented_formula() -> None:
    for seed in (0, -1, 2**62):
        words = uniform_words((2, 3), torch.tensor([seed]))
        assert words.ravel().tolist() == [word(seed, i) >> 32 for i in range(6)]


def test_binarised_pixels_have_the_probabilities_asked_for_and_are_sure_of_0_and_1() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.5, 1.0]).expand(100_000, 4)
    x = binarise(probabilities, uniform_words(probabilities.shape, torch.tensor([3])))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    means = x.double().mean(0)
    assert means[0] == 0 and means[3] == 1
    assert abs(means[1] - 0.1) < 0.005 and abs(means[2] - 0.5) < 0.008


# --- streams ------------------------------------------------------------------------------------------------


def numbered(sizes: list[int]) -> Iterator[Tensor]:
    """Minibatches whose datapoints carry their number, over 100."""
    start = 0
    for size in sizes:
        yield torch.arange(start, start + size, dtype=torch.float32)[:, None].expand(size, 2) / 100
        start += size


def values_of(source: StreamSource, first_step: int, sizes: list[int]) -> list[list[int]]:
    rows = torch.from_numpy(source.rows(first_step, len(sizes)))
    seed = torch.tensor([0])
    batches = (source.batch(row[:size], seed)[:, 0] for row, size in zip(rows, sizes, strict=True))
    return [(batch * 100).round().int().tolist() for batch in batches]


def test_a_stream_gives_its_minibatches_in_their_order_and_sizes() -> None:
    source = stream_source(numbered([2, 3, 1, 4]))
    assert source.sizes(0, 3).tolist() == [2, 3, 1]
    assert values_of(source, 0, [2, 3, 1]) == [[0, 1], [2, 3, 4], [5]]
    assert source.sizes(3, 3).tolist() == [4]
    assert values_of(source, 3, [4]) == [[6, 7, 8, 9]]
    assert source.sizes(4, 3).tolist() == []


def test_steps_can_be_repeated_as_long_as_none_after_them_was_asked_for() -> None:
    source = stream_source(numbered([2, 3, 1, 4]))
    source.sizes(0, 3)
    source.rows(0, 3)
    assert values_of(source, 1, [3]) == [[2, 3, 4]]
    assert values_of(source, 0, [2]) == [[0, 1]]


def test_nothing_is_taken_from_a_stream_before_it_is_needed() -> None:
    stream = numbered([5] * 10)
    source = stream_source(stream)
    assert source.sizes(0, 20, samples=12).tolist() == [5, 5, 5]
    assert next(stream)[0, 0] == pytest.approx(0.15)


def test_a_loader_begins_again_where_it_ends_and_its_labels_are_not_read() -> None:
    x, labels = torch.rand(5, 4), torch.arange(5)
    source = stream_source(DataLoader(TensorDataset(x, labels), batch_size=2))
    assert source.sizes(0, 7).tolist() == [2, 2, 1, 2, 2, 1, 2]


def test_an_empty_stream_has_no_minibatches() -> None:
    for stream in (iter([]), DataLoader([])):  # type: ignore[arg-type, var-annotated]
        assert stream_source(stream).sizes(0, 3).tolist() == []


def test_a_growing_minibatch_moves_the_buffer_and_says_so() -> None:
    source = stream_source(iter([torch.rand(size, 2) for size in [1] + [30] * 20]))
    source.sizes(0, 1)
    source.rows(0, 1)
    version = source.version
    source.sizes(1, 20)
    rows = source.rows(1, 20)
    assert source.version == version + 1
    assert rows.shape == (20, 30)


def test_the_first_minibatch_decides_how_all_are_read() -> None:
    source = stream_source(
        iter([torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([[0, 1]], dtype=torch.uint8)])
    )
    source.sizes(0, 2)
    rows = torch.from_numpy(source.rows(0, 2))
    assert source.kind == "real"
    assert source.batch(rows[1], torch.tensor([0]))[0].tolist() == [0.0, pytest.approx(1 / 255)]


def test_a_minibatch_of_another_width_is_refused() -> None:
    source = stream_source(iter([torch.rand(2, 4), torch.rand(2, 5)]))
    with pytest.raises(DataError, match="5"):
        source.sizes(0, 2)


def test_every_minibatch_is_checked() -> None:
    source = stream_source(iter([torch.rand(2, 4), torch.full((2, 4), float("nan"))]))
    with pytest.raises(DataError, match=r"(?i)nan"):
        source.sizes(0, 2)


def test_a_datapoint_of_a_stream_is_named_by_its_place() -> None:
    source = stream_source(numbered([2, 3, 4]))
    source.sizes(0, 1)
    source.sizes(1, 2)
    assert source.datapoint(2, 1) == "datapoint 6 of this stream"
