"""Projected kernels: a worker's blocks are those of the definition, and their error is said."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from raykernel.compute import sketches
from raykernel.compute.error_text import distortion_text
from raykernel.compute.executor import InlineExecutor
from raykernel.compute.sketches import distortion, sketch, work_of
from raykernel.compute.spec import WorkerSpec
from raykernel.compute.worker import Worker
from raykernel.config import KernelConfig, ModelConfig, ProjectionConfig
from raykernel.errors import InputError
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.distortion import error_bound
from raykernel.ntk.project import WHOLE, intrinsic_dimension, project, project_two_sided
from raykernel.ntk.random_matrix import Entries, RandomMatrices
from raykernel.ntk.rates import Rates
from raykernel.problem.batches import collate
from raykernel.problem.models import load_problem
from raykernel.terms import Kind, Precision, Projection
from tests import cases, oracles
from tests.compute.tiny_problem import handle_of, make_spec, save_model

METHODS = [method for method in Projection if method is not Projection.none]
RATES = Rates(1e11, 1e10)


def definition(capture: Capture, config: ProjectionConfig) -> Capture:
    """What a method's name, `dim` and `seed` stand for, on a capture of the whole model."""

    def matrices(entries: Entries, dim: int = config.dim) -> RandomMatrices:
        return RandomMatrices(dim, seed=config.seed, entries=entries)

    if config.method is Projection.two_sided:  # 24 = 4 x 6
        signs = [matrices(Entries.rademacher, dim) for dim in (4, 6)]
        return project_two_sided(capture, *signs)
    if config.method is Projection.intrinsic_dimension:
        return intrinsic_dimension(capture, matrices(Entries.gaussian))
    return project(capture, matrices(Entries[config.method.value]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_model(tmp_path_factory.mktemp("model"))


def projected(
    folder: Path, model: ModelConfig, config: ProjectionConfig, **options: object
) -> WorkerSpec:
    spec = make_spec(folder, model, **options)  # type: ignore[arg-type]
    return dataclasses.replace(spec, kernel=dataclasses.replace(spec.kernel, projection=config))


def complete(spec: WorkerSpec) -> None:
    for outcome in InlineExecutor().run(spec.blocks, handle_of(spec).missing()):
        outcome.value()


def captured(spec: WorkerSpec) -> Capture:
    problem = load_problem(
        spec.model,
        spec.parameters,
        label_ids=(7, 9),
        num_labels=2,
        precision=spec.kernel.precision,
    )
    tracer = Tracer(problem.module, problem.readout)
    return tracer.capture(collate(spec.encoded, range(len(spec.encoded.input_ids))))


def assert_blocks(spec: WorkerSpec, expected: dict[str, torch.Tensor]) -> None:
    """Stored blocks of the first 6 columns are these, up to rounding in float64."""
    assert handle_of(spec).groups() == list(expected)
    for group, found in handle_of(spec).group_kernels():
        block = expected[group][:, :, :6].numpy()
        np.testing.assert_allclose(found, block, rtol=0, atol=1e-10 * np.abs(block).max())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_blocks_hold_the_projected_kernel(
    tmp_path: Path, model: ModelConfig, method: Projection
) -> None:
    config = ProjectionConfig(method, dim=24, seed=5)
    spec = projected(tmp_path, model, config, precision=Precision.float64, batch_size=3)
    complete(spec)
    whole = definition(captured(spec), config)
    assert_blocks(spec, gram(whole, whole))
    mixed = method is Projection.intrinsic_dimension
    assert (handle_of(spec).groups() == [WHOLE]) == mixed


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
@pytest.mark.parametrize("stream", [False, True])
def test_small_chunks_taken_block_by_block_change_rounding_only(
    tmp_path: Path,
    model: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    method: Projection,
    stream: bool,
) -> None:
    config = ProjectionConfig(method, dim=24, seed=5)
    spec = projected(tmp_path, model, config, precision=Precision.float64, block_size=6)
    worker = Worker(spec)
    small = dataclasses.replace(worker._sizes, batch=2, rows=4, cols=4, resident=4, stream=stream)
    monkeypatch.setattr(worker._fitting, "size", small)
    worker.prepare()
    assert len(worker._captures.streamer.segments) > 1
    for cell in handle_of(spec).missing():
        worker.compute(cell)
    whole = definition(captured(spec), config)
    assert_blocks(spec, gram(whole, whole))


def test_every_example_is_captured_once_while_its_sketch_is_kept(
    tmp_path: Path, model: ModelConfig
) -> None:
    """6 + 5 examples in blocks of 3: the exact kernel would capture rows anew in every cell."""
    config = ProjectionConfig(Projection.rademacher, dim=8)
    spec = projected(tmp_path, model, config, block_size=3)
    worker = Worker(spec)
    worker.prepare()
    seen = []
    worker._problem.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for cell in handle_of(spec).grid.cells():
        worker.compute(cell)
    second_pass = 1  # of one example, before the first block is trusted
    assert sum(seen) == 6 + 5 + second_pass


@pytest.mark.ray
@pytest.mark.slow
def test_workers_on_ray_give_the_bits_of_one_inline(
    tmp_path: Path, model: ModelConfig, ray_run: Callable[..., Iterator[object]]
) -> None:
    config = ProjectionConfig(Projection.gaussian, dim=24)
    inline, ray = (
        projected(tmp_path / name, model, config, num_train=8, num_rows=16, block_size=2)
        for name in ("inline", "ray")
    )
    complete(inline)
    cells = handle_of(ray).missing()
    processes = set()
    for own in (cells[::2], cells[:0:-2]):  # new workers for each run, who share rows and columns
        outcomes = list(ray_run(ray.blocks, own))
        processes |= {outcome.value().process for outcome in outcomes}  # type: ignore[attr-defined]
    assert os.getpid() not in processes
    assert not handle_of(ray).missing()
    for cell in handle_of(inline).grid.cells():
        one, other = (handle_of(spec).read_block(cell) for spec in (inline, ray))
        assert one.names == other.names
        np.testing.assert_array_equal(one.values, other.values)
    assert handle_of(ray).read_pinned("projection") == handle_of(inline).read_pinned("projection")


# ------------------------------------------------------------------ the error


def tiny_capture() -> Capture:
    case = cases.transformer_case("roberta")
    return Tracer(case.model, case.readout).capture(case.batch)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_the_error_falls_as_one_over_the_root_of_the_dimension(method: Projection) -> None:
    """Root mean square over 20 seeds at k = 64 and 16 · 64: a quarter; two-sided: a half.

    Its variance goes with 2 / k_rows + 2 / k_cols, that is, with 1 / √k. Within 35 %, more than
    four standard errors of the ratio.
    """
    capture = tiny_capture()
    exact = torch.stack(list(gram(capture, capture).values())).sum(0)

    def error(dim: int) -> float:
        squares = []
        for seed in range(20):
            config = ProjectionConfig(method, dim=dim, seed=seed)
            found = sketch(capture, config, max_bytes=1 << 26)
            whole = torch.stack(list(gram(found, found).values())).sum(0)
            squares.append(float((whole - exact).square().sum()))
        return math.sqrt(sum(squares) / len(squares))

    expected = 0.5 if method is Projection.two_sided else 0.25
    assert error(1024) / error(64) == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize("method", [Projection.rademacher, Projection.intrinsic_dimension])
def test_the_error_is_measured_against_the_naive_kernel_and_kept(
    tmp_path: Path, model: ModelConfig, method: Projection
) -> None:
    config = ProjectionConfig(method, dim=24, seed=5)
    spec = projected(tmp_path, model, config, precision=Precision.float64, block_size=6)
    complete(spec)
    said = handle_of(spec).read_pinned("projection")
    n = said["examples"]
    assert n == 6  # a block, and no more than `SAMPLE`
    problem = load_problem(
        model, spec.parameters, label_ids=(7, 9), num_labels=2, precision=Precision.float64
    )
    batch = collate(spec.encoded, range(n))
    by_parameter = oracles.kernel_by_parameter(problem.module, problem.readout, batch)
    exact = torch.stack(list(by_parameter.values())).sum(0).numpy()
    found = handle_of(spec).kernel(rows=range(n), cols=range(n))
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert said["relative_error"] == pytest.approx(error, rel=1e-6)
    lengths = np.sqrt(np.einsum("iaia->ia", exact))
    relative = np.abs(found - exact) / np.einsum("ia,jb->iajb", lengths, lengths)
    assert said["largest_error"] == pytest.approx(relative.max(), rel=1e-6)
    mixed = method is Projection.intrinsic_dimension
    assert (said["worst_group"] is None) == mixed
    assert said["gradients"] == 22
    assert said["statements"] == len(handle_of(spec).groups())


def facts(dim: int, method: Projection = Projection.rademacher) -> dict[str, object]:
    config = ProjectionConfig(method, dim=dim)
    options = {"num_gradients": 200, "rates": RATES, "max_bytes": 1 << 26}
    return dict(distortion(iter([tiny_capture()]), config, **options))  # type: ignore[arg-type]


def test_the_bound_is_shared_by_all_groups_and_said_even_if_it_is_none() -> None:
    """δ / L for each of L statements; at a small k the theorem's probability is above 1."""
    large = facts(4000)
    groups = large["statements"]
    assert isinstance(groups, int)
    assert groups == len(tiny_capture().groups) > 20
    limit = error_bound(4000, failure=0.05 / groups, num_rows=200)
    assert large["bound"] == pytest.approx(limit)
    assert float(large["largest_error"]) < limit  # type: ignore[arg-type]
    (_, said) = distortion_text(large)
    assert f"at most {limit:.2f} |g| |g'| with probability 0.95" in said
    small = facts(16)
    assert small["bound"] is None
    assert float(small["least_failure"]) > 1  # type: ignore[arg-type]
    (_, said) = distortion_text(small)
    assert "it says nothing" in said
    needed = small["dim_needed"]
    assert isinstance(needed, dict)
    assert error_bound(needed["0.5"], failure=0.05 / groups, num_rows=200) <= 0.5
    assert f"kernel.projection.dim={needed['0.1']} for 0.1" in said
    (_, said) = distortion_text(facts(64, Projection.two_sided))
    assert "No theorem" in said


# ------------------------------------------------------------------ what it costs


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_the_plan_counts_the_operations_of_the_definition(method: Projection) -> None:
    """Of one matrix W (5 x 3) and its bias, 4 tokens, 2 outputs, k = 24 = 4 x 6."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 5)
    head = torch.nn.Linear(5, 2).requires_grad_(False)
    net = torch.nn.Sequential(layer, torch.nn.Tanh(), head)
    batch = {"x": torch.randn(1, 4, 3)}
    capture = Tracer(net, lambda model, b: model(b["x"]).sum(1)).capture(batch)
    parts = [part for own in capture.parts["0"].values() for part in own[0:]]
    assert len(parts) == 2
    work = work_of(parts, ProjectionConfig(method, dim=24))
    c, t, k = 2, 4, 24
    bias = 2 * c * 5 * k
    if method is Projection.two_sided:
        # P b_t for every output, Q a_t, and their products.
        assert work.flops == bias + 2 * t * (c * 5 * 4 + 3 * 6 + c * k)
        assert work.entries == 5 * k + 5 * 4 + 3 * 6
    else:
        assert work.flops == bias + 2 * c * t * 15 + 2 * c * 15 * k
        assert work.entries == 5 * k + 15 * k
    # At three quarters of the device's best rate, and 0.3 ms for the calls of each part.
    products = 3 * work.flops / 1e11 / 0.75
    made = work.entries * work.entry_seconds
    assert work.seconds(3, RATES) == pytest.approx(products + made + 2 * 3e-4)


def test_a_plan_is_made_without_the_matrices(tmp_path: Path, model: ModelConfig) -> None:
    config = ProjectionConfig(Projection.rademacher, dim=32)
    spec = projected(tmp_path, model, config)
    plan = Worker(spec).plan()
    exact = Worker(make_spec(tmp_path / "exact", model)).plan()
    groups = len(plan.methods)
    assert set(plan.methods.values()) == {"rademacher to 32"}
    assert plan.num_groups == exact.num_groups > groups == len(exact.methods)
    assert plan.sizes.sketched
    assert plan.contraction(4, 4, diagonal=False).flops == groups * 2 * 4 * 4 * 2 * 2 * 32
    assert plan.capture_flops > exact.capture_flops
    assert plan.footprint.sketch == groups * 2 * 32 * 4
    mixed = dataclasses.replace(config, method=Projection.intrinsic_dimension)
    plan = Worker(projected(tmp_path / "mixed", model, mixed)).plan()
    assert (plan.num_groups, list(plan.methods)) == (1, [WHOLE])
    assert plan.footprint.sketch == 2 * 32 * 4


def test_sketches_are_of_the_matrices_whatever_the_tiles() -> None:
    """Bounds on tiles only change rounding, so that memory never enters the numbers."""
    capture = tiny_capture()
    config = ProjectionConfig(Projection.gaussian, dim=16)
    one, other = (sketch(capture, config, max_bytes=b) for b in (1 << 10, 1 << 26))
    for group, block in gram(one, one).items():
        scale = gram(other, other)[group].abs().max()
        assert (block - gram(other, other)[group]).abs().max() <= 1e-5 * scale


# ------------------------------------------------------------------ configuration


def test_other_kinds_are_refused() -> None:
    config = ProjectionConfig(Projection.gaussian)
    assert KernelConfig(projection=config).kinds == [Kind.sgd]
    with pytest.raises(InputError, match=r"kernel\.kinds: found \['sgd', 'signgd'\], expected"):
        KernelConfig(kinds=[Kind.sgd, Kind.signgd], projection=config)


def test_identity_differs_by_method_dim_and_seed() -> None:
    one, two = Projection.gaussian, Projection.rademacher
    options = [(one, 8, 0), (two, 8, 0), (one, 9, 0), (one, 8, 1)]
    every = [KernelConfig(projection=ProjectionConfig(*option)) for option in options]
    assert len({str(config.identity) for config in [KernelConfig(), *every]}) == 5


@pytest.mark.parametrize(("dim", "sides"), [(1, (1, 1)), (24, (4, 6)), (512, (16, 32))])
def test_two_sides_are_the_factors_nearest_each_other(dim: int, sides: tuple[int, int]) -> None:
    assert ProjectionConfig(Projection.two_sided, dim=dim).sides == sides


def test_sample_is_small() -> None:
    """Both kernels of the sample are computed beside the blocks: less than a block's work."""
    assert KernelConfig().block_size >= sketches.SAMPLE
