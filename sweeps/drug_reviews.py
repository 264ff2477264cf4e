"""Findings of Malladi et al. 2023 on a small causal model and few data; needs no hub."""

from raykernel.paper import KERNEL
from raykernel.study import Arm, Line, Study, TaskTable
from raykernel.terms import Command

SIZE = {"experiment": "demo_prompt", "task.k": "8", "task.max_length": "48"}
# Not the paper's 32 k C steps, but 32, whence other learning rates.
STEPS = {"training.steps": "32", "training.eval_every": "8", "training.keep_weights": "false"}
SGD = {"training": "sgd", "training.learning_rate": "5e-2"}
LORA = {**SGD, "training.learning_rate": "1e-1", "parameters": "lora"}
KEPT = {**SGD, "training.keep_weights": "true"}  # the model is linearised at them

TRAINED = [
    Arm("SGD-FT", Command.finetune, KEPT),
    Arm("SGD-LoRA FT", Command.finetune, LORA),
    Arm("Adam-FT", Command.finetune, {"training": "adam", "training.learning_rate": "5e-5"}),
    Arm("SGD-FT, no prompt", Command.finetune, {**SGD, "prompt": "none"}),
]
PROBED = Arm("K(SGD), no prompt", Command.kernel, {**KERNEL.settings, "prompt": "none"})
K_LORA = Arm("K_LoRA(SGD)", Command.kernel, {**KERNEL.settings, "parameters": "lora"})
LINEAR = Arm("SGD-FT, linearised", Command.behavior, {**KERNEL.settings, **KEPT}, like="SGD-FT")
LINES = [
    Line("zero-shot", KERNEL.name, "zero_shot"),
    Line("linear probe, no prompt", PROBED.name, "linear_probe"),
    *(Line(arm.name, arm.name, "kernel_regression") for arm in (KERNEL, K_LORA, PROBED)),
    *(Line(arm.name, arm.name, "finetuned") for arm in TRAINED),
    Line(LINEAR.name, LINEAR.name, "linearized_score"),
]

study = Study(
    question="Which findings of the paper hold for SmolLM2-135M, 8 drug reviews per label?",
    base=SIZE | STEPS | {"task.test_limit": "100", "behavior.test_limit": "32"},
    space={"task.seed": "13,21,42"},
    arms=[KERNEL, K_LORA, PROBED, *TRAINED, LINEAR],
    table=TaskTable(LINES, title="Test accuracy (%), mean (std) over 8-shot samples", by=[]),
    demo={"task.k": "2", "task.seed": "13"},
)
