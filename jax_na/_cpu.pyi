from typing_extensions import CapsuleType

#: Version (major, minor) of XLA's FFI that this module was built against.
xla_ffi_api_version: tuple[int, int]

def registrations() -> dict[str, CapsuleType]:
    """The handlers by target name."""

def fused_instruction_set() -> str:
    """What the fused kernels use on this machine: "avx512", "avx2" or "baseline"."""

def keys_of_query(
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    length: int,
    query_origin: int,
    query_length: int,
    key_origin: int,
    key_length: int,
    query: int,
) -> tuple[int, int, int]:
    """The local keys that a local query sees on one axis, as ffi/window.h has it.

    Returns:
        ``(first, count, bias_row)``: the keys ``first + dilation * t`` for ``t`` below
        ``count``, with rows ``bias_row + t`` of the relative positional bias.
    """

def queries_of_key(
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    length: int,
    query_origin: int,
    query_length: int,
    key_origin: int,
    key_length: int,
    key: int,
) -> tuple[int, int, int]:
    """The local queries that see a local key; their bias rows are ``bias_row - t``."""
