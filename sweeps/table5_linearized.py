"""Table 5 of Malladi et al. 2023: accuracy of the linearised model beside that of fine-tuning."""

from raykernel.paper import ADAM, ADAM_BEHAVIOR, BASE, DEMO, SPACE
from raykernel.study import Line, Study, TaskTable

study = Study(
    question="How much of fine-tuning's gain does the linearised model recover? (Table 5)",
    base=BASE,
    space=SPACE,
    # Accuracy of every task, while dev selects by the task's own metric: the paper does not say.
    arms=[ADAM, ADAM_BEHAVIOR],
    table=TaskTable(
        [
            Line("0-shot", ADAM_BEHAVIOR.name, "pretrained_score"),
            Line("Lin.", ADAM_BEHAVIOR.name, "linearized_score"),
            Line("FT", ADAM_BEHAVIOR.name, "finetuned_score"),
        ],
        title="Test accuracy (%), fine-tuning with Adam, mean (std) over k-shot samples",
        paper=5,
    ),
    demo=DEMO,
)
