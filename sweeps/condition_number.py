"""Figures of Rahimi Afzal et al. 2025: NTK condition number at the start, and how LoRA trains.

Layers are first, middle and last: other models need other `parameters.layers_to_transform`
(what is trained) and the same in `spectrum.sets` (sums of one stored kernel), as the demo has.
"""

from raykernel.convergence import ConvergenceTable, summed_layers, trained_layers
from raykernel.study import Arm, Study
from raykernel.terms import Command

MODULES = [["query", "value"], ["key"]]
ROBERTA, MINILM = (0, 5, 11), (0, 2, 5)
UNION = {"parameters.target_modules": "[query,key,value]"}
TRAINED = {"parameters.target_modules": "[query,value],[key]"}


def kernel_of(layers: tuple[int, ...]) -> dict[str, str]:
    """One kernel, and all sums of its blocks."""
    return UNION | {"spectrum.sets": summed_layers(layers, MODULES)}


def trials_of(layers: tuple[int, ...]) -> dict[str, str]:
    """A trial for each of them."""
    return TRAINED | {"parameters.layers_to_transform": trained_layers(layers)}


study = Study(
    question="Does the condition number of chosen layers foretell how they train?",
    base={"model": "roberta_base", "parameters": "lora", "parameters.layers_to_transform": "null",
          "task.k": "16", "training": "adam", "training.learning_rate": "4e-4",
          "training.steps": "80", "training.eval_every": "8", "training.keep_weights": "false"},
    space={"task": "sst2,cola,mrpc,qnli,qqp,rte", "task.seed": "13,21,42,87,100"},
    arms=[Arm("kernel", Command.spectrum, {}, kernel_of(ROBERTA), demo=kernel_of(MINILM)),
          Arm("training", Command.finetune, {}, trials_of(ROBERTA), demo=trials_of(MINILM))],
    table=ConvergenceTable("kernel", "training"),
    # Of other seeds' four examples a label the linear probe is about 0, and passes no gradient on.
    demo={"experiment": "demo", "model": None, "task": None, "task.k": "4", "task.seed": "13,87",
          "training.dropout": "false", "training.steps": "36", "training.eval_every": "6",
          "training.learning_rate": "1e-3"},
)  # fmt: skip
