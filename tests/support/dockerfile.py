"""Dockerfiles, read far enough to check them and to run their steps where no engine is."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of one stage; `words` is what stands after its name, continued lines joined."""

    stage: int
    name: str
    words: str

    @property
    def arguments(self) -> list[str]:
        return shlex.split(self.words)


def read_dockerfile(path: Path) -> list[Instruction]:
    """Return the instructions in order; those before the first stage are of stage -1."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    stage, instructions = -1, []
    for text in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if text.strip():
            name, _, words = text.partition(" ")
            stage += name == "FROM"
            instructions.append(Instruction(stage, name, words))
    return instructions
