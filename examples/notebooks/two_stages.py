# %% [markdown]
# # Two stages: combine adapters for a new task
#
# You have adapters for three tasks, and a fourth task arrives with little data. The encoder and the adapters stay
# frozen. ScaLearn learns how much of each source the new task needs, and the result folds into one plain adapter.
#
# The package generates the data, so this runs offline, in a few minutes on two cores.

# %%
import logging
import os
import tempfile

import adapters
import torch
from adapters.composition import Fuse
from transformers import AutoModel, AutoTokenizer

import pal_adapters
from pal_adapters.multitask import (
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    Task,
    TaskHeads,
    default_model,
    get_preset,
    load_toy_task,
)

MODEL = os.environ.get("MODEL") or default_model()  # a Hub repo ID or a folder
STEPS = int(os.environ.get("STEPS", "300"))
OUTPUT = tempfile.mkdtemp()
logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns while no adapter is active yet

# %% [markdown]
# ## First stage: an adapter for each source
#
# Usually these exist already: any bottleneck adapters for the same encoder will do. Here we train them.

# %%
SOURCES = ("sentiment", "entailment", "similarity")
torch.manual_seed(0)
base = AutoModel.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
adapters.init(base)
sources = [Task.from_spec(*load_toy_task(name)) for name in SOURCES]
for task in sources:
    base.add_adapter(task.name, config="seq_bn")
model = TaskHeads(base)
for task in sources:
    model.add(task.name, task.head_config())
model.prepare_training()

common = {"disable_tqdm": True, "report_to": [], "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64}
arguments = MultiTaskTrainingArguments(
    f"{OUTPUT}/sources", sampling="uniform", learning_rate=1e-3, max_steps=STEPS, save_strategy="no", **common
)
trainer = MultiTaskTrainer(model, arguments, sources, processing_class=tokenizer)
trainer.train()
print({name: round(value, 3) for name, value in trainer.evaluate().items() if "loss" not in name})

# %% [markdown]
# ## Second stage: combine them for the new task
#
# `"scalearn"` learns one coefficient per channel and source in each block; `"scalearn_uniform_pp"`, the smallest
# variant, learns one per source. The new task has only 200 examples.

# %%
target = Task.from_spec(*load_toy_task("acceptability", train_size=200))
fuse = Fuse(*SOURCES)
base.add_adapter_fusion(fuse, config="scalearn")
model.add(target.name, target.head_config(), adapter=fuse)
trained = model.prepare_training([target.name])
print(len(trained), "tensors train, all in the fusion or the head:", sorted({name.split(".")[0] for name in trained}))

arguments = get_preset("scalearn").training_arguments(
    f"{OUTPUT}/target", num_tasks=1, num_train_epochs=max(1, STEPS // 15), save_total_limit=1, **common
)
trainer = MultiTaskTrainer(model, arguments, [target], processing_class=tokenizer)
trainer.train()  # the epoch with the smallest validation loss is kept
before = trainer.evaluate()
print({name: round(value, 3) for name, value in before.items()})

# %% [markdown]
# ## What was learned
#
# The table has the mean absolute coefficient of each source in each block.

# %%
report = pal_adapters.transfer_report(base, fuse)
print(report)
pal_adapters.plot_transfer(report, f"{OUTPUT}/transfer.png")

# %% [markdown]
# ## One plain adapter
#
# `fold` turns the sources and their coefficients into one ordinary bottleneck adapter. It computes the same outputs,
# costs no more than any other adapter, and loads without this package.

# %%
batch = tokenizer(
    ["the nurse wait at the station.", "the nurses wait at the station."], padding=True, return_tensors="pt"
)
model.eval()
with torch.no_grad():
    combined = model(task_ids=target.name, **batch).logits[target.name]

pal_adapters.fold(base, fuse, name="acceptability")
base.save_adapter(f"{OUTPUT}/acceptability", "acceptability", use_safetensors=True)
head = model.head(target.name)

plain = AutoModel.from_pretrained(MODEL)
adapters.init(plain)
plain.load_adapter(f"{OUTPUT}/acceptability", set_active=True, use_safetensors=True)
with torch.no_grad():
    hidden = plain.eval()(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1)
    folded = head((hidden * weights).sum(1) / weights.sum(1))
print("largest difference:", (folded - combined).abs().max().item())
assert torch.allclose(folded, combined, atol=1e-4)
