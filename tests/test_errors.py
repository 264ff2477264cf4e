"""Error messages end in names that help."""

from __future__ import annotations

from raykernel.errors import nearest


def test_nearest_names_the_likeliest_spellings():
    assert nearest("ridgee", ["ridge", "logistic"]) == "did you mean 'ridge'?"


def test_nearest_lists_all_choices_where_none_is_near():
    assert nearest("x", ["beta", "alpha"]) == "choose one of alpha, beta."


def test_nearest_lists_no_more_than_fits_a_screen():
    found = nearest("x", [f"layer{i:03d}" for i in range(200)])
    assert "layer029" in found
    assert "layer030" not in found
    assert found.endswith("(200 in all).")
