"""Every use of diffusers' pipelines: as the untouched one, or refused by name. docs/pipelines.md has what is found."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers_pipelines import FAMILIES, IMAGE, Use, latents_of, pipeline_of, transformer_of
from torch import Tensor

from cat_pruning import CatTransformer, PruneSettings
from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import CatError
from cat_pruning.families import FAMILIES as MODEL_FAMILIES
from cat_pruning.families import family_of
from cat_pruning.schedule import StepKind

pytestmark = [  # diffusers' own
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
BEGIN, END = "<!-- the table: made by tests/runtime/test_diffusers_pipelines.py -->", "<!-- the table ends -->"
ENGINES = {"torch": "torch", "onnxruntime": "ONNX Runtime"}
TITLES = {"sd3": "SD3", "sd3.5": "SD3.5", "pixart": "PixArt-Σ", "pixart-alpha": "PixArt-α", "flux-dev": "FLUX.1"}
WORKS, REFUSED, UNTRIED = "works", "refused", "–"
WRITE = "CAT_WRITE_TABLE"  # set it to write the page's table anew, without xdist
FULL_STEPS = 2
SETTINGS = PruneSettings(keep_ratio=0.3, full_steps=FULL_STEPS, num_clusters=6)
NUM_TOKENS = 64

ROWS = [(title, kinds, use) for title, (kinds, uses) in FAMILIES.items() for use in uses]
found: dict[tuple[str, str, str], str] = {}  # by use, kind and engine, where the table is written


@functools.cache
def untouched(name: str, kind: str) -> Tensor:
    (use,) = (use for _, _, use in ROWS if use.name == name)
    return latents_of(use, kind, pipeline_of(use, kind))


def is_tried(use: Use, kind: str, engine: str) -> bool:
    """An export of a transformer with other channels would be one more, and another number in its graphs."""
    is_exported = not set(use.changes) - {"sample_size"} and not (takes_controlnet(use) and kind == "sd3")
    return kind in (use.kinds or (kind,)) and (engine == "torch" or is_exported)


def takes_controlnet(use: Use) -> bool:
    return "ControlNet" in use.pipeline


TRIED = [
    pytest.param(use, kind, engine, id=f"{use.name}, {kind}, {engine}")
    for _, kinds, use in ROWS
    for kind in kinds
    for engine in ENGINES
    if is_tried(use, kind, engine)
]


engines: dict[str, OnnxRuntimeStepEngine] = {}  # shared by all uses of the same graphs, without adapters
Make = Callable[[PruneSettings], CatTransformer]


@pytest.mark.parametrize(("use", "kind", "engine"), TRIED)
def test_a_use_is_what_the_table_says(use: Use, kind: str, engine: str, export_tiny: Callable[..., Any]) -> None:
    what = tried(use, kind, engine, drop_ins(use, kind, engine, export_tiny))
    if WRITE in os.environ:
        found[use.name, kind, engine] = what
    else:
        assert what == cell(use, kind, engine), f"docs/pipelines.md: set {WRITE}=1 and run this file to write it anew"


def drop_ins(use: Use, kind: str, engine: str, export_tiny: Callable[..., Any]) -> Make:
    """Makes drop-ins for a use, over one engine."""
    transformer = transformer_of(use, kind)
    if engine == "torch":
        of_torch = functools.cache(lambda: TorchStepEngine(transformer))  # which may refuse it
        return lambda settings: CatTransformer(of_torch(), settings)
    directory, family = export_tiny(kind, takes_controlnet(use)).directory, family_of(transformer)
    if not hasattr(transformer, "peft_config"):
        key = f"{directory} {use.changes}"
        if key not in engines:
            engines[key] = OnnxRuntimeStepEngine(directory, family, torch.float32)
        return functools.partial(CatTransformer, engines[key])
    weights = {name: each for name, each in transformer.state_dict().items() if "lora" in name}

    def with_adapter(settings: PruneSettings) -> CatTransformer:
        made = CatTransformer(OnnxRuntimeStepEngine(directory, family, torch.float32), settings)
        made.load_lora_adapter({name.replace(".default", ""): each for name, each in weights.items()}, prefix=None)
        return made

    return with_adapter


def tried(use: Use, kind: str, engine: str, make: Make) -> str:
    """Keeping every token it is the untouched pipeline; keeping fewer it prunes, and is not."""
    try:
        kept, latents = run(use, kind, make(SETTINGS.replace(keep_ratio=1.0)))
    except CatError:
        return REFUSED
    except ValueError as error:
        # diffusers' own: without a module there are no layers whose attention could be perturbed.
        if engine == "torch" or "PAG layer" not in str(error):
            raise
        return REFUSED
    expected = untouched(use.name, kind)
    if engine == "torch":
        assert torch.equal(latents, expected)
    else:
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-3 if kind.startswith("pixart") else 1e-4)
    kept, latents = run(use, kind, make(SETTINGS))
    total = kept[0]
    assert total in (NUM_TOKENS, 2 * NUM_TOKENS)  # with a reference image's
    assert kept[:FULL_STEPS] == [total] * FULL_STEPS
    assert set(kept[FULL_STEPS:]) <= {int(0.3 * total)}
    assert len(kept) == FULL_STEPS or not torch.equal(latents, expected)
    assert latents.isfinite().all()
    return WORKS


def run(use: Use, kind: str, transformer: Any) -> tuple[list[int], Tensor]:
    """The number of tokens that each step computed, and the latents."""
    pipe = pipeline_of(use, kind, transformer)
    records: list[Any] = []
    transformer.register_forward_hook(lambda module, arguments, output: records.append(module.last_step))
    latents = latents_of(use, kind, pipe)
    steps = list(dict.fromkeys(records))
    assert all(record.kind is not StepKind.FORECAST for record in steps)
    return [record.num_kept for record in steps], latents


def cell(use: Use, kind: str, engine: str) -> str:
    """What the page says of a use."""
    section = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    for block in section.strip().split("\n\n"):
        header, *lines = [line.strip("| ").split(" | ") for line in block.strip().splitlines()]
        for line in lines:
            if line[:2] == [f"`{use.pipeline}`", use.feature] and column(kind, engine) in header:
                return line[header.index(column(kind, engine))]
    return "not in the table"


def column(kind: str, engine: str) -> str:
    return f"{TITLES[kind]}, {ENGINES[engine]}"


def table(cell_of: Callable[[Use, str, str], str]) -> str:
    """The page's tables, one for each family."""
    blocks = []
    for kinds, uses in FAMILIES.values():
        columns = [(kind, engine) for kind in kinds for engine in ENGINES]
        header = ["pipeline", "use", *(column(*each) for each in columns)]
        lines = [header, ["---"] * len(header)]
        lines += [[f"`{use.pipeline}`", use.feature, *(cell_of(use, *each) for each in columns)] for use in uses]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks)


