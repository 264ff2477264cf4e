"""Readings of a spectrum against closed forms, numpy's dense eigenvalues and invariances."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykernel.analysis.outputs import Outputs
from raykernel.analysis.spectrum import Spectrum, spectrum
from raykernel.errors import InputError, NotPositiveSemidefiniteError


def jacobian(n: int, c: int, p: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, c, p))


def gram_of(j: np.ndarray) -> np.ndarray:
    return np.einsum("iap,jbp->iajb", j, j)


def scalar(values) -> np.ndarray:
    """A diagonal kernel of one output, its eigenvalues given."""
    return np.diag(np.asarray(values, dtype=np.float64))[:, None, :, None]


def readings(found: Spectrum) -> dict[str, float]:
    return {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if field.name not in {"eigenvalues", "outputs", "centred"}
    }


def test_every_reading_of_a_diagonal_kernel_by_hand():
    found = spectrum(scalar([4, 1, 2, 1]), sigma=0.5)
    np.testing.assert_allclose(found.eigenvalues, [1, 1, 2, 4])
    assert found.outputs is Outputs.full
    assert (found.size, found.num_unresolved, found.top, found.bottom) == (4, 0, 4, 1)
    assert found.mean == pytest.approx(2)
    assert found.raw == found.at_least == found.truncated == pytest.approx(4)
    assert found.regularised == found.regularised_at_least == pytest.approx(4.5 / 1.5)
    assert [found.kth(k) for k in (1, 2, 3, 4)] == pytest.approx([1, 2, 4, 4])
    assert found.median == pytest.approx(2)
    assert found.top_over_mean == pytest.approx(2)
    assert found.mean_over_bottom == pytest.approx(2)
    assert found.cut(0.3) == (pytest.approx(2), 2)
    gap = math.log(2.5) - np.log([4.5, 1.5, 2.5, 1.5]).mean()
    assert found.amgm_gap == pytest.approx(gap)
    assert found.stable_rank == pytest.approx(2)
    assert found.participation == pytest.approx(64 / 22)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.25, 0.125, 0.125))
    assert found.effective_rank == pytest.approx(math.exp(entropy))
    assert found.effective_dimension == pytest.approx(4 / 4.5 + 2 / 2.5 + 2 / 1.5)


def test_identity_has_condition_one_and_full_ranks():
    found = spectrum(scalar([3.0] * 5), ridge=0.1)
    assert found.raw == found.regularised == found.truncated == pytest.approx(1)
    assert found.amgm_gap == pytest.approx(0, abs=1e-12)
    assert [found.stable_rank, found.participation, found.effective_rank] == pytest.approx([5] * 3)
    assert found.effective_dimension == pytest.approx(5 / 1.1)


def test_rank_one_update_of_the_identity():
    """I + v vᵀ has the eigenvalues 1 + |v|², 1, …, 1."""
    v = np.random.default_rng(0).normal(size=6)
    found = spectrum((np.eye(6) + np.outer(v, v))[:, None, :, None])
    np.testing.assert_allclose(found.eigenvalues, [1] * 5 + [1 + v @ v], rtol=1e-12)
    assert found.raw == pytest.approx(1 + v @ v)


def test_kronecker_product_has_the_products_of_eigenvalues():
    """K = G ⊗ M: eigenvalues multiply; if M knows no shared direction, contrasts lose its 0s."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 9)), rng.normal(size=(3, 3))
    g, m = a @ a.T, b @ b.T
    kernel = np.einsum("ij,ab->iajb", g, m)
    products = np.sort(np.outer(np.linalg.eigvalsh(g), np.linalg.eigvalsh(m)).ravel())
    full = spectrum(kernel, outputs=Outputs.full)
    np.testing.assert_allclose(full.eigenvalues, products, rtol=1e-8)
    h = np.eye(3) - 1 / 3
    within = np.linalg.eigvalsh(h @ m @ h)[1:]
    want = np.sort(np.outer(np.linalg.eigvalsh(g), within).ravel())
    np.testing.assert_allclose(spectrum(kernel).eigenvalues, want, rtol=1e-8)
    traced = spectrum(kernel, outputs=Outputs.trace)
    np.testing.assert_allclose(
        traced.eigenvalues, np.linalg.eigvalsh(g) * np.trace(m) / 3, rtol=1e-10
    )
    pseudo = spectrum(kernel, outputs=Outputs.pseudo)
    np.testing.assert_allclose(pseudo.eigenvalues, np.linalg.eigvalsh(g) * m.sum() / 3, rtol=1e-10)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("outputs", list(Outputs))
