"""Real packages, built here and fetched with the real pip from a folder."""

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from softprompt.errors import UserError
from softprompt.packages import extract, fetch, file_sha256, move_in

ROWS = b"text,label\nfine,good\n"
# A backend of its own, so that pip needs nothing else to read the metadata.
BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(folder, config=None):
    info = pathlib.Path(folder, "carrier-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: carrier\\nVersion: 1.0\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\n")
    return info.name
def build_wheel(*args): raise AssertionError("nothing may be built")
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def build_sdist(folder: Path, backend: str = BACKEND) -> Path:
    files = {
        "carrier-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n",
        "carrier-1.0/pyproject.toml": PYPROJECT.encode(),
        "carrier-1.0/backend.py": backend.encode(),
        "carrier-1.0/rows.csv": ROWS,
        "carrier-1.0/inner.tar.gz": tar_bytes({"deep/rows.csv": ROWS}),
    }
    path = folder / "carrier-1.0.tar.gz"
    path.write_bytes(tar_bytes(files))
    return path


def build_wheel(folder: Path) -> Path:
    path = folder / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carrier/rows.csv", ROWS)
        archive.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        archive.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    return path


def test_each_file_of_a_package_is_found_by_its_hash(index: Path, tmp_path: Path) -> None:
    built = [build_wheel(index), build_sdist(index)]
    for original in built:
        sha256 = file_sha256(original)
        file = fetch("carrier==1.0", sha256, tmp_path / "cache")
        assert file == tmp_path / "cache" / "packages" / sha256 / original.name
        assert file.read_bytes() == original.read_bytes()
    assert not list((tmp_path / "cache" / "packages").glob(".*"))
    assert subprocess.run([sys.executable, "-c", "import carrier"], capture_output=True).returncode == 1


def test_the_cache_serves_without_an_index_and_is_verified_each_time(index: Path, tmp_path: Path) -> None:
    original = build_wheel(index)
    sha256 = file_sha256(original)
    file = fetch("carrier==1.0", sha256, tmp_path)
    original.unlink()
    assert fetch("carrier==1.0", sha256, tmp_path) == file
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match=f"{file.name}: expected sha256 {sha256}, found .* delete this file"):
        fetch("carrier==1.0", sha256, tmp_path)


def test_where_a_wheel_is_asked_for_no_source_distribution_is_looked_into(index: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    evil = f"open({str(ran)!r}, 'w').close()\n" + BACKEND
    sha256 = file_sha256(build_sdist(index, evil))
    with pytest.raises(UserError, match=r"carrier==1\.0: could not be fetched"):
        fetch("carrier==1.0", sha256, tmp_path / "cache", wheel=True)
    assert not ran.exists()
    fetch("carrier==1.0", sha256, tmp_path / "cache")
    assert ran.exists()  # what pip runs where a source distribution is allowed
    wheel = build_wheel(index)
    assert fetch("carrier==1.0", file_sha256(wheel), tmp_path / "cache", wheel=True).name == wheel.name


def test_a_wrong_hash_is_told_with_both(index: Path, tmp_path: Path) -> None:
    found = file_sha256(build_wheel(index))
    with pytest.raises(UserError, match=f"carrier==1.0: expected sha256 {'0' * 64}, got {found} from the index"):
        fetch("carrier==1.0", "0" * 64, tmp_path)
    assert not list((tmp_path / "packages").iterdir())


@pytest.mark.usefixtures("index")
def test_a_package_that_no_index_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"carrier==1\.0: could not be fetched .*package index .* filled cache in"
    ) as told:
        fetch("carrier==1.0", "0" * 64, tmp_path)
    assert str(tmp_path / "packages") in str(told.value)
    assert "\n" not in str(told.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "packages").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be written .* SOFTPROMPT_CACHE"):
        fetch("carrier==1.0", "0" * 64, tmp_path)


@pytest.mark.parametrize(
    ("build", "member"),
    [
        (build_wheel, "carrier/rows.csv"),
        (build_sdist, "carrier-1.0/rows.csv"),
        (build_sdist, "carrier-1.0/inner.tar.gz!deep/rows.csv"),
    ],
)
def test_members_are_extracted(build: Callable[[Path], Path], member: str, tmp_path: Path) -> None:
    archive = build(tmp_path)
    target = tmp_path / "new" / "rows.csv"
    assert extract(archive, member, target).read_bytes() == ROWS
    assert list(target.parent.iterdir()) == [target]


