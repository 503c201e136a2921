"""The error family. Everything a user can cause raises one of these, and its text names what to do."""


class DvqError(Exception):
    """Base of all errors that dvq-rt raises on purpose."""


class ConfigError(DvqError, ValueError):
    """A size, option or configuration file is wrong."""


class InputError(DvqError, ValueError):
    """An argument of a call (label, image, codes, sampling parameter) is wrong."""


class DataError(DvqError):
    """A training folder or archive cannot be used."""


class CheckpointError(DvqError):
    """A checkpoint folder or a published checkpoint cannot be read."""


class EngineError(DvqError):
    """An engine folder is missing, incomplete, corrupted or too new."""


class BackendError(DvqError):
    """The execution backend or device that was asked for is not available or failed."""


class ExportError(DvqError):
    """An export did not reach parity with PyTorch, or a graph could not be built."""


class TrainingError(DvqError):
    """A training run cannot come right any more."""
