"""Projected kernels equal those of the dense matrices, and the exact ones on average."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.distortion import error_bound, projection_error
from raykernel.ntk.factors import Product, Rows
from raykernel.ntk.groups import layer_groups
from raykernel.ntk.project import (
    WHOLE,
    intrinsic_dimension,
    join,
    project,
    project_two_sided,
)
from raykernel.ntk.random_matrix import Entries, RandomMatrices
from tests import cases, oracles
from tests.cases import normal
from tests.parts import KINDS as PARTS
from tests.parts import VOCAB, WIDTH, C, gradient
from tests.parts import make_part as make_part_of_tokens

BOTH = pytest.mark.parametrize("entries", list(Entries), ids=lambda entries: entries.value)
TINY = pytest.mark.parametrize("max_bytes", [1, 3000, 1 << 26])


def lora():
    return cases.lora_case("roberta", zero_b=False)


CASES = {
    **{name: partial(cases.transformer_case, name) for name in ("roberta", "gpt2", "llama")},
    "lora": lora,
    "some_frozen": partial(cases.partly_frozen_case, "albert", "LayerNorm", "embeddings"),
}


def captured(case):
    case.model.double()
    return Tracer(case.model, case.readout).capture(case.batch)


def first_names(model):
    """Name that a parameter goes by, from each of its names."""
    by_identity = {id(p): name for name, p in model.named_parameters()}
    return {n: by_identity[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}


def sketches_by_group(case, sketch):
    """Σ over a group's parameters of sketch(name, G), from the gradient of each use."""
    jacobian = oracles.jacobian(oracles.untie(case.model), case.readout, case.batch)
    first = first_names(case.model)
    return {
        group: sum(sketch(first[name], jacobian[name]) for name in names if name in jacobian)
        for group, names in layer_groups(case.model).items()
    }


def expected_blocks(capture, sketches):
    blocks = {group: oracles.inner(s, s) for group, s in sketches.items()}
    for cross, (a, b) in capture.crosses.items():
        one, other = (
            oracles.inner(sketches[a], sketches[b]),
            oracles.inner(sketches[b], sketches[a]),
        )
        blocks[cross] = one + other
    return blocks


def assert_same(blocks, expected, tolerance=1e-10):
    assert blocks.keys() == expected.keys()
    scale = torch.stack([block.norm() for block in expected.values()]).norm()
    for group, block in expected.items():
        assert (blocks[group] - block).norm() < tolerance * scale, group


def tolerance_of(name):
    # Llama normalises in float32 whatever the model's type.
    return 1e-5 if name == "llama" else 1e-10


@BOTH
@pytest.mark.parametrize("name", list(CASES))
def test_projected_kernel_is_that_of_the_dense_matrix(name, entries):
    case = CASES[name]()
    capture = captured(case)
    matrices = RandomMatrices(6, seed=3, entries=entries)

    def sketch(parameter, gradient):
        return gradient @ matrices.columns(parameter, 0, gradient.shape[2]) / 6**0.5

    projected = project(capture, matrices)
    blocks = gram(projected, projected)
    expected = expected_blocks(capture, sketches_by_group(case, sketch))
    assert_same(blocks, expected, tolerance_of(name))


@BOTH
@pytest.mark.parametrize("name", list(CASES))
def test_two_sided_projection_is_that_of_the_dense_kronecker_product(name, entries):
    case = CASES[name]()
    capture = captured(case)
    rows = RandomMatrices(2, seed=3, entries=entries)
    cols = RandomMatrices(3, seed=4, entries=entries)
    shapes = {n: p.shape for n, p in case.model.named_parameters()}

    def sketch(parameter, gradient):
        shape = shapes[parameter]
        if len(shape) < 2 or shape[1:].numel() == 1:
            dense = RandomMatrices(6, seed=3, entries=entries)
            return gradient @ dense.columns(parameter, 0, gradient.shape[2]) / 6**0.5
        p = rows.columns(f"{parameter} (rows)", 0, shape[0]).T
        q = cols.columns(f"{parameter} (columns)", 0, shape[1:].numel()).T
        # torch.kron refuses matrices of one column that are seen transposed.
        return gradient @ torch.from_numpy(np.kron(p, q)).T / 6**0.5

    projected = project_two_sided(capture, rows, cols)
    blocks = gram(projected, projected)
    expected = expected_blocks(capture, sketches_by_group(case, sketch))
    assert_same(blocks, expected, tolerance_of(name))


