"""pytest bench/test_bernoulli_log_likelihood.py --benchmark-only: see pytest_cases.py."""

from typing import Any

from .pytest_cases import Case, cases


@cases("bernoulli_log_likelihood")
def test_bernoulli_log_likelihood(benchmark: Any, case: Case) -> None:
    case.run(benchmark)
