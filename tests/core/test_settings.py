from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest

from cat_pruning.errors import CatError, SettingsError, ShapeError
from cat_pruning.schedule import Schedule, StepKind
from cat_pruning.settings import PRESETS, Policy, Pooling, Preset, PruneSettings, Reuse
from cat_pruning.timeline import step_kinds


def test_the_defaults_are_the_papers() -> None:
    settings = PruneSettings()
    assert (settings.keep_ratio, settings.full_steps, settings.num_clusters) == (0.3, 8, 20)
    assert (settings.noise_scale, settings.fresh_fraction, settings.staleness_decay) == (0.05, 0.25, 0.5)
    assert (settings.refresh_every, settings.reuse, settings.schedule) == (0, Reuse.REPEAT, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("keep_ratio", value) for value in (-0.1, 1.0000001, math.nan, math.inf, True, "0.3")),
        *(("full_steps", value) for value in (1, 0, -1, 2.0, True)),
        *(("refresh_every", value) for value in (-1, 5.0, True, None)),
        *(("num_clusters", value) for value in (0, 1.5, True)),
        *(("noise_scale", value) for value in (-1e-9, math.nan, math.inf)),
        *(("fresh_fraction", value) for value in (-0.1, 1.1, math.nan)),
        *(("staleness_decay", value) for value in (-0.1, 1.0, math.nan)),
        ("pooling", "median"),
        ("policy", "best"),
        ("reuse", "forget"),
        *(("first_quota", value) for value in (0.0, 1.1, math.nan)),
        *(("fresh_quotas", value) for value in ((), (0.1, 0.0), (1.1,), (math.nan,))),
        *(("kmeans_iterations", value) for value in (0, 2.5, False)),
        ("reuse", "extrapolate"),  # without refresh_every
        *(("schedule", value) for value in ("28-9", (0, 1), 3)),
    ],
)
def test_a_value_outside_its_domain_is_named(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{name}=.*: expected") as caught:
        PruneSettings(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CatError)


@pytest.mark.parametrize(
    ("keep_ratio", "num_tokens", "num_kept"),
    [
        *((0.3, 4096, 1228), (0.29, 100, 29), (1.0, 4096, 4096), (0.3, 20, 6), (0.999, 64, 63), (0.7, 10, 7)),
        *((1e-9, 64, 1), (0.0, 64, 0)),
    ],
)
def test_tokens_of_a_pruned_step(keep_ratio: float, num_tokens: int, num_kept: int) -> None:
    assert PruneSettings(keep_ratio=keep_ratio, num_clusters=1).num_kept(num_tokens) == num_kept


def test_every_whole_percentage_of_a_hundred_tokens_is_exact() -> None:
    for percent in range(1, 101):
        assert PruneSettings(keep_ratio=percent / 100).num_kept(100) == percent


def test_fewer_tokens_than_clusters() -> None:
    assert PruneSettings().num_kept(20) == 6
    with pytest.raises(ShapeError, match=r"19 tokens, fewer than num_clusters=20.*num_clusters <= 19"):
        PruneSettings().num_kept(19)


def test_round_trip_through_json() -> None:
    settings = PruneSettings(
        keep_ratio=0.5, pooling=Pooling.MEAN, fresh_quotas=(0.2, 0.1), schedule=Schedule.of(9, (0, 4)), full_steps=4
    )
    again = PruneSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert hash(again) == hash(settings)
    assert isinstance(again.pooling, Pooling)
    assert PruneSettings.from_dict({}) == PruneSettings()


def test_unknown_fields_are_named() -> None:
    with pytest.raises(SettingsError, match=r"unknown settings alpha, ratio; known are .*keep_ratio"):
        PruneSettings.from_dict({"ratio": 0.3, "alpha": 1, "keep_ratio": 0.3})


@pytest.mark.parametrize("fields", [{"keep_ratio": "0.3"}, {"fresh_quotas": 0.1}, {"schedule": 9}])
def test_fields_of_the_wrong_type(fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        PruneSettings.from_dict(fields)


def test_replace_validates_and_leaves_the_original() -> None:
    settings = PruneSettings()
    assert settings.replace(keep_ratio=0.5).keep_ratio == 0.5
    assert settings.keep_ratio == 0.3
    with pytest.raises(SettingsError, match="keep_ratio"):
        settings.replace(keep_ratio=2.0)
    with pytest.raises(SettingsError, match="reuse='extrapolate': expected repeat where refresh_every is 0"):
        PruneSettings.preset("forecast").replace(refresh_every=0)


def test_the_presets() -> None:
    assert PruneSettings.preset("paper") == PruneSettings()
    assert PruneSettings.preset("refreshed") == PruneSettings(
        keep_ratio=0.1, full_steps=4, refresh_every=3, reuse=Reuse.EXTRAPOLATE
    )
    forecast = PruneSettings.preset(Preset.FORECAST)
    assert forecast == PruneSettings(keep_ratio=0.0, full_steps=4, refresh_every=2, reuse=Reuse.EXTRAPOLATE)
    assert forecast.num_kept(4096) == 0
    full_steps = {name: step_kinds(28, PruneSettings.preset(name)).count(StepKind.FULL) for name in Preset}
    assert full_steps == {"paper": 8, "refreshed": 12, "forecast": 16}  # as the docstring has them
    assert set(PRESETS) == set(Preset)


def test_a_preset_with_changes() -> None:
    settings = PruneSettings.preset("forecast", full_steps=6, policy="stale")
    assert settings == PruneSettings.preset("forecast").replace(full_steps=6, policy=Policy.STALE)
    with pytest.raises(SettingsError, match=r"full_steps=1: expected an integer >= 2"):
        PruneSettings.preset("refreshed", full_steps=1)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"preset 'fast' is not known; known are paper, refreshed, forecast"):
        PruneSettings.preset("fast")


def test_an_unknown_setting_is_named_by_the_constructor_too() -> None:
    with pytest.raises(SettingsError, match=r"unknown settings ratio; known are .*keep_ratio"):
        PruneSettings(ratio=0.3)  # type: ignore[call-arg]


def test_settings_survive_a_pickle() -> None:
    settings = PruneSettings(keep_ratio=0.5, policy=Policy.RAS)
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_the_refusal_is_one_line_about_the_value() -> None:
    """Pydantic's own several lines, with an address to read about them, are not shown."""
    with pytest.raises(SettingsError) as caught:
        PruneSettings(fresh_quotas=(0.1, 2.0))
    assert str(caught.value) == "fresh_quotas=(0.1, 2.0): expected one or more numbers in (0, 1]"
    assert caught.value.__cause__ is None
