"""Registers ByteTransformer with transformers' Auto classes when they are imported, and not before.

Importing them, or the model class, takes seconds, and a server uses neither.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
AUTO_MODEL = "transformers.models.auto.modeling_auto"
OUR_MODEL = "stellarbyte.model.transformer"


def register_when_imported() -> None:
    """Register config and model: now if transformers' modules are loaded, otherwise right after their import."""
    for name, register in ((AUTO_CONFIG, _register_config), (AUTO_MODEL, _register_model)):
        if name in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _AfterImport(name, register))


def register_model_if_wanted() -> None:
    """Called at the end of the model's module, which may be imported before the Auto classes."""
    if AUTO_MODEL in sys.modules:
        _register_model()


def _register_config() -> None:
    from stellarbyte.config import ByteModelConfig

    sys.modules[AUTO_CONFIG].AutoConfig.register(ByteModelConfig.model_type, ByteModelConfig, exist_ok=True)


def _register_model() -> None:
    ours = sys.modules.get(OUR_MODEL)
    if ours is not None and not hasattr(ours, "ByteTransformer"):
        return  # being imported; calls `register_model_if_wanted` at its end
    from stellarbyte.config import ByteModelConfig
    from stellarbyte.model.transformer import ByteTransformer

    auto = sys.modules[AUTO_MODEL]
    auto.AutoModelForCausalLM.register(ByteModelConfig, ByteTransformer, exist_ok=True)
    # By these names, transformers' Trainer knows which models' labels it must shift when it smooths them.
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ByteModelConfig.model_type] = ByteTransformer.__name__


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as usual and calls `action` after its execution."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenCall(spec.loader, self.action)
        return spec


class _ThenCall(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action()
