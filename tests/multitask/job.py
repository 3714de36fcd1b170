"""A small run in its own process: `python job.py MODEL OUTPUT JSON`, also under torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from tiny_tasks import losses, make_trainer, without_dropout
from transformers import TrainerCallback


class Killer(TrainerCallback):
    """Ends the process without a word in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def shard(settings: dict[str, Any]) -> None:
    """FSDP on CPU: accelerate only enables it on accelerators, so the processes pretend to have one."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from transformers import TrainingArguments

    config = {"version": 2, "cpu_ram_efficient_loading": False, "sync_module_states": False}
    config |= {"reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT", **settings.pop("fsdp")}
    settings |= {"fsdp": True, "fsdp_config": config}
    if hasattr(TrainingArguments, "fsdp_min_num_params"):  # transformers 4 leaves these to the environment
        os.environ |= {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "true"
        settings["fsdp"] = "full_shard auto_wrap"
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    settings["accelerator_config"] = {"use_configured_state": True}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def evaluations(trainer: Any, sizes: list[int]) -> list[dict[str, float]]:
    """The losses on the evaluation sets, for each batch size."""
    found = []
    for size in sizes:
        trainer.args.per_device_eval_batch_size = size
        found.append({name: value for name, value in trainer.evaluate().items() if name.endswith("_loss")})
    return found


def exact_losses(trainer: Any) -> dict[str, float]:
    """The same, one example at a time: cross entropy over examples or tags, squared error of regression."""
    found, model = {}, trainer.model.eval()
    for task, rows in trainer.eval_dataset.items():
        total, count = 0.0, 0
        for row in rows:
            batch = trainer.collator([row])
            label = batch.pop("labels")[task][0]
            with torch.no_grad():
                logits = model(**batch).logits[task][0]
            if rows.task.kind == "regression":
                total, count = total + float((logits - label) ** 2), count + 1
            else:
                total += float(F.cross_entropy(logits, label.long(), ignore_index=-100, reduction="sum"))
                count += int((label != -100).sum())
        found[f"eval_{task}_loss"] = total / count
    return found


def run(folder: str, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if "fsdp" in settings:
        shard(settings)
    kill, resume = settings.pop("kill", None), settings.pop("resume", False)
    dropout, sizes = settings.pop("dropout", True), settings.pop("evaluate", [])
    callbacks = [Killer(kill)] if kill is not None else []
    trainer = make_trainer(folder, output, callbacks=callbacks, **settings)
    if not dropout:
        without_dropout(trainer)
    trainer.train(resume_from_checkpoint=resume or None)
    parameters = {name: whole(value.detach()) for name, value in trainer.model.named_parameters()}
    kinds = sorted({type(value.data).__name__ for value in trainer.model.parameters()})
    result = {"losses": losses(trainer), "parameters": parameters, "sharded": kinds}
    if sizes:
        result["evaluations"] = evaluations(trainer, sizes)
        result["exact"] = exact_losses(trainer) if trainer.args.world_size == 1 else None
    return result


def main() -> None:
    torch.set_num_threads(1)
    for number, settings in enumerate(json.loads(sys.argv[3])):
        output = Path(sys.argv[2]) / str(number)
        result = run(sys.argv[1], output, settings)
        if os.environ.get("RANK", "0") == "0":
            torch.save(result, output / "result.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # What DTensor caches keeps gloo's threads alive, and one that frees a tensor while the
        # interpreter ends aborts the process (pytorch/pytorch#190489), so end without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
