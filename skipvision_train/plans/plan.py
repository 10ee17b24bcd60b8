"""The skip plan: which tokens run which sublayer in which layer, as data.

A plan is immutable, hashable, comparable, printable as a table and stored as JSON. It knows nothing of tensors: the
executor (``executor.py``) runs it on a model, the layout (``layout.py``) says which position is of which kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from skipvision_train.errors import PlanError

FORMAT_VERSION = 1


class TokenKind(IntEnum):
    """What a position of the language model's sequence is. The integer is what layout tensors hold."""

    TEXT = 0
    RETAINED = 1
    SKIPPED = 2
    SUMMARY = 3
    PAD = 4


Kinds = frozenset[TokenKind]

VISUAL: Kinds = frozenset({TokenKind.RETAINED, TokenKind.SKIPPED})
"""The kinds that carry image content: what V-Skip, ShortV and FFN-Skip call *visual tokens*.

Summary tokens are not among them: they exist to gather the image by attention for the text that follows.
"""

BYPASSES = ("zero", "norm")
EVICTION_TIMES = ("after_first_token", "before_first_token")


def as_kinds(names: Iterable[str | TokenKind], where: str = "kinds") -> Kinds:
    """Turn kind names (any case) or members into a set; ``where`` names the field in the error.

    Raises:
        PlanError: a name that is no kind, or ``PAD``, which no plan may address.
    """
    allowed = [k.name.lower() for k in TokenKind if k is not TokenKind.PAD]
    found = set()
    for name in names:
        label = name.name.lower() if isinstance(name, TokenKind) else str(name).lower()
        if label not in allowed:
            raise PlanError(f"{where}: {label!r} is no token kind; use some of {', '.join(allowed)}")
        found.add(TokenKind[label.upper()])
    return frozenset(found)


