from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schema import MacsSpec, ProfileSpec
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.methods import METHODS, settings_of
from cat_pruning.evaluation.plan import Plan
from cat_pruning.evaluation.variants import Variant
from cat_pruning.exporter.export import profile_macs
from cat_pruning.schedule import StepKind, step_kinds
from cat_pruning.settings import Policy, PruneSettings, Reuse


@pytest.fixture(scope="module", autouse=True)
def _counted_once() -> Iterator[None]:
    """The MACs of the bundle's graphs at a profile, which every plan asks for."""
    counted: dict[str, MacsSpec] = {}

    def count(directory: Path, graphs: Any, profile: ProfileSpec, *patch_size: int) -> MacsSpec:
        key = f"{directory} {profile}"
        if key not in counted:
            counted[key] = profile_macs(directory, graphs, profile, *patch_size)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cat_pruning.evaluation.plan.profile_macs", count)
        yield


@pytest.fixture(scope="module")
def plan(mini_bundle: Path) -> Any:
    def make(**changes: Any) -> dict[str, Variant]:
        fields: dict[str, Any] = {
            "bundle": Bundle.open(mini_bundle),
            "height": 128,
            "width": 128,
            "guided": True,
            "settings": PruneSettings(),
            "steps": (28, 50),
            "keep_ratios": (0.3, 0.5),
            "methods": METHODS,
            "prompts": 100,
            "curve_prompts": 10,
            "engine": "onnxruntime",
        }
        variants = Plan(**fields | changes).variants()
        by_key = {variant.key: variant for variant in variants}
        assert len(by_key) == len(variants)
        return by_key

    return make


def test_every_method_at_every_ratio_and_schedule(plan: Any) -> None:
    variants = plan()
    expected = {f"{m}-{s}-{r:g}" for m in ("fewer-steps", *METHODS) for s in (28, 50) for r in (0.3, 0.5)}
    assert set(variants) == expected | {"full-28", "full-50"}
    assert list(variants)[:2] == ["full-28", "full-50"]


def test_the_main_comparison_has_all_prompts(plan: Any) -> None:
    variants = plan()
    main = {key for key, variant in variants.items() if variant.prompts == 100}
    assert main == {"full-28", "fewer-steps-28-0.3", "cat-28-0.3", "forecast-28-0.3"}
    assert {variant.prompts for key, variant in variants.items() if key not in main} == {10}


def test_fewer_steps_cost_what_cat_does(plan: Any) -> None:
    """To half a full step, at every ratio."""
    variants = plan(keep_ratios=(0.2, 0.3, 0.5, 1.0))
    for steps in (28, 50):
        one = variants[f"full-{steps}"].macs_all / steps
        for ratio in ("0.2", "0.3", "0.5", "1"):
            fewer, cat = variants[f"fewer-steps-{steps}-{ratio}"], variants[f"cat-{steps}-{ratio}"]
            assert abs(fewer.macs_all - cat.macs_all) <= 0.51 * one
    assert variants["fewer-steps-28-1"].sampled_steps == 28


def test_policies_cost_the_same_but_those_that_say_so(plan: Any) -> None:
    variants = plan()
    cat = variants["cat-28-0.3"]
    for method in Policy:
        variant = variants[f"{method}-28-0.3"]
        if method is Policy.RAS:  # two dense steps more
            assert variant.full_steps == 10
            assert variant.macs_all > cat.macs_all
        else:
            assert (variant.full_steps, variant.macs_all) == (8, cat.macs_all)
    assert variants["at-edm-28-0.3"].macs_linear > cat.macs_linear  # the first block on all tokens
    assert variants["at-edm-28-0.3"].engine == "torch"


def test_refreshes_as_often_as_most_nearly_the_same_macs_allow(plan: Any) -> None:
    variants = plan(keep_ratios=(0.2, 0.3, 0.5))
    for steps in (28, 50):
        for ratio in (0.2, 0.3, 0.5):
            refreshed, cat = variants[f"cat+refresh-{steps}-{ratio}"], variants[f"cat-{steps}-{ratio}"]
            assert refreshed.macs_all == pytest.approx(cat.macs_all, rel=0.07)
            assert refreshed.settings["keep_ratio"] == pytest.approx(ratio / 3)
    defaults = PruneSettings.from_dict(variants["cat+refresh-28-0.3"].settings)
    assert defaults == PruneSettings.preset("refreshed", keep_ratio=0.3 / 3)  # so its interval is the one that fits
    assert variants["cat+refresh-28-0.3"].name == "cat+refresh (keep 0.1, 12 full, every 3)"


def test_the_forecast_has_as_many_full_steps_as_fewer_steps_have(plan: Any) -> None:
    variants = plan(keep_ratios=(0.2, 0.3, 0.5))
    for steps in (28, 50):
        for ratio in (0.2, 0.3, 0.5):
            forecast, fewer = variants[f"forecast-{steps}-{ratio}"], variants[f"fewer-steps-{steps}-{ratio}"]
            assert forecast.full_steps == fewer.full_steps
            assert forecast.macs_all == pytest.approx(fewer.macs_all, rel=0.005)
    defaults = PruneSettings.from_dict(variants["forecast-28-0.3"].settings)
    assert defaults == PruneSettings.preset("forecast")
    assert variants["forecast-28-0.3"].name == "forecast (keep 0, 16 full, every 2)"


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_schedules_shorter_than_the_full_steps(plan: Any, steps: int) -> None:
    for variant in plan(steps=(steps,)).values():
        assert variant.full_steps == steps or variant.method in ("fewer-steps", "cat+refresh", "forecast")


def test_variants_say_what_they_are_made_with(plan: Any) -> None:
    variants = plan()
    assert PruneSettings.from_dict(variants["noise-28-0.3"].settings) == PruneSettings(policy=Policy.NOISE)
    for key in ("full-28", "fewer-steps-50-0.3"):
        steps = variants[key].sampled_steps
        assert StepKind.PRUNED not in step_kinds(steps, PruneSettings.from_dict(variants[key].settings))


def test_settings_of_a_method() -> None:
    base = PruneSettings(num_clusters=9)
    assert settings_of("cat", 0.4, 28, base) == base.replace(keep_ratio=0.4)
    assert settings_of("ras", 0.3, 28, base).extra_full_steps == (12, 20)
    assert settings_of("stale+extrapolate", 0.3, 28, base) == base.replace(policy=Policy.STALE, reuse=Reuse.EXTRAPOLATE)


@pytest.mark.parametrize(
    "method",
    ["best", "at-edm+extrapolate", "at-edm+refresh", "forecast+refresh", "", "cat+", "cat+extrapolate+refresh"],
)
def test_an_unknown_method_is_named(plan: Any, method: str) -> None:
    with pytest.raises(SettingsError, match="is not known; known are cat, noise"):
        plan(methods=("cat", method))
