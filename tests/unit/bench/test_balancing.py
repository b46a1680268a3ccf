"""The benchmark of services reads what wrk says, and takes no failure for a figure."""

from __future__ import annotations

import pytest

from tests.bench.balancing import read_requests

REPORT = """\
  61034 requests in 3.00s, 10.13MB read
{}Requests/sec:  20334.12
Transfer/sec:      3.37MB
"""


def test_rate_and_what_was_refused() -> None:
    assert read_requests(REPORT.format("")) == (20334.12, 0)
    refused = "  Non-2xx or 3xx responses: 61030\n"
    assert read_requests(REPORT.format(refused)) == (20334.12, 61030)


def test_requests_that_failed_are_no_rate() -> None:
    with pytest.raises(AssertionError, match="connect 0, read 3"):
        read_requests(REPORT.format("  Socket errors: connect 0, read 3, write 0, timeout 0\n"))
