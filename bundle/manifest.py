"""The manifest of a bundle: what was exported, from what, for which shapes, and the hash of every file.

    Manifest
    ├── Source, transformer_class, transformer_config, dtype, guidance, PruneSettings    what was exported
    ├── Quantization                                                                     of the step's weights
    ├── Geometry, GraphSpec*, ProfileSpec*                                               its graphs and shapes
    ├── ComponentSpec*                                                                   graphs of the other parts
    ├── MacsSpec*                                                                        what a step costs
    ├── PlanSpec*, PipelineSpec, schedules                                               what lies beside the graphs
    └── versions, FileSpec*                                                              what made it, what to check

Every model is frozen, strict and refuses unknown fields, and the shapes are checked against each
other, so that an edited or mistyped manifest is caught when it is read and not by an engine.
A change of these fields, or of those of `PruneSettings`, is a new `FORMAT_VERSION`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

import pydantic
from pydantic import AfterValidator, Field, Strict, model_validator

from cat_pruning.bundle.schema import (
    BundlePath,
    ComponentSpec,
    FileSpec,
    Geometry,
    GraphSpec,
    MacsSpec,
    PipelineSpec,
    PlanSpec,
    ProfileSpec,
    Source,
    Spec,
)
from cat_pruning.bundle.signatures import PublicKey, read_signature
from cat_pruning.components import Component, components_of
from cat_pruning.dtype import DType
from cat_pruning.errors import BundleError
from cat_pruning.files import decoded, parse_json, read_bytes
from cat_pruning.names import Flavour, Quantization
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part, is_residual

FORMAT_VERSION: Final = 8
_READ: Final = (6, 7, FORMAT_VERSION)  # 6 had no components, 7 no calibration
MANIFEST_NAME: Final = "manifest.json"
CHANGING_NAME: Final = ".changing.json"  # the names of the files that a change in place adds and drops


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    # diffusers' configs hold tuples; as JSON types, what is written equals what is read back.
    try:
        return dict(json.loads(json.dumps(config, allow_nan=False)))
    except TypeError as error:
        raise ValueError(str(error)) from error


def _settings(value: object) -> PruneSettings:
    if isinstance(value, PruneSettings):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object, got {value!r}")
    # `from_dict` fills in defaults; in a manifest a default would hide that a line was lost.
    if missing := [field.name for field in dataclasses.fields(PruneSettings) if field.name not in value]:
        raise ValueError(f"missing {', '.join(missing)}")
    return PruneSettings.from_dict(value)


_Settings = Annotated[
    PruneSettings, pydantic.PlainValidator(_settings), pydantic.PlainSerializer(PruneSettings.to_dict)
]


_LATER: Final = ("components", "quantization", "calibration", "unquantized")  # fields that were added


class Manifest(Spec):
    """All that a bundle says about itself. `files` maps each file's path in the bundle to its size and hash."""

    format_version: int = FORMAT_VERSION
    family: Annotated[str, Field(min_length=1)]
    source: Source
    transformer_class: str
    transformer_config: Annotated[dict[str, Any], AfterValidator(_as_json)]
    dtype: DType
    quantization: Quantization | None = None  # of step.onnx; what is not quantized is in `dtype`
    calibration: str | None = None  # the prompts of the images that its scales were found on: scenes:N, or a file
    unquantized: Annotated[tuple[str, ...], Strict(False)] = ()  # patterns of layers that stayed in `dtype`
    guidance: bool
    settings: _Settings
    geometry: Geometry
    graphs: Annotated[tuple[GraphSpec, ...], Strict(False)]
    profiles: Annotated[tuple[ProfileSpec, ...], Strict(False), Field(min_length=1)]
    components: Annotated[tuple[ComponentSpec, ...], Strict(False)] = ()
    macs: Annotated[tuple[MacsSpec, ...], Strict(False)] = ()
    plans: Annotated[tuple[PlanSpec, ...], Strict(False)] = ()
    pipeline: PipelineSpec | None = None
    schedules: Annotated[tuple[BundlePath, ...], Strict(False)] = ()
    versions: dict[str, str]
    files: dict[BundlePath, FileSpec] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        names = [profile.name for profile in self.profiles]
        if len(set(names)) < len(names):
            raise ValueError(f"two profiles of one name: {', '.join(names)}")
        if unknown := {entry.profile for entry in self.macs} - set(names):
            raise ValueError(f"macs of unknown profiles {', '.join(sorted(unknown))}; known are {', '.join(names)}")
        for profile in self.profiles:
            for field, expected in self._expected(profile).items():
                if (value := getattr(profile, field)) != expected:
                    raise ValueError(f"profile {profile.name}: {field} is {value}, the other fields make it {expected}")
        return self

    def _expected(self, profile: ProfileSpec) -> dict[str, int]:
        scale, patch, limit = self.geometry.pixels_per_latent, self.geometry.patch_size, self.geometry.max_latent_size
        return {
            "height": profile.latent_height * scale,
            "width": profile.latent_width * scale,
            "latent_height": min(profile.latent_height, limit or profile.latent_height),
            "latent_width": min(profile.latent_width, limit or profile.latent_width),
            "num_tokens": (profile.latent_height // patch) * (profile.latent_width // patch),
            "num_kept": self.settings.num_kept(profile.num_tokens),
            "batch": profile.prompts * (2 if self.guidance else 1),
        }

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        quantization = self.quantization
        if quantization and not quantization.is_calibrated and self.plans:
            raise ValueError(f"plans of a step in {quantization}, of which none are built")
        if (self.calibration is not None) != bool(quantization and quantization.is_calibrated):
            raise ValueError(f"a step in {quantization or self.dtype}, calibrated by {self.calibration}")
        return self

    @model_validator(mode="after")
    def _check_graphs(self) -> Self:
        parts = [graph.part for graph in self.graphs]
        if sorted(parts) != sorted(Part):
            raise ValueError(f"graphs of {', '.join(parts)}; expected one each of {', '.join(Part)}")
        results = {tensor for graph in self.graphs if graph.part is not Part.STEP for tensor in graph.outputs}
        if missing := results - set(self.graph(Part.STEP).inputs):
            raise ValueError(f"the step does not take {', '.join(sorted(tensor.name for tensor in missing))}")
        return self

    @model_validator(mode="after")
    def _check_components(self) -> Self:
        there = [spec.component for spec in self.components]
        if len(set(there)) < len(there):
            raise ValueError(f"two graphs of one component: {', '.join(there)}")
        for part in {component.pipeline_part for component in there}:
            if missing := set(components_of(part)) - set(there):
                raise ValueError(f"{part} has no graph {', '.join(sorted(missing))}, and no weights without it")
        if there and (self.pipeline is None or self.pipeline.kind != "copied"):
            raise ValueError("graphs of a pipeline's parts, and no pipeline among the files that they are of")
        if unknown := {str(plan.part) for plan in self.plans} - {*map(str, Part), *map(str, there)}:
            raise ValueError(f"plans of {', '.join(sorted(unknown))}, of which there is no graph")
        return self

    def every_graph(self) -> tuple[GraphSpec | ComponentSpec, ...]:
        """The step's graphs, then the components'."""
        return (*self.graphs, *self.components)

    def component(self, component: Component) -> ComponentSpec:
        """The graph of one component, which there is."""
        return next(spec for spec in self.components if spec.component is component)

    def component_parts(self) -> tuple[str, ...]:
        """The parts of the pipeline that are graphs, by diffusers' names."""
        return tuple(dict.fromkeys(spec.component.pipeline_part for spec in self.components))

    def graph(self, part: Part) -> GraphSpec:
        """The graph of one part."""
        return next(graph for graph in self.graphs if graph.part is part)

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if not self.files:  # not yet: the writer of the bundle fills them in
            return self
        if missing := [graph.file for graph in self.every_graph() if graph.file not in self.files]:
            raise ValueError(f"graphs that are not among the files: {', '.join(missing)}")
        if missing := [plan.file for plan in self.plans if plan.file not in self.files]:
            raise ValueError(f"plans that are not among the files: {', '.join(missing)}")
        if missing := [name for name in self.schedules if name not in self.files]:
            raise ValueError(f"schedules that are not among the files: {', '.join(missing)}")
        folder = self.pipeline.path if self.pipeline else None
        if folder and not any(name.startswith(f"{folder}/") for name in self.files):
            raise ValueError(f"no files below the pipeline's {folder}/")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest without its schedules and plans: the same when some are added later, or dropped."""
        later = {*self.schedules, *(plan.file for plan in self.plans)}
        others = {name: spec for name, spec in self.files.items() if name not in later}
        left = self.model_copy(update={"schedules": (), "plans": (), "files": others})
        # Of a bundle without what came later, it is what it was before there was any.
        absent = {name for name in _LATER if not getattr(self, name)}
        text = left.model_dump_json(exclude=absent)
        return hashlib.sha256(text.encode()).hexdigest()

    def with_files(self, files: Mapping[str, FileSpec]) -> Self:
        """A copy with other files; validated like a new one."""
        return type(self).model_validate(dict(self) | {"files": dict(files)})

    def add_plans_command(self, place: Path, flavour: Flavour) -> str:
        """The shell command that adds plans for the machine that it is run on to this bundle at `place`.

        Of a bundle whose quantized step is ONNX Runtime's: that exports it anew, not quantized, with these plans.
        """
        if self.quantization and not self.quantization.is_calibrated:
            return self.export_command(place, flavour)
        return shlex.join(
            ["cat-export", "--add-plans", str(place), "--target", flavour, *self._plan_options({flavour})]
        )

    def _plan_options(self, flavours: Collection[Flavour]) -> list[str]:
        """The options that these plans of the bundle were built with."""
        plans = [plan for plan in self.plans if plan.flavour in flavours]
        function = any(plan.flavour == "tensorrt" and plan.token_ops == "function" for plan in plans)
        refittable = any(plan.refittable for plan in plans)
        return (["--no-plugin"] if function else []) + (["--refittable"] if refittable else [])

    def export_command(self, out: Path, *flavours: Flavour) -> str:
        """The shell command that makes this bundle again at `out`, with plans for `flavours` besides those it has.

        Where it has plans the graphs are not quantized by what only ONNX Runtime takes.
        """
        targets = dict.fromkeys((*(plan.flavour for plan in self.plans), *flavours))
        words = ["cat-export", "--model", self.source.location, "--dtype", self.dtype]
        words += ["--revision", self.source.revision] if self.source.revision is not None else []
        words += ["--random-weights"] if self.source.kind == "random" else []
        for lora in self.source.loras:
            words += ["--lora", f"{lora.path}:{lora.scale:g}"]
        for resolution in dict.fromkeys(profile.resolution for profile in self.profiles):
            words += ["--resolution", resolution]
        for prompts in dict.fromkeys(profile.prompts for profile in self.profiles):
            words += ["--batch", str(prompts)]
        words += ["--text-length", str(self.geometry.text_length), "--keep-ratio", str(self.settings.keep_ratio)]
        words += [] if self.guidance else ["--no-guidance"]
        if self.quantization and (self.quantization.is_calibrated or not targets):
            words += self.quantization.options
            words += ["--calibrate", self.calibration] if self.calibration is not None else []
            for pattern in self.unquantized:
                words += ["--unquantized", pattern]
        for flavour in targets:
            words += ["--target", flavour]
        words += self._plan_options(targets)
        words += ["--components", ",".join(parts)] if (parts := self.component_parts()) else []
        words += ["--controlnet"] if any(is_residual(tensor.name) for tensor in self.graph(Part.STEP).inputs) else []
        return shlex.join([*words, "--out", str(out), "--force"])


def read_manifest(directory: Path, public_key: PublicKey | None = None) -> Manifest:
    """The manifest of a bundle's directory.

    Args:
        directory: the bundle's.
        public_key: what it must be signed with; checked before anything of it is read.

    Raises:
        BundleError: there is none, it is not signed, not JSON, of another format version, or breaks the schema.
        OSError: it cannot be read.
    """
    path = directory / MANIFEST_NAME
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        problem = f"{path} is missing: not a bundle, or an export that was interrupted"
        raise BundleError(problem, _remedy(directory, None)) from None
    if public_key is not None:
        public_key.check(directory, content, read_signature(directory))
    return parse_manifest(content, str(path), directory)


def parse_manifest(content: bytes, name: str, directory: Path) -> Manifest:
    """The manifest that some bytes are.

    Args:
        content: of the file.
        name: of the file, for errors.
        directory: of a bundle, likewise.

    Raises:
        BundleError: as `read_manifest`.
    """
    fields = None
    try:
        fields = parse_json(text := decoded(content))
        # Before the schema, which is this version's and would only complain about fields.
        if (version := fields.get("format_version") if isinstance(fields, dict) else None) not in _READ:
            raise BundleError(f"has format version {version!r}, this cat-pruning reads version {FORMAT_VERSION}")
        manifest = Manifest.model_validate_json(text)
        if not manifest.files:
            raise BundleError("was edited or is damaged: files: it lists none")
        return manifest
    except BundleError as error:
        problem = error.problem
    except pydantic.ValidationError as error:
        faults = (
            (".".join(map(str, fault["loc"])) or "manifest") + f": {fault['msg']}"
            for fault in error.errors(include_url=False)
        )
        problem = f"was edited or is damaged: {'; '.join(itertools.islice(faults, 3))}"
    except ValueError as error:  # also a UnicodeDecodeError, and JSON that is nested too deeply
        problem = f"is not JSON ({error}): damaged or edited"
    raise BundleError(f"{name} {problem}", _remedy(directory, fields))


def _remedy(out: Path, fields: object) -> str:
    """What can be said of the command when the manifest cannot be trusted to follow the schema."""
    held: dict[str, Any] = fields if isinstance(fields, dict) else {}
    source = held.get("source")
    location = source.get("location") if isinstance(source, dict) else None
    command = ["cat-export", "--model", str(location or "MODEL"), "--out"]
    if isinstance(held.get("files"), dict):
        return f"run cat-export again: {shlex.join([*command, str(out), '--force'])}"
    # Nothing says which files are a bundle's, so --force would be refused.
    return f"give the directory of a bundle, or make one: {shlex.join([*command, 'DIR'])}"
