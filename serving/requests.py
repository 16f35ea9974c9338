"""The body of `POST /v1/images/generations`: OpenAI's fields and ours, each with what it may be."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cat_pruning.settings import Preset

MOST_IMAGES: Final = 10  # of a prompt, as OpenAI has it
MOST_SEED: Final = 2**63 - 1

Prompt = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=MOST_IMAGES)]


class ImageRequest(BaseModel):
    """Which images to generate.

    Fields that are not here are refused. `quality`, `style`, `background` and `moderation` are taken where they ask for
    nothing; `user` is ignored.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=64)] = Field(
        description="What to draw; a list gives `n` images of each."
    )
    model: str | None = Field(None, description="A name of `GET /v1/models`; by default its first.")
    n: Count = Field(1, description="Images of each prompt.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels; auto, the default, is the model's own size.")
    response_format: Literal["b64_json"] | None = Field(None, description="Images come in the answer: no `url`.")
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="Of the images' files.")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of a jpeg or webp; 95 by default."
    )
    stream: bool | None = Field(None, description="Server-sent events, one image after another.")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="Previews of each image in a stream."
    )
    user: str | None = Field(None, description="Ignored.")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    quality: Literal["auto"] | None = None

    negative_prompt: str | None = Field(None, description="What not to draw, where the model takes guidance.")
    num_inference_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="Sampling steps.")
    guidance_scale: Annotated[float, Field(ge=0.0, le=100.0)] | None = Field(None, description="Of the prompt.")
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = Field(
        None, description="Of the first image; the next ones count on. By default random, and told in the answer."
    )
    preset: Literal["paper", "refreshed", "forecast"] | None = Field(
        None, description="What is computed on which step, by a name."
    )
    speedup: Annotated[float, Field(ge=1.0, le=1000.0)] | None = Field(
        None, description="So many times as fast, by a schedule that cat-tune made; 1 computes everything."
    )
    token_map: bool = Field(False, description="Adds to each image how often each of its tokens was computed.")

    @model_validator(mode="after")
    def _check_together(self) -> ImageRequest:
        if self.preset is not None and self.speedup is not None:
            raise ValueError("speedup goes with no preset: its schedule says what each step computes")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream=true")
        if self.output_compression is not None and self.output_format == "png":
            raise ValueError("output_compression is for jpeg and webp: a png loses nothing")
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """One per image, in the order of the answer."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return tuple(prompt for prompt in given for _ in range(self.n))


PRESETS: Final = tuple(str(preset) for preset in Preset)