def test_every_output_map_against_the_projector_written_out(outputs, centred):
    """Nonzero eigenvalues of P K P with P = H_n or I, times I - 11ᵀ/c, 11ᵀ/c or the trace."""
    n, c = 5, 3
    kernel = gram_of(jacobian(n, c, 40))
    flat = kernel.reshape(n * c, n * c)
    by_example = np.eye(n) - centred / n
    if outputs is Outputs.trace:
        dense = by_example @ (np.einsum("iaja->ij", kernel) / c) @ by_example
    else:
        ones = np.full((c, c), 1 / c)
        by_output = {
            Outputs.full: np.eye(c),
            Outputs.contrast: np.eye(c) - ones,
            Outputs.pseudo: ones,
        }[outputs]
        p = np.kron(by_example, by_output)
        dense = p @ flat @ p
    values = np.linalg.eigvalsh(dense)
    found = spectrum(kernel, outputs=outputs, centred=centred)
    rows = {Outputs.full: c, Outputs.contrast: c - 1}.get(outputs, 1)
    assert found.size == (n - centred) * rows
    np.testing.assert_allclose(found.eigenvalues, values[values > 1e-9], rtol=1e-9)


def test_two_outputs_are_the_margin():
    """c = 2: the contrast kernel is that of (f_1 - f_0) / √2."""
    j = jacobian(6, 2, 30)
    margin = (j[:, 1] - j[:, 0]) / math.sqrt(2)
    found = spectrum(gram_of(j))
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(margin @ margin.T), rtol=1e-9)


def test_what_all_logits_share_moves_no_reading_of_the_contrast_kernel():
    """f_a(x) + g(x) for all a: the softmax, and so the default kernel, is the same."""
    j = jacobian(6, 3, 40)
    shared = j + 5 * np.random.default_rng(1).normal(size=(6, 1, 40))
    one, two = readings(spectrum(gram_of(j))), readings(spectrum(gram_of(shared)))
    one.pop("floor"), two.pop("floor")
    assert two == pytest.approx(one, rel=1e-9)
    full = [spectrum(gram_of(x), outputs=Outputs.full).raw for x in (j, shared)]
    assert full[1] > 2 * full[0]


def test_antisymmetric_head_has_no_pseudo_kernel_but_a_margin():
    """f_1 = -f_0: the sum of the logits never moves, which is no property of the classifier."""
    j = jacobian(6, 1, 30)
    both = gram_of(np.concatenate([j, -j], axis=1))
    pseudo = spectrum(both, outputs=Outputs.pseudo)
    assert pseudo.num_unresolved == pseudo.size
    assert math.isnan(pseudo.raw)
    margin = spectrum(both)
    assert margin.num_unresolved == 0
    np.testing.assert_allclose(margin.eigenvalues, 2 * np.linalg.eigvalsh(j[:, 0] @ j[:, 0].T))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 5), c=st.integers(1, 4))
def test_projections_have_a_smaller_condition_number(seed, n, c):
    """κ(Qᵀ K Q) ≤ κ(K), by the Rayleigh quotient; the trace kernel is an average of such."""
    kernel = gram_of(jacobian(n, c, n * c + 8, seed))
    full = spectrum(kernel, outputs=Outputs.full).raw
    maps = [*Outputs][2:] if c == 1 else [*Outputs]
    for outputs in maps:
        for centred in (False, True):
            found = spectrum(kernel, outputs=outputs, centred=centred)
            assert found.raw <= full * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(1e-3, 1e3))
def test_invariances(seed, factor):
    """Order of examples, rotation of outputs (full, trace) or of contrasts; scale is relative."""
    n, c = 5, 3
    rng = np.random.default_rng(seed)
    j = jacobian(n, c, 30, seed)
    base = {outputs: spectrum(gram_of(j), outputs=outputs) for outputs in Outputs}
    order = rng.permutation(n)
    rotation = np.linalg.qr(rng.normal(size=(c, c)))[0]
    rotated = np.einsum("iap,ab->ibp", j, rotation)
    relabelled = j[:, rng.permutation(c)]
    for outputs, want in base.items():
        permuted = spectrum(gram_of(j[order]), outputs=outputs)
        np.testing.assert_allclose(permuted.eigenvalues, want.eigenvalues, rtol=1e-7)
        renamed = spectrum(gram_of(relabelled), outputs=outputs)
        np.testing.assert_allclose(renamed.eigenvalues, want.eigenvalues, rtol=1e-7)
        scaled = readings(spectrum(factor * gram_of(j), outputs=outputs))
        expected = readings(want)
        for name in ("floor", "sigma", "top", "bottom", "mean"):
            expected[name] *= factor
        assert scaled == pytest.approx(expected, rel=1e-6)
    for outputs in (Outputs.full, Outputs.trace):
        turned = spectrum(gram_of(rotated), outputs=outputs)
        np.testing.assert_allclose(turned.eigenvalues, base[outputs].eigenvalues, rtol=1e-7)


def test_common_direction_of_the_examples_is_an_outlier_that_centring_takes_off():
    j = jacobian(8, 2, 60) + 20 * np.random.default_rng(3).normal(size=(1, 2, 60))
    found, centred = spectrum(gram_of(j)), spectrum(gram_of(j), centred=True)
    assert found.stable_rank < 1.1
    assert found.raw > 50 * centred.raw
    mean_free = j - j.mean(axis=0)
    again = spectrum(gram_of(mean_free))
    assert again.num_unresolved == 1  # its structural zero, of c - 1 = 1 contrast
    np.testing.assert_allclose(centred.eigenvalues, again.eigenvalues[1:], rtol=1e-9)


