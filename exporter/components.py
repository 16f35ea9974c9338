"""Text encoders and autoencoders as ONNX graphs, with dynamic batch, text length and size.

Each kind of module has a wrapper that says what goes in and out: CLIP with the hidden states of every layer, from which
pipelines take the last but one, or another by `clip_skip`; T5 with its mask; an autoencoder's decoder and encoder with
the convolutions beside them. What a graph computes is the module's own forward, and its precision the module's: of T5
in fp16, transformers keeps one matrix of each layer in fp32, and clamps.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn

from cat_pruning.bundle.schema import ComponentSpec, ComponentTensor
from cat_pruning.checkpoints.checkpoint import Checkpoint, check_weights
from cat_pruning.checkpoints.hub import pipeline_snapshot
from cat_pruning.checkpoints.parts import class_of_part, load_module
from cat_pruning.components import (
    ATTENTION_MASK,
    COMPONENT_PARTS,
    HIDDEN_STATES,
    IMAGE,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    LATENTS,
    MOMENTS,
    POOLED,
    SHAPES,
    Component,
    components_of,
    with_both_sizes,
)
from cat_pruning.dtype import DType
from cat_pruning.engines.onnxruntime_sessions import ORT_ERRORS, quiet_session, run_quietly
from cat_pruning.errors import EngineError, SettingsError
from cat_pruning.exporter.progress import Stage
from cat_pruning.exporter.tracing import (
    Advance,
    Weights,
    forget_origins,
    replace_weights,
    save_graphs,
    simplify,
    trace,
)
from cat_pruning.exporter.verify import TOLERANCE, compare

logger = logging.getLogger(__name__)

_TEXT: Final = ("batch", "text_length")
_EXAMPLE: Final = {"batch": 2, "text_length": 7, "latent_height": 6, "latent_width": 5}  # no two alike
# What graphs are compared at: other sizes.
_SIZES: Final = (
    {"batch": 1, "text_length": 12, "latent_height": 9, "latent_width": 4},
    {"batch": 3, "text_length": 5, "latent_height": 2, "latent_width": 8},
)
_LONGEST_T5: Final = 512  # the most that a pipeline of FLUX or SD3 takes


class _Component(nn.Module):
    """A module whose graph is exported, under the attribute that `tracing.WEIGHTS` knows."""

    component: Any
    inputs: Mapping[str, Sequence[str | int]]
    outputs: Sequence[str]

    def examples(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
        """Random inputs of these sizes, by names of dimensions."""
        raise NotImplementedError

    def text_lengths(self, text_length: int) -> tuple[int, int, int] | None:
        """What the plans of a text encoder are built for, where the pipeline's texts have `text_length` rows."""
        return None


