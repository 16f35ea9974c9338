"""Checkpoints on the hub: downloaded once, each failure in words that say what to do."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils._validators import validate_repo_id

from cat_pruning.errors import CheckpointError
from cat_pruning.exporter.library_logs import first_line

# What an export reads. The pipeline's other parts stay on the hub; the bundle refers to them by id and revision.
_NEEDED = ["model_index.json", "transformer/*", "vae/config.json", "tokenizer*/tokenizer_config.json"]
_NOT_OF_THE_PIPELINE = ["transformer/*.safetensors", "*.bin", "*.msgpack", "*.onnx*"]


def is_hub_id(model: str) -> bool:
    """Whether `model` is spelt like an id on the hub, owner/name."""
    try:
        validate_repo_id(model)
    except hub_errors.HFValidationError:
        return False
    return model.count("/") == 1


def download_checkpoint(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """What an export reads of a pipeline on the hub, and the commit that it is of.

    Raises:
        CheckpointError: no access, no network, no such pipeline or revision.
    """
    return _download(hub_id, revision, allow_patterns=_NEEDED)


def pipeline_snapshot(hub_id: str, revision: str | None) -> Path:
    """Everything but the transformer's weights of a pipeline on the hub.

    Raises:
        CheckpointError: likewise.
    """
    return _download(hub_id, revision, ignore_patterns=_NOT_OF_THE_PIPELINE)[0]


def _download(
    hub_id: str, revision: str | None, allow_patterns: list[str] | None = None, ignore_patterns: list[str] | None = None
) -> tuple[Path, str]:
    """The snapshot's directory and its commit; the patterns are those of `snapshot_download`."""
    at = f"{hub_id} at {revision}" if revision else hub_id
    try:
        directory = Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
    except hub_errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated: accept its licence on its page on the hub, then log in with `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{hub_id} has no revision {revision!r}; see its page on the hub") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{hub_id} is not on the hub, or is private: check the id, or `hf auth login`") from error
    except (OSError, hub_errors.HTTPError) as error:  # type: ignore[attr-defined]  # not in the cache, no network
        raise CheckpointError(
            f"{at} is not in the local cache and the hub cannot be reached ({first_line(error)}); "
            "check the network, or pass a local directory as --model"
        ) from error
    return directory, directory.name  # snapshots/COMMIT
