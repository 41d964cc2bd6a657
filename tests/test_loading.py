"""From a reference to a backbone: what is remembered of it, and what is refused."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from softprompt.backbone import hash_folder
from softprompt.errors import UserError
from softprompt.loading import load_backbone, load_base, locate
from softprompt.packages import file_sha256
from softprompt.spec.model import HubModel, LocalModel, PackageModel
from tests.test_backbone import write_gguf
from tests.test_packages import BACKEND, build_sdist
from tests.tiny import tiny_model, tiny_tokenizer


def test_a_local_model_is_remembered_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    base = load_backbone(LocalModel(path="model"), precision="float32", device="cpu")
    assert base.reference == {"kind": "local", "path": str(tmp_path / "model")}

    monkeypatch.chdir("/")
    again = load_base(base.reference, precision="float32", device="cpu")
    assert again.weights_sha256 == base.weights_sha256


@pytest.mark.parametrize("reference", [{}, {"kind": "mine", "path": "x"}, {"kind": "hub", "id": "a/b"}])
def test_a_reference_that_says_nothing_is_refused(reference: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"does not say where its base model is, .* give both to Predictor"):
        load_base(reference, precision="float32")


@pytest.mark.parametrize("name", ["a b", "../up", "a/b/c", "-x", ""])
def test_a_name_that_is_none_of_the_hub_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"model\.id: is no name of the hub, found .* write owner/name"):
        locate(HubModel(id=name, revision="abc"), tmp_path)


def test_a_model_of_the_hub_cannot_be_fetched_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.id: somebody/tiny at abc cannot be fetched .*; check the network, or"):
        locate(HubModel(id="somebody/tiny", revision="abc"), tmp_path)


def test_a_prompt_from_elsewhere_gets_no_source_distribution_built(tmp_path: Path, index: Path) -> None:
    ran = tmp_path / "ran"
    sha256 = file_sha256(build_sdist(index, f"open({str(ran)!r}, 'w').close()\n" + BACKEND))
    with pytest.raises(UserError, match=r"carrier==1\.0: could not be fetched"):
        locate(PackageModel(package="carrier==1.0", sha256=sha256, file="model.gguf"), tmp_path / "cache")
    assert not ran.exists()


def test_members_of_one_package_stand_apart(tmp_path: Path) -> None:
    archive = tmp_path / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as package:
        for seed, name in enumerate(("a/model.gguf", "b/model.gguf")):
            write_gguf(tmp_path / "model.gguf", seed=seed)
            package.write(tmp_path / "model.gguf", name)
    sha256 = file_sha256(archive)
    cached = tmp_path / "cache" / "packages" / sha256 / archive.name
    cached.parent.mkdir(parents=True)
    archive.rename(cached)

    def hash_of(member: str) -> str:
        return hash_folder(locate(PackageModel(package="carrier==1.0", sha256=sha256, file=member), tmp_path / "cache"))

    assert hash_of("a/model.gguf") != hash_of("b/model.gguf")
    assert hash_of("a/model.gguf") == hash_of("a/model.gguf")
