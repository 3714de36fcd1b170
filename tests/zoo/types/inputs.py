"""What a model of an unknown type can be called with: guesses by the names of its arguments, tried in order."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
_PARTS = ("vision_config", "audio_config", "encoder_config", "encoder", "backbone_config")
TOKENS, DECODED, BATCH = 9, 6, 2


def field(config: Any, *names: str) -> Any:
    """The first of these sizes in a config or a config inside it."""
    for part in (config, *(getattr(config, name, None) for name in _PARTS)):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
                return value
    return None


class Guesses:
    """The inputs that fit the arguments of a model's `forward`."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.arguments = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(7)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def has(self, *names: str) -> bool:
        return all(name in self.arguments for name in names)

    def ids(self, length: int) -> Tensor:
        return torch.randint(10, 80, (BATCH, length), generator=self.generator)

    def text(self) -> Inputs:
        if not self.has("input_ids"):
            return {}
        mask = {"attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)} if self.has("attention_mask") else {}
        return {"input_ids": self.ids(TOKENS), **mask}

    def decoded(self) -> Inputs:
        return {"decoder_input_ids": self.ids(DECODED)} if self.has("decoder_input_ids") else {}

    def channels(self) -> int:
        count = field(self.config, "num_channels", "in_channels", "in_chans", "image_channels")
        return count if isinstance(count, int) else 3

    def images(self) -> Iterator[Tensor]:
        """An image, a video, an image as a video of equal frames, and larger images."""
        size = field(self.config, "image_size", "img_size") or 32
        height, width = (size, size) if isinstance(size, int) else size[-2:]
        channels = self.channels()
        frames = field(self.config, "num_frames", "frames_per_clip")
        frames = frames if isinstance(frames, int) else 4
        image = self.noise(BATCH, channels, height, width)
        yield image
        yield self.noise(BATCH, frames, channels, height, width)
        yield image[:, None].expand(BATCH, frames, channels, height, width).contiguous()
        yield self.noise(BATCH, channels, 64, 64)
        yield self.noise(BATCH, channels, 224, 224)

    def packed(self) -> Iterator[Inputs]:
        """Patches of several images, with the number of patches of each."""
        sizes = [field(self.config, name) for name in ("patch_size", "temporal_patch_size")]
        patch, frames = (size if isinstance(size, int) else 1 for size in sizes)
        rows = self.noise(32, self.channels() * frames * patch * patch)
        grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
        name = next((n for n in ("image_grid_thw", "grid_thw") if self.has(n)), None)
        main = "hidden_states" if self.has("hidden_states") else "pixel_values"
        if name is not None and not self.has("input_ids"):
            yield {main: rows, name: grid}
            yield {main: rows.view(32, self.channels(), patch, -1), name: grid[:, 1:] if frames == 1 else grid}
        if self.has("spatial_shapes"):
            mask = "pixel_attention_mask" if self.has("pixel_attention_mask") else "attention_mask"
            squares = {
                "pixel_values": self.noise(BATCH, 16, self.channels() * patch * patch),
                "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
                mask: torch.ones(BATCH, 16, dtype=torch.long),
            }
            yield self.text() | squares

    def seen(self) -> Iterator[Inputs]:
        text, decoded = self.text(), self.decoded()
        image, *others = self.images()
        image_first = getattr(self.model, "main_input_name", "input_ids") == "pixel_values"
        generates = type(self.model).__name__.endswith(("ForConditionalGeneration", "ForCausalLM"))
        if not text:
            yield {"pixel_values": image, **decoded}
            yield from ({"pixel_values": other, **(decoded if other.dim() == 4 else {})} for other in others)
            return
        both, alone = {**text, "pixel_values": image, **decoded}, {"pixel_values": image, **decoded}
        order = [{**text, **decoded}, both, alone] if generates else [both, {**text, **decoded}, alone]
        yield from reversed(order) if image_first else order
        yield {**text, "pixel_values": others[0]}

    def heard(self) -> Iterator[Inputs]:
        text, decoded = self.text(), self.decoded()
        bins = field(self.config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels",
                     "input_dim")  # fmt: skip
        bins = bins if isinstance(bins, int) else 80
        positions = field(self.config, "max_source_positions") or 20
        frames = 2 * positions if positions <= 32 else 40
        if self.has("input_features"):
            features = self.noise(BATCH, bins, frames)
            for value in (features, features.transpose(1, 2).contiguous()):
                lengths = torch.ones(BATCH, frames, dtype=torch.long)
                mask = {"input_features_mask": lengths} if self.has("input_features_mask") else {}
                yield {"input_features": value, **decoded}
                yield {"input_features": value, **mask, **decoded}
                yield {**text, "input_features": value}
        if self.has("input_values"):
            wave = self.noise(BATCH, 2000)
            yield {"input_values": wave, **decoded}
            yield {"input_values": wave[:, None], **decoded}
            length = field(self.config, "max_length")
            yield {"input_values": self.noise(BATCH, length if isinstance(length, int) else 64, bins)}

    def embedded(self) -> Iterator[Inputs]:
        width = field(self.config, "hidden_size") or 32
        states = self.noise(BATCH, TOKENS, width)
        if self.has("hidden_states"):
            yield {"hidden_states": states}
        if self.has("query_embeds"):
            other = field(self.config, "encoder_hidden_size") or width
            yield {"query_embeds": states, "encoder_hidden_states": self.noise(BATCH, TOKENS, other)}
        if self.has("inputs_embeds"):
            yield {"inputs_embeds": states}

    def boxed(self) -> Iterator[Inputs]:
        """Text with the places of its words on a page."""
        box = torch.tensor([1, 2, 5, 6]).expand(BATCH, TOKENS, 4).clone()
        text = self.text()
        yield {**text, "bbox": box, **self.decoded()}
        yield {**text, "bbox": box, "pixel_values": next(self.images())}
        yield {**text, "bbox": box.float()}

    def all(self) -> Iterator[Inputs]:
        yield from self.packed()
        if self.has("pixel_values"):
            yield from self.seen()
        if self.has("input_ids"):
            yield {**self.text(), **self.decoded()}
        if self.has("bbox"):
            yield from self.boxed()
        if self.has("pixel_values_videos"):
            yield {"pixel_values_videos": list(self.images())[1]}
        yield from self.heard()
        if not self.has("input_ids"):
            yield from self.embedded()
