"""A checkpoint holds every bit, is the old one or the new one whatever happens, and is never a pickle."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import resource
import signal
import stat
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vae_fast import checkpoint
from vae_fast.checkpoint import CheckpointError, load, save

OLD = {"w": torch.arange(6.0).reshape(2, 3)}
NEW = {"w": torch.full((2, 3), 7.0), "big": torch.arange(10_000.0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "model.safetensors"


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return (
        tensor.dtype,
        tuple(tensor.shape),
        flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"",
    )


def is_old(path: Path) -> bool:
    tensors, meta = load(path)
    return meta == {"step": 1} and bits(tensors["w"]) == bits(OLD["w"]) and tensors.keys() == OLD.keys()


def is_new(path: Path) -> bool:
    tensors, meta = load(path)
    return meta == {"step": 2} and {k: bits(v) for k, v in tensors.items()} == {
        k: bits(v) for k, v in NEW.items()
    }


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert ": found " in message and "; wanted " in message and "\n" not in message, message
    for word in words:
        assert word in message, message


# ---- what comes back ---------------------------------------------------------------------------------------

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.bool,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_dtype_comes_back(path: Path, dtype: torch.dtype) -> None:
    # Random bits: NaNs with payloads, infinities, denormals and both zeros are among them.
    raw = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    save(path, {"t": tensor}, {})
    assert bits(load(path)[0]["t"]) == bits(tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.zeros(0, 3),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.arange(12).reshape(3, 4).t(),
        torch.arange(12)[::5],
        torch.ones(1).expand(3, 4),
        torch.nn.Parameter(torch.ones(2)),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    ],
    ids=[
        "scalar",
        "empty",
        "no columns",
        "transposed",
        "strided",
        "expanded",
        "parameter",
        "conjugate",
        "negative",
    ],
)
def test_tensors_of_any_form_come_back(path: Path, tensor: Tensor) -> None:
    save(path, {"t": tensor}, {})
    loaded = load(path)[0]["t"]
    assert bits(loaded) == bits(tensor.resolve_conj().resolve_neg())
    assert loaded.is_contiguous() and not loaded.requires_grad


def test_tensors_that_share_memory_come_back_apart(path: Path) -> None:
    whole = torch.arange(4.0)
    save(path, {"whole": whole, "same": whole, "part": whole[1:3]}, {})
    tensors, _ = load(path)
    tensors["whole"].zero_()
    assert tensors["same"].tolist() == [0, 1, 2, 3] and tensors["part"].tolist() == [1, 2]


def test_no_tensors_at_all(path: Path) -> None:
    save(path, {}, {"step": 1})
    assert load(path) == ({}, {"step": 1})


def test_a_tensor_on_a_device_comes_back_on_the_cpu(path: Path, device: torch.device) -> None:
    save(path, {"t": torch.arange(3.0, device=device)}, {})
    assert load(path)[0]["t"].device.type == "cpu" and load(path)[0]["t"].tolist() == [0, 1, 2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(meta=st.dictionaries(st.text(), json_values, max_size=4))
@example(meta={"seed": 2**64 - 1, "huge": -(10**400), "tiny": 5e-324, "tenth": 0.1, "minus zero": -0.0})
@example(meta={'quotes " and \\': "\ud800 alone, \U0001f600, \x00", "__metadata__": {"format": 2}})
def test_json_comes_back_exactly(path: Path, meta: dict[str, Any]) -> None:
    save(path, {}, meta)
    loaded = load(path)[1]
    assert loaded == meta and repr(loaded) == repr(meta)  # repr tells 1 from 1.0 and 0.0 from -0.0


def test_nan_and_infinities_in_json_come_back(path: Path) -> None:
    save(path, {}, {"bounds": [math.nan, math.inf, -math.inf]})
    nan, inf, minus_inf = load(path)[1]["bounds"]
    assert math.isnan(nan) and inf == math.inf and minus_inf == -math.inf


def test_the_same_content_gives_the_same_bytes(path: Path) -> None:
    save(path, NEW, {"a": 1, "b": 2})
    first = path.read_bytes()
    save(path, NEW, {"a": 1, "b": 2})
    assert path.read_bytes() == first


def test_others_can_read_the_tensors(path: Path) -> None:
    save(path, OLD, {"step": 1})
    assert torch.equal(safetensors.torch.load_file(path)["w"], OLD["w"])
    with safetensors.safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["vae_fast"])
        assert isinstance(content.pop("crc32"), int) and content == {"format": 1, "meta": {"step": 1}}


@pytest.mark.parametrize(
    ("tensors", "meta", "words"),
    [
        ({}, {"a": {1: 2}}, "meta['a']: found the key 1; wanted str keys"),
        ({}, {"a": [0, torch.ones(2)]}, "meta['a'][1]: found a strided tensor of torch.float32 [2]"),
        ({}, {"a": {1, 2}}, "meta['a']: found an object of type set; wanted a JSON value"),
        ({}, [1], "meta: found list; wanted a dict"),
        ({"t": 1.0}, {}, "tensors['t']: found an object of type float; wanted a dense tensor"),
        ({"t": torch.ones(2).to_sparse()}, {}, "tensors['t']: found a sparse_coo tensor"),
        ({"__metadata__": torch.ones(2)}, {}, "tensors: found the name '__metadata__'"),
        ({"t": torch.ones(2, dtype=torch.complex128)}, {}, "complex128"),
    ],
)
def test_what_would_not_come_back_is_refused_before_anything_is_written(
    path: Path, tensors: Any, meta: Any, words: str
) -> None:
    with pytest.raises(TypeError) as caught:
        save(path, tensors, meta)
    assert words in str(caught.value)
    assert not path.parent.exists()


def test_json_longer_than_a_header_may_be_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_HEADER_LIMIT", 1000)
    with pytest.raises(TypeError, match="wanted at most 1,000"):
        save(path, {}, {"text": "x" * 1000})


# ---- killed at any moment ----------------------------------------------------------------------------------


def in_child(action: Callable[[], object]) -> int:
    """Runs `action` in a fork of this process; its exit status, negative for the signal that killed it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads, of which the child uses none
        child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(moment: str) -> Callable[[], None]:
    """save(path, NEW, ...) in a process that is killed at that moment of it."""
    real_write, writes = os.write, 0

    def write(fd: int, data: Any) -> int:
        nonlocal writes
        writes += 1
        if moment == f"write {writes}":
            real_write(fd, data[: len(data) // 2])
            die()
        return real_write(fd, data)

    def dying(function: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if not before:
                function(*args)
            die()

        return call

    def arm() -> None:
        checkpoint._WRITE_BYTES = 10_000
        os.write = write  # type: ignore[assignment]
        if "fsync" in moment:
            os.fsync = dying(os.fsync, before="before" in moment)
        if "rename" in moment:
            os.replace = dying(os.replace, before="before" in moment)

    return arm


@pytest.mark.parametrize(
    "moment",
    ["write 1", "write 2", "write 4", "before fsync", "after fsync", "before rename", "after rename"],
)
def test_a_kill_leaves_a_whole_checkpoint_and_the_next_save_cleans_up(path: Path, moment: str) -> None:
    save(path, OLD, {"step": 1})
    arm = killed_at(moment)
    assert in_child(lambda: (arm(), save(path, NEW, {"step": 2}))) == -signal.SIGKILL
    assert is_new(path) if moment == "after rename" else is_old(path)
    left = 0 if moment == "after rename" else 1
    assert len(list(path.parent.iterdir())) == 1 + left
    save(path, NEW, {"step": 2})
    assert is_new(path) and list(path.parent.iterdir()) == [path]


def test_a_kill_at_a_random_moment_leaves_a_whole_checkpoint(path: Path) -> None:
    """Checkpoint n is full of n's, so that a mixture of two would show."""

    def save_for_ever() -> None:
        n = 0
        while True:
            n += 1
            save(path, {f"{i}": torch.full((1000,), n) for i in range(20)}, {"n": n})

    save(path, {f"{i}": torch.zeros(1000, dtype=torch.int64) for i in range(20)}, {"n": 0})
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                save_for_ever()
            finally:
                os._exit(1)
        time.sleep(0.02 + 0.05 * float(torch.rand((), generator=generator)))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        tensors, meta = load(path)
        assert len(tensors) == 20 and all((tensor == meta["n"]).all() for tensor in tensors.values())
        assert len(list(path.parent.iterdir())) <= 2  # temporaries do not pile up


def test_the_temporary_of_a_living_process_is_left_alone(path: Path) -> None:
    with_temporary = checkpoint._temporary
    path.parent.mkdir()
    with with_temporary(str(path)) as (_, temporary):
        save(path, NEW, {"step": 2})
        assert os.path.exists(temporary)
        os.unlink(temporary)
    assert is_new(path)


def test_a_temporary_taken_for_a_stale_one_before_it_is_locked_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, locked = checkpoint._lock, []

    def meddled(fd: int, *, wait: bool) -> bool:
        if wait and not locked:
            for temporary in path.parent.glob(".*.tmp"):
                locked.append(temporary)
                temporary.unlink()
        return lock(fd, wait=wait)

    monkeypatch.setattr(checkpoint, "_lock", meddled)
    save(path, NEW, {"step": 2})
    assert locked and is_new(path)


def test_files_of_others_are_left_alone(path: Path) -> None:
    path.parent.mkdir()
    for name in (".model.safetensors.notes.tmp", ".other.safetensors.0123456789abcdef.tmp", "x.tmp"):
        (path.parent / name).touch()
    save(path, NEW, {"step": 2})
    assert len(list(path.parent.iterdir())) == 4


# ---- full disk and the like --------------------------------------------------------------------------------


def failing(number: int, after: int = 0) -> Callable[..., int]:
    calls = 0

    def fail(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        return real(*args)

    real = os.write
    return fail


@pytest.mark.parametrize(
    ("function", "failure", "words"),
    [
        ("write", failing(errno.ENOSPC), "No space left on device"),
        ("write", failing(errno.ENOSPC, after=3), "No space left on device"),
        ("fsync", failing(errno.EIO), "Input/output error"),
        ("replace", failing(errno.EACCES), "Permission denied"),
    ],
    ids=["no space", "no more space", "fsync", "rename"],
)
def test_a_failed_write_leaves_the_previous_checkpoint_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, function: str, failure: Any, words: str
) -> None:
    save(path, OLD, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_WRITE_BYTES", 10_000)
        patch.setattr(os, function, failure)
        refused(lambda: save(path, NEW, {"step": 2}), str(path), words, "bytes free")
    assert is_old(path) and list(path.parent.iterdir()) == [path]


def test_a_real_limit_on_the_file_size_leaves_the_previous_checkpoint(path: Path) -> None:
    save(path, OLD, {"step": 1})

    def beyond_the_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        refused(lambda: save(path, NEW, {"step": 2}), "File too large")

    assert in_child(beyond_the_limit) == 0
    assert is_old(path) and list(path.parent.iterdir()) == [path]


def test_an_interrupt_during_a_write_leaves_the_previous_checkpoint(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    save(path, OLD, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(path, NEW, {"step": 2})
    assert is_old(path) and list(path.parent.iterdir()) == [path]


def test_writes_that_the_system_cuts_short_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1001]))
    save(path, NEW, {"step": 2})
    assert is_new(path)


def test_file_and_directory_are_synced_before_and_after_the_rename(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        events.append("sync " + os.readlink(f"/proc/self/fd/{fd}").rpartition(".")[2])
        fsync(fd)

    def noted_replace(source: str, target: str) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save(path, NEW, {"step": 2})
    assert events == ["sync tmp", "rename", f"sync {path.parent}"]


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(lambda: save(tmp_path / "file" / "a.safetensors", NEW, {}), "file/a.safetensors", "while writing")
    refused(lambda: save(tmp_path, NEW, {}), str(tmp_path), "Is a directory")


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    link, target = tmp_path / "a.safetensors", tmp_path / "big disk" / "b.safetensors"
    link.symlink_to(target)
    save(link, NEW, {"step": 2})
    assert link.is_symlink() and not target.is_symlink() and is_new(target)


# ---- files that are refused --------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(offsets: list[int], shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": offsets}


def ours(text: str) -> dict[str, Any]:
    return {"__metadata__": {"vae_fast": text}}


REFUSED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("an empty file",)),
    "short": (b"\x01\x02", ("2 bytes",)),
    "text": (b"<html><body>Not found</body></html>", ("not a whole safetensors file",)),
    "pickle": (pickle.dumps({"w": 1}), ("pickle", "never opened")),
    "torch.save": (b"PK\x03\x04" + bytes(60), ("pickle", "never opened")),
    "absurd header length": (raw({}, length=2**63), ("not a whole safetensors file",)),
    "header longer than the file": (raw({}, length=50), ("not a whole safetensors file",)),
    "header that is no JSON": (raw(b"{{{{{{{{"), ("not a whole safetensors file",)),
    "header of the wrong type": (raw([1]), ("not a whole safetensors file",)),
    "offsets beyond the file": (raw({"a": entry([0, 4])}, b"\0\0"), ("not a whole safetensors file",)),
    "offsets that overlap": (raw({"a": entry([0, 4]), "b": entry([2, 6])}, bytes(6)), ("whole safetensors",)),
    "offsets with a hole": (
        raw({"a": entry([0, 4]), "b": entry([8, 12])}, bytes(12)),
        ("whole safetensors",),
    ),
    "offsets backwards": (raw({"a": entry([4, 0])}, bytes(4)), ("whole safetensors",)),
    "shape that overflows": (raw({"a": entry([0, 4], [2**62, 2**62])}, bytes(4)), ("whole safetensors",)),
    "shape that disagrees": (raw({"a": entry([0, 4], [2])}, bytes(4)), ("whole safetensors",)),
    "unknown dtype": (raw({"a": entry([0, 4], dtype="Q8")}, bytes(4)), ("whole safetensors",)),
    "trailing bytes": (raw({"a": entry([0, 4])}, bytes(9)), ("whole safetensors",)),
    "foreign": (raw({"a": entry([0, 4])}, bytes(4)), ("without vae-fast metadata",)),
    "foreign with metadata": (raw({"__metadata__": {"format": "pt"}}), ("without vae-fast metadata",)),
    "null metadata": (raw({"__metadata__": None}), ("found", "vae-fast")),
    "damaged metadata": (raw(ours("{")), ("damaged metadata",)),
    "deep metadata": (raw(ours("[" * 100_000)), ("damaged metadata",)),
    "metadata of the wrong type": (raw(ours("[1]")), ("damaged metadata",)),
    "meta of the wrong type": (raw(ours('{"format": 1, "meta": 3}')), ("damaged metadata",)),
    "no format": (raw(ours('{"meta": {}}')), ("damaged metadata",)),
    "newer format": (raw(ours('{"format": 2, "meta": {}}')), ("checkpoint format 2", "format 1")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_file_is_refused(tmp_path: Path, what: str) -> None:
    content, words = REFUSED[what]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(lambda: load(path), str(path), *words)


def test_a_missing_file_a_directory_and_a_pipe_are_refused(tmp_path: Path) -> None:
    refused(lambda: load(tmp_path / "a"), str(tmp_path / "a"), "no such file")
    refused(lambda: load(tmp_path), "no regular file")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: load(tmp_path / "pipe"), "no regular file")


def test_every_truncation_is_refused(path: Path) -> None:
    save(path, OLD, {"step": 1})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(lambda: load(path), str(path))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_never_worse(path: Path, data: st.DataObject) -> None:
    tensors = {**OLD, "b": torch.ones(3, dtype=torch.bfloat16), "e": torch.zeros(0, 2)}
    content = bytearray(checkpoint._serialize(tensors, {"step": 1}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        tensors, meta = load(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert isinstance(meta, dict) and all(isinstance(tensor, Tensor) for tensor in tensors.values())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_bit_that_has_turned_is_found(path: Path, data: st.DataObject) -> None:
    tensors = {**OLD, "b": torch.ones(3, dtype=torch.bfloat16), "s": torch.tensor(True)}
    meta = {"step": 1, "losses": [0.1, float("nan")], "of": ("x", None)}
    content = bytearray(checkpoint._serialize(tensors, meta))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if bytes(content[place : place + 1]).isspace() or b" " in content[max(0, place - 1) : place + 2]:
        return  # blanks that fill the header up, or stand between its parts
    refused(lambda: load(path), str(path))


def test_a_checkpoint_from_before_checksums_is_read(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"format": 1, "meta": {"step": 1}})
    safetensors.torch.save_file(OLD, path, metadata={"vae_fast": text})
    assert is_old(path)


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: save(tmp_path / "pipe", NEW, {}), "pipe", "a device or pipe")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_loaded_tensors_do_not_depend_on_the_file(path: Path) -> None:
    save(path, OLD, {"step": 1})
    tensors, _ = load(path)
    path.write_bytes(b"")
    tensors["w"].add_(1)
    assert torch.equal(tensors["w"], OLD["w"] + 1)
