"""The benchmark of the name server reads what dnsperf says."""

from __future__ import annotations

import pytest

from tests.bench.names import Load, read_load, state

REPORT = """\
Statistics:

  Queries sent:         278003
  Queries completed:    277996
  Queries lost:         7 (0.00%)

  Run time (s):         4.000123
  Queries per second:   69496.862941
"""


def test_rate_and_losses() -> None:
    assert read_load(REPORT) == Load(69496.862941, 7)


def test_what_is_no_report_is_not_taken_for_one() -> None:
    with pytest.raises(ValueError, match="unable to open"):
        read_load("Error: unable to open file: questions")


def test_each_of_100_000_names_has_an_address_of_its_own() -> None:
    endpoints = state(100_000).endpoints
    assert len({e.name for e in endpoints}) == len({e.addresses for e in endpoints}) == 100_000
