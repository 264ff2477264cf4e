"""Overrides become a typed, frozen RunConfig; every mistake is an InputError that helps."""

from __future__ import annotations

import dataclasses

import pytest

from raykernel.compose import compose_point, compose_runs, conf_dir, flags_first
from raykernel.config import RunConfig, canonical_json, differences, fingerprint
from raykernel.errors import InputError
from raykernel.terms import PromptStyle, Solver


def compose(*overrides: str) -> RunConfig:
    (run,) = compose_runs("kernel", list(overrides))
    return run.config


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


EXPERIMENTS = choices("experiment")


GROUPS = [
    "task",
    "model",
    "parameters",
    "kernel",
    "solver",
    "training",
    "regularization",
    "behavior",
    "spectrum",
    "select",
    "compute",
]


@pytest.mark.parametrize("turn", range(max(len(choices(group)) for group in GROUPS)))
def test_every_choice_of_every_group_composes(turn):
    """A choice of each at a time: all of the largest group, those of others in turn."""
    chosen = [f"{group}={choices(group)[turn % len(choices(group))]}" for group in GROUPS]
    assert isinstance(compose(*chosen, "model.name=x"), RunConfig)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name):
    assert isinstance(compose(f"experiment={name}"), RunConfig)


def test_prompt_null_is_the_null_prompt():
    assert compose("prompt=null").prompt.style is PromptStyle.null
    styles = [run.config.prompt.style for run in compose_runs("kernel", ["-m", "prompt=null,none"])]
    assert styles == [PromptStyle.null, PromptStyle.none]


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        compose().task.k = 3  # type: ignore[misc]


def test_words_are_given_on_the_command_line_with_any_label_as_text():
    words = compose("prompt.words={0: bad, great: good, true: yes}").prompt.words
    assert words == {"0": "bad", "great": "good", "true": "yes"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=roberta_base", "training=adam", "training.learning_rate=1e-5", "task=sst2"],
        ["experiment=demo_prompt", "task.k=4", "prompt=null"],
        ["task.text=[a,b]", "prompt.words={0: bad, true: good}", "prompt.words.0=worse"],
        ["kernel.projection={method: rademacher, dim: 8}", "kernel.projection.dim=32"],
        ["training.learning_rate=1", "training=sgd", "training.learning_rate=2", "model.name=x"],
        ["solver.ridge=[.inf]"],
        ["task.k=0"],
        ["training.learning_rate=fast"],
        ["++training.learning_rate=0.5", "~model"],
        ["task=sst3"],
        ["solver.groups=[a]", "kernel.projection.method=intrinsic_dimension"],
    ],
)
def test_a_run_of_a_study_is_what_hydra_composes(overrides):
    """Also at its second time, when parts of it are known, and where it is refused."""

    def found(compose):
        try:
            return compose("kernel", list(overrides)).config
        except InputError as error:
            return str(error)

    by_hydra = found(lambda *given: compose_runs(*given)[0])
    assert found(compose_point) == by_hydra
    assert found(compose_point) == by_hydra


def test_a_run_of_a_study_sees_its_environment(monkeypatch):
    for store in ("one", "other"):
        monkeypatch.setenv("RAYKERNEL_STORE", store)
        assert compose_point("kernel", []).config.store.path == store


@pytest.mark.parametrize(
    "arguments",
    [
        ["task.k=4,8", "task.seed=range(3)", "prompt=null,manual"],
        ["prompt.words={0: bad, great: good}", "task=sst2,mr", "task.k=1", "task.k=3,2"],
        ["solver.ridge=[1],[1,2]", "model.name='a,b',\"c d\""],
        ["experiment=quickstart,tiny", "task.k=choice(2)"],
    ],
)
def test_combinations_are_those_of_hydras_sweeper(arguments):
    runs = compose_runs("kernel", ["-m", *arguments])
    by_hydra = compose_runs("kernel", ["-m", "hydra.verbose=false", *arguments])
    assert [run.config for run in runs] == [run.config for run in by_hydra]


def test_an_interval_has_no_combinations():
    with pytest.raises(InputError, match="found an interval, expected values, because -m"):
        compose_runs("kernel", ["-m", "training.learning_rate=interval(1,2)"])


def test_one_job_per_combination_in_order():
    runs = compose_runs("kernel", ["-m", "task.k=4,8", "task.seed=13,21"])
    assert [(r.config.task.k, r.config.task.seed) for r in runs] == [
        (4, 13),
        (4, 21),
        (8, 13),
        (8, 21),
    ]


