"""The YAML in the documentation is valid: a whole experiment as it stands, a part put into the default one."""

import re
from pathlib import Path

import pytest
import yaml

from softprompt.spec import load_experiment, validate_experiment

ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(block, id=f"{file.name}-{n}")
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for n, block in enumerate(re.findall(r"```yaml\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL))
    if set(yaml.safe_load(block)) & {"name", "model", "data", "labels", "search"}
]


@pytest.mark.parametrize("block", BLOCKS)
def test_yaml_of_the_docs_is_valid(block: str):
    tree = yaml.safe_load(block)
    default = yaml.safe_load((ROOT / "experiments" / "movie-sentiment.yaml").read_text(encoding="utf-8"))
    validate_experiment(tree if "name" in tree else {**default, **tree}, "docs")


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_experiments_are_valid(file: Path):
    assert load_experiment(file).name == file.stem
