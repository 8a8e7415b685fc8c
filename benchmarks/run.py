"""Times jax_na and its peers on one GPU.

    python benchmarks/run.py --cases benchmarks/cases.json --output results

Forward and backward by device time alone (timing.py), medians; useful TFLOP/s; visited
over useful work where jax_na's planner knows it; the ratio to the fastest peer. Prints a
table, and writes JSON lines, bar charts, and a chart of useful and visited work under the
rate of dense attention to the output folder. Peers that cannot be imported, or cannot run
a case, are left out and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import cases
import jax
import peers
import timing
import torch_peers

import jax_na

OURS = ("fused", "gemm", "naive", "xla")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One case and contender; times in milliseconds, None where not measured."""

    case: str
    contender: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    visited_over_useful: float | None = None
    refusal: str | None = None


Attention = Callable[..., jax.Array]


def _measure_jax(
    make: Callable[[cases.Case], Attention], case: cases.Case, calls: int
) -> tuple[float, float]:
    attend = make(case)
    *inputs, cotangent = case.operands()
    bias = case.bias_table
    if bias is not None:
        inputs.append(bias)
    forward = jax.jit(attend)
    _, vjp = jax.vjp(forward, *inputs)
    backward = jax.jit(lambda vjp, cotangent: vjp(cotangent))
    return (
        timing.jax_milliseconds(lambda: forward(*inputs), calls),
        timing.jax_milliseconds(lambda: backward(vjp, cotangent), calls),
    )


def _ours(implementation: str) -> Callable[[cases.Case], Attention]:
    def make(case: cases.Case) -> Attention:
        def attention(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            bias: jax.Array | None = None,
        ) -> jax.Array:
            return jax_na.neighborhood_attention(
                query,
                key,
                value,
                **case.window_arguments,
                rel_pos_bias=bias,
                implementation=implementation,
            )

        return attention

    return make


def _unmasked(case: cases.Case) -> Attention:
    """cuDNN's attention of every token to all: other work, the rate to measure by."""

    def attention(*arrays: jax.Array) -> jax.Array:
        flat = (a.reshape(case.batch, case.tokens, *a.shape[-2:]) for a in arrays)
        out = jax.nn.dot_product_attention(*flat, implementation="cudnn")
        return out.reshape(case.operand_shape)

    return attention


JAX_CONTENDERS: dict[str, Callable[[cases.Case], Attention]] = {
    **{f"jax_na {name}": _ours(name) for name in OURS},
    "dense cuDNN, no mask": _unmasked,
    "dense cuDNN, mask": lambda case: peers.dense(
        case.shape, implementation="cudnn", **case.window_arguments
    ),
    "gather": lambda case: peers.gather(case.shape, **case.window_arguments),
}


#: What to measure, by name. PyTorch comes last: JAX's profiler sees nothing after it.
CONTENDERS: dict[str, Callable[[cases.Case, int], tuple[float, float]]] = {
    **{
        name: functools.partial(_measure_jax, make)
        for name, make in JAX_CONTENDERS.items()
    },
    **torch_peers.PEERS,
}


def measure(
    name: str, problems: Sequence[cases.Case], calls: int
) -> Iterator[Measurement]:
    for case in problems:
        if case.bias and "jax_na" not in name:
            yield Measurement(case.name, name, refusal="not measured with a bias")
            continue
        try:
            forward, backward = CONTENDERS[name](case, calls)
        except Exception as error:
            # A contender that lacks memory or support must not end the comparison.
            refusal = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Measurement(case.name, name, refusal=refusal)
            continue
        yield Measurement(
            case.name,
            name,
            forward,
            backward,
            case.flops(backward=False) / forward / 1e9,
            case.flops(backward=True) / backward / 1e9,
            _visited_over_useful(case) if name == "jax_na fused" else None,
        )


def _visited_over_useful(case: cases.Case) -> float | None:
    operand = jax.ShapeDtypeStruct(case.operand_shape, case.dtype)
    plan = jax_na.explain(
        operand,
        operand,
        operand,
        **case.window_arguments,
        rel_pos_bias=case.bias_table,
    )
    return plan.visited_over_useful


def table(results: Sequence[Measurement]) -> str:
    """One block per case; ratios are to the fastest peer, above 1 being faster."""
    lines = []
    for case in dict.fromkeys(result.case for result in results):
        rows = [result for result in results if result.case == case]
        peer_rows = [r for r in rows if r.forward_ms and "jax_na" not in r.contender]
        lines += ["", case, f"{'':34}{'forward':>24}{'backward':>26}"]
        for row in rows:
            if row.forward_ms is None:
                lines.append(f"  {row.contender:32} {row.refusal}")
                continue
            cells = [f"  {row.contender:32}"]
            for kind in ("forward", "backward"):
                own = getattr(row, f"{kind}_ms")
                best = min((getattr(r, f"{kind}_ms") for r in peer_rows), default=None)
                ratio = f"{best / own:6.2f}x" if best else " " * 7
                rate = getattr(row, f"{kind}_tflops")
                cells.append(f"{own:9.3f} ms {rate:5.0f} TF {ratio}")
            if row.visited_over_useful:
                cells.append(f"  visited/useful {row.visited_over_useful:.2f}")
            lines.append("".join(cells))
    return "\n".join(lines)


def main() -> None:
    here = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default=here / "cases.json", help="JSON list")
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument(
        "--contenders", nargs="*", choices=list(CONTENDERS), help="default: all"
    )
    parser.add_argument("--calls", type=int, default=20, help="timed calls each")
    parser.add_argument("--output", type=pathlib.Path, help="folder for results")
    args = parser.parse_args()

    problems = [
        case
        for case in cases.load(args.cases)
        if not args.only or case.name in args.only
    ]
    results: list[Measurement] = []
    file = None
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        file = (args.output / "results.jsonl").open("w")
    for name in args.contenders or CONTENDERS:
        for result in measure(name, problems, args.calls):
            results.append(result)
            if file is not None:  # at once: what is cut short keeps what it measured
                print(json.dumps(dataclasses.asdict(result)), file=file, flush=True)
        print(f"measured {name}", flush=True)
    print(table(results))
    if args.output is not None:
        import charts

        charts.bars(results, args.output)
        dense = [case.name for case in problems if case.window == case.shape]
        head_dims = {case.name: case.head_dim for case in problems}
        charts.limits(results, head_dims, dense, args.output)
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
