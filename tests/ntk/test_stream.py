"""A model's factors block by block are those of the whole capture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.stream import Streamer
from tests import cases, oracles

CHAINS = [
    *["roberta", "bert", "distilbert", "electra", "modernbert"],
    *["gpt2", "gpt_neox", "opt", "llama", "qwen2", "gemma"],
]


def streamer_of(case, **options):
    if hasattr(case.model, "config"):
        case.model.config.use_cache = False
    return Streamer(Tracer(case.model, case.readout, **options))


def check(case, *, streams=True, cols=None):
    streamer = streamer_of(case)
    tracer = Tracer(case.model, case.readout)
    for batch in (case.batch, cases.token_batch(n=1), case.batch):  # learnt, then known
        found = {}
        for capture in streamer.stream(batch):
            found.update(gram(capture, capture))
        whole = tracer.capture(batch)
        expected = gram(whole, whole)
        assert sorted(found) == sorted(expected)
        scale = sum(block.norm() for block in expected.values())
        for group, block in expected.items():
            assert (found[group] - block).norm() <= 1e-5 * block.norm() + 1e-7 * scale, group
    assert (len(streamer.segments) > 1) == streams
    assert sorted(sum(streamer.segments, ())) == sorted(tracer.groups)
    return streamer


@pytest.mark.parametrize("name", CHAINS)
def test_transformers_are_chains(name):
    case = cases.transformer_case(name)
    streamer = check(case)
    assert len(streamer.segments) == cases.LAYERS + 1


@pytest.mark.parametrize("name", ["albert", "deberta_v2"])
def test_what_is_no_chain_comes_at_once(name):
    """ALBERT runs one layer several times; DeBERTa's layers share relative positions."""
    check(cases.transformer_case(name), streams=False)


def test_a_kept_cache_makes_no_wrong_kernel():
    case = cases.transformer_case("llama")
    tracer = Tracer(case.model, case.readout)
    case.model.config.use_cache = True
    streamer = Streamer(Tracer(case.model, case.readout))
    found = {}
    for capture in streamer.stream(case.batch):
        found.update(gram(capture, capture))
    whole = tracer.capture(case.batch)
    assert oracles.relative_error(sum(found.values()), sum(gram(whole, whole).values())) < 1e-6


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_frozen_lower_layers_are_not_run_again(name):
    case = cases.transformer_case(name)
    for path, parameter in case.model.named_parameters():
        parameter.requires_grad_(".1." in path)
    streamer = check(case)
    assert len(streamer.segments) == 2
    assert streamer.segments[1] == ()


@pytest.mark.parametrize("name", list(cases.LORA_TARGETS))
def test_lora_streams(name):
    check(cases.lora_case(name, zero_b=False))


class Blocks(nn.Module):
    """A stack of layers, with or without a way around them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.way = way

    def forward(self, x):
        hidden = first = self.embed(x)
        order = reversed(self.layers) if self.way == "reversed" else self.layers
        middle = None
        for layer in order:
            hidden = layer(hidden + 0 if self.way == "changed" else hidden)
            middle = hidden if middle is None else middle
        if self.way == "around all":
            hidden = hidden + first
        if self.way == "around some":
            hidden = hidden + middle
        return self.head(hidden)


@pytest.mark.parametrize(
    ("way", "streams"),
    [
        ("straight", True),
        ("around all", True),
        ("around some", False),
        ("reversed", False),
        ("changed", False),
    ],
)
def test_a_way_around_the_blocks_is_seen(way, streams):
    model = Blocks(way)

    def readout(model, batch):
        return model(batch["x"])

    batch = {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(1))}
    streamer = Streamer(Tracer(model, readout))
    for _ in range(2):
        found = {}
        for capture in streamer.stream(batch):
            found.update(gram(capture, capture))
        expected = oracles.kernel_by_parameter(model, readout, batch)
        assert oracles.relative_error(sum(found.values()), sum(expected.values())) < 1e-5
    assert (len(streamer.segments) > 1) == streams


def test_batches_go_side_by_side():
    """Several batches half-way through the blocks do not disturb each other, nor the model."""
    case = cases.transformer_case("roberta")
    streamer = streamer_of(case)
    list(streamer.stream(case.batch))
    case.model.train()
    other = cases.token_batch(n=3, lengths=(5, 8, 11), seed=8)
    ways = [streamer.stream(case.batch), streamer.stream(other)]
    total = 0
    for rows, cols in zip(*ways, strict=True):
        total = total + sum(gram(rows, cols).values())
    expected = sum(
        oracles.kernel_by_parameter(case.model, case.readout, case.batch, other).values()
    )
    assert oracles.relative_error(total, expected) < 1e-5
    assert case.model.training
    assert all(p.requires_grad for p in case.model.parameters())


def test_pieces_of_a_chunk_join():
    case = cases.transformer_case("gpt2")
    streamer = streamer_of(case)
    whole = [gram(c, c) for c in streamer.stream(case.batch)]
    halves = [{k: v[i:j] for k, v in case.batch.items()} for i, j in ((0, 2), (2, 5))]
    ways = [streamer.stream(half) for half in halves]
    for expected, pieces in zip(whole, zip(*ways, strict=True), strict=True):
        joined = Capture.concatenate(pieces)
        for group, block in gram(joined, joined).items():
            assert oracles.relative_error(block, expected[group]) < 1e-4 or block.norm() < 1e-4


def test_a_step_takes_less_than_the_whole():
    case = cases.transformer_case("llama")
    streamer = streamer_of(case)
    streamer_bytes = streamer.num_bytes(case.batch)
    whole = Tracer(case.model, case.readout).capture({k: v[:1] for k, v in case.batch.items()})
    assert 0 < streamer_bytes.factors < whole.num_bytes
    assert streamer_bytes.kept > 0
    assert streamer_bytes.step > streamer_bytes.factors
