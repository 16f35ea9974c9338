"""The CLIP score of image and prompt, as torchmetrics defines it: max(100 · cos(E_image, E_text), 0).

https://lightning.ai/docs/torchmetrics/stable/multimodal/clip_score.html, after Hessel et al., "CLIPScore".

torchmetrics 1.9 is written for transformers 4. It cuts off the end token of a prompt longer than CLIP's 77 tokens,
and CLIP reads the text on that token: all long prompts would look the same. `_ClipModel` and `_ClipProcessor` stand
between the two libraries and mend both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import errors as hub_errors
from PIL import Image
from torch import Tensor

from cat_pruning.checkpoints.hub import is_hub_id
from cat_pruning.checkpoints.library_logs import first_line, quiet_diffusers
from cat_pruning.checkpoints.parts import check_has_weights
from cat_pruning.errors import CheckpointError, SettingsError

DEFAULT_CLIP_MODEL = "openai/clip-vit-base-patch16"


class ClipScorer:
    """Scores images with one CLIP model, which is loaded once, in fp32.

    Args:
        model: a directory with a `CLIPModel` and its `CLIPProcessor`, or their id on the hub.
        device: where it runs.

    Raises:
        SettingsError: it is neither there nor on the hub, or is no whole CLIP model.
        ImportError: torchmetrics is not installed.
    """

    def __init__(self, model: str | Path, device: torch.device | str = "cpu") -> None:
        from torchmetrics.functional.multimodal import clip_score

        self.device = torch.device(device)
        loaded, processor = _load(model)
        self._parts = _ClipModel(loaded.to(self.device)), _ClipProcessor(processor, loaded.config)
        self._clip_score = clip_score

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The score of every image with the prompt in the same place, in [0, 100]; synchronises."""
        return [self._score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _score(self, image: Image.Image, prompt: str) -> float:
        # One at a time, because torchmetrics returns the mean of what it is given. The model runs where the image is.
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).to(self.device)
        return float(self._clip_score(pixels, prompt, lambda: self._parts))


class _ClipModel:
    """A `CLIPModel` whose features are tensors, as they were before transformers 5."""

    def __init__(self, model: Any) -> None:
        self.config, self._model = model.config, model

    def to(self, device: torch.device) -> _ClipModel:
        self._model.to(device)
        return self

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self._model.get_image_features(pixel_values=pixel_values).pooler_output  # type: ignore[no-any-return]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self._model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return output.pooler_output  # type: ignore[no-any-return]


class _ClipProcessor:
    """A `CLIPProcessor` that cuts a text to what the model takes and keeps the end token."""

    def __init__(self, processor: Any, config: Any) -> None:
        self._processor, self._max_length = processor, config.text_config.max_position_embeddings

    def __call__(self, **inputs: Any) -> Any:
        if "text" in inputs:
            inputs |= {"truncation": True, "max_length": self._max_length}
        return self._processor(**inputs)


def _load(model: str | Path) -> tuple[Any, Any]:
    """The `CLIPModel`, in fp32, and its `CLIPProcessor`."""
    from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPProcessor

    local = os.path.isdir(model)  # noqa: PTH112  # a Path of a name too long raises
    if not local and not is_hub_id(str(model)):
        raise SettingsError(f"{model}: expected a directory with a CLIPModel, or the id of one on the hub")
    try:
        with quiet_diffusers(errors=False):
            if local:
                check_has_weights(Path(model))
            config = AutoConfig.from_pretrained(model)
            if not isinstance(config, CLIPConfig):
                raise SettingsError(f"{model} is a model of type {config.model_type!r}: expected a CLIPModel, 'clip'")
            loaded, report = CLIPModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
            processor = CLIPProcessor.from_pretrained(model)
    except SettingsError:
        raise
    except CheckpointError as error:
        raise SettingsError(f"the CLIP model {error.problem}", error.remedy) from error
    except (OSError, ValueError, TypeError, RuntimeError, hub_errors.HTTPError) as error:  # type: ignore[attr-defined]
        remedy = (
            "give a directory with a CLIPModel and its CLIPProcessor"
            if local
            else "check the network and HF_HUB_OFFLINE, `hf auth login` if it is gated, or give a local directory"
        )
        raise SettingsError(f"the CLIP model {model} cannot be loaded ({first_line(error)})", remedy) from error
    if report["missing_keys"]:
        raise SettingsError(f"the CLIP model {model} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}")
    tokenizer = processor.tokenizer
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers 5 makes of a directory without one
        raise SettingsError(f"the CLIP model {model} has no tokenizer", "save its CLIPProcessor beside it")
    return loaded.eval(), processor
