"""What lmms-eval hands over, checked: model arguments, a task's generation settings, prompts."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from skipvision_train.config.plans import FIELDS, PlanSpec
from skipvision_train.data.records import IMAGE_MARKER
from skipvision_train.errors import ConfigError
from skipvision_train.inference.decoding import Sampling

FILLED_IN = "\n\n"
"""The stop string that lmms-eval gives to every task that names none: it would cut an answer after one paragraph."""

LITERAL_MARKER = "[image]"
"""What an image marker becomes that is text and shows no image."""


@dataclass(frozen=True)
class ModelArguments:
    """``--model_args``, and what lmms-eval adds from ``--batch_size`` and ``--device``.

    Attributes:
        pretrained: the model directory: one of ours, or of transformers.
        plan: None is the model's own.
        bank: folder of a plan bank: every task runs under the plan of its name, others under the universal one.
        device: as torch names it; None takes this process's GPU if there is one.
        precision: ``fp32``, ``bf16`` or ``fp16``; None keeps what the checkpoint was saved in.
        batch_size: requests per batch.
        max_new_tokens: where a task's answers are cut that does not say it itself.
    """

    pretrained: str
    plan: PlanSpec | None = None
    bank: str | None = None
    device: str | None = None
    precision: str | None = None
    batch_size: int = 1
    max_new_tokens: int = 1024

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ModelArguments:
        """Check arguments.

        Raises:
            ConfigError: an unknown or missing one, a value of the wrong form, or plan and bank together.
        """
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in names]:
            raise ConfigError(f"model_args.{unknown[0]}: unknown; use {', '.join(names)}")
        values = {name: value for name, value in given.items() if value is not None}
        if "pretrained" not in values:
            raise ConfigError("model_args.pretrained: missing; give the model directory as pretrained=DIRECTORY")
        if "plan" in values and "bank" in values:
            raise ConfigError("model_args.bank: given with plan; a bank brings its plans, leave one of them out")
        for name in ("batch_size", "max_new_tokens"):
            if name in values:
                values[name] = _positive(f"model_args.{name}", values[name])
        for name in ("pretrained", "plan", "bank", "device", "precision"):
            if name in values:
                values[name] = str(values[name])
        if "plan" in values:
            values["plan"] = parse_plan(values["plan"])
        return cls(**values)


def parse_plan(text: str) -> PlanSpec:
    """A plan from one word of text.

    Args:
        text: a plan file; or a method, alone or with its fields behind colons, values as in YAML: ``dense``,
            ``vskip:count=8``, ``vskip:layers=[20,21]:bypass=norm``, ``fastv:layer=2:keep=0.5``.

    Raises:
        ConfigError: neither, or a field that the method does not read or of the wrong form.
    """
    method, *parts = text.split(":")
    if method not in FIELDS:
        if Path(text).is_file():
            return PlanSpec("file", path=text)
        raise ConfigError(
            f"model_args.plan: {text!r} is neither a file nor a method; methods are {', '.join(FIELDS)}, "
            "fields follow behind colons, as in vskip:count=8"
        )
    hints, values = get_type_hints(PlanSpec), {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name not in FIELDS[method]:
            known = ", ".join(f"{field}=..." for field in FIELDS[method]) or "none"
            raise ConfigError(f"model_args.plan: {method} has no field {part!r}; its fields are {known}")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"model_args.plan: {name}={value} cannot be read as a value") from error
        hint = int | float | list[int | float] if name == "keep" else hints[name]
        if not _fits(values[name], hint):
            raise ConfigError(f"model_args.plan: {name}={value}; {method} needs {_described(hint)}")
    return PlanSpec(method, **values)


@dataclass(frozen=True)
class Generation:
    """How a request is answered.

    Attributes:
        sampling: how tokens are chosen.
        until: the answer ends before the first of these.
    """

    sampling: Sampling
    until: tuple[str, ...]

    @classmethod
    def read(cls, settings: Mapping[str, Any], max_new_tokens: int) -> Generation:
        """A task's ``generation_kwargs``. Settings of other models' image processing are left aside.

        Args:
            settings: as lmms-eval hands them over.
            max_new_tokens: where the task does not say it.

        Raises:
            ConfigError: beam search, or a value of the wrong form.
        """
        if (settings.get("num_beams") or 1) != 1:
            raise ConfigError(f"generation_kwargs.num_beams: {settings['num_beams']}; only 1 can be run under a plan")
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(stop, str) for stop in until):
            raise ConfigError(f"generation_kwargs.until: {until}; use text, or a list of texts")
        draws = settings.get("do_sample")
        temperature = settings.get("temperature")
        if temperature is None:
            temperature = 1.0 if draws else 0.0
        if draws is False:
            temperature = 0.0
        limit = settings.get("max_new_tokens")
        values: dict[str, Any] = {
            "max_new_tokens": max_new_tokens if limit is None else limit,
            "temperature": temperature,
            "top_p": settings.get("top_p") or 1.0,  # with greedy decoding many tasks say 0
            "top_k": settings.get("top_k") or 0,
        }
        for name, value in values.items():
            if type(value) not in (int, float):
                raise ConfigError(f"generation_kwargs.{name}: {value!r}; use a number")
        try:
            sampling = Sampling(**{**values, "max_new_tokens": int(values["max_new_tokens"])})
        except ConfigError as error:
            raise ConfigError(f"generation_kwargs.{error}") from error
        return cls(sampling, tuple(stop for stop in until if stop and stop != FILLED_IN))

    def cut(self, text: str) -> str:
        """The answer without what follows a stop string."""
        return text[: min((at for stop in self.until if (at := text.find(stop)) >= 0), default=len(text))].strip()


def place_images(text: str, images: int) -> str:
    """A prompt with one marker per image.

    Markers that are as many as the images say where these stand. Otherwise they are words of the question (a text about
    HTML, one picture named twice): they become ``LITERAL_MARKER``, and the images stand first.
    """
    if text.count(IMAGE_MARKER) == images:
        return text
    text = text.replace(IMAGE_MARKER, LITERAL_MARKER)
    return "\n".join([IMAGE_MARKER] * images + [text])


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or number != float(value):
        raise ConfigError(f"{name}: {value!r}; use a whole number, at least 1")
    return number


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that YAML made has the annotated type; a bool is no int."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(entry, get_args(hint)[0]) for entry in value)
    return type(value) is hint


def _described(hint: Any) -> str:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
    found = [words.get(option, "a list") for option in options if option is not type(None)]
    return " or ".join(dict.fromkeys(found))
