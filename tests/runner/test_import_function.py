"""Functions named in the configuration, and the error for each reason why one cannot be loaded."""

from pathlib import Path

import pytest

from agl.errors import ConfigError
from agl.runner.import_function import load_function

MODULE = """
LIMIT = 3

def run(task):
    return task + LIMIT
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with user code as the current folder; sys.path is restored afterwards."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def write(project: Path, name: str, text: str) -> None:
    (project / f"{name}.py").write_text(text)


def test_a_function_of_a_module_in_the_current_folder_is_found(project: Path) -> None:
    write(project, "ref_found", MODULE)
    assert load_function("ref_found:run", "train.agent")(4) == 7


def test_a_function_of_a_module_in_a_package_is_found(project: Path) -> None:
    (project / "ref_package").mkdir()
    write(project / "ref_package", "agent", MODULE)
    assert load_function("ref_package.agent:run", "train.agent")(1) == 4


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module:run", "train.agent: no_such_module:run: there is no module 'no_such_module'"),
        ("ref_bad.nothing:run", "there is no module 'ref_bad.nothing'"),
        ("ref_user:absent", "defines no 'absent'"),
        ("ref_user:LIMIT", "is a int, expected a function"),
        ("ref_imports:run", "importing ref_imports needs 'no_such_dependency', which is not installed"),
        ("ref_raises:run", "importing ref_raises raised ZeroDivisionError"),
        ("ref_exits:run", "importing ref_exits raised SystemExit: 3"),
        ("ref_user", "not of the form module:function"),
    ],
)
def test_the_error_names_what_cannot_be_loaded(project: Path, reference: str, message: str) -> None:
    (project / "ref_bad").mkdir()
    write(project, "ref_user", MODULE)
    write(project, "ref_imports", "import no_such_dependency")
    write(project, "ref_raises", "1 / 0")
    write(project, "ref_exits", "raise SystemExit(3)")
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load_function(reference, "train.agent")
