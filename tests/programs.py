"""What a JAX program consists of: primitives, custom calls, collectives."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax


def equations(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """Every equation of a function's jaxpr, those of inner jaxprs included."""
    yield from _inside(jax.make_jaxpr(function)(*arguments))


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from _inside(entry)
    elif hasattr(value, "eqns"):  # a jaxpr, open or closed
        for equation in value.eqns:
            yield equation
            yield from _inside(list(equation.params.values()))


def primitives(function: Callable[..., Any], *arguments: Any) -> collections.Counter:
    """How often a function's jaxpr calls each primitive of jax_na: short names."""
    prefix = "neighborhood_attention"
    names = (e.primitive.name for e in equations(function, *arguments))
    return collections.Counter(
        name.removeprefix(prefix).removeprefix("_") or "forward"
        for name in names
        if name.startswith(prefix)
    )


def custom_calls(text: str) -> collections.Counter:
    """How often a program calls each native kernel; StableHLO or compiled HLO."""
    target = r'custom_call_target="(jax_na_\w+)"|custom_call @(jax_na_\w+)\('
    return collections.Counter(a or b for a, b in re.findall(target, text))


def functions_called(text: str) -> dict[str, int]:
    """Like :func:`custom_calls`, whatever the implementation: "forward", "backward"."""
    result: collections.Counter = collections.Counter()
    for name, count in custom_calls(text).items():
        result[name.split("_")[2]] += count
    return dict(result)


def custom_call_shapes(compiled: str) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the first result of each native call in compiled HLO, by function."""
    pattern = r"= \(\w+\[([\d,]*)\].*custom_call_target=\"jax_na_(\w+)_\w+\""
    result: dict[str, list[tuple[int, ...]]] = {}
    for shape, function in re.findall(pattern, compiled):
        sizes = tuple(int(size) for size in shape.split(",") if size)
        result.setdefault(function, []).append(sizes)
    return result


_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|"
    r"collective-broadcast|reduce-scatter)(?:-start)?\("
)


def collectives(compiled: str) -> dict[str, int]:
    """How often compiled HLO communicates, by kind."""
    return dict(collections.Counter(_COLLECTIVE.findall(compiled)))


def attributes(text: str, target: str) -> dict[str, Any]:
    """Attributes of the call of a native kernel in StableHLO, as Python values."""
    found = re.search(rf"@{target}\(.*?backend_config = {{(.*?)}}", text)
    assert found is not None, f"no call of {target}"
    result: dict[str, Any] = {}
    for name, value in re.findall(r"(\w+) = (.+?)(?=, \w+ = |$)", found.group(1)):
        tensor = re.fullmatch(r"dense<(.*)> : tensor<(\d+)xi64>", value)
        if tensor is not None:
            numbers = [int(n) for n in re.findall(r"-?\d+", tensor.group(1))]
            result[name] = numbers * (int(tensor.group(2)) // len(numbers))
        elif value in ("true", "false"):
            result[name] = value == "true"
        else:
            result[name] = float(value.split(" : ")[0])
    return result
