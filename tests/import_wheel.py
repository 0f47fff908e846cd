"""Imports every module of an installed wheel: ``python import_wheel.py FOLDER``."""

import importlib
import pkgutil
import sys
from pathlib import Path

folder = Path(sys.argv[1]).resolve() / "moecast"
packages = sorted(path.name for path in folder.iterdir() if path.is_dir())
modules = [f"moecast.{name}" for name in packages]
for name in packages:
    assert (folder / name / "py.typed").exists(), f"{name} has no py.typed"
    found = pkgutil.walk_packages([str(folder / name)], f"moecast.{name}.")
    modules.extend(module.name for module in found if not module.name.endswith("__main__"))
assert (folder / "backends" / "cpu.c").exists(), "the kernels in C are missing"
# These need Triton, which only comes with torch for CUDA, and ttnn, which few machines have.
modules.remove("moecast.backends.cuda")
modules.remove("moecast.backends.ttnn.operations")
for module in modules:
    file = importlib.import_module(module).__file__
    assert file is not None, module
    assert folder in Path(file).parents, f"{module} comes from {file}, not from the wheel"
print(f"{len(modules)} modules imported from the wheel")
