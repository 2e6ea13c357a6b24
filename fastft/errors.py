"""What a user can meet. Every message is one line: what was asked, what is there, what to do about it."""

from __future__ import annotations


class FastftError(ValueError):
    """Base of all errors that fastft raises on purpose. `exit_code`: what the command line ends with."""

    exit_code = 2


class ModelNotFoundError(FastftError):
    """A name or folder that holds no model, or a repository that cannot be reached."""


class QuantizationError(FastftError):
    """4-bit or 8-bit loading that cannot be done as asked."""


class DtypeError(FastftError):
    """A dtype that is not one, or that the device lacks."""


class TargetModulesError(FastftError):
    """An adapter whose targets match no module of the model."""


class AdapterError(FastftError):
    """An adapter's folder and the other arguments contradict each other."""


class ArgumentError(FastftError, TypeError):
    """A keyword that does not exist, or that belongs elsewhere."""


class CheckpointError(FastftError):
    """Weights or settings of a checkpoint or adapter that are missing or damaged."""


class SequenceLengthError(FastftError):
    """More positions asked for than the model was built with."""


class DatasetError(FastftError):
    """A data set that cannot be found, or whose columns are in no format that a trainer takes."""


class LigerError(FastftError):
    """`use_liger_kernel=True`, or Liger's kernels by hand, on a model that fastft patches."""


class PolicyError(FastftError):
    """A value that names no activation policy."""


class GraphsError(FastftError):
    """A value that is no setting of `cuda_graphs`."""


class PlanError(FastftError):
    """What `plan` was asked for is not there, or the model cannot be followed without its values."""


class FolderExistsError(FastftError, FileExistsError):
    """The new folder is there already, or another process is writing it."""


class WriteError(FastftError):
    """A result that cannot be written: a full disk, a folder without permission."""


class ExportError(FastftError):
    """What `export` was asked for cannot be written in that format, with the reason."""


class ProcessesError(FastftError):
    """More processes than GPUs, or a way of training in several that is not there."""


class DroppedMaskError(FastftError):
    """Packed documents, or attention within a window, under context parallelism, which would drop their mask."""


class ProofError(FastftError):
    """The result was written, loaded and compared, and is not what was trained: nothing is published."""

    exit_code = 1
