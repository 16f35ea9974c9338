"""The metric against the converged run, in `cat-eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.evaluation import cli
from cat_pruning.evaluation.place import RESULTS
from cat_pruning.evaluation.worker import Generator


@pytest.mark.long
def test_the_truth_is_made_once_for_a_batch_and_only_if_it_is_needed(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full run has a distance from it too; a run that goes on finds the same."""
    monkeypatch.setattr("cat_pruning.evaluation.truth.TRUTH_STEPS", 12)
    made: list[tuple[str, int]] = []
    generate = Generator.__call__

    def recorded(generator: Generator, candidate: Any, config: Any) -> Any:
        made.append((candidate.method, candidate.sampled_steps))
        return generate(generator, candidate, config)

    monkeypatch.setattr(Generator, "__call__", recorded)
    out = tmp_path / "out"
    options = ["--prompts", "scenes:1", "--steps", "5", "--full-steps", "3", "--guidance-scale", "3"]
    options += ["--methods", "ab2", "--metrics", "truth,latents"]

    def run() -> dict[str, dict[str, float]]:
        made.clear()
        assert cli.main([str(mini_bundle), "--out", str(out), *options]) == 0
        lines = (out / RESULTS).read_text().splitlines()
        return {result["candidate"].split("-")[0]: result["scores"] for result in map(json.loads, lines)}

    scores = run()
    assert made == [("full", 5), ("ab2", 12), ("fewer-steps", 4), ("ab2", 4)]
    assert {name: set(of) for name, of in scores.items()} == {
        "full": {"truth_error"},
        "fewer": {"truth_error", "latents_error"},
        "ab2": {"truth_error", "latents_error"},
    }
    assert scores["ab2"]["truth_error"] < scores["full"]["truth_error"] < scores["fewer"]["truth_error"]

    kept = (out / RESULTS).read_text().splitlines(keepends=True)[:2]
    (out / RESULTS).write_text("".join(kept))
    again = run()
    assert made == [("full", 5), ("ab2", 4), ("ab2", 12)]
    assert again["ab2"] == pytest.approx(scores["ab2"], rel=1e-3)
