"""Exports a trained folder to ONNX, with the tasks of the examples as an input, and compares the file with the model.

    python examples/export_onnx.py FOLDER model.onnx [--task TASK] [--text TEXT TEXT ...]

`FOLDER` is one that `MultiTaskTrainer` or `TaskHeads.save_pretrained` wrote. With `--task`, the file has that task
alone and no input `task_ids`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import onnxruntime
import torch
from transformers import AutoTokenizer

from pal_adapters import export_onnx
from pal_adapters.multitask import TaskHeads


def main(arguments: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("file")
    parser.add_argument("--task", help="export this task alone")
    parser.add_argument("--tokenizer", help="a folder or Hub repo ID (default: FOLDER)")
    parser.add_argument("--text", nargs="+", default=["a fine film", "a dull and much too long one"])
    options = parser.parse_args(arguments)
    if len(options.text) < 2:
        parser.error("--text needs at least two texts.")
    model = TaskHeads.from_pretrained(options.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.folder)
    inputs = dict(tokenizer(options.text, return_tensors="pt", padding=True))
    fixed = {"task_ids": options.task} if options.task else {}
    ids = torch.arange(len(options.text)) % len(model.tasks)
    if not options.task:
        inputs["task_ids"] = ids
    export_onnx(model, options.file, inputs, **fixed)

    session = onnxruntime.InferenceSession(options.file, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    known = {one.name for one in session.get_inputs()}
    values = session.run(names, {name: value.numpy() for name, value in inputs.items() if name in known})
    found = dict(zip(names, map(torch.from_numpy, values), strict=True))
    with torch.no_grad():
        expected = model(**inputs, **fixed).logits
    worst = 0.0
    for task, logits in expected.items():
        own = found[task] if options.task else found[task][ids == model.tasks.index(task)]
        worst = max(worst, float((own - logits).abs().max()))
    print(f"{options.file}: inputs {', '.join(sorted(known))}; outputs {', '.join(names)}")
    print(f"largest difference from the model: {worst:.1e}")
    return worst


if __name__ == "__main__":
    main()
