"""pytest bench/test_gaussian_kl.py --benchmark-only: see pytest_cases.py."""

from typing import Any

from .pytest_cases import Case, cases


@cases("gaussian_kl")
def test_gaussian_kl(benchmark: Any, case: Case) -> None:
    case.run(benchmark)
