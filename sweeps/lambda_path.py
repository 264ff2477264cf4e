"""The table of Rahimi Afzal et al. 2025 (slides): fine-tuning and its linear model, along λ."""

from raykernel.lambda_table import LambdaTable
from raykernel.study import Arm, Study
from raykernel.terms import Command

study = Study(
    question="Is fine-tuning nearer to its linear model, the stronger it is pulled to its start?",
    base={
        "model": "roberta_base",
        "prompt": "none",
        "task.k": "64",
        "task.metric": "accuracy",
        "parameters": "lora",
        "parameters.r": "8",
        "parameters.include": "[lora_,classifier]",
        "training": "adam",
        "training.learning_rate": "1e-3",
        "training.batch_size": "16",
        "training.dropout": "false",
        "training.twin": "true",
        "training.keep_weights": "false",
        "regularization": "coupled",
    },
    space={
        "task": "cola,sst2",
        "regularization.lam": "50,10,5,2,1,0.5,0.1,0",
        "task.seed": "13,21,42",
    },
    arms=[Arm("twins", Command.finetune)],
    table=LambdaTable(),
    demo={
        "experiment": "demo",
        **dict.fromkeys(("model", "prompt", "task")),
        "task.k": "2",
        "task.seed": "13",
        "training.steps": "60",
        "training.eval_every": "30",
    },
)