@pytest.mark.parametrize(
    ("override", "helps"),
    [
        ("task=sst3", "'sst2'"),
        ("model=robert_base", "'roberta_base'"),
        ("task.kk=3", "'task.k'"),
        ("k=3", "did you mean task.k?"),
        ("taks=sst2", "'task'"),
        ("task.k=abc", "task.k: Value 'abc'"),
        ("model=hf", "model.name: found nothing"),
        ("task.k=0", "task.k: found 0, expected at least 1"),
        ("kernel.kinds=[sgdd]", "expected one of [sgd"),
        ("prompt.style=foo", "expected one of [manual"),
        ("lambda=0.1", "spelt `lam`"),
        ("regularization.lambda=0.1", "regularization.lam="),
        ("regularization=decoupld", "'decoupled'"),
        ("lam=0.1", "did you mean regularization.lam?"),
        ("regularization.lam=0.1", "Set regularization=coupled"),
        ("+task.foo=1", "Unknown key 'foo'"),
        ("task.k=1,2", "task.k=1,2: found several values, expected one. Add -m"),
        ("prompt.template={review} It was", "inner quotes"),
        ("solver.ridge=[-1]", "values ≥ 0"),
        ("solver.f0_scaling=[0]", "values > 0"),
        ("solver.gamma=[0]", "solver.gamma: found [0.0], expected values > 0"),
        ("solver.gamma=[]", "at least one value"),
        ("solver.c=[1.5]", "values from 0 to 1"),
        ("solver.method=logistic", "no minimum without a ridge"),
        ("kernel.projection.method=gausian", "kernel.projection.method"),
        ("kernel.projection.dim=0", "kernel.projection.dim: found 0"),
        ("kernel.projection.dim=64", "Set kernel.projection.method"),
        ("kernel.projection.seed=3", "Set kernel.projection.method"),
        ("compute.workers=0", "compute.workers"),
        ("store.path=${oc.env:THERE_IS_NO_SUCH_VARIABLE}", "THERE_IS_NO_SUCH_VARIABLE"),
    ],
)
def test_a_mistake_says_what_was_expected(override, helps):
    with pytest.raises(InputError) as caught:
        compose(override)
    assert helps in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "helps"),
    [
        (["method=rademacher", "kernel.kinds=[sgd,signgd]"], "kernel.kinds: found ['sgd'"),
        (["method=two_sided", "kernel.projection.dim=509"], "such as 16 x 32 = 512"),
        (["method=intrinsic_dimension", "solver.groups=[head]"], "solver.groups: found ['head']"),
    ],
)
def test_a_projection_that_cannot_be_is_refused_at_once(overrides, helps):
    with pytest.raises(InputError) as caught:
        compose(f"kernel.projection.{overrides[0]}", *overrides[1:])
    assert helps in str(caught.value)


def test_flags_stand_anywhere():
    """Hydra's own parser refuses overrides behind a flag where others stand before it."""
    wanted = ["task.k=1", "task.k=2"]
    for place in range(3):
        arguments = ["task=sst2", "task.k=1,2"]
        arguments.insert(place, "-m")
        assert [run.overrides[1] for run in compose_runs("kernel", arguments)] == wanted
    mixed = ["a=1", "--config-dir", "x=y", "b=2", "-m", "c=3", "--cfg=job", "~d"]
    flags = ["--config-dir", "x=y", "-m", "--cfg=job"]
    assert flags_first(mixed) == [*flags, "a=1", "b=2", "c=3", "~d"]


def test_the_composed_configuration_is_printed_wherever_it_is_asked_for(capsys):
    assert compose_runs("kernel", ["task=sst2", "--cfg", "job", "task.k=3"]) == []
    assert "k: 3" in capsys.readouterr().out


def test_an_unknown_choice_lists_the_choices_once():
    with pytest.raises(InputError) as raised:
        compose_runs("finetune", ["training=rmsprop"])
    listed = "adam, adamw, sgd, signgd"
    assert (
        str(raised.value) == f"Unknown training 'rmsprop': choose one of conf/training: {listed}."
    )
    with pytest.raises(InputError, match=f"'adam'.* All of conf/training: {listed}"):
        compose_runs("finetune", ["training=adm"])


def test_identity_is_one_text_per_content():
    assert canonical_json({"b": 1.0, "a": [True, None]}) == '{"a":[true,null],"b":1.0}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    with pytest.raises(TypeError, match="no canonical"):
        canonical_json({"a": object()})


def test_differences_name_the_leaves():
    found = {"task": {"k": 16, "seed": 13}, "x": 1}
    expected = {"task": {"k": 64, "seed": 13}, "y": 2}
    assert differences(found, expected) == [
        ("task.k", 16, 64),
        ("x", 1, None),
        ("y", None, 2),
    ]


def test_golden_fingerprint_of_the_parts_that_decide_numbers():
    """A change here changes the name of every stored kernel: it must be meant."""
    config = RunConfig()
    assert fingerprint(config.kernel.identity) == "48755baead0af404"
    assert fingerprint(config.parameters.identity) == "1342f090a7b8cf02"


def test_asymmetric_kinds_have_their_own_solver_whatever_the_method():
    config = compose("solver=logistic", "kernel.kinds=[sgd,asigngd]", "solver.c=[1.0,0.5]")
    solvers = [config.solver.solver_of(kind) for kind in config.kernel.kinds]
    assert solvers == [Solver.logistic, Solver.asymmetric]
    assert config.needs_both_sides
    assert not compose("solver.c=[0.5]").needs_both_sides
    assert compose("solver=asymmetric", "solver.c=[0.5]").needs_both_sides
