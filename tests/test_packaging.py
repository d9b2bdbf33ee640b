"""What is installed, and that the tools look at what they should."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from multiprocessing import get_context
from pathlib import Path
from pkgutil import resolve_name

import pytest

_ROOT = Path(__file__).parents[1]
_ROOMS = ("kd", "pipelines", "trainers", "tools")
_SOURCES = ("LICENSE", "README.md", "pyproject.toml", "setup.py", "__main__.py", "configs", "tests", *_ROOMS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: building in place would leave files behind, and might pick up old ones."""
    copy = tmp_path_factory.mktemp("source")
    for name in _SOURCES:
        if (_ROOT / name).is_dir():
            shutil.copytree(_ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(_ROOT / name, copy)
    return copy


def _pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, words), "--no-deps", "--no-build-isolation"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--wheel-dir", target, sources)
    (path,) = target.glob("dalikd-*.whl")
    return path


def test_wheel_holds_every_module_and_config_and_nothing_else(wheel: Path) -> None:
    kept = [*((room, "*.py") for room in _ROOMS), ("configs", "*.*")]  # of the configs whatever there is
    paths = [path.relative_to(_ROOT) for room, kind in kept for path in (_ROOT / room).rglob(kind)]
    expected = {f"dalikd/{path}" for path in paths if "__pycache__" not in path.parts}
    expected.add("dalikd/__main__.py")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"dalikd/kd/losses/kd.py", "dalikd/configs/demo.yaml", "dalikd/tools/main.py"} <= names
    assert names == expected


def test_wheel_has_the_console_script_and_the_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in archive.namelist()}
    assert "dalikd = dalikd.tools.main:main" in text["entry_points.txt"]
    assert text["top_level.txt"].split() == ["dalikd"]
    assert "Apache License" in text["licenses/LICENSE"]


def test_unpacked_wheel_is_importable_and_finds_its_configs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import json, dalikd.configs, dalikd.kd, dalikd.tools.main as main; from pathlib import Path;"
        "demo = Path(dalikd.configs.__file__).with_name('demo.yaml');"
        "print(json.dumps([dalikd.kd.__file__, main.__file__, str(demo), demo.is_file()]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *files, demo_is_there = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(tmp_path) for file in files)
    assert demo_is_there


def _says(python: str | Path, *words: str, **environment: str) -> str:
    command, kept = [str(python), *words], {key: os.environ[key] for key in os.environ if key != "PYTHONPATH"}
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True).stdout


def test_python_m_dalikd_is_the_console_script(wheel: Path, sources: Path, tmp_path: Path) -> None:
    """From a wheel, from an editable install, and from the folder that type checkers read."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    _pip("install", "--editable", sources, "--target", packages)
    version = re.compile(r"dalikd 0\.\d+\.\d+, torch .+, DALI .+\n")
    assert version.fullmatch(_says(sys.executable, "-m", "dalikd", "--version", PYTHONPATH=str(tmp_path / "installed")))
    assert version.fullmatch(_says(sys.executable, "-m", "dalikd", "--version", PYTHONPATH=str(_ROOT / ".typing")))
    assert version.fullmatch(_says(tmp_path / "venv/bin/python", "-m", "dalikd", "--version"))


def test_dalikd_is_importable_in_a_spawned_child() -> None:
    with get_context("spawn").Pool(1) as pool:
        commands = pool.apply(resolve_name, ("dalikd.tools.main:COMMANDS",))
    assert "distill" in commands


def test_every_command_has_its_file() -> None:
    commands = resolve_name("dalikd.tools.main:COMMANDS")
    places = {name: (_ROOT / "tools" / f"{name}.py", _ROOT / "tools" / name / "__main__.py") for name in commands}
    assert [name for name, paths in places.items() if not any(path.is_file() for path in paths)] == []


def test_no_tool_is_named_like_a_module_of_the_standard_library() -> None:
    names = {path.relative_to(_ROOT).as_posix(): path.stem for path in (_ROOT / "tools").rglob("*.py")}
    assert {path for path, name in names.items() if name in sys.stdlib_module_names} == set()


def test_type_checkers_find_dalikd() -> None:
    assert (_ROOT / ".typing/dalikd").readlink() == Path("..")
    settings = tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["basedpyright"]
    # a folder below a hidden one is skipped without a word, and then nothing is checked
    assert set(settings["include"]) >= set(_ROOMS)


def test_ci_ends_with_the_readme_s_test_command() -> None:
    script = _ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    commands = script.read_text().splitlines()
    assert "set -euo pipefail" in commands
    assert "pip install -e '.[test]'" in commands
    assert commands[-1] == "pytest"


def test_changelog_has_an_unreleased_section() -> None:
    text = (_ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert kinds
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
