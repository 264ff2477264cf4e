"""Every fast path gives what the definition gives, on whatever model and examples are drawn.

The definition is a loop over examples and outputs in float64 (`tests.oracles`). Each property is
held on the same draws in every run, and with `-m slow` on thousands of new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import Phase, assume, event, given, settings
from hypothesis import strategies as st

from raykernel.ntk import signs
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import grams
from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.groups import find_groups
from raykernel.ntk.product import tangents, weighted_gradient
from raykernel.ntk.rates import Rates
from raykernel.ntk.sign_product import weighted_sign_gradient
from raykernel.ntk.stream import Streamer
from raykernel.terms import Kind
from tests import cases, drawn, oracles

# Explaining a failure would take minutes here, and the drawn recipe says as much.
PHASES = [phase for phase in Phase if phase is not Phase.explain]
ALWAYS = settings(max_examples=12, derandomize=True, deadline=None, phases=PHASES)
LONG = settings(max_examples=400, deadline=None, phases=PHASES)

RATES = {
    "fewer": Rates(flops=1.0, bandwidth=torch.inf),
    "more": Rates(flops=-1.0, bandwidth=torch.inf),
}
"""Of devices that prefer the way of fewer operations, and the other one."""


@dataclass(frozen=True, slots=True)
class Route:
    """How a kernel is come by."""

    kinds: tuple[Kind, ...]
    dead_zone: float
    symmetric: bool
    sizes: tuple[int, ...]
    """Of the batches that are joined."""
    crop: bool
    max_bytes: int
    rates: str
    apart: frozenset[int]
    """Places of layer groups that are asked for by themselves, before the others."""


_sizes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
_max_bytes = st.sampled_from([1, 300, 3000, 1 << 28])
_dead_zones = st.sampled_from([1e-9, 0.1])

ROUTES = st.builds(
    Route,
    # Without signs there are more ways to choose from.
    kinds=st.just((Kind.sgd,))
    | st.lists(st.sampled_from(list(Kind)), min_size=1, unique=True).map(tuple),
    dead_zone=_dead_zones,
    symmetric=st.booleans(),
    sizes=_sizes,
    crop=st.booleans(),
    max_bytes=_max_bytes,
    rates=st.sampled_from(sorted(RATES)),
    apart=st.frozensets(st.integers(0, 6), max_size=3),
)


# ------------------------------------------------------------------ definition
SIDES = {
    Kind.sgd: ("gradient", "gradient"),
    Kind.signgd: ("sign", "sign"),
    Kind.asigngd: ("gradient", "sign"),
    Kind.asigngd_flipped: ("sign", "gradient"),
}


def side(problem, batch, dead_zone):
    """Gradients and their signs, (n, c, p) by parameter."""
    gradients = oracles.jacobian(problem.model, problem.readout, batch)
    limits = limits_alone(problem, batch, dead_zone)
    found = {}
    for name, g in gradients.items():
        limit = torch.stack([own.get(name, g.new_zeros(g.shape[1])) for own in limits])[:, :, None]
        # Rounding may decide the sign of what is as large as the limit, and of no other.
        assume(not ((g != 0) & ((g.abs() - limit).abs() <= 1e-6 * limit)).any())
        found[name] = torch.where(g.abs() <= limit, 0.0, g.sign())
    return {"gradient": gradients, "sign": found}


def limits_alone(problem, batch, dead_zone):
    """Up to which value a coordinate has sign 0, (c) by parameter, of each example by itself."""
    tracer = Tracer(problem.model, problem.readout, signs=True)
    found = []
    for one in drawn.pieces(batch, [1] * len(batch["ids"]), crop=True):
        parts = {}
        for by_name in tracer.capture(one).parts.values():
            for name, own in by_name.items():
                parts.setdefault(name, []).extend(own)
        found.append({k: signs.threshold(v, dead_zone).flatten() for k, v in parts.items()})
    return found


def definition(rows, cols, kind):
    """The share of every parameter in the kernel."""
    left, right = rows[SIDES[kind][0]], cols[SIDES[kind][1]]
    return {name: oracles.inner(left[name], right[name]) for name in left}


def definition_by_use(problem, batches):
    """The kernel sgd by layer group and cross group, from a gradient of every use."""
    untied = oracles.untie(problem.model)
    left, right = (oracles.jacobian(untied, problem.readout, batch) for batch in batches)
    groups = find_groups(problem.model)
    blocks = {
        group: sum(oracles.inner(left[name], right[name]) for name in names)
        for group, names in groups.members.items()
    }
    uses = uses_by_parameter(problem.model)
    for cross, pair in groups.crosses.items():
        shared = [[u for u in own if group_of(u) in pair] for own in uses.values()]
        blocks[cross] = sum(
            oracles.inner(left[a], right[b]) + oracles.inner(left[b], right[a])
            for a, b in (own for own in shared if len(own) == 2)
        )
    return blocks


def uses_by_parameter(model):
    """Every name of each selected parameter."""
    uses = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            uses.setdefault(id(parameter), []).append(name)
    return uses


def has_uses_apart(problem, groups):
    """Whether every use of a tied parameter is its own layer group's, not the whole model's."""
    tracer = Tracer(problem.model, problem.readout)
    for batch in (problem.rows, problem.cols):
        tracer.capture(batch)
    whole = [name for name, through in tracer.fallbacks.items() if through == "model"]
    owned = [len(own) for own in uses_by_parameter(problem.model).values()]
    return sum(owned) == sum(map(len, groups.owners.values())) and all(
        len(groups.owners[name]) == 1 for name in whole
    )


def group_of(name):
    return name.rpartition(".")[0]


def assert_close(actual, expected, scale):
    """To 1e-10 of the whole; below 1e-20 is rounding of what is zero."""
    assert (actual - expected).norm() <= 1e-10 * scale + 1e-20


# ------------------------------------------------------------------ routes
def captured(problem, route):
    """By captures of batches, joined."""
    tracer = Tracer(problem.model, problem.readout, signs=has_signs(route))
    first = Capture.concatenate([tracer.capture(b) for b in batches(problem.rows, route)])
    other = first
    if not route.symmetric:
        other = Capture.concatenate([tracer.capture(b) for b in batches(problem.cols, route)])
    event(f"batched: {tracer.batched}")
    return contracted(first, other, route)


def streamed(problem, route):
    """By captures of one block of the model after the other, batches side by side."""
    streamer = Streamer(Tracer(problem.model, problem.readout, signs=has_signs(route)))
    rows, cols = batches(problem.rows, route), batches(problem.cols, route)
    for batch in [*rows, *cols]:
        list(streamer.stream(batch))
    event(f"streamed: {len(streamer.segments) > 1}")
    count = len(rows)
    ways = [streamer.stream(batch) for batch in (rows if route.symmetric else rows + cols)]
    blocks = {kind: {} for kind in route.kinds}
    for pieces in zip(*ways, strict=True):
        first = Capture.concatenate(pieces[:count])
        other = first if route.symmetric else Capture.concatenate(pieces[count:])
        for kind, found in contracted(first, other, route).items():
            assert not blocks[kind].keys() & found.keys()
            blocks[kind].update(found)
    return blocks


def called(problem, route):
    """By the one public function."""
    options = {
        "kinds": route.kinds,
        "dead_zone": route.dead_zone,
        "batch_size": sum(route.sizes[:1]) or 32,
    }
    cols = None if route.symmetric else problem.cols
    blocks = {kind: {} for kind in route.kinds}
    for groups in asked_for(find_groups(problem.model).names, route):
        found = empirical_kernel(
            problem.model, problem.readout, problem.rows, cols, groups=groups, **options
        )
        for kind in route.kinds:
            blocks[kind].update(found[kind.value])
    return blocks


WAYS = {"capture": captured, "stream": streamed, "call": called}


def has_signs(route):
    return any(kind.has_signs for kind in route.kinds)


def batches(batch, route):
    return drawn.pieces(batch, route.sizes, crop=route.crop)


def asked_for(names, route):
    """Layer groups in two portions, or all at once."""
    portions = [
        [name for i, name in enumerate(names) if (i in route.apart) is own] for own in (True, False)
    ]
    return [portion for portion in portions if portion]


def contracted(rows, cols, route):
    blocks = {kind: {} for kind in route.kinds}
    for groups in asked_for(rows.groups, route):
        found = grams(
            rows,
            cols,
            kinds=route.kinds,
            groups=groups,
            dead_zone=route.dead_zone,
            max_bytes=route.max_bytes,
            rates=RATES[route.rates],
        )
        for kind, own in found.items():
            assert list(own) == groups
            blocks[kind].update(own)
    return blocks


# ------------------------------------------------------------------ properties
def check_kernel(way, recipe, route):
    problem = drawn.build(recipe)
    examples = (problem.rows, problem.rows if route.symmetric else problem.cols)
    rows, cols = (side(problem, batch, route.dead_zone) for batch in examples)
    found = WAYS[way](problem, route)
    assert set(found) == set(route.kinds)
    groups = find_groups(problem.model)
    for kind, blocks in found.items():
        shares = definition(rows, cols, kind)
        whole = sum(shares.values())
        assert set(blocks) == set(groups.names)
        assert_close(sum(blocks.values()), whole, whole.norm())
        if kind is Kind.signgd:
            assert torch.equal(sum(blocks.values()), whole)
        for group in groups.members:
            names = [name for name, owners in groups.owners.items() if group in owners]
            if all(groups.owners[name] == (group,) for name in names):
                assert_close(blocks[group], sum(shares[name] for name in names), whole.norm())
        if kind is Kind.sgd and has_uses_apart(problem, groups):
            for group, block in definition_by_use(problem, examples).items():
                assert_close(blocks[group], block, whole.norm())


BY_FAMILY = pytest.mark.parametrize("family", list(drawn.FAMILIES))
BY_WAY = pytest.mark.parametrize("way", list(WAYS))


@BY_WAY
@BY_FAMILY
@ALWAYS
@given(data=st.data())
def test_every_way_gives_the_kernel(way, family, data):
    check_kernel(way, data.draw(drawn.FAMILIES[family]), data.draw(ROUTES))


@pytest.mark.slow
@BY_WAY
@BY_FAMILY
@LONG
@given(data=st.data())
def test_every_way_gives_the_kernel_of_many_models(way, family, data):
    check_kernel(way, data.draw(drawn.FAMILIES[family]), data.draw(ROUTES))


@dataclass(frozen=True, slots=True)
class Cut:
    """How examples are handed to the products."""

    sizes: tuple[int, ...]
    col_sizes: tuple[int, ...]
    crop: bool
    max_bytes: int
    dead_zone: float


CUTS = st.builds(
    Cut,
    sizes=_sizes,
    col_sizes=_sizes,
    crop=st.booleans(),
    max_bytes=_max_bytes,
    dead_zone=_dead_zones,
)


def check_products(recipe, cut):
    problem = drawn.build(recipe)
    model, readout = problem.model, problem.readout
    rows = drawn.pieces(problem.rows, cut.sizes, crop=cut.crop)
    cols = drawn.pieces(problem.cols, cut.col_sizes, crop=cut.crop)
    left, right = (side(problem, b, cut.dead_zone) for b in (problem.rows, problem.cols))
    c = len(recipe.labels)
    weights = cases.normal(len(problem.cols["ids"]), c, seed=recipe.seed)

    w = weighted_gradient(model, readout, cols, weights)
    assert_same_vector(w, oracles.fold(right["gradient"], weights))
    assert_change(problem, rows, w, kernel_times(definition(left, right, Kind.sgd), weights))

    def sign_of(parts):
        return partial(signs.signs, limit=signs.threshold(parts, cut.dead_zone))

    options = {"sign_of": sign_of, "max_bytes": cut.max_bytes}
    w = weighted_sign_gradient(model, readout, cols, weights, **options)
    assert_same_vector(w, oracles.fold(right["sign"], weights))
    assert_change(problem, rows, w, kernel_times(definition(left, right, Kind.asigngd), weights))

    direction = cases.random_direction(model)
    assert_change(problem, rows, direction, oracles.along(left["gradient"], direction))


def kernel_times(shares, weights):
    """Σ_j,b K[i, a, j, b] α[j, b]."""
    return torch.einsum("iajb,jb->ia", sum(shares.values()), weights)


def assert_change(problem, rows, direction, expected):
    logits, change = tangents(problem.model, problem.readout, rows, direction)
    assert_close(change, expected, expected.norm())
    alone = problem.readout(problem.model, problem.rows)
    assert_close(logits, alone, alone.norm())


def assert_same_vector(actual, expected):
    assert actual.keys() == expected.keys()
    actual, expected = (
        torch.cat([own[name].flatten() for name in expected]) for own in (actual, expected)
    )
    assert_close(actual, expected, expected.norm())


@BY_FAMILY
@ALWAYS
@given(data=st.data())
def test_products_are_those_with_the_kernel(family, data):
    """J w = K α for w = Jᵀ α, and the same with signs on the columns' side."""
    check_products(data.draw(drawn.FAMILIES[family]), data.draw(CUTS))


@pytest.mark.slow
@BY_FAMILY
@LONG
@given(data=st.data())
def test_products_are_those_with_the_kernel_of_many_models(family, data):
    check_products(data.draw(drawn.FAMILIES[family]), data.draw(CUTS))
