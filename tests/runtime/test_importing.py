"""Threads that are the first to need diffusers import it one after the other."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cat_pruning.checkpoints.library_logs import quiet_diffusers
from cat_pruning.imports import diffusers_class, importing
from cat_pruning.runtime.pipeline import import_pipeline
from cat_pruning.runtime.transformer import CatTransformer


def new_drop_in(folder: Path) -> None:
    class Mine(CatTransformer):
        pass

    Mine.__new__(Mine)


def model_class(folder: Path) -> None:
    diffusers_class("SD3Transformer2DModel")


def pipeline(folder: Path) -> None:
    import_pipeline(folder)


def logs(folder: Path) -> None:
    with quiet_diffusers():
        pass


@pytest.mark.parametrize("use", [new_drop_in, model_class, pipeline, logs])
def test_an_import_waits_for_another_threads(use: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    done = threading.Event()

    def run() -> None:
        use(tmp_path)
        done.set()

    with importing:
        thread = threading.Thread(target=run)
        thread.start()
        assert not done.wait(0.1)
    thread.join()
    assert done.is_set()


def test_the_instances_of_several_threads_have_one_class() -> None:
    class Mine(CatTransformer):
        def __init_subclass__(cls) -> None:
            time.sleep(0.05)  # while its class is made, the other threads come

    start, made = threading.Barrier(4), []

    def make() -> None:
        start.wait()
        made.append(type(Mine.__new__(Mine)))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len(set(made)) == 1
