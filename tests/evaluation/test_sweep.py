from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schedules import write_schedules
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.about import QuantizedBundle
from cat_pruning.evaluation.candidates import Candidate
from cat_pruning.evaluation.methods import METHODS, settings_of
from cat_pruning.evaluation.solvers import SOLVERS
from cat_pruning.evaluation.sweep import Sweep
from cat_pruning.schedule import Schedule, StepKind
from cat_pruning.settings import Policy, PruneSettings
from cat_pruning.timeline import step_kinds


@pytest.fixture(scope="module")
def sweep(mini_bundle: Path) -> Any:
    def make(**changes: Any) -> dict[str, Candidate]:
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
        candidates = Sweep(**fields | changes).candidates()
        by_key = {candidate.key: candidate for candidate in candidates}
        assert len(by_key) == len(candidates)
        return by_key

    return make


def test_every_method_at_every_ratio_and_schedule(sweep: Any) -> None:
    candidates = sweep()
    expected = {f"{m}-{s}-{r:g}" for m in ("fewer-steps", *METHODS) for s in (28, 50) for r in (0.3, 0.5)}
    assert set(candidates) == expected | {"full-28", "full-50"}
    assert list(candidates)[:2] == ["full-28", "full-50"]


def test_the_main_comparison_has_all_prompts(sweep: Any) -> None:
    candidates = sweep()
    main = {key for key, candidate in candidates.items() if candidate.prompts == 100}
    assert main == {"full-28", "fewer-steps-28-0.3", "cat-28-0.3", "forecast-28-0.3"}
    assert {candidate.prompts for key, candidate in candidates.items() if key not in main} == {10}


def test_fewer_steps_cost_what_cat_does(sweep: Any) -> None:
    """To half a full step, at every ratio."""
    candidates = sweep(keep_ratios=(0.2, 0.3, 0.5, 1.0))
    for steps in (28, 50):
        one = candidates[f"full-{steps}"].macs_all / steps
        for ratio in ("0.2", "0.3", "0.5", "1"):
            fewer, cat = candidates[f"fewer-steps-{steps}-{ratio}"], candidates[f"cat-{steps}-{ratio}"]
            assert abs(fewer.macs_all - cat.macs_all) <= 0.51 * one
    assert candidates["fewer-steps-28-1"].sampled_steps == 28


def test_policies_cost_the_same_but_those_that_say_so(sweep: Any) -> None:
    candidates = sweep()
    cat = candidates["cat-28-0.3"]
    for method in Policy:
        candidate = candidates[f"{method}-28-0.3"]
        if method is Policy.RAS:  # two dense steps more
            assert candidate.full_steps == 10
            assert candidate.macs_all > cat.macs_all
        else:
            assert (candidate.full_steps, candidate.macs_all) == (8, cat.macs_all)
    assert candidates["at-edm-28-0.3"].macs_linear > cat.macs_linear  # the first block on all tokens
    assert candidates["at-edm-28-0.3"].engine == "torch"


def test_refreshes_as_often_as_most_nearly_the_same_macs_allow(sweep: Any) -> None:
    candidates = sweep(keep_ratios=(0.2, 0.3, 0.5))
    for steps in (28, 50):
        for ratio in (0.2, 0.3, 0.5):
            refreshed, cat = candidates[f"cat+refresh-{steps}-{ratio}"], candidates[f"cat-{steps}-{ratio}"]
            assert refreshed.macs_all == pytest.approx(cat.macs_all, rel=0.07)
            assert refreshed.settings["keep_ratio"] == pytest.approx(ratio / 3)
    defaults = PruneSettings.from_dict(candidates["cat+refresh-28-0.3"].settings)
    assert defaults == PruneSettings.preset("refreshed", keep_ratio=0.3 / 3)  # so its interval is the one that fits
    assert candidates["cat+refresh-28-0.3"].name == "cat+refresh (keep 0.1, 12 full, every 3)"


def test_the_forecast_has_as_many_full_steps_as_fewer_steps_have(sweep: Any) -> None:
    candidates = sweep(keep_ratios=(0.2, 0.3, 0.5))
    for steps in (28, 50):
        for ratio in (0.2, 0.3, 0.5):
            forecast, fewer = candidates[f"forecast-{steps}-{ratio}"], candidates[f"fewer-steps-{steps}-{ratio}"]
            assert forecast.full_steps == fewer.full_steps
            assert forecast.macs_all == pytest.approx(fewer.macs_all, rel=0.005)
    defaults = PruneSettings.from_dict(candidates["forecast-28-0.3"].settings)
    assert defaults == PruneSettings.preset("forecast")
    assert candidates["forecast-28-0.3"].name == "forecast (keep 0, 16 full, every 2)"


