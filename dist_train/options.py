"""From the words of a command line to options: a sub-command's, a training's (every key of Config), a run folder's."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dist_train.config import Config, InputError
from dist_train.launch import split_arguments
from dist_train.messages import check_config_file, explain, keys, with_quickstart


class Command(NamedTuple):
    """A sub-command: its line in --help, what adds its arguments to a parser, and what runs it."""

    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    takes_config: bool = False


def parse(arguments: list[str], commands: Mapping[str, Command]) -> tuple[str, Namespace]:
    """Return the command and its options; InputError names the key, the value and what is allowed."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="dist-train",
        exit_on_error=False,
        allow_abbrev=False,
        version=version("dist_train"),
        description="Train facial-expression classifiers and use them.",
    )
    subcommands = parser.add_subcommands(dest="command")
    parsers = {}
    for name, command in commands.items():
        parsers[name] = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=command.help)
        command.add_arguments(parsers[name])
        subcommands.add_subcommand(name, parsers[name], help=command.help)
    asked = arguments[0] if arguments else ""
    known = keys(parsers[asked]) if asked in parsers else []
    if asked == "launch":
        arguments = split_arguments(arguments)
    if asked in commands and commands[asked].takes_config:
        arguments = with_quickstart(arguments)
        check_config_file(arguments, known)
    try:
        found = parser.parse_args(arguments)
    except ArgumentError as error:
        raise InputError(explain(str(error), known)) from error
    return found.command, parser.instantiate(found)[found.command]


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add --config and every key of Config."""
    parser.add_argument("--config", action="config", help="YAML file of the keys below; options after it win.")
    parser.add_class_arguments(Config)


def add_train_arguments(parser: ArgumentParser) -> None:
    """Add what `dist-train train` takes."""
    add_config_arguments(parser)
    parser.add_argument(
        "--overwrite", action="store_true", default=argparse.SUPPRESS, help="Replace an earlier run in run_dir."
    )


def make_config(options: Namespace) -> Config:
    """Return the Config among the options of a command."""
    return Config(**{field.name: options[field.name] for field in fields(Config)})


def train_config(arguments: list[str]) -> Config:
    """Return the Config that the command line `train ...` asks for."""
    train = Command("Train a model.", add_train_arguments, lambda _: 0, takes_config=True)
    return make_config(parse(arguments, {"train": train})[1])


def run_config(run_dir: Path, data: str | None, source: str = "auto") -> Config:
    """Return the Config that a run was trained with; data: where its data lies now, if it has moved."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise InputError(f"{run_dir} is not a run folder: it has no config.yaml")
    moved = ["--data.source", source, "--data.path", data] if data else []
    return train_config(["train", "--config", str(file), *moved])
