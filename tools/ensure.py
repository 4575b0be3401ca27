"""Install what pyproject.toml asks for and this environment lacks. An installed torch stays.

python tools/ensure.py build run test      the build requirements, the dependencies, extra `test`
"""

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

if not find_spec("pip"):
    sys.exit(f"pip is not installed here, try: {sys.executable} -m ensurepip")

from pip._vendor.packaging.requirements import Requirement  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"  # where there is none


def requirements(groups: list[str]) -> list[Requirement]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    lines_of = {
        "build": pyproject["build-system"]["requires"],
        "run": project["dependencies"],
        **project["optional-dependencies"],
    }
    found = []
    for requirement in (Requirement(line) for group in groups for line in lines_of[group]):
        if requirement.name == project["name"]:  # an extra that takes in others
            found += requirements(sorted(requirement.extras))
        else:
            found.append(requirement)
    return found


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_met(requirement: Requirement) -> bool:
    version = installed_version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def main(groups: list[str]) -> None:
    lacking = {each.name: str(each) for each in requirements(groups) if not is_met(each)}
    if not lacking:
        return
    torch = installed_version("torch")
    if torch and "torch" in lacking:
        sys.exit(f"mixlora needs {lacking['torch']} and does not replace your torch {torch}")
    if torch:
        lacking["torch"] = f"torch=={torch}"  # met already: the others may not move it
    elif "torch" in lacking:
        lacking["torch"] = TORCH
    print("installing", *lacking.values(), flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.call([*pip, *lacking.values()]):
        sys.exit("pip could not install them, its message is above")


main(sys.argv[1:])
