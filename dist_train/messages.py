"""Clear words for the command line: config files are checked key by key, a parser's errors are put in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from dist_train.config import InputError, nearest


def keys(parser: ArgumentParser) -> list[str]:
    """Return the dotted keys of a config file."""
    return [key for key, _ in parser.get_defaults().items() if key != "config"]


def with_quickstart(arguments: list[str]) -> list[str]:
    """Put first, where neither a config nor data is named: the resumed run's config, else the quickstart's."""
    names = {argument.split("=")[0] for argument in arguments}
    if names & {"--config", "--data.path", "--data.source"}:
        return arguments
    run_dir = next(_values(arguments, "--run_dir"), "")
    resumed = Path(run_dir) / "config.yaml"
    if "--resume" in names and run_dir and resumed.is_file():
        return [arguments[0], "--config", str(resumed), *arguments[1:]]
    return [arguments[0], "--config", str(files("dist_train.configs") / "quickstart.yaml"), *arguments[1:]]


def check_config_file(arguments: list[str], keys: list[str]) -> None:
    """Refuse config files that are not mappings of known keys; the values are the parser's business."""
    for file in map(Path, filter(None, _values(arguments, "--config"))):
        try:
            settings = yaml.safe_load(file.read_text())
        except OSError as error:
            raise InputError(f"--config: {file} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"--config: {file} is not YAML: {' '.join(str(error).split())}") from error
        for key in _walk(settings if settings is not None else {}, file, keys):
            if key not in keys:
                raise InputError(f"{file}: {_unknown(key, keys)}")


def _values(arguments: list[str], option: str) -> Iterator[str]:
    """Yield what is given for an option, as `--option value` or as `--option=value`."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return (value for name, value in pairwise(words) if name == option)


def _walk(settings: Any, file: Path, keys: list[str], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a config file's mapping."""
    if not isinstance(settings, dict):
        where = f"{prefix.removesuffix('.')} is" if prefix else "holds"
        raise InputError(f"{file}: {where} {settings!r}; expected a mapping of keys to values")
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if any(known.startswith(f"{key}.") for known in keys):
            yield from _walk(value, file, keys, f"{key}.")
        else:
            yield key


def _unknown(key: str, keys: list[str]) -> str:
    return f"{key}: no such key{nearest(key, keys)}; dist-train train --help lists them"


def explain(message: str, keys: list[str]) -> str:
    """Say a parser's message in one line, with the key, the value and what is allowed."""
    if found := re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", message):
        return _unknown(found[1], keys)
    key = re.search(r'Parser key "([^"]+)":\s+(?:Expected|Does not validate)', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if not key or not value:
        return " ".join(message.split())
    allowed = " or ".join(_kind_in_words(kind) for kind in re.findall(r"Expected a (.+?)(?:\. Got|\n|$)", message))
    hint = ' (in YAML, put "no" in quotes)' if value[1] == "False" and " no" in allowed else ""
    return f"{key[1]}: {value[1].strip()!r} is not allowed; expected {allowed}{hint}"


def _kind_in_words(kind: str) -> str:
    if choices := re.search(r"Literal\[(.+)\]", kind):
        return f"one of {choices[1].replace(chr(39), '')}"
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "NoneType": "null",
        "list": "a list, as [a, b]",
    }
    name = re.sub(r"<class '(\w+)'>", r"\1", kind)
    return words.get(name, name)
