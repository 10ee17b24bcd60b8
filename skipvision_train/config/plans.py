"""Skip plans in configurations: the fields of ``conf/plan/*.yaml``, and the plan that they name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from skipvision_train.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from skipvision_train.calibration.bank import PlanBank
    from skipvision_train.plans.plan import SkipPlan


@dataclass
class PlanSpec:
    """A plan by its method. null in any field leaves it to the method's own default; :data:`FIELDS` says whose is what.

    The module ``plans.methods`` documents the methods and their defaults.
    """

    method: str = "dense"
    """One of :data:`FIELDS`."""
    layers: list[int] | None = None
    """Layers that skip, or at which tokens leave."""
    count: int | None = None
    """Instead of ``layers``: the deepest so many. A stand-in where only the number matters, as for FLOPs."""
    published: bool | None = None
    """true takes the layers that are published for the model."""
    layer: int | None = None
    """At whose entry tokens leave."""
    keep: Any = None
    """What stays: a share (0.5) or a number (144); a list where ``layers`` has several."""
    bypass: str | None = None
    """What replaces a skipped attention: zero or norm."""
    kinds: list[str] | None = None
    """Token kinds that the plan concerns: retained, middle, skipped, summary."""
    evict: list[str] | None = None
    """Token kinds that leave the KV cache after prefill."""
    evict_when: str | None = None
    """after_first_token or before_first_token."""
    level: str | None = None
    """What the skip KV-cache drops: small, middle + small, or all but summary."""
    positions: str | None = None
    """keep or renumber."""
    tokens: int | None = None
    """SparseVLM's table: 192, 128, 96 or 64."""
    version: int | None = None
    """SparseVLM's version: 1 or 2."""
    registers: int | None = None
    """Victor's learned tokens behind every image."""
    path: str | None = None
    """A plan file, or the folder of a plan bank, as ``skipvision calibrate`` writes it."""
    task: str | None = None
    """Whose plan of the bank; null: the universal one, or, where records have tasks, each record's own."""


FIELDS: dict[str, tuple[str, ...]] = {
    "own": (),
    "dense": (),
    "skip_ffn": ("kinds", "evict", "evict_when"),
    "skip_kv": ("level", "evict_when"),
    "vskip": ("layers", "count", "bypass", "kinds"),
    "ffn_skip": ("layers", "count", "kinds"),
    "shortv": ("layers", "count", "published", "kinds"),
    "vtw": ("layer", "published", "kinds"),
    "fastv": ("layer", "keep", "kinds"),
    "pyramiddrop": ("layers", "keep", "positions", "kinds"),
    "sparsevlm": ("tokens", "version", "layers", "keep", "kinds"),
    "victor": ("layer", "registers", "kinds"),
    "file": ("path",),
    "bank": ("path", "task"),
}
"""The methods, and the fields that each of them reads."""


def build_plan(spec: PlanSpec, num_layers: int, model: str | None = None, own: SkipPlan | None = None) -> SkipPlan:
    """The plan that ``spec`` names, for a model of ``num_layers`` layers.

    Args:
        spec: method and fields.
        num_layers: the model's depth.
        model: its name in ``plans.presets``, for ``published``.
        own: the plan that the checkpoint has; None: there is no checkpoint.

    Raises:
        ConfigError: an unknown method, a field that the method does not read, or values that make no plan; the message
            begins with the field's path.
    """
    given = _given(spec)
    if spec.method == "own":
        if own is None:
            raise ConfigError("plan.method: 'own' is a checkpoint's plan, and here is none; name another method")
        return own
    try:
        if spec.method == "file":
            return _from_file(spec.path).bind(num_layers)
        if spec.method == "bank":
            bank = load_bank(spec)
            return (bank.universal if spec.task is None else bank.plan_for(spec.task)).bind(num_layers)
        if given.pop("published", False):
            return _published(spec.method, given, model).bind(num_layers)
        if "count" in FIELDS[spec.method]:
            return _on_layers(spec.method, given, num_layers)
        return _builder(spec.method)(**given).bind(num_layers)
    except PlanError as error:
        raise ConfigError(f"plan: {error}") from error


