"""How people read each metric: its title, its digits, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.intervals import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How people read a metric.

    Attributes:
        title: with its unit. digits: after the point. higher_is_better: or else lower.
        of_prompt: whether it judges an image by its prompt, the full run's too; the others compare with the full run,
            or with the truth.
    """

    title: str
    digits: int
    higher_is_better: bool = True
    of_prompt: bool = False

    def verdict(self, difference: Interval) -> str:
        """Whether a is better or worse than b by the interval of a's score less b's, in the words that it allows."""
        if difference.low <= 0 <= difference.high:
            return "no difference shown"
        return "better" if (difference.mean > 0) == self.higher_is_better else "worse"


MEASURES = {
    "coverage": Measure(title="coverage", digits=3, of_prompt=True),
    "clip_score": Measure(title="CLIP score", digits=2, of_prompt=True),
    "psnr_db": Measure(title="PSNR (dB)", digits=2),
    "lpips": Measure(title="LPIPS", digits=4, higher_is_better=False),
    "ssim": Measure(title="SSIM", digits=3),
    "latents_error": Measure(title="latents, relative error", digits=3, higher_is_better=False),
    "truth_error": Measure(title="latents, relative error to the truth", digits=3, higher_is_better=False),
}


def measure_of(metric: str) -> Measure:
    """How to read a metric by its name in `ImageResult.scores`.

    Raises:
        SettingsError: it is not known.
    """
    if metric not in MEASURES:
        raise SettingsError(f"metric {metric!r} is not known; known are {', '.join(MEASURES)}")
    return MEASURES[metric]
