"""Everything in conf/ and recipes/ composes, says what the classes take, and is refused where nobody reads it."""

import inspect
from importlib import import_module

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_edge.config import (
    compose,
    config_folder,
    dense_stage,
    group_names,
    recipe_folder,
    recipe_hash,
    recipe_titles,
    register,
    teacher_stage,
)
from lightning_edge.config_check import check, nearest
from lightning_edge.modules import MovingAverage

RECIPES = sorted(recipe_titles())
OPTIONS = sorted(path.relative_to(config_folder()).with_suffix("") for path in config_folder().glob("*/*.yaml"))
SPECIAL = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}


def our_nodes(node, where):
    """Yield name and node of everything that names a class of ours."""
    if isinstance(node, DictConfig):
        if str(node.get("_target_", "")).startswith("lightning_edge."):
            yield where, node
        for key in node:
            yield from our_nodes(node._get_node(key), f"{where}.{key}")


OUR_NODES = [
    pair for path in OPTIONS for pair in our_nodes(OmegaConf.load(config_folder() / f"{path}.yaml"), str(path))
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data=mnist", "data.path=FILE", "model=lenet5"],
        ["data=mnist", "model=lenet300", "trainer=gpu"],
        ["trainer=ddp", "trainer.max_epochs=5", "dense.trainer.max_epochs=1"],
        ["export=onnx", "seed=3", "threads=2", "baseline=FILE"],
    ],
    ids=" ".join,
)
def test_every_recipe_composes_and_is_accepted(recipe, overrides):
    check(compose([f"recipe={recipe}", *overrides]))


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_of_every_group_composes(option):
    override = f"{option.parent}={option.name}" if option.parent.name != "callbacks" else f"callbacks=[{option.name}]"
    cfg = compose([override])
    assert OmegaConf.to_container(cfg, resolve=True)[option.parent.name]


@pytest.mark.parametrize(("where", "node"), OUR_NODES, ids=[where for where, _ in OUR_NODES])
def test_the_yaml_lists_every_argument_of_our_classes(where, node):
    module, _, name = node._target_.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    later = {"student"} if node.get("_partial_") else set()  # what the pipeline calls a partial with
    assert set(node) - SPECIAL == set(parameters) - later


def test_every_recipe_has_a_title_and_a_card():
    assert all(recipe_titles().values())
    assert {path.stem for path in recipe_folder().glob("*.md")} == set(RECIPES)


def test_every_group_has_options():
    assert group_names() == sorted({str(path.parent) for path in OPTIONS} | {"recipe"})


def test_the_command_line_wins_over_the_recipe():
    cfg = compose(["recipe=deep_compression", "callbacks.sharing.clusters=16", "callbacks.pruning.end_epoch=7"])
    assert (cfg.callbacks.sharing.clusters, cfg.callbacks.pruning.end_epoch) == (16, 7)


def test_clusters_can_be_a_number_for_each_layer():
    cfg = compose(["recipe=deep_compression", "callbacks.sharing.clusters={conv*:256,fc*:32}"])
    assert cfg.callbacks.sharing.clusters == {"conv*": 256, "fc*": 32}


def test_a_callback_can_be_dropped():
    assert "sharing" not in compose(["recipe=deep_compression", "~callbacks.sharing"]).callbacks


def test_the_data_says_how_long_the_stages_train():
    digits, mnist = compose(["recipe=qat_int8"]), compose(["recipe=qat_int8", "data=mnist"])
    assert digits.trainer.max_epochs > mnist.trainer.max_epochs
    assert dense_stage(digits).trainer.max_epochs > dense_stage(mnist).trainer.max_epochs


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 40])
def test_the_epochs_of_a_recipe_lie_within_any_length(epochs):
    callbacks = compose(["recipe=deep_compression", f"trainer.max_epochs={epochs}"]).callbacks
    at_epochs = list(callbacks.sharing.at_epochs)
    assert at_epochs == sorted(set(at_epochs))
    assert 0 <= callbacks.pruning.end_epoch <= at_epochs[0] <= at_epochs[-1] < epochs


def test_a_training_without_a_length_is_refused_where_epochs_are_fractions():
    cfg = compose(["recipe=qat_int8", "trainer.max_epochs=-1", "trainer.max_steps=100"])
    with pytest.raises(OmegaConfBaseException, match=r"trainer.max_epochs must be at least 1 for .*, got -1"):
        check(cfg)


def test_a_fraction_outside_of_the_training_is_refused():
    cfg = compose(["recipe=qat_int8", "callbacks.quantization.start_epoch='${epoch_at:1.5}'"])
    with pytest.raises(OmegaConfBaseException, match=r"fraction in \[0, 1\], got 1.5"):
        check(cfg)


