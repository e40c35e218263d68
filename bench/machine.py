"""Where a benchmark ran: the machine, its free memory, and what a result must say to be repeated."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = (
    Path(__file__).resolve().parent.parent
)  # of the checkout; of an installed package that holds this folder


def output(*command: str) -> str:
    """What a command prints, run in ROOT; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe(command: str) -> dict[str, Any]:
    """Commit, versions, system and command."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    checkout = (ROOT / ".git").exists()  # or git would speak of a repository that the environment lies in
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "commit": output("git", "rev-parse", "HEAD") if checkout else "",
        "uncommitted_changes": checkout
        and bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: installed(name) for name in ("vae-fast", "torch", "triton", "jax", "numpy")},
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def name(device: Any) -> str:
    """The GPU, or the processor and the threads that torch uses."""
    import torch

    from vae_fast.report import _processor

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def free_bytes(device: Any) -> float:
    """Memory to be had, within the container's limit if it has one; infinity where nobody says."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        free.append(1024 * int(meminfo.split("MemAvailable:")[1].split()[0]))
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    except (OSError, IndexError, ValueError):
        pass  # not Linux, or no limit
    return min(free, default=float("inf"))
