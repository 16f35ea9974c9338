from __future__ import annotations

from pathlib import Path

from cat_pruning.engines.bundle import Bundle


def test_bundle_is_complete(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    for name in bundle.manifest.files:
        bundle.verified(name)
    assert bundle.manifest.geometry.text_length == 48
