"""Every error a user can cause.

- MoeEngineError
  - ModelFormatError        the model file is damaged or says something impossible
    - UnsupportedModelError the file is fine, but this version cannot run it
  - TraceFormatError        the trace file is damaged or is none
  - CalibrationError        a file of moe-engine calibrate is damaged or is none
  - CapacityError           the model, or the request, does not fit the memory or context it was given
  - ConfigError             an option has a value that makes no sense
  - DecodeError             the decode worker or the GPU has stopped answering: load the engine anew
  - NativeLibraryError      the compiled part is missing or does not fit this machine
"""


class MoeEngineError(Exception):
    """Base of all errors that this package raises on purpose; the message says what to do."""


class ModelFormatError(MoeEngineError):
    """The model file is truncated, damaged or inconsistent."""


class UnsupportedModelError(ModelFormatError):
    """The file is well-formed, but its architecture, tensor type or tokenizer is not supported."""


class TraceFormatError(MoeEngineError):
    """A trace file (recorded routing) is damaged, inconsistent or no such file."""


class CalibrationError(MoeEngineError):
    """A calibration file (what a machine delivers) is damaged, of another version, or no such file."""


class CapacityError(MoeEngineError):
    """Something does not fit into the memory budget or the context it was given."""


class ConfigError(MoeEngineError, ValueError):
    """An option or argument has an impossible value."""


class NativeLibraryError(MoeEngineError):
    """The compiled CPU kernels are missing or cannot run on this machine."""


class DecodeError(MoeEngineError):
    """The decode worker has failed or stalled, or the GPU has waited for it in vain."""
