"""From a YAML file and `--set` overrides to a valid experiment, or to one sentence that says why not."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from softprompt.errors import UserError
from softprompt.spec.experiment import ExperimentSpec

_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What reading raises: ValueError for bytes that are no UTF-8, or a date that is none, as 2024-02-30."""


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> ExperimentSpec:
    """Read and validate one experiment; `overrides` are `dotted.key=value`, the value written as YAML.

    Raises UserError, naming the file and the dotted key, for anything that is not a valid experiment.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of an experiment YAML") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the path of an experiment YAML") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of an experiment YAML") from None
    except _NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML: {_locate(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: an experiment is a mapping of keys, found {type(tree).__name__}")
    for override in overrides or []:
        _set(tree, override)
    return validate_experiment(tree, str(path))


def validate_experiment(tree: dict[str, Any], where: str) -> ExperimentSpec:
    """The experiment that a tree of plain values describes; UserError names the dotted key."""
    try:
        return ExperimentSpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, tree)}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML silently takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def _locate(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected dotted.key=value")
    try:
        value = yaml.load(text, _Loader)
    except _NOT_YAML as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {_locate(error)}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for n, parent in enumerate(parents):
        node = node[_index(node, parent, override)] if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            where = ".".join(parents[: n + 1])
            raise UserError(f"--set {override}: {where} holds a single value, so it has no key {last}")
    node[_index(node, last, override) if isinstance(node, list) else last] = value


def _index(entries: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(entries):
        raise UserError(f"--set {override}: {key} is no index of a list of {len(entries)}; they are counted from 0")
    return int(key)


def _explain(error: ValidationError, tree: Any) -> str:
    first, *rest = error.errors(include_url=False)
    path = _path(first["loc"], tree, missing=first["type"] == "missing")
    message, found = first["msg"].removeprefix("Value error, "), f", found {_shorten(first['input'])}"
    match first["type"]:
        case "extra_forbidden":
            message, found = "no such key; check its spelling", ""
        case "missing":
            message, found = "is required and missing", ""
        case "value_error":
            found = ""
        case "union_tag_invalid":
            path.append("kind")
            message, found = f"must be one of {first['ctx']['expected_tags']}", f", found {first['ctx']['tag']!r}"
        case "union_tag_not_found":
            path.append("kind")
            message, found = "is required and missing", ""
    if first["loc"][-1:] == ("[key]",):
        message = "a key must be text; put it in quotes"
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{'.'.join(path)}{': ' if path else ''}{message}{found}{more}"


def _path(loc: tuple[int | str, ...], tree: Any, *, missing: bool) -> list[str]:
    """The keys of an error's place that stand in the file; pydantic puts the names of union members between them."""
    path: list[str] = []
    node, member_named = tree, False
    for n, key in enumerate(loc):
        last = n == len(loc) - 1
        if isinstance(node, dict) and not last and not member_named and key == node.get("kind", "choices"):
            member_named = True  # the name of a union member, which may also be a key, such as `package`
        elif key in node if isinstance(node, dict) else isinstance(node, list | tuple) and isinstance(key, int):
            node, member_named = node[key], False
            path.append(str(key))
        elif missing and last:
            path.append(str(key))
    return path


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
