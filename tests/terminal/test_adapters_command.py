"""`stellarbyte adapters` against a real server with two adapters."""

import json
from pathlib import Path

import httpx
import pytest

from tests.support.clients.terminal import CTRL_C, Terminal
from tests.support.servers.server_process import FAKE, running
from tests.terminal.command import Adapted, Command, Result


def test_adapters_are_loaded_listed_replaced_and_unloaded(stellarbyte: Command, adapted: Adapted) -> None:
    url = adapted.server.url

    def run(*arguments: str) -> Result:
        return stellarbyte("adapters", *arguments, "--url", url)

    loaded = run("load", "mine", "a0")
    assert loaded.status == 0 and loaded.out.startswith("Loaded mine: rank 4, "), loaded.err
    again = run("load", "mine", "a1")
    assert (again.status, again.out) == (1, "") and again.err.startswith("error: ")
    replaced = run("load", "mine", "a1", "--replace")
    assert replaced.status == 0 and replaced.out != loaded.out
    body = {"model": "mine", "prompt": "the", "max_tokens": 5, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, timeout=30).raise_for_status()
    entries = json.loads(run("list", "--json").out)
    assert [entry | {"object": "adapter"} for entry in entries] == httpx.get(f"{url}/v1/adapters").json()["data"]
    (mine,) = [entry for entry in entries if entry["id"] == "mine"]
    table = [line.split() for line in run("list").out.splitlines()]
    assert table[0] == ["name", "state", "tier", "hash", "rank", "MiB", "running", "requests", "tokens"]
    (line,) = [line for line in table if line[0] == "mine"]
    assert line == ["mine", "ready", mine["tier"], mine["content_hash"][:12], "4", line[5], "0", "1", "5"]
    unloaded = run("unload", "mine")
    assert unloaded.status == 0 and unloaded.out.startswith("Unloaded mine: ")
    assert run("unload", "mine").status == 1


def test_names_stay_whole_on_narrow_screens_and_in_pipes(
    stellarbyte: Command, adapted: Adapted, tmp_path: Path
) -> None:
    url, name = adapted.server.url, "customer-support-v12"
    assert stellarbyte("adapters", "load", name, "a0", "--url", url).status == 0
    try:
        (line,) = [line for line in stellarbyte("adapters", "list", "--url", url).out.splitlines() if name in line]
        assert len(line.split()) == 9
        for columns, has_hashes in ((80, False), (100, True)):
            with Terminal("adapters", "list", "--url", url, home=tmp_path, columns=columns) as terminal:
                assert terminal.wait_end() == 0
                assert (" hash " in terminal.lines[0]) == has_hashes
                (line,) = [line for line in terminal.lines if line.startswith("customer")]
                assert line.split()[:3] == [name, "ready", "slot"]
    finally:
        stellarbyte("adapters", "unload", name, "--url", url)


def test_watching_shows_what_changes_and_ends_on_ctrl_c(adapted: Adapted, tmp_path: Path) -> None:
    url = adapted.server.url
    with Terminal("adapters", "watch", "--interval", "0.05", "--url", url, home=tmp_path) as terminal:
        terminal.wait_for("^a1 ")
        load = {"lora_name": "seen", "lora_path": "a0"}
        httpx.post(f"{url}/v1/load_lora_adapter", json=load, timeout=30).raise_for_status()
        terminal.wait_for("^seen +ready")
        assert terminal.text.count("name") == 1  # one table, drawn anew
        httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "seen"}, timeout=30).raise_for_status()
        terminal.wait_for(r"^a1 [^\n]*\n*\Z")
        terminal.type(CTRL_C)
        assert terminal.wait_end() == 0


def test_loading_needs_the_admin_key(stellarbyte: Command, fake_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FAKE, "--model", fake_model, "--admin-api-key", "sesame") as server:
        monkeypatch.setenv("STELLARBYTE_URL", server.url)
        for arguments in (["load", "x", "y"], ["unload", "x", "--admin-api-key", "wrong"]):
            refused = stellarbyte("adapters", *arguments)
            assert (refused.status, refused.out) == (1, "")
            assert refused.err.startswith("error: The server needs its admin key; give it with --admin-api-key")
        monkeypatch.setenv("STELLARBYTE_ADMIN_API_KEY", "sesame")
        assert stellarbyte("adapters", "load", "x", "y") == Result(1, "", "error: The fake engine has no adapters.\n")
        assert stellarbyte("adapters", "list") == Result(0, "The server has no adapters.\n", "")
