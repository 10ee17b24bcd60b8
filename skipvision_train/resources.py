"""Where the files that are no Python live: in the package when installed, at the top of a checkout otherwise."""

from __future__ import annotations

from pathlib import Path


def resource_dir(name: str) -> Path:
    """Absolute path of ``conf`` or ``data_recipes``.

    Raises:
        FileNotFoundError: neither the package nor the checkout has it; the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"{name}: neither in {package} nor in {package.parent}")
