"""What a weight loader reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a checkpoint found no place, and which of the model's were not in the checkpoint.

    Attributes:
        missing: names the model has and the checkpoint lacks. A strict loader raises before it could report any.
        unused: names the checkpoint has and the model does not read.
    """

    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for a log: both counts, and the top-level parts the unused tensors belong to with their counts."""
        parts: dict[str, int] = {}
        for name in self.unused:
            part = name.split(".", 1)[0]
            parts[part] = parts.get(part, 0) + 1
        detail = ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
        line = f"missing {len(self.missing)}, unused {len(self.unused)}"
        return f"{line} ({detail})" if detail else line
