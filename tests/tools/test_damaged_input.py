"""Manifests, configs, settings, schedules and results that were damaged at random; `benchmarks/fuzz.py` tries more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hostile_inputs import CONFIGS, RESULTS, RUN, forged_kinds, kinds
from hostile_json import damaged
from hypothesis import HealthCheck, given, settings

EXAMPLES = {"settings": 100, "schedule": 100, "recordings": 30, "manifest": 20, RUN: 10, RESULTS: 10}


@pytest.mark.parametrize("kind", [*EXAMPLES, *CONFIGS])
def test_what_is_damaged_is_refused_in_words(tmp_path: Path, kind: str) -> None:
    with kinds(tmp_path) as found:
        fields, check = found[kind]

        # The same examples on every run; the benchmark's are others.
        @settings(max_examples=EXAMPLES.get(kind, 4), derandomize=True, database=None, deadline=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(damaged(fields))
        def tried(changed: Any) -> None:
            check(changed)

        tried()


# What the benchmark has found, and what was reported: each ended in a traceback or in no end.
CORPUS: list[tuple[str, dict[str, Any]]] = [
    (RUN, {"settings": {"keep_ratio": []}}),  # a list in the place of a number
    (RUN, {"guidance_scale": float("nan")}),
    (RESULTS, {"scores": {"psnr_db": float("inf")}}),
    ("vae/config.json", {"block_out_channels": 3}),
    ("transformer/config.json", {"_class_name": None}),
    ("transformer/config.json", {"num_layers": 10**9}),
    ("transformer/config.json", {"num_layers": -1}),
    ("transformer/config.json", {"patch_size": 0}),
    ("model_index.json", {"_class_name": ["x"]}),
    ("model_index.json", {"scheduler": []}),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}),
    ("tokenizer/tokenizer_config.json", {"model_max_length": float("inf")}),
    ("manifest", {"transformer_config": {"num_layers": 10**9}}),
    ("manifest", {"family": "\0"}),
]


@pytest.mark.parametrize(("kind", "change"), CORPUS, ids=[f"{kind} {[*change]}" for kind, change in CORPUS])
def test_what_was_found(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    with kinds(tmp_path) as found:
        fields, check = found[kind]
        check({**fields, **change})


# Of a bundle whose hashes were mended too: each ended with code 70, or in no end.
FORGERIES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("manifest.json", {"source": {"kind": "random", "location": "sd3-mini", "revision": None, "seed": 0}},
     "no published architecture is called sd3-mini", ["--engine", "torch"]),
    ("manifest.json", {"geometry": {"text_length": 10**9}}, "text_length is 1000000000, its pipeline makes 25 to", []),
    ("pipeline/model_index.json", {"_class_name": "PixArtSigmaPipeline"}, "has a PixArtTransformer2DModel", []),
    ("pipeline/vae/config.json", {"scaling_factor": None}, "scaling_factor is None, expected a number", []),
    ("pipeline/vae/config.json", {"shift_factor": None}, "StableDiffusion3Pipeline failed (TypeError", []),
    ("pipeline/scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps is 10", []),
    ("pipeline/scheduler/scheduler_config.json", {"shift_terminal": {}}, "shift_terminal is {}, expected a", []),
    ("pipeline/scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "", []),
    ("pipeline/tokenizer/tokenizer_config.json", {"model_max_length": []}, "model_max_length of tokenizer is []", []),
]  # fmt: skip


@pytest.fixture(scope="module")
def forged(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return forged_kinds(Path(shutil.copytree(mini_bundle, tmp_path_factory.mktemp("forged") / "bundle")))


@pytest.mark.parametrize(("name", "change", "said", "options"), FORGERIES, ids=[f"{f[0]} {f[1]}" for f in FORGERIES])
def test_a_forged_bundle(
    forged: dict[str, Any], name: str, change: dict[str, Any], said: str, options: list[str]
) -> None:
    fields, check = forged[f"forged {name}"]
    changed = {
        key: fields[key] | value if isinstance(fields.get(key), dict) else value for key, value in change.items()
    }
    assert said in check({**fields, **changed}, *options)
