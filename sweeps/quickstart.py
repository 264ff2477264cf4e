"""The main job in miniature: the kernel of every layer, layers ranked by it, LoRA trained on some.

Needs no hub and no GPU: MiniLM, eight drug reviews of each of six conditions, two workers.
"""

from raykernel.choice_table import ChoiceTable
from raykernel.choices import Choices
from raykernel.study import Arm, Study
from raykernel.terms import Command, Criterion

FORETOLD = (Criterion.regularised, Criterion.effective_rank, Criterion.trace)
NUMBER = 7  # of all pairs of six layers; so few that every order of them can be counted

study = Study(
    question="Do the layers that the kernel at the start recommends fine-tune best?",
    base={"experiment": "demo", "task.k": "8", "task.test_limit": "96",
          "parameters": "lora", "parameters.target_modules": "[query,value]",
          "parameters.layers_to_transform": "null",
          "compute": "ray", "compute.workers": "2", "kernel.block_size": "24",
          "sweep.engine": "tune", "sweep.workers": "2", "sweep.report": "true",
          "select.max_size": "2", "select.top": "5000", "select.halves": "0",
          "training": "adam", "training.learning_rate": "2e-3", "training.dropout": "false",
          "training.steps": "36", "training.eval_every": "12", "training.keep_weights": "false"},
    space={"task.seed": "13"},
    arms=[
        Arm("kernel", Command.select),
        Arm("LoRA", Command.finetune, num_chosen=NUMBER,
            choose=Choices(NUMBER, places=NUMBER, criteria=FORETOLD[:1])),
    ],
    table=ChoiceTable(
        "kernel", ("LoRA",), shown=FORETOLD, criteria=FORETOLD,
        next_step="All criteria, more samples: raykernel sweep layer_selection experiment=demo",
    ),
    demo={"task.k": "4", "task.seed": "13"},
)  # fmt: skip
