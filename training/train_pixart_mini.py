"""Train pixart-mini, or continue an existing one; a killed run resumes with the same command.

    python training/train_pixart_mini.py build/training-pixart --vae models/pixart-mini/vae --side 64 --steps 3600
    python training/train_pixart_mini.py build/training-pixart --init models/pixart-mini --steps 2000 --peak-lr 4e-4

Writes into the folder: `checkpoint.pt`, `pixart-mini-latest/` at each checkpoint, `pixart-mini/` at the end.
"""

from __future__ import annotations

from train_config import TrainConfig
from trainer import parse_arguments, run_script


def configuration(arguments: list[str] | None = None) -> TrainConfig:
    """The command line as a config."""
    return parse_arguments(
        arguments,
        miniature="pixart-mini",
        description=__doc__,
        peak_lr=1.5e-3,
        ema_decay=0.998,
    )


if __name__ == "__main__":
    run_script(configuration())
