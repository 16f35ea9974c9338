"""Checkpoints on the hub: downloaded once, each failure in words that say what to do."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils._validators import validate_repo_id

from cat_pruning.checkpoints.library_logs import first_line
from cat_pruning.errors import CheckpointError
from cat_pruning.files import read_json

# What an export reads. The pipeline's other parts stay on the hub; the bundle refers to them by id and revision.
_NEEDED = ["model_index.json", "transformer/*", "vae/config.json", "tokenizer*/tokenizer_config.json"]
_INDEX = "model_index.json"
_PARTS = ("*.json", "*.txt", "*.model", "*.safetensors")  # of a component's folder
_VARIANTS = ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*"]  # the same weights again


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


def pipeline_snapshot(hub_id: str, revision: str | None, *, download: bool = True) -> Path:
    """What diffusers loads of a pipeline on the hub, but for the transformer's weights.

    The components that its index names and nothing else: beside them lie single-file checkpoints as large again.
    Without `download`, what there is of them in the local cache.

    Raises:
        CheckpointError: likewise, or its index cannot be read.
    """
    directory = _download(hub_id, revision, [_INDEX], download=download)[0]
    try:
        index = read_json(directory / _INDEX)
        components = [name for name, value in index.items() if isinstance(value, list) and name != "transformer"]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{hub_id}: {_INDEX} cannot be read ({first_line(error)})", "download it again"
        ) from error
    allowed = [f"{component}/{part}" for component in components for part in _PARTS]
    allowed += [_INDEX, "transformer/config.json"]
    return _download(hub_id, revision, allowed, ignore_patterns=_VARIANTS, download=download)[0]


def _download(
    hub_id: str,
    revision: str | None,
    allow_patterns: list[str],
    ignore_patterns: list[str] | None = None,
    *,
    download: bool = True,
) -> tuple[Path, str]:
    """The snapshot's directory and its commit; the patterns are those of `snapshot_download`."""
    at = f"{hub_id} at {revision}" if revision else hub_id
    try:
        directory = Path(
            huggingface_hub.snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
                local_files_only=not download,
            )
        )
    except hub_errors.LocalEntryNotFoundError as error:
        if not download:
            raise CheckpointError(f"{at} is not in the local cache", "download it") from error
        raise _unreachable(at, error) from error
    except hub_errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated", "accept its licence on its page on the hub, then log in with `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{hub_id} has no revision {revision!r}", "see its page on the hub") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} is not on the hub, or is private", "check the id, or `hf auth login`"
        ) from error
    except (OSError, hub_errors.HTTPError) as error:  # type: ignore[attr-defined]  # not in the cache, no network
        raise _unreachable(at, error) from error
    return directory, directory.name  # snapshots/COMMIT


def _unreachable(at: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{at} is not in the local cache and the hub cannot be reached ({first_line(error)})",
        "check the network, or pass a local directory as --model",
    )
