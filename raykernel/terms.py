"""The closed choices of the configuration, in the field's words.

Members are lower case because configuration files and command lines spell them so.
"""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """Kernel of the update rule (Malladi et al. 2023, Definitions 3.2 to 3.4)."""

    sgd = "sgd"
    """K[i, a, j, b] = <∇f_a(x_i), ∇f_b(x_j)>, the empirical NTK."""
    signgd = "signgd"
    """K[i, a, j, b] = <sign ∇f_a(x_i), sign ∇f_b(x_j)>, of Adam early in training."""
    asigngd = "asigngd"
    """K[i, a, j, b] = <∇f_a(x_i), sign ∇f_b(x_j)>, asymmetric."""
    asigngd_flipped = "asigngd_flipped"
    """K[i, a, j, b] = <sign ∇f_a(x_i), ∇f_b(x_j)>, the same seen from the columns."""

    @property
    def has_signs(self) -> bool:
        """Whether signs of gradients enter."""
        return self is not Kind.sgd

    @property
    def has_signed_rows(self) -> bool:
        """Whether signs of the row examples' gradients enter: then J w does not predict them."""
        return self in (Kind.signgd, Kind.asigngd_flipped)

    @property
    def flipped(self) -> Kind:
        """The kind whose K[j, b, i, a] is this kind's K[i, a, j, b]: itself if symmetric."""
        pair = (Kind.asigngd, Kind.asigngd_flipped)
        return pair[1 - pair.index(self)] if self in pair else self

    @property
    def is_symmetric(self) -> bool:
        """Whether the kernel of examples with themselves is a symmetric matrix."""
        return self.flipped is self


class Solver(Enum):
    """How kernel regression is solved (Malladi et al. 2023, appendix A.3)."""

    ridge = "ridge"
    """Least squares to one-hot targets."""
    logistic = "logistic"
    """Softmax cross-entropy, regularised by the norm of the function."""
    asymmetric = "asymmetric"
    """Least squares with an asymmetric kernel (He et al. 2022): asigngd has no other."""


class PredictedBy(Enum):
    """How the outputs of test examples were predicted."""

    tangent = "tangent"
    """J(x) w with w = J(train)ᵀ α: without their kernel with train."""
    block = "block"
    """K(x, train) α."""


class Metric(Enum):
    """What a task is judged by."""

    accuracy = "accuracy"
    f1 = "f1"
    """F1 of the second label (MRPC, QQP: the paraphrases)."""
    matthews = "matthews"
    """Matthews correlation (CoLA)."""


class Source(Enum):
    """Where examples come from."""

    hub = "hub"
    lmbff = "lmbff"
    file = "file"
    packaged = "packaged"


class Truncation(Enum):
    """Which end of a text gives way to the token limits."""

    tail = "tail"
    head = "head"
    """The beginning: where the end says more, as the verdict of a review does."""


class PromptStyle(Enum):
    """How a task becomes a cloze question (Malladi et al. 2023, Table 9)."""

    manual = "manual"
    searched = "searched"
    null = "null"
    none = "none"
    """No prompt: a linear head on the encoder, standard fine-tuning."""


class ModelSource(Enum):
    """Where weights come from."""

    hub = "hub"
    """A Hugging Face name, or a local folder."""
    gguf = "gguf"
    packaged = "packaged"


class Architecture(Enum):
    """Which head the checkpoint has."""

    masked_lm = "masked_lm"
    causal_lm = "causal_lm"
    encoder = "encoder"


class Pooling(Enum):
    """Which hidden state the linear head of standard fine-tuning reads."""

    cls = "cls"
    mean = "mean"


class Method(Enum):
    """Which parameters vary."""

    full = "full"
    lora = "lora"
    peft = "peft"
    """Those that any configuration of PEFT adds."""

    @property
    def adds_adapter(self) -> bool:
        """Whether the model gets parameters of its own beside the pre-trained ones."""
        return self is not Method.full


class Precision(Enum):
    """Arithmetic of the forward pass, the backward passes and the products."""

    float32 = "float32"
    float64 = "float64"
    tf32 = "tf32"
    bfloat16 = "bfloat16"

    @property
    def is_reduced(self) -> bool:
        """Whether it rounds more than float32."""
        return self in (Precision.tf32, Precision.bfloat16)

    @property
    def stored(self) -> str:
        """Type of the stored blocks: sums over layers are never taken in less than float32."""
        return "float64" if self is Precision.float64 else "float32"


class Projection(Enum):
    """Random projection of gradients before their kernel is taken (`ntk.project`)."""

    none = "none"
    """The exact kernel."""
    gaussian = "gaussian"
    """Every layer group's gradient, by a matrix of normal entries."""
    rademacher = "rademacher"
    """The same with entries -1 and 1: a fiftieth of the time to make them, no more variance."""
    two_sided = "two_sided"
    """Every matrix's gradient from both sides: cheap, less precise, covered by no bound."""
    intrinsic_dimension = "intrinsic_dimension"
    """The whole gradient, not by layer (Malladi et al. 2023, Definition D.1)."""