def _given(spec: PlanSpec) -> dict[str, Any]:
    """The fields that are set, in the form the builders take.

    Raises:
        ConfigError: an unknown method, a field it does not read, or ``keep`` of the wrong form.
    """
    from skipvision_train.plans.rules import as_kinds

    if spec.method not in FIELDS:
        raise ConfigError(f"plan.method: {spec.method!r} is unknown; use {', '.join(FIELDS)}")
    names = (field.name for field in fields(spec) if field.name != "method")
    given = {name: value for name in names if (value := getattr(spec, name)) is not None}
    for name in given:
        if name not in (known := FIELDS[spec.method]):
            listed = f"; it reads {', '.join(f'plan.{field}' for field in known)}" if known else ""
            raise ConfigError(f"plan.{name}: {spec.method} does not read it{listed}")
    if "keep" in given and isinstance(given["keep"], list) != ("layers" in FIELDS[spec.method]):
        form = "a list, one entry per layer" if "layers" in FIELDS[spec.method] else "one number"
        raise ConfigError(f"plan.keep: {given['keep']}; {spec.method} needs {form}")
    try:
        return {name: as_kinds(value) if name == "kinds" else value for name, value in given.items()}
    except PlanError as error:
        raise ConfigError(f"plan.{error}") from error


def _from_file(path: str | None) -> SkipPlan:
    from skipvision_train.plans.plan import SkipPlan

    if path is None:
        raise ConfigError("plan.path: needs a value; give the plan file as plan.path=...")
    return SkipPlan.load(path)


def load_bank(spec: PlanSpec, model_hash: str | None = None) -> PlanBank:
    """The plan bank that ``spec`` names.

    Args:
        spec: of the method ``bank``.
        model_hash: of the model it is for (``models.identity.model_hash``); None does not check.

    Raises:
        ConfigError: no path.
        PlanError: no bank, or another model's.
    """
    from skipvision_train.calibration.bank import PlanBank

    if spec.path is None:
        raise ConfigError("plan.path: needs a value; give the bank's folder as plan.path=...")
    return PlanBank.load(spec.path, model_hash)


def _published(method: str, given: dict[str, Any], model: str | None) -> SkipPlan:
    """The layers that somebody published for ``model``.

    Raises:
        ConfigError: other fields are given as well, or nobody says which model it is.
        PlanError: nothing is published.
    """
    from skipvision_train.plans.presets import preset

    if given:
        raise ConfigError(f"plan.published: true with plan.{next(iter(given))}; the published plan is taken as it is")
    if model is None:
        raise ConfigError("plan.published: the model has no name to look up; give the layers instead")
    return preset(method, model)


def _on_layers(method: str, given: dict[str, Any], num_layers: int) -> SkipPlan:
    """A plan on listed layers, or on the deepest ``count``, which its provenance then says.

    Raises:
        ConfigError: neither layers nor a count, both, or more than the model has.
        PlanError: layers that do not exist.
    """
    count = given.pop("count", None)
    if (count is None) == ("layers" not in given):
        ways = "plan.layers=[...] or plan.count=N (the deepest N layers)"
        raise ConfigError(f"plan.layers: {method} needs exactly one of {ways}")
    if count is None:
        return _builder(method)(**given).bind(num_layers)
    if not 0 <= count <= num_layers:
        raise ConfigError(f"plan.count: {count}; the model has {num_layers} layers, use 0 to {num_layers}")
    plan = _builder(method)(layers=range(num_layers - count, num_layers), **given).bind(num_layers)
    note = f"the deepest {count} of {num_layers}, chosen by depth alone; calibrate to choose by what they add"
    return replace(plan, provenance={"layers": note})


def _builder(method: str) -> Callable[..., SkipPlan]:
    """The builder of that name in ``plans.methods``."""
    from skipvision_train.plans import methods

    return getattr(methods, method)