def test_the_page_has_these_uses_and_no_others() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    if WRITE in os.environ:
        written = table(lambda use, kind, engine: found.get((use.name, kind, engine), UNTRIED))
        PAGE.write_text(f"{before}{BEGIN}\n\n{written}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    tried = {param.id for param in TRIED}
    as_found = table(
        lambda use, kind, engine: cell(use, kind, engine) if f"{use.name}, {kind}, {engine}" in tried else UNTRIED
    )
    assert rest.partition(END)[0].strip() == as_found


@pytest.mark.parametrize(("pipeline", "kind", "silent"), [("StableDiffusion3", "sd3", 0), ("Flux", "flux-dev", 1)])
def test_a_strength_of_too_few_steps_is_said_once(
    caplog: pytest.LogCaptureFixture, pipeline: str, kind: str, silent: int
) -> None:
    """FLUX's pipelines hide their schedule, so of the first image it is not known."""
    use = Use(f"{pipeline}Img2ImgPipeline", "a low strength", {"image": IMAGE, "strength": 0.4})
    transformer = CatTransformer(TorchStepEngine(transformer_of(use, kind)), SETTINGS)
    pipe, said = pipeline_of(use, kind, transformer), []
    for _ in range(3):
        latents_of(use, kind, pipe)
        said.append(caplog.text.count("none of an image's 2 steps is pruned: the first 2 of every image are full"))
    assert said == [0] * silent + [1] * (3 - silent)


@pytest.mark.parametrize("kind", ["sd3.5", "flux-dev"])
def test_a_bundle_for_control_nets_makes_images_without_one(kind: str, export_tiny: Callable[..., Any]) -> None:
    (use,) = (use for _, kinds, use in ROWS if use.feature == "text to image" and kind in kinds)
    family, directory = family_of(transformer_of(use, kind)), export_tiny(kind, True).directory
    engine = OnnxRuntimeStepEngine(directory, family, torch.float32)
    _, latents = run(use, kind, CatTransformer(engine, SETTINGS.replace(keep_ratio=1.0)))
    torch.testing.assert_close(latents, untouched(use.name, kind), rtol=0, atol=1e-4)


def test_plans_of_twice_the_pixels_take_a_reference_image(
    export_tiny: Callable[..., Any], tiny_plans: Callable[..., Any]
) -> None:
    """Of Kontext, as large as the image: 128 tokens, of which pruned steps compute as many as of one such image."""
    (use,) = (use for _, _, use in ROWS if use.feature == "FLUX.1 Kontext")
    kind = "flux-dev"
    kept, latents = run(use, kind, CatTransformer(tiny_plans(export_tiny(kind), (16, 32)), SETTINGS))
    assert kept == [128, 128, 38, 38, 38]
    reference = CatTransformer(TorchStepEngine(transformer_of(use, kind)), SETTINGS)
    torch.testing.assert_close(latents, run(use, kind, reference)[1], rtol=0, atol=1e-4)


def test_every_pipeline_of_diffusers_is_tried() -> None:
    """A new release shows what is new."""
    classes = {family.transformer_class for family in MODEL_FAMILIES}
    known = {use.pipeline for _, _, use in ROWS} | {"VisualClozePipeline", "VisualClozeGenerationPipeline"}
    ours = set()
    for path in Path(diffusers.__file__).parent.glob("pipelines/**/pipeline_*.py"):
        source = path.read_text(encoding="utf-8")
        if re.search(rf"transformer: ({'|'.join(classes)})\b", source):
            ours |= set(re.findall(r"^class (\w+Pipeline)\(", source, re.MULTILINE))
    assert ours == known
