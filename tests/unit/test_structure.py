# SPDX-License-Identifier: Apache-2.0
"""Rules for the layout of the code that keep the lesson readable and the machinery reusable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TOY_SERVER

import serving

FILES = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & {*path.relative_to(ROOT).parts}]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Return all imports of a file, including type-only ones."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            # "from package import module" needs the module, and nothing that the package contains itself.
            names |= inside if inside <= MODULES.keys() else {node.module, *inside}
    return names


def imports(path: Path) -> set[str]:
    """Return the project's modules that a file imports."""
    return imported(path) & MODULES.keys()


def test_serving_imports_nothing_from_the_rest_of_the_project():
    paths = [path for name, path in MODULES.items() if name.split(".")[0] == "serving"]
    assert len(paths) > 5
    for path in paths:
        assert {name for name in imports(path) if name.split(".")[0] != "serving"} == set(), path


def test_an_example_needs_no_other_server_and_nothing_needs_it():
    examples = {name for name in MODULES if name.startswith("examples.")}
    assert examples
    for name, path in MODULES.items():
        used = {module.split(".")[0] for module in imports(path)}
        assert "examples" not in used, path
        assert name not in examples or used <= {"photo", "pipelines", "serving"}, path


def test_the_imports_of_a_server_are_listed_in_one_place():
    exported = {"Checked", "Deferred", "InferenceFailed", "InvalidRequest", "Server", "Stages", "UsageError"}
    exported |= {"add_serving_options", "make_parser", "number"}
    assert set(serving.__all__) == exported
    assert all(hasattr(serving, name) for name in exported)
    # A server needs nothing else: the lesson, and the toy of the tests.
    for path in (ROOT / "server.py", TOY_SERVER):
        assert {name for name in imports(path) if name.startswith("serving.")} <= {"serving.options"}, path


PRIVATE = (
    "pytriton.models",
    "pytriton.proxy.communication",
    "pytriton.proxy.data",
    "pytriton.proxy.inference",
    "pytriton.proxy.validators",
)


def test_only_one_file_touches_the_private_parts_of_pytriton():
    for path in FILES:
        private = {name for name in imported(path) if name.startswith(PRIVATE)}
        # Attributes such as triton._model_manager, of objects from PyTriton's packages.
        code = path.read_text()
        private |= {word for word in ("_model_manager", "_get_triton_model_config") if word in code}
        if name_of(path) == "serving.pytriton_internals":
            assert len(private) > 5
        else:
            assert private == set(), path


def test_there_is_no_import_cycle():
    remaining = {name: imports(path) - {name} for name, path in MODULES.items()}
    while leaves := {name for name, needs in remaining.items() if not needs & remaining.keys()}:
        for name in leaves:
            del remaining[name]
    assert remaining == {}


def modules_after(code: str) -> set[str]:
    """Return the names of all modules that are imported after running some code."""
    code += "\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


@pytest.mark.parametrize("module", ["server", "examples.classifier"])
def test_a_mistyped_option_does_not_wait_for_torch_and_dali(module):
    modules = modules_after(
        f"import {module} as server\ntry:\n    server.parse_options(['--nonsense'])\nexcept SystemExit:\n    pass"
    )
    assert not modules & {"torch", "torchvision", "nvidia.dali"}


@pytest.mark.parametrize(
    "code",
    [
        "import sys, server\nsys.argv = ['server.py', '--nonsense']\ntry:\n    server.main()\nexcept SystemExit: pass",
        "import serving",  # and none of its modules, for a server of your own
        "import serving.pytriton_internals",
    ],
)
def test_the_imports_at_the_start_wait_for_neither_torch_nor_dali(code):
    assert not modules_after(code) & {"torch", "torchvision", "nvidia.dali", "nvidia.nvimgcodec"}


def test_a_mistyped_option_does_not_touch_the_private_parts_of_pytriton():
    # They take a second to import, and may be missing.
    assert "serving.pytriton_internals" not in modules_after("import server\nserver.parse_options([])")


def test_the_client_needs_neither_torch_nor_dali_nor_pytriton():
    modules = modules_after("import client")
    assert not modules & {"torch", "pytriton", "nvidia.dali", "serving"}


def test_the_lesson_and_the_readme_stay_short():
    assert len((ROOT / "server.py").read_text().splitlines()) <= 200
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    assert len(readme.split()) <= 1300
