"""Which LoRA (rank, scale, modules, learning rate, λ), by Optuna's TPE; beside it, its kernel."""

from raykernel.study import Arm, Line, Study, TaskTable
from raykernel.terms import Command

SPACE = {
    "parameters.r": "2,4,8,16,32",
    "parameters.lora_alpha": "4,8,16,32,64",
    "parameters.target_modules": "[query,value],[query,key,value],[all-linear]",
    "training.learning_rate": "tag(log,interval(1e-4,1e-2))",
    "regularization.lam": "0,0.1,1,10",
}
DEMO = SPACE | {
    "parameters.r": "2,8",
    "parameters.target_modules": "[query,value],[key]",
    "training.learning_rate": "tag(log,interval(1e-3,3e-2))",
    "regularization.lam": "0,1",
}
LORA = Arm("LoRA", Command.finetune, {"parameters": "lora"}, SPACE, demo=DEMO)
KERNEL = Arm("K(LoRA)", Command.kernel, {"parameters": "lora"}, like=LORA.name)
LINES = [
    Line("linear probe", LORA.name, "linear_probe"),
    Line(LORA.name, LORA.name, "finetuned"),
    Line(KERNEL.name, KERNEL.name, "kernel_regression"),
]

study = Study(
    question="Which LoRA fine-tunes best, and does kernel regression with it do as well?",
    base={"model": "roberta_base", "prompt": "none", "task.k": "16", "training": "adamw",
          "training.steps": "512", "training.eval_every": "64", "training.keep_weights": "false",
          "regularization": "coupled", "sweep": "tpe", "sweep.trials": "64"},
    space={"task": "sst2,cola,mrpc,qnli,rte", "task.seed": "13,21,42"},
    arms=[LORA, KERNEL],
    table=TaskTable(LINES, title="Test metric (%), mean (std) over k-shot samples"),
    demo={"experiment": "demo", "model": None, "prompt": None, "task": None, "task.k": "4",
          "task.seed": "13", "training.steps": "24", "training.eval_every": "6",
          "sweep.trials": "6"},
)  # fmt: skip