class ClipText(_Component):
    """CLIPTextModel or CLIPTextModelWithProjection: the last and all hidden states, and the pooled one."""

    outputs = (LAST_HIDDEN_STATE, HIDDEN_STATES, POOLED)

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.component, self.inputs = encoder, {INPUT_IDS: _TEXT}

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """(batch, length, width), (layers + 1, batch, length, width), (batch, width)."""
        found = self.component(input_ids.long(), output_hidden_states=True)
        pooled = found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output
        return found.last_hidden_state, torch.stack(found.hidden_states), pooled

    def examples(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
        """Texts that end with the token that ends a text."""
        ids = _texts(self.component, sizes, seed)
        ids[:, -1] = self.component.config.eos_token_id
        return {INPUT_IDS: ids}

    def text_lengths(self, text_length: int) -> tuple[int, int, int]:
        """Pipelines fill texts up to CLIP's positions."""
        positions = int(self.component.config.max_position_embeddings)
        return positions, positions, positions


class T5Text(_Component):
    """T5EncoderModel: the last hidden state under a mask."""

    outputs = (LAST_HIDDEN_STATE,)

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.component, self.inputs = encoder, {INPUT_IDS: _TEXT, ATTENTION_MASK: _TEXT}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length, width)."""
        state: Tensor = self.component(input_ids.long(), attention_mask=attention_mask.long())[0]
        return state

    def examples(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
        """Texts of which the first is shorter than the others."""
        ids = _texts(self.component, sizes, seed)
        mask = torch.ones_like(ids)
        mask[0, sizes["text_length"] // 2 :] = 0
        return {INPUT_IDS: ids, ATTENTION_MASK: mask}

    def text_lengths(self, text_length: int) -> tuple[int, int, int]:
        """Any: its positions are relative."""
        return 1, min(text_length, _LONGEST_T5), max(text_length, _LONGEST_T5)


class VaeDecoder(_Component):
    """The decoder of an AutoencoderKL, after its convolution."""

    outputs = (IMAGE,)

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.component = nn.ModuleList([vae.post_quant_conv or nn.Identity(), vae.decoder])
        self.inputs = {LATENTS: ("batch", vae.config.latent_channels, "latent_height", "latent_width")}

    def forward(self, latents: Tensor) -> Tensor:
        """(batch, 3, height, width)."""
        before, decoder = self.component
        image: Tensor = decoder(before(latents))
        return image

    def examples(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
        """Latents."""
        return {LATENTS: _noise(self, self.inputs[LATENTS], sizes, seed)}


class VaeEncoder(_Component):
    """The encoder of an AutoencoderKL, before its convolution."""

    outputs = (MOMENTS,)

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.component = nn.ModuleList([vae.encoder, vae.quant_conv or nn.Identity()])
        self.inputs = {IMAGE: ("batch", vae.config.in_channels, "height", "width")}
        self._factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 2 channels, latent_height, latent_width)."""
        encoder, after = self.component
        moments: Tensor = after(encoder(image))
        return moments

    def examples(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
        """An image."""
        return {IMAGE: _noise(self, self.inputs[IMAGE], with_both_sizes(sizes, self._factor), seed)}


def _texts(encoder: Any, sizes: Mapping[str, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes["batch"], sizes["text_length"])
    return torch.randint(encoder.config.vocab_size, shape, dtype=torch.int32, generator=generator)


def _noise(module: nn.Module, shape: Sequence[str | int], sizes: Mapping[str, int], seed: int) -> Tensor:
    numbers = [sizes[dim] if isinstance(dim, str) else dim for dim in shape]
    return torch.randn(numbers, generator=torch.Generator().manual_seed(seed)).to(next(module.parameters()).dtype)


# The wrappers by the class of the pipeline's part and its graph.
_WRAPPERS: Final[dict[str, Mapping[str, type[_Component]]]] = {
    "CLIPTextModel": {"text_encoder": ClipText},
    "CLIPTextModelWithProjection": {"text_encoder": ClipText},
    "T5EncoderModel": {"text_encoder": T5Text},
    "AutoencoderKL": {"vae_decoder": VaeDecoder, "vae_encoder": VaeEncoder},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedPart:
    """A part of a pipeline that is to be exported: its name, its class, its folder."""

    name: str
    part_class: Any
    folder: Path


def wanted_parts(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[WantedPart, ...]:
    """The parts of a checkpoint to export as graphs; downloads them if they are on the hub.

    Args:
        checkpoint: with a pipeline.
        names: of `COMPONENT_PARTS`; those that the pipeline has not got are left out, and those that no graph can be
            made of, with a warning.

    Raises:
        SettingsError: there is no pipeline.
        CheckpointError: the hub cannot be reached, or the pipeline's index is damaged.
    """
    if not names:
        return ()
    if checkpoint.directory is None or not checkpoint.components:
        raise SettingsError(
            f"--components: {checkpoint.source.location} has no text encoders and no autoencoder", "leave it out"
        )
    directory = parts_directory(checkpoint)
    found = []
    for name in dict.fromkeys(names):
        if name not in checkpoint.components:
            continue
        part_class = class_of_part(directory, name)
        if part_class.__name__ not in _WRAPPERS:
            logger.warning(
                "%s is a %s, of which no graph can be made: it is taken along for torch; known are %s",
                name, part_class.__name__, ", ".join(_WRAPPERS),
            )  # fmt: skip
            continue
        found.append(WantedPart(name=name, part_class=part_class, folder=directory / name))
    return tuple(found)


def folders_of(parts: Sequence[WantedPart]) -> dict[str, Path]:
    """The folders of parts by their names."""
    return {part.name: part.folder for part in parts}


def parts_directory(checkpoint: Checkpoint) -> Path:
    """Where the pipeline's other parts are, downloaded if they are on the hub.

    Raises:
        CheckpointError: the hub cannot be reached.
    """
    source = checkpoint.source
    if source.kind == "hub":
        return pipeline_snapshot(source.location, source.revision)
    assert checkpoint.directory is not None
    return checkpoint.directory


def export_components(
    parts: Sequence[WantedPart], directory: Path, dtype: DType, text_length: int, stage: Stage, *, verify: bool
) -> tuple[ComponentSpec, ...]:
    """Write the graphs of some parts into `directory`, one part in memory at a time.

    Args:
        parts: see `wanted_parts`.
        directory: where the files go.
        dtype: of the export.
        text_length: rows of the pipeline's texts.
        stage: entered for every part.
        verify: compare what the graphs return under ONNX Runtime with torch.

    Raises:
        CheckpointError: a part's weights are damaged, or not finite in the dtype.
        EngineError: a graph computes something else than its module.
        OSError: a file cannot be written.
    """
    specs: list[ComponentSpec] = []
    for part in parts:
        with stage(f"Trace {part.name} and write its graph") as advance:
            options = {} if part.name == "vae" else {"attn_implementation": "eager"}  # of T5, torch exports no other
            module = load_module(part.part_class, part.folder, dtype.torch, **options).eval()
            check_weights(module, part.folder, dtype)
            written = export_part(part.name, module, directory, text_length, advance)
        if verify and dtype is not DType.BF16:
            with stage(f"Compare {part.name} under ONNX Runtime with torch"):
                for spec in written:
                    verify_component(wrapped(spec.component, module), directory / spec.file, dtype)
        specs += written
        del module
        gc.collect()
    return tuple(specs)


def verify_component(wrapper: _Component, path: Path, dtype: DType) -> float:
    """Run a graph at sizes that it was not traced at, and return its largest error relative to torch's largest value.

    Raises:
        EngineError: an output differs by more than the tolerance of the dtype, or ONNX Runtime cannot run the file.
    """
    worst = 0.0
    for sizes in _SIZES:
        inputs = wrapper.examples(sizes, seed=1)
        with torch.inference_mode():
            found = wrapper(**inputs)
        expected = dict(zip(wrapper.outputs, found if isinstance(found, tuple) else (found,), strict=True))
        try:
            session = quiet_session(path)
            names = [value.name for value in session.get_outputs()]
            results = run_quietly(session, {name: tensor.numpy() for name, tensor in inputs.items()})
        except ORT_ERRORS as error:
            raise EngineError(f"--verify: ONNX Runtime cannot run {path.name}: {error}") from error
        tensors = {name: torch.from_numpy(value) for name, value in zip(names, results, strict=True)}
        largest, divergence = compare(tensors, expected, dtype)
        if divergence is not None:
            raise EngineError(
                f"--verify: {divergence.name} of {path.name} is off torch's by {divergence.error:.1e} of its largest "
                f"value; at most {TOLERANCE[dtype]:.0e} is rounding in {dtype}",
                "leave its part out of --components, and report it",
            )
        worst = max(worst, largest)
    return worst


def export_part(
    name: str,
    module: nn.Module,
    directory: Path,
    text_length: int,
    advance: Advance | None = None,
    weights: Weights | None = None,
) -> list[ComponentSpec]:
    """Write the graphs of one part: `{component}.onnx` and its weights.

    Args:
        name: of the part, as diffusers' pipelines call it.
        module: of it, on the CPU.
        directory: where the files go.
        text_length: rows of the pipeline's texts, for the shapes of a text encoder's plans.
        advance: called for every weight.
        weights: values to write in the place of the module's parameters, by the wrapped module's names.

    Raises:
        OSError: a file cannot be written.
    """
    wrappers = {component: wrapped(component, module) for component in components_of(name)}
    graphs = {component: (wrapper, _traced(wrapper, weights)) for component, wrapper in wrappers.items()}
    specs = [_spec(component, wrapper, model, text_length) for component, (wrapper, model) in graphs.items()]
    save_graphs({directory / component.onnx: model for component, (_, model) in graphs.items()}, advance)
    return specs


def wrapped(component: Component, module: nn.Module) -> _Component:
    """What of a pipeline's part is the graph of a component."""
    wrappers = _WRAPPERS[type(module).__name__]
    return wrappers["text_encoder" if component.value in COMPONENT_PARTS else component.value](module).eval()


def _traced(wrapper: _Component, weights: Weights | None) -> ir.Model:
    dynamic = {
        name: {axis: torch.export.Dim.AUTO for axis, dim in enumerate(shape) if isinstance(dim, str)}
        for name, shape in wrapper.inputs.items()
    }
    model = trace(wrapper, wrapper.examples(_EXAMPLE), dynamic, list(wrapper.inputs), wrapper.outputs)
    if weights is not None:
        replace_weights(model, weights)
    simplify(model)
    return model


def _spec(component: Component, wrapper: _Component, model: ir.Model, text_length: int) -> ComponentSpec:
    """The record of a graph, whose inputs and outputs get the names of their dimensions."""
    inputs = []
    for value in model.graph.inputs:
        assert value.dtype is not None
        shape = tuple(wrapper.inputs[value.name or ""])
        value.shape = ir.Shape(shape)
        inputs.append(ComponentTensor(name=value.name or "", dtype=value.dtype.name, shape=shape))
    outputs = []
    for value in model.graph.outputs:
        assert value.dtype is not None
        assert value.shape is not None
        shape = _output_shape(value.name or "", tuple(value.shape))
        value.shape = ir.Shape(shape)
        outputs.append(ComponentTensor(name=value.name or "", dtype=value.dtype.name, shape=shape))
    forget_origins(model)
    return ComponentSpec(
        component=component,
        file=component.onnx,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        text_lengths=wrapper.text_lengths(text_length),
    )


def _output_shape(name: str, traced: Sequence[Any]) -> tuple[str | int, ...]:
    """An output's shape with our names for dynamic dimensions, and the tracer's numbers."""
    return tuple(named or int(found) for named, found in zip(SHAPES[name], traced, strict=True))
