import os
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt.data.rows import Placed, format_of, read_file, read_hub, read_package
from softprompt.errors import UserError
from softprompt.packages import file_sha256
from softprompt.spec import HubData, PackageData
from tests.test_packages import ROWS, build_sdist


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, columns: tuple[str, ...] | None = None) -> list[Placed]:
    return list(read_file(path, columns=columns))


def test_csv_knows_its_lines_even_where_cells_span_several(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,label\r\n"two\nlines, one cell",x\r\n\r\nplain,y\r\n')
    assert read(path) == [
        ("a.csv:2", {"text": "two\nlines, one cell", "label": "x"}),
        ("a.csv:5", {"text": "plain", "label": "y"}),
    ]


def test_tsv_leaves_quotes_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "1\t0.5\t\"It's a ''gem''\r\n2\t-1\tplain\r\n")
    assert read(path, ("id", "rating", "text")) == [
        ("a.tsv:1", {"id": "1", "rating": "0.5", "text": "\"It's a ''gem''"}),
        ("a.tsv:2", {"id": "2", "rating": "-1", "text": "plain"}),
    ]


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "text\nä\n"), ("a.tsv", "text\nä\n"), ("a.jsonl", '{"text":"ä"}')]
)
def test_a_byte_order_mark_is_skipped(name: str, text: str, tmp_path: Path) -> None:
    [(_, row)] = read(write(tmp_path, name, b"\xef\xbb\xbf" + text.encode()))
    assert row == {"text": "ä"}


def test_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "x", "n": 1}\n\n{"text": null, "n": 2.5}\n')
    assert read(path) == [("a.jsonl:1", {"text": "x", "n": 1}), ("a.jsonl:3", {"text": None, "n": 2.5})]


def test_parquet(tmp_path: Path) -> None:
    from pyarrow import parquet, table

    parquet.write_table(table({"text": ["x", None], "n": [1, 2]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        ("a.parquet:1", {"text": "x", "n": 1}),
        ("a.parquet:2", {"text": None, "n": 2}),
    ]


def test_a_file_in_a_package(tmp_path: Path) -> None:
    sdist = build_sdist(tmp_path)
    sha256 = file_sha256(sdist)
    (tmp_path / "packages" / sha256).mkdir(parents=True)
    sdist.rename(tmp_path / "packages" / sha256 / sdist.name)
    data = PackageData(
        package="carrier==1.0", sha256=sha256, file="carrier-1.0/inner.tar.gz!deep/rows.csv", format="csv"
    )
    assert list(read_package(data, tmp_path)) == [("rows.csv:2", {"text": "fine", "label": "good"})]
    assert [p.name for p in tmp_path.iterdir()] == ["packages"]
    assert ROWS.decode().count("\n") == 2


BROKEN = [
    ("a.csv", b"text\nok\n\xff\xfe\n", r"a\.csv:3: not UTF-8 at byte 8 of the file \(0xff\)"),
    ("a.csv", b"\xef\xbb\xbf\xff", r"a\.csv:1: not UTF-8 at byte 3 of the file"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe4"}\n', r"a\.jsonl:2: not UTF-8 at byte 16 "),
    ("a.csv", b"text,label\nx,y\nx,y,z\n", r"a\.csv:3: expected 2 cells \(text, label\), found 3"),
    ("a.csv", b'text,label\n"x\ny",1,2\n', r"a\.csv:2: expected 2 cells"),
    ("a.csv", b'text,label\nx,y\n"never closed,y\n', r"a\.csv:3: not a readable row"),
    ("a.tsv", b"text\tlabel\nx\n", r"a\.tsv:2: expected 2 cells .*, found 1"),
    ("a.csv", b"text,label,text\nx,y,z\n", r"a\.csv:1: the header names 'text' twice"),
    ("a.csv", b"text,\nx,y\n", r"a\.csv:1: the header has a column without a name"),
    ("a.csv", b"\n\n", r"a\.csv: no header row found"),
    ("a.csv", b"", r"a\.csv: the file is empty"),
    ("a.parquet", b"", r"a\.parquet: the file is empty"),
    ("a.parquet", b"no parquet", r"a\.parquet: not a readable Parquet file"),
    ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: each line must hold one JSON object, found list"),
    ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON"),
    ("a.jsonl", b"1" * 5000, r"a\.jsonl:1: not valid JSON"),
]


@pytest.mark.parametrize(("name", "content", "told"), BROKEN)
def test_a_broken_file_is_told_with_its_line(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=told):
        read(path)


def test_a_missing_file_a_folder_and_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv: cannot be read \(No such file"):
        read_file(tmp_path / "absent.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_file(tmp_path, format="csv")
    with pytest.raises(UserError, match=r"data\.format to one of csv, tsv, jsonl, parquet"):
        format_of(Path("rows.xlsx"))


OFFLINE = """
from softprompt.data.rows import read_hub
from softprompt.errors import UserError
from softprompt.spec import HubData
try:
    list(read_hub(HubData(id="nobody/nothing", revision="main"), "train"))
except UserError as error:
    print(error)
"""


def test_an_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("nobody/nothing: split train at revision main could not be loaded"), done.stderr
    assert done.stdout.count("\n") == 1


def test_a_dataset_in_the_hub_s_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)  # where there is no hub, `datasets` takes an id for a folder
    folder = Path("somebody", "reviews")
    folder.mkdir(parents=True)
    write(folder, "train.csv", "text,label\nfine,1\n")
    data = HubData(id=str(folder), revision="main")
    assert list(read_hub(data, "train")) == [(f"{folder}/train:1", {"text": "fine", "label": 1})]
    with pytest.raises(UserError, match="split absent at revision main could not be loaded"):
        list(read_hub(data, "absent"))
