"""The errors that a user can cause and mend; the command line prints their message alone, without a traceback.

A message names the place (file, record, field, layer), what was found there, and what would be right.
"""


class SkipVisionError(ValueError):
    """Base of every error whose cause is input: configuration, data, checkpoint or plan."""


class ConfigError(SkipVisionError):
    """A configuration value that cannot work; the message begins with the field's path."""


class DataError(SkipVisionError):
    """A record, an image or a template that cannot be used; the message names the file or the record."""


class CheckpointError(SkipVisionError):
    """A checkpoint that is missing, incomplete, or does not fit the model it is loaded into."""


class PlanError(SkipVisionError):
    """A skip plan that is malformed, contradicts itself, or does not fit the model's depth."""


class TrainingError(SkipVisionError):
    """Training that cannot go on: numbers that are not finite, too little memory, processes that do not fit."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line: its first line, all of them where that one ends in a
    colon, or the exception's type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines) if lines[0].endswith(":") else lines[0]
