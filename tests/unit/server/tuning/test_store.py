"""What fine-tuning needs to be installed."""

import re
import sys

import pytest

from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.tuning import store


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store.check_training()
    monkeypatch.setattr(store, "find_spec", lambda library: None if library == "accelerate" else object())
    command = re.escape(f"{sys.executable} -m pip install 'stellarbyte[train]'")
    with pytest.raises(SettingsError, match=rf"^--fine-tuning needs accelerate, which is not installed: {command}$"):
        store.check_training()
