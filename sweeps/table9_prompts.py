"""Table 9 of Malladi et al. 2023: manual, searched and null prompts."""

from raykernel.paper import ADAM, BASE, DEMO_PROMPT, KERNEL, SEEDS, SGD, SIX
from raykernel.study import Line, Study, TaskTable

study = Study(
    question="How much does kernel behavior depend on the prompt? (Table 9)",
    base=BASE,
    space={"task": SIX, "task.k": "16", "prompt": "manual,searched,null", "task.seed": SEEDS},
    arms=[ADAM, SGD, KERNEL],
    table=TaskTable(
        [
            Line("Adam-FT", ADAM.name, "finetuned"),
            Line("SGD-FT", SGD.name, "finetuned"),
            Line("K(SGD)", KERNEL.name, "kernel_regression"),
        ],
        title="Test metric (%), mean (std) over k-shot samples",
        paper=9,
        by=["k", "prompt"],
    ),
    demo=DEMO_PROMPT | {"prompt": "manual,null"},
)
