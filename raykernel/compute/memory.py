"""Chunk sizes that keep a worker inside its memory.

Sizes follow from configuration, model and token counts alone, never from what is free at the
moment: another size is another order of summation, and a resumed run must give the same bits.

    peak ≈ process + weights + 3 · output block
                    + 1.1 · (columns + rows + b · pass + max(r, q) · g)

    columns    resident · q · f     kept whole for the next cells, or
               q · (s + f_1)        streamed beside the rows
    rows       r · f                captured whole, or
               r · (s + f_1)        streamed, one transformer block's factors at a time

f bytes of factors per example (of the longest one), f_1 those of its largest transformer block, s
what is kept of it between two blocks, g those of its largest layer, b examples of a pass, r and q
examples of a row and a column chunk. A chunk of several passes is joined layer by layer, so one
layer exists twice for a moment.

Where signs of gradients are all that is needed, both sides are packed, p bytes of an example, p_1
those of a transformer block; the columns' factors go before the rows' come:

    columns    resident · q · p
    rows       max(r, q) · max(f, p), or max(r, q) · (s + f_1 + p_1) streamed

Of projected kernels only the sketches of chunks are kept, of row and column chunks alike:

    peak ≈ process + weights + 3 · output block
                    + 1.1 · (resident · r · sketch + r · (factors as above + g + making) + b · pass)

Which of these fits best is a question of time. Forming the gradients of both sides costs each pair
of examples c t (1/r + 1/q) products with the weights; packed columns are only unpacked. Rows are
captured anew for every column chunk, (1 + c) t / q, or (2 + c) t / q if streamed, and so are
columns that are not kept; a quarter slower where a pass holds one example alone. A projected chunk
is captured once while it is kept, and the random matrices are made once for all of its examples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from raykernel.config import ComputeConfig
from raykernel.errors import InputError
from raykernel.ntk.product import ProductBytes
from raykernel.ntk.stream import StreamBytes

GIB = 1 << 30

PROCESS_BYTES = 640 << 20
"""Interpreter, PyTorch, transformers, pyarrow (504 MiB measured), and room for Ray or the CLI."""

CUDA_BYTES = 512 << 20
"""Context and library workspaces on a GPU, which PyTorch's allocator does not count."""

GRAM_BYTES = 64 << 20
"""Bound on the temporaries of a contraction; on a CPU its tiles are far smaller."""

HEAP_SLACK = 1.1
"""Memory that the heap keeps between used blocks, 4 % at the most where it was measured."""

MAX_RESIDENT = 64
"""Column chunks kept at the most; cells come column by column, so that few are used again."""

_UNPACKED = 0.1
"""Time of unpacking the signs of a gradient, against forming it of 32 tokens or more."""


@dataclass(frozen=True, slots=True)
class PackedBytes:
    """Memory of one example's packed signs, in bytes."""

    whole: int
    """Of all layers."""
    segment: int
    """Of the largest transformer block, or what else is captured at a time when streaming."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What was measured on the longest example, in bytes."""

    weights: int
    """Parameters and buffers of the model."""
    audit: int
    """Extra memory of what is checked at the start, when no capture is resident."""
    factors: int
    """Captured factors of one example."""
    largest: int
    """Those of the layer that has most."""
    forward: int
    """Peak of a pass per example, factors included."""
    stream: StreamBytes | None
    """The same block by block; None if the model cannot be streamed."""
    packed: PackedBytes | None
    """Signs of all gradients; None if kernels are wanted that need more of their columns."""
    output: int
    """All layer groups' values of one full cell."""
    sketch: int = 0
    """What is kept of an example of a projected kernel; 0 of an exact one."""
    making: int = 0
    """Sketches of all its layer groups, before they are added."""
    product: ProductBytes | None = None
    """What predicting test without its kernel takes; None if it has one."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How a cell is worked off."""

    batch: int
    """Examples of one forward pass."""
    rows: int
    """Examples of a row chunk."""
    cols: int
    """Examples of a column chunk."""
    resident: int
    """Column chunks kept between cells; 0: columns are captured for every row chunk."""
    stream: bool
    """Whether examples are captured block by block."""
    packed: bool
    """Whether columns wait as packed signs instead of factors, and rows come as such."""
    peak_bytes: int
    """Estimate of the worker's peak."""
    sketched: bool = False
    """Whether chunks are kept as sketches; then `resident` counts row chunks, too."""


