"""How ``skipvision calibrate`` scores and chooses: the fields of ``conf/strategy`` and ``conf/budget``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from skipvision_train.errors import ConfigError

if TYPE_CHECKING:
    from skipvision_train.calibration.search import Budget

SEARCHES = ("top", "greedy", "joint")


@dataclass
class StrategySpec:
    """How layers are scored and chosen."""

    name: str = "vig"
    """vig, vig_ffn, vig_block, vig_reverse, cosine, shortv or random."""
    bypass: str = "zero"
    """What replaces a skipped attention: ``zero`` nothing, ``norm`` the normed layer input (Eq. 6 to the letter)."""
    search: str = "top"
    """``top``: the N smallest scores (the paper); ``greedy``: one by one, all others scored again after each;
    ``joint``: attention and FFN of all layers compete by score per FLOP saved, until ``budget.flops`` is met."""
    rescore: bool = False
    """joint: score everything again after every choice."""


@dataclass
class BudgetSpec:
    """How many layers skip: one of the fields; half of them if none is given."""

    count: int | None = None
    """N layers."""
    share: float | None = None
    """A share of the layers, rounded down."""
    threshold: float | None = None
    """Nats: every layer whose score is at most this."""
    total: float | None = None
    """Nats: the most layers whose scores add up to at most this."""
    flops: float | None = None
    """Decoder FLOPs under the plan over the dense ones, at most; for ``strategy.search=joint``."""

    def check(self, search: str) -> None:
        """Refuse budgets that the search cannot read.

        Raises:
            ConfigError: none or several given, a value out of range, or one that another search wants.
        """
        if search == "joint":
            given = [name for name, value in vars(self).items() if value is not None]
            if given != ["flops"]:
                raise ConfigError(
                    f"budget: strategy.search=joint needs budget=flops; found {', '.join(given) or 'none'}"
                )
            if not 0 < float(self.flops or 0) <= 1:
                raise ConfigError(f"budget.flops: {self.flops}; a share of the dense FLOPs, above 0 and at most 1")
            return
        if self.flops is not None:
            raise ConfigError(f"budget.flops: strategy.search={search} does not read it; use strategy.search=joint")
        if search == "greedy" and (self.threshold is not None or self.total is not None):
            raise ConfigError("budget: strategy.search=greedy needs budget=count or budget=share")
        self.layers()

    def layers(self) -> Budget:
        """The same for ``calibration.search``.

        Raises:
            ConfigError: as :class:`Budget`.
        """
        from skipvision_train.calibration.search import Budget

        try:
            if vars(self) == vars(BudgetSpec()):
                return Budget(share=0.5)
            return Budget(self.count, self.share, self.threshold, self.total)
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith("budget") else f"budget.{text}") from error
