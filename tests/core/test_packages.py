"""The packages as pip reads them: one version, required by name, so that a wheel installs on any machine."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = Path(__file__).parents[2] / "packages"


def test_packages_require_agl_core_by_name_in_their_own_version() -> None:
    projects = [tomllib.loads(path.read_text())["project"] for path in sorted(PACKAGES.glob("*/pyproject.toml"))]
    (version,) = {project["version"] for project in projects}
    for project in projects:
        needed = [Requirement(text) for text in project["dependencies"]]
        assert [each.url for each in needed] == [None] * len(needed)
        pinned = {str(each.specifier) for each in needed if each.name == "agl-core"}
        assert pinned == (set() if project["name"] == "agl-core" else {f"=={version}"})
