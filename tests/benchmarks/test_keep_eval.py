from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import keep_eval
import machine
import pytest

from cat_pruning.evaluation.candidates import FEWER_STEPS, FULL, Candidate
from cat_pruning.evaluation.results import ImageResult, ResultStore, RunSpec

SCORES = {  # of two prompts
    "full-28": ({"coverage": 0.9}, {"coverage": 0.8}),
    "fewer-steps-28-0.3": ({"coverage": 0.7, "psnr_db": 20.0}, {"coverage": 0.8, "psnr_db": 30.0}),
    "int8-full-28": ({"coverage": 0.8, "psnr_db": 40.0}, {"coverage": 0.8, "psnr_db": 42.0}),
    "cat-28-0.3": ({"coverage": 0.8, "psnr_db": 31.0}, {"coverage": 0.9, "psnr_db": None}),
}


def candidate(method: str, keep_ratio: float, sampled: int) -> Candidate:
    return Candidate(
        method=method, steps=28, keep_ratio=keep_ratio, sampled_steps=sampled, full_steps=8, macs_linear=1, macs_all=2
    )


def test_the_numbers_of_an_evaluation_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RunSpec(
        bundle="sd3-mini",
        bundle_sha256="0" * 64,
        engine="onnxruntime",
        prompts=("a", "b"),
        prompts_source="two.txt",
        seeds=1,
        batch=2,
        sheet=0,
        height=128,
        width=128,
        guidance_scale=3.0,
        metrics=("psnr_db", "coverage"),
        settings={},
        candidates=(
            candidate(FULL, 1.0, 28),
            dataclasses.replace(candidate(FULL, 1.0, 28), quantization="int8"),
            candidate(FEWER_STEPS, 0.3, 16),
            candidate("cat", 0.3, 28),
        ),
        machine={},
    )
    store = ResultStore(tmp_path / "eval", spec)
    for key, scores in SCORES.items():
        store.append(
            ImageResult(
                candidate=key,
                prompt=number,
                seed=0,
                seconds=1.5 + number,
                scores=score,
                cpu_seconds={"full-28": 1.0 + number, "int8-full-28": 0.25 + number}.get(key),
            )
            for number, score in enumerate(scores)
        )
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr("sys.argv", ["keep_eval.py", str(tmp_path / "eval")])
    keep_eval.main()
    kept = json.loads((tmp_path / "kept" / "eval.json").read_text())
    assert kept["machine"]["torch"]
    assert kept["candidates"]["fewer-steps-28-0.3"]["name"] == "16 full steps"
    cat = kept["candidates"]["cat-28-0.3"]
    assert (cat["images"], cat["seconds"], cat["macs"]) == (2, 2.0, 2)
    assert cat["scores"]["coverage"]["mean"] == 0.85
    assert cat["scores"]["psnr_db"] == {"mean": 31.0, "half_width": None, "prompts": 1}
    assert cat["less_full"]["coverage"]["mean"] == 0.0
    assert cat["less_fewer_steps"]["coverage"]["mean"] == 0.1
    int8 = kept["candidates"]["int8-full-28"]
    assert (int8["name"], int8["cpu_seconds"], int8["less_fewer_steps"]) == ("int8 full", 0.75, {})
    assert int8["cpu_speedup"] == 2.8  # 1 / 0.25 and 2 / 1.25
    assert "cpu_seconds" not in cat
    assert int8["less_full"]["coverage"]["mean"] == -0.05
    assert int8["less_full_percent"]["coverage"]["mean"] == pytest.approx(-5.88235)
    assert kept["candidates"]["full-28"]["less_full"] == kept["candidates"]["full-28"]["less_fewer_steps"] == {}
