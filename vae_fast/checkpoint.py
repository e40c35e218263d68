"""Checkpoints: tensors and JSON in one file that is the old one or the new one, never half of one.

File format: safetensors. Its metadata holds one entry, ``vae_fast``, a JSON object ``{"format": 1, "meta":
...}``. Tensors and JSON are in the same file so that one rename makes both appear together.

A new file is written under a temporary name in the same directory, fsynced, and renamed over the previous
one; then the directory is fsynced. A process killed at any moment leaves the previous checkpoint whole. A
temporary file that it left behind is removed by the next save of the same name.

Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

try:
    import fcntl
except ImportError:  # no file locks on this platform: temporaries of killed runs are then left alone
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
_KEY = "vae_fast"
_HEADER_LIMIT = 100_000_000  # bytes; safetensors refuses to read a longer header
_WRITE_BYTES = 1 << 24
# What safetensors raises for the many ways in which a file can be wrong.
_BROKEN = (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, OverflowError)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; one sentence: file, what was found, what was wanted."""


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` to `path` atomically; on return they have reached the disk.

    Args:
        path: the file; missing folders are made. A symbolic link is followed, so that its target is replaced.
        tensors: any shapes (scalars, empty, views), devices and real dtypes; every bit is kept, on the CPU.
        meta: JSON values only (dict with str keys, list, str, int, float, bool, None). Integers of any size
            and floats, NaN and infinities included, come back equal; a tuple comes back as a list.

    Raises:
        CheckpointError: the file cannot be written (disk full, no permission). The previous file is then
            whole and nothing else is left in the directory.
        TypeError: a tensor or a value of `meta` that the format cannot hold.
    """
    target = os.path.realpath(path)
    payload = _serialize(tensors, meta)
    if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
        raise _refusal(path, "a device or pipe, which is not replaced", "a file, or none yet")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _remove_stale(target)
        with _temporary(target) as (fd, temporary):
            _write_all(fd, payload)
            os.fsync(fd)
            os.replace(temporary, target)
        _sync_directory(os.path.dirname(target))
    except OSError as error:
        found = f"an error while writing ({error.strerror or _one_line(error)})"
        raise _refusal(path, found, f"a writable place with {len(payload):,} bytes free") from error


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read `(tensors, meta)` as :func:`save` wrote them; tensors are on the CPU and own their memory.

    Raises:
        CheckpointError: missing, truncated, damaged or hostile files, files of another kind (a pickle is
            never opened) and files of a newer format.
    """
    data = _read(path)
    try:
        tensors = safetensors.torch.load(data)
    except _BROKEN as error:
        raise _refusal(
            path, f"{_kind(data)} ({_one_line(error)})", "a whole checkpoint of vae-fast"
        ) from error
    (header_bytes,) = struct.unpack("<Q", data[:8])
    entry = (json.loads(data[8 : 8 + header_bytes]).get("__metadata__") or {}).get(_KEY)
    if entry is None:
        raise _refusal(path, "a safetensors file without vae-fast metadata")
    try:
        content = json.loads(entry)
        version, meta = content["format"], content["meta"]
        if type(version) is not int or not isinstance(meta, dict):
            raise TypeError("format or meta of the wrong type")
        if version == FORMAT:
            if unknown := content.keys() - {"format", "crc32", "meta"}:
                raise ValueError(f"unknown entry {min(unknown)!r}")
            checksum = _checksum(tensors, meta)
            if content.get("crc32", checksum) != checksum:  # older ones have none
                raise ValueError("its checksum is that of other content")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refusal(path, f"damaged metadata ({_one_line(error)})") from error
    if version != FORMAT:
        raise _refusal(path, f"checkpoint format {version}", f"format {FORMAT}, which this version reads")
    return tensors, meta


# ---- bytes of a checkpoint ---------------------------------------------------------------------------------


def _serialize(tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> bytes:
    if not isinstance(meta, dict):
        raise TypeError(f"meta: found {type(meta).__name__}; wanted a dict")
    _check_json(meta, "meta")
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(f"tensors: found the name {name!r}; wanted a str other than '__metadata__'")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"tensors[{name!r}]: found {_described(tensor)}; wanted a dense tensor")
        # Own, contiguous memory for each: safetensors refuses views and tensors that share storage.
        host = tensor.detach().cpu()
        plain[name] = host.clone(memory_format=torch.contiguous_format)
    content = {"format": FORMAT, "crc32": _checksum(plain, meta), "meta": meta}
    text = json.dumps(content, separators=(",", ":"))
    try:
        payload = safetensors.torch.save(plain, metadata={_KEY: text})
    except (SafetensorError, ValueError, KeyError) as error:
        raise TypeError(f"tensors: found what safetensors cannot hold ({_one_line(error)})") from error
    (header_bytes,) = struct.unpack("<Q", payload[:8])
    if header_bytes > _HEADER_LIMIT:
        raise TypeError(f"meta: found {header_bytes:,} bytes of JSON; wanted at most {_HEADER_LIMIT:,}")
    return payload


def _checksum(tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> int:
    """Of every name, type, shape, byte and value: a bit that a disk has turned is found."""
    found = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def _check_json(value: Any, where: str) -> None:
    """Refuses, with its place, what would not come back equal: json.dumps turns the key 1 into "1"."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: found the key {key!r}; wanted str keys")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise TypeError(f"{where}: found {_described(value)}; wanted a JSON value")


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
            raise _refusal(path, "no regular file")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise _refusal(path, "no such file") from error
    except OSError as error:
        raise _refusal(path, f"an unreadable file ({error.strerror})") from error


def _kind(data: bytes) -> str:
    if not data:
        return "an empty file"
    if data[:4] == b"PK\x03\x04" or data[:1] == b"\x80":
        return "a pickle or zip file, as torch.save writes, which is never opened"
    return f"{len(data):,} bytes that are not a whole safetensors file"


# ---- the way to the disk -----------------------------------------------------------------------------------


@contextmanager
def _temporary(target: str) -> Iterator[tuple[int, str]]:
    """A new file beside `target`, removed when the block fails.

    It is locked, which tells it from one that a killed run left behind.
    """
    while True:
        temporary = f"{_temporary_prefix(target)}{secrets.token_hex(8)}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(fd, wait=True)
        # Another save may have taken the file for a stale one between the two calls above.
        if os.path.exists(temporary):
            break
        os.close(fd)
    try:
        yield fd, temporary
    except BaseException:  # KeyboardInterrupt too
        with suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(fd)


def _remove_stale(target: str) -> None:
    directory, prefix = os.path.split(_temporary_prefix(target))
    ours = re.compile(re.escape(prefix) + r"[0-9a-f]{16}\.tmp")
    for name in os.listdir(directory):
        if not ours.fullmatch(name):
            continue
        stale = os.path.join(directory, name)
        with suppress(OSError):  # gone already, or not ours to remove
            fd = os.open(stale, os.O_RDWR)
            try:
                if _lock(fd, wait=False):
                    os.unlink(stale)
            finally:
                os.close(fd)


def _temporary_prefix(target: str) -> str:
    directory, name = os.path.split(target)
    return os.path.join(directory, f".{name}.")


def _lock(fd: int, *, wait: bool) -> bool:
    """True when the lock is held. The kernel drops it when its process ends, however it ends."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by a living process, or a file system without locks
        return False
    return True


def _write_all(fd: int, payload: bytes) -> None:
    rest = memoryview(payload)
    while rest:
        rest = rest[os.write(fd, rest[:_WRITE_BYTES]) :]


def _sync_directory(directory: str) -> None:
    """Make the rename itself durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no fsync of a directory
            raise
    finally:
        os.close(fd)


# ---- words -------------------------------------------------------------------------------------------------


def _refusal(
    path: str | os.PathLike[str], found: str, wanted: str = "a checkpoint of vae-fast"
) -> CheckpointError:
    return CheckpointError(f"{_shown(path)}: found {found}; wanted {wanted}")


def _shown(path: str | os.PathLike[str]) -> str:
    """The path on one line and printable, whatever bytes a file name holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.layout).removeprefix('torch.')} tensor of {value.dtype} {list(value.shape)}"
    return f"an object of type {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:200].rstrip(".")
