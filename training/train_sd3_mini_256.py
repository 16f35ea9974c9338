"""Train sd3-mini-256, or continue an existing one; a killed run resumes with the same command.

    python training/train_sd3_mini_256.py build/rich-128 --init build/grown-128 --side 128 --steps 2000
    python training/train_sd3_mini_256.py build/rich-256 --init build/grown-256 --steps 1000

Writes into the folder: `checkpoint.pt`, `sd3-mini-256-latest/` at each checkpoint, `sd3-mini-256/` at the end.
"""

from __future__ import annotations

from train_config import Optimizer, TrainConfig
from trainer import parse_arguments, run_script


def configuration(arguments: list[str] | None = None) -> TrainConfig:
    """The command line as a config."""
    return parse_arguments(
        arguments,
        miniature="sd3-mini-256",
        description=__doc__,
        batch_size=16,
        peak_lr=1.5e-3,
        warmup_steps=30,
        ema_decay=0.99,
        sigma_shift=4.0,
        optimizer=Optimizer.MUON,
    )


if __name__ == "__main__":
    run_script(configuration())
