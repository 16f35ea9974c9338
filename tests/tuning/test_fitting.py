"""A tuning whose jobs are done elsewhere finds the same as one that is done here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pool_workers import Elsewhere

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.evaluation.pool import LocalPool
from cat_pruning.models.prompts import Prompt
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import never_pruned
from cat_pruning.tuning.fitting import fit
from cat_pruning.tuning.measure import FULL, Contender, Outcome, measure
from cat_pruning.tuning.recorder import RecordedRun, record
from cat_pruning.tuning.worker import Tuner

RUN = RecordedRun(
    bundle="0" * 64,
    engine="onnxruntime",
    scheduler={},
    steps=4,
    prompts=("a red circle", "a blue star"),
    batch=1,
    seed=7,
    height=32,
    width=48,
    guidance_scale=3.0,
)


def contender(method: str, steps: int, settings: PruneSettings, solver: str | None = None) -> Contender:
    return Contender(method=method, budget=steps, steps=steps, settings=settings, macs=1, solver=solver)


CONTENDERS = (
    contender(FULL, 4, never_pruned(PruneSettings(), 4)),
    contender("ab2", 2, never_pruned(PruneSettings(), 2), "ab2"),
)


@pytest.fixture
def tuner(engines: dict[str, StepEngine], drop_in: Any) -> Tuner:
    about: Any = None
    return Tuner(about=about, pipe=drop_in(engines["onnxruntime"]), text_arguments={"max_sequence_length": 24})


def test_recordings_fits_and_measures_are_the_same(tuner: Tuner, tmp_path: Path) -> None:
    found = []
    for name, pool in (("here", LocalPool(tuner)), ("elsewhere", Elsewhere(tuner))):
        counted = {"record": 0, "fit": 0, "measure": 0}

        def advance(stage: str, count: int, counted: dict[str, int] = counted) -> None:
            counted[stage] += count

        recorded = record(pool, RUN, tmp_path / name, lambda n: advance("record", n))
        fits = fit(pool, recorded, RUN.configs(), (3, 2), RUN.batch, lambda n: advance("fit", n))
        prompts = [Prompt(text=text, scene=None) for text in RUN.prompts]
        outcomes = measure(pool, CONTENDERS, prompts, RUN.configs(), lambda n: advance("measure", n))
        found.append((recorded, fits, outcomes, counted))
    (here, fits, outcomes, counted), (there, other_fits, other_outcomes, other_counted) = found
    for name in ("start", "parts", "final"):
        assert torch.equal(getattr(here.recordings, name), getattr(there.recordings, name))
    assert here.timesteps == there.timesteps
    assert [*fits] == [*other_fits] == [3, 2]
    for budget, one in fits.items():
        assert (one.full_steps, one.weights) == (other_fits[budget].full_steps, other_fits[budget].weights)
    assert [timeless(each) for each in outcomes] == [timeless(each) for each in other_outcomes]
    assert [each.contender.method for each in outcomes] == ["full", "ab2"]
    assert outcomes[0].error.mean == 0.0
    assert counted == other_counted
    assert (counted["record"], counted["measure"]) == (2, 4)


def timeless(outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, seconds=0.0)
