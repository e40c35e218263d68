"""Reading data, and refusing them in one sentence: file or argument, what was found, what was wanted."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vae_fast
from vae_fast import datasets
from vae_fast.datasets import (
    DataError,
    binarized_mnist,
    frey,
    frey_face,
    is_stream,
    load,
    mnist,
    prepare,
    split,
)

SHARED = Path(__file__).resolve().parents[1] / "../shared/data"
FREY = SHARED / "frey/freyface_1965x28x20_uint8.npz"
BINARIZED = SHARED / "binarized_mnist/mnist_binarized_larochelle_packed.npz"
BUNDLED = Path(vae_fast.__file__).parent / "data/mnist"


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"needs {path.name}, which is not bundled")


def images(count: int = 12, height: int = 4, width: int = 3) -> np.ndarray:
    """Pixels whose every value is another, as far as uint8 goes."""
    return (np.arange(count * height * width) * 7 % 256).astype(np.uint8).reshape(count, height, width)


def idx(array: np.ndarray, code: int = 0x08) -> bytes:
    big_endian = array.astype(array.dtype.newbyteorder(">"))
    return (
        bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + big_endian.tobytes()
    )


def refused(call: Callable[[], object], *words: str) -> str:
    """Calls what must be refused, and checks that the refusal is one sentence that holds these words."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+: found [^\n]+; wanted [^\n]+[^.\n]", message), message
    for word in words:
        assert word in message, message
    return message


def prepared(data: object, **options: object) -> datasets.Prepared:
    return prepare(data, **{"likelihood": "bernoulli", **options})  # type: ignore[arg-type]


# ---- data sets by name -------------------------------------------------------------------------------------


def test_mnist_is_bundled_whole() -> None:
    train, test = mnist()
    assert (train.dtype, train.shape, test.dtype, test.shape) == (
        torch.uint8, (60000, 784), torch.uint8, (10000, 784)
    )  # fmt: skip
    assert int(train.sum(dtype=torch.int64)) == 1567298545
    assert int(test.sum(dtype=torch.int64)) == 264923200
    labels, _ = datasets.mnist_labels()
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_mnist_comes_with_its_license() -> None:
    text = (BUNDLED / "LICENSE").read_text()
    for word in ("CC BY-SA 3.0", "Yann LeCun", "Corinna Cortes", "Christopher J.C. Burges"):
        assert word in text


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_reads_files_of_the_same_names_from_another_folder(tmp_path: Path, suffix: str) -> None:
    for part, count in (("train", 3), ("t10k", 2)):
        content = idx(images(count))
        (tmp_path / f"{part}-images-idx3-ubyte{suffix}").write_bytes(
            gzip.compress(content) if suffix else content
        )
    train, test = mnist(tmp_path)
    assert train.tolist() == images(3).reshape(3, -1).tolist()
    assert test.tolist() == images(2).reshape(2, -1).tolist()


def test_mnist_names_the_file_that_is_missing(tmp_path: Path) -> None:
    refused(lambda: mnist(tmp_path), str(tmp_path / "train-images-idx3-ubyte"), "no such file")


@needs(FREY)
def test_frey_face_gives_1965_frames_and_the_papers_split() -> None:
    faces = frey_face(FREY)
    assert (faces.dtype, faces.shape) == (torch.uint8, (1965, 560))
    with np.load(FREY) as file:
        assert np.array_equal(faces.numpy(), file["x"].reshape(1965, 560))
    train, test = frey(FREY)
    assert (len(train), len(test)) == (1600, 365)
    assert sorted(map(tuple, torch.cat((train, test)).tolist())) == sorted(map(tuple, faces.tolist()))
    assert not torch.equal(train[:20], faces[:20])
    assert all(torch.equal(a, b) for a, b in zip(frey(FREY), (train, test), strict=True))


def test_frey_names_the_file_that_is_missing(tmp_path: Path) -> None:
    refused(lambda: frey(tmp_path / "faces.npz"), "faces.npz", "no such file")


