"""Does any criterion of the kernel at the start choose LoRA's layers better than chance does?

Each choice is fine-tuned three times: with the same learning rate and lora_alpha, and with the
lora_alpha that gives all choices a kernel of the same trace, or of the same largest eigenvalue.
"""

from raykernel.choice_table import ChoiceTable
from raykernel.choices import Choices
from raykernel.study import Arm, Study
from raykernel.terms import Command

NUMBER = 15  # of MiniLM's six layers all pairs
SCALES = {"fixed rate": None, "equal trace": "trace", "equal top": "top"}

study = Study(
    question="Does the NTK at the start foretell which layers' LoRA trains and predicts best?",
    base={"model": "roberta_base", "prompt": "none", "task.k": "16",
          "parameters": "lora", "parameters.target_modules": "[query,value]",
          "training": "sgd", "training.learning_rate": "0.3", "training.max_grad_norm": "null",
          "training.dropout": "false", "training.keep_weights": "false",
          "select.max_size": "2", "select.top": "5000", "select.halves": "0"},
    space={"task": "sst2,cola,mrpc,qnli,qqp,rte", "task.seed": "13,21,42,87,100"},
    arms=[
        Arm("selection", Command.select),
        *(Arm(name, Command.finetune, choose=Choices(NUMBER, equal=column), num_chosen=NUMBER)
          for name, column in SCALES.items()),
    ],
    table=ChoiceTable("selection", tuple(SCALES)),
    demo={"experiment": "demo", "model": None, "task": None, "prompt": None, "task.k": "8",
          "task.seed": "13,21,42", "task.test_limit": "96", "training.steps": "36",
          "training.eval_every": "12", "parameters.layers_to_transform": "null"},
)  # fmt: skip
