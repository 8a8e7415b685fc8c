"""The native kernels that this installation holds, registered with XLA.

A handler's name and attributes are a stable interface: exported programs refer to them.
"""

from __future__ import annotations

import importlib
import types

import jax

# Platform as JAX names it in lowering rules, our extension module, XLA's platform name.
_MODULES = (("cpu", "jax_na._cpu", "cpu"), ("cuda", "jax_na._cuda", "CUDA"))


def _runtime_api_version() -> tuple[int, int] | None:
    """The version of XLA's FFI that the running jaxlib implements, if it tells."""
    from jaxlib import _jax

    version = getattr(getattr(_jax, "ffi", None), "api_version", None)
    return tuple(version()) if callable(version) else None


def _check_version(name: str, module: types.ModuleType) -> None:
    """Refuses a module that is newer than the running jaxlib.

    XLA itself would refuse it only when the backend starts, and then no JAX operation
    works at all.
    """
    import jaxlib

    major, minor = module.xla_ffi_api_version
    runtime = _runtime_api_version()
    if runtime is not None and (major, minor) > runtime:
        raise ImportError(
            f"{name} was built for version {major}.{minor} of XLA's FFI, but jaxlib "
            f"{jaxlib.__version__} implements {runtime[0]}.{runtime[1]}: upgrade jaxlib "
            "or rebuild jax_na against it."
        )


def _load() -> dict[str, types.ModuleType]:
    """The extension modules of this installation, by platform."""
    modules = {}
    for platform, name, _ in _MODULES:
        try:
            modules[platform] = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue
        _check_version(name, modules[platform])
    return modules


_LOADED = _load()


def module(platform: str) -> types.ModuleType | None:
    """The extension module for a platform, None where it was not built."""
    return _LOADED.get(platform)


def _register() -> dict[str, frozenset[str]]:
    targets = {}
    for platform, _, xla_platform in _MODULES:
        if platform not in _LOADED:
            continue
        registrations = _LOADED[platform].registrations()
        for target, handler in registrations.items():
            jax.ffi.register_ffi_target(target, handler, platform=xla_platform)
            # Lets XLA split a call over its leading axes (_native.py).
            jax.ffi.register_ffi_target_as_batch_partitionable(target)
        targets[platform] = frozenset(registrations)
    return targets


#: Names of the registered handlers per platform; a platform not built is absent.
TARGETS: dict[str, frozenset[str]] = _register()


def target_name(function: str, implementation: str) -> str:
    """Name of the handler of a function: "forward", "backward", "pair", ..."""
    return f"jax_na_{function}_{implementation}"


def export_safety_checks() -> list[jax.export.DisabledSafetyCheck]:
    """Checks to disable so that ``jax.export`` accepts this library's custom calls.

    ``jax.export.export(jax.jit(f), disabled_checks=jax_na.export_safety_checks())``.
    The names and attributes of the custom calls are kept stable within a major version.

    Returns:
        One ``jax.export.DisabledSafetyCheck`` per native kernel that jax_na can emit.
    """
    names = {
        target_name(function, implementation)
        for functions, implementations in (
            (("forward", "backward"), ("fused", "naive")),
            (("pair", "gather", "scatter"), ("gemm", "naive")),
        )
        for function in functions
        for implementation in implementations
    }
    names.update(*TARGETS.values())
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in sorted(names)]