def test_frey_face_refuses_other_data(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", images())
    np.save(tmp_path / "few.npy", np.zeros((300, 560), dtype=np.uint8))
    refused(lambda: frey_face(tmp_path / "other.npy"), "other.npy", "[12, 12]", "[1965, 560]")
    refused(lambda: frey(tmp_path / "few.npy"), "few.npy", "[300, 560]", "[1965, 560]")


@needs(BINARIZED)
def test_binarized_mnist_is_a_binarisation_of_mnist() -> None:
    train, valid, test = binarized_mnist(BINARIZED)
    assert [part.shape for part in (train, valid, test)] == [(50000, 784), (10000, 784), (10000, 784)]
    assert all(part.dtype == torch.uint8 and int(part.max()) == 1 for part in (train, valid, test))
    # Its test images are MNIST's, digit by digit; a pixel of 0 is never 1 and a pixel of 255 always.
    _, original = mnist()
    _, labels = datasets.mnist_labels()
    original = original[labels.argsort(stable=True)]
    assert not (test.bool() & (original == 0)).any()
    assert (test.bool() | (original < 255)).all()


def test_rows_of_packed_bits_are_unpacked(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (5, 11), dtype=np.uint8)
    np.savez(tmp_path / "bits.npz", train=np.packbits(bits, axis=1), n_features=11)
    assert load(tmp_path / "bits.npz").tolist() == bits.tolist()


def test_binarized_mnist_refuses_other_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", train=images(), valid=images(), test=images())
    refused(lambda: binarized_mnist(tmp_path / "other.npz"), "other.npz", "'train'", "[N, 784]")


def test_split_shuffles_rows_and_loses_none() -> None:
    rows = torch.arange(50).reshape(50, 1)
    train, test = split(rows, 0.2, seed=3)
    assert (len(train), len(test)) == (40, 10)
    both = torch.cat((train, test)).flatten().tolist()
    assert sorted(both) == list(range(50)) and both != list(range(50))


def test_split_is_a_function_of_the_seed() -> None:
    rows = np.arange(50).reshape(50, 1)
    first, again, other = (split(rows, 10, seed=seed)[1].flatten().tolist() for seed in (1, 1, 2))
    assert first == again != other
    # From an independent implementation in Python integers; no version may hold out other rows.
    assert first == [38, 45, 40, 44, 6, 19, 48, 49, 2, 29]


@pytest.mark.parametrize("test", [0, 50, -1, 0.0, 1.0])
def test_split_refuses_an_empty_part(test: int | float) -> None:
    refused(lambda: split(torch.zeros(50, 1), test), "test: found", "from 1 to 49")


# ---- files that are right ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bool", "u1", "i8", "<f4", ">f4", "f8", "f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_type_and_order_reads_as_numpy_reads_it(tmp_path: Path, dtype: str, order: str) -> None:
    array = np.array(images() % 2, dtype=dtype, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "a.npy", array)
    tensor = load(tmp_path / "a.npy")
    assert tensor.numpy().dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(tensor.numpy(), array.reshape(12, 12))


def test_images_are_flattened_in_row_major_order(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", images(2, 4, 3))
    assert load(tmp_path / "a.npy")[1].tolist() == images(2, 4, 3)[1].flatten().tolist()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_with_one_array_or_a_key(tmp_path: Path, write: Callable[..., None]) -> None:
    write(tmp_path / "one.npz", images())
    assert np.array_equal(load(tmp_path / "one.npz"), images().reshape(12, 12))
    write(tmp_path / "two.npz", a=images(), b=images(2))
    assert np.array_equal(load(tmp_path / "two.npz", key="b"), images(2).reshape(2, 12))


@pytest.mark.parametrize("name", ["a.idx", "a-idx3-ubyte", "a.idx3-ubyte", "a.idx.gz", "a-idx3-ubyte.gz"])
def test_idx_by_any_of_its_names(tmp_path: Path, name: str) -> None:
    content = idx(images())
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert np.array_equal(load(tmp_path / name), images().reshape(12, 12))


@pytest.mark.parametrize(("dtype", "code"), [("i1", 9), ("i2", 11), ("i4", 12), ("f4", 13), ("f8", 14)])
def test_idx_of_other_types(tmp_path: Path, dtype: str, code: int) -> None:
    array = (images().astype(np.int16) - 100).clip(-128, 127).astype(dtype)
    (tmp_path / "a.idx").write_bytes(idx(array, code))
    tensor = load(tmp_path / "a.idx")
    assert tensor.numpy().dtype == np.dtype(dtype)
    assert np.array_equal(tensor.numpy(), array.reshape(12, 12))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2\n3,255\n", [[1, 2], [3, 255]]),
        ("1,2\r\n\r\n3,4", [[1, 2], [3, 4]]),
        ("\ufeff 1 , 2\n", [[1, 2]]),
        ("p0,p1\n1,2\n", [[1, 2]]),
        ('"p0","p1"\n1,2\n', [[1, 2]]),
        ("0,1,2\n9,8,7\n", [[9, 8, 7]]),  # as pandas names columns without names
        ("0,1\n9,8\n", [[0, 1], [9, 8]]),
    ],
)
def test_csv_of_whole_numbers_gives_uint8(tmp_path: Path, text: str, values: list[list[int]]) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    tensor = load(tmp_path / "a.csv")
    assert tensor.dtype == torch.uint8 and tensor.tolist() == values


