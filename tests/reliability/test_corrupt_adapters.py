"""A hundred adapters that must not be served, offered to a server that is busy."""

import re
import threading
from pathlib import Path

import httpx
import pytest
import torch

from stellarbyte import ByteModelConfig, ByteTransformer
from tests.support.models.bad_adapters import REFUSED, write_adapter
from tests.support.models.hugging_face import END, tiny_tokenizer
from tests.support.servers.processes import resident_bytes
from tests.support.servers.server_process import REAL, running

MAX_GROWTH_BYTES = 16 * 2**20
NUM_TOKENS = 20
NUM_ROUNDS = 2


def make_model(folder: Path) -> Path:
    """A model whose modules are those that the broken adapters were made for."""
    torch.manual_seed(0)
    config = ByteModelConfig(
        vocab_size=300, hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=256, eos_token_id=2,
    )  # fmt: skip
    ByteTransformer(config).save_pretrained(folder)
    tiny_tokenizer(300).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(f'{{"eos_token": "{END}"}}')
    return folder


class Traffic:
    """Answers of the base and of a good adapter, one after the other, all equal to the first."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)
        self._stop = threading.Event()
        self.num_answers, self.failures = 0, []
        self._expected = {model: self._answer(model) for model in ("model", "good")}
        assert not self.failures and len(set(self._expected.values())) == 2
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _answer(self, model: str) -> str:
        body = {"model": model, "prompt": [5, 6, 7], "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        response = self._http.post("/v1/completions", json=body)
        if response.status_code != 200:
            self.failures.append(response.text)
            return response.text
        return response.json()["choices"][0]["text"]

    def _run(self) -> None:
        while not self._stop.is_set():
            for model, expected in self._expected.items():
                text = self._answer(model)
                self.num_answers += 1
                if text != expected:
                    self.failures.append(text)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._http.close()


@pytest.fixture
def offered(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for name in ["good", *(f"bad{i}" for i in range(len(REFUSED)))]:
        (folder / name).mkdir(parents=True)
        write_adapter(folder / name)
    for i, (edit, _) in enumerate(REFUSED.values()):
        edit(folder / f"bad{i}")
    return folder


@pytest.mark.slow
def test_corrupt_adapters_are_refused_truly_and_disturb_nobody(tmp_path: Path, offered: Path) -> None:
    model = make_model(tmp_path / "model")
    outside = [str(tmp_path / "model"), "../model", "good/../../model", "/proc/self", "nothing", "bad0\0", "http://x/y"]
    flags = ["--model", str(model), "--adapter-dir", str(offered), "--max-lora-rank", "8", "--dtype", "float32"]
    with (
        running(REAL, *flags, "--allow-local-admin") as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        traffic = Traffic(server.url)
        try:
            sizes = []
            for _ in range(NUM_ROUNDS):
                for i, (case, (_, said)) in enumerate(REFUSED.items()):
                    response = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": f"bad{i}"})
                    check_refusal(case, response, said)
                for path in outside:
                    response = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
                    assert response.status_code == 404 and "There is no adapter" in response.json()["error"]["message"]
                sizes.append(resident_bytes(server.engine_pid()))
            for i, (case, (_, said)) in enumerate(REFUSED.items()):  # as a user, who only names it
                check_refusal(case, http.post("/v1/completions", json={"model": f"bad{i}", "prompt": [5]}), said)
        finally:
            traffic.stop()
        cards = {card["id"]: card for card in http.get("/v1/adapters").json()["data"]}
        assert cards.pop("good")["tier"] == "slot"
        assert {card["bytes"] for card in cards.values()} == {0} and "x" not in cards
        assert {card["tier"] for card in cards.values()} == {"disk"}
        assert "Traceback" not in server.log()
    assert len(REFUSED) + len(outside) >= 100
    assert traffic.failures == [] and traffic.num_answers > 20
    assert sizes[-1] - sizes[0] < MAX_GROWTH_BYTES
    print(f"{traffic.num_answers} answers beside {NUM_ROUNDS * (len(REFUSED) + len(outside))} refusals, memory {sizes}")


def check_refusal(case: str, response: httpx.Response, said: str) -> None:
    """What is no pair of plain files is not an adapter at all; everything else is refused with its reason."""
    error = response.json()["error"]
    if response.status_code == 404:
        assert case.startswith(("no config", "no weights", "config is a", "weights are a")), (case, error)
    else:
        assert response.status_code == 400 and re.search(said, error["message"]), (case, error)
