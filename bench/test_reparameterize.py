"""pytest bench/test_reparameterize.py --benchmark-only: see pytest_cases.py."""

from typing import Any

from .pytest_cases import Case, cases


@cases("reparameterize")
def test_reparameterize(benchmark: Any, case: Case) -> None:
    case.run(benchmark)
