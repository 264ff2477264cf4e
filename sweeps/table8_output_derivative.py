"""Table 8 of Malladi et al. 2023: do wider models solve the tasks better, before any training?"""

from raykernel.paper import DERIVATIVE, NINE
from raykernel.study import Line, Study, TaskTable

NOTE = (
    "Definition 5.3 is of models that differ in width only. RoBERTa-base (768) and -large (1024) "
    "differ in depth, too; MiniLM-L6 (384) and SmolLM2-135M (576), those of the demo, in all else."
)

study = Study(
    question="Does the mean output derivative shrink with a model's width? (Table 8)",
    # With a prompt it is the same for every k, seed and choice of parameters: the cheapest will do.
    base={"task.k": "1", "parameters": "head"},
    space={"model": "roberta_base,roberta_large", "task": NINE, "task.seed": "13"},
    arms=[DERIVATIVE],
    table=TaskTable(
        [Line("mean |χ|", DERIVATIVE.name, "output_derivative")],
        title="Mean absolute output derivative on test, before fine-tuning",
        paper=8,
        by=["model"],
        scale=1,
        digits=2,
        note=NOTE,
    ),
    # MiniLM has no head over words, so that both have a linear probe, which is of k and seed.
    demo={
        "experiment": "demo",
        "model": "minilm_l6,smollm2_135m",
        "task": None,
        "task.k": "8",
        "task.seed": "13,21,42",
        "parameters.layers_to_transform": "null",
    },
)
