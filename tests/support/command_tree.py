"""The commands of `nanofleet` and `nanofleet-agent` as their own parsers know them: words about them must fit."""

import contextlib
import io
import shlex
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, NamedTuple, get_args, get_origin

import typer.main

from controller.cli.app import app
from edge_agent.__main__ import parser as agent_parser

_END = {"<", ">", ">>", "|", "&&", ";", "&"}


class Leaf(NamedTuple):
    """A command that does something, by its words after `nanofleet`."""

    words: tuple[str, ...]
    command: Any

    @property
    def name(self) -> str:
        return " ".join(self.words)

    @property
    def options(self) -> set[str]:
        return {option for parameter in self.command.params for option in parameter.opts}

    @property
    def examples(self) -> list[str]:
        lines = (self.command.epilog or "").splitlines()
        return [line.strip() for line in lines if line.startswith("  ")]


def leaves() -> list[Leaf]:
    """Return every command of `nanofleet`."""
    return list(_below(root(), ()))


def root() -> Any:
    return typer.main.get_command(app)


def fault_of(line: str) -> str | None:
    """Return what is wrong with a command line of ours, without running it; None: nothing."""
    program, *words = shlex.split(line, comments=True)
    words = _before_redirection(words)
    match program.rpartition("/")[2]:
        case "nanofleet":
            return _fault_below(root(), words)
        case "nanofleet-agent":
            return _fault_of_agent(words)
        case _:
            return f"{program} is no command of ours"


def _below(command: Any, words: tuple[str, ...]) -> Iterator[Leaf]:
    children = getattr(command, "commands", None)
    if children is None:
        yield Leaf(words, command)
        return
    for name, child in children.items():
        yield from _below(child, (*words, name))


def _fault_below(command: Any, words: list[str]) -> str | None:
    options = {
        option: parameter
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    arguments, seen, rest = [], set(), list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        if not word.startswith("-") or word == "-":
            if (children := getattr(command, "commands", None)) is not None:
                child = children.get(word)
                return f"{command.name}: no command {word}" if child is None else _fault_below(child, rest)
            arguments.append(word)
        elif name == "--help":
            return None
        elif name not in options:
            return f"{command.name}: no option {name}"
        else:
            seen.add(options[name].name)
            if not options[name].is_flag:
                value = value if has_value else (rest.pop(0) if rest else "")
                if (choices := _choices(options[name])) and value not in choices:
                    return f"{command.name}: {name} cannot be {value!r}"
    missing = [each.name for each in options.values() if each.required and each.name not in seen]
    wanted = [each for each in command.params if each.param_type_name == "argument"]
    least = sum(each.required for each in wanted)
    most = None if any(each.nargs == -1 for each in wanted) else len(wanted)
    if missing:
        return f"{command.name}: {missing[0]} is missing"
    if len(arguments) < least or (most is not None and len(arguments) > most):
        return f"{command.name}: {len(arguments)} arguments"
    return None


def _choices(option: Any) -> set[str]:
    """Return what an option may be given; nothing: anything."""
    descriptor = getattr(option, "type_descriptor", None)
    annotation = getattr(descriptor, "annotation", None)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {str(each.value) for each in annotation}
    return set(get_args(annotation)) if get_origin(annotation) is Literal else set()


def _fault_of_agent(words: list[str]) -> str | None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            agent_parser().parse_args(words)
    except SystemExit as error:
        return None if error.code == 0 else said.getvalue()
    return None


def _before_redirection(words: list[str]) -> list[str]:
    return words[: next((kth for kth, word in enumerate(words) if word in _END), len(words))]
