"""What a weight loader reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a checkpoint found no place, and which of the model's were not in the checkpoint.

    Attributes:
        missing: names the model has and no checkpoint gives: parts that start fresh, as a whole or in part. Whatever
            else is missing is an error of the loader.
        unused: names the checkpoint has and the model does not read.
    """

    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def within(self, part: str) -> LoadReport:
        """The same report with ``part`` before every name, for a model that is loaded part by part."""
        return LoadReport(
            tuple(f"{part}.{name}" for name in self.missing), tuple(f"{part}.{name}" for name in self.unused)
        )

    def __add__(self, other: LoadReport) -> LoadReport:
        """Both reports as one."""
        return LoadReport(self.missing + other.missing, self.unused + other.unused)

    def names(self) -> dict[str, list[str]]:
        """Both lists, as plain data for a file."""
        return {"missing": list(self.missing), "unused": list(self.unused)}

    def summary(self) -> str:
        """One line for a log: both counts, each with the top-level parts that its tensors belong to."""
        return f"missing {_by_part(self.missing)}, unused {_by_part(self.unused)}"


def _by_part(names: tuple[str, ...]) -> str:
    parts: dict[str, int] = {}
    for name in names:
        part = name.split(".", 1)[0]
        parts[part] = parts.get(part, 0) + 1
    detail = ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
    return f"{len(names)} ({detail})" if detail else "0"
