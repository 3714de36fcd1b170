# %% [markdown]
# # Many tasks at once
#
# Four data sets, one pretrained encoder. Each task gets a small module (a projected attention layer, PAL) and a
# head; the encoder is shared and frozen. One `Trainer` trains all of them on mixed batches.
#
# The package generates the data, so this runs offline, in a few minutes on two cores. Replace it by your own
# `datasets.Dataset`.

# %%
import logging
import os
import tempfile

import adapters
import torch
from transformers import AutoModel, AutoTokenizer

from pal_adapters import PALConfig
from pal_adapters.multitask import (
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    Task,
    TaskHeads,
    default_model,
    load_toy_task,
)

MODEL = os.environ.get("MODEL") or default_model()  # a Hub repo ID or a folder
STEPS = int(os.environ.get("STEPS", "300"))
OUTPUT = tempfile.mkdtemp()
logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns while no adapter is active yet

# %% [markdown]
# ## The tasks
#
# A `Task` says where the data is, what to predict and how to score it. Three of these tasks are classification, one
# is regression. For your own data: `Task("reviews", {"train": dataset, "validation": other}, text_columns=("text",),
# num_labels=2)`.

# %%
NAMES = ("sentiment", "acceptability", "entailment", "similarity")
tasks = [Task.from_spec(*load_toy_task(name)) for name in NAMES]
for task in tasks:
    print(f"{task.name:14} {task.kind:13} {len(task.dataset['train']):5} examples  {task.metrics[0]}")

# %% [markdown]
# ## The model
#
# `adapters` adds the modules like its own. `TaskHeads` puts a head per task on top and routes every example of a
# batch through the module and the head of its task.

# %%
torch.manual_seed(0)
base = AutoModel.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
adapters.init(base)
for task in tasks:
    base.add_adapter(task.name, config=PALConfig())
model = TaskHeads(base)
for task in tasks:
    model.add(task.name, task.head_config())
model.prepare_training()  # trains modules and heads; base=True also trains the encoder

counts = model.count_parameters()
print(f"encoder {counts['base']:,}, trained {counts['trainable']:,}")

# %% [markdown]
# ## Training
#
# This is a `Trainer` as in `transformers`, with checkpoints, resumption, early stopping and distributed training.
# `sampling` sets how often each task is drawn; with `mixed_batches`, the task is drawn separately for every example.

# %%
arguments = MultiTaskTrainingArguments(
    OUTPUT,
    sampling="sqrt",
    mixed_batches=True,
    max_steps=STEPS,
    learning_rate=1e-3,
    attention_learning_rate=5e-3,  # for the queries, keys and values of PALs, which start small
    warmup_steps=STEPS // 10,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=64,
    eval_strategy="steps",
    eval_steps=max(1, STEPS // 3),
    save_strategy="no",
    logging_steps=max(1, STEPS // 10),
    disable_tqdm=True,
    report_to=[],
)
trainer = MultiTaskTrainer(model, arguments, tasks, processing_class=tokenizer)
trainer.train()

# %% [markdown]
# ## Scores
#
# Each task has its own metrics. `eval_average` is the mean of the first metric of every task, by which
# `load_best_model_at_end=True` would select the best checkpoint.

# %%
scores = trainer.evaluate()
for name, value in scores.items():
    print(f"{name:32} {value:.3f}")

# %% [markdown]
# ## One batch, several tasks
#
# Examples of different tasks go through the model together.

# %%
texts = ["the film was not delightful.", "the nurse wait at the station.", "a superb novel."]
batch = tokenizer(texts, padding=True, return_tensors="pt")
model.eval()
with torch.no_grad():
    logits = model(task_ids=["sentiment", "acceptability", "sentiment"], **batch).logits
for task, values in logits.items():
    print(task, values.softmax(-1).tolist())

# %% [markdown]
# ## Saving and loading
#
# The folder contains the heads and one small adapter per task, in the format of `adapters`, which can also load an
# adapter by itself.

# %%
model.save_pretrained(f"{OUTPUT}/model")
loaded = TaskHeads.from_pretrained(f"{OUTPUT}/model")
with torch.no_grad():
    again = loaded(task_ids=["sentiment", "acceptability", "sentiment"], **batch).logits
assert all(torch.equal(logits[task], again[task]) for task in logits)
print(sorted(os.listdir(f"{OUTPUT}/model")))
