"""Table 8 of Malladi et al. 2023: do wider models solve the tasks better, zero-shot?"""

from raykernel.paper import DERIVATIVE, NINE
from raykernel.study import Line, Study, TaskTable

study = Study(
    question="Does the mean output derivative shrink with a model's width? (Table 8)",
    # Of test, so that it is the same for every k and seed: the smallest kernel will do.
    base={"task.k": "1"},
    space={"model": "roberta_base,roberta_large", "task": NINE},
    arms=[DERIVATIVE],
    table=TaskTable(
        [Line("mean |χ|", DERIVATIVE.name, "output_derivative")],
        title="Mean absolute output derivative on test, zero-shot",
        paper=8,
        by=["model"],
        scale=1,
        digits=2,
    ),
    demo={"experiment": "demo_prompt", "model": None, "task": None},
)
