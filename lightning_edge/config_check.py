"""What Hydra lets pass: keys that nobody reads, and arguments that a ``_target_`` does not take."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_edge.config import Tree, config_folder, dense_stage, group_names, keys, teacher_stage

_HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def check(cfg: DictConfig) -> None:
    """Raise unless every key of the configuration is one that something reads; instantiates nothing.

    Args:
        cfg: The composed configuration of a run.

    Raises:
        ValueError: With the nearest valid names, if a key is unknown, a ``_target_`` cannot be imported or is given
            an argument that its signature lacks, or no technique is chosen.
        OmegaConfBaseException: If an interpolation cannot be resolved or a mandatory value is missing.
    """
    if not set(cfg.callbacks) - set(cfg.dense.callbacks) and cfg.get("sensitivity") is None:
        raise ValueError(
            f"callbacks must hold a technique or an export, got only {sorted(cfg.callbacks)}: choose a recipe"
            " (recipe=NAME), or name them (callbacks=[default,pruning,export])"
        )
    if OmegaConf.is_interpolation(cfg, "teacher") and "larger" not in cfg:
        raise ValueError(
            f"model must name a larger network that can teach it, got {cfg.model.network._target_} without `larger` in"
            " its file: choose another model, or another teacher (distillation=self, distillation=resnet56)"
        )
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    _check_stage(cfg, prefix="")
    _check_stage(dense_stage(cfg), prefix="dense.")
    taught = teacher_stage(cfg)
    if taught is not None:
        _check_stage(taught, prefix="teacher.")
    if cfg.get("teacher") is not None and cfg.get("distillation") is None:
        raise ValueError("teacher must stand beside a distillation, got none: add distillation=larger, or drop teacher")
    if cfg.get("teacher") is not None and "larger" in cfg and "model" not in cfg.teacher:
        raise ValueError(
            f"teacher must say which network it is, got only {sorted(cfg.teacher)}: the training of the larger network"
            " that the model's file names is changed by +larger.KEY=VALUE"
        )
    if cfg.start not in ("dense", "scratch"):
        raise ValueError(f"start must be dense or scratch, got {cfg.start!r}")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a message: which of ``names`` come nearest to ``name``, or some of them if none does.

    >>> nearest("prunning", ["pruning", "sharing"])
    "did you mean 'pruning'?"
    """
    names = sorted(names)
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(other) for other in close)}?"
    return f"valid are {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


def _check_stage(cfg: DictConfig, *, prefix: str) -> None:
    _check_keys(cfg, _top_level_keys(), where=prefix)
    _check_keys(cfg.export, _export_keys(), where=f"{prefix}export.")
    nodes = {name: cfg[name] for name in ("model", "data", "trainer")}
    nodes |= {f"callbacks.{name}": node for name, node in cfg.callbacks.items()}
    for name, node in nodes.items():
        if not isinstance(node, DictConfig) or "_target_" not in node:
            others = [other.removeprefix("callbacks.") for other in nodes if other != name]
            raise ValueError(
                f"{prefix}{name} must have a _target_, got {node}: {nearest(name.removeprefix('callbacks.'), others)}"
            )
    for name, node in _target_nodes(cfg, prefix):
        _check_target(name, node)


def _check_keys(node: DictConfig, valid: Iterable[str], *, where: str) -> None:
    for key in map(str, node):
        if key not in valid:
            raise ValueError(f"{where}{key} must be a key that something reads: {nearest(key, valid)}")


def _top_level_keys() -> set[str]:
    own = {str(key) for key in OmegaConf.load(config_folder() / "config.yaml")}
    # A model's file may say how far it stands to be compressed, and which larger network can teach it.
    return (own | set(group_names()) | {"targets", "larger"}) - {"defaults", "hydra", "recipe"}


def _export_keys() -> set[str]:
    return {str(key) for path in (config_folder() / "export").glob("*.yaml") for key in OmegaConf.load(path)}


def _target_nodes(node: Tree, where: str) -> Iterator[tuple[str, DictConfig]]:
    """Yield the dotted name and the node of everything with a ``_target_``, outermost first."""
    if isinstance(node, DictConfig) and "_target_" in node:
        yield where.removesuffix("."), node
    for key in keys(node):
        child = node[key]
        if isinstance(child, DictConfig | ListConfig) and f"{where}{key}" not in ("dense", "teacher", "larger"):
            yield from _target_nodes(child, f"{where}{key}.")


def _check_target(name: str, node: DictConfig) -> None:
    parameters = _parameters(_locate(name, str(node["_target_"])))
    given = {str(key) for key in node} - set(_HYDRA_KEYS)
    if parameters is None:
        return
    kinds = {parameter.kind for parameter in parameters.values()}
    names = {
        parameter.name
        for parameter in parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    unknown = sorted(given - names) if inspect.Parameter.VAR_KEYWORD not in kinds else []
    if unknown:
        raise ValueError(
            f"{name}.{unknown[0]} must be an argument of {node['_target_']}: "
            + nearest(unknown[0], _HYDRA_KEYS if unknown[0].startswith("_") else names)
        )
    required = {key for key in names if parameters[key].default is inspect.Parameter.empty}
    lacking = sorted(required - given)
    if lacking and not node.get("_partial_") and "_args_" not in node:
        raise ValueError(f"{name}.{lacking[0]} must be given: {node['_target_']} has no default for it")


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    try:
        return dict(inspect.signature(target).parameters)
    except ValueError:  # some classes written in C tell no signature; calling them will
        return None


def _locate(name: str, target: str) -> Callable[..., Any]:
    """Return the object that a dotted name stands for: the longest importable module, then its attributes."""
    parts = target.split(".")
    found: Any = None
    for depth, part in enumerate(parts):
        path = ".".join(parts[: depth + 1])
        try:
            found = getattr(found, part) if hasattr(found, part) else import_module(path)
        except (ImportError, ValueError) as error:
            if isinstance(error, ImportError) and error.name != path:
                raise ValueError(f"{name}._target_ must be importable, got {target!r}: {error}") from error
            known = [other for other in dir(found) if not other.startswith("_")] if found else []
            hint = nearest(part, known) if known else "is its package installed?"
            raise ValueError(f"{name}._target_ must name something that exists, got {target!r}: {hint}") from error
    if not callable(found):
        raise ValueError(f"{name}._target_ must be callable, got {target!r}, a {type(found).__name__}")
    return cast(Callable[..., Any], found)