@pytest.mark.parametrize("name", list(CASES))
def test_intrinsic_dimension_is_the_kernel_of_the_model_in_random_directions(name):
    """Gradients to z of f(θ_0 + Π z), by autograd through the sum (Definition D.1)."""
    case = CASES[name]()
    capture = captured(case)
    k = 9
    matrices = RandomMatrices(k, seed=1, entries=Entries.gaussian)
    theta = oracles.selected(case.model)
    pi = {n: matrices.columns(n, 0, p.numel()) / k**0.5 for n, p in theta.items()}

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = case.model

        def forward(self, batch):
            return case.readout(self.model, batch)

    def logits(z, batch):
        moved = {f"model.{n}": p + (pi[n] @ z).view(p.shape) for n, p in theta.items()}
        return torch.func.functional_call(Network(), moved, (batch,))[0]

    gradients = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda z, i=i: logits(z, {key: v[i : i + 1] for key, v in case.batch.items()}),
                torch.zeros(k, dtype=torch.float64),
            )
            for i in range(5)
        ]
    )
    projected = intrinsic_dimension(capture, matrices)
    blocks = gram(projected, projected)
    expected = {WHOLE: oracles.inner(gradients, gradients)}
    assert_same(blocks, expected, tolerance_of(name))


# ------------------------------------------------------------------ one part of every kind
KINDS = (*PARTS, "no_token")


def make_part(kind, n, seed):
    if kind == "no_token":
        return make_part_of_tokens("lookup", n, 0, seed)
    return make_part_of_tokens(kind, n, 4, seed)


def sole(part):
    return Capture(normal(len(part.gradients), C), {"layer": {"layer.weight": (part,)}}, {})


def sketch_of(capture):
    ((_, parts),) = capture.parts["layer"].items()
    return parts[0].gradients


@TINY
@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_projected_as_their_gradients_in_any_tiles(kind, entries, max_bytes):
    part = make_part(kind, 3, 0)
    matrices = RandomMatrices(5, entries=entries)
    dense = matrices.columns("layer.weight", 0, VOCAB * WIDTH)
    found = sketch_of(project(sole(part), matrices, max_bytes=max_bytes))
    assert torch.allclose(found, gradient(part) @ dense / 5**0.5, rtol=1e-12, atol=1e-12)


@TINY
@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_projected_on_two_sides_as_their_gradients(kind, entries, max_bytes):
    part = make_part(kind, 3, 0)
    rows, cols = RandomMatrices(4, entries=entries), RandomMatrices(2, seed=1, entries=entries)
    p = rows.columns("layer.weight (rows)", 0, VOCAB).T
    q = cols.columns("layer.weight (columns)", 0, WIDTH).T
    found = sketch_of(project_two_sided(sole(part), rows, cols, max_bytes=max_bytes))
    expected = gradient(part) @ torch.kron(p, q).T / 8**0.5
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def two_uses_of_one_matrix():
    """A capture of a tied matrix and a bias, and its exact blocks."""
    first, second = make_part("lookup", 2, 0), make_part("some_rows", 2, 3)
    bias = Rows(normal(2, C, VOCAB, seed=9), VOCAB)
    parts = {"a": {"w": (first,)}, "b": {"w": (second,), "bias": (bias,)}}
    capture = Capture(normal(2, C), parts, {"cross(a, b)": ("a", "b")})
    return capture, gram(capture, capture)


PROJECTIONS = {
    "one_sided": lambda capture, seed, entries: project(
        capture, RandomMatrices(4, seed=seed, entries=entries)
    ),
    "two_sided": lambda capture, seed, entries: project_two_sided(
        capture,
        RandomMatrices(2, seed=seed, entries=entries),
        RandomMatrices(3, seed=seed, entries=entries),
    ),
    "intrinsic": lambda capture, seed, entries: intrinsic_dimension(
        capture, RandomMatrices(4, seed=seed, entries=entries)
    ),
}


@BOTH
@pytest.mark.parametrize("name", list(PROJECTIONS))
def test_the_mean_over_matrices_is_the_exact_kernel(name, entries):
    """Within 4.5 standard errors for every entry of every group, tied ones included."""
    capture, exact = two_uses_of_one_matrix()
    if name == "intrinsic":
        exact = {WHOLE: sum(exact.values())}
    draws = {group: [] for group in exact}
    for seed in range(400):
        projected = PROJECTIONS[name](capture, seed, entries)
        for group, block in gram(projected, projected).items():
            draws[group].append(block)
    for group, blocks in draws.items():
        sample = torch.stack(blocks)
        error = sample.std(0) / len(sample) ** 0.5
        assert ((sample.mean(0) - exact[group]).abs() < 4.5 * error).all(), group
        assert (error < 0.2 * exact[group].norm()).all(), group


def test_gaussian_sketches_have_the_variance_of_the_textbook():
    """Of |S u|² / k for |u| = 1: 2 / k; of two sides and rank one, (1 + 2/k_r) (1 + 2/k_c) - 1."""
    k, kr, kc = 5, 4, 3
    u, b, a = (v / v.norm() for v in (normal(1, C, 6), normal(1, C, 1, 3), normal(1, 1, 2)))
    u[:, 1], b[:, 1] = 0.0, 0.0
    u, b = u / u.norm(), b / b.norm()
    vector, matrix = sole(Rows(u, 6)), sole(Product(a, b, None, False))
    lengths = []
    for seed in range(1500):
        of_size = partial(RandomMatrices, seed=seed, entries=Entries.gaussian)
        sketches = (
            project(vector, of_size(k)),
            project_two_sided(matrix, of_size(kr), of_size(kc)),
        )
        lengths.append([sketch_of(sketch).square().sum() for sketch in sketches])
    one_sided, two_sided = torch.tensor(lengths).var(0)
    assert one_sided == pytest.approx(2 / k, rel=0.3)
    assert two_sided == pytest.approx((1 + 2 / kr) * (1 + 2 / kc) - 1, rel=0.5)


