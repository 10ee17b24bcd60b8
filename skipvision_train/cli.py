"""``skipvision <command> [overrides]``: find the command, compose its configuration with Hydra, run it.

A command is one word or two (``data check``); the ``data`` ones take a recipe as their one positional argument.

Only the standard library is imported at module level, so that ``skipvision --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

COMMANDS = {
    "train": "train one stage; with --dry-run only show what would be trained",
    "pipeline": "train several stages, each from the model of the one before it",
    "sketches": "write the embedded data set",
    "calibrate": "measure what each layer gives visual tokens and find a skip plan",
    "export": "a checkpoint of a run as a plain model directory",
    "evaluate": "score a model on tasks",
    "bench": "plans side by side on your questions: score, FLOPs, times, memory",
    "generate": "answer questions about images",
    "serve": "a page on which people ask a model about their images",
    "analyze": "the analyses of the Skip-Vision paper on a checkpoint",
    "data check": "read everything of a recipe; what cannot be used, what an epoch takes",
    "data preview": "a page with samples of a recipe, and which tokens are supervised",
    "flops": "what a prefill costs under a plan; needs no model",
    "plan-run": "memory, communication and time of a stage on any number of GPUs; needs none",
    "report": "tables and figures from finished runs",
    "demo": "the whole road on the embedded data set",
}

_GROUPS = {"data": "RECIPE"}
"""First words of commands of two, and the positional argument that these commands take."""

_TEXTS = {"generate": ("prompt", "system")}
"""Fields that hold what people write: quoted here, because commas, colons and brackets mean something to Hydra."""

# Hydra's options whose value is an argument of its own.
_WITH_VALUE = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir")

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
        show(usage())
        raise SystemExit(0)
    if arguments[0] == "--version":
        from skipvision_train import __version__

        sys.stdout.write(f"skipvision {__version__}\n")
        raise SystemExit(0)
    name, rest = command_name(arguments)
    try:
        run_command(name, rest)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    raise SystemExit(0)


def command_name(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command, and what stands behind it with a recipe spelled out as ``recipe=...``.

    Raises:
        SystemExit: after an error message for an unknown command, or after the help of a first word.
    """
    first, *rest = arguments
    if first not in _GROUPS:
        if first not in COMMANDS or " " in first:
            fail(f"{first!r} is no command{suggestion(first, COMMANDS)}; commands are {', '.join(COMMANDS)}")
        return first, rest
    known = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if rest[:1] in (["-h"], ["--help"]):
        show(usage(known))
        raise SystemExit(0)
    if not rest or rest[0].startswith("-"):
        fail(f"{first!r} needs a second word; commands are {', '.join(known)}")
    name = f"{first} {rest[0]}"
    if name not in known:
        fail(f"{name!r} is no command{suggestion(name, known)}; commands are {', '.join(known)}")
    return name, _named_recipe(name, rest[1:])


def _named_recipe(name: str, arguments: Sequence[str]) -> list[str]:
    """The arguments, a recipe among them as an override."""
    found = [
        place
        for place, argument in enumerate(arguments)
        if "=" not in argument
        and not argument.startswith(("-", "~"))
        and not (place and arguments[place - 1] in _WITH_VALUE)
    ]
    given = [arguments[place] for place in found] + [text for text in arguments if text.startswith("recipe=")]
    if len(given) > 1:
        fail(f"{name} takes one recipe, found {' and '.join(given)}")
    result = list(arguments)
    for place in found:
        result[place] = f"recipe={_quoted(arguments[place])}"  # a path may hold what Hydra's grammar gives a meaning
    return result


def _quoted(text: str) -> str:
    """``text`` as a quoted value of Hydra's grammar, in which backslashes count before a quote, and ``${`` begins an
    interpolation."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return "'" + escaped.replace("${", "\\${") + "'"


def _quoted_text(name: str, argument: str) -> str:
    """An override of a field that holds a text, quoted unless it is already."""
    key, equals, value = argument.partition("=")
    if key not in _TEXTS.get(name, ()) or not equals or value == "null":
        return argument
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return argument
    return f"{key}={_quoted(value)}"


def _positional(name: str) -> str:
    return f" {_GROUPS[name.split()[0]]}" if " " in name else ""


def show(text: str) -> None:
    """Write to stdout; a reader that has seen enough (``| head``) is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage(names: Iterable[str] = COMMANDS) -> str:
    """The text of ``skipvision --help``, with some of the commands."""
    shown = {name: name + _positional(name) for name in names}
    width = max(map(len, shown.values()))
    lines = [f"  {words:<{width}}  {COMMANDS[name]}" for name, words in shown.items()]
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
    """Compose the configuration of one command from its file in ``conf/`` and overrides, and run it.

    Raises:
        SystemExit: after an error message for everything a user can mend.
    """
    if "--help" in arguments or "-h" in arguments:
        from skipvision_train.config.reference import help_text

        show(
            help_text(name, COMMANDS[name], f"skipvision {name}{_positional(name)} [group=file ...] [field=value ...]")
        )
        return
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from skipvision_train.resources import resource_dir

    file = module_name(name)
    module = importlib.import_module(f"skipvision_train.commands.{file}")
    ConfigStore.instance().store(name=f"{file}_schema", node=module.Config)
    sys.argv = [f"skipvision {name}", *hydra_arguments(name, arguments, module.Config)]
    application = hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name=file)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        application(_task(module.run))()
        return
    # Hydra would print its own report and exit; with this it raises, and the message is made here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        application(_task(module.run))()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, arguments))
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def module_name(command: str) -> str:
    """Of a command's module in ``skipvision_train.commands``, and of its file in ``conf/``."""
    return command.replace(" ", "_").replace("-", "_")