@dataclass(frozen=True)
class LayerRule:
    """What one decoder layer leaves out. The default leaves out nothing.

    Attributes:
        no_attention: kinds that issue no query: no Q projection, no attention row, no O projection. Their keys and
            values are still projected and visible to everybody else.
        no_ffn: kinds whose feed-forward network is not run; the residual stream passes unchanged.
        bypass: what is added to the residual stream of a ``no_attention`` token in place of the attention output:
            ``zero`` nothing, ``norm`` its normed layer input (V-Skip, Eq. 6 taken literally).
    """

    no_attention: Kinds = frozenset()
    no_ffn: Kinds = frozenset()
    bypass: str = "zero"

    def __post_init__(self) -> None:
        if self.bypass not in BYPASSES:
            raise PlanError(f"bypass: {self.bypass!r} is unknown; use {' or '.join(BYPASSES)}")
        object.__setattr__(self, "no_attention", as_kinds(self.no_attention, "no_attention"))
        object.__setattr__(self, "no_ffn", as_kinds(self.no_ffn, "no_ffn"))

    @property
    def is_dense(self) -> bool:
        """True if every token runs every sublayer."""
        return not self.no_attention and not self.no_ffn

    def combine(self, other: LayerRule) -> LayerRule:
        """The rule that leaves out what either leaves out.

        Raises:
            PlanError: both bypass attention and disagree on what replaces it.
        """
        if self.no_attention and other.no_attention and self.bypass != other.bypass:
            raise PlanError(f"bypass: {self.bypass!r} and {other.bypass!r} cannot both hold in one layer")
        bypass = self.bypass if self.no_attention else other.bypass
        return LayerRule(self.no_attention | other.no_attention, self.no_ffn | other.no_ffn, bypass)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; kinds as sorted lower-case names."""
        return {
            "no_attention": sorted(k.name.lower() for k in self.no_attention),
            "no_ffn": sorted(k.name.lower() for k in self.no_ffn),
            "bypass": self.bypass,
        }


DENSE_RULE = LayerRule()


@dataclass(frozen=True)
class SkipPlan:
    """The rules of all layers, and what leaves the KV cache.

    Attributes:
        name: how the plan is called in tables and logs.
        rules: one rule per decoder layer, layer 0 first.
        evict: kinds removed from the KV cache of every layer after prefill (Skip-Vision, Eq. 7).
        evict_when: ``after_first_token`` (the paper's behaviour: the first generated token sees the full cache) or
            ``before_first_token`` (the last prompt position already attends to the reduced cache).
        provenance: how the plan was found (model, data, seed, scores); carried along, ignored by equality.
    """

    name: str
    rules: tuple[LayerRule, ...]
    evict: Kinds = frozenset()
    evict_when: str = "after_first_token"
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "evict", as_kinds(self.evict, "evict"))
        if not self.rules:
            raise PlanError("rules: a plan needs one rule per decoder layer, found none")
        if self.evict_when not in EVICTION_TIMES:
            raise PlanError(f"evict_when: {self.evict_when!r} is unknown; use {' or '.join(EVICTION_TIMES)}")
        if TokenKind.TEXT in self.evict:
            raise PlanError("evict: text cannot leave the cache; only visual and summary tokens can")

    @property
    def num_layers(self) -> int:
        """How many decoder layers the plan is written for."""
        return len(self.rules)

    @property
    def is_dense(self) -> bool:
        """True if the plan changes nothing: no rule leaves anything out and nothing is evicted."""
        return not self.evict and all(rule.is_dense for rule in self.rules)

    def layers_without_attention(self) -> tuple[int, ...]:
        """The layers in which some kind issues no query, ascending."""
        return tuple(i for i, rule in enumerate(self.rules) if rule.no_attention)

    def layers_without_ffn(self) -> tuple[int, ...]:
        """The layers in which some kind runs no feed-forward network, ascending."""
        return tuple(i for i, rule in enumerate(self.rules) if rule.no_ffn)

    def check_depth(self, num_layers: int) -> None:
        """Refuse a model of another depth.

        Raises:
            PlanError: with both depths.
        """
        if num_layers != self.num_layers:
            raise PlanError(f"plan {self.name!r} has {self.num_layers} layers, the model has {num_layers}")

    def with_rule(self, layer: int, rule: LayerRule) -> SkipPlan:
        """A copy whose rule of ``layer`` also leaves out what ``rule`` leaves out."""
        rules = list(self.rules)
        rules[layer] = rules[layer].combine(rule)
        return replace(self, rules=tuple(rules))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as ``save`` writes it."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "num_layers": self.num_layers,
            "rules": [rule.to_dict() for rule in self.rules],
            "evict": sorted(k.name.lower() for k in self.evict),
            "evict_when": self.evict_when,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "plan") -> SkipPlan:
        """Read the JSON form; ``where`` (a file name, say) begins the error message.

        Raises:
            PlanError: a field is missing, unknown or of the wrong form.
        """
        known = {"format_version", "name", "num_layers", "rules", "evict", "evict_when", "provenance"}
        if not isinstance(data, dict):
            raise PlanError(f"{where}: a plan is a JSON object, found {type(data).__name__}")
        if unknown := sorted(set(data) - known):
            raise PlanError(f"{where}: unknown fields {', '.join(unknown)}; a plan has {', '.join(sorted(known))}")
        if data.get("format_version") != FORMAT_VERSION:
            raise PlanError(f"{where}: format_version is {data.get('format_version')!r}, expected {FORMAT_VERSION}")
        try:
            rules = tuple(LayerRule(**rule) for rule in data["rules"])
            plan = cls(
                name=data["name"],
                rules=rules,
                evict=data.get("evict", ()),
                evict_when=data.get("evict_when", "after_first_token"),
                provenance=data.get("provenance", {}),
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"{where}: not a plan: {error!r}") from error
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from error
        if data.get("num_layers", plan.num_layers) != plan.num_layers:
            raise PlanError(f"{where}: num_layers is {data['num_layers']} but there are {plan.num_layers} rules")
        return plan

    def save(self, path: str | Path) -> None:
        """Write the JSON form; a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> SkipPlan:
        """Read a plan file.

        Raises:
            PlanError: the file is missing, is no JSON, or is no plan; the message names it.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise PlanError(f"{path}: no such plan file") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: not JSON: {error}") from error
        return cls.from_dict(data, where=str(path))

    def table(self) -> str:
        """The plan as text, one line per run of layers with the same rule."""
        lines = [f"plan {self.name}: {self.num_layers} layers"]
        start = 0
        for i in range(1, self.num_layers + 1):
            if i < self.num_layers and self.rules[i] == self.rules[start]:
                continue
            span = str(start) if i - start == 1 else f"{start}-{i - 1}"
            lines.append(f"  layer {span:>7}: {_describe(self.rules[start])}")
            start = i
        if self.evict:
            lines.append(f"  KV cache: {_names(self.evict)} leave {self.evict_when.replace('_', ' ')}")
        return "\n".join(lines)


def _names(kinds: Kinds) -> str:
    return ", ".join(k.name.lower() for k in sorted(kinds))


def _describe(rule: LayerRule) -> str:
    parts = []
    if rule.no_attention:
        parts.append(f"no attention query for {_names(rule.no_attention)} (bypass {rule.bypass})")
    if rule.no_ffn:
        parts.append(f"no FFN for {_names(rule.no_ffn)}")
    return "; ".join(parts) or "dense"


def compose(plans: Sequence[SkipPlan], name: str | None = None) -> SkipPlan:
    """The plan that leaves out what any of ``plans`` leaves out.

    Raises:
        PlanError: no plans, different depths, different bypasses in one layer, or different eviction times.
    """
    if not plans:
        raise PlanError("compose: no plans given")
    first = plans[0]
    times = {plan.evict_when for plan in plans if plan.evict}
    if len(times) > 1:
        raise PlanError(f"compose: eviction {' and '.join(sorted(times))} cannot both hold")
    rules = first.rules
    for plan in plans[1:]:
        plan.check_depth(first.num_layers)
        rules = tuple(a.combine(b) for a, b in zip(rules, plan.rules, strict=True))
    return SkipPlan(
        name=name or " + ".join(plan.name for plan in plans),
        rules=rules,
        evict=frozenset().union(*(plan.evict for plan in plans)),
        evict_when=times.pop() if times else "after_first_token",
    )
