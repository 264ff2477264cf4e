"""The grids of Table 4 of Malladi et al. 2023, searched by Optuna's TPE on Ray Tune."""

from dataclasses import replace

from raykernel.paper import ADAM, BASE, DEMO, LORA, SGD, SIX
from raykernel.study import Line, Study, TaskTable

RATES = ("1e-3,1e-2,5e-2", "5e-5,2e-4,1e-3", "1e-2,1e-1,5e-1")
ARMS = [
    replace(arm, demo={"training.learning_rate": rates, "training.batch_size": "2,4"})
    for arm, rates in zip((SGD, ADAM, LORA), RATES, strict=True)
]

study = Study(
    question="Which optimizer, batch size and learning rate fine-tune best? (Table 4's grids)",
    base=BASE | {"sweep": "tpe", "sweep.trials": "8", "sweep.engine": "tune", "sweep.workers": "2"},
    space={"task": SIX, "task.k": "16", "task.seed": "13,21,42"},
    arms=ARMS,
    table=TaskTable(
        [Line(arm.name, arm.name, "finetuned") for arm in ARMS],
        title="Test metric (%) of the best on dev, mean (std) over k-shot samples",
    ),
    demo=DEMO | {"task.seed": "13", "training.keep_weights": "false", "sweep.trials": "3"},
)
