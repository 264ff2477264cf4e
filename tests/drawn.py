"""Small random models and examples for hypothesis to draw: every pattern the engine tells apart.

A recipe is plain data, so that a failing one prints as the call that builds it. A model reads
token ids of unequal length and does not look at padding, so that an example's gradients are the
same alone, padded, and beside others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests import cases

MAX_TOKENS = 6
_EPS = 0.1
"""Of norms: two features have hardly any gradient with the usual one, and rounding has its sign."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model, and the row and column examples of a kernel."""

    seed: int
    width: int
    inner: int
    vocabulary: int
    blocks: tuple[tuple[str, ...], ...]
    """Names of `LAYERS` by block of the model's module list."""
    order: str
    """`straight`, or a way through the blocks that is no chain."""
    positions: str
    padding_idx: int | None
    head: str
    at: str
    """Where the head reads: `position` or `mean`."""
    labels: tuple[int, ...]
    """Rows of the vocabulary that are outputs; equal ones are allowed."""
    ties: tuple[tuple[int, int], ...]
    """Pairs of parameters of one shape that become one, by place."""
    frozen: frozenset[int]
    lengths: tuple[int, ...]
    """Tokens of each row example."""
    col_lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A function, and examples on both sides."""

    model: nn.Module
    rows: cases.Batch
    cols: cases.Batch

    @staticmethod
    def readout(model: nn.Module, batch: cases.Batch) -> Tensor:
        """Logits (n, c)."""
        return model(batch["ids"], batch["mask"], batch["position"])


# ------------------------------------------------------------------ layers
def _attend(m: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
    # Shift invariance of softmax: the key's bias has no gradient but rounding.
    scores = m.query(h) @ m.key(h).mT
    weights = scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(2)
    return h + weights @ m.value(h)


def _choose(m: nn.Module, h: Tensor, *, idle: bool) -> Tensor:
    flat = h.flatten(0, 1)
    out = torch.zeros_like(flat)
    for expert, chosen in ((m.first, flat[:, 0] > 0), (m.second, flat[:, 0] <= 0)):
        if idle or chosen.any():  # an idle one runs on no token
            out[chosen] = expert(flat[chosen])
    return h + out.view_as(h)


def _change_in_place(m: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
    out = m.first(h)
    out += m.second(h)
    return out.tanh_()


def _vector(d: int) -> nn.Parameter:
    return nn.Parameter(0.7 * torch.randn(d))


def _matrix(d: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(d, d) / d**0.5)


Layer = Callable[[int, int], nn.Module]

LAYERS: dict[str, Layer] = {
    "linear": lambda d, w: cases.Module(
        lambda m, h, mask: h + m.second(torch.tanh(m.first(h))),
        first=nn.Linear(d, w),
        second=nn.Linear(w, d, bias=False),
    ),
    "square": lambda d, w: cases.Module(
        lambda m, h, mask: torch.tanh(m.first(h)), first=nn.Linear(d, d)
    ),
    "called_twice": lambda d, w: cases.Module(
        lambda m, h, mask: m.first(torch.tanh(m.first(h))), first=nn.Linear(d, d)
    ),
    "conv1d": lambda d, w: cases.Module(
        lambda m, h, mask: h + m.second(torch.tanh(m.first(h))),
        first=Conv1D(w, d),
        second=Conv1D(d, w),
    ),
    "square_conv1d": lambda d, w: cases.Module(
        lambda m, h, mask: torch.tanh(m.first(h)), first=Conv1D(d, d)
    ),
    "attention": lambda d, w: cases.Module(
        _attend, query=nn.Linear(d, d), key=nn.Linear(d, d), value=nn.Linear(d, d)
    ),
    "layer_norm": lambda d, w: cases.Module(
        lambda m, h, mask: m.norm(h), norm=nn.LayerNorm(d, _EPS)
    ),
    "zero_norm": lambda d, w: cases.Module(
        lambda m, h, mask: h + m.norm(h), norm=nn.LayerNorm(d, _EPS, bias=False)
    ),
    "rms_norm": lambda d, w: cases.Module(lambda m, h, mask: m.norm(h), norm=nn.RMSNorm(d, _EPS)),
    "vectors": lambda d, w: cases.Module(
        lambda m, h, mask: m.first(h * m.scale) + m.shift,
        first=nn.Linear(d, d, bias=False),
        scale=_vector(d),
        shift=_vector(d),
    ),
    "scalar": lambda d, w: cases.Module(
        lambda m, h, mask: h * m.scale, scale=nn.Parameter(torch.tensor(1.3))
    ),
    "matrix": lambda d, w: cases.Module(
        lambda m, h, mask: torch.tanh(h @ m.matrix) @ m.matrix.T, matrix=_matrix(d)
    ),
    "some_rows": lambda d, w: cases.Module(
        lambda m, h, mask: h + F.linear(h, m.matrix[torch.arange(d) // 2]), matrix=_matrix(d)
    ),
    "experts": lambda d, w: cases.Module(
        lambda m, h, mask: _choose(m, h, idle=False), first=nn.Linear(d, d), second=nn.Linear(d, d)
    ),
    "idle_experts": lambda d, w: cases.Module(
        lambda m, h, mask: _choose(m, h, idle=True), first=nn.Linear(d, d), second=nn.Linear(d, d)
    ),
    "in_place": lambda d, w: cases.Module(
        _change_in_place, first=nn.Linear(d, d), second=nn.Linear(d, d)
    ),
    # No rule covers these: differentiated through their module, or through the model.
    "convolution": lambda d, w: cases.Module(
        lambda m, h, mask: torch.tanh(m.conv(h.mT).mT).contiguous(), conv=nn.Conv1d(d, d, 1)
    ),
    "unknown_leaf": lambda d, w: cases.Module(
        lambda m, h, mask: h * m.scale.exp(), scale=_vector(d)
    ),
    "unknown": lambda d, w: cases.Module(
        lambda m, h, mask: m.first(h * m.scale.exp()), first=nn.Linear(d, d), scale=_vector(d)
    ),
    "unused": lambda d, w: cases.Module(lambda m, h, mask: h, first=nn.Linear(d, d)),
}
"""Functions of hidden states (n, t, d) and mask (n, t), by name, from widths d and w."""


# ------------------------------------------------------------------ model
class LabelRows(nn.Linear):
    """A head that multiplies some of its rows only."""

    def __init__(self, width: int, vocabulary: int, labels: tuple[int, ...]) -> None:
        super().__init__(width, vocabulary)
        self.labels = torch.tensor(labels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Outputs of these rows."""
        return F.linear(hidden, self.weight[self.labels], self.bias[self.labels])