def test_solvers_have_as_many_steps_as_fewer_steps_have(sweep: Any) -> None:
    candidates = sweep(methods=("cat", *SOLVERS))
    for solver in SOLVERS:
        for steps, ratio in ((28, "0.3"), (50, "0.5")):
            fewer, solved = candidates[f"fewer-steps-{steps}-{ratio}"], candidates[f"{solver}-{steps}-{ratio}"]
            own = {"method": "fewer-steps", "prompts": fewer.prompts}
            assert dataclasses.replace(solved, **own) == fewer
    assert candidates["ab2-28-0.3"].name == "16 full steps, ab2"
    assert [candidates[f"{m}-28-0.3"].prompts for m in ("cat", "ab2")] == [100, 10]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_schedules_shorter_than_the_full_steps(sweep: Any, steps: int) -> None:
    for candidate in sweep(steps=(steps,)).values():
        assert candidate.full_steps == steps or candidate.method in ("fewer-steps", "cat+refresh", "forecast")


def test_candidates_say_what_they_are_made_with(sweep: Any) -> None:
    candidates = sweep()
    assert PruneSettings.from_dict(candidates["noise-28-0.3"].settings) == PruneSettings(policy=Policy.NOISE)
    for key in ("full-28", "fewer-steps-50-0.3"):
        steps = candidates[key].sampled_steps
        assert StepKind.PRUNED not in step_kinds(steps, PruneSettings.from_dict(candidates[key].settings))


def test_tuned_is_the_bundle_s_schedule_that_costs_most_nearly_the_same(
    sweep: Any, mini_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(mini_bundle, tmp_path / "mini", copy_function=os.link)
    bundle = write_schedules(tmp_path / "mini", [Schedule.of(28, range(full)) for full in (20, 16, 10)])
    found = sweep(bundle=bundle, steps=(28,), keep_ratios=(0.3, 0.01), methods=("tuned",))
    assert (found["tuned-28-0.3"].full_steps, found["tuned-28-0.01"].full_steps) == (16, 10)
    assert PruneSettings.from_dict(found["tuned-28-0.3"].settings).schedule == Schedule.of(28, range(16))
    with pytest.raises(SettingsError, match=r"no schedule of 50 steps; make some: cat-tune .* 50"):
        sweep(bundle=bundle, steps=(50,), methods=("tuned",))
    named = sweep(bundle=bundle, steps=(28,), keep_ratios=(0.3,), methods=("tuned-10", "tuned"))
    assert PruneSettings.from_dict(named["tuned-10-28-0.3"].settings).schedule == Schedule.of(28, range(10))
    assert (named["tuned-10-28-0.3"].name, named["tuned-28-0.3"].name) == ("tuned (10 full)", "tuned (16 full)")
    with pytest.raises(SettingsError, match=r"no schedule of 28 steps, 9 of them full; .*cat-tune .* 28 --full 9"):
        sweep(bundle=bundle, steps=(28,), methods=("tuned-9",))


def test_quantized_bundles_do_the_same_but_for_fewer_steps_and_at_edm(sweep: Any) -> None:
    int8 = QuantizedBundle(name="int8", digest="1" * 64, engine="torch")
    other = QuantizedBundle(name="of-tomorrow", digest="2" * 64, engine="onnxruntime")
    ours = sweep(steps=(28,), methods=("cat", "forecast", "ab2", "at-edm"))
    every = sweep(steps=(28,), methods=("cat", "forecast", "ab2", "at-edm"), quantized=(int8, other))
    assert list(every)[: len(ours)] == list(ours)
    methods = [f"{method}-28-{ratio}" for ratio in ("0.3", "0.5") for method in ("cat", "forecast", "ab2")]
    added = [f"{name}-{key}" for name in ("int8", "of-tomorrow") for key in ("full-28", *methods)]
    assert list(every)[len(ours) :] == added
    changes = {"quantization": "int8", "quantized_sha256": "1" * 64, "engine": "torch"}
    for key in ("full-28", *methods):
        assert every[f"int8-{key}"] == dataclasses.replace(ours[key], **changes)
    assert [every[f"int8-{key}"].is_reference for key in ("full-28", "cat-28-0.3")] == [False, False]
    assert [every[f"int8-{key}"].name for key in ("full-28", "ab2-28-0.3")] == ["int8 full", "int8 16 full steps, ab2"]
    assert [every[f"int8-{key}"].title for key in ("full-28", "cat-28-0.3")] == [
        "int8 full, 28 steps",
        "int8 cat, keep 0.3",
    ]


def test_settings_of_a_method() -> None:
    base = PruneSettings(num_clusters=9)
    assert settings_of("cat", 0.4, 28, base) == base.replace(keep_ratio=0.4)
    assert settings_of("ras", 0.3, 28, base).schedule.full_steps == (*range(8), 12, 20)


@pytest.mark.parametrize(
    "method",
    [
        "best",
        "tuned-",
        "tuned-nine",
        "tuned-9+refresh",
        "at-edm+refresh",
        "forecast+refresh",
        "",
        "cat+",
        "cat+refresh+refresh",
    ],
)
def test_an_unknown_method_is_named(sweep: Any, method: str) -> None:
    with pytest.raises(SettingsError, match="is not known; known are cat, noise"):
        sweep(methods=("cat", method))
