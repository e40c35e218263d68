"""pytest bench/test_reparameterize_with_kl.py --benchmark-only: see pytest_cases.py."""

from typing import Any

from .pytest_cases import Case, cases


@cases("reparameterize_with_kl")
def test_reparameterize_with_kl(benchmark: Any, case: Case) -> None:
    case.run(benchmark)
