"""Table 7 of Malladi et al. 2023: prompts beside the standard setting, a head on [CLS]."""

from raykernel.paper import ADAM, BASE, DEMO_PROMPT, KERNEL, SEEDS, SGD, SIX
from raykernel.study import Line, Study, TaskTable

study = Study(
    question="Does the kernel need a prompt to match fine-tuning? (Table 7)",
    base=BASE,
    space={"task": SIX, "task.k": "16,64", "prompt": "manual,none", "task.seed": SEEDS},
    arms=[ADAM, SGD, KERNEL],
    table=TaskTable(
        [
            Line("Adam-FT", ADAM.name, "finetuned"),
            Line("SGD-FT", SGD.name, "finetuned"),
            Line("Kernel SGD", KERNEL.name, "kernel_regression"),
        ],
        title="Test metric (%), mean (std) over k-shot samples",
        paper=7,
        by=["k", "prompt"],
    ),
    demo=DEMO_PROMPT | {"prompt": "manual,none"},
)
