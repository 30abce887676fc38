"""Where the configuration comes from, what a stage of a run reads of it, and which part of it determines the result."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from yaml import YAMLError

Tree = DictConfig | ListConfig

# What says where and how comfortably a run runs, not what comes out of it (globs over dotted keys).
_NOT_IN_HASH = (
    "title",
    "threads",
    "output",
    "baseline",
    "resume",
    "data.path",
    "distillation.cache",
    "data.folder",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.strategy*",
    "trainer.num_nodes",
    "trainer.logger*",
    "trainer.log_every_n_steps",
    "trainer.enable_*",
    "trainer.profiler*",
    "trainer.default_root_dir",
    "callbacks.history.*",
    "callbacks.exact_resume.*",
    "callbacks.checkpoint.*",
    "callbacks.export.folder",
    "callbacks.export.name",
    "callbacks.export.recipe_hash",
)


def config_folder() -> Path:
    """Return the folder of the configuration groups: inside an installed package, else that of the checkout.

    Raises:
        FileNotFoundError: If there is none.
    """
    return _folder("conf")


def recipe_folder() -> Path:
    """Return the folder of the recipes, found like :func:`config_folder`.

    Raises:
        FileNotFoundError: If there is none.
    """
    return _folder("recipes")


def recipe_titles() -> dict[str, str]:
    """Return what each recipe does, one line, by the name that ``recipe=NAME`` selects.

    >>> sorted(recipe_titles())[:2]
    ['deep_compression', 'distill']
    """
    return {name: str(recipe.get("title", "")) for name, recipe in _recipes()}


def group_names() -> list[str]:
    """Return the configuration groups, ``recipe`` among them.

    >>> group_names()
    ['callbacks', 'data', 'distillation', 'export', 'model', 'recipe', 'trainer']
    """
    return sorted([*(path.name for path in config_folder().iterdir() if path.is_dir()), "recipe"])


def register() -> None:
    """Make the recipes known to Hydra as the group ``recipe``, and the resolvers that they use to OmegaConf.

    Raises:
        ValueError: If a recipe is no YAML mapping, with its file.
    """
    OmegaConf.register_new_resolver("epoch_at", _epoch_at, replace=True)
    OmegaConf.register_new_resolver("epochs_at", _epochs_at, replace=True)
    store = ConfigStore.instance()
    for name, recipe in _recipes():
        store.store(group="recipe", name=name, node=recipe, package="_global_", provider="lightning_edge")


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that a command line with these overrides gives, without running anything.

    Raises:
        HydraException: If an override is malformed or names nothing.

    >>> cfg = compose(["recipe=deep_compression", "trainer.max_epochs=20"])
    >>> cfg.callbacks.pruning.end_epoch, list(cfg.callbacks.sharing.at_epochs)
    (8, [14, 17])
    """
    register()
    with initialize_config_dir(str(config_folder()), job_name="lightning_edge", version_base="1.3"):
        return hydra_compose("config", list(overrides))


def dense_stage(cfg: DictConfig) -> DictConfig:
    """Return the configuration of the dense baseline's training: ``cfg.dense`` laid over ``cfg``.

    The callbacks are those of ``cfg.dense`` alone; interpolations such as ``${trainer.max_epochs}`` see this stage's,
    but for those in ``cfg.dense``, which see ``cfg``.

    >>> cfg = compose(["recipe=qat_int8", "dense.trainer.max_epochs=3"])
    >>> dense_stage(cfg).trainer.max_epochs, sorted(dense_stage(cfg).callbacks)
    (3, ['checkpoint', 'exact_resume', 'history'])
    """
    root = OmegaConf.to_container(cfg)
    assert isinstance(root, dict)
    for key in ("dense", "callbacks", "distillation", "teacher"):  # it learns from the data alone
        root.pop(key, None)
    merged = OmegaConf.merge(root, OmegaConf.to_container(cfg.dense, resolve=True))
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, True)
    return merged


