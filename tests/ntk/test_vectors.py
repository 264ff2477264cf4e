import pytest
import torch

from raykernel.errors import NonFiniteError
from raykernel.ntk import contract
from raykernel.ntk.capture import Tracer
from raykernel.ntk.contract import grams
from raykernel.ntk.factors import Rows
from raykernel.ntk.pairs import direct
from raykernel.ntk.signed import signed
from raykernel.ntk.vectors import Pair, together
from raykernel.terms import Kind
from tests import cases
from tests.cases import normal

SIGNS = (Kind.signgd, Kind.asigngd, Kind.asigngd_flipped)
LENGTHS = (5, 3, 5, 5, 3)


def parts(n, seed):
    return [Rows(normal(n, 2, p, seed=seed + k), p) for k, p in enumerate(LENGTHS)]


def pairs_of(own, other):
    return [Pair(f"w{k}", a, b) for k, (a, b) in enumerate(zip(own, other, strict=True))]


@pytest.mark.parametrize("max_bytes", [1, 700, 1 << 20])
@pytest.mark.parametrize("symmetric", [True, False])
def test_small_pairs_together_are_the_pairs_apart(max_bytes, symmetric):
    """Of two lengths, in any order; of one side twice, and of two sides."""
    own = parts(4, seed=0)
    pairs = pairs_of(own, own if symmetric else parts(3, seed=9))
    options = {"dead_zone": 0.1, "max_bytes": max_bytes}
    blocks = together(pairs, (Kind.sgd, *SIGNS), **options)
    alone = together(pairs, (Kind.sgd,), **options)
    for by_kind, of_sgd, pair in zip(blocks, alone, pairs, strict=True):
        g, h = (part.gradients.flatten(0, 1) for part in (pair.left, pair.right))
        a, b = (
            torch.where(x.abs() <= 0.1 * x.square().mean(1, keepdim=True).sqrt(), 0, x.sign())
            for x in (g, h)
        )
        expected = {
            Kind.sgd: g @ h.mT,
            Kind.signgd: a @ b.mT,
            Kind.asigngd: g @ b.mT,
            Kind.asigngd_flipped: a @ h.mT,
        }
        torch.testing.assert_close(by_kind, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_sgd[Kind.sgd], g @ h.mT, rtol=1e-12, atol=1e-12)
        assert not symmetric or torch.equal(by_kind[Kind.sgd], by_kind[Kind.sgd].mT)
    assert together([], SIGNS, **options) == []


def test_an_overflow_names_parameter_and_example():
    own = parts(4, seed=0)
    own[2].gradients[3, 1, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^w2: the gradient of example 3 .* overflows"):
        together(pairs_of(own, own), SIGNS, dead_zone=0.1, max_bytes=1 << 20)


@pytest.mark.parametrize("kinds", [(Kind.sgd,), (Kind.sgd, *SIGNS)])
def test_biases_and_norms_are_not_contracted_one_by_one(monkeypatch, kinds):
    case = cases.transformer_case("roberta")
    capture = Tracer(case.model, case.readout, signs=True).capture(case.batch)
    vectors = {
        name: uses[0]
        for own in capture.parts.values()
        for name, uses in own.items()
        if [type(part) for part in uses] == [Rows]
    }
    calls = []

    def watched(function):
        def call(left, *args, **more):
            uses = left if isinstance(left, tuple | list) else [left]
            calls.extend(part for part in uses if any(part is own for own in vectors.values()))
            return function(left, *args, **more)

        return call

    monkeypatch.setattr(contract, "direct", watched(direct))
    monkeypatch.setattr(contract, "signed", watched(signed))
    found = grams(capture, capture, kinds=kinds)
    assert len(vectors) > 10
    assert not calls
    monkeypatch.setattr(contract, "is_small", lambda pair: False)
    apart = grams(capture, capture, kinds=kinds)
    assert len(calls) == len(vectors)
    for kind in kinds:
        for group, block in apart[kind].items():
            torch.testing.assert_close(found[kind][group], block, rtol=1e-5, atol=1e-8)
