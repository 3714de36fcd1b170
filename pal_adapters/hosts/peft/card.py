"""The model card that PEFT writes beside an adapter: how to find and load one of this package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from .tuner import TaskTuner

_TAG = "pal_adapters"
_LOADING = """

## Loading

PEFT knows this adapter's method once `pal_adapters` is imported:

```python
import pal_adapters
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/hub/id")
```
"""


def _card(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        original(self, output_dir)
        if not isinstance(self.base_model, TaskTuner):
            return
        path = Path(output_dir, "README.md")
        card: Any = ModelCard.load(path)
        card.data.tags = sorted({*(card.data.tags or ()), _TAG, self.base_model.method.name})
        if _LOADING.strip() not in card.text:
            card.text = card.text.rstrip() + _LOADING
        card.save(path)

    return create_or_update_model_card


def install() -> None:
    """Extend the host's method, once."""
    PeftModel.create_or_update_model_card = _card(PeftModel.create_or_update_model_card)  # type: ignore[method-assign]
