"""The command line: recipes through Hydra, finished stages resumed, commands on files."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_edge import __version__
from lightning_edge.cli_files import FILE_COMMANDS, FILE_USAGE, file_command
from lightning_edge.config import config_folder, group_names, recipe_hash, recipe_titles, register
from lightning_edge.config_check import check, nearest
from lightning_edge.config_errors import dotted_keys, is_mendable, message

_USAGE = """\
lightning-edge recipe=NAME [key=value ...]      compress a network as the recipe says
lightning-edge resume=FOLDER [key=value ...]    go on with an interrupted run, in its folder
"""
_FULL_ERROR = "HYDRA_FULL_ERROR"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 after an error, 2 for wrong usage.

    An error that the user can mend is one message on stderr; its trace too with ``HYDRA_FULL_ERROR=1``, which lets the
    exception through. A bug always shows its trace.

    Args:
        argv: The arguments without the program's name; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        if arguments[0] in FILE_COMMANDS:
            return file_command(arguments)
        if any(argument.startswith("resume=") for argument in arguments):
            return _resume(arguments)
        return _run(arguments)
    except SystemExit as stop:  # of argparse and of Hydra's own flags
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if _wants_trace() or not is_mendable(error):
            raise
        _report(error, arguments)
        return 2 if isinstance(error, OverrideParseException) else 1


def _overview() -> str:
    titles = recipe_titles()
    width = max(map(len, titles), default=0)
    recipes = "\n".join(f"  {name:<{width}}  {title}" for name, title in titles.items())
    return (
        f"lightning-edge {__version__}\n\n{_USAGE}{FILE_USAGE}\nrecipes:\n{recipes}\n\n"
        f"groups (group=option): {', '.join(group_names())}\n"
        "-m sweeps (recipe=a,b), --cfg job prints a configuration, --config-dir DIR adds your own groups and recipes,\n"
        "--hydra-help tells of more."
    )


def _run(arguments: list[str]) -> int:
    """Compose the configuration by Hydra and run its stages in Hydra's output folder, one job or a sweep."""
    register()
    failed = False

    def job(cfg: DictConfig) -> None:
        nonlocal failed
        with _full_error(asked):
            hydra_cfg = HydraConfig.get()
            try:
                _run_stages(cfg, Path(hydra_cfg.runtime.output_dir))
            except Exception as error:
                # A sweep's launcher, which may be another process, has to see the exception.
                if hydra_cfg.mode == RunMode.MULTIRUN or _wants_trace() or not is_mendable(error):
                    raise
                _report(error, arguments)
                failed = True

    asked, sys_argv = os.environ.get(_FULL_ERROR), sys.argv
    sys.argv = [sys_argv[0], *arguments]  # Hydra reads it, and so does Lightning where it starts the other ranks
    try:
        with _full_error("1"):  # or Hydra would print its own version of every error, and exit
            hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv = sys_argv
    return int(failed)


def _resume(arguments: list[str]) -> int:
    """Go on with the run whose configuration a folder holds."""
    overrides = [argument for argument in arguments if not argument.startswith("resume=")]
    folder = Path(next(argument for argument in arguments if argument not in overrides).removeprefix("resume="))
    saved = folder.resolve() / ".hydra"
    if not (saved / "config.yaml").is_file():
        raise FileNotFoundError(
            f"resume must name the folder of a run, got {str(folder)!r}, which holds no .hydra/config.yaml: give the"
            " folder that has the run's last.ckpt"
        )
    register()
    cfg = OmegaConf.load(saved / "config.yaml")
    assert isinstance(cfg, DictConfig)
    _override(cfg, overrides)
    folder = folder.resolve()
    # Ranks that Lightning starts repeat this command line from the folder that this one changes to.
    sys.argv = [sys.argv[0], f"resume={folder}", *overrides]
    hydra_cfg = OmegaConf.load(saved / "hydra.yaml")
    hydra_cfg.hydra.runtime.output_dir = str(folder)
    configure_log(hydra_cfg.hydra.job_logging, hydra_cfg.hydra.verbose)
    if Path(hydra_cfg.hydra.runtime.cwd).is_dir():
        os.chdir(hydra_cfg.hydra.runtime.cwd)  # relative paths of the data mean what they meant
    cfg.resume = str(folder)
    _run_stages(cfg, folder)
    return 0


def _override(cfg: DictConfig, overrides: list[str]) -> None:
    before = recipe_hash(cfg)
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if override.is_add() or override.is_delete() or override.is_sweep_override():
            raise ValueError(f"overrides of a resumed run must be key=value, got {override.input_line!r}")
        if key not in dotted_keys(cfg):
            raise ValueError(f"{key} must be a key of the saved configuration: {nearest(key, dotted_keys(cfg))}")
        OmegaConf.update(cfg, key, override.value())
    if recipe_hash(cfg) != before:
        raise ValueError(
            f"overrides of a resumed run must not change its result, got {overrides}: resume without them, or start a"
            " new run"
        )


def _run_stages(cfg: DictConfig, folder: Path) -> None:
    cfg.output = str(folder)
    check(cfg)
    from lightning_edge.pipeline import run  # it imports torch, which no wrong command line should wait for

    with warnings.catch_warnings():
        # What the libraries have to tell each other; our own warnings, and theirs to the user, stay.
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(lightning|torch|torchao|onnx|onnxscript)\b")
        run(cfg, folder)


@contextmanager
def _full_error(value: str | None) -> Iterator[None]:
    """Set or unset the variable by which Hydra lets exceptions through, for a while."""
    before = os.environ.get(_FULL_ERROR)
    _put(value)
    try:
        yield
    finally:
        _put(before)


def _put(value: str | None) -> None:
    if value is None:
        os.environ.pop(_FULL_ERROR, None)
    else:
        os.environ[_FULL_ERROR] = value


def _wants_trace() -> bool:
    return os.environ.get(_FULL_ERROR, "0") not in ("", "0")


def _report(error: Exception, arguments: Sequence[str]) -> None:
    print(f"lightning-edge: {message(error, arguments, commands=FILE_COMMANDS)}", file=sys.stderr)
    print(f"({_FULL_ERROR}=1 shows the stack trace)", file=sys.stderr)
