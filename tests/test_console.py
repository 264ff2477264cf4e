"""What a person reads: numbers of tables."""

from __future__ import annotations

import math

import pytest

from raykernel.console import short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (999.4, "999"),
        (999.6, "1000"),
        (-999.6, "-1000"),
        (1000.0, "1000"),
        (12345.6, "12346"),
        (999_600.0, "999600"),
        (1e6, "1e+06"),
        (1e-9, "1e-09"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (math.nan, "nan"),
    ],
)
def test_three_digits_and_no_exponent_from_a_thousandth_to_a_million(value, text):
    assert short(value) == text


@pytest.mark.parametrize("value", [10**e * m for e in range(-3, 6) for m in (1.0, 9.996, 9.994)])
def test_no_exponent_where_none_is_needed_and_three_digits_are_right(value):
    assert "e" not in short(value)
    assert float(short(value)) == pytest.approx(value, rel=5e-3)
