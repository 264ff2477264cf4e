"""Table 1 of Malladi et al. 2023: does fine-tuning behave like its kernel?"""

from raykernel.paper import ADAM, ADAM_BEHAVIOR, BASE, DEMO, SGD, SGD_BEHAVIOR, SPACE
from raykernel.study import Line, Study, TaskTable, dots

CRITERIA = {
    "eNTK solves task": "solves",
    "Linearization": "linearization",
    "Fixed Features": "fixed_features",
    "Kernel behavior": "kernel_behavior",
}

study = Study(
    question="Does fine-tuning behave like its kernel? (Table 1)",
    base=BASE,
    space=SPACE,
    arms=[SGD, SGD_BEHAVIOR, ADAM, ADAM_BEHAVIOR],
    table=TaskTable(
        [
            Line(f"{arm.name}: {label}", arm.name, column)
            for arm in (SGD_BEHAVIOR, ADAM_BEHAVIOR)
            for label, column in CRITERIA.items()
        ],
        title="Criteria, a dot per k-shot sample: ● holds, ○ does not, - undefined",
        cell=dots,
    ),
    demo=DEMO,
)
