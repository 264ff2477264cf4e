"""Table 1 of Malladi et al. 2023: does fine-tuning behave like its kernel?"""

from raykernel.paper import ADAM, ADAM_BEHAVIOR, BASE, DEMO, SGD, SGD_BEHAVIOR, SPACE
from raykernel.study import Line, Study, TaskTable, dots

CRITERIA = {
    "eNTK solves task": "solves",
    "Linearization": "linearization",
    "Fixed Features": "fixed_features",
    "Kernel behavior": "kernel_behavior",
}

PAPER_NOTE = (
    "The paper's dots are as our text of it has them: four of five seeds, in an order that it does "
    "not say, and 9 of the 56 verdicts are not what the dots above them give. Its words: 8 of 14 "
    "tasks consistently induce kernel behavior; TREC, MNLI, SNLI, QNLI and MPQA do not."
)

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
        paper=1,
        cell=dots,
        paper_note=PAPER_NOTE,
    ),
    demo=DEMO,
)
