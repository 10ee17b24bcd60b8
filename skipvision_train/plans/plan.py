"""The skip plan: which tokens run which sublayer in which layer, as data.

A plan is immutable, hashable, comparable, printable as a table and stored as JSON. It knows nothing of tensors: the
executor (``executor.py``) runs it on a model, the layout (``layout.py``) says which position is of which kind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from skipvision_train.errors import PlanError
from skipvision_train.files import write_json
from skipvision_train.plans.rules import DENSE_RULE, EVICTION_TIMES, Drop, Kinds, LayerRule, TokenKind, as_kinds

FORMAT_VERSION = 2


@dataclass(frozen=True)
class SkipPlan:
    """The rules of all layers, where tokens leave the sequence, and what leaves the KV cache.

    Attributes:
        name: how the plan is called in tables and logs.
        rules: one rule per decoder layer, layer 0 first.
        rest: the rule of every layer after ``rules``, for a plan that fits models of any depth that have the layers it
            names; None for a plan of exactly ``len(rules)`` layers. :meth:`bind` turns the former into the latter.
        drops: where tokens leave the sequence, by ascending layer.
        evict: kinds removed from the KV cache of every layer after prefill (Skip-Vision, Eq. 7).
        evict_when: ``after_first_token`` (the paper's behaviour: the first generated token sees the full cache) or
            ``before_first_token`` (the last prompt position already attends to the reduced cache). The former where
            nothing is evicted: equal plans compare equal.
        registers: how many learned tokens must stand behind every image (Victor); their kind is ``SUMMARY``.
        provenance: how the plan was found (model, data, seed, scores); carried along, ignored by equality.

    Raises:
        PlanError: parts that contradict each other; the message names them.
    """

    name: str
    rules: tuple[LayerRule, ...] = ()
    rest: LayerRule | None = None
    drops: tuple[Drop, ...] = ()
    evict: Kinds = frozenset()
    evict_when: str = "after_first_token"
    registers: int = 0
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        rules = list(self.rules)
        while self.rest is not None and rules and rules[-1] == self.rest:
            rules.pop()  # one way to write every plan, so that equal plans compare equal
        drops = tuple(sorted(self.drops, key=lambda drop: drop.layer))
        if self.rest is None:
            drops = tuple(drop for drop in drops if drop.layer != len(rules))
        object.__setattr__(self, "rules", tuple(rules))
        object.__setattr__(self, "drops", drops)
        object.__setattr__(self, "evict", as_kinds(self.evict, "evict"))
        if not self.rules and self.rest is None:
            raise PlanError("rules: a plan needs one rule per decoder layer, found none")
        if self.evict_when not in EVICTION_TIMES:
            raise PlanError(f"evict_when: {self.evict_when!r} is unknown; use {' or '.join(EVICTION_TIMES)}")
        if TokenKind.TEXT in self.evict:
            raise PlanError("evict: text cannot leave the cache; only visual and summary tokens can")
        if not self.evict:
            object.__setattr__(self, "evict_when", EVICTION_TIMES[0])
        if isinstance(self.registers, bool) or not isinstance(self.registers, int) or self.registers < 0:
            raise PlanError(f"registers: {self.registers!r} is no number of tokens; use 0 or more")
        self._check_drops()

    def _check_drops(self) -> None:
        """Refuse drops that contradict each other or the rest of the plan."""
        if self.rest is None and self.drops and self.drops[-1].layer > len(self.rules):
            raise PlanError(
                f"drops: layer {self.drops[-1].layer} does not exist; the plan has {len(self.rules)} layers"
            )
        if self.drops and self.evict and self.evict_when == "before_first_token":
            raise PlanError(
                "drops: tokens are ranked by the last prompt token, which runs alone when tokens are evicted "
                "before_first_token; use evict_when='after_first_token'"
            )
        if len({drop.positions for drop in self.drops}) > 1:
            raise PlanError("drops: positions 'keep' and 'renumber' cannot both hold in one plan")
        for earlier, later in combinations(self.drops, 2):
            if earlier.layer == later.layer:
                raise PlanError(f"drops: two at the entry of layer {earlier.layer}; give each a layer of its own")
            if earlier.kinds & later.kinds and earlier.kinds != later.kinds:
                raise PlanError(
                    f"drops: layers {earlier.layer} and {later.layer} rank overlapping, different kinds "
                    f"({_names(earlier.kinds)}; {_names(later.kinds)}); use the same kinds in both"
                )
        for drop in self.drops:
            for layer, rule in self._rules_from(drop.layer):
                for what, kinds in (("no_attention", rule.no_attention), ("no_ffn", rule.no_ffn)):
                    if drop.keep and kinds & drop.kinds and not drop.kinds <= kinds:
                        raise PlanError(
                            f"layer {layer}: {what} concerns {_names(kinds)}, but the drop at layer {drop.layer} ranks "
                            f"{_names(drop.kinds)} together, so how many of them stay is not known beforehand; "
                            f"rank only {_names(kinds & drop.kinds)}, or leave out all of {_names(drop.kinds)}"
                        )

    def _rules_from(self, layer: int) -> list[tuple[int | str, LayerRule]]:
        """The rules of the layers from ``layer`` on, each with its number (or what names the rest)."""
        named: list[tuple[int | str, LayerRule]] = [(i, rule) for i, rule in enumerate(self.rules) if i >= layer]
        return named if self.rest is None else [*named, ("rest", self.rest)]

    @property
    def num_layers(self) -> int:
        """How many decoder layers the plan is written for.

        Raises:
            PlanError: it fits several depths; :meth:`bind` it first.
        """
        if self.rest is not None:
            raise PlanError(f"plan {self.name!r} fits models of several depths; bind(num_layers) makes it one of them")
        return len(self.rules)

    @property
    def is_dense(self) -> bool:
        """True if the plan changes nothing: no rule leaves anything out, nothing is dropped or evicted."""
        return not self.evict and not self.drops and all(rule.is_dense for _, rule in self._rules_from(0))

    def bind(self, num_layers: int) -> SkipPlan:
        """The same plan for a model of exactly ``num_layers`` layers.

        Raises:
            PlanError: the plan is written for another depth, or names a layer that the model does not have.
        """
        if self.rest is None:
            self.check_depth(num_layers)
            return self
        outside = {i for i, rule in enumerate(self.rules) if rule != self.rest and i >= num_layers}
        outside |= {drop.layer for drop in self.drops if drop.layer > num_layers}  # at the depth itself means never
        if outside:
            raise PlanError(
                f"{self.name}: layers {sorted(outside)} do not exist; the model has layers 0 to {num_layers - 1}"
            )
        rules = self.rules[:num_layers]
        return replace(self, rules=rules + (self.rest,) * (num_layers - len(rules)), rest=None)

    def layers_without_attention(self) -> tuple[int, ...]:
        """The layers in which some kind issues no query, ascending.

        Raises:
            PlanError: every further layer is one of them, and the plan fits several depths.
        """
        depth = self.num_layers if self.rest is not None and self.rest.no_attention else len(self.rules)
        return tuple(i for i in range(depth) if self.rules[i].no_attention)

    def layers_without_ffn(self) -> tuple[int, ...]:
        """The layers in which some kind runs no feed-forward network, ascending.

        Raises:
            PlanError: every further layer is one of them, and the plan fits several depths.
        """
        depth = self.num_layers if self.rest is not None and self.rest.no_ffn else len(self.rules)
        return tuple(i for i in range(depth) if self.rules[i].no_ffn)

    def drop_at(self, layer: int) -> Drop | None:
        """What leaves the sequence at the entry of ``layer``."""
        return next((drop for drop in self.drops if drop.layer == layer), None)

    def check_depth(self, num_layers: int) -> None:
        """Refuse a model of another depth.

        Raises:
            PlanError: with both depths.
        """
        if num_layers != self.num_layers:
            raise PlanError(f"plan {self.name!r} has {self.num_layers} layers, the model has {num_layers}")

    def with_rule(self, layer: int, rule: LayerRule) -> SkipPlan:
        """A copy whose rule of ``layer`` also leaves out what ``rule`` leaves out.

        Raises:
            PlanError: the plan has no such layer, or another bypass there.
        """
        rules = list(self.rules)
        if self.rest is not None:
            rules += [self.rest] * (layer + 1 - len(rules))
        if not 0 <= layer < len(rules):
            raise PlanError(f"{self.name}: layer {layer} does not exist; the plan has layers 0 to {len(rules) - 1}")
        rules[layer] = rules[layer].combine(rule)
        return replace(self, rules=tuple(rules))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as ``save`` writes it; an unbound plan has no ``num_layers``."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "num_layers": len(self.rules) if self.rest is None else None,
            "rules": [rule.to_dict() for rule in self.rules],
            "rest": None if self.rest is None else self.rest.to_dict(),
            "drops": [drop.to_dict() for drop in self.drops],
            "evict": sorted(k.name.lower() for k in self.evict),
            "evict_when": self.evict_when,
            "registers": self.registers,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "plan") -> SkipPlan:
        """Read the JSON form; ``where`` (a file name, say) begins the error message.

        Raises:
            PlanError: a field is missing, unknown or of the wrong form.
        """
        known = set(cls.__dataclass_fields__) | {"format_version", "num_layers"}
        if not isinstance(data, dict):
            raise PlanError(f"{where}: a plan is a JSON object, found {type(data).__name__}")
        if unknown := sorted(set(data) - known):
            raise PlanError(f"{where}: unknown fields {', '.join(unknown)}; a plan has {', '.join(sorted(known))}")
        if data.get("format_version") != FORMAT_VERSION:
            raise PlanError(f"{where}: format_version is {data.get('format_version')!r}, expected {FORMAT_VERSION}")
        values = {key: value for key, value in data.items() if key not in ("format_version", "num_layers")}
        try:
            values["rules"] = tuple(LayerRule(**rule) for rule in data["rules"])
            values["drops"] = tuple(Drop(**drop) for drop in data.get("drops", ()))
            if data.get("rest") is not None:
                values["rest"] = LayerRule(**data["rest"])
            plan = cls(name=values.pop("name"), **values)
        except (KeyError, TypeError) as error:
            raise PlanError(f"{where}: not a plan: {error!r}") from error
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from error
        depth = len(plan.rules) if plan.rest is None else None
        if data.get("num_layers", depth) != depth:
            found = f"there are {depth} rules" if plan.rest is None else "the plan has a rest, so it fits any depth"
            raise PlanError(f"{where}: num_layers is {data['num_layers']} but {found}")
        return plan

    def save(self, path: str | Path) -> None:
        """Write the JSON form; a reader never sees half a file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> SkipPlan:
        """Read a plan file.

        Raises:
            PlanError: the file is missing or no file, is no JSON, or is no plan; the message names it.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise PlanError(f"{path}: no such plan file") from error
        except OSError as error:
            raise PlanError(f"{path}: cannot be read as a plan file: {error.strerror}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: not JSON: {error}") from error
        return cls.from_dict(data, where=str(path))

    def table(self) -> str:
        """The plan as text, one line per run of layers with the same rule."""
        numbered = self._rules_from(0)
        lines = [f"plan {self.name}: {'any depth' if self.rest is not None else f'{len(self.rules)} layers'}"]
        start = 0
        for i, (_, rule) in enumerate(numbered, start=1):
            if i < len(numbered) and numbered[i][1] == rule and self.drop_at(i) is None:
                continue
            if (drop := self.drop_at(start)) is not None:
                lines.append(f"  entry {start:>7}: {_describe_drop(drop)}")
            last = numbered[i - 1][0]
            span = str(numbered[start][0]) if i - start == 1 else f"{start}-{last}"
            lines.append(f"  layer {span:>7}: {_describe(rule)}")
            start = i
        lines += [f"  entry {drop.layer:>7}: {_describe_drop(drop)}" for drop in self.drops if drop.layer >= start]
        if self.registers:
            lines.append(f"  {self.registers} learned registers behind every image")
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


def _describe_drop(drop: Drop) -> str:
    if not drop.keep:
        return f"all of {_names(drop.kinds)} leave the sequence (positions: {drop.positions})"
    amount = f"{drop.keep:.4g} of" if isinstance(drop.keep, float) else str(drop.keep)
    recycled = ", some of the others recycled" if drop.recycle else ""
    return (
        f"{amount} {_names(drop.kinds)} stay, ranked by {drop.score.replace('_', ' ')} of layer {drop.score_layer}"
        f"{recycled} (positions: {drop.positions})"
    )


def compose(plans: Sequence[SkipPlan], name: str | None = None) -> SkipPlan:
    """The plan that leaves out, drops and evicts what any of ``plans`` does.

    Raises:
        PlanError: no plans, different depths, different bypasses in one layer, different eviction times, two drops at
            one layer, or a rule for tokens that another plan has dropped before: the message says which.
    """
    if not plans:
        raise PlanError("compose: no plans given")
    times = {plan.evict_when for plan in plans if plan.evict}
    if len(times) > 1:
        raise PlanError(f"compose: eviction {' and '.join(sorted(times))} cannot both hold")
    bound = [plan for plan in plans if plan.rest is None]
    length = max(len(plan.rules) for plan in plans)
    if bound:
        length = bound[0].num_layers
        plans = [plan.bind(length) for plan in plans]
    rules, rest = [DENSE_RULE] * length, DENSE_RULE
    for plan in plans:
        for i in range(length):
            own = plan.rules[i] if i < len(plan.rules) else plan.rest
            rules[i] = rules[i].combine(own or DENSE_RULE)
        rest = rest.combine(plan.rest or DENSE_RULE)
    composed = SkipPlan(
        name=name or " + ".join(plan.name for plan in plans),
        rules=tuple(rules),
        rest=None if bound else rest,
        drops=tuple(dict.fromkeys(drop for plan in plans for drop in plan.drops)),
        evict=frozenset().union(*(plan.evict for plan in plans)),
        evict_when=times.pop() if times else "after_first_token",
        registers=max(plan.registers for plan in plans),
    )
    for drop in composed.drops:
        if not drop.keep:
            _refuse_rules_for_the_dropped(plans, drop)
    return composed


def _refuse_rules_for_the_dropped(plans: Sequence[SkipPlan], drop: Drop) -> None:
    """Raise PlanError if a plan names layers for tokens of which none is left there.

    What a plan leaves out in all layers names none: it means the tokens wherever they are.
    """
    for plan in plans:
        rules = [rule for _, rule in plan._rules_from(0)]
        everywhere = {
            "no_attention": frozenset.intersection(*(rule.no_attention for rule in rules)),
            "no_ffn": frozenset.intersection(*(rule.no_ffn for rule in rules)),
        }
        for layer, rule in plan._rules_from(drop.layer):
            for what, kinds in (("no_attention", rule.no_attention), ("no_ffn", rule.no_ffn)):
                kinds -= everywhere[what]
                if kinds and kinds <= drop.kinds:
                    raise PlanError(
                        f"compose: {plan.name} has {what} for {_names(kinds)} in layer {layer}, but all of "
                        f"{_names(drop.kinds)} have left the sequence at layer {drop.layer}; name only layers before it"
                    )
