"""What kustomize makes of a folder: the parts of it that `docker/kubernetes` uses, for machines without kubectl.

`tests/deployment/test_gateway.py` compares it with kubectl's, where that is installed. Names of ConfigMaps get no hash.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

from tests.deployment.files import read_yaml

Object = dict[str, Any]
_FIELDS = {"apiVersion", "kind", "resources", "components", "images", "configMapGenerator", "patches"}


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization, changed by its components and patches; AssertionError for unknown fields."""
    objects: list[Object] = []
    _apply(folder, objects)
    return objects


def find(objects: list[Object], kind: str, name: str = "stellarbyte") -> Object:
    """The one object of this kind and name."""
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def _apply(folder: Path, objects: list[Object]) -> None:
    """In kustomize's order: resources, generators, images; components; then patches."""
    (plan,) = read_yaml(folder / "kustomization.yaml")
    assert plan.keys() <= _FIELDS, plan.keys() - _FIELDS
    for name in plan.get("resources", []):
        path = (folder / name).resolve()
        objects += build(path) if path.is_dir() else read_yaml(path)
    for generator in plan.get("configMapGenerator", []):
        _generate(folder, generator, objects)
    for component in plan.get("components", []):
        _apply((folder / component).resolve(), objects)
    for patch in plan.get("patches", []):
        changes = yaml.safe_load((folder / patch["path"]).read_text() if "path" in patch else patch["patch"])
        if isinstance(changes, list):
            target = find(objects, patch["target"]["kind"], patch["target"]["name"])
            for change in changes:
                _change(target, **change)
        else:
            target = find(objects, changes["kind"], changes["metadata"]["name"])
            target.update(_merged(target, changes))
    for image in plan.get("images", []):
        for container in [each for found in objects for each in _containers(found)]:
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"


def _generate(folder: Path, generator: Object, objects: list[Object]) -> None:
    values = dict(literal.split("=", 1) for literal in generator.get("literals", []))
    for file in generator.get("files", []):
        key, _, name = file.rpartition("=")
        values[key or name] = (folder / name).read_text()
    if generator.get("behavior") == "merge":
        find(objects, "ConfigMap", generator["name"])["data"].update(values)
    else:
        metadata = {"name": generator["name"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": values})


def _change(target: Object, *, op: str, path: str, value: Any = None) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    node: Any = target
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    key = int(last) if isinstance(node, list) else last
    assert op in ("test", "replace", "remove"), op
    if op == "remove":
        del node[key]
    elif op == "replace":
        assert key in node if isinstance(node, dict) else key < len(node), path
        node[key] = value
    else:
        assert node[key] == value, path


def _merged(old: Any, new: Any) -> Any:
    """A strategic merge: maps by keys, lists of named things by names, new ones first; all else replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merged(old.get(key), value) for key, value in new.items()}
    if isinstance(old, list) and isinstance(new, list) and all("name" in each for each in [*old, *new]):
        named = {each["name"]: each for each in old}
        changed = {each["name"]: _merged(named.get(each["name"]), each) for each in new}
        return list((changed | {name: each for name, each in named.items() if name not in changed}).values())
    return copy.deepcopy(new)


def _containers(found: Object) -> list[Object]:
    spec = found.get("spec", {}).get("template", {}).get("spec", {})
    return [*spec.get("initContainers", []), *spec.get("containers", [])]