@pytest.mark.parametrize("text", ["0.5,2\n", "5e-1,2", "1,256\n0.5,2\n", "-1,2\n", "255.0,0\n"])
def test_csv_of_other_numbers_gives_float32(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    tensor = load(tmp_path / "a.csv")
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == [[float(field) for field in line.split(",")] for line in text.split()]


def test_csv_with_one_real_number_far_below_is_real_throughout(tmp_path: Path) -> None:
    lines = ["1,2"] * (datasets._CSV_ROWS + 5) + ["3,0.5"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    tensor = load(tmp_path / "a.csv")
    assert tensor.dtype == torch.float32 and tensor.shape == (len(lines), 2)
    assert tensor[0].tolist() == [1, 2] and tensor[-1].tolist() == [3, 0.5]


# ---- files that are wrong ----------------------------------------------------------------------------------


def test_a_labels_file_is_refused() -> None:
    refused(
        lambda: load(BUNDLED / "t10k-labels-idx1-ubyte.gz"),
        "t10k-labels-idx1-ubyte.gz: found labels, one value per item (shape [10000])",
        "wanted images",
    )


WRONG: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty file": ("a.npy", b"", ("an empty file",)),
    "unknown extension": ("a.png", b"x", ("unknown extension '.png'", ".npy, .npz, .csv")),
    "no extension": ("pixels", b"x", ("no extension",)),
    "idx: truncated gzip": ("a.idx.gz", gzip.compress(idx(images()))[:-20], ("stop early", "the whole file")),
    "idx: bad checksum": ("a.idx.gz", gzip.compress(idx(images()))[:-8] + bytes(8), ("damaged", "CRC")),
    "idx: truncated": ("a.idx", idx(images())[:-1], ("143 bytes of values", "144 for")),
    "idx: header only": ("a.idx", idx(images())[:9], ("9 bytes", "header of 16 bytes")),
    "idx: bytes too many": ("a.idx", idx(images()) + b"x", ("more than 144 bytes", "144 for")),
    "idx: wrong magic": ("a.idx", b"\x89PNG\r\n", ("89 50 4e 47", "00 00 08 03")),
    "idx: unknown type": ("a.idx", b"\0\0\x07\x03", ("00 00 07 03",)),
    "idx: absurd sizes": ("a.idx", b"\0\0\x08\x03" + b"\xff" * 12 + b"xx", ("[4294967295, 4294967295",)),
    "idx: no images": ("a.idx", idx(images(0)), ("no values (shape [0, 4, 3])", "one image or more")),
    "csv: text": ("a.csv", b"1,2\n3,four\n", ("'four' in line 2, field 2", "a number")),
    "csv: nothing in a field": ("a.csv", b"a,b\n\n1,2\n3,\n", ("'' in line 4, field 2",)),
    "csv: ragged": ("a.csv", b"1,2\n3,4,5\n", ("3 fields in line 2", "2 as in the lines before")),
    "csv: header only": ("a.csv", b"a,b\n", ("no rows",)),
    "csv: a label column": ("a.csv", b"label,p0\n5,0\n", ("a column named 'label'", "pixels only")),
    "csv: not text": ("a.csv", b"1,2\n\xff\xfe,3\n", ("no text",)),
    "csv: semicolons": ("a.csv", b"1;2\n3;4\n", ("'3;4' in line 2", "commas")),
    "npy: another format": ("a.npy", b"<html>" + bytes(100), ("no NumPy array",)),
    "npz: not a zip": ("a.npz", b"PK\x03\x04" + bytes(100), ("no zip archive",)),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused(tmp_path: Path, what: str) -> None:
    name, content, words = WRONG[what]
    (tmp_path / name).write_bytes(content)
    refused(lambda: load(tmp_path / name), str(tmp_path / name), *words)


def test_a_truncated_npy_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", images())
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-10])
    refused(lambda: load(tmp_path / "a.npy"), "134 bytes of values", "144 for an array of shape [12, 4, 3]")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_objects_are_refused_and_never_unpickled(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    array = np.array([[Bomb()]], dtype=object)
    (np.save if suffix == "npy" else np.savez)(tmp_path / f"a.{suffix}", array)
    refused(lambda: load(tmp_path / f"a.{suffix}"), "Python objects", "an array of numbers")
    (tmp_path / f"b.{suffix}").write_bytes(pickle.dumps(Bomb()))
    refused(lambda: load(tmp_path / f"b.{suffix}"))
    assert not (tmp_path / "exploded").exists()


def test_npz_without_a_choice_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=images(), labels=np.arange(12))
    refused(lambda: load(tmp_path / "a.npz"), "the arrays images, labels", "chosen by key")
    refused(lambda: load(tmp_path / "a.npz", key="pixels"), "the arrays images, labels", "'pixels'")
    refused(lambda: load(tmp_path / "a.npz", key="labels"), "labels, one value per item")