def test_the_dense_stage_is_a_diff_that_sees_its_own_values():
    cfg = compose(["recipe=deep_compression", "dense.trainer.max_epochs=3", "dense.model.optimizer.lr=0.5"])
    cfg.output = "folder"
    stage = dense_stage(cfg)
    assert (stage.trainer.max_epochs, stage.model.scheduler.T_max, stage.model.optimizer.lr) == (3, 3, 0.5)
    assert stage.model.optimizer._target_ == cfg.model.optimizer._target_
    assert stage.callbacks.checkpoint.dirpath == "folder/baseline"
    assert cfg.model.scheduler.T_max == cfg.trainer.max_epochs


@pytest.mark.parametrize(
    "override",
    [
        "output=elsewhere",
        "threads=3",
        "baseline=FILE",
        "resume=FOLDER",
        "data.path=FILE",
        "data.num_workers=2",
        "trainer=ddp",
        "trainer.logger=true",
        "trainer.enable_progress_bar=false",
        "callbacks.export.folder=elsewhere",
        "callbacks.checkpoint.enable_version_counter=true",
        "~callbacks.checkpoint",
        "~callbacks.history",
        "dense.callbacks.checkpoint.dirpath=elsewhere",
        "title=other",
    ],
)
def test_circumstances_do_not_change_the_hash(override):
    base = ["recipe=deep_compression", "data=mnist"]
    assert recipe_hash(compose([*base, override])) == recipe_hash(compose(base))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model=lenet5",
        "data.batch_size=32",
        "trainer.max_epochs=9",
        "trainer.precision=bf16-mixed",
        "dense.trainer.max_epochs=9",
        "dense.model.optimizer.lr=0.5",
        "callbacks.pruning.sparsity=0.5",
        "callbacks.sharing.include=[fc*]",
        "export.formats=[edge]",
        "~callbacks.sharing",
        "callbacks=[default,sharing,pruning,export]",
    ],
)
def test_what_determines_the_result_changes_the_hash(override):
    base = ["recipe=deep_compression", "data=mnist"]
    assert recipe_hash(compose([*base, override])) != recipe_hash(compose(base))


def taught(*overrides):
    return recipe_hash(compose(["recipe=deep_compression", "distillation=resnet56", *overrides]))


@pytest.mark.parametrize("key", ["distillation.teacher.checkpoint", "distillation.teacher"])
def test_a_teacher_s_file_counts_by_its_content(tmp_path, key):
    for name, content in (("a.ckpt", b"one"), ("b.ckpt", b"one"), ("c.ckpt", b"two")):
        (tmp_path / name).write_bytes(content)
    first, same, other = (taught(f"{key}={tmp_path}/{name}.ckpt") for name in "abc")
    assert first == same != other


def test_what_teaches_changes_the_hash_but_not_where_the_run_is():
    paths = "distillation.teacher.checkpoint=FILE"
    network = "distillation.teacher.network._target_=lightning_edge.models.ResNet20"
    assert taught(paths) != taught(paths, network)
    assert taught(paths) == taught(paths, "distillation.cache=elsewhere")
    base = ["recipe=deep_compression", "distillation=self"]
    assert recipe_hash(compose(base)) == recipe_hash(compose([*base, "output=elsewhere"]))
    assert recipe_hash(compose(base)) != recipe_hash(compose([*base, "distillation.teacher=other.ckpt"]))


def test_a_moving_average_and_an_earlier_student_teach_any_recipe():
    average = compose(["recipe=qat_int8", "distillation=ema", "distillation.teacher.decay=0.9"])
    check(average)
    assert instantiate(average.distillation.teacher) == MovingAverage(0.9)
    earlier = compose(["recipe=edge_tiny", "distillation=checkpoint", "distillation.teacher=last.ckpt"])
    check(earlier)
    assert earlier.distillation.teacher == "last.ckpt"


def test_a_model_that_names_no_larger_one_is_refused():
    with pytest.raises(ValueError, match=r"model must name a larger network .* got .*ResNet56 .*distillation=self"):
        check(compose(["recipe=distill", "model=resnet56", "data=cifar10"]))


def test_a_training_of_the_larger_network_goes_below_its_own_key():
    with pytest.raises(ValueError, match=r"teacher must say which network .* got only \['trainer'\]: .*\+larger.KEY"):
        check(compose(["recipe=distill", "+teacher.trainer.max_epochs=3"]))
    cfg = compose(["recipe=distill", "+larger.trainer.max_epochs=3"])
    check(cfg)
    assert teacher_stage(cfg).trainer.max_epochs == 3


