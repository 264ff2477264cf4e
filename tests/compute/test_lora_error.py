"""A fresh LoRA's kernel against that of the weights it adapts: as measured, and as bounded."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from raykernel.compute.error_text import lora_text
from raykernel.compute.executor import InlineExecutor
from raykernel.compute.lora_error import adapted_layers, compared_parameters, lora_distortion
from raykernel.compute.spec import WorkerSpec
from raykernel.compute.worker import Worker
from raykernel.config import KernelConfig, ModelConfig, ParametersConfig
from raykernel.ntk.capture import Tracer
from raykernel.ntk.distortion import lora_error_bound
from raykernel.ntk.rates import Rates
from raykernel.ntk.selections import varying
from raykernel.ntk.stream import Streamer
from raykernel.problem.batches import collate
from raykernel.problem.models import load_problem
from raykernel.terms import Kind, Method, Precision
from tests import cases, oracles
from tests.compute.tiny_problem import handle_of, make_spec, save_model

LIMITS = {"num_gradients": 200, "rates": Rates(1e11, 1e10), "max_bytes": 1 << 26}


def definition(case: cases.Case, scales: dict[str, float]) -> dict[str, object]:
    """Errors from autograd's gradients of B and W, one example and output at a time."""
    parameters = dict(case.model.named_parameters())
    exact, scaled = {}, {}
    for path, scale in scales.items():
        names = (f"{path}.base_layer.weight", f"{path}.lora_B.default.weight")
        jacobians = []
        for name in names:
            for parameter in parameters.values():
                parameter.requires_grad_(parameter is parameters[name])
            kernels = oracles.kernel_by_parameter(case.model, case.readout, case.batch)
            (kernel,) = kernels.values()
            jacobians.append(kernel.flatten(2).flatten(0, 1))
        exact[path], scaled[path] = jacobians[0], jacobians[1] / scale

    def largest(own: torch.Tensor, other: torch.Tensor) -> float:
        lengths = own.diagonal().sqrt()
        return float(((own - other).abs() / torch.outer(lengths, lengths)).max())

    whole, found = (sum(kernels.values()) for kernels in (exact, scaled))
    of_modules = {path: largest(exact[path], scaled[path]) for path in exact}
    worst = max(of_modules, key=of_modules.__getitem__)
    return {
        "relative_error": float((found - whole).norm() / whole.norm()),
        "largest_error": largest(whole, found),
        "worst_module": worst,
        "worst_module_error": of_modules[worst],
    }


@pytest.mark.parametrize("name", list(cases.LORA_TARGETS))
def test_errors_are_those_of_the_definition(name: str) -> None:
    """PEFT's adapters, s = 4 / 2, r = 2: E K_LoRA = s² r / (3 d_in) K by layer."""
    case = cases.lora_case(name, zero_b=True)
    case.model.double()
    layers = adapted_layers(case.model)
    modules = dict(case.model.named_modules())
    assert layers == {
        path: pytest.approx(4 * 2 / (3 * modules[path].in_features))
        for path in modules
        if path.rpartition(".")[2] in cases.LORA_TARGETS[name]
    }
    expected = definition(case, layers)
    with varying(case.model, compared_parameters(layers)):
        tracer = Tracer(case.model, case.readout)
        for captures in ([tracer.capture(case.batch)], Streamer(tracer).stream(case.batch)):
            said = lora_distortion(captures, layers, rank=2, **LIMITS)
            assert said["worst_module"] == expected["worst_module"]
            for key in ("relative_error", "largest_error", "worst_module_error"):
                assert said[key] == pytest.approx(expected[key], rel=1e-9), key
            assert (said["examples"], said["modules"]) == (5, len(layers))


def facts(rank: int, num_modules: int = 2) -> dict[str, object]:
    """Of a model of linear layers, the kernel of whose LoRA is what the theorem is about."""
    torch.manual_seed(0)
    names = [f"layer{i}" for i in range(num_modules)]
    layers = {name: torch.nn.Linear(6, 6, bias=False) for name in names}

    def forward(self: cases.Module, x: torch.Tensor) -> torch.Tensor:
        for name in names:
            x = getattr(self, name)(x).tanh()
        return x.sum(1)[:, :2]

    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=3, target_modules=names)
    model = inject_adapter_in_model(config, cases.Module(forward, **layers)).double()
    layers = adapted_layers(model)
    with varying(model, compared_parameters(layers)):
        capture = Tracer(model, cases.readout).capture({"x": cases.normal(5, 4, 6)})
        return dict(lora_distortion([capture], layers, rank=rank, **LIMITS))


