"""The evaluation harness, started with this package imported: `pal-adapters run lm_eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra clients")

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from tests.processes import python

pytestmark = pytest.mark.clients

TASK = """
task: good_or_not
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["good", "not"]
doc_to_target: label
metric_list:
  - metric: acc
"""


def test_a_saved_adapter_is_evaluated(config: Any, decoder: str, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), config(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    rows = [{"text": f"the film was {word}", "label": number % 2} for number, word in enumerate(["in", "it", "all"])]
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tasks" / "good.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    base = f"pretrained={decoder},peft={tmp_path / 'adapter'},add_bos_token=False"
    done = python(
        "-m", "pal_adapters", "run", "lm_eval", "--model", "hf", "--model_args", base, "--device", "cpu",
        "--batch_size", "3", "--tasks", "good_or_not", "--include_path", tmp_path / "tasks",
        "--output_path", tmp_path / "out", "--log_samples",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    model.eval()
    for sample in found:
        scores = [float(response[0][0]) for response in sample["resps"]]
        assert scores == pytest.approx(_log_likelihoods(model, decoder, sample["doc"]["text"]), abs=1e-4)


def _log_likelihoods(model: Any, folder: str, text: str) -> list[float]:
    """What the harness computes, here from the model in this process."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for choice in (" good", " not"):
        context = tokenizer(text, add_special_tokens=False).input_ids
        whole = tokenizer(text + choice, add_special_tokens=False).input_ids
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
        found.append(sum(float(scores[place - 1, whole[place]]) for place in range(len(context), len(whole))))
    return found
