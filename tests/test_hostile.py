"""What an attacker may send: names that lead out of their folder, archives, prompts, models and versions made for harm.

Each is refused with a UserError, or does nothing but what a harmless one does.
"""

import json
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from pydantic import TypeAdapter, ValidationError

from softprompt.backbone import Backbone, convert_gguf
from softprompt.data.rows import read_file
from softprompt.errors import UserError
from softprompt.evaluation import as_markdown, measure
from softprompt.home import tracking_uri
from softprompt.packages import extract, fetch, file_sha256
from softprompt.prompt import SoftPrompt
from softprompt.registry import load_registered, register
from softprompt.spec import DataSpec, ModelSpec
from softprompt.spec.base import HubId, InnerPath, Slug
from softprompt.tracking import Tracker
from tests.test_packages import build_wheel
from tests.test_prompt import make_prompt, rewrite
from tests.tiny import save_tiny, tiny_experiment

CLIMBS = ["..", "../x", "x/../../y", "/etc/passwd", "x//y", "./x", "x/.", "", "x\0y", "x\ny", "a" * 300, "in.zip!../x"]


@pytest.mark.parametrize("path", CLIMBS)
@pytest.mark.parametrize("key", ["package", "hub", "hub model", "package model"])
def test_a_name_that_leads_out_is_refused(path: str, key: str) -> None:
    pin = {"package": "carrier==1.0", "sha256": "0" * 64}
    cases: dict[str, tuple[Any, dict[str, str]]] = {
        "package": (DataSpec, {"kind": "package", **pin, "file": path, "format": "csv"}),
        "hub": (DataSpec, {"kind": "hub", "id": "a/b", "revision": path}),
        "hub model": (ModelSpec, {"kind": "hub", "id": "a/b", "revision": path}),
        "package model": (ModelSpec, {"kind": "package", **pin, "file": path}),
    }
    kind, tree = cases[key]
    with pytest.raises(ValidationError, match="plain path inside"):
        TypeAdapter(kind).validate_python(tree)


@pytest.mark.parametrize("name", ["../up", "/etc", "./here", "a/b/c", "https://evil.example/x", "a\n", "-x", ""])
def test_a_dataset_of_the_hub_is_no_folder_and_no_address(name: str) -> None:
    with pytest.raises(ValidationError, match="id"):
        TypeAdapter(DataSpec).validate_python({"kind": "hub", "id": name, "revision": "abc"})


@given(st.text(max_size=80) | st.from_regex(r"[./a-z~%\\-]{1,20}"))
def test_every_name_that_passes_stays_in_its_folder(name: str) -> None:
    root = Path("/root-of-all/folder")
    for kind in (Slug, HubId, InnerPath):
        try:
            passed: str = TypeAdapter(kind).validate_python(name)
        except ValidationError:
            continue
        there = Path(os.path.normpath(root / passed))
        assert there.is_relative_to(root)
        assert there != root
        assert passed.isprintable()


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=60) | st.text("_*`ab 1|<&;[]()!\\~#-", max_size=30)
)
def test_no_text_makes_markup(text: str) -> None:
    shown = as_markdown(text)
    assert "\n" not in shown
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(f"| system |\n|---|\n| x {shown} |")
    (cell,) = [t for before, t in pairwise(tokens) if before.type == "td_open"]
    assert {child.type for child in cell.children or []} <= {"text", "text_special"}
    assert "".join(child.content for child in cell.children or []).split() == ["x", *text.split()]


