"""The documents say what is there: commands with their options, messages, links, and an API reference that is fresh."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from controller.api.reference import TARGET, document, render
from controller.cli.doctor.controller_checks import TESTED_RAY
from tests.support.command_tree import fault_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_OURS = re.compile(r"^(?:\S*/)?(nanofleet(?:-agent)?)(?=\s)")
# What only names a command need not be complete.
_INCOMPLETE = re.compile(r"is missing|arguments|required")


def shell_lines(page: Path) -> Iterator[str]:
    """Yield the lines of every block without a language, continued lines joined."""
    for language, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        if not language:
            yield from block.replace("\\\n", " ").splitlines()


def commands(page: Path) -> list[str]:
    return [line.strip() for line in shell_lines(page) if _OURS.match(line.strip())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_block_exists_with_its_options(page: Path) -> None:
    faults = {line: fault for line in commands(page) if (fault := fault_of(line)) is not None}
    assert faults == {}


def test_there_are_commands_to_check() -> None:
    assert len([line for page in PAGES for line in commands(page)]) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_in_a_sentence_exists(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    named = [" ".join(words.split()) for words in re.findall(r"`(nanofleet(?:-agent)? [^`]+)`", text)]
    said = {words: fault_of(words.replace("…", "")) for words in named if "|" not in words and "*" not in words}
    faults = {words: fault for words, fault in said.items() if fault is not None and not _INCOMPLETE.search(fault)}
    assert faults == {}


@cache
def messages() -> tuple[str, ...]:
    """Return every text in the sources, with … for what is put in."""
    texts = []
    for package in ("core", "controller", "edge_agent"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return tuple(texts)


def is_said(quote: str) -> bool:
    """Say whether some text of ours has the parts of `quote` between its dots, in that order."""
    pattern = re.compile(".*".join(map(re.escape, quote.split("…"))), re.DOTALL)
    return any(pattern.search(text) for text in messages())


def test_every_message_in_the_troubleshooting_is_one_of_ours() -> None:
    quotes = re.findall(r"^> (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quotes) > 15
    assert [quote for quote in quotes if not is_said(quote)] == []


def test_a_message_that_nobody_says_is_found_out() -> None:
    assert not is_said("no controller answers at the address …")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_api_reference_is_fresh() -> None:
    assert (ROOT / TARGET).read_text(encoding="utf-8") == render(document()), "run `make api`"


def test_the_doctor_expects_the_version_of_ray_that_the_tests_run_with() -> None:
    lock = (ROOT / "deploy" / "requirements" / "controller.lock").read_text(encoding="utf-8")
    assert re.search(r"^ray==(\d+\.\d+)\.", lock, re.MULTILINE)[1] == TESTED_RAY  # type: ignore[index]  # it is there