def chunk_sizes(
    footprint: Footprint, compute: ComputeConfig, *, block_size: int, num_outputs: int
) -> Sizes:
    """The chunks that take least time and fit `compute.memory_gb`.

    Args:
        footprint: measured bytes.
        compute: memory and largest batch.
        block_size: examples on a side of a cell.
        num_outputs: c.

    Returns:
        The sizes; chunks are whole passes or the whole block, so that every example is always
        captured in the same company.

    Raises:
        InputError: if one row against one column does not fit.
    """
    limit, fixed = int(compute.memory_gb * GIB), _fixed_bytes(footprint, compute)

    def sized(batch: int, rows: int, cols: int, resident: int, stream: bool, packed: bool) -> Sizes:
        joining = footprint.largest * max(rows if rows > batch else 0, cols if cols > batch else 0)
        step = _step_bytes(footprint, stream)
        waiting = _waiting_bytes(footprint, rows, cols, resident, stream, packed)
        work = int(HEAP_SLACK * (waiting + batch * step + joining))
        start = footprint.audit + 2 * footprint.forward
        # So that a run whose blocks fit does not fail at the end, when test is predicted.
        last = 0 if footprint.product is None else footprint.product.of(1)
        peak = fixed + max(start, work, last)
        return Sizes(batch, rows, cols, resident, stream, packed, peak)

    ways = _ways(footprint)
    smallest = min((sized(1, 1, 1, *way) for way in ways), key=lambda sizes: sizes.peak_bytes)
    _require_room(smallest, footprint, compute)
    fitting = [
        sizes
        for batch in range(1, min(compute.batch_size, block_size) + 1)
        for rows in chunks(batch, block_size)
        for cols in chunks(batch, block_size)
        for way in ways
        if (sizes := sized(batch, rows, cols, *way)).peak_bytes <= limit
    ]

    def slow(sizes: Sizes) -> tuple[float, int]:
        return slowness(sizes, num_outputs, block_size), sizes.peak_bytes

    best = min(fitting, key=slow)
    more = range(1, MAX_RESIDENT + 1) if best.resident else ()
    kept = [
        sized(best.batch, best.rows, best.cols, count, best.stream, best.packed) for count in more
    ]
    return max((s for s in (best, *kept) if s.peak_bytes <= limit), key=lambda s: s.resident)


def _ways(footprint: Footprint) -> list[tuple[int, bool, bool]]:
    """Columns kept, whether examples are streamed, whether columns are packed."""
    ways = [(1, False, False)]
    if footprint.stream is not None:
        ways += [(1, True, False), (0, True, False)]
    if footprint.packed is not None:
        ways += [(1, stream, True) for resident, stream, _ in ways if resident]
    return ways


def _waiting_bytes(
    footprint: Footprint, rows: int, cols: int, resident: int, stream: bool, packed: bool
) -> int:
    """What columns and rows take."""
    whole, alive = footprint.factors, _alive_bytes(footprint, stream)
    if not packed or footprint.packed is None:
        columns = resident * cols * whole if resident else cols * alive
        return columns + rows * alive
    signed = alive + footprint.packed.segment if stream else max(whole, footprint.packed.whole)
    return resident * cols * footprint.packed.whole + max(rows, cols) * signed


