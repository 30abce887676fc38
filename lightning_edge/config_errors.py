"""What a mistake on the command line or in a configuration file is answered with."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_edge.config import compose, group_names, recipe_titles
from lightning_edge.config_check import nearest


def is_mendable(error: Exception) -> bool:
    """Return whether the user, not the programmer, can mend it.

    >>> is_mendable(FileNotFoundError("mnist.npz")), is_mendable(AssertionError())
    (True, False)
    """
    mendable = (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException, YAMLError)
    # Lightning's own word for a wrong argument, and a file that failed its check; by name, so that a wrong command line
    # need not wait for the imports.
    return isinstance(error, mendable) or type(error).__name__ in ("MisconfigurationException", "ArtifactMismatchError")


def message(error: Exception, arguments: Sequence[str], *, commands: Iterable[str] = ()) -> str:
    """Return one message that names the mistake and, where there are some, the nearest valid choices.

    Args:
        error: What was raised.
        arguments: The command line that led to it.
        commands: What may stand on the command line beside ``key=value``.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group} must be one of {', '.join(sorted(error.options))}, got {option!r}: " + nearest(
            option, error.options
        )
    if isinstance(error, OverrideParseException):
        key, equals, _ = error.override.partition("=")
        if equals and re.fullmatch(r"[+~]{0,2}[\w./@]+", key):
            return (
                f"{key} must have a value that Hydra can read, got {error.override!r}: the whole argument in quotes of"
                " the shell, no quotes around the keys of a mapping ('NAME={layers: {conv?: conv?}}')"
            )
        choices = [*commands, *(f"recipe={name}" for name in recipe_titles())]
        return f"arguments must be key=value, got {error.override!r}: {nearest(error.override, choices)}"
    unknown = re.search(r"(?:override|delete from config\.) '([^']+)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        return f"{unknown[1]} must be a key of the configuration: {_nearest_key(unknown[1], arguments)}"
    if isinstance(error, InstantiationException):
        where = re.search(r"full_key: (\S+)", str(error))
        cause = error.__cause__ or error
        kind = "" if isinstance(cause, ValueError | OSError) else f"{type(cause).__name__}: "
        return f"{where[1] + ': ' if where else ''}{kind}{cause}"
    below = error.__cause__ if isinstance(error, HydraException) else None
    return f"{error}\n{below}" if below else str(error)


def _nearest_key(key: str, arguments: Sequence[str]) -> str:
    """Return which keys come nearest to an unknown one, in the configuration that the chosen groups give."""
    groups = [argument for argument in arguments if argument.partition("=")[0].partition("@")[0] in group_names()]
    try:
        keys = dotted_keys(compose([group for group in groups if "," not in group or "[" in group]))
    except HydraException:  # an option of a folder of the user's own, or the group that has the mistake
        keys = dotted_keys(compose([]))
    parent = key.rpartition(".")[0]
    siblings = [other for other in keys if other.rpartition(".")[0] == parent]
    return nearest(key, siblings if get_close_matches(key, siblings) else keys)


def dotted_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted name of every node, outermost first.

    >>> dotted_keys(DictConfig({"data": {"seed": 0}}))
    ['data', 'data.seed']
    """
    names = []
    for key in map(str, cfg):
        names.append(f"{prefix}{key}")
        child = cfg._get_node(key)  # not cfg[key]: an interpolation stays as it is
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            names += dotted_keys(child, f"{prefix}{key}.")
    return names
