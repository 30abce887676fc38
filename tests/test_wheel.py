"""The wheel alone, without the checkout, has everything that the recipes need."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lightning_edge.config import recipe_titles

pytestmark = pytest.mark.slow

COMPOSE = """
import sys
from pathlib import Path
import lightning_edge
from lightning_edge.config import compose, config_folder, recipe_folder, recipe_titles
from lightning_edge.config_check import check

inside = Path(sys.prefix).resolve()
for path in (Path(lightning_edge.__file__), config_folder(), recipe_folder()):
    assert path.resolve().is_relative_to(inside), path
for name in recipe_titles():
    check(compose([f"recipe={name}"]))
    print(name)
"""


def run(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(root, tmp_path_factory):
    """A fresh environment with the wheel alone, which borrows the dependencies of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(root)]
    run(sys.executable, *build, cwd=folder)
    [wheel] = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv/bin/python"
    pip = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    run(sys.executable, *pip, cwd=folder)
    # A path named in a .pth file is searched, but its own .pth files are not read: an editable installation of the
    # checkout over there stays out of reach.
    site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_every_recipe_composes_from_the_installed_wheel(installed):
    assert run(str(installed), "-c", COMPOSE, cwd=installed.parent).split() == sorted(recipe_titles())


def test_the_installed_command_lists_the_recipes(installed):
    listed = run(str(installed.with_name("lightning-edge")), cwd=installed.parent)
    assert all(f"  {name} " in listed for name in recipe_titles())


def test_the_wheel_is_typed_and_leaves_the_tests_at_home(installed):
    [site] = installed.parent.parent.glob("lib/*/site-packages")
    assert (site / "lightning_edge/py.typed").is_file()
    assert {path.name for path in site.iterdir() if path.is_dir()} == {
        "lightning_edge",
        f"lightning_edge-{__import__('lightning_edge').__version__}.dist-info",
    }
