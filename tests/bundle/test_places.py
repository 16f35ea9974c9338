"""Bundles pushed and pulled: through fsspec's memory, directories, and what a commit to the hub holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
from bundle_files import edit, export, export_with_plans, names, plan_set, small_manifest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from loopback_hub import LoopbackHub, loopback_hub
from signing_keys import write_keys

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.changes import Change, change_bundle, sign_bundle
from cat_pruning.bundle.manifest import MANIFEST_NAME
from cat_pruning.bundle.places import Place, is_url
from cat_pruning.bundle.pruning import prune_bundle
from cat_pruning.bundle.pulling import cache_folder, local_copy, pull
from cat_pruning.bundle.pushing import push
from cat_pruning.bundle.signatures import SIGNATURE_NAME, PublicKey
from cat_pruning.errors import BundleError, CatError, InstallationError, OutputError, SettingsError

URL = "memory://models/sd3"
SM90 = plan_set("tensorrt", "11.4", "sm90")


@pytest.fixture(autouse=True)
def memory() -> Iterator[MemoryFileSystem]:
    """An empty storage; the process has one."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture
def planned(tmp_path: Path) -> Bundle:
    return export_with_plans(tmp_path / "built" / "sd3", SM90)


def stored(files: MemoryFileSystem) -> dict[str, bytes]:
    return {path.removeprefix("/models/sd3/"): file.getvalue() for path, file in files.store.items()}


