"""The build backend (PEP 517): setuptools, building against the torch that the package will run with.

An extension runs only with the torch it was built against, but pip builds in an isolated environment, which
does not see the packages of the one being installed into. The interpreter is the same, though: its site-
packages can be found, and the torch there used. Only where there is none is torch a build requirement; pip
then takes the same release for the build and for the run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from setuptools import build_meta

    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        raise ImportError
except ImportError:
    raise SystemExit(
        "vae-fast: building without isolation needs setuptools 77 or newer here: "
        "pip install -U 'setuptools>=77' ninja, then install again"
    ) from None

ROOT = Path(__file__).resolve().parent

build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def _torch_requirement() -> tuple[str, tuple[int, ...]]:
    """What pyproject.toml asks of torch: ("torch>=2.11", (2, 11))."""
    requirement = re.search(r'"(torch>=([\d.]+))"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert requirement, "pyproject.toml names torch>=X.Y among the dependencies"
    return requirement[1], tuple(map(int, requirement[2].split(".")))


def _site_packages() -> list[str]:
    """Where the environment being installed into keeps packages, seen from an isolated build too."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folders))


def _environment_torch() -> str | None:
    """The folder that holds a torch new enough, or None."""
    _, minimum = _torch_requirement()
    for folder in _site_packages():
        for torch in importlib.metadata.distributions(name="torch", path=[folder]):
            if tuple(map(int, re.findall(r"\d+", torch.version)[:2])) >= minimum:
                return folder
    return None


def _requires() -> list[str]:
    if importlib.util.find_spec("torch") or _environment_torch():
        return []
    return [_torch_requirement()[0]]


def _use_torch() -> None:
    if importlib.util.find_spec("torch") is None and (folder := _environment_torch()):
        sys.path.append(folder)  # last: what the build environment has of its own comes first


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _requires()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _requires()


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    _use_torch()
    for stale in (ROOT / "build").glob("lib*"):  # setuptools would pack what an earlier build left there
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    _use_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