# ------------------------------------------------------------------ batches, bound
@pytest.mark.parametrize("name", list(PROJECTIONS))
def test_batches_and_their_order_change_nothing(name):
    case = cases.transformer_case("roberta")
    capture = captured(case)
    tracer = Tracer(case.model, case.readout)
    order = torch.tensor([3, 1, 4, 0, 2])
    pieces = [
        PROJECTIONS[name](
            tracer.capture({k: v[ids] for k, v in case.batch.items()}), 2, Entries.rademacher
        )
        for ids in (order[:2], order[2:])
    ]
    joined = Capture.concatenate(pieces)
    whole = PROJECTIONS[name](capture, 2, Entries.rademacher)
    for group, parts in whole.parts.items():
        for key, (part,) in parts.items():
            (other,) = joined.parts[group][key]
            scale = part.gradients.norm()
            assert (other.gradients - part.gradients[order]).norm() < 1e-10 * scale + 1e-14
    assert joined.groups == whole.groups


@pytest.mark.parametrize("name", list(PROJECTIONS))
def test_sketches_of_layers_by_themselves_join_to_that_of_the_model(name):
    """Of the tied groups together and the third alone, as a model is captured in segments."""
    capture, _ = two_uses_of_one_matrix()
    third = {"c": {"c.bias": (make_part("rows", 2, 4),)}}
    whole = Capture(capture.logits, capture.parts | third, capture.crosses)
    segments = [Capture(capture.logits, third, {}), capture]
    expected = PROJECTIONS[name](whole, 2, Entries.rademacher)
    found = join(PROJECTIONS[name](segment, 2, Entries.rademacher) for segment in segments)
    assert found.crosses == expected.crosses
    assert_same(gram(found, found), gram(expected, expected))


def test_blocks_of_groups_are_the_intrinsic_kernel_without_the_products_of_groups():
    capture, _ = two_uses_of_one_matrix()
    matrices = RandomMatrices(4)
    by_group = project(capture, matrices)
    sketches = {g: parts["(sketch)"][0].gradients for g, parts in by_group.parts.items()}
    total = sum(gram(by_group, by_group).values())
    whole = intrinsic_dimension(capture, matrices)
    added = sum(sketches.values())
    assert torch.allclose(gram(whole, whole)[WHOLE], oracles.inner(added, added))
    # Here the two groups are tied, so their cross group holds the products already.
    assert torch.allclose(gram(whole, whole)[WHOLE], total)
    apart = Capture(capture.logits, by_group.parts, {})
    a, b = sketches["a"], sketches["b"]
    noise = oracles.inner(a, b) + oracles.inner(b, a)
    assert torch.allclose(sum(gram(apart, apart).values()) + noise, total)


@BOTH
def test_errors_of_a_models_kernels_keep_to_theorem_d2(entries):
    """Every layer group and the whole gradient, with failure probability 0.05 for each."""
    capture = captured(cases.transformer_case("roberta"))
    exact = gram(capture, capture)
    k = 800
    allowed = error_bound(k, failure=0.05, num_rows=10)
    matrices = RandomMatrices(k, seed=5, entries=entries)
    projected = project(capture, matrices)
    blocks = gram(projected, projected)
    errors = [projection_error(exact[group], blocks[group]) for group in capture.parts]
    whole = intrinsic_dimension(capture, matrices)
    errors.append(projection_error(sum(exact.values()), gram(whole, whole)[WHOLE]))
    assert 0 < max(errors) < allowed < 0.25


def test_groups_without_a_gradient_have_a_zero_kernel():
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    batch = {"x": normal(4, 3).float()}
    capture = Tracer(model, lambda m, b: m["used"](b["x"])).capture(batch)
    for name, projection in PROJECTIONS.items():
        projected = projection(capture, 0, Entries.rademacher)
        blocks = gram(projected, projected)
        assert name == "intrinsic" or not blocks["unused"].any()
        assert all(block.dtype == torch.float32 for block in blocks.values())


def test_half_precision_factors_are_projected_in_float32():
    part = Product(torch.ones(1, 4096, 1), torch.ones(1, 1, 4096, 1), None, False)
    half = Product(part.inputs.bfloat16(), part.gradients.bfloat16(), None, False)
    assert sketch_of(project(sole(half), RandomMatrices(1))).abs().item() == 4096.0