def test_blocks_are_summed_in_float64_with_the_resolution_of_the_worst():
    blocks = [gram_of(jacobian(4, 2, 9, seed)) for seed in range(3)]
    want = spectrum(sum(blocks[1:], blocks[0]))
    np.testing.assert_allclose(spectrum(blocks).eigenvalues, want.eigenvalues, rtol=1e-12)
    mixed = spectrum([blocks[0], blocks[1].astype(np.float32), blocks[2]], outputs=Outputs.full)
    assert mixed.floor == pytest.approx(8 * np.finfo(np.float32).eps * mixed.top)


def test_what_float32_cannot_resolve_is_flagged_and_used_by_no_reading():
    """κ = 10¹⁰ in float64; in float32 l_m is noise, and every reading says what it can."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    values = np.array([1e-10, 0.2, 0.4, 0.6, 0.8, 1.0])
    kernel = ((basis * values) @ basis.T)[:, None, :, None]
    exact = spectrum(kernel)
    assert exact.raw == pytest.approx(1e10, rel=1e-4)
    rough = spectrum(kernel.astype(np.float32))
    assert rough.num_unresolved == 1
    assert math.isnan(rough.raw)
    assert math.isnan(rough.bottom)
    assert math.isnan(rough.mean_over_bottom)
    assert 1e5 < rough.at_least <= 1e10
    assert rough.truncated == pytest.approx(5, rel=1e-5)
    assert rough.median == pytest.approx(exact.median, rel=1e-5)
    assert rough.is_ridge_covering
    assert rough.regularised_at_least <= exact.regularised <= rough.regularised
    assert rough.regularised == pytest.approx(exact.regularised, rel=0.1)
    assert not spectrum(kernel.astype(np.float32), ridge=1e-9).is_ridge_covering


def test_noise_of_a_projection_is_that_of_the_whole_kernel():
    """Logits share a direction 10⁴ times the contrasts: float32 entries hold no contrast."""
    n = 6
    shared, contrast = jacobian(n, 1, 20, 1) * 1e4, jacobian(n, 2, 20, 2)
    kernel = gram_of(shared + contrast)
    fine, rough = spectrum(kernel), spectrum(kernel.astype(np.float32))
    assert fine.num_unresolved == 0
    assert rough.num_unresolved == rough.size
    assert math.isnan(rough.raw)
    assert math.isnan(rough.truncated)
    assert rough.effective_rank == 0


def test_duplicates_spoil_the_raw_number_but_not_the_median():
    j = jacobian(8, 2, 60)
    twice = j.copy()
    twice[1] = j[0] + 1e-4 * j[1]
    one, two = spectrum(gram_of(j)), spectrum(gram_of(twice))
    assert two.raw > 1e5 * one.raw
    assert two.median < 2 * one.median
    assert two.effective_rank > one.effective_rank - 2


def test_kernel_of_nothing():
    """A key bias moves no output: its kernel is exactly 0."""
    found = spectrum(np.zeros((3, 2, 3, 2)))
    assert found.num_unresolved == found.size == 3
    assert math.isnan(found.raw)
    assert math.isnan(found.regularised)
    assert math.isnan(found.amgm_gap)
    assert found.stable_rank == found.effective_dimension == 0


def test_wrong_input_is_named():
    kernel = gram_of(jacobian(3, 2, 9))
    with pytest.raises(InputError, match="expected one shape"):
        spectrum([kernel, kernel[:2, :, :2]])
    with pytest.raises(InputError, match="at least one kernel"):
        spectrum([])
    with pytest.raises(InputError, match="rows and columns"):
        spectrum(kernel[:2])
    with pytest.raises(InputError, match="transpose"):
        spectrum(np.random.default_rng(0).normal(size=(3, 2, 3, 2)))
    with pytest.raises(NotPositiveSemidefiniteError):
        spectrum(-kernel)
    with pytest.raises(InputError, match="single output"):
        spectrum(kernel[:, :1, :, :1], outputs=Outputs.contrast)
    with pytest.raises(InputError, match="ridge"):
        spectrum(kernel, ridge=-1.0)
    with pytest.raises(InputError, match="two"):
        spectrum(kernel[:1, :, :1], centred=True)
    with pytest.raises(InputError, match="expected 1 to 3"):
        spectrum(kernel).kth(4)


def test_noise_is_at_least_what_is_known_of_it():
    """A floor that is given, and the size of an eigenvalue below zero."""
    assert spectrum(scalar([4.0, 1.0, 0.5]), floor=0.7).num_unresolved == 1
    assert spectrum(scalar([4.0, 1.0, 0.5]), floor=5.0).num_unresolved == 3
    negative = spectrum(scalar([4.0, 1e-6, -2e-6]))
    assert negative.floor == pytest.approx(2e-6)
    assert negative.num_unresolved == 2
