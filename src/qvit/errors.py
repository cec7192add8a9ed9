"""Every error that a user of qvit can cause, each a sentence that names the thing and the way out.

The commands print the message and exit with a status that is not 0 (:mod:`qvit.cli.ending`); the library raises the
class. No PyTorch here.
"""


class QvitError(Exception):
    """Base of every error that qvit raises on purpose."""


class ConfigError(QvitError, ValueError):
    """A configuration, recipe or command-line value that cannot be meant."""


class UnsupportedModelError(QvitError, TypeError):
    """A model, or a module inside it, that qvit cannot quantize."""


class UncalibratedError(QvitError, RuntimeError):
    """A quantized model was run before its scales were set."""


class ModeError(QvitError, RuntimeError):
    """A model is in evaluation mode where it has to be in training mode, or the other way round."""


class TeacherMismatchError(QvitError, ValueError):
    """A teacher whose layers, heads or classes do not fit the student or the data."""


class DataError(QvitError, ValueError):
    """A data set that is absent, empty or does not fit the model."""


class CorruptImageError(DataError):
    """An image file that cannot be decoded."""


class CheckpointError(QvitError, ValueError):
    """A checkpoint that is absent, damaged, of another format or of another model."""


class NewerCheckpointError(CheckpointError):
    """A checkpoint of a later version than this qvit reads; it is not damaged."""


class PackedFileError(QvitError, ValueError):
    """A packed model file that is absent, damaged, edited, newer than this qvit, or no packed model at all."""


class HubError(QvitError, OSError):
    """The Hugging Face Hub, or timm's download from it, does not hand out or take a model."""


class OutputError(QvitError, OSError):
    """A file that cannot be written: a full disk, a read-only folder."""


class NonFiniteLossError(QvitError, ArithmeticError):
    """Training produced a NaN or an infinity."""


class TrainingStopped(QvitError):  # noqa: N818  # no error, and no finished run: the commands exit with status 143
    """Training was told to stop (SIGTERM), and has saved where it is."""


class UnsupportedPythonError(QvitError, ImportError):
    """qvit was imported in a sub-interpreter, or by a Python without its lock."""


class MissingExtraError(QvitError, ImportError):
    """Something of the training wing was asked for without its dependencies installed."""
