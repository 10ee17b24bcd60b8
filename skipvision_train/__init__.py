"""Train and run vision-language models that skip the visual computation that teaches them nothing."""

__version__ = "0.1.0"
