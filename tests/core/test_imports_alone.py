"""Every module imports in a process that has imported no other module of its package."""

import pytest

from tests.core.test_imports import ALLOWED, imports, modules, run, top

IMPORT_EACH_ALONE = """
import gc, importlib, os, sys
ours, others = (line.split() for line in sys.stdin)
for name in others:  # Once, so that each process below pays for the modules of the package only.
    holder, _, attribute = name.rpartition(".")
    try:
        getattr(importlib.import_module(holder), attribute) if holder else importlib.import_module(name)
    except (ImportError, AttributeError):
        pass
gc.freeze()

def import_alone(name):
    if os.fork():
        return os.wait()
    try:
        importlib.import_module(name)
        for below in ours:
            if below.rpartition(".")[0] == name:  # A package is imported before its modules in any case.
                import_alone(below)
    except BaseException as error:
        print(f"{name}: {error!r}", flush=True)
    os._exit(0)

import_alone(ours[0])
"""


@pytest.mark.parametrize("package", ALLOWED)
def test_every_module_imports_alone(package: str) -> None:
    ours = [module for module in modules() if top(module) == package and not module.endswith("__main__")]
    others = {name for module in ours for name in imports()[module] if top(name) != package}
    assert run(IMPORT_EACH_ALONE, f"{' '.join(ours)}\n{' '.join(sorted(others))}\n") == ""
