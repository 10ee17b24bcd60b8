"""``skipvision <command> [overrides]``: find the command, compose its configuration with Hydra, run it.

Only the standard library is imported at module level, so that ``skipvision --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

COMMANDS = {
    "train": "train one stage; with --dry-run only show what would be trained",
    "sketches": "write the embedded data set",
    "calibrate": "measure what each layer gives visual tokens and find a skip plan",
    "evaluate": "score a model on tasks",
    "generate": "answer questions about images",
    "analyze": "the analyses of the Skip-Vision paper on a checkpoint",
    "flops": "what a prefill costs under a plan; needs no model",
    "report": "tables and figures from finished runs",
    "demo": "the whole road on the embedded data set",
}

# No working-directory change, no .hydra folder, no log files: a run's folder holds what the run itself writes, and
# under torchrun every rank composes. A user's own override of one of these keys replaces it.
HYDRA_SETTINGS = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra.sweep.dir='outputs/multirun/${now:%Y-%m-%d_%H-%M-%S}'",
    "hydra.sweep.subdir=.",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0, or 1 after ``error: ...`` on stderr for a mistake the user can mend."""
    arguments = _take_local_rank(list(sys.argv[1:] if argv is None else argv))
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        raise SystemExit(0)
    if arguments[0] == "--version":
        from skipvision_train import __version__

        sys.stdout.write(f"skipvision {__version__}\n")
        raise SystemExit(0)
    name, *rest = arguments
    if name not in COMMANDS:
        fail(f"{name!r} is no command{suggestion(name, COMMANDS)}; commands are {', '.join(COMMANDS)}")
    try:
        run_command(name, rest)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    raise SystemExit(0)


def usage() -> str:
    """The text of ``skipvision --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: skipvision <command> [key=value ...]",
            "",
            *lines,
            "",
            "skipvision <command> --help      the command's configuration",
            "skipvision <command> --cfg job   the same with your overrides applied",
            "",
        ]
    )


def fail(message: str) -> NoReturn:
    """Print ``error: message`` and exit with status 1."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(1)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing if no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Compose the configuration of one command from ``conf/<name>.yaml`` and overrides, and run it.

    Raises:
        SystemExit: after an error message for everything a user can mend.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from skipvision_train.resources import resource_dir

    module = importlib.import_module(f"skipvision_train.commands.{name}")
    ConfigStore.instance().store(name=f"{name}_schema", node=module.Config)
    sys.argv = [f"skipvision {name}", *hydra_arguments(name, arguments, module.Config)]
    application = hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name=name)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        application(_task(module.run))()
        return
    # Hydra would print its own report and exit; with this it raises, and the message is made here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        application(_task(module.run))()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def hydra_arguments(name: str, arguments: Sequence[str], schema: type) -> list[str]:
    """The user's arguments with ours beside them, and ``--dry-run`` as an override.

    Ours stand directly before the user's first override: Hydra's parser takes only one run of overrides.
    """
    if any(field.name == "plan" and field.type == "PlanSpec" for field in dataclasses.fields(schema)):
        arguments = [part for argument in arguments for part in _plan_file(argument)]
    given = {argument.lstrip("+~").split("=", 1)[0] for argument in arguments}
    ours = [setting for setting in (*HYDRA_SETTINGS, *_help(name)) if setting.split("=", 1)[0] not in given]
    if any(field.name == "dry_run" for field in dataclasses.fields(schema)) and "--dry-run" in arguments:
        ours.append("dry_run=true")
        arguments = [argument for argument in arguments if argument != "--dry-run"]
    overrides = (i for i, a in enumerate(arguments) if not a.startswith("-") and ("=" in a or a.startswith("~")))
    first = next(overrides, len(arguments))
    return [*arguments[:first], *ours, *arguments[first:]]


def _plan_file(argument: str) -> tuple[str, ...]:
    """``plan=some/file.json`` spelled out: the group's choice and its path. Everything else stays as it is."""
    key, _, value = argument.partition("=")
    if key != "plan" or not value.endswith(".json"):
        return (argument,)
    return "plan=file", f"plan.path='{value}'"


def _help(name: str) -> tuple[str, ...]:
    return (
        f"hydra.help.app_name='skipvision {name}'",
        f"hydra.help.header='skipvision {name}: {COMMANDS[name]}'",
    )


def _task(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """The function that Hydra calls with the composed configuration."""

    def task(cfg: Any) -> None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from skipvision_train.errors import SkipVisionError

        _start_logging()
        try:
            config = OmegaConf.to_object(cfg)
        except OmegaConfBaseException as error:
            fail(explain(error))
        try:
            run(config)
        except SkipVisionError as error:
            if os.environ.get("SKIPVISION_TRACEBACK") == "1":
                raise
            fail(str(error))

    return task


def _start_logging() -> None:
    """Log to stderr, from the first process only below warnings."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s" if first else "rank %(process)d %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )


def _take_local_rank(arguments: list[str]) -> list[str]:
    """Move ``--local_rank=N``, which the deepspeed launcher inserts, to the environment."""
    kept = []
    for argument in arguments:
        if argument.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", argument.split("=", 1)[1])
        else:
            kept.append(argument)
    return kept


def explain(error: BaseException) -> str:
    """One line for a mistake in an override or a YAML file: the key, what is wrong, close matches."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import (
        ConfigAttributeError,
        ConfigKeyError,
        InterpolationResolutionError,
        MissingMandatoryValue,
        OmegaConfBaseException,
    )

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            group, _, choice = str(link.missing_cfg_file).removesuffix(".yaml").rpartition("/")
            options = sorted(link.options or ())
            known = f"; {group}/ has {', '.join(options)}" if options else ""
            return f"{group or 'config'}: no configuration named {choice!r}{suggestion(choice, options)}{known}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: no override; write key=value, and quote values with special characters"
    detail = next((link for link in chain if isinstance(link, OmegaConfBaseException)), None)
    if detail is None:
        return " ".join(str(error).split())
    key = str(detail.full_key or detail.key or "configuration")
    if isinstance(detail, MissingMandatoryValue):
        return f"{key}: needs a value; give it as {key}=..."
    if isinstance(detail, ConfigAttributeError | ConfigKeyError) and not isinstance(
        detail, InterpolationResolutionError
    ):
        known_fields = _fields(detail)
        listed = f"; {key.rpartition('.')[0] or 'the configuration'} has {', '.join(known_fields)}"
        return f"{key}: no such field{suggestion(key.rpartition('.')[2], known_fields)}{listed if known_fields else ''}"
    return f"{key}: {str(detail.msg or detail).splitlines()[0]}"


def _fields(error: Any) -> list[str]:
    """Names that would have been right at the place of a key error."""
    kind = error.object_type
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
