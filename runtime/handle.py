"""One image that whoever began it steps: nothing is guessed from the calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.runtime.image_in_progress import ImageInProgress
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.step_call import StepCall
from cat_pruning.runtime.timesteps import TimestepReader
from cat_pruning.settings import PruneSettings

if TYPE_CHECKING:
    from cat_pruning.engines.session_pool import SessionPool
    from cat_pruning.runtime.transformer import CatTransformer


class ImageHandle:
    """One image (or batch of images), whose every call is of it, whatever other images are in progress.

    `CatTransformer.image` makes one. A step is one timestep: a second call at the same timestep computes the same
    tokens again. Conditioning may change from step to step, for the price of a full step. The calls of one handle come
    one at a time, from whatever thread.

        with transformer.image() as image:
            for timestep in scheduler.timesteps:
                noise = image(latents, timestep=timestep, encoder_hidden_states=..., pooled_projections=...).sample
                latents = scheduler.step(noise, timestep, latents).prev_sample

    Args:
        transformer: computes the calls.
        pool: its sessions.
        settings: what to compute on which step.
    """

    def __init__(self, transformer: CatTransformer, pool: SessionPool, settings: PruneSettings) -> None:
        self._transformer, self._timesteps = transformer, TimestepReader()
        self._image: ImageInProgress | None = ImageInProgress(pool, settings, is_kept=True)
        self._record: StepRecord | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the image and give its memory back."""
        if self._image is not None:
            self._image.close()
            self._image = None

    @property
    def last_step(self) -> StepRecord | None:
        """What its last step computed; None before the first."""
        return self._record

    def __call__(self, hidden_states: Tensor, *, context: str = "cond", **arguments: Any) -> Any:
        """One call: see `CatTransformer.forward`, of which these are the arguments.

        Args:
            hidden_states: the latents.
            context: "cond" for the image's own steps; another name for calls that go with them, as "uncond".
            arguments: the other arguments of the transformer.

        Raises:
            SettingsError: the image was closed, as also a call that fails does; or see `CatTransformer.forward`.
        """
        return self._transformer.compute(self, context, hidden_states, **arguments)

    def call(self, call: StepCall) -> Tensor:
        """Compute a call of the image itself: see `Sampling.call`."""
        image, level = self._open(), self._timesteps.read(call.timestep)
        try:
            return image.call(call, level, level.expected)
        except BaseException:
            self._image = None
            raise
        finally:
            self._record = image.record

    def call_beside(self, name: str, call: StepCall) -> Tensor:
        """Compute a call beside the image: see `Sampling.call_beside`."""
        level = self._timesteps.read(call.timestep)
        return self._open().call_beside(name, call, level, level.expected)

    def _open(self) -> ImageInProgress:
        if self._image is None:
            raise SettingsError("a call of an image that was closed", "begin another: transformer.image()")
        return self._image
