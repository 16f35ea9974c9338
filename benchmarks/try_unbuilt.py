"""Trials of what no setting can say yet, to know whether it is worth building: `make try-settings`.

    python benchmarks/try_unbuilt.py build/eval/sd3-mini --prompts 16

Ideas, each patched into the runtime for the trial only:

    keep ratio per step     more tokens on some pruned steps and fewer on others, as many together
    text rows rarely        a pruned step computes its image tokens only; the text's keys and values stay as they were
                            on the last step that computed them. Simulated: they are computed and not written, which
                            gives the same picture, and no time is won
    second order            the forecast by the parabola through the last three full steps, not the line through two

Printed and written to results/unbuilt.json, as by `try_settings.py`.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import write_result
from torch import Tensor
from try_settings import FORECAST, STEPS, Trials, forecast_between

from cat_pruning.families import interception
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.runtime.selection.policies import SELECTORS, CatSelector
from cat_pruning.schedule import StepKind
from cat_pruning.settings import Policy, PruneSettings
from cat_pruning.timeline import step_kind

PAPER = PruneSettings()
REFRESHED = PruneSettings.preset("refreshed")
FIRST, LAST = PAPER.full_steps, STEPS - 1  # pruned steps of the paper's schedule
KEEP: dict[str, Callable[[int], float]] = {  # of a step, by its number; 0.3 on average
    "keep 0.3 on every step": lambda step: 0.3,
    "keep 0.5 falling to 0.1": lambda step: 0.5 - 0.4 * (step - FIRST) / (LAST - FIRST),
    "keep 0.1 rising to 0.5": lambda step: 0.1 + 0.4 * (step - FIRST) / (LAST - FIRST),
    "keep 0.5 and 0.1 in turn": lambda step: 0.1 if step % 2 else 0.5,
}
TEXT: dict[str, tuple[PruneSettings, Callable[[int], bool]]] = {  # whether a pruned step computes its text rows
    "text on every pruned step": (PAPER, lambda step: True),
    "text on every 2nd": (PAPER, lambda step: step % 2 == 0),
    "text on every 4th": (PAPER, lambda step: step % 4 == 0),
    "text on none": (PAPER, lambda step: False),
    "refreshed, text on every pruned step": (REFRESHED, lambda step: True),
    "refreshed, text on none": (REFRESHED, lambda step: False),
}


@contextmanager
def varying_keep_ratio(keep_ratio: Callable[[int], float]) -> Iterator[None]:
    """CAT's selector with a number of tokens for each step of the paper's schedule."""

    class Varying(CatSelector):
        @property
        def num_kept(self) -> int:
            return max(1, int(keep_ratio(FIRST + self._chosen) * self.num_tokens))

        @num_kept.setter
        def num_kept(self, value: int) -> None:
            """What the settings say, which is not asked."""

        def reset(self) -> None:
            super().reset()
            self._chosen = 0

        def _count(self, tokens: Tensor) -> None:
            super()._count(tokens)
            self._chosen += 1

    original = SELECTORS[Policy.CAT]
    SELECTORS[Policy.CAT] = Varying
    try:
        yield
    finally:
        SELECTORS[Policy.CAT] = original


@contextmanager
def rare_text(pipe: Any, settings: PruneSettings, computes_text: Callable[[int], bool]) -> Iterator[None]:
    """The torch engine without the text rows of some pruned steps."""
    original = interception.write_slice_
    step, num_tokens = -1, 0

    def count(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        nonlocal step, num_tokens
        step = (step + 1) % STEPS
        height, width = keywords["hidden_states"].shape[-2:]
        num_tokens = height * width // pipe.transformer.config.patch_size**2

    def write(tokens: Tensor, start: int, rows: Tensor) -> None:
        is_text = start == num_tokens  # a joint cache has the image's rows, then the text's
        if not is_text or step_kind(step, settings) is StepKind.FULL or computes_text(step):
            original(tokens, start, rows)

    hook = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    interception.write_slice_ = write
    try:
        yield
    finally:
        interception.write_slice_ = original
        hook.remove()


ORDERS = {
    "forecast": FORECAST,
    "forecast, second order": forecast_between((*range(4), *range(4, STEPS, 2)), order=2),
}


def main() -> None:
    """Run every trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=16, help="scenes (default: 16)")
    arguments = parser.parse_args()
    trials = Trials(arguments.prompts)
    pipe = load_pipeline(arguments.bundle, "onnxruntime")
    for batch in trials.batches(pipe):
        for name, keep_ratio in KEEP.items():
            pipe.transformer = copy.deepcopy(pipe.transformer)  # the same weights, and a selector of its own
            with varying_keep_ratio(keep_ratio):
                trials.run(pipe, name, PAPER, batch)
        for name, settings in ORDERS.items():
            trials.run(pipe, name, settings, batch)
    pipe = load_pipeline(arguments.bundle, "torch")
    for batch in trials.batches(pipe):
        for name, (settings, computes_text) in TEXT.items():
            with rare_text(pipe, settings, computes_text):
                trials.run(pipe, name, settings, batch)
    print(f"written to {write_result('unbuilt', trials.summary())}")  # noqa: T201


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
