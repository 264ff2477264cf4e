"""Table 11 of Malladi et al. 2023: LoRA beside full fine-tuning, and their kernels."""

from raykernel.paper import BASE, DEMO, KERNEL, KERNEL_LORA, LORA, SEEDS, SGD, SIX
from raykernel.study import Line, Study, TaskTable

study = Study(
    question="Does LoRA keep the kernel, and does it train as its kernel predicts? (Table 11)",
    base=BASE,
    space={"task": SIX, "task.k": "16,64", "task.seed": SEEDS},
    arms=[SGD, LORA, KERNEL, KERNEL_LORA],
    table=TaskTable(
        [
            Line("SGD-FT", SGD.name, "finetuned"),
            Line("SGD-LoRA FT", LORA.name, "finetuned"),
            Line("K(SGD)", KERNEL.name, "kernel_regression"),
            Line("K_LoRA(SGD)", KERNEL_LORA.name, "kernel_regression"),
        ],
        title="Test metric (%), mean (std) over k-shot samples",
        paper=11,
    ),
    demo=DEMO,
)
