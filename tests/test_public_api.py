"""What the package promises to importers."""

import ast
import subprocess
import sys
from pathlib import Path

import moe_engine
from moe_engine.models import model_class, supported_architectures

ROOT = Path(__file__).parent.parent


def test_exported_names_exist_and_are_listed_once() -> None:
    assert [*sorted(moe_engine._HOMES), "__version__"] == moe_engine.__all__
    for name in moe_engine.__all__:
        assert getattr(moe_engine, name) is not None


def test_import_is_lazy() -> None:
    heavy = {"torch", "numpy", "gguf", "tokenizers", "triton", "rich", "typer", "jinja2"}
    code = "import sys, moe_engine; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)


def test_every_family_file_is_a_family() -> None:
    assert supported_architectures() == ["deepseek2", "qwen2moe", "qwen3moe"]
    for name in supported_architectures():
        assert model_class(name, "x").__name__ == "Model"


def test_policies_know_nothing_of_torch() -> None:
    for path in (ROOT / "policies").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("torch", "numpy", "triton") for name in names), path