def hydra_arguments(name: str, arguments: Sequence[str], schema: type) -> list[str]:
    """The user's arguments with ours beside them, ``--dry-run`` as an override, and ``group=null`` as ``~group``.

    Ours stand directly before the user's first override: Hydra's parser takes only one run of overrides.
    """
    for text in _TEXTS.get(name, ()):
        if (times := sum(argument.startswith(f"{text}=") for argument in arguments)) > 1:
            fail(f"{text}: given {times} times; one run takes one, and input=FILE.jsonl asks many questions")
    from skipvision_train.config.groups import with_left_out
    from skipvision_train.errors import ConfigError

    try:
        arguments = with_left_out(module_name(name), [_quoted_text(name, argument) for argument in arguments])
    except ConfigError as error:
        fail(str(error))
    types = {field.name: field.type for field in dataclasses.fields(schema)}
    if types.get("plan") in ("PlanSpec", "PlanSpec | None"):
        arguments = [part for argument in arguments for part in _plan_file(argument)]
    given = {argument.lstrip("+~").split("=", 1)[0] for argument in arguments}
    ours = [setting for setting in HYDRA_SETTINGS if setting.split("=", 1)[0] not in given]
    if "dry_run" in types and "--dry-run" in arguments:
        ours.append("dry_run=true")
        arguments = [argument for argument in arguments if argument != "--dry-run"]
    overrides = (i for i, a in enumerate(arguments) if not a.startswith("-") and ("=" in a or a.startswith("~")))
    first = next(overrides, len(arguments))
    return [*arguments[:first], *ours, *arguments[first:]]


def _plan_file(argument: str) -> tuple[str, ...]:
    """``plan=some/file.json`` spelled out: the group's choice and its path. Everything else stays as it is."""
    key, _, value = argument.partition("=")
    if key != "plan" or not value.endswith(".json"):
        if key == "plan" and "/" in value and os.path.isdir(value):
            name = "plan.json" if os.path.isfile(os.path.join(value, "plan.json")) else "FILE.json"
            fail(f"plan: {value} is a folder; name a plan file in it, plan={os.path.join(value, name)}")
        return (argument,)
    return "plan=file", f"plan.path='{value}'"


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
        except _out_of_memory() as error:
            if os.environ.get("SKIPVISION_TRACEBACK") == "1":
                raise
            fail(f"too little memory: {str(error).splitlines()[0]}; try {_less_memory(config)}")

    return task


def _out_of_memory() -> tuple[type[BaseException], ...]:
    """What torch raises on a full GPU; nothing where no command has imported torch."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)


def _less_memory(config: Any) -> str:
    """Fields of a command's configuration that would take less memory."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    ways = [f"{name} below {given[name]}" for name in ("batch_size", "max_rows") if name in given]
    if "trainer" in given:
        ways.append(f"trainer.per_device_batch below {given['trainer'].per_device_batch}")
    if given.get("precision", "bf16") in (None, "fp32"):
        ways.append("precision=bf16")
    return " or ".join(ways) or "a device with more memory"


def _start_logging() -> None:
    """Log to stderr, from the first process only below warnings."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s" if first else "rank %(process)d %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for kernels that no command here needs


def _take_local_rank(arguments: list[str]) -> list[str]:
    """Move ``--local_rank=N``, which the deepspeed launcher inserts, to the environment."""
    kept = []
    for argument in arguments:
        if argument.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", argument.split("=", 1)[1])
        else:
            kept.append(argument)
    return kept


def explain(error: BaseException, arguments: Sequence[str] = ()) -> str:
    """One line for a mistake in an override or a YAML file: the key, what is wrong, close matches.

    Args:
        error: Hydra's or OmegaConf's.
        arguments: of the command, for the folders of configurations that they name.
    """
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import (
        ConfigAttributeError,
        ConfigKeyError,
        InterpolationResolutionError,
        MissingMandatoryValue,
        OmegaConfBaseException,
    )

    from skipvision_train.config.groups import config_folders, missing

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            return missing(str(link.missing_cfg_file), link.options or (), config_folders(arguments))
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
    message = str(detail.msg or detail).splitlines()[0]
    if message.endswith("is not a ListConfig, list or tuple."):
        return f"{key}: {detail.value!r} is no list; write '{key}=[{detail.value}]'"
    return f"{key}: {message}"


def _fields(error: Any) -> list[str]:
    """Names that would have been right at the place of a key error."""
    kind = error.object_type
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
