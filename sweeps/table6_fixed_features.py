"""Table 6 of Malladi et al. 2023: distance of the kernels before and after fine-tuning."""

from raykernel.paper import ADAM, ADAM_BEHAVIOR, BASE, DEMO, SGD, SGD_BEHAVIOR, SPACE
from raykernel.study import Line, Study, TaskTable

study = Study(
    question="How far does fine-tuning move the kernel? (Table 6)",
    base=BASE,
    space=SPACE,
    arms=[SGD, SGD_BEHAVIOR, ADAM, ADAM_BEHAVIOR],
    table=TaskTable(
        [
            Line("K(SGD)", SGD_BEHAVIOR.name, "mean_relative_distance"),
            Line("K(SignGD)", ADAM_BEHAVIOR.name, "mean_relative_distance"),
        ],
        title="Mean relative distance, element-wise, K(SGD) with SGD and K(SignGD) with Adam, "
        "mean (std) over k-shot samples",
        paper=6,
        scale=1,
        digits=2,
    ),
    demo=DEMO,
)