def test_a_wheel_within_an_archive_is_reached(tmp_path: Path) -> None:
    outer = tmp_path / "outer.tar.gz"
    outer.write_bytes(tar_bytes({"in.whl": build_wheel(tmp_path).read_bytes()}))
    assert extract(outer, "in.whl!carrier/rows.csv", tmp_path / "rows.csv").read_bytes() == ROWS


def test_a_missing_member_is_named_with_its_archive(tmp_path: Path) -> None:
    for archive in (build_wheel(tmp_path), build_sdist(tmp_path)):
        with pytest.raises(UserError, match=f"{archive.name}: has no member absent.csv"):
            extract(archive, "absent.csv", tmp_path / "rows.csv")
    with pytest.raises(UserError, match=r"carrier-1\.0\.tar\.gz!carrier-1\.0/inner\.tar\.gz: has no member absent"):
        extract(tmp_path / "carrier-1.0.tar.gz", "carrier-1.0/inner.tar.gz!absent", tmp_path / "rows.csv")
    assert not (tmp_path / "rows.csv").exists()


def test_links_and_folders_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not yours")
    archive = tmp_path / "links.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"member-{kind.decode()}")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    zipped = tmp_path / "links.zip"
    with zipfile.ZipFile(zipped, "w") as archive_file:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive_file.writestr(link, str(secret))
    members = [(archive, f"member-{kind}") for kind in "125"] + [(zipped, "link")]
    for where, member in members:
        with pytest.raises(UserError, match="is not a regular file"):
            extract(where, member, tmp_path / "target")


def test_a_path_that_climbs_is_written_to_the_target_alone(tmp_path: Path) -> None:
    archive = tmp_path / "climbing.tar.gz"
    archive.write_bytes(tar_bytes({"../../climbed": ROWS}))
    before = set(tmp_path.parent.parent.iterdir())
    assert extract(archive, "../../climbed", tmp_path / "out" / "target").read_bytes() == ROWS
    assert set(tmp_path.parent.parent.iterdir()) == before


def test_damage_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    whole = gzip.decompress(tar_bytes({"rows.csv": bytes(range(256)) * 4096}))
    archive = tmp_path / "short.tar.gz"
    archive.write_bytes(gzip.compress(whole)[:-2000])
    target = tmp_path / "target"
    target.write_bytes(b"before")
    with pytest.raises(UserError, match=r"short\.tar\.gz"):
        extract(archive, "rows.csv", target)
    assert target.read_bytes() == b"before"
    (tmp_path / "text.whl").write_bytes(b"no archive at all")
    with pytest.raises(UserError, match=r"text\.whl: is not a readable wheel, zip or tar archive"):
        extract(tmp_path / "text.whl", "x", target)


def make_folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_folder_is_moved_in_and_replaces_another(tmp_path: Path) -> None:
    for content in ("one", "two"):
        move_in(make_folder(tmp_path / "made", content), tmp_path / "place", keep=lambda: False)
        assert [f.name for f in tmp_path.iterdir()] == ["place"]
        assert (tmp_path / "place" / "file").read_text() == content


def test_a_folder_that_is_to_stay_stays(tmp_path: Path) -> None:
    made, place = make_folder(tmp_path / "made", "new"), make_folder(tmp_path / "place", "old")
    move_in(made, place, keep=lambda: True)
    assert (place / "file").read_text() == "old"


def test_a_move_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    place = make_folder(tmp_path / "place", "old")
    with pytest.raises(FileNotFoundError):
        move_in(tmp_path / "absent", place, keep=lambda: False)
    assert [f.name for f in tmp_path.iterdir()] == ["place"]
    assert (place / "file").read_text() == "old"


def test_many_that_move_into_a_harmed_folder_at_once_all_succeed(tmp_path: Path) -> None:
    place = make_folder(tmp_path / "place", "harmed")
    made = [make_folder(tmp_path / f"made{n}", "sound") for n in range(8)]

    def is_sound() -> bool:
        try:
            return (place / "file").read_text() == "sound"
        except OSError:
            return False

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda folder: move_in(folder, place, is_sound), made))
    assert is_sound()
    assert not list(tmp_path.glob(".old-*"))


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(ROWS)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(ROWS).hexdigest()
