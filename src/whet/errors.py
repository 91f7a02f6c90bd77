"""What can go wrong for a user, by kind. Every message names the item, its value and the remedy."""


class WhetError(Exception):
    """Base of all errors that whet raises for its users. The command line prints them and exits 2."""


class ConfigError(WhetError, ValueError):
    """A setting is unknown, has a wrong value, or does not go with another."""


class DataError(WhetError, ValueError):
    """A data file or a row of it cannot be used."""


class ModelError(WhetError, ValueError):
    """A model or tokenizer cannot be loaded, or does not do what the run needs."""


class EngineError(WhetError, RuntimeError):
    """An inference engine failed or did not answer in time."""


class RewardError(WhetError, RuntimeError):
    """A reward function could not be found, or failed for every episode."""


class CheckpointError(WhetError, RuntimeError):
    """A checkpoint cannot be written, found or read."""


class TrainingError(WhetError, RuntimeError):
    """Training produced something that must not be built upon, such as a non-finite loss."""