def test_a_pipe_or_a_device_is_no_file_of_rows(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.csv")
    for path in (tmp_path / "rows.csv", Path("/dev/zero")):
        with pytest.raises(UserError, match="it is no regular file"):
            list(read_file(path, format="csv"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_prompt().save(tmp_path / "prompt")


def write_tensors(folder: Path, content: bytes) -> None:
    """With the hash that belongs to it, as whoever makes the file can also write that."""
    (folder / "adapter_model.safetensors").write_bytes(content)
    rewrite(folder, vectors_sha256=file_sha256(folder / "adapter_model.safetensors"))


def safetensors(header: object, body: bytes = b"", *, size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def tensor(shape: list[int], end: int, **other: object) -> dict[str, object]:
    return {"prompt_embeddings": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]} | other}


TERABYTES = 1 << 42


class Ran:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo ran > ran",)


@pytest.mark.parametrize(
    "content",
    [
        safetensors(tensor([TERABYTES // 128, 32], TERABYTES)),
        safetensors(tensor([5, 32], TERABYTES)),
        safetensors(tensor([5, 32], 640), size=TERABYTES),
        safetensors(tensor([5, 32], 640), size=(1 << 64) - 1),
        safetensors(tensor([-5, 32], 640), b"\0" * 640),
        safetensors(tensor([5, 32], 640, data_offsets=[640, 0]), b"\0" * 640),
        safetensors(tensor([5, 32], 640, data_offsets=[-8, 632]), b"\0" * 640),
        safetensors(tensor([1 << 63, 2], 640), b"\0" * 640),
        safetensors(tensor([5, 32], 640, dtype="OBJECT"), b"\0" * 640),
        safetensors([[]] * 9),
        safetensors("[" * 5000),
        b"",
        b"\0" * 7,
        pickle.dumps(Ran()),
        pickle.dumps({"prompt_embeddings": torch.zeros(5, 32)}),
    ],
)
def test_tensors_made_for_harm_are_refused(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    write_tensors(folder, content)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        SoftPrompt.load(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["softprompt.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_what_is_no_regular_file_is_not_opened(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is no regular file"):
        SoftPrompt.load(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"words": ' + '{"a":' * 900 + "1" + "}" * 900 + "}",
        '{"base": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '{"max_tokens": ' + "9" * 10_000 + "}",
        '{"template": "a", "template": "{text}"}',
        '{"words": {"a": "b", "a": "c"}}',
    ],
)
def test_json_made_for_harm_is_refused(folder: Path, text: str) -> None:
    file = folder / "softprompt.json"
    file.write_text(file.read_text().rstrip()[:-1] + "," + text[1:])
    with pytest.raises(UserError, match=r"softprompt\.json"):
        SoftPrompt.load(folder)


@pytest.mark.parametrize("changes", [{"max_tokens": 10**12}, {"words": {}, "max_new_tokens": 10**12}])
def test_a_prompt_that_would_keep_its_user_waiting_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder, **changes)
    with pytest.raises(UserError, match="must be at most 32768"):
        SoftPrompt.load(folder)


def test_files_beside_a_prompt_are_left_alone(folder: Path) -> None:
    for name in ("..%2f..%2fx.py", "adapter_model.bin", "__init__.py", "pytorch_model.pt"):
        (folder / name).write_bytes(pickle.dumps(Ran()))
    assert SoftPrompt.load(folder) is not None
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["softprompt.json", "adapter_model.safetensors"])
def test_a_prompt_that_is_cut_short_anywhere_is_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for size in range(0, len(content) - (1 if name.endswith("json") else 0), 7):
        (folder / name).write_bytes(content[:size])
        with pytest.raises(UserError):
            SoftPrompt.load(folder)


@pytest.mark.parametrize("name", ["../outside/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", 7])
def test_an_index_of_shards_does_not_lead_out(tmp_path: Path, name: object) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "outside").mkdir()
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "outside" / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="its weights cannot be read"):
        Backbone.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("changes", [{"vocab_size": 10**12}, {"intermediate_size": 10**12}])
def test_a_config_that_asks_for_terabytes_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match="cannot be loaded as a language model"):
        Backbone.load(tmp_path, device="cpu")


def test_code_that_a_config_names_is_not_run_where_the_kind_is_known(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "own.py").write_text("raise SystemExit('the code of the model was run')")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((tmp_path / name).read_text())
        own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
        (tmp_path / name).write_text(json.dumps(content | {"auto_map": own}))
    assert type(Backbone.load(tmp_path, device="cpu").model).__module__.startswith("transformers.")


@pytest.mark.parametrize("counts", [(1 << 62, 0), (0, 1 << 62), (1 << 62, 1 << 62), (1, 1)])
def test_a_gguf_file_that_declares_more_than_it_holds_is_refused(tmp_path: Path, counts: tuple[int, int]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"\xff" * 64)
    with pytest.raises(UserError, match="cannot be read as the GGUF file"):
        convert_gguf(file, sha256="0" * 64, cache=tmp_path / "cache")


@contextmanager
def package_index(files: Path) -> Iterator[str]:
    """A package index over HTTP: `simple/carrier/` lists what lies in the folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    links = "".join(f'<a href="../../{file.name}">{file.name}</a>' for file in files.glob("carrier*"))
    (files / "simple" / "carrier").mkdir(parents=True)
    (files / "simple" / "carrier" / "index.html").write_text(f"<html><body>{links}</body></html>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/simple/"
        finally:
            server.shutdown()


def test_what_an_index_sends_is_verified_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    wheel = build_wheel(tmp_path / "files")
    meant, cache = file_sha256(wheel), tmp_path / "cache"
    with package_index(tmp_path / "files") as address:
        monkeypatch.setenv("PIP_INDEX_URL", address)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        genuine = wheel.read_bytes()
        with zipfile.ZipFile(wheel, "a") as archive:
            archive.writestr("carrier/planted.py", "raise SystemExit")
        with pytest.raises(UserError, match=f"expected sha256 {meant}, got .* from the index; correct the pin"):
            fetch("carrier==1.0", meant, cache)
        assert not [path for path in cache.rglob("*") if path.is_file()]
        wheel.write_bytes(genuine)
        assert fetch("carrier==1.0", meant, cache).read_bytes() == genuine


def test_a_member_of_a_tar_that_links_out_of_it_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not yours")
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        for name, target in (("rows.csv", "../secret"), ("folder", str(tmp_path))):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    for member in ("rows.csv", "folder/secret", "folder"):
        with pytest.raises(UserError, match=r"has no member|is not a regular file"):
            extract(tmp_path / "evil.tar.gz", member, tmp_path / "out" / "rows.csv")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_version_whose_files_were_changed_is_refused(tmp_path: Path) -> None:
    tracker = Tracker(tiny_experiment(tmp_path / "experiment", name="tiny-hostile"))
    run_id = MlflowClient(tracking_uri()).create_run(tracker.experiment_id).info.run_id
    register("tiny-hostile", run_id, make_prompt().save(tmp_path / "prompt"), measure([0], [0]))
    assert load_registered("tiny-hostile", "1").provenance == make_prompt().provenance

    stored = MlflowClient(tracking_uri()).get_model_version_download_uri("tiny-hostile", "1")
    folder = Path(download_artifacts(stored)) / "artifacts" / "prompt"  # of a local store, the place itself
    make_prompt(template="Say yes to {text}").save(folder)
    with pytest.raises(UserError, match="are not those that were registered; register the prompt anew"):
        load_registered("tiny-hostile", "1")


@pytest.mark.parametrize("version", ["../1", "1/../2", "champion@x", "", "²", "1; drop table", "champion\n"])
@pytest.mark.parametrize("name", ["tiny-hostile", "../up", "a' OR name = 'b", "x/y"])
def test_names_of_versions_that_are_none_are_refused(name: str, version: str) -> None:
    with pytest.raises(UserError, match="no such registered prompt"):
        load_registered(name, version)
