"""The README's example runs as it stands."""

import re
import warnings

import pytest

from lightning_edge.artifact import inspect


def test_the_other_examples_are_accepted(root):
    for code in re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)[1:]:
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.slow
def test_the_example_trains_exports_and_runs(root, capsys):
    code = re.search(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*litlogger|.*litmodels|.*TensorBoard|.*tensorboardX")
        exec(compile(code, "README.md", "exec"), {})
    accuracy = float(capsys.readouterr().out.splitlines()[-1])
    assert accuracy > 0.9
    weights = [tensor for tensor in inspect("out/model.edge").tensors if tensor.name.endswith("weight")]
    assert max(tensor.distinct for tensor in weights) <= 33
