"""What `import lightning_edge` gives, and what it leaves alone."""

import subprocess
import sys
import tomllib

import pytest

import lightning_edge


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    heavy = python(
        "import sys, lightning_edge; dir(lightning_edge); lightning_edge.__version__;"
        "print(*sys.modules.keys() & {'torch', 'lightning', 'numpy', 'onnx', 'hydra', 'sklearn'})"
    )
    assert heavy.split() == []


def test_loading_an_artifact_needs_no_torch():
    heavy = python(
        "import sys; sys.modules.update(torch=None, lightning=None, onnx=None);"
        "from lightning_edge import load_artifact, unpack; print(load_artifact.__name__)"
    )
    assert heavy.split() == ["load_artifact"]


def test_the_version_is_that_of_the_project(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert lightning_edge.__version__ == project["version"]


@pytest.mark.parametrize("name", lightning_edge.__all__)
def test_every_public_name_resolves(name):
    assert getattr(lightning_edge, name) is not None


def test_dir_lists_every_public_name():
    assert set(lightning_edge.__all__) <= set(dir(lightning_edge))


def test_an_unknown_name_is_answered_with_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'Pruning'; public names: ChannelPruning"):
        _ = lightning_edge.Pruning


@pytest.mark.parametrize(
    "first",
    [
        "from lightning_edge import export",
        "import lightning_edge.export.onnx",
        "import lightning_edge.callbacks.export",
    ],
)
def test_export_is_callable_whatever_is_imported_first(first):
    # Importing the subpackage binds it under the name of the function; both have to work, in every order.
    said = python(
        f"{first}\n"
        "import lightning_edge, lightning_edge.export.onnx\n"
        "from lightning_edge import export\n"
        "def function(module, path, *, example_inputs, round_small, adaptive, recipe_hash):\n"
        "    return module, path, example_inputs\n"
        "lightning_edge.export.export = function\n"
        "print(export(1, 2, example_inputs=3), lightning_edge.export is export, export.onnx.__name__)\n"
    )
    assert said.strip() == "(1, 2, 3) True lightning_edge.export.onnx"


def test_export_takes_what_the_function_takes():
    from inspect import signature

    from lightning_edge import export
    from lightning_edge.export import export as function

    assert list(signature(export).parameters) == list(signature(function).parameters)
