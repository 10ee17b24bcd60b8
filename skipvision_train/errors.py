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
