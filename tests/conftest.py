"""How the suite runs: its environment, its order, and the fixtures of several rooms, which are in tests/fixtures."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests import ONNX Runtime before the package that sets it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the tools set it; see `cat_pruning.console.run`
if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import logging
from collections import Counter

import pytest

pytest_plugins = ["pytester", "cpu_seconds", "store"]
# They import torch and more; the process that only tells workers what to run does without.
FIXTURES = ["stored_traces", "stored_bundles", "tiny_models", "step_fixtures", "mini_pipelines", "family_models"]

logging.getLogger("torch.onnx").setLevel(logging.ERROR)
logging.getLogger("torch.__trace").propagate = False  # pytest would format thousands of lines of each trace


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if is_worker or not config.getoption("numprocesses", None):
        for name in FIXTURES:
            config.pluginmanager.import_plugin(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many long tests first, so that no worker begins one when the others have nothing left to do."""
    long = Counter(item.path for item in items if item.get_closest_marker("long") is not None)
    items.sort(key=lambda item: -long[item.path])


def pytest_collection_finish() -> None:
    """The libraries' million objects live as long as the process: the collector need not look at each of them again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
