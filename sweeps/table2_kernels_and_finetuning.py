"""Table 2 of Malladi et al. 2023: prompt-based fine-tuning beside kernel regression."""

from raykernel.paper import ADAM, BASE, DEMO, KERNELS, SGD, SPACE
from raykernel.study import Line, Study, TaskTable

study = Study(
    question="Does kernel regression solve a task as well as fine-tuning does? (Table 2)",
    base=BASE,
    space=SPACE,
    arms=[SGD, KERNELS, ADAM],
    table=TaskTable(
        [
            Line("SGD-FT", "SGD-FT", "finetuned"),
            Line("K(SGD)", "kernels", "kernel_regression", {"kind": "sgd"}),
            Line("Adam-FT", "Adam-FT", "finetuned"),
            Line("K(SignGD)", "kernels", "kernel_regression", {"kind": "signgd"}),
            Line("K(A-SignGD)", "kernels", "kernel_regression", {"kind": "asigngd"}),
        ],
        title="Test metric (%), mean (std) over k-shot samples",
        paper=2,
    ),
    demo=DEMO,
)