def sketch_sizes(
    footprint: Footprint,
    compute: ComputeConfig,
    *,
    block_size: int,
    num_outputs: int,
    num_examples: int,
    matrices: float,
) -> Sizes:
    """The same for a projected kernel, both sides of which are captured chunk by chunk.

    Args:
        footprint: measured bytes.
        compute: memory and largest batch.
        block_size: examples on a side of a cell.
        num_outputs: c.
        num_examples: of the kernel; more chunks than theirs are not kept.
        matrices: time of making the random matrices for a chunk, in products of an example's
            tokens with all weights.

    Returns:
        The sizes; at least the chunks of one cell are kept.

    Raises:
        InputError: if chunks of one example do not fit.
    """
    limit, fixed = int(compute.memory_gb * GIB), _fixed_bytes(footprint, compute)

    def sized(batch: int, chunk: int, stream: bool, resident: int = 0) -> Sizes:
        alive, step = _alive_bytes(footprint, stream), _step_bytes(footprint, stream)
        resident = max(resident, 2 * -(-block_size // chunk))
        of_chunk = alive + footprint.largest + footprint.making
        work = resident * chunk * footprint.sketch + chunk * of_chunk + batch * step
        start = footprint.audit + 2 * footprint.forward
        peak = fixed + max(start, int(HEAP_SLACK * work))
        return Sizes(
            batch, chunk, chunk, resident, stream, packed=False, peak_bytes=peak, sketched=True
        )

    ways = (False,) if footprint.stream is None else (False, True)
    smallest = min((sized(1, 1, way) for way in ways), key=lambda sizes: sizes.peak_bytes)
    _require_room(smallest, footprint, compute)
    fitting = [
        sizes
        for batch in range(1, min(compute.batch_size, block_size) + 1)
        for chunk in chunks(batch, block_size)
        for way in ways
        if (sizes := sized(batch, chunk, way)).peak_bytes <= limit
    ]

    def slow(sizes: Sizes) -> tuple[float, int]:
        capture = (1 + num_outputs + sizes.stream) * (1 + 0.25 / sizes.batch)
        return capture + matrices / sizes.rows, sizes.peak_bytes

    best = min(fitting, key=slow)
    # Every block has chunks of its own, and train and the others end in one of their own.
    every = (-(-num_examples // block_size) + 1) * -(-block_size // best.rows)
    more = range(best.resident, max(best.resident, every) + 1)
    kept = [sized(best.batch, best.rows, best.stream, count) for count in more]
    return max((s for s in kept if s.peak_bytes <= limit), key=lambda s: s.resident)


def _alive_bytes(footprint: Footprint, stream: bool) -> int:
    """What is in memory of an example at work."""
    streamed = footprint.stream
    return streamed.kept + streamed.factors if stream and streamed else footprint.factors


def _step_bytes(footprint: Footprint, stream: bool) -> int:
    """What a pass takes per example."""
    return footprint.stream.step if stream and footprint.stream else footprint.forward


def _fixed_bytes(footprint: Footprint, compute: ComputeConfig) -> int:
    blocks = 3 * footprint.output + 3 * GRAM_BYTES
    return footprint.weights + blocks + process_bytes(compute)


def _require_room(smallest: Sizes, footprint: Footprint, compute: ComputeConfig) -> None:
    if smallest.peak_bytes > int(compute.memory_gb * GIB):
        raise InputError(
            f"compute.memory_gb: found {compute.memory_gb:g}, expected at least "
            f"{smallest.peak_bytes / GIB:.2f} GiB for one example against one (weights "
            f"{footprint.weights / GIB:.2f}, factors {footprint.factors / GIB:.2f} per example, "
            f"results of a block {footprint.output / GIB:.2f}). Raise it, or lower "
            "task.max_length or kernel.block_size."
        )


def product_batch(weights: int, product: ProductBytes, compute: ComputeConfig) -> int:
    """Examples of a pass that J w and Jᵀ α may take.

    Args:
        weights: bytes of the model.
        product: bytes of a product.
        compute: memory and largest batch.

    Returns:
        The number.

    Raises:
        InputError: if one example does not fit.
    """
    fixed = weights + GRAM_BYTES + process_bytes(compute)
    if found := most_examples(fixed, product, compute):
        return found
    needed = fixed + HEAP_SLACK * product.of(1)
    raise InputError(
        f"compute.memory_gb: found {compute.memory_gb:g}, expected at least {needed / GIB:.2f} GiB "
        f"to predict one test example without its kernel (weights {weights / GIB:.2f}, a direction "
        f"of the parameters with its gradients {product.fixed / GIB:.2f}). Raise it, lower "
        "task.max_length, or choose fewer layers with solver.groups."
    )


def most_examples(fixed: int, work: ProductBytes, compute: ComputeConfig) -> int:
    """Examples of a pass, `compute.batch_size` at the most; 0 if one does not fit.

    Args:
        fixed: bytes of what is there all the time.
        work: bytes of a pass, of which the heap keeps more.
        compute: memory and largest batch.

    Returns:
        The number.
    """
    limit = int(compute.memory_gb * GIB)
    sizes = range(compute.batch_size, 0, -1)
    return next((n for n in sizes if fixed + HEAP_SLACK * work.of(n) <= limit), 0)


def sample_size(factors: int, footprint: Footprint, compute: ComputeConfig, *, most: int) -> int:
    """Examples on which an error is measured whose factors are not those of the kernel.

    Args:
        factors: bytes of an example's.
        footprint: measured bytes.
        compute: memory.
        most: examples at the most.

    Returns:
        As many as fit beside one pass, at least one.
    """
    room = int(compute.memory_gb * GIB) - _fixed_bytes(footprint, compute)
    room -= footprint.audit + 2 * footprint.forward
    return max(1, min(most, int(room / (HEAP_SLACK * max(factors, 1)))))


def process_bytes(compute: ComputeConfig) -> int:
    """What a worker takes before it has a model."""
    return CUDA_BYTES if compute.device.startswith("cuda") else PROCESS_BYTES


def chunks(batch: int, block_size: int) -> list[int]:
    """Sizes of whole passes, and the whole block."""
    return [*range(batch, block_size, batch), block_size]


def slowness(sizes: Sizes, num_outputs: int, block_size: int) -> float:
    """Time that a pair of examples takes, in products of a token with all weights.

    Args:
        sizes: how a cell is worked off.
        num_outputs: c.
        block_size: examples on a side of a cell.

    Returns:
        c (1/r + 1/q) + (1 + c)(1 + 1/(4b)) / q, per token; where examples are streamed with one
        pass more, where columns are not kept with their passes, too, and where they are packed
        with a tenth of c/r. A chunk that does not divide the block counts as a whole one more.
    """
    by_row, by_col = (-(-block_size // size) / block_size for size in (sizes.rows, sizes.cols))
    capture = (1 + num_outputs + sizes.stream) * (1 + 0.25 / sizes.batch)
    captures = by_col + (0 if sizes.resident else by_row)
    formed = by_col + (_UNPACKED if sizes.packed else 1) * by_row
    return num_outputs * formed + capture * captures


def halved(sizes: Sizes) -> Sizes:
    """Chunks half as large, for when memory runs out in spite of the estimate.

    Args:
        sizes: those that were too large.

    Returns:
        Half of each, one at least; no columns kept beside those at work, but sketches.
    """
    batch = max(1, sizes.batch // 2)
    rows, cols = (max(batch, size // 2 // batch * batch) for size in (sizes.rows, sizes.cols))
    resident = min(sizes.resident, 1)
    if sizes.sketched:  # as many examples as before, which are more chunks
        resident = sizes.resident * -(-sizes.rows // rows)
    return replace(sizes, batch=batch, rows=rows, cols=cols, resident=resident, peak_bytes=0)
