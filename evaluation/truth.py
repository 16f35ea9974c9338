"""The truth: the image that the steps of a pipeline converge to, which the full run is only near.

It is computed in `TRUTH_STEPS` full steps: over a flow by two-step Adams-Bashforth, else by the pipeline's scheduler.
Both are of second order: on sd3-mini the latents of 200 Euler steps, of first order, are four times as far from it as
those of 800 are.
"""

from __future__ import annotations

from typing import Any

from cat_pruning.evaluation.candidates import FULL, Candidate
from cat_pruning.evaluation.solvers import AB2, is_flow
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import never_pruned

TRUTH_STEPS = 200


def truth_candidate(scheduler: Any) -> Candidate:
    """What makes the truth's images in a pipeline with this scheduler; no candidate that has results."""
    return Candidate(
        method=AB2 if is_flow(scheduler) else FULL,
        steps=TRUTH_STEPS,
        keep_ratio=1.0,
        sampled_steps=TRUTH_STEPS,
        full_steps=TRUTH_STEPS,
        macs_linear=0,
        macs_all=0,
        settings=never_pruned(PruneSettings(), TRUTH_STEPS).to_dict(),
    )
