"""What a model does by itself: the behaviour that it must keep with an adapter.

A model that is not exact under padding, or whose cached generation differs from uncached, is not asked for it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .build import Built, run, tensors
from .inputs import Inputs

_FIRST = ("logits", "last_hidden_state", "prediction_logits", "logits_per_image", "pooler_output", "text_embeds")
_KEPT = 5  # tokens of the padded example
_NEW = 8  # tokens that are generated
SIDES = ("left", "right")
TASKS = ("a", "b")


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, infinite for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def spacing(value: Tensor) -> float:
    """The distance between floating-point numbers as large as the largest of `value`."""
    return float(value.abs().max()) * torch.finfo(value.dtype).eps if value.numel() else 0.0


class Plain:
    """A model without an adapter, its outputs, and which promises it keeps itself."""

    def __init__(self, built: Built) -> None:
        self.model, self.inputs = built.model, built.inputs
        self.outputs = run(self.model, self.inputs)
        self.deterministic = all(
            torch.equal(value, self.outputs[name]) for name, value in run(self.model, self.inputs).items()
        )
        named = [name for name in _FIRST if name in self.outputs]
        named += [name for name, value in self.outputs.items() if value.dim() == 3]
        self.main = (named or list(self.outputs))[0]
        self.batch = next(iter(self.inputs.values())).shape[0]
        self.pads = {side: self._kept_by(self.padding, side) for side in SIDES}
        self.sees_later = self._kept_by(self.later)
        self.generates = self._prepared() and self._kept_by(self.generation)

    def _kept_by(self, promise: Any, *args: Any) -> float | None:
        """How far the plain model itself is off, None if it does not keep the promise or cannot be asked."""
        try:
            off = float(promise(self.model, *args))
        except Exception:  # whatever a model says about inputs that it does not support
            return None
        return off if off <= 1e-4 * self.scale(self.outputs) else None

    def scale(self, outputs: dict[str, Tensor]) -> float:
        return max(1.0, float(outputs[self.main].abs().max()))

    def padding(self, model: Any, side: str, *tasks: str) -> float:
        """How much a shorter example differs alone and in a batch, whatever the padding holds."""
        ids = self.inputs["input_ids"]
        where = slice(0, _KEPT) if side == "right" else slice(ids.shape[1] - _KEPT, None)
        alone: Inputs = {name: value[:1] for name, value in self.inputs.items()}
        alone["input_ids"] = ids[:1, :_KEPT]
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        if "bbox" in alone:
            alone["bbox"] = alone["bbox"][:, :_KEPT]
        one = run(model, alone, **_tasks(tasks[:1]))[self.main][0]
        off = 0.0
        for filler in (0, 55):
            both = {name: value.clone() for name, value in self.inputs.items()}
            both["input_ids"][0] = filler
            both["input_ids"][0, where] = ids[0, :_KEPT]
            both["attention_mask"] = torch.ones_like(ids)
            both["attention_mask"][0] = 0
            both["attention_mask"][0, where] = 1
            padded = run(model, both, **_tasks(tasks))[self.main][0]
            same = padded[where] if padded.shape[0] == ids.shape[1] and "decoder_input_ids" not in both else padded
            off = max(off, difference(same, one))
        return off

    def later(self, model: Any, *tasks: str) -> float:
        """How much the last token changes the outputs of the tokens in front of it."""
        name = "decoder_input_ids" if "decoder_input_ids" in self.inputs else "input_ids"
        ids = self.inputs[name].clone()
        ids[:, -1] = (ids[:, -1] + 23) % 70 + 10
        one = run(model, self.inputs, **_tasks(tasks))[self.main]
        other = run(model, {**self.inputs, name: ids}, **_tasks(tasks))[self.main]
        if one.dim() < 3 or one.shape[1] != ids.shape[1] or torch.equal(one[:, -1], other[:, -1]):
            raise ValueError("the outputs are not those of the tokens")
        return difference(one[:, :-1], other[:, :-1])

    def _prepared(self) -> bool:
        if not {"input_ids", "attention_mask"} <= set(self.inputs) or not hasattr(self.model, "generate"):
            return False
        if not self.model.can_generate():
            return False
        config = self.model.generation_config
        config.eos_token_id = config.forced_eos_token_id = config.forced_bos_token_id = None
        config.cache_implementation, config.pad_token_id = None, 0
        return True

    def generation(self, model: Any, *tasks: str) -> float:
        """How much the logits of cached generation, after left padding, differ from those without a cache."""
        ids = self.inputs["input_ids"].clone()
        mask = torch.ones_like(ids)
        ids[0, :3] = mask[0, :3] = 0
        settings = {"max_new_tokens": _NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        results = []
        for cache in (True, False):
            torch.manual_seed(0)
            with torch.no_grad():
                results.append(
                    model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        use_cache=cache,
                        **settings,
                        **_tasks(tasks, as_numbers=True),
                    )
                )
        cached, uncached = results
        return max(difference(a, b) for a, b in zip(cached.logits, uncached.logits, strict=True))

    def reached(self) -> set[str]:
        """The names of the model's parameters that get a gradient."""
        try:
            return self._reached(training=True)
        except Exception:  # whatever a model says about such short inputs in training mode
            return self._reached(training=False)

    def _reached(self, *, training: bool) -> set[str]:
        self.training = training
        model = copy.deepcopy(self.model).requires_grad_(True).train(training)
        loss(model, self.inputs).backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def _tasks(tasks: tuple[str, ...], *, as_numbers: bool = False) -> dict[str, Any]:
    if not tasks:
        return {}
    return {"task_ids": torch.tensor([TASKS.index(task) for task in tasks]) if as_numbers else list(tasks)}


def loss(model: Any, inputs: Inputs, *tasks: str) -> Tensor:
    """A number that depends on all outputs."""
    torch.manual_seed(0)
    outputs = tensors(model(**inputs, **_tasks(tasks)))
    generator = torch.Generator().manual_seed(5)
    terms = [
        (value.nan_to_num() * torch.randn(value.shape, generator=generator)).mean()
        for _, value in sorted(outputs.items())
        if value.requires_grad
    ]
    return torch.stack([term.float() for term in terms]).sum()