def test_a_directory_a_missing_file_and_a_pipe_are_refused(tmp_path: Path) -> None:
    refused(lambda: load(tmp_path), str(tmp_path), "a directory")
    refused(lambda: load(tmp_path / "a.npy"), str(tmp_path / "a.npy"), "no such file")
    os.mkfifo(tmp_path / "pipe.npy")
    refused(lambda: load(tmp_path / "pipe.npy"), "no regular file")


def test_a_file_name_of_any_bytes_stays_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "two\nlines.npy").write_bytes(b"")
    refused(lambda: load(tmp_path / "two\nlines.npy"), "two\\nlines.npy")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.npy")
    refused(lambda: load(name), "no such file").encode()  # can be printed


def _samples() -> dict[str, bytes]:
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, images(3))
    np.savez_compressed(npz, images(3))
    samples = {"a.npy": npy.getvalue(), "a.npz": npz.getvalue(), "a.idx": idx(images(3))}
    return {**samples, "a.idx.gz": gzip.compress(samples["a.idx"]), "a.csv": b"p,q,r\n1,2,3\n4,5,6.5\n"}


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.idx", "a.idx.gz"])
def test_every_truncation_is_refused(tmp_path: Path, name: str) -> None:
    content = _samples()[name]
    for length in range(len(content)):
        (tmp_path / name).write_bytes(content[:length])
        refused(lambda: load(tmp_path / name), name)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_never_worse(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(_samples())))
    content = bytearray(_samples()[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(content)
    try:
        tensor = load(tmp_path / name)
    except DataError as error:
        assert str(error).startswith(str(tmp_path / name)) and "\n" not in str(error)
    else:
        assert isinstance(tensor, Tensor) and tensor.ndim == 2


def test_an_encrypted_npz_is_refused(tmp_path: Path) -> None:
    content = bytearray(_samples()["a.npz"])
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
        directory = archive.start_dir
    content[6] |= 1  # the flag of encryption, of the file
    content[directory + 8] |= 1  # and of its directory entry
    (tmp_path / "a.npz").write_bytes(content)
    refused(lambda: load(tmp_path / "a.npz"), "cannot be opened")


# ---- how data are taken ------------------------------------------------------------------------------------

PIXELS = torch.from_numpy(images().reshape(12, 12).copy())
BITS = (PIXELS > 100).to(torch.uint8)


@pytest.mark.parametrize(
    ("data", "kind", "scale", "words"),
    [
        (PIXELS, "real", 255, "uint8 from 0 to 255, taken as real values over 255"),
        (PIXELS.long(), "real", 255, "int64 from 0 to 255, taken as real values over 255"),
        (PIXELS / 255, "real", 1, "float32 from 0 to 1, taken as real values"),
        (BITS, "binary", 1, "uint8 from 0 to 1, taken as binary pixels"),
        (BITS.bool(), "binary", 1, "bool from 0 to 1, taken as binary pixels"),
        (BITS.double(), "binary", 1, "float64 from 0 to 1, taken as binary pixels"),
    ],
)
def test_auto_chooses_and_says_what_it_chose(data: Tensor, kind: str, scale: float, words: str) -> None:
    taken = prepared(data)
    assert (taken.kind, taken.scale) == (kind, scale)
    assert taken.note == f"train: 12 rows of 12, {words}"


def test_explicit_targets_read_integers_as_pixels_whatever_values_occur() -> None:
    # So a dark part of the data, such as a small test set, is read like the rest.
    for targets in ("real", "dynamic"):
        taken = prepared(BITS, targets=targets)
        assert (taken.kind, taken.scale) == (targets, 255)
        assert torch.equal(taken.batch(slice(None)), BITS / 255)


def test_pixel_scale_256_divides_as_the_papers_code_does() -> None:
    assert torch.equal(prepared(PIXELS, pixel_scale=256).batch(slice(None)), PIXELS / 256)


def test_real_pixels_are_a_float32_product_and_end_at_1() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    x = prepared(ramp).batch(slice(None))[0]
    exact = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    assert np.array_equal(x.numpy(), exact) and x[255] == 1
    assert torch.allclose(x.double(), torch.arange(256).double() / 255, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("data", [PIXELS, BITS, PIXELS / 255, (PIXELS / 255).bfloat16()])
def test_data_stay_as_compact_as_they_came_without_a_copy(data: Tensor) -> None:
    taken = prepared(data)
    assert taken.values.dtype == data.dtype and taken.values.data_ptr() == data.data_ptr()


def test_a_large_uint8_array_is_checked_without_a_copy() -> None:
    data = np.zeros((1 << 14, 1 << 10), dtype=np.uint8)
    data[-1, -1] = 255
    data.setflags(write=False)  # as a memory map may be
    taken = prepared(data)
    assert taken.values.data_ptr() == data.ctypes.data and taken.scale == 255


def test_caller_data_are_never_written() -> None:
    data = PIXELS / 255
    before = data.clone()
    prepared(data).batch(torch.tensor([1, 1, 0])).add_(1)
    assert torch.equal(data, before)


@pytest.mark.parametrize("data", [PIXELS, BITS.bool(), PIXELS.double() / 255, (PIXELS / 255).half()])
def test_a_batch_is_float32_rows_in_the_order_asked_for(data: Tensor, device: torch.device) -> None:
    taken = prepared(data).to(device)
    index = torch.tensor([3, 0, 3], device=device)
    batch = taken.batch(index)
    assert batch.dtype == torch.float32 and batch.shape == (3, 12) and batch.device.type == device.type
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(batch, taken.batch(slice(0, 4))[index])
    assert torch.equal(batch.cpu(), prepared(data).batch(index.cpu()))  # the same bits on every device


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; run `python -m bench.gpu` where there is one"
)
def test_a_batch_can_be_captured_in_a_graph() -> None:
    taken = prepared(PIXELS).to("cuda")
    index = torch.zeros(2, dtype=torch.int64, device="cuda")
    taken.batch(index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = taken.batch(index)
    index.copy_(torch.tensor([5, 2]))
    graph.replay()
    assert torch.equal(batch.cpu(), prepared(PIXELS).batch(torch.tensor([5, 2])))


@pytest.mark.parametrize(
    "data",
    [
        PIXELS.tolist(),
        PIXELS.numpy().reshape(12, 4, 3),
        PIXELS.reshape(12, 1, 4, 3),
        PIXELS.t().contiguous().t(),
        PIXELS.numpy()[::-1][::-1],
        PIXELS.numpy().astype(">u2"),
        PIXELS.numpy().astype(np.uint64),
    ],
    ids=["lists", "N,H,W", "N,1,H,W", "transposed", "negative strides", "big-endian", "uint64"],
)
def test_arrays_of_any_form_give_the_same_rows(data: object) -> None:
    taken = prepared(data)
    assert taken.values.is_contiguous()
    assert torch.equal(taken.batch(slice(None)), prepared(PIXELS).batch(slice(None)))


def test_a_path_is_loaded_and_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", images())
    assert torch.equal(prepared(tmp_path / "a.npy").values, PIXELS)
    np.save(tmp_path / "a.npy", np.full((3, 3), np.nan))
    refused(lambda: prepared(str(tmp_path / "a.npy")), str(tmp_path / "a.npy"), "nan in row 0, column 0")


def test_what_is_prepared_stays_prepared() -> None:
    taken = prepared(PIXELS)
    assert prepared(taken) is taken


def test_gaussian_takes_any_finite_floats_and_scales_pixels() -> None:
    data = torch.tensor([[-3.5, 1e30], [0.0, 2.0]])
    assert torch.equal(prepared(data, likelihood="gaussian").batch(slice(None)), data)
    assert prepared(PIXELS, likelihood="gaussian", pixel_scale=256).scale == 256


def test_a_dataloader_with_an_end_is_collected() -> None:
    floats = (PIXELS / 255).reshape(12, 1, 4, 3)
    loader = DataLoader(TensorDataset(floats, torch.arange(12)), batch_size=5)
    taken = prepared(loader)
    assert torch.equal(taken.values, PIXELS / 255)


def test_a_dataloader_of_unlike_batches_is_refused() -> None:
    class Batches(list):  # type: ignore[type-arg]
        """Iterable with a length, and no Sequence to is_stream."""

    def loader(*batches: Tensor) -> DataLoader[Tensor]:
        return DataLoader(Batches(batches), batch_size=None)  # type: ignore[arg-type]

    refused(lambda: prepared(loader(torch.zeros(2, 3), torch.zeros(2, 4))), "[2, 4]", "[2, 3]")
    refused(lambda: prepared(loader(torch.zeros(2, 3), torch.zeros(2, 3).half())), "float16", "float32")
    refused(lambda: prepared(loader(torch.arange(5))), "labels, one value per item")


@pytest.mark.parametrize("stream", [DataLoader(TensorDataset(PIXELS)), iter([PIXELS]), (x for x in [PIXELS])])
def test_streams_are_told_from_arrays(stream: object) -> None:
    assert is_stream(stream)


@pytest.mark.parametrize(
    "data", [PIXELS, PIXELS.numpy(), PIXELS.tolist(), "a.npy", Path("a.npy"), {}, 5, None]
)
def test_arrays_are_told_from_streams(data: object) -> None:
    assert not is_stream(data)


# ---- data that are refused ---------------------------------------------------------------------------------


def with_value(value: float, row: int = 7, column: int = 3) -> Tensor:
    data = torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
    data[row:, column] = value
    return data


@pytest.fixture(params=[1 << 22, 20], ids=["one look", "row by row"])
def any_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_CHECKED_VALUES", request.param)


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_value_that_is_not_finite_is_named(
    value: float, likelihood: str, dtype: torch.dtype
) -> None:
    data = with_value(value).to(dtype)
    refused(
        lambda: prepared(data, likelihood=likelihood), f"train: found {value:g} in row 7, column 3", "finite"
    )


@pytest.mark.usefixtures("any_chunk")
def test_values_to_255_as_floats_are_refused_with_what_to_do() -> None:
    data = PIXELS.float()
    refused(lambda: prepared(data), "reach 255 (7 in row 0, column 1)", "divide by 255 or pass uint8")


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("value", [-0.25, -1e-30, 300.0])
def test_other_values_outside_0_to_1_are_refused_for_a_bernoulli(value: float) -> None:
    data = with_value(value)
    refused(
        lambda: prepared(data, name="test"),
        "test: found values from",
        f"{value:g} in row 7, column 3",
        "gaussian",
    )


def test_float64_beyond_float32_is_refused() -> None:
    data = with_value(0.0).double()
    data[2, 5] = 1e300
    refused(lambda: prepared(data, likelihood="gaussian"), "1e+300 in row 2, column 5", "float32")


@pytest.mark.parametrize(("value", "likelihood"), [(-1, "gaussian"), (256, "gaussian"), (-7, "bernoulli")])
def test_integers_that_are_no_pixels_are_refused(value: int, likelihood: str) -> None:
    data = PIXELS.int()
    data[4, 2] = value
    words = (f"{value} in row 4, column 2", "integers from 0 to 255, or floats")
    refused(lambda: prepared(data, likelihood=likelihood), *words)


def test_pixels_beyond_a_small_pixel_scale_are_refused_for_a_bernoulli() -> None:
    refused(
        lambda: prepared(PIXELS, pixel_scale=100), "105 in row 1, column 3", "at most 100, the pixel_scale"
    )


def test_data_that_are_not_binary_are_refused_as_binary() -> None:
    refused(lambda: prepared(PIXELS, targets="binary"), "7 in row 0, column 1", "only 0 and 1")
    refused(lambda: prepared(with_value(1.0), targets="binary"), "row 0, column 0", "only 0 and 1")


def test_the_wrong_width_is_refused() -> None:
    refused(
        lambda: prepared(PIXELS, width=784), "train: found rows of 12 values", "784, the model's data_dim"
    )
    refused(lambda: prepared(prepared(PIXELS), width=784), "rows of 12 values")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.zeros(0, 5), ("no values (shape [0, 5])",)),
        (torch.zeros(5, 0), ("no values (shape [5, 0])",)),
        (torch.arange(9), ("labels, one value per item (shape [9])", "images")),
        (torch.arange(9).reshape(9, 1), ("one whole number per row, as labels are",)),
        (5, ("a single number",)),
        (None, ("NoneType", "an array or tensor")),
        ({"images": PIXELS}, ("dict",)),
        ((PIXELS, PIXELS[:5]), ("a tuple that is no array", "one array")),
        ([[1, 2], [3]], ("a list that is no array", "equal length")),
        ([["a", "b"]], ("an array of text",)),
        (np.zeros((2, 2), complex), ("an array of complex numbers",)),
        (torch.zeros(2, 2, dtype=torch.complex64), ("complex64",)),
        (np.array([[object()]]), ("object", "real numbers")),
        (np.zeros((2, 2), "M8[s]"), ("datetime64",)),
        (torch.zeros(2, 2).to_sparse(), ("sparse",)),
        (iter([PIXELS]), ("an iterator without a length",)),
    ],
)
def test_what_is_no_array_of_images_is_refused(data: object, words: tuple[str, ...]) -> None:
    refused(lambda: prepared(data), "train: found", *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"likelihood": "poisson"}, ("likelihood: found 'poisson'", "'bernoulli', 'gaussian'")),
        ({"targets": "labels"}, ("targets: found 'labels'", "'auto'")),
        ({"targets": "dynamic", "likelihood": "gaussian"}, ("targets: found 'dynamic'", "'bernoulli'")),
        ({"pixel_scale": 0}, ("pixel_scale: found 0",)),
        ({"pixel_scale": float("nan")}, ("pixel_scale: found nan",)),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, object], words: tuple[str, ...]) -> None:
    refused(lambda: prepared(PIXELS, **options), *words)
