"""Reads the Dockerfile and YAML files of several documents, for the tests of this folder."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.servers.server_process import ROOT

DOCKER = ROOT / "docker"


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction of a Dockerfile: `stage` is the name after AS, "" before the first FROM."""

    stage: str
    name: str
    arguments: str

    def words(self) -> list[str]:
        """The arguments of an exec form, or of a form with words."""
        return json.loads(self.arguments) if self.arguments.startswith("[") else shlex.split(self.arguments)


def read_dockerfile() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    stage = ""
    instructions = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, arguments = line.split(maxsplit=1)
        if name == "FROM":
            _, _, stage = arguments.partition(" AS ")
        instructions.append(Instruction(stage=stage, name=name, arguments=re.sub(r"\s+", " ", arguments)))
    return instructions


def image_stages(variant: str) -> list[str]:
    """The stages whose instructions shape the final image of one variant, in order."""
    parents = {}
    for instruction in read_dockerfile():
        if instruction.name == "FROM":
            parents[instruction.stage] = instruction.arguments.partition(" AS ")[0].replace("${VARIANT}", variant)
    stages = [instruction.stage for instruction in read_dockerfile()][-1:]  # the last one is what `docker build` makes
    while stages[0] in parents:
        stages.insert(0, parents[stages[0]])
    return stages[1:]  # without the base image, which is nobody's stage


def image_environment(variant: str) -> dict[str, str]:
    """The variables that the image sets; $PATH stays as it is written."""
    stages = image_stages(variant)
    return dict(
        word.split("=", 1)
        for instruction in read_dockerfile()
        if instruction.name == "ENV" and instruction.stage in stages
        for word in instruction.words()
    )


def read_yaml(path: Path) -> list[dict[str, Any]]:
    """Every document of the file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
