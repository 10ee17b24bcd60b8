"""The parts of a skip plan: token kinds, what one layer leaves out, and where tokens leave the sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from skipvision_train.errors import PlanError


class TokenKind(IntEnum):
    """What a position of the language model's sequence is. The integer is what layout tensors hold.

    ``RETAINED``, ``MIDDLE`` and ``SKIPPED`` are visual. ``MIDDLE`` tokens are retained ones too, of a multi-scale
    resampler's levels between the coarsest and the finest; only what leaves the KV cache tells them apart.
    """

    TEXT = 0
    RETAINED = 1
    SKIPPED = 2
    SUMMARY = 3
    PAD = 4
    MIDDLE = 5


Kinds = frozenset[TokenKind]

VISUAL: Kinds = frozenset({TokenKind.RETAINED, TokenKind.MIDDLE, TokenKind.SKIPPED})
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
            ``zero`` nothing, ``norm`` its normed layer input (V-Skip, Eq. 6 taken literally). ``zero`` where no kind
            is without attention: equal rules compare equal.
    """

    no_attention: Kinds = frozenset()
    no_ffn: Kinds = frozenset()
    bypass: str = "zero"

    def __post_init__(self) -> None:
        if self.bypass not in BYPASSES:
            raise PlanError(f"bypass: {self.bypass!r} is unknown; use {' or '.join(BYPASSES)}")
        object.__setattr__(self, "no_attention", as_kinds(self.no_attention, "no_attention"))
        object.__setattr__(self, "no_ffn", as_kinds(self.no_ffn, "no_ffn"))
        if not self.no_attention:
            object.__setattr__(self, "bypass", "zero")

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


SCORES = ("none", "last_token", "raters", "corrected_raters")
SCORE_WEIGHTS = ("previous", "own")
POSITIONS = ("keep", "renumber")
ROUNDINGS = ("nearest", "down")


@dataclass(frozen=True)
class Drop:
    """Tokens that leave the sequence at the entry of a layer: later layers neither compute nor see them.

    A document's droppable tokens (all its images together) are ranked by a score and the best stay; equal scores are
    ranked by their place. How many stay follows from the layout alone.

    Attributes:
        layer: at whose entry they leave; the model's depth stands for never.
        keep: how many stay: a float is a share of what the document had before the first drop, an int a number.
        kinds: which kinds are ranked.
        score: what ranks them. ``none`` (nothing stays), ``last_token``: the attention they get from the last prompt
            token, mean over heads (FastV, PyramidDrop); ``raters``: from the text tokens that resemble the image most
            (SparseVLM); ``corrected_raters``: the same divided by what the rotary embedding alone would give, over the
            14 heads that look at the image most (SparseVLM+).
        weights: whose queries and keys give the score, always from that layer's own input: the ``previous`` layer's
            (FastV, SparseVLM) or the layer's ``own`` (PyramidDrop).
        positions: ``keep`` leaves gaps in the rotary positions, ``renumber`` closes them.
        rounding: how a share becomes a number: ``nearest`` (ties to even) or ``down``.
        recycle: some of what leaves is clustered and averaged into new tokens behind the survivors (SparseVLM v1).
    """

    layer: int
    keep: float = 0
    kinds: Kinds = VISUAL
    score: str = "last_token"
    weights: str = "previous"
    positions: str = "keep"
    rounding: str = "nearest"
    recycle: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", as_kinds(self.kinds, "drop.kinds"))
        choices = {"score": SCORES, "weights": SCORE_WEIGHTS, "positions": POSITIONS, "rounding": ROUNDINGS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise PlanError(f"drop.{name}: {getattr(self, name)!r} is unknown; use {', '.join(allowed)}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise PlanError(f"drop.layer: {self.layer!r} is no layer; layers are whole numbers from 0")
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not self.keep >= 0:
            raise PlanError(f"drop.keep: {self.keep!r} is neither a number of tokens nor a share from 0.0 to 1.0")
        if isinstance(self.keep, float) and self.keep > 1:
            raise PlanError(f"drop.keep: a share is at most 1.0, found {self.keep}; write a whole number for a count")
        if not self.kinds or self.kinds & {TokenKind.TEXT}:
            raise PlanError("drop.kinds: name visual or summary tokens; text cannot be dropped")
        if self.recycle and not self.keep:
            raise PlanError("drop.recycle: what is recycled is found by the scores that rank what stays; keep some")
        if not self.keep:  # nothing to rank: two plans that drop everything at the same layer are the same plan
            for name, value in (("keep", 0), ("score", "none"), ("weights", "previous"), ("rounding", "nearest")):
                object.__setattr__(self, name, value)
        elif self.score == "none":
            raise PlanError(f"drop.score: keeping {self.keep} tokens needs a score to rank them by")
        if self.layer < self.needs_score:
            raise PlanError(f"drop.layer: {self.layer}; the first layer that can drop so is {int(self.needs_score)}")

    def __eq__(self, other: object) -> bool:
        """As of any dataclass, but one token (``keep=1``) is not every token (``keep=1.0``)."""
        return isinstance(other, Drop) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return (isinstance(self.keep, float), *vars(self).values())

    @property
    def needs_score(self) -> bool:
        """True if the layer before this one has to score the tokens."""
        return self.score != "none" and self.weights == "previous"

    @property
    def score_layer(self) -> int | None:
        """The layer whose weights and input rank the tokens; None where nothing is ranked."""
        if self.score == "none":
            return None
        return self.layer - (self.weights == "previous")

    def kept(self, before: float, original: float) -> float:
        """How many of ``before`` droppable tokens stay in a document that had ``original`` of them.

        Whole numbers for whole numbers; fractions (means over samples) stay fractions.
        """
        wanted = float(self.keep)
        if isinstance(self.keep, float):
            wanted = self.keep * original
            if float(original).is_integer():
                wanted = round(wanted) if self.rounding == "nearest" else int(wanted + 1e-9)
        return min(wanted, before)

    def recycled(self, leaving: int) -> int:
        """How many new tokens are made of ``leaving`` ones (SparseVLM, Sec. 3.4; the counts are the public code's)."""
        return int((int(leaving * 0.3) + 1) / 10) + 1 if self.recycle and leaving else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**vars(self), "kinds": sorted(k.name.lower() for k in self.kinds)}
