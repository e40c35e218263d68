"""Data: the bundled MNIST, files by path, and the one check that every data set passes before training.

Reading (:func:`mnist`, :func:`load`, ...) gives tensors as compact as the file. :func:`prepare` decides how
they are taken (binary or real pixels, over which scale), refuses what cannot be right, and gives minibatches
as float32.

Every refusal is a :class:`DataError`: one sentence with the file or argument, what was found and what was
wanted. Rows and columns of arrays count from 0, lines and fields of CSV files from 1.
"""

from __future__ import annotations

import gzip
import importlib.resources
import io
import math
import os
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .reference import integer

_Array: TypeAlias = NDArray[Any]
_FilePath: TypeAlias = "str | os.PathLike[str]"

LIKELIHOODS = ("bernoulli", "gaussian")
TARGETS = ("auto", "real", "binary", "dynamic")

_TAKEN = {
    "binary": "binary pixels",
    "real": "real values",
    "dynamic": "probabilities to draw binary pixels from",
}

_READ_BYTES = 1 << 24
_CHECKED_VALUES = 1 << 22  # values looked at together, so that checks need little memory of their own
_CSV_ROWS = 1024


class DataError(ValueError):
    """Data that cannot be used; one sentence: file or argument, what was found, what was wanted."""


def _refusal(name: str, found: str, wanted: str) -> DataError:
    return DataError(f"{name}: found {found}; wanted {wanted}")


# ---- data sets by name -------------------------------------------------------------------------------------


def mnist(root: _FilePath | None = None) -> tuple[Tensor, Tensor]:
    """MNIST images `(train, test)`: uint8 `[60000, 784]` and `[10000, 784]`, pixel values 0 to 255.

    Args:
        root: a folder with files of the original names, with or without .gz (Fashion-MNIST has them too); the
            bundled MNIST when left out.

    Source: Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, CC BY-SA 3.0.
    """
    train, test = (_mnist_file(f"{part}-images-idx3-ubyte", root) for part in ("train", "t10k"))
    return _rows(train, "train-images-idx3-ubyte"), _rows(test, "t10k-images-idx3-ubyte")


def mnist_labels(root: _FilePath | None = None) -> tuple[Tensor, Tensor]:
    """The digits shown by :func:`mnist`, for plots: `(train, test)`, uint8 `[60000]` and `[10000]`."""
    train, test = (_mnist_file(f"{part}-labels-idx1-ubyte", root) for part in ("train", "t10k"))
    return train, test


def frey_face(path: _FilePath) -> Tensor:
    """Frey Face: uint8 `[1965, 560]`, frames of 28 x 20 pixels, values 0 to 255, in the order of the film.

    Shuffled and split as in the paper: :func:`frey`.
    """
    faces = load(path)
    if faces.dtype != torch.uint8 or faces.shape != (1965, 560):
        raise _refusal(_shown(path), _described(faces), "the frames of Frey Face, uint8 of shape [1965, 560]")
    return faces


def frey(path: _FilePath) -> tuple[Tensor, Tensor]:
    """Frey Face as the paper takes it: `(train, test)`, uint8 `[1600, 560]` and `[365, 560]`, shuffled.

    Neighbours of the film are alike, so nearly every test frame has one in the training data. The order is
    that of :func:`split` with seed 0: the same everywhere, but not the paper's, which is not known.

    Args:
        path: the file of all frames; see :func:`frey_face`. It is not bundled.
    """
    return split(frey_face(path), 365)


def binarized_mnist(path: _FilePath) -> tuple[Tensor, Tensor, Tensor]:
    """Larochelle's statically binarised MNIST: `(train, valid, test)`, uint8 of 0 and 1, 784 a row.

    There are 50000, 10000 and 10000 rows.

    Args:
        path: an .npz file with the arrays train, valid and test, packed (see :func:`load`) or not.

    Source: Larochelle & Murray, *The neural autoregressive distribution estimator*, AISTATS 2011.
    """
    parts = []
    for key in ("train", "valid", "test"):
        part = load(path, key=key)
        if part.dtype != torch.uint8 or part.shape[1] != 784 or int(part.max()) > 1:
            found = f"{_described(part)} under {key!r}"
            raise _refusal(_shown(path), found, "uint8 of shape [N, 784] with values 0 and 1")
        parts.append(part)
    train, valid, test = parts
    return train, valid, test


