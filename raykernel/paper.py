"""What the studies of Malladi et al. (2023) share: tasks, seeds, methods and their grids.

Grids are those of Table 4. Parameters are kept where a comparison with the kernel needs them only:
a study's grid of fine-tuning runs would fill a disk with them.
"""

from __future__ import annotations

from raykernel.study import Arm
from raykernel.terms import Command

SINGLE = "sst2,sst5,mr,cr,mpqa,subj,trec,ag_news"
"""Tasks of one sentence, in the paper's order."""
PAIRS = "mnli,snli,qnli,rte,mrpc,qqp"
"""Tasks of two."""
TASKS = f"{SINGLE},{PAIRS}"
SIX = "sst2,mr,cr,qnli,rte,qqp"
"""Tasks of Tables 7, 9 and 11."""
NINE = "sst2,mr,cr,mpqa,subj,qnli,rte,mrpc,qqp"
"""Tasks of two labels, those of Table 8."""
SEEDS = "13,21,42,87,100"

BASE = {"model": "roberta_base", "training.keep_weights": "false"}
SPACE = {"task": TASKS, "task.k": "16,64", "task.seed": SEEDS}

_BATCHES = "2,4,8"
_LORA_AND_HEAD = "[lora_,lm_head]"  # the paper's code trains the language model's head, too

SGD = Arm(
    "SGD-FT",
    Command.finetune,
    {"training": "sgd"},
    {"training.batch_size": _BATCHES, "training.learning_rate": "1e-4,5e-4,1e-3,5e-3,1e-2"},
    demo={"training.learning_rate": "1e-2"},
)
ADAM = Arm(
    "Adam-FT",
    Command.finetune,
    {"training": "adam"},
    {"training.batch_size": _BATCHES, "training.learning_rate": "1e-5,2e-5,5e-5"},
    demo={"training.learning_rate": "5e-5"},
)
LORA = Arm(
    "SGD-LoRA FT",
    Command.finetune,
    {"training": "sgd", "parameters": "lora", "parameters.include": _LORA_AND_HEAD},
    {"training.batch_size": "4,16", "training.learning_rate": "1e-4,1e-3,1e-2"},
    demo={"training.learning_rate": "1e-2"},
)
KERNELS = Arm("kernels", Command.kernel, {"kernel.kinds": "[sgd,signgd,asigngd]"})
KERNEL = Arm("K(SGD)", Command.kernel, {"kernel.kinds": "[sgd]"})
KERNEL_LORA = Arm(
    "K(SGD), LoRA",
    Command.kernel,
    {"kernel.kinds": "[sgd]", "parameters": "lora", "parameters.include": _LORA_AND_HEAD},
)
SGD_BEHAVIOR = Arm(
    "SGD", Command.behavior, {"training": "sgd", "kernel.kinds": "[sgd]"}, like=SGD.name
)
ADAM_BEHAVIOR = Arm(
    "Adam",
    Command.behavior,
    {"training": "adam", "kernel.kinds": "[signgd,asigngd]"},
    like=ADAM.name,
)
DERIVATIVE = Arm("χ", Command.kernel, {"kernel.kinds": "[sgd]"})

DEMO: dict[str, str | None] = {
    "experiment": "demo",
    "model": None,
    "task": None,
    "task.k": "1",
    "task.seed": "13,21",
    "training.keep_weights": "true",
}
"""MiniLM without a prompt, minutes on two cores."""
DEMO_PROMPT: dict[str, str | None] = {
    "experiment": "demo_prompt",
    "model": None,
    "task": None,
    "task.k": "2",
    "task.seed": "13",
}
"""SmolLM2 with prompts."""
