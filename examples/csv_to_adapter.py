"""From a labelled CSV to a PEFT model on the layers that its kernel recommends.

    python examples/csv_to_adapter.py reviews.csv review rating microsoft/MiniLM-L12-H384-uncased

Nothing is trained: blocks of the LoRA's kernel are computed once, every choice of layers is a sum
of them, and the one with the best condition number becomes an `adapter_config.json`.
"""

import sys
from pathlib import Path

from peft import PeftConfig, get_peft_model
from transformers import AutoModel

import raykernel
from raykernel.cli import main

STORE = "raykernel-store"

table, text, label, model_name = sys.argv[1:5]
code = main(
    [
        "select",
        *("task=file", f"task.train={table}", f"task.text=[{text}]", f"task.label={label}"),
        *("model=hf", f"model.name={model_name}", "model.architecture=encoder", "prompt=none"),
        *("task.k=8", "parameters=lora", "select.max_size=2", f"store.path={STORE}"),
    ]
)
if code:
    sys.exit(code)

newest = "select adapter, layers, regularised from selections where rank = 1 order by created desc"
best = raykernel.query(newest, STORE).to_pylist()[0]
config = PeftConfig.from_pretrained(str(Path(STORE) / best["adapter"]))
model = get_peft_model(AutoModel.from_pretrained(model_name), config)
print(f"Layers {best['layers']}, condition number {best['regularised']:.1f}:")
model.print_trainable_parameters()