def split(data: Tensor | _Array, test: int | float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Shuffles the rows and holds some out: `(train, test)`.

    Args:
        data: `[N, ...]`.
        test: how many rows to hold out (int), or which fraction of them (float between 0 and 1).
        seed: the order is a function of (seed, N): a stable sort of the rows by splitmix64(seed + (i + 1)
            golden) mod 2^64.
    """
    rows = data if isinstance(data, Tensor) else _tensor(data, "data")
    count = len(rows)
    held_out = round(count * test) if isinstance(test, (float, np.floating)) else integer("test", test)
    if not 0 < held_out < count:
        raise _refusal(
            "test", f"{test}", f"a number of rows from 1 to {count - 1}, or a fraction that gives one"
        )
    keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = torch.from_numpy(np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")).to(rows.device)
    return rows[order[: count - held_out]], rows[order[count - held_out :]]


# ---- files by path -----------------------------------------------------------------------------------------


def load(path: _FilePath, *, key: str | None = None) -> Tensor:
    """The images of a file, `[N, D]` in the file's own type; `[N, H, W, ...]` is flattened row by row.

    Formats, by name: .npy; .npz with one array, or the one under `key` (where a scalar n_features lies beside
    uint8 rows of n_features / 8 bytes, these are packed bits, the first in the highest place); idx files
    (.idx, or names like train-images-idx3-ubyte), gzipped or not; .csv with commas, one row per line, a
    header line permitted. A CSV file of whole numbers from 0 to 255 gives uint8, any other float32. No
    pickles: arrays of objects are refused.

    Raises:
        DataError: the file is missing, empty, truncated, damaged, of another format, or holds no images.
    """
    with _opened(path) as (file, name):
        array = _reader(name, key)(file, name)
    return _rows(_tensor(array, name), name)


@contextmanager
def _opened(path: _FilePath) -> Iterator[tuple[BinaryIO, str]]:
    """The open file and its name for messages; whatever goes wrong while reading becomes a DataError."""
    name = _shown(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
            found = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise _refusal(name, found, "a data file")
        if status.st_size == 0:
            raise _refusal(name, "an empty file", "a data file")
        with open(path, "rb") as file:
            yield file, name
    except FileNotFoundError as error:
        raise _refusal(name, "no such file", "a data file") from error
    except EOFError as error:
        raise _refusal(name, "compressed data that stop early", "the whole file") from error
    except (zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise _refusal(
            name, f"damaged compressed data ({_one_line(error)})", "the whole, undamaged file"
        ) from error
    except OSError as error:
        raise _refusal(
            name, f"an unreadable file ({error.strerror or _one_line(error)})", "a data file"
        ) from error


def _reader(name: str, key: str | None) -> Callable[[BinaryIO, str], _Array]:
    base = re.split(r"[/\\]", name)[-1].lower()
    if base.endswith(".npz"):
        return lambda file, name: _read_npz(file, name, key)
    if key is not None:
        raise _refusal("key", f"{key!r} with {name}", "an .npz file, the only kind with keys")
    if base.endswith(".npy"):
        return _read_npy
    if base.endswith(".csv"):
        return _read_csv
    if re.search(r"(\.idx|[-.]idx\d+-\w+)(\.gz)?$", base):
        return _read_idx
    suffix = Path(base).suffix
    found = f"the unknown extension {suffix!r}" if suffix else "no extension"
    raise _refusal(
        name, found, "a file named .npy, .npz, .csv, .idx or -idx3-ubyte, the last two also with .gz"
    )


_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(file: BinaryIO, name: str) -> _Array:
    """The format of the MNIST files: 0, 0, type, number of sizes; the sizes, big-endian; the values."""
    start = file.read(2)
    file.seek(0)
    if start == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=file) as unpacked:
            return _read_plain_idx(cast(BinaryIO, unpacked), name)
    return _read_plain_idx(file, name)


def _read_plain_idx(file: BinaryIO, name: str) -> _Array:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or magic[3] == 0:
        raise _refusal(name, f"the first bytes {magic.hex(' ')}", "an idx file, of images 00 00 08 03")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise _refusal(name, f"{4 + len(sizes)} bytes", f"an idx header of {4 + 4 * magic[3]} bytes")
    shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
    return _read_values(file, np.dtype(_IDX_TYPES[magic[2]]), shape, name)


_PACKED = "n_features"  # the member of an .npz file that says how many pixels a row of packed bits holds


def _read_npz(file: BinaryIO, name: str, key: str | None) -> _Array:
    if not zipfile.is_zipfile(file):
        raise _refusal(name, "no zip archive, or a part of one", "a whole .npz file")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        members = [member[:-4] for member in archive.namelist() if member.endswith(".npy")]
        keys = [member for member in members if member != _PACKED]
        if key is None and len(keys) == 1:
            key = keys[0]
        if key not in keys:
            found = "no array" if not keys else "the arrays " + ", ".join(keys[:8])
            raise _refusal(
                name, found, "one array, or one of them chosen by key" if key is None else f"{key!r}"
            )
        try:
            array = _read_member(archive, key, name)
            return _unpacked(array, _read_member(archive, _PACKED, name)) if _PACKED in members else array
        except (NotImplementedError, RuntimeError) as error:  # an unknown compression, a password
            raise _refusal(
                name, f"an archive that cannot be opened ({_one_line(error)})", "a plain .npz"
            ) from error


def _read_member(archive: zipfile.ZipFile, key: str, name: str) -> _Array:
    with archive.open(f"{key}.npy") as member:
        return _read_npy(cast(BinaryIO, member), name)


def _unpacked(array: _Array, features: _Array) -> _Array:
    """Rows of packed bits become rows of 0 and 1; an array that is not packed stays as it is."""
    count = int(features) if features.shape == () and features.dtype.kind in "iu" else 0
    packed = array.dtype == np.uint8 and array.ndim == 2 and count > 1 and array.shape[1] == -(-count // 8)
    return np.unpackbits(array, axis=1, count=count) if packed else array


# What NumPy raises for the many ways in which the text of a header can be wrong.
_BROKEN_HEADER = (ValueError, TypeError, SyntaxError, RecursionError, OverflowError, MemoryError, TokenError)


def _read_npy(file: BinaryIO, name: str) -> _Array:
    try:
        version = np.lib.format.read_magic(cast(io.BufferedIOBase, file))
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"version {version}")
        shape, fortran_order, dtype = read_header(cast(io.BufferedIOBase, file))
    except _BROKEN_HEADER as error:
        raise _refusal(
            name, f"no NumPy array ({_one_line(error)})", "an array as numpy.save writes it"
        ) from error
    if dtype.hasobject:
        raise _refusal(name, "an array of Python objects (a pickle)", "an array of numbers")
    array = _read_values(file, dtype, tuple(reversed(shape)) if fortran_order else tuple(shape), name)
    return array.transpose() if fortran_order else array


def _read_values(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> _Array:
    """Exactly as many bytes as the header promises, no more and no less."""
    wanted = math.prod(shape) * dtype.itemsize
    promise = f"{wanted} for an array of shape {list(shape)}"
    try:
        array = np.empty(shape, dtype)
        buffer = array.reshape(-1).view(np.uint8).data if wanted else memoryview(b"")
    except (MemoryError, ValueError, TypeError) as error:
        raise _refusal(
            name, f"a header that promises {promise}", "an array of numbers that fits in memory"
        ) from error
    done = 0
    while done < wanted:
        piece = file.read(min(_READ_BYTES, wanted - done))
        if not piece:
            raise _refusal(name, f"{done} bytes of values", promise)
        buffer[done : done + len(piece)] = piece
        done += len(piece)
    if file.read(1):  # at the end of a compressed file this checks its checksum, too
        raise _refusal(name, f"more than {wanted} bytes of values", promise)
    return array


def _read_csv(file: BinaryIO, name: str) -> _Array:
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    try:
        blocks = list(_csv_blocks(text, name))
    except UnicodeDecodeError as error:
        raise _refusal(
            name, f"bytes that are no text (at byte {error.start})", "a CSV file in UTF-8"
        ) from error
    finally:
        text.detach()  # the file is closed by whoever opened it
    if not blocks:
        raise _refusal(name, "no rows of numbers", "a CSV file with one row per image")
    # One value that is no pixel makes the whole file real numbers.
    if any(block.dtype != np.uint8 for block in blocks):
        blocks = [block.astype(np.float32) for block in blocks]
    return np.concatenate(blocks)


def _csv_blocks(text: io.TextIOWrapper, name: str) -> Iterator[_Array]:
    """Pieces of moderate size: uint8 where all are written as whole numbers from 0 to 255, else float32."""
    lines: list[tuple[int, str]] = []
    width = 0
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        if width == 0:
            fields = [field.strip().strip('"') for field in line.split(",")]
            width = len(fields)
            if _is_header(fields):
                if labels := {"label", "labels", "class"}.intersection(map(str.lower, fields)):
                    found = f"a column named {labels.pop()!r}"
                    raise _refusal(
                        name, found, "pixels only: labels are not data to a VAE, remove that column"
                    )
                continue
        lines.append((number, line))
        if len(lines) == _CSV_ROWS:
            yield _csv_block(lines, width, name)
            lines = []
    if lines:
        yield _csv_block(lines, width, name)


def _is_header(fields: list[str]) -> bool:
    """No field is a number; or they count 0, 1, 2, ..., as pandas names columns without names."""
    return not any(map(_is_number, fields)) or (
        len(fields) > 2 and fields == [str(i) for i in range(len(fields))]
    )


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _csv_block(lines: list[tuple[int, str]], width: int, name: str) -> _Array:
    text = [line for _, line in lines]
    # An older NumPy would read 255.0 as an integer, with a warning.
    if not any(re.search(r"[.eEnN]", line) for line in text):
        with suppress(ValueError):  # not all from 0 to 255, or no numbers: told apart below
            pixels = np.loadtxt(text, delimiter=",", dtype=np.uint8, comments=None, ndmin=2)
            if pixels.shape[1] == width:
                return pixels
    try:
        numbers = np.loadtxt(text, delimiter=",", dtype=np.float64, comments=None, ndmin=2)
    except ValueError as error:
        raise _csv_refusal(lines, width, name, _one_line(error)) from error
    if numbers.shape[1] != width:
        raise _csv_refusal(lines, width, name, "")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which prepare refuses
        return numbers.astype(np.float32)


def _csv_refusal(lines: list[tuple[int, str]], width: int, name: str, error: str) -> DataError:
    for number, line in lines:
        fields = line.rstrip("\r\n").split(",")
        for i, field in enumerate(fields, 1):
            if not _is_number(field):
                found = f"{field.strip()[:20]!a} in line {number}, field {i}"
                return _refusal(name, found, "a number, with commas between fields")
        if len(fields) != width:
            return _refusal(name, f"{len(fields)} fields in line {number}", f"{width} as in the lines before")
    return _refusal(name, f"lines that are no numbers ({error})", "numbers with commas between them")


def _mnist_file(stem: str, root: _FilePath | None) -> Tensor:
    if root is None:
        bundled = importlib.resources.files("vae_fast") / "data" / "mnist" / f"{stem}.gz"
        with importlib.resources.as_file(bundled) as path:
            return _mnist_path(path)
    compressed = Path(root) / f"{stem}.gz"
    return _mnist_path(compressed if compressed.exists() else Path(root) / stem)


def _mnist_path(path: Path) -> Tensor:
    with _opened(path) as (file, name):
        return _tensor(_read_idx(file, name), name)


# ---- one check, then minibatches ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """Checked data, as compact as they came, and how to take them.

    Attributes:
        values: `[N, D]` uint8 or floating-point; it may be the caller's own memory and is never written.
        kind: "binary" (0 and 1), "real", or "dynamic" (probabilities: each use draws pixels from
            Bernoulli(x)).
        scale: x = float32(values) * float32(1 / scale), the same bits on every device; 1 for binary and float
            data.
        note: one line that says how the data are taken.
        probabilities: whether every x is in [0, 1], as a Bernoulli likelihood wants it.
    """

    values: Tensor
    kind: str
    scale: float
    note: str
    probabilities: bool = True

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def width(self) -> int:
        """D, the number of features."""
        return self.values.shape[1]

    def to(self, device: torch.device | str) -> Prepared:
        """The same data on a device, still compact."""
        return replace(self, values=self.values.to(device))

    def batch(self, index: Tensor | slice) -> Tensor:
        """The rows `index` (integers `[B]` on the device of the data, or a slice) as float32 `[B, D]`.

        For kind "dynamic" these are the probabilities. On CUDA nothing waits for the device, so this can be
        captured in a graph. Do not write to the result: a slice of float32 data is a view of them.
        """
        rows = self.values[index] if isinstance(index, slice) else self.values.index_select(0, index)
        x = rows.to(torch.float32)
        return x if self.scale == 1 else x * (1 / self.scale)


def prepare(
    data: Any,
    *,
    likelihood: str,
    targets: str = "auto",
    pixel_scale: float = 255,
    name: str = "train",
    width: int | None = None,
) -> Prepared:
    """Checks data once and decides how to take them.

    Args:
        data: `[N, D]` or `[N, H, W, ...]`: an array, a tensor, nested lists, the path of a file (see
            :func:`load`), or a DataLoader with an end, whose batches (or first elements of tuples) are
            collected. What is prepared already is returned as it is.
        likelihood: "bernoulli" wants values in [0, 1]; "gaussian" takes any finite ones.
        targets: "auto" takes bool and data of only 0 and 1 as "binary", anything else as "real". "real" takes
            integers as pixels, x = value / pixel_scale, and floats as they are; "dynamic" likewise, as the
            probabilities that binary pixels are drawn from; "binary" wants 0 and 1 only. To read test data
            like training data, pass the kind of the latter.
        pixel_scale: 255, or 256 as in the paper's code.
        name: of the argument, for messages; a path is named itself.
        width: the number of features wanted, if that is known.

    Raises:
        DataError: empty, NaN or infinite, of the wrong width or type, outside [0, 1] for a Bernoulli
            likelihood, or labels instead of images.
    """
    _check_options(likelihood, targets, pixel_scale)
    if isinstance(data, Prepared):
        _check_width(data.values, width, name)
        if likelihood == "bernoulli" and not data.probabilities:
            low, high = (float(extreme) for extreme in torch.aminmax(data.values))
            raise _not_probabilities(data.values, low, high, data.scale, name)
        return data
    if isinstance(data, (str, os.PathLike)):
        name = _shown(data)
        values = load(data)
    elif is_stream(data):
        values = _collected(data, name)
    else:
        values = _rows(_tensor(data, name), name)
    _check_width(values, width, name)
    low, high, binary = _survey(values, name)
    kind = targets if targets != "auto" else "binary" if binary else "real"
    original = str(values.dtype).removeprefix("torch.")
    whole = not values.dtype.is_floating_point
    if whole and values.shape[1] == 1 and not binary:
        raise _refusal(name, "one whole number per row, as labels are", "images, or floats if it is no label")
    if kind == "binary" and not binary:
        where = _first(values, lambda x: (x != 0) & (x != 1))
        raise _refusal(name, where, "only 0 and 1 for binary targets, or targets='real'")
    if whole and not (low >= 0 and high <= 255):
        where = _first(values, lambda x: (x < 0) | (x > 255))
        raise _refusal(name, where, "integers from 0 to 255, or floats")
    scale = pixel_scale if whole and kind != "binary" and values.dtype != torch.bool else 1.0
    probabilities = low >= 0 and high <= scale
    if likelihood == "bernoulli" and not probabilities:
        raise _not_probabilities(values, low, high, scale, name)
    if kind == "binary" or whole:
        values = values.to(torch.uint8)
    elif values.dtype == torch.float64:
        values = values.to(torch.float32)
    over = f" over {scale:g}" if scale != 1 else ""
    found = f"{len(values)} rows of {values.shape[1]}, {original} from {low:g} to {high:g}"
    note = f"{name}: {found}, taken as {_TAKEN[kind]}{over}"
    return Prepared(values.contiguous(), kind, float(scale), note, probabilities)


def is_stream(data: object) -> bool:
    """True for what yields batches one after another, as a DataLoader does; not for arrays, lists, paths."""
    arrays = (Tensor, np.ndarray, Prepared, str, bytes, os.PathLike, Sequence, Mapping)
    return isinstance(data, Iterable) and not isinstance(data, arrays) and not hasattr(data, "__array__")


def _check_options(likelihood: str, targets: str, pixel_scale: float) -> None:
    for argument, value, wanted in (("likelihood", likelihood, LIKELIHOODS), ("targets", targets, TARGETS)):
        if value not in wanted:
            raise _refusal(argument, repr(value), "one of " + ", ".join(map(repr, wanted)))
    if targets == "dynamic" and likelihood != "bernoulli":
        raise _refusal("targets", f"'dynamic' with likelihood {likelihood!r}", "likelihood 'bernoulli'")
    if not (pixel_scale > 0 and math.isfinite(pixel_scale)):
        raise _refusal("pixel_scale", f"{pixel_scale}", "a positive number, such as 255 or 256")


def _check_width(values: Tensor, width: int | None, name: str) -> None:
    if width is not None and values.shape[1] != width:
        raise _refusal(name, f"rows of {values.shape[1]} values", f"{width}, the model's data_dim")


def _survey(values: Tensor, name: str) -> tuple[float, float, bool]:
    """Lowest and highest value, and whether all are 0 or 1; refuses what is not finite in float32."""
    low, high, binary = math.inf, -math.inf, True
    for _, chunk in _chunks(values):
        lowest, highest = (float(extreme) for extreme in torch.aminmax(chunk))
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise _refusal(name, _first(values, lambda x: ~torch.isfinite(x)), "finite numbers")
        low, high = min(low, lowest), max(high, highest)
        binary = binary and low >= 0 and high <= 1
        if binary and chunk.dtype.is_floating_point:
            binary = bool(((chunk == 0) | (chunk == 1)).all())
    most = torch.finfo(torch.float32).max
    if max(-low, high) > most:
        where = _first(values, lambda x: x.abs() > most)
        raise _refusal(name, where, f"numbers within float32, up to {most:.3g}")
    return low, high, binary


def _not_probabilities(values: Tensor, low: float, high: float, scale: float, name: str) -> DataError:
    where = _first(values, lambda x: (x < 0) | (x > scale))
    if not values.dtype.is_floating_point:
        wanted = f"at most {scale:g}, the pixel_scale, for a Bernoulli likelihood"
        return _refusal(name, where, wanted)
    if low >= 0 and high <= 255:
        found = f"values that reach {high:g} ({where})"
        return _refusal(
            name, found, "values in [0, 1] for a Bernoulli likelihood: divide by 255 or pass uint8"
        )
    found = f"values from {low:g} to {high:g} ({where})"
    return _refusal(name, found, "values in [0, 1] for a Bernoulli likelihood, or likelihood='gaussian'")


def _first(values: Tensor, is_bad: Callable[[Tensor], Tensor]) -> str:
    """The first bad value in row-major order and its place."""
    for start, chunk in _chunks(values):
        bad = is_bad(chunk).reshape(-1)
        if bad.any():
            row, column = divmod(int(bad.to(torch.uint8).argmax()), chunk.shape[1])
            return f"{chunk[row, column].item():g} in row {start + row}, column {column}"
    raise AssertionError("called without a bad value")


def _chunks(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows, with the number of the first; int64 for the types that torch hardly computes with."""
    rows = max(1, _CHECKED_VALUES // values.shape[1])
    for start in range(0, len(values), rows):
        chunk = values[start : start + rows]
        yield start, chunk.to(torch.int64) if chunk.dtype in _WIDE else chunk


def _collected(stream: Iterable[Any], name: str) -> Tensor:
    """All batches of a DataLoader as one tensor, in the type they come in."""
    if not hasattr(stream, "__len__"):
        found = f"an iterator without a length ({type(stream).__name__})"
        raise _refusal(name, found, "an array, a file or a DataLoader")
    batches: list[Tensor] = []
    for item in stream:
        batch = _rows(_tensor(item[0] if isinstance(item, (tuple, list)) else item, name), name)
        if batches and (batch.shape[1] != batches[0].shape[1] or batch.dtype != batches[0].dtype):
            wanted = f"batches like the first, {_described(batches[0])}"
            raise _refusal(name, f"a batch of {_described(batch)}", wanted)
        batches.append(batch)
    if not batches:
        raise _refusal(name, "a DataLoader without batches", "at least one")
    return torch.cat(batches)


_WIDE = {torch.uint16, torch.uint32, torch.uint64}
_NUMBERS = _WIDE | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_NUMBERS |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _tensor(data: Any, name: str) -> Tensor:
    """A tensor of numbers that shares the memory of `data` where it can."""
    if isinstance(data, Tensor):
        if data.layout != torch.strided or data.dtype not in _NUMBERS:
            raise _refusal(name, _described(data), "a dense tensor of real numbers")
        return data.detach()
    try:
        array = np.asarray(data)
    except (ValueError, TypeError, RuntimeError) as error:
        found = f"a {type(data).__name__} that is no array"
        raise _refusal(name, found, "one array or tensor, or rows of equal length") from error
    if array.dtype.kind not in "buif":
        kinds = {"U": "text", "S": "bytes", "c": "complex numbers"}
        found = (
            f"an array of {kinds.get(array.dtype.kind, str(array.dtype))}"
            if array.ndim
            else type(data).__name__
        )
        raise _refusal(name, found, "an array or tensor of real numbers, a path or a DataLoader")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(array.shape)
    with warnings.catch_warnings():  # a read-only array is fine: nothing here writes to its data
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        return torch.from_numpy(array)


def _rows(values: Tensor, name: str) -> Tensor:
    """`[N, ...]` flattened to `[N, D]` in row-major order."""
    if values.ndim < 2:
        found = "labels, one value per item" if values.ndim else "a single number"
        found = f"{found} (shape {list(values.shape)})"
        raise _refusal(name, found, "images, [N, D] or [N, H, W]")
    if values.numel() == 0:
        raise _refusal(name, f"no values (shape {list(values.shape)})", "one image or more")
    return values.reshape(len(values), -1)


# ---- words -------------------------------------------------------------------------------------------------


def _described(values: Tensor) -> str:
    layout = "" if values.layout == torch.strided else "sparse "
    return f"{layout}{str(values.dtype).removeprefix('torch.')} of shape {list(values.shape)}"


def _shown(path: _FilePath) -> str:
    """The path on one line and printable, whatever bytes a file name holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:120].rstrip(".")