def teacher_stage(cfg: DictConfig) -> DictConfig | None:
    """Return the configuration of the training of a larger network that teaches, None if there is none to train.

    It is that of the dense baseline with ``cfg.teacher`` laid over it.

    >>> cfg = compose(["recipe=distill"])
    >>> teacher_stage(cfg).model.network.width > cfg.model.network.width
    True
    """
    if cfg.get("distillation") is None or cfg.get("teacher") is None:
        return None
    dense = dense_stage(cfg)
    own = {"baseline": None, "callbacks": {"checkpoint": {"dirpath": "${output}/teacher"}}}
    merged = OmegaConf.merge(dense, OmegaConf.to_container(cfg.teacher, resolve=True), own)
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, True)
    return merged


def recipe_hash(cfg: DictConfig) -> str:
    """Return sixteen hexadecimal digits that stand for everything that determines the result of a run.

    Folders, host, devices, threads, loggers, progress bars and resume settings do not change it. A teacher's file
    counts by its content, not by its name.

    >>> recipe_hash(compose(["recipe=qat_int8"])) == recipe_hash(compose(["recipe=qat_int8", "threads=2"]))
    True
    """
    leaves = {name: _content(name, value, cfg.output) for name, value in _leaves(cfg, "")}
    leaves["callbacks"] = [name for name in cfg.callbacks if not _is_circumstance(f"callbacks.{name}.")]  # their order
    return hashlib.sha256(json.dumps(leaves, sort_keys=True, default=str).encode()).hexdigest()[:16]


def keys(node: Tree) -> list[Any]:
    """Return the keys of a mapping, or the indices of a list.

    >>> keys(OmegaConf.create(["a", "b"]))
    [0, 1]
    """
    return list(node) if isinstance(node, DictConfig) else list(range(len(node)))


def _is_circumstance(key: str) -> bool:
    return any(fnmatch(key.removeprefix("dense.").removeprefix("teacher."), pattern) for pattern in _NOT_IN_HASH)


def _leaves(node: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and resolved values; a circumstance is left out before it is resolved."""
    for key in keys(node):
        name = f"{prefix}{key}"
        value = None if _is_circumstance(name) else node[key]
        if isinstance(value, DictConfig | ListConfig) and len(value):
            yield from _leaves(value, f"{name}.")
        elif not _is_circumstance(name):
            yield name, OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


def _content(name: str, value: Any, output: str | None) -> Any:
    """Return what defines a value: of a teacher's file its SHA-256, but of one that the run itself makes its name."""
    if not name.startswith("distillation.teacher") or not isinstance(value, str):
        return value
    if value.startswith(f"{output}/"):
        return value.removeprefix(f"{output}/")
    path = Path(value).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else value


def _folder(name: str) -> Path:
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"{name} must be a folder inside the package or beside it, got neither {package / name} nor"
        f" {package.parent / name}: install the wheel again, or run from a whole checkout"
    )


def _recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(recipe_folder().glob("*.yaml")):
        try:
            recipe = OmegaConf.to_container(OmegaConf.load(path))
        except (YAMLError, ValueError) as error:
            raise ValueError(f"recipe must be a YAML file, got {path}: {error}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"recipe must be a YAML mapping, got a {type(recipe).__name__} in {path}")
        yield path.stem, {str(key): value for key, value in recipe.items()}


def _epoch_at(fraction: float, *, _root_: DictConfig) -> int:
    """Return the epoch that lies at a fraction of ``trainer.max_epochs``, zero-based, at most the last one."""
    epochs = OmegaConf.select(_root_, "trainer.max_epochs")
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(
            f"trainer.max_epochs must be at least 1 for ${{epoch_at:{fraction}}}, got {epochs}: set it, or give the"
            " epochs of the callbacks themselves"
        )
    if not 0 <= fraction <= 1:
        raise ValueError(f"epoch_at must get a fraction in [0, 1], got {fraction}")
    return min(round(fraction * epochs), epochs - 1)


def _epochs_at(*fractions: float, _root_: DictConfig) -> list[int]:
    """Return the epochs at several fractions, ascending; in a short run two of them can be one."""
    return sorted({_epoch_at(fraction, _root_=_root_) for fraction in fractions})
