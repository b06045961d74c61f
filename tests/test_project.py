"""The project's own rules: style, types, imports that point one way, and that optional packages stay optional."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "kernels", "bench", "recipes", "tests")
MAY_IMPORT = {"kernels": {"kernels"}, "engine": {"engine", "kernels"}, "bench": {"bench", "engine", "kernels"}}


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    run(sys.executable, "-m", "ruff", "check", *FOLDERS, "setup.py")


def test_code_is_formatted():
    run(sys.executable, "-m", "ruff", "format", "--check", *FOLDERS)


def test_pyright_finds_nothing():
    run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable)


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_folders(path: Path) -> set[str]:
    """Top-level folders of this project that a module imports, through relative or full names."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            reached = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            found.add(reached[0] or next(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vidtta."):
            found.add((node.module or "").split(".")[1])
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    for path in modules(folder):
        assert imported_folders(path) <= MAY_IMPORT[folder], path


def test_models_methods_and_benches_import_without_optional_packages():
    """On a machine with torch, triton, numpy and pyyaml alone."""
    absent = ("pydantic", "av", "lpips", "transformers", "cv2", "rich", "torchvision", "safetensors", "ftfy", "bs4")
    names = [
        "vidtta.bench.clip",
        "vidtta.bench.methods",
        "vidtta.engine.try_paths",
        "vidtta.engine.clip",
        "vidtta.engine.methods",
        "vidtta.engine.metrics",
    ]
    program = f"import sys\nfor name in {absent}: sys.modules[name] = None\nfor name in {names}: __import__(name)\n"
    run(sys.executable, "-c", program)


def test_no_source_file_grows_too_long():
    long = {
        str(p.relative_to(ROOT)): n
        for f in FOLDERS[:3]
        for p in modules(f)
        if (n := len(p.read_text().splitlines())) > 420
    }
    assert not long
