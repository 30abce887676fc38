"""Benchmarks go on where they were cut, and what they put on the command line is accepted."""

import json
import subprocess

import distilled_resnet
import edge_resnet20
import pytest
import runs
import self_distillation

from lightning_edge.config import compose
from lightning_edge.config_check import check

PATHS = ("data.path=FILE", "baseline=FILE", "trainer.max_epochs=12")


def test_a_run_begins_goes_on_from_whatever_stage_it_was_cut_in_and_is_not_repeated(tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []

    def launch(command, *, check):
        seen.append(command[3:])
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        (folder / ".hydra" / "config.yaml").touch()
        if len(seen) < 3:
            raise subprocess.CalledProcessError(1, command)
        (folder / "report.json").write_text(json.dumps({"title": "done"}))

    monkeypatch.setattr(runs.subprocess, "run", launch)
    overrides = ["recipe=qat_int8"]
    for _ in range(2):  # cut in the first stage, before any checkpoint; then between two stages
        with pytest.raises(subprocess.CalledProcessError):
            runs.run_recipe(folder, overrides)
    assert runs.run_recipe(folder, overrides) == runs.run_recipe(folder, overrides) == {"title": "done"}
    new = [*overrides, "trainer.enable_progress_bar=false", f"hydra.run.dir={folder}"]
    assert seen == [new, [f"resume={folder}"], [f"resume={folder}"]]


OVERRIDES = [
    *(
        [*technique.overrides, *self_distillation.COMMON, *teacher, *PATHS]
        for technique in self_distillation.TECHNIQUES.values()
        for teacher in self_distillation.TEACHERS.values()
    ),
    *([*edge_resnet20.COMMON, *edge_resnet20.tiny(size), *PATHS] for size in edge_resnet20.SIZES),
    *([*edge_resnet20.COMMON, *edge_resnet20.fast(macs), *PATHS] for macs in edge_resnet20.MACS),
    *(
        [
            "recipe=distill",
            f"model={model}",
            *distilled_resnet.COMMON,
            "distillation=resnet56",
            "distillation.teacher.checkpoint=FILE",
            *PATHS[2:],
        ]
        for model in distilled_resnet.TITLES
    ),
]


@pytest.mark.parametrize("trial", [(), runs.TRIAL], ids=["whole", "trial"])
@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_what_a_script_puts_on_the_command_line_is_accepted(overrides, trial):
    check(compose([*overrides, *trial]))