class Optimizer(Enum):
    """Update rule of fine-tuning."""

    sgd = "sgd"
    """θ ← θ - η g, without momentum."""
    adam = "adam"
    """Weight decay, if any, is part of the gradient."""
    adamw = "adamw"
    """Weight decay is a step of its own."""
    signgd = "signgd"
    """θ ← θ - η sign g: Adam early in training (Malladi et al. 2023, section 3.2)."""

    @property
    def is_adaptive(self) -> bool:
        """Whether moments of the gradient enter."""
        return self in (Optimizer.adam, Optimizer.adamw)

    @property
    def num_states(self) -> int:
        """What it remembers of every number that it moves, in numbers."""
        return 2 if self.is_adaptive else 0

    @property
    def is_scale_free(self) -> bool:
        """Whether a multiple of the loss gives the same step (with Adam up to its ε)."""
        return self is not Optimizer.sgd


class Regularization(Enum):
    """How fine-tuning is pulled to its start, by λ/2 ‖θ - θ_0‖² (`training.regularization`)."""

    none = "none"
    coupled = "coupled"
    """Its gradient is added to that of the loss: the optimiser sees the sum."""
    decoupled = "decoupled"
    """θ ← θ - ηλ(θ - θ_0), a step of its own, as AdamW's weight decay is."""
    selective = "selective"
    """The same step, taken only where descent on the loss does not lead away from θ_0."""


class LossConvention(Enum):
    """What λ is weighed against."""

    sum = "sum"
    """The loss summed over the train examples, as the papers write it."""
    mean = "mean"
    """Their mean loss, as programs compute it."""


class Loss(Enum):
    """What fine-tuning minimises, averaged over examples."""

    cross_entropy = "cross_entropy"
    squared = "squared"
    """½ Σ_a (f_a - y_a)² with one-hot y, whose gradient flow is that of kernel regression."""


class Schedule(Enum):
    """Learning rate over the steps."""

    linear = "linear"
    """η (1 - t/T) at step t of T, without warm-up."""
    constant = "constant"


class ExecutorName(Enum):
    """Where blocks are computed."""

    inline = "inline"
    ray = "ray"


class Split(Enum):
    """Role of an example."""

    train = "train"
    dev = "dev"
    test = "test"


class Command(Enum):
    """Commands that leave rows in the result tables."""

    kernel = "kernel"
    spectrum = "spectrum"
    select = "select"
    finetune = "finetune"
    behavior = "behavior"

    @property
    def is_of_kernel(self) -> bool:
        """It computes blocks and trains nothing: runs of one kernel share them."""
        return self in (Command.kernel, Command.spectrum, Command.select)

    @property
    def needs_kernel(self) -> bool:
        """It computes blocks, or finds those of another run."""
        return self.is_of_kernel or self is Command.behavior


class EngineName(Enum):
    """What runs the runs of a study."""

    pool = "pool"
    """This process, or with several workers Ray actors."""
    tune = "tune"
    """Ray Tune."""


class Direction(Enum):
    """Which values of a metric are better."""

    max = "max"
    min = "min"


class Stopping(Enum):
    """Which runs end early."""

    none = "none"
    asha = "asha"
    """Asynchronous successive halving (Li et al. 2020): those behind at an evaluation."""


class TrackerName(Enum):
    """Where else than in the store runs of a study are shown."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


class RunStatus(Enum):
    """How a run of a study ended."""

    ok = "ok"
    failed = "failed"
    stopped = "stopped"
    """Early, because others are better."""


class Cause(Enum):
    """Why a run failed."""

    memory = "memory"
    diverged = "diverged"
    """A number that is not finite."""
    input = "input"
    """Of the user; nothing was computed."""
    lost = "lost"
    """Its process died."""
    error = "error"

    @property
    def is_of_the_run(self) -> bool:
        """It would fail again: not that of a lost process, or of input that may have changed."""
        return self not in (Cause.input, Cause.lost)


class Criterion(Enum):
    """What ranks choices of layers before training (analysis/predictors.py)."""

    condition_number = "condition_number"
    """l_1 / l_m."""
    regularised = "regularised"
    """(l_1 + σ) / (l_m + σ)."""
    top_over_median = "top_over_median"
    """l_1 / l_k, k = ⌈m/2⌉."""
    amgm_gap = "amgm_gap"
    """log of arithmetic over geometric mean of the eigenvalues plus σ."""
    effective_rank = "effective_rank"
    """exp of the eigenvalues' entropy."""
    trace = "trace"
    """Σ l."""
    log_det = "log_det"
    """log det(I + K/σ)."""
    effective_dimension = "effective_dimension"
    """Σ l / (l + σ)."""
    alignment = "alignment"
    """Centred alignment of the kernel with that of the labels."""
    gradient_norm = "gradient_norm"
    """Norm of the loss's first gradient."""
    complexity = "complexity"
    """rᵀ (K + σI)⁻¹ r."""
    marginal_likelihood = "marginal_likelihood"
    """Evidence of a Gaussian process."""
    loo_error = "loo_error"
    """Leave-one-out error of kernel ridge regression."""
    loo_accuracy = "loo_accuracy"
    """Its accuracy."""
    relative_gradient_norm = "relative_gradient_norm"
    """Baseline: ‖g‖ / ‖W‖ of the set's weights (Auto-RGN)."""
    explained_variance = "explained_variance"
    """Baseline: variance of the modules' inputs that r directions explain (EVA)."""
    importance = "importance"
    """Baseline: sensitivity of the weights times its uncertainty (AdaLoRA)."""
    size = "size"
    """Control: number of candidates in the set."""
    num_parameters = "num_parameters"
    """Control: parameters that are trained."""
    random = "random"
    """Control: a number drawn for the set."""


class CandidateUnit(Enum):
    """What a choice of layers is made of."""

    layer = "layer"
    """Transformer layers, each with all of the modules chosen."""
    module = "module"
    """Each module of each transformer layer."""