def on_disk(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_what_is_pulled_is_what_was_pushed(planned: Bundle, tmp_path: Path, kind: str, signs: bool) -> None:
    private, public = write_keys(tmp_path)
    if signs:
        sign_bundle(planned, private)
    url = URL if kind == "memory" else f"file://{tmp_path}/there/sd3"
    told: list[str] = []
    push(planned, url, told=told.append)
    assert told == list(planned.manifest.files)
    key = PublicKey.read(public) if signs else None
    pulled = pull(url, tmp_path / "here", public_key=key)
    assert pulled == Bundle.open(tmp_path / "here", key)
    assert on_disk(pulled.path) == on_disk(planned.path)  # to the byte, or no signature would fit
    assert names(tmp_path / "here") == names(planned.path)


def test_the_manifest_comes_last(planned: Bundle, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    sign_bundle(planned, write_keys(planned.path.parent)[0])
    written: list[str] = []
    put = Place.put

    def record(place: Place, name: str, content: Path | bytes) -> None:
        written.append(name)
        put(place, name, content)

    monkeypatch.setattr(Place, "put", record)
    push(planned, URL)
    assert written == [*planned.manifest.files, "manifest.json.sig", "manifest.json"]
    assert stored(memory) == on_disk(planned.path)


def test_what_is_there_is_not_sent_again(planned: Bundle, memory: MemoryFileSystem) -> None:
    """Plans that were added and others that were dropped: the bundle there is whole at every moment."""
    push(planned, URL)
    (plan,) = plan_set("tensorrt", "11.5", "sm90")[:1]
    prune_bundle(planned.path, ["tensorrt-11.4-sm90"])
    changed = change_bundle(
        planned.path, lambda manifest: Change(fields={"plans": (plan,)}, added={plan.file: b"a new plan"})
    )
    with pytest.raises(OutputError, match=rf"{URL} has another bundle; pass --force to replace it"):
        push(changed, URL)
    told: list[str] = []
    push(changed, URL, force=True, told=told.append)
    assert told == [plan.file]
    assert stored(memory) == on_disk(planned.path)
    push(changed, URL)  # the same again: no force
    del memory.store["/models/sd3/step.onnx"]  # lost there, and listed
    push(changed, URL, told=told.append)
    assert told == [plan.file, "step.onnx"]


def test_files_of_others_stay(planned: Bundle, memory: MemoryFileSystem, tmp_path: Path) -> None:
    memory.pipe_file("/models/sd3/README.md", b"mine")
    memory.pipe_file("/models/other/notes.txt", b"mine")
    push(planned, URL)
    push(export(tmp_path / "other", small_manifest(), step=b"another step"), URL, force=True)
    assert memory.cat_file("/models/sd3/README.md") == b"mine"
    assert memory.cat_file("/models/other/notes.txt") == b"mine"
    assert not memory.exists(f"/models/sd3/{SM90[0].file}")  # of the former bundle
    assert pull(URL, tmp_path / "here").verified("step.onnx").read_bytes() == b"another step"


@pytest.mark.parametrize("fails_at", [SM90[-1].file, SIGNATURE_NAME, MANIFEST_NAME])
@pytest.mark.parametrize("before", ["nothing", "other plans", "another export"])
def test_a_push_that_fails(
    planned: Bundle,
    memory: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    fails_at: str,
) -> None:
    """Nothing is there then, or what was there before, or nothing that could be taken for a bundle."""
    if before != "nothing":
        step = b"a step graph" if before == "other plans" else b"another step"
        first = export(tmp_path / "before", small_manifest(), step=step)
        sign_bundle(first, write_keys(tmp_path, "first")[0])
        push(first, URL)
    was = stored(memory)
    sign_bundle(planned, write_keys(tmp_path)[0])
    put = Place.put

    def full(place: Place, name: str, content: Path | bytes) -> None:
        if name == fails_at and content != was.get(name):
            raise RuntimeError("507 Insufficient Storage")
        put(place, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "put", full)
        with pytest.raises(OutputError) as caught:
            push(planned, URL, force=True)
    assert str(caught.value).startswith(f"{URL} cannot be written (507 Insufficient Storage); check the address")
    if before == "another export":  # whose step had to be written over
        assert "manifest.json" not in stored(memory)
        with pytest.raises(BundleError, match=rf"{URL} has no manifest\.json: no bundle"):
            pull(URL, tmp_path / "here")
    else:
        assert stored(memory) == was
    push(planned, URL, force=True)
    assert on_disk(pull(URL, tmp_path / "here").path) == on_disk(planned.path)


def test_a_bundle_that_was_edited_is_not_pushed(planned: Bundle, memory: MemoryFileSystem) -> None:
    edit(planned.path / "step.onnx")
    with pytest.raises(BundleError, match=r"step\.onnx was changed after the export"):
        push(Bundle.open(planned.path), URL)
    assert memory.store == {}


# ------------------------------------------------------------------ pulls that are refused


def shorter(content: bytes) -> bytes:
    return content[:-1]


def longer(content: bytes) -> bytes:
    return content * 100


def other(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("step.onnx", shorter, "step.onnx has 11 bytes, expected 12: truncated or edited"),
        ("step.onnx", longer, "step.onnx has more than 12 bytes, expected 12: truncated or edited"),
        ("step.onnx", other, "step.onnx has the SHA-256 "),
        ("pipeline/vae/config.json", lambda _: b"", "pipeline/vae/config.json has 0 bytes, expected 2"),
        ("step.onnx", None, "step.onnx is missing, expected 12 bytes"),
        ("manifest.json", None, "has no manifest.json: no bundle"),
        ("manifest.json", lambda _: b"", "has no manifest.json: no bundle"),
        ("manifest.json", lambda content: content[:-3], "/manifest.json is not JSON"),
        ("manifest.json", lambda _: b'{"format_version": 5}', "/manifest.json has format version 5, this cat-pruning"),
        ("manifest.json", lambda content: content.replace(b'"step.onnx"', b'"../step.onnx"'), "is not a path inside"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_what_is_not_whole_is_one_line_and_nothing_is_here(
    planned: Bundle,
    memory: MemoryFileSystem,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes] | None,
    said: str,
    there: bool,
) -> None:
    push(planned, URL)
    path = f"/models/sd3/{name}"
    content = memory.cat_file(path)
    memory.rm_file(path)
    if change is not None:
        memory.pipe_file(path, change(content))
    out = tmp_path / "outs" / "here"
    if there:
        export(out, small_manifest())
    before = on_disk(tmp_path / "outs")
    with pytest.raises(BundleError) as caught:
        pull(URL, out, force=True)
    assert said in str(caught.value)
    assert "push " in caught.value.remedy
    assert str(caught.value).startswith(URL)
    assert on_disk(tmp_path / "outs") == before
    assert not there or [path.name for path in (tmp_path / "outs").iterdir()] == ["here"]


def test_a_line_that_breaks(planned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some bytes, with an error of the storage's own library."""
    push(planned, URL)
    opened = MemoryFileSystem._open

    def broken(files: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        file = opened(files, path, *arguments, **options)
        if path.endswith("step.onnx"):
            file.read = lambda size: (_ for _ in ()).throw(TimeoutError("The read operation\ntimed out"))
        return file

    monkeypatch.setattr(MemoryFileSystem, "_open", broken)
    with pytest.raises(BundleError) as caught:
        pull(URL, tmp_path / "outs" / "here")
    assert str(caught.value).startswith(f"{URL} cannot be read (The read operation timed out); check the address")
    assert not list((tmp_path / "outs").iterdir())


def test_a_bundle_that_must_be_signed(
    planned: Bundle, memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is asked for before anything else is read, and nothing more is fetched."""
    private, public = write_keys(tmp_path)
    push(planned, URL)
    monkeypatch.setattr("cat_pruning.bundle.pulling.parse_manifest", lambda *_: pytest.fail("was read"))
    with pytest.raises(BundleError, match=rf"{URL} is not signed: it has no manifest\.json\.sig"):
        pull(URL, tmp_path / "here", public_key=PublicKey.read(public))
    monkeypatch.undo()
    sign_bundle(planned, private)
    push(planned, URL)  # the same manifest: no force
    memory.pipe_file("/models/sd3/manifest.json", memory.cat_file("/models/sd3/manifest.json") + b" ")
    with pytest.raises(BundleError, match=rf"{URL} is not signed with the key of {public}"):
        pull(URL, tmp_path / "here", public_key=PublicKey.read(public))
    assert not (tmp_path / "here").exists()


def test_a_name_that_cannot_be_written(planned: Bundle, memory: MemoryFileSystem, tmp_path: Path) -> None:
    name = "x" * 300
    push(planned, URL)
    memory.pipe_file(f"/models/sd3/{name}", b"{}")
    manifest = planned.manifest
    files = dict(sorted((manifest.files | {name: manifest.files["pipeline/model_index.json"]}).items()))
    memory.pipe_file("/models/sd3/manifest.json", manifest.with_files(files).model_dump_json().encode())
    with pytest.raises(OutputError, match=rf"{name} cannot be written \(.*\); give another directory"):
        pull(URL, tmp_path / "outs" / "here")
    assert not list((tmp_path / "outs").iterdir())


def test_here_is_another_bundle_or_something_else(planned: Bundle, tmp_path: Path) -> None:
    push(planned, URL)
    export(tmp_path / "here", small_manifest())
    with pytest.raises(OutputError, match="exists; pass --force to replace it"):
        pull(URL, tmp_path / "here")
    assert pull(URL, tmp_path / "here", force=True) == Bundle.open(tmp_path / "here")
    (tmp_path / "here" / "mine.txt").touch()
    with pytest.raises(OutputError, match=r"has mine\.txt, not listed"):
        pull(URL, tmp_path / "here", force=True)


# ------------------------------------------------------------------ addresses


def test_urls_and_paths() -> None:
    assert [is_url(each) for each in ("hf://a/b", "s3://b/k", "simplecache::s3://b/k", "file:///tmp")] == [True] * 4
    assert [is_url(each) for each in ("build/sd3", "/a:b", "C:/x", "", "a b://c", Path("hf://a"))] == [False] * 6


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        (
            "nonsense://a/b",
            SettingsError,
            r"nonsense://a/b is no address of a storage \(Protocol not known: nonsense\)",
        ),
        ("memory://models/none", BundleError, r"memory://models/none has no manifest.json: no bundle; push one"),
        ("hf://owner", CatError, "hf://owner"),
    ],
)
def test_an_address_that_is_none(tmp_path: Path, url: str, kind: type[CatError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        pull(url, tmp_path / "here")
    assert "\n" not in str(caught.value)


def test_a_storage_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"class": "no_such_package.FileSystem", "err": "Install nosuch to access it"}
    monkeypatch.setitem(known_implementations, "nosuch", entry)
    with pytest.raises(InstallationError, match=r"nosuch://a/b: Install nosuch to access it"):
        pull("nosuch://a/b", tmp_path / "here")


# ------------------------------------------------------------------ copies of what is loaded by its URL


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAT_PRUNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_copy_is_pulled_once_and_again_when_the_bundle_changes(
    planned: Bundle, memory: MemoryFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(planned, URL)
    copy = local_copy(URL)
    assert Bundle.open(copy).manifest == planned.manifest
    assert copy.name == "sd3"  # a server's name for the model
    fetched: list[str] = []
    opened = MemoryFileSystem._open

    def record(files: MemoryFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            fetched.append(path.removeprefix("/models/sd3/"))
        return opened(files, path, mode=mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", record)
    assert local_copy(URL) == copy
    assert set(fetched) <= {"manifest.json", "manifest.json.sig"}
    plan = plan_set("tensorrt", "11.5", "sm90")[0]
    added = {plan.file: b"a new plan"}
    changed = change_bundle(
        planned.path, lambda manifest: Change(fields={"plans": (*manifest.plans, plan)}, added=added)
    )
    push(changed, URL, force=True)
    fetched.clear()
    later = local_copy(URL)
    assert later != copy
    assert Bundle.open(later).manifest == changed.manifest
    assert set(fetched) <= {"manifest.json", "manifest.json.sig", plan.file}  # the rest is linked
    assert Bundle.open(copy).manifest != changed.manifest  # whoever loads it still can


@pytest.mark.parametrize("url", ["memory://models/..", "memory://models/.hidden", "memory://models/a b?c", "memory://"])
def test_a_copy_lies_below_the_cache_whatever_the_url(planned: Bundle, cache: Path, url: str) -> None:
    push(planned, url)
    copy = local_copy(url)
    assert copy.resolve().relative_to(cache.resolve()).parts[-1] == copy.name
    assert len(copy.relative_to(cache).parts) == 3


def test_a_copy_that_was_edited_is_not_linked(planned: Bundle, cache: Path) -> None:
    push(planned, URL)
    copy = local_copy(URL)
    edit(copy / "step.onnx")
    prune_bundle(planned.path, ["tensorrt"])
    push(Bundle.open(planned.path), URL, force=True)
    later = Bundle.open(local_copy(URL))
    assert later.verified("step.onnx").read_bytes() == (planned.path / "step.onnx").read_bytes()


def test_files_of_this_machine_are_not_copied(planned: Bundle, cache: Path) -> None:
    assert local_copy(f"file://{planned.path}") == planned.path
    assert not cache.exists()


def test_where_copies_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CAT_PRUNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cat-pruning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "cat-pruning"


def test_a_cache_that_cannot_be_written(planned: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    push(planned, URL)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CAT_PRUNING_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\); set CAT_PRUNING_CACHE"):
        local_copy(URL)


# ------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub on loopback, asked by the real client."""
    constants = huggingface_hub.constants
    with loopback_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", "hf_loopback")
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield hub
    huggingface_hub.HfFileSystem.clear_instance_cache()


def test_the_hub_gets_one_commit(planned: Bundle, hub: LoopbackHub, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    sign_bundle(planned, private)
    push(planned, "hf://owner/sd3")
    assert (hub.commits, hub.made_private) == (1, ["owner/sd3"])
    assert hub.repositories["owner/sd3"] == on_disk(planned.path)
    pulled = pull("hf://owner/sd3", tmp_path / "here", public_key=PublicKey.read(public))
    assert on_disk(pulled.path) == on_disk(planned.path)
    hub.repositories["owner/sd3"]["README.md"] = b"mine"
    prune_bundle(planned.path, ["tensorrt"])
    push(Bundle.open(planned.path), "hf://owner/sd3", force=True)
    # What is gone is deleted in the same commit, the signature too; files of others stay.
    assert hub.commits == 2
    assert hub.repositories["owner/sd3"] == on_disk(planned.path) | {"README.md": b"mine"}
    assert on_disk(pull("hf://owner/sd3", tmp_path / "later").path) == on_disk(planned.path)


def test_a_folder_of_a_repository(planned: Bundle, hub: LoopbackHub, tmp_path: Path) -> None:
    push(planned, "hf://owner/sd3/bundles/one")
    assert {path.split("/")[0] for path in hub.repositories["owner/sd3"]} == {"bundles"}
    assert on_disk(pull("hf://owner/sd3/bundles/one", tmp_path / "here").path) == on_disk(planned.path)


def test_what_the_hub_refuses(planned: Bundle, hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"hf://owner/none has no manifest\.json: no bundle"):
        pull("hf://owner/none", tmp_path / "here")
    hub.refuses = True
    with pytest.raises(OutputError, match=r"hf://owner/sd3 cannot be written \(.*403 Forbidden"):
        push(planned, "hf://owner/sd3")
    with pytest.raises(CatError, match="hf://owner"):
        push(planned, "hf://owner")


def test_a_file_of_which_half_arrives_from_the_hub(planned: Bundle, hub: LoopbackHub, tmp_path: Path) -> None:
    push(planned, "hf://owner/sd3")
    hub.cut_off = "step.onnx"
    with pytest.raises(BundleError) as caught:
        pull("hf://owner/sd3", tmp_path / "outs" / "here")
    assert str(caught.value).startswith("hf://owner/sd3")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "outs").iterdir())
