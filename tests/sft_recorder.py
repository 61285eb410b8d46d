"""``llamafactory-cli train``, which also writes down what each rank's model is fed: ``fed-RANK.jsonl`` in output_dir.

One line a micro-batch, the texts of its rows. Takes the same arguments, as a script of Python or of torchrun.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class Recorder(TrainerCallback):
    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, processing_class: Any, **_: Any
    ) -> None:
        output = Path(args.output_dir, f"fed-{args.process_index}.jsonl")
        output.parent.mkdir(parents=True, exist_ok=True)

        def record(module: Any, arguments: Any, inputs: Any) -> None:
            rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
            with output.open("a") as file:
                file.write(json.dumps([processing_class.decode(row[mask]) for row, mask in rows]) + "\n")

        model.register_forward_pre_hook(record, with_kwargs=True)


if __name__ == "__main__":
    run_exp(callbacks=[Recorder()])