def test_the_bound_is_the_theorems_for_every_module_and_never_exceeded() -> None:
    """δ / L each; 4 N² exp(-(ε² - ε³) r / 4) = δ / L. Two modules, four tokens, uniform A."""
    said = facts(4000)
    bound = said["bound"]
    assert isinstance(bound, float)
    probability = 4 * 200**2 * math.exp(-(bound**2 - bound**3) * 4000 / 4)
    assert probability == pytest.approx(0.05 / 2)
    assert bound == lora_error_bound(4000, failure=0.025, num_rows=200)
    assert said["worst_module_error"] < bound
    assert said["largest_error"] < bound
    remark = said["remark"]
    assert isinstance(remark, float)
    assert remark < bound
    assert 2 * remark == lora_error_bound(4000, failure=0.05, num_rows=200, num_layers=2)
    _, theorem, remark_said = lora_text(said)
    assert f"200 gradients in each of 2 modules: at most {bound:.2f} |g| |g'|" in theorem
    assert f"at most {remark:.2f} |g| |g'| with probability 0.95" in remark_said


def test_the_error_of_the_mean_vanishes_with_the_rank() -> None:
    """As 1 / √r: a wrong scale would leave an error that does not fall."""
    small, large = (float(facts(rank)["relative_error"]) for rank in (40, 4000))
    assert large < 0.3 * small < 0.3


def test_a_bound_that_says_nothing_is_said() -> None:
    said = facts(4)
    assert said["bound"] is said["remark"] is None
    assert float(said["least_failure"]) > 1
    needed = said["rank_needed"]
    assert lora_error_bound(needed["0.5"], failure=0.025, num_rows=200) <= 0.5
    _, theorem, remark = lora_text(said)
    assert "it says nothing" in theorem
    assert f"parameters.r={needed['0.1']} for 0.1" in theorem
    assert remark.endswith("nothing either.")
    assert len(lora_text(facts(4, num_modules=1))) == 2


# ------------------------------------------------------------------ a worker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_model(tmp_path_factory.mktemp("model"))


def adapted(folder: Path, model: ModelConfig, **kernel: object) -> WorkerSpec:
    spec = make_spec(folder, model, precision=Precision.float64, batch_size=3)
    parameters = ParametersConfig(Method.lora, r=2, lora_alpha=4.0)
    options = dataclasses.replace(spec.kernel, **kernel)  # type: ignore[arg-type]
    return dataclasses.replace(spec, parameters=parameters, kernel=options)


def complete(spec: WorkerSpec) -> None:
    for outcome in InlineExecutor().run(spec.blocks, handle_of(spec).missing()):
        outcome.value()


def test_the_first_worker_measures_on_the_first_examples(
    tmp_path: Path, model: ModelConfig
) -> None:
    spec = adapted(tmp_path, model)
    complete(spec)
    said = handle_of(spec).read_pinned("lora")
    assert said["examples"] == 8
    assert said["gradients"] == 22
    problem = load_problem(
        model, spec.parameters, label_ids=(7, 9), num_labels=2, precision=Precision.float64
    )
    case = cases.Case(problem.module, problem.readout, collate(spec.encoded, range(8)))
    expected = definition(case, adapted_layers(problem.module))
    assert said["largest_error"] == pytest.approx(expected["largest_error"], rel=1e-6)
    assert said["relative_error"] == pytest.approx(expected["relative_error"], rel=1e-6)


def test_other_kernels_are_not_compared(tmp_path: Path, model: ModelConfig) -> None:
    """Not of the full model, and not of signs, of which the theorem says nothing."""
    for name, spec in {
        "full": dataclasses.replace(
            adapted(tmp_path / "full", model), parameters=ParametersConfig()
        ),
        "signs": adapted(tmp_path / "signs", model, kinds=KernelConfig(kinds=[Kind.signgd]).kinds),
    }.items():
        Worker(spec).prepare()
        assert not handle_of(spec).has_pinned("lora"), name
