"""A start that cannot succeed ends with one clear line, a status that is not 0, and no traceback."""

import signal
import socket
import time

import pytest

from tests.support.servers.fake_engine import make_model_folder
from tests.support.servers.server_process import FAKE, REAL, ServerProcess, free_port, the_error_line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--max-model", "10"], "--max-model"),
        (["--max-num-seqs", "many"], "--max-num-seqs"),
        (["--chat-template", "/no/such/file"], "--chat-template"),
    ],
)
def test_a_flag_that_cannot_be_used(flags, named):
    assert named in the_error_line(ServerProcess(REAL, *flags))


def test_a_port_out_of_range():
    assert "--port" in the_error_line(ServerProcess(REAL, port=70_000))


def test_a_busy_port_is_found_before_the_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = ServerProcess(REAL, port=port)
        assert str(port) in the_error_line(server)
        assert "engine" not in server.log()


def test_an_address_that_is_not_ours():
    assert "203.0.113.1" in the_error_line(ServerProcess(REAL, "--host", "203.0.113.1"))


@pytest.mark.parametrize("module", [FAKE, REAL])
def test_a_missing_model_folder(module):
    assert "/no/such/model" in the_error_line(ServerProcess(module, "--model", "/no/such/model"))


def test_a_broken_tokenizer(tmp_path):
    (make_model_folder(tmp_path / "model") / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in the_error_line(ServerProcess(FAKE, "--model", str(tmp_path / "model")))


def test_a_broken_chat_template(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for %}")
    model = str(make_model_folder(tmp_path / "model"))
    line = the_error_line(ServerProcess(FAKE, "--model", model, "--chat-template", str(template)))
    assert "template" in line


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_can_be_interrupted(signal_number):
    server = ServerProcess(REAL, port=free_port())
    server.wait_logged("starting the engine")
    time.sleep(0.3)
    server.process.send_signal(signal_number)
    assert server.wait(10) == 0
    assert "Traceback" not in server.log()
