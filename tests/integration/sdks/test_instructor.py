"""instructor, unchanged. It allows only older releases of openai than we do, so it has an environment of its own."""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

from tests.support.models.references import MODEL_NAME

PROGRAM = Path(__file__).with_name("instructor_extraction.py")


@pytest.mark.slow
def test_every_mode_of_instructor_gives_a_checked_object(demo_server, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "instructor>=1.11"], capture_output=True, text=True
    )
    if installed.returncode != 0:
        pytest.skip(f"pip could not install instructor: {installed.stderr[-300:]}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, PROGRAM, demo_server.url, MODEL_NAME]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    people = json.loads(result.stdout)
    assert len(people) == 3 and all(person["age"] == 25 and "Jason" in person["name"] for person in people.values())
