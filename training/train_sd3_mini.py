"""Train sd3-mini, or continue an existing one; a killed run resumes with the same command.

    python training/train_sd3_mini.py build/training --steps 4000
    python training/train_sd3_mini.py build/training --steps 2000 --init models/sd3-mini --peak-lr 4e-4

Writes into the folder: `checkpoint.pt`, `sd3-mini-latest/` at each checkpoint, `sd3-mini/` at the end.
"""

from __future__ import annotations

from train_config import TrainConfig
from trainer import parse_arguments, run_script


def configuration(arguments: list[str] | None = None) -> TrainConfig:
    """The command line as a config."""
    return parse_arguments(arguments, miniature="sd3-mini", description=__doc__)


if __name__ == "__main__":
    run_script(configuration())
