from __future__ import annotations

import pytest

from raykernel.errors import InputError
from raykernel.store.groups import halved_ties, layer_of, select_groups

NAMES = [
    "roberta.embeddings.word_embeddings",
    "roberta.encoder.layer.0.attention.self.query",
    "roberta.encoder.layer.0.output.dense",
    "roberta.encoder.layer.1.attention.self.query",
    "roberta.encoder.layer.10.attention.self.query",
    "lm_head.decoder",
    "cross(roberta.embeddings.word_embeddings, lm_head.decoder)",
]
EMBEDDINGS, QUERY0, DENSE0, QUERY1, QUERY10, DECODER, CROSS = NAMES


def test_no_criterion_selects_everything() -> None:
    assert select_groups(NAMES) == NAMES
    assert select_groups(NAMES, groups=[], target_modules=[]) == NAMES


def test_names_and_regular_expressions() -> None:
    assert select_groups(NAMES, groups=[QUERY1]) == [QUERY1]
    assert select_groups(NAMES, groups=["query"]) == [QUERY0, QUERY1, QUERY10]
    assert select_groups(NAMES, groups=[r"layer\.1\.", "lm_head"]) == [QUERY1, DECODER]


def test_an_exact_name_is_no_expression() -> None:
    assert select_groups(["layer.1", "layer.10"], groups=["layer.1"]) == ["layer.1"]


def test_selection_keeps_the_stored_order() -> None:
    assert select_groups(NAMES, groups=["lm_head", DENSE0]) == [DENSE0, DECODER]


def test_layers_to_transform_counts_from_either_end() -> None:
    assert select_groups(NAMES, layers_to_transform=[0]) == [QUERY0, DENSE0]
    assert select_groups(NAMES, layers_to_transform=[-1]) == [QUERY10]


def test_target_modules_match_ends_of_paths() -> None:
    assert select_groups(NAMES, target_modules=["query"]) == [QUERY0, QUERY1, QUERY10]
    assert select_groups(NAMES, target_modules=["output.dense"]) == [DENSE0]


def test_target_modules_match_the_module_that_an_adapter_adapts() -> None:
    names = [f"base.layer.0.query.lora_{side}.default" for side in "AB"]
    assert select_groups([*names, "base.head"], target_modules=["query"]) == names


def test_criteria_are_combined() -> None:
    assert select_groups(NAMES, layers_to_transform=[0], target_modules=["query"]) == [QUERY0]


def test_a_cross_group_comes_with_both_of_its_groups() -> None:
    assert select_groups(NAMES, groups=["embeddings", "lm_head"]) == [EMBEDDINGS, DECODER, CROSS]
    assert select_groups(NAMES, groups=["embeddings"]) == [EMBEDDINGS]
    assert select_groups(NAMES, groups=NAMES) == NAMES
    with pytest.raises(InputError, match="alone, expected both"):
        select_groups(NAMES, groups=[EMBEDDINGS, CROSS])


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ({"groups": ["lm_head.decodr"]}, "did you mean 'lm_head.decoder'"),
        ({"groups": ["layer.0", "valeu"]}, "'valeu' matches none"),
        ({"groups": ["("]}, "regular expression"),
        ({"layers_to_transform": [2]}, r"layers among \[0, 1, 10\]"),
        ({"layers_to_transform": [-12]}, "layers among"),
        ({"target_modules": ["querry"]}, "did you mean 'query'"),
        ({"layers_to_transform": [1], "target_modules": ["dense"]}, "at once"),
    ],
)
def test_what_matches_nothing_is_an_error(criteria: dict[str, list[object]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_groups(NAMES, **criteria)  # type: ignore[arg-type]


def test_layer_of_a_module_path() -> None:
    assert [layer_of(name) for name in NAMES[:5]] == [None, 0, 0, 1, 10]
    assert layer_of("model.layers.3.mlp.experts.7.w1") == 3


def test_halved_ties_are_cross_groups_of_which_some_uses_are_chosen() -> None:
    names = ["a", "b", "c", "cross(a, b)", "cross(a, c)", "cross(b, c)", "d"]
    for chosen, halved in (
        (["d"], []),
        (["a", "b", "c", "d"], []),
        (["a"], ["cross(a, b)", "cross(a, c)"]),
        (["a", "b"], ["cross(a, c)", "cross(b, c)"]),
    ):
        assert halved_ties(names, select_groups(names, groups=chosen)) == halved