class Drawn(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        d, self.recipe = recipe.width, recipe
        self.embed = nn.Embedding(recipe.vocabulary, d, padding_idx=recipe.padding_idx)
        if recipe.positions == "embedding":
            self.place = nn.Embedding(MAX_TOKENS, d)
        elif recipe.positions == "parameter":
            self.place = nn.Parameter(torch.randn(1, MAX_TOKENS, d))
        self.blocks = nn.ModuleList(
            cases.Module(
                _through, layers=nn.ModuleList(LAYERS[name](d, recipe.inner) for name in names)
            )
            for names in recipe.blocks
        )
        if recipe.head == "label_rows":
            self.head = LabelRows(d, recipe.vocabulary, recipe.labels)
        elif recipe.head != "functional":
            outputs = len(recipe.labels) if recipe.head == "linear" else recipe.vocabulary
            self.head = nn.Linear(d, outputs, bias=recipe.head != "tied")
        if recipe.head == "tied":
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
        """Logits of the labels."""
        first = hidden = self._embedded(ids)
        blocks = list(self.blocks)
        if self.recipe.order == "reversed":
            blocks.reverse()
        if self.recipe.order == "first_again":
            blocks += blocks[:1]
        for block in blocks:
            hidden = block(hidden, mask)
            if self.recipe.order == "around":
                hidden = hidden + first
        if self.recipe.at == "position":
            hidden = cases.at_position(hidden, position)
        else:
            hidden = (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        return self._outputs(hidden)

    def _embedded(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        if self.recipe.positions == "embedding":
            return hidden + self.place(torch.arange(ids.shape[1]))
        if self.recipe.positions == "parameter":
            return hidden + self.place[:, : ids.shape[1]]
        return hidden

    def _outputs(self, hidden: Tensor) -> Tensor:
        if self.recipe.head in ("linear", "label_rows"):
            return self.head(hidden)
        if self.recipe.head == "functional":
            logits = F.linear(hidden, self.embed.weight)
        else:
            logits = self.head(hidden)
        return logits[:, torch.tensor(self.recipe.labels)]


def _through(block: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
    for layer in block.layers:
        hidden = layer(hidden, mask)
    return hidden


def _tie(model: nn.Module, ties: Iterable[tuple[int, int]]) -> None:
    """Let pairs of places hold one parameter, also a matrix and one stored transposed."""
    for first, second in ties:
        places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        _, _, shared = places[first % len(places)]
        alike = [(m, n) for m, n, p in places if p.shape == shared.shape and p is not shared]
        if alike:
            setattr(*alike[second % len(alike)], shared)


def build(recipe: Recipe) -> Problem:
    """The model in float64, and its examples."""
    torch.manual_seed(recipe.seed)
    model = Drawn(recipe).double().eval()
    cases.randomise_vectors(model, seed=recipe.seed)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.bias is None:
            module.weight.data[0] = 0.0
    _tie(model, recipe.ties)
    parameters = list(model.parameters())
    frozen = {index % len(parameters) for index in recipe.frozen}
    for index, parameter in enumerate(parameters):
        parameter.requires_grad_(index not in frozen or len(frozen) == len(parameters))
    rows, cols = (_examples(recipe, own) for own in (recipe.lengths, recipe.col_lengths))
    return Problem(model, rows, cols)


def _examples(recipe: Recipe, lengths: tuple[int, ...]) -> cases.Batch:
    n, t = len(lengths), max(lengths)
    ids = torch.randint(0, recipe.vocabulary, (n, t))
    # Few ids, so that they repeat within and between examples, and are labels, too.
    ids[:, ::2] %= 5
    mask = (torch.arange(t) < torch.tensor(lengths).unsqueeze(1)).long()
    position = torch.tensor([torch.randint(0, length, ()).item() for length in lengths])
    return {"ids": ids * mask, "mask": mask, "position": position}


def pieces(batch: cases.Batch, sizes: Iterable[int], *, crop: bool) -> list[cases.Batch]:
    """The batch cut into so many examples each, the rest last; cropped to their own lengths."""
    n = len(batch["ids"])
    ends = [*(end for end in accumulate(sizes) if end < n), n]
    found = []
    for start, end in zip([0, *ends], ends, strict=False):
        piece = {key: value[start:end] for key, value in batch.items()}
        t = int(piece["mask"].sum(1).max()) if crop else batch["ids"].shape[1]
        found.append({k: v[:, :t] if v.dim() == 2 else v for k, v in piece.items()})
    return found


# ------------------------------------------------------------------ strategies
NO_CHAIN = ("around", "reversed", "first_again")
ONE_BY_ONE = ("experts", "idle_experts")
NO_RULE = ("convolution", "unknown", "unknown_leaf")
RULED = tuple(name for name in LAYERS if name not in NO_RULE + ONE_BY_ONE)

_lengths = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=5).map(tuple)
_places = st.integers(0, 20)


def _recipes(
    layers: Iterable[str], *, num_blocks: tuple[int, int], ties: int, **drawn: st.SearchStrategy
) -> st.SearchStrategy[Recipe]:
    block = st.lists(st.sampled_from(sorted(layers)), max_size=2).map(tuple)
    fewest, most = num_blocks
    return st.builds(
        Recipe,
        seed=st.integers(0, 2**20),
        width=st.integers(2, 4),
        inner=st.integers(1, 4),
        # The large one has a head of which only the columns that are read are kept.
        vocabulary=st.sampled_from([5, 9, 40, 1100]),
        blocks=st.lists(block, min_size=fewest, max_size=most).map(tuple),
        padding_idx=st.sampled_from([None, 0, 3]),
        head=st.sampled_from(["linear", "vocabulary", "tied", "label_rows", "functional"]),
        at=st.sampled_from(["position", "mean"]),
        labels=st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple),
        ties=st.lists(st.tuples(_places, _places), max_size=ties).map(tuple),
        frozen=st.frozensets(_places, max_size=4),
        lengths=_lengths,
        col_lengths=_lengths,
        **drawn,
    )


CHAINS = _recipes(
    RULED,
    num_blocks=(2, 3),
    ties=0,
    order=st.just("straight"),
    positions=st.sampled_from(["none", "embedding"]),
)
"""Models that can be streamed, and whose examples are captured side by side."""

TIED = _recipes(
    RULED,
    num_blocks=(0, 2),
    ties=3,
    order=st.sampled_from(["straight", *NO_CHAIN]),
    positions=st.sampled_from(["none", "embedding"]),
)
"""Models of which rules cover everything, with shared parameters."""

ODD = _recipes(
    LAYERS,
    num_blocks=(1, 3),
    ties=2,
    order=st.sampled_from(["straight", *NO_CHAIN]),
    positions=st.sampled_from(["none", "embedding", "parameter"]),
)
"""Models with parameters that no rule covers, and examples that have to be traced one by one."""

FAMILIES = {"chain": CHAINS, "tied": TIED, "odd": ODD}
