"""Writes the folder of a `TaskHeads`: backbone, adapters and heads, as a whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pal_adapters.errors import StorageError, UnsupportedError
from pal_adapters.hosts.base_files import base_files, copier

from .adapter_files import save_adapters
from .base import embedding_tensors, has_resized_embeddings
from .contents import ADDED, BASE_FOLDER, EMBEDDINGS, HEADS, OUTPUT, POOLER, Contents
from .description import DESCRIPTION_FILE, describe, read_description
from .files import cause_of, staged, write_readable_json, write_tensors
from .language import output_tensors
from .parts import is_part
from .tasks_file import TASKS_FILE, tasks_json


def save(contents: Contents, directory: Path, *, checkpoint: bool, tokenizer: Any = None) -> None:
    """Writes a folder, see `TaskHeads.save_pretrained`."""
    backbone, base = contents.backbone, contents.base
    if any(is_part(parameter) for parameter in (*backbone.parameters(), *contents.heads.parameters())):
        raise StorageError(
            "each process holds only parts of the parameters (FSDP): call the trainer's save_model in all of them."
        )
    own = contents.own_base()
    trained = contents.base_trained or any(tensor.requires_grad for tensor in own.values())
    resized = not trained and has_resized_embeddings(backbone)
    if len(own) < len(base) and (trained or (resized and not embedding_tensors(backbone, own))):
        fault = "that adapter trains resized embeddings, which the folder cannot hold as they were: "
        if trained:
            fault = "the rest of it is trainable or has been trained: call prepare_training() before training, or "
        raise UnsupportedError(
            f"an adapter trains part of the base model in place (base_weights='in_place'), and {fault}use "
            "base_weights='copies'."
        )
    output = output_tensors(backbone)
    if not (trained or resized or contents.output_trained or any(tensor.requires_grad for tensor in output.values())):
        output = {}  # the same as in the checkpoint of the base model
    description = describe(
        backbone,
        contents.head_configs(),
        contents.routes,
        contents.balance,
        base_trained=trained,
        output_layer=bool(output),
        embeddings=resized,
    )
    stems = [HEADS, POOLER, OUTPUT, EMBEDDINGS, ADDED, *([f"{BASE_FOLDER}/model"] if trained else [])]
    with _writing(directory), staged(directory, DESCRIPTION_FILE, stems) as stage:
        save_adapters(backbone, stage)
        if (directory / "README.md").exists():
            (stage / "README.md").unlink(missing_ok=True)  # PEFT's card covers only the adapters
        write_tensors(contents.heads.state_dict(keep_vars=True), stage, HEADS)
        if trained:
            write_tensors(base, stage / BASE_FOLDER, "model")
            backbone.config.save_pretrained(stage / BASE_FOLDER)
        elif pooler := contents.pooler():
            # Many checkpoints have no pooler: this one was then initialized at random and is stored nowhere else.
            write_tensors(pooler, stage, POOLER)
        if resized:
            write_tensors(embedding_tensors(backbone, base), stage, EMBEDDINGS)
        if output:
            write_tensors(output, stage, OUTPUT)
        if checkpoint:
            write_tensors(contents.added(), stage, ADDED)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        write_readable_json(tasks_json(backbone, contents.described), stage / TASKS_FILE)
        write_readable_json(description.to_json(), stage / DESCRIPTION_FILE)


def copy_saved(checkpoint: Path, directory: Path) -> None:
    """Copies what `load` reads from a checkpoint to a folder, and nothing that only `restore` reads."""
    description = read_description(checkpoint)
    stems = [HEADS, POOLER, OUTPUT, EMBEDDINGS, *([f"{BASE_FOLDER}/model"] if description.base_trained else [])]
    names = [BASE_FOLDER, *description.adapters, *description.fusions]
    if description.host == "peft":  # the adapter called "default" is in the folder itself
        names += ["adapter_config.json", "adapter_model.safetensors", *(path.name for path in base_files(checkpoint))]
    names += [path.name for stem in stems[:4] for path in checkpoint.glob(f"{stem}*safetensors*")]
    copy = copier()
    with staged(directory, DESCRIPTION_FILE, stems) as stage:
        for name in (*names, TASKS_FILE, DESCRIPTION_FILE):
            if (checkpoint / name).is_dir():
                shutil.copytree(checkpoint / name, stage / name, copy_function=copy)
            elif (checkpoint / name).is_file():
                copy(str(checkpoint / name), str(stage / name))


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turns any error of a writer into a `StorageError` that names the folder."""
    try:
        yield
    except Exception as error:  # a full disk is an OSError, a RuntimeError or an error of safetensors, by the writer
        raise StorageError(f"{directory} cannot be written ({cause_of(error)}). It is as it was before.") from error
