from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from cat_pruning.models import miniatures

ROOT = Path(__file__).parents[1]
FOLDERS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: a build in the tree would take along what earlier builds left.
    source = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS.values(), "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    if find_spec("setuptools") is not None:  # of which pip would install another one first
        command.append("--no-build-isolation")
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_has_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cat_pruning"}


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cu", ".html", ".j2", ".json", ".safetensors", ".typed"}:
                place = package.replace(".", "/")
                assert f"{place}/{path.relative_to(ROOT / folder).as_posix()}" in names


def test_wheel_has_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0\n" in archive.read(metadata).decode()
        licence = archive.read(metadata.replace("METADATA", "licenses/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()


@pytest.mark.long
def test_what_is_packaged_is_found_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """By what finds it, which imports no torch."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "from cat_pruning.models import miniatures; print(*miniatures().values());"
        "from cat_pruning.checkpoints.published import published_models; print(*published_models());"
        "print(published_models()['sd3'].transformer['num_layers'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, published, layers = result.stdout.splitlines()
    assert [Path(each).relative_to(tmp_path).name for each in found.split()] == sorted(miniatures())
    assert published == "flux-dev flux-schnell pixart-sigma sd3.5-large sd3.5-medium sd3"
    assert int(layers) == 24
