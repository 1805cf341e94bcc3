"""Commands that users are told to run, run against the real server; client programs: test_client_examples.py."""

import os
import subprocess
import sys

from tests.support.over_http import run
from tests.support.servers.server_process import ROOT


def test_the_curl_line_printed_at_start_works_as_it_is(demo_server) -> None:
    (line,) = [line for line in demo_server.log().splitlines() if line.startswith("curl ")]
    result = run(demo_server.url, "bash", "-c", line)
    assert result.stdout.startswith("data: {") and result.stdout.rstrip().endswith("data: [DONE]")
    assert "Paris" in result.stdout


def test_the_readmes_curl_command_answers(demo_server) -> None:
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        command = text[text.index("curl -N") : text.index("}'", text.index("curl -N")) + 2]
        result = run(demo_server.url, "bash", "-c", command.replace("http://127.0.0.1:8000", demo_server.url))
        assert "Paris" in result.stdout and result.stdout.rstrip().endswith("data: [DONE]")


def test_a_model_whose_texts_are_of_no_use_ends_the_storytellers_collection(fake_server, tmp_path) -> None:
    """The fake engine repeats the request, again and again."""
    file = tmp_path / "stories.jsonl"
    command = [sys.executable, "examples/storyteller/generate.py", "--url", fake_server.url, "--out", str(file)]
    ended = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and not file.exists()
    assert "error: fake writes no text that is kept: 100 repeats." in ended.stderr