@pytest.mark.parametrize("recipe", ["edge_int8", "edge_tiny", "distill", "deep_compression"])
@pytest.mark.parametrize("model", ["resnet20", "resnet8"])
def test_the_taught_recipes_compose_with_photographs(recipe, model):
    cfg = compose([f"recipe={recipe}", "data=cifar10", f"model={model}", "data.path=FILE"])
    check(cfg)
    assert cfg.data._target_.endswith("CIFAR10DataModule")
    assert cfg.trainer.max_epochs == 30


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"traner": {"max_epochs": 3}}, r"traner must be a key that something reads: did you mean .*'trainer'"),
        ({"export": {"format": ["edge"]}}, r"export.format must be .* did you mean 'formats'\?"),
        (
            {"callbacks": {"pruning": {"sparsty": 0.5}}},
            r"callbacks.pruning.sparsty must be an argument of .*WeightPruning: did you mean 'sparsity'\?",
        ),
        (
            {"callbacks": {"prunning": {"sparsity": 0.5}}},
            r"callbacks.prunning must have a _target_, .*did you mean 'pruning'\?",
        ),
        ({"trainer": {"max_epoch": 3}}, r"trainer.max_epoch must be an argument .* did you mean"),
        ({"dense": {"trainer": {"max_epoch": 3}}}, r"dense.trainer.max_epoch must be an argument .* did you mean"),
        ({"dense": {"modle": {"lr": 3}}}, r"dense.modle must be a key .* did you mean 'model'\?"),
        ({"model": {"optimizer": {"learning_rate": 3}}}, r"model.optimizer.learning_rate must be an argument"),
        ({"model": {"optimizer": {"_parital_": True}}}, r"optimizer._parital_ .* did you mean '_partial_'\?"),
        ({"model": {"network": {"_target_": "lightning_edge.models.LeNet6"}}}, r"did you mean 'LeNet5'"),
        ({"model": {"network": {"_target_": "lightning_edge.modles.LeNet5"}}}, r"did you mean .*'models'"),
        ({"model": {"network": {"_target_": "no_such_package.Net"}}}, r"is its package installed\?"),
        ({"model": {"network": {"_target_": "lightning_edge.models"}}}, r"_target_ must be callable, got .* a module"),
        ({"data": {"_target_": "torch.nn.Linear"}}, r"data.batch_size must be an argument of torch.nn.Linear"),
        ({"trainer": {"logger": {"_target_": "torch.nn.Linear"}}}, r"trainer.logger.in_features must be given"),
    ],
)
def test_a_mistake_in_a_file_is_refused_with_the_nearest_name(mistake, message):
    cfg = compose(["recipe=deep_compression"])
    OmegaConf.set_struct(cfg, False)  # as it is while Hydra merges the files
    cfg.merge_with(mistake)
    with pytest.raises(ValueError, match=message):
        check(cfg)


def test_a_mandatory_value_must_be_given():
    with pytest.raises(OmegaConfBaseException, match=r"model\.num_classes"):
        check(compose(["recipe=qat_int8", "model.num_classes=???"]))


def test_a_class_of_the_users_own_is_checked_like_ours():
    timer = "+callbacks.timer={_target_: lightning.pytorch.callbacks.Timer, %s}"
    check(compose(["recipe=qat_int8", timer % "duration: null"]))
    with pytest.raises(ValueError, match=r"callbacks.timer.durations must be an argument of .*did you mean 'duration'"):
        check(compose(["recipe=qat_int8", timer % "durations: 1"]))


def test_a_run_that_would_compress_nothing_is_refused():
    with pytest.raises(ValueError, match="callbacks must hold a technique or an export, got only"):
        check(compose([]))


def test_names_without_a_near_one_are_answered_with_some_of_the_valid_ones():
    assert nearest("zzz", "abcdefghijklmno") == "valid are a, b, c, d, e, f, g, h, i, j, k, l, ..."


def test_a_class_that_tells_no_signature_is_left_to_its_call():
    check(compose(["recipe=qat_int8", "+callbacks.type={_target_: builtins.type, whatever: 1}"]))


def test_a_module_that_fails_at_its_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"data._target_ must be importable, got 'mine.Data': .*'no_such_dependency'"):
        check(compose(["recipe=qat_int8", "data={_target_: mine.Data}"]))


def test_a_recipe_that_is_no_mapping_is_refused_with_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_edge.config.recipe_folder", lambda: tmp_path)
    (tmp_path / "wrong.yaml").write_text("- a list")
    with pytest.raises(ValueError, match=r"recipe must be a YAML mapping, got a list in .*wrong\.yaml"):
        register()
    (tmp_path / "wrong.yaml").write_text("title: [")
    with pytest.raises(ValueError, match=r"recipe must be a YAML file, got .*wrong\.yaml"):
        register()


def test_an_installation_without_its_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_edge.config.__file__", str(tmp_path / "lightning_edge/config.py"))
    with pytest.raises(FileNotFoundError, match="conf must be a folder inside the package or beside it"):
        config_folder()
