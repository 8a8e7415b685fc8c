from typing_extensions import CapsuleType

#: Version (major, minor) of XLA's FFI that this module was built against.
xla_ffi_api_version: tuple[int, int]

def registrations() -> dict[str, CapsuleType]:
    """The handlers by target name."""

def runtime_version() -> int:
    """The version of the CUDA runtime inside this module, e.g. 13000 for 13.0."""

def driver_version() -> int:
    """The newest CUDA version that the installed driver supports; 0 without a driver.

    Starts no context.
    """
