"""A sweep over methods, schedules and keep ratios: an evaluation's candidates, and the MACs of an image of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.profiles import profile_spec
from cat_pruning.bundle.schedules import read_schedules
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.about import QuantizedBundle
from cat_pruning.evaluation.at_edm import at_edm_family, at_edm_step_macs
from cat_pruning.evaluation.budgets import macs_of_full_steps, nearest
from cat_pruning.evaluation.candidates import FEWER_STEPS, FULL, Candidate, is_tuned, tuned_full_steps
from cat_pruning.evaluation.methods import AT_EDM, FORECAST, REFRESHED, check_method, settings_of
from cat_pruning.evaluation.solvers import SOLVERS
from cat_pruning.exporter.export import profile_macs
from cat_pruning.exporter.macs import ImageMacs
from cat_pruning.families import family_named
from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import CacheRows
from cat_pruning.timeline import step_kinds
from cat_pruning.tools.generate import never_pruned


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """MACs of one image's parts at one keep ratio, in both conventions of `cat_pruning.exporter.macs`."""

    linear: ImageMacs
    all: ImageMacs


def costs(bundle: Bundle, height: int, width: int, settings: PruneSettings, guided: bool, method: str) -> Costs:
    """The MACs of one image, counted from the bundle's graphs; AT-EDM's pruned step has no graph and is derived.

    Raises:
        ShapeError: a size that the model cannot take.
        EngineError: AT-EDM cannot run the family.
    """
    manifest = bundle.manifest
    family = family_named(manifest.family, manifest.transformer_config)
    guidance = guided and family.batched_guidance
    profile = profile_spec(height, width, 1, geometry=manifest.geometry, settings=settings, guidance=guidance)
    spec = profile_macs(bundle.path, manifest.graphs, profile, manifest.geometry.patch_size)
    linear, total = spec.pruned_linear, spec.pruned_total
    if method == AT_EDM:
        caches = family.caches()
        linear, total = at_edm_step_macs(
            linear_full=spec.full_linear,
            linear_pruned=spec.pruned_linear,
            attention_full=spec.full_attention,
            num_layers=at_edm_family(family).num_layers,
            num_tokens=profile.num_tokens,
            num_kept=profile.num_kept,
            text_length=manifest.geometry.text_length,
            joint=caches[0].rows is CacheRows.JOINT,
        )
    return Costs(
        linear=ImageMacs(spec.full_linear, linear, spec.prompt_linear, spec.timestep_linear),
        all=ImageMacs(spec.full_total, total, spec.prompt_linear, spec.timestep_linear),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The methods, schedules and keep ratios to compare.

    Attributes:
        bundle, height, width: of the images. guided: with classifier-free guidance.
        settings: of the pruning; each method changes some.
        steps, keep_ratios, methods: every combination is a candidate. The first of each is the main one.
        prompts: how many the main comparison has: the full run, fewer steps, the main method and the forecast, at the
            main schedule and ratio.
        curve_prompts: how many every other candidate has.
        engine: that computes, but for AT-EDM, which has its own.
        quantized: bundles that do what this one does, but for fewer steps and AT-EDM, on as many prompts.

    Raises:
        SettingsError: a method is not known, or the bundle has no schedule for one.
    """

    bundle: Bundle
    height: int
    width: int
    guided: bool
    settings: PruneSettings
    steps: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    methods: tuple[str, ...]
    prompts: int
    curve_prompts: int
    engine: str
    quantized: Sequence[QuantizedBundle] = ()
    _counted: dict[tuple[float, bool], Costs] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for method in self.methods:
            check_method(method)

    def candidates(self) -> tuple[Candidate, ...]:
        """The full runs, then for each schedule and ratio the fewer steps and every method; then what is quantized."""
        full = [self._full(steps) for steps in self.steps]
        others = [
            candidate
            for steps in self.steps
            for ratio in self.keep_ratios
            for candidate in (
                self._fewer(steps, ratio),
                *(self._of(method, steps, ratio) for method in self.methods),
            )
        ]
        ours = (*full, *others)
        return (*ours, *(each for bundle in self.quantized for each in _quantized(ours, bundle)))

    def _costs(self, keep_ratio: float, method: str = "") -> Costs:
        key = keep_ratio, method == AT_EDM
        if key not in self._counted:
            settings = self.settings.replace(keep_ratio=keep_ratio)
            self._counted[key] = costs(self.bundle, self.height, self.width, settings, self.guided, method)
        return self._counted[key]

    def _full(self, steps: int) -> Candidate:
        return self._every_token(FULL, steps, 1.0, steps, self._prompts(steps))

    def _fewer(self, steps: int, ratio: float) -> Candidate:
        prompts = self._prompts(steps, ratio)
        return self._every_token(FEWER_STEPS, steps, ratio, self._full_steps_for(steps, ratio), prompts)

    def _of(self, method: str, steps: int, ratio: float) -> Candidate:
        if method not in SOLVERS:
            return self._pruned(method, steps, ratio)
        prompts = self._prompts(steps, ratio, method)
        return self._every_token(method, steps, ratio, self._full_steps_for(steps, ratio), prompts)

    def _full_steps_for(self, steps: int, ratio: float) -> int:
        """The number of full steps whose cost is nearest to that of the paper's policy, through the same graphs."""
        cost = self._costs(1.0).all
        return max(1, round((self._budget(steps, ratio) - cost.prompt) / (cost.full + cost.timestep)))

    def _every_token(self, method: str, steps: int, ratio: float, sampled_steps: int, prompts: int) -> Candidate:
        """A candidate of the schedule `steps` that computes every token on each of `sampled_steps` steps."""
        cost = self._costs(1.0)
        return Candidate(
            method=method,
            steps=steps,
            keep_ratio=ratio,
            sampled_steps=sampled_steps,
            full_steps=sampled_steps,
            macs_linear=macs_of_full_steps(cost.linear, sampled_steps),
            macs_all=macs_of_full_steps(cost.all, sampled_steps),
            settings=never_pruned(self.settings, sampled_steps).to_dict(),
            engine=self.engine,
            prompts=prompts,
        )

    def _budget(self, steps: int, ratio: float) -> int:
        """MACs of an image by the paper's policy."""
        return self._costs(ratio).all.pruned_image(steps, settings_of("cat", ratio, steps, self.settings))

    def _pruned(self, method: str, steps: int, ratio: float) -> Candidate:
        settings = (
            self._tuned(method, steps, ratio) if is_tuned(method) else settings_of(method, ratio, steps, self.settings)
        )
        cost = self._costs(settings.keep_ratio if settings.prunes else 0.0, method)
        if method == FORECAST or method.endswith(REFRESHED):
            most = max(steps, settings.full_steps) if method == FORECAST else settings.full_steps
            settings = nearest(self._budget(steps, ratio), settings, steps, cost.all, most)
        return Candidate(
            method=method,
            steps=steps,
            keep_ratio=ratio,
            sampled_steps=steps,
            full_steps=sum(kind is StepKind.FULL for kind in step_kinds(steps, settings)),
            macs_linear=cost.linear.pruned_image(steps, settings),
            macs_all=cost.all.pruned_image(steps, settings),
            settings=settings.to_dict(),
            engine="torch" if method == AT_EDM else self.engine,
            prompts=self._prompts(steps, ratio, method),
        )

    def _tuned(self, method: str, steps: int, ratio: float) -> PruneSettings:
        """The bundle's schedule that the method names, or that costs most nearly what the paper's policy does."""
        budget, macs, full = self._budget(steps, ratio), self._costs(1.0).all, tuned_full_steps(method)
        schedules = [
            each
            for each in read_schedules(self.bundle).values()
            if each.num_steps == steps and full in (None, len(each.full_steps))
        ]
        if not schedules:
            asked = f"{steps} steps" + (f", {full} of them full" if full is not None else "")
            raise SettingsError(
                f"method {method}: the bundle has no schedule of {asked}",
                f"make some: cat-tune {self.bundle.path} --steps {steps}"
                + (f" --full {full}" if full is not None else ""),
            )
        possible = [PruneSettings.tuned(schedule) for schedule in schedules]
        return min(possible, key=lambda each: abs(macs.pruned_image(steps, each) - budget))

    def _prompts(self, steps: int, ratio: float = 0.0, method: str = "") -> int:
        """How many prompts a candidate has; a full run, which has no ratio, is in the main comparison by its steps."""
        is_main = (
            steps == self.steps[0] and ratio in (0.0, self.keep_ratios[0]) and method in ("", self.methods[0], FORECAST)
        )
        return self.prompts if is_main else min(self.prompts, self.curve_prompts)


def _quantized(candidates: Sequence[Candidate], bundle: QuantizedBundle) -> list[Candidate]:
    """What a quantized bundle computes of what the evaluation's own does; MACs and settings are the same."""
    return [
        replace(each, quantization=bundle.name, quantized_sha256=bundle.digest, engine=bundle.engine)
        for each in candidates
        if each.method not in (FEWER_STEPS, AT_EDM)
    ]
