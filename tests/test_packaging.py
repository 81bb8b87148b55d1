"""The wheel holds exactly the package `flarec`, and works where only the wheel is installed."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import flarec

pytestmark = pytest.mark.xdist_group("wheel")  # one worker builds the wheel, once

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDER_OF: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.safetensors")


def source_files() -> dict[str, Path]:
    """Every file of the package folders, by its place in the wheel (`flarec/kernels/...` for `kernels/...`)."""
    files = {}
    for package, folder in FOLDER_OF.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                files[f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


def third_party_imports(paths: Iterable[Path]) -> dict[str, set[str]]:
    """Top-level names of the modules that files import from outside, each with the files that do."""
    found: dict[str, set[str]] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules} - {"flarec"} - sys.stdlib_module_names:
                found.setdefault(top, set()).add(path.relative_to(ROOT).as_posix())
    return found


def distribution_names(module: str) -> set[str]:
    """Normalised names of the distributions that provide a top-level module, installed or not."""
    return {name.lower().replace("_", "-") for name in provided().get(module, [module])}


@functools.cache
def provided() -> dict[str, list[str]]:
    """Distributions by module: reads the file list of everything that is installed."""
    return {**packages_distributions(), "fla": ["flash-linear-attention"]}


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", text, maxsplit=1)[0].lower().replace("_", "-") for text in requirements}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run outside the repository, with nothing of it on the path."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "TRITON_"))}
    argv = [str(part) for part in command]
    return subprocess.run(argv, cwd=cwd, env=env | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: a build/ folder of an earlier build would put deleted files into the wheel.
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation")
    done = run(*build, "--outdir", folder / "dist", folder / "source", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and the third-party packages of this one, not its flarec."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    done = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    # After the wheel, or pip would take flarec for installed. .pth files of a folder that is added this way are not
    # read, so the finder of an editable install stays out.
    (site,) = folder.glob("lib/python*/site-packages")
    ours = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "third_party.pth").write_text("\n".join(ours) + "\n")
    return python


def test_every_package_on_disk_is_listed() -> None:
    on_disk = {name.rsplit("/", 1)[0].replace("/", ".") for name in source_files() if name.endswith("/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_third_party_imports_are_declared() -> None:
    project = PROJECT["project"]
    extras = (names for extra, names in project["optional-dependencies"].items() if extra != "test")
    declared = requirement_names([*project["dependencies"], *(name for names in extras for name in names)])
    used = third_party_imports(path for path in source_files().values() if path.suffix == ".py")
    assert {module: files for module, files in used.items() if not declared & distribution_names(module)} == {}


def test_declared_dependencies_are_used() -> None:
    folders = [*FOLDER_OF.values(), "examples", "benchmarks"]
    used = third_party_imports(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    names = {name for module in used for name in distribution_names(module)}
    assert requirement_names(PROJECT["project"]["dependencies"]) - names == set()


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = f"flarec-{flarec.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"flarec", metadata}
    assert {name for name in names if name.startswith("flarec/")} == set(source_files())
    assert f"{metadata}/licenses/LICENSE" in names


def test_command_line_of_the_wheel(clean_python: Path, tmp_path: Path) -> None:
    done = run(clean_python.parent / "flarec", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("Usage: flarec")


IMPORT_ALL = """
import importlib, importlib.abc, json, pkgutil, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import flarec
names = ["flarec"]
files, errors = {}, {}
for name in names:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
        continue
    files[name] = module.__file__
    if hasattr(module, "__path__"):
        found = (f"{name}.{module.name}" for module in pkgutil.iter_modules(module.__path__))
        names.extend(name for name in found if not name.endswith(".__main__"))
print(json.dumps([files, errors]))
"""


TRITON = (".triton_", ".tiles.", ".step.")
"""In the names of modules that hold Triton kernels or launch them."""


@pytest.mark.parametrize("hidden", [(), ("triton", "fla")], ids=["as-tested", "without-gpu-extra"])
def test_every_module_imports_from_the_wheel(clean_python: Path, tmp_path: Path, hidden: tuple[str, ...]) -> None:
    done = run(clean_python, "-c", IMPORT_ALL, *hidden, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    files, errors = json.loads(done.stdout.splitlines()[-1])
    environment = clean_python.parent.parent
    assert {name: file for name, file in files.items() if environment not in Path(file).parents} == {}
    # Without the extra a module may refuse to be imported, but then it says what to install. Files of Triton kernels
    # need not: what imports them does.
    def expected(name: str, error: str) -> bool:
        # lm-eval and vLLM are in no environment of the default suite
        if name == "flarec.evaluation.harness":
            return "flarec[lm-eval]" in error
        if name in ("flarec.serve.vllm.worker", "flarec.serve.vllm.scheduler"):
            return "flarec[vllm]" in error
        kernel_file = name.startswith("flarec.kernels.") and any(part in name for part in TRITON)
        return bool(hidden) and ("flarec[gpu]" in error or (kernel_file and "No module named 'triton'" in error))

    assert {name: error for name, error in errors.items() if not expected(name, error)} == {}
    packages = {name.removesuffix("/__init__.py").replace("/", ".") for name in source_files() if "__init__" in name}
    assert packages <= set(files) | set(errors)
