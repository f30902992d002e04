"""Resize a box of a decoded image to a view in compiled code, with the arithmetic of torch.

A separable resize first filters along x, then along y. The image is transposed before the first
pass and its result before the second, so that both passes run over consecutive bytes, 32 at a time.
All views of an image share its decoding and the first transposition.

The arithmetic is that of torch's uint8 kernels (aten/native/cpu/UpSampleKernel.cpp, after Pillow).
The filter is the triangle or Keys' cubic with a = -0.5, widened by the scale if the image shrinks.
Weights are rounded to 16-bit fixed point, with as many fractional bits as the largest weight
allows. Sums have 32 bits. After each pass they are rounded and clamped to a byte.

`write_view_without_antialias` resizes as tf.image.resize does. The filter is never widened, so a
pixel of the view depends on at most 4 x 4 pixels, however much the image shrinks. Sums are float32
and are only rounded to a byte after both passes.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ssl_pretrain.system.jit import njit

# Side in bytes of the tiles of a transposition. Rows and columns are padded to multiples of it.
TILE = 16


def pad_to_tiles(count):
    """Return `count`, an integer or an array, rounded up to a multiple of `TILE`."""
    return (count + TILE - 1) // TILE * TILE


pad_to_tiles_jit = njit(nogil=True)(pad_to_tiles)


@njit(nogil=True)
def copy_bytes(source, target):
    """Copy bytes to another array of the same length.

    numba compiles `target[:] = source` to code that copies one byte at a time, which takes 60 times
    as long.
    """
    for i in range(len(source)):
        target[i] = source[i]


def max_taps(longest_side: int, size: int, bicubic: bool) -> int:
    """Return the largest number of pixels per axis on which a pixel of the view depends.

    The number is rounded up to a multiple of 4.
    """
    reach = 2 if bicubic else 1
    return -(-(2 * math.ceil(reach * max(1.0, longest_side / size)) + 1) // 4) * 4


@intrinsic
def _transpose_tile(_context, source, source_pitch, target, target_pitch):
    """Transpose 16 x 16 bytes from one address to another, by interleaving registers four times."""

    def codegen(context, builder, _signature, arguments):
        source, source_pitch, target, target_pitch = arguments
        row_type = ir.VectorType(ir.IntType(8), TILE)

        def row_at(address, pitch, number):
            offset = builder.mul(pitch, ir.Constant(pitch.type, number))
            return builder.inttoptr(builder.add(address, offset), row_type.as_pointer())

        def interleaving_mask(half):
            first = half * TILE // 2
            lanes = [lane for k in range(TILE // 2) for lane in (first + k, TILE + first + k)]
            return ir.Constant(ir.VectorType(ir.IntType(32), TILE), lanes)

        rows = [
            builder.load(row_at(source, source_pitch, number), align=1) for number in range(TILE)
        ]
        for _ in range(4):
            rows = [
                builder.shuffle_vector(rows[k], rows[k + TILE // 2], interleaving_mask(half))
                for k in range(TILE // 2)
                for half in (0, 1)
            ]
        for number, row in enumerate(rows):
            builder.store(row, row_at(target, target_pitch, number), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


@njit(nogil=True)
def transpose(source, source_pitch, rows, columns, target, target_pitch):
    """Transpose bytes, so that target[column, row] = source[row, column].

    Both arrays are flat and padded to whole tiles. Their rows are `source_pitch` and `target_pitch`
    bytes apart.
    """
    for column in range(0, columns, TILE):
        for row in range(0, rows, TILE):
            source_tile = source.ctypes.data + row * source_pitch + column
            target_tile = target.ctypes.data + column * target_pitch + row
            _transpose_tile(  # type: ignore[call-arg]  # numba passes the context
                source_tile, source_pitch, target_tile, target_pitch
            )


@njit(nogil=True)
def _filter(x, bicubic):
    """Return the value of Keys' cubic with a = -0.5, or of the triangle, at distance x."""
    x = abs(x)
    if not bicubic:
        return max(0.0, 1.0 - x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@njit(nogil=True)
def compute_weights(length, size, bicubic, is_mirrored, starts, counts, weights, exact):
    """Compute the fixed-point weights of a resize from `length` pixels to `size` along one axis.

    Args:
        length: Pixels of the box along the axis.
        size: Pixels of the view.
        bicubic: Use the cubic filter instead of the triangle.
        is_mirrored: Reverse the order of the view's pixels.
        starts: Output, int64 (size,). First pixel on which each pixel of the view depends.
        counts: Output, int64 (size,). Number of pixels on which each pixel of the view depends.
        weights: Output, int16 (size, taps). Fixed-point weights of these pixels, then zeros.
        exact: Buffer for the weights before they are rounded, float64 (size, taps).

    Returns:
        Number of fractional bits of the weights.
    """
    scale = length / size
    reach = (2.0 if bicubic else 1.0) * max(scale, 1.0)
    inverse = 1.0 / max(scale, 1.0)
    largest = 0.0
    for pixel in range(size):
        center = scale * (pixel + 0.5)
        start = max(int(center - reach + 0.5), 0)
        count = min(int(center + reach + 0.5), length) - start
        row = size - 1 - pixel if is_mirrored else pixel
        starts[row], counts[row] = start, count
        total = 0.0
        for tap in range(count):
            weight = _filter((tap + start - center + 0.5) * inverse, bicubic)
            exact[row, tap] = weight
            total += weight
        for tap in range(count):
            exact[row, tap] /= total
            largest = max(largest, exact[row, tap])
    bits = 0
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    for row in range(size):
        for tap in range(weights.shape[1]):
            if tap < counts[row]:
                scaled = exact[row, tap] * (1 << bits)
                weights[row, tap] = int(scaled - 0.5) if scaled < 0 else int(scaled + 0.5)
            else:
                weights[row, tap] = 0
    return bits


@njit(nogil=True)
def _write_two(target, source, offsets, weights, n, bits):
    """Write the weighted sum of 2 rows of `n` bytes, which begin at `offsets`, rounded to bytes."""
    first, second = source[offsets[0] : offsets[0] + n], source[offsets[1] : offsets[1] + n]
    w0, w1 = np.int32(weights[0]), np.int32(weights[1])
    half, shift = np.int32(1 << (bits - 1)), np.int32(bits)
    for i in range(n):
        total = np.int32(np.int32(first[i]) * w0 + np.int32(np.int32(second[i]) * w1 + half))
        target[i] = np.uint8(min(max(np.int32(total >> shift), np.int32(0)), np.int32(255)))


@njit(nogil=True)
def _write_four(target, source, offsets, weights, n, bits):
    """Write the weighted sum of 4 rows of `n` bytes, which begin at `offsets`, rounded to bytes."""
    a, b = source[offsets[0] : offsets[0] + n], source[offsets[1] : offsets[1] + n]
    c, d = source[offsets[2] : offsets[2] + n], source[offsets[3] : offsets[3] + n]
    w0, w1, w2, w3 = (
        np.int32(weights[0]),
        np.int32(weights[1]),
        np.int32(weights[2]),
        np.int32(weights[3]),
    )
    half, shift = np.int32(1 << (bits - 1)), np.int32(bits)
    for i in range(n):
        total = np.int32(np.int32(a[i]) * w0 + np.int32(np.int32(b[i]) * w1 + half))
        total = np.int32(total + np.int32(np.int32(c[i]) * w2 + np.int32(d[i]) * w3))
        target[i] = np.uint8(min(max(np.int32(total >> shift), np.int32(0)), np.int32(255)))


@njit(nogil=True)
def _add_four(sums, source, offsets, weights, tap, n):
    """Add the weighted sum of rows `tap` to `tap + 3` to `sums`, without rounding."""
    a, b = source[offsets[tap] : offsets[tap] + n], source[offsets[tap + 1] : offsets[tap + 1] + n]
    c, d = (
        source[offsets[tap + 2] : offsets[tap + 2] + n],
        source[offsets[tap + 3] : offsets[tap + 3] + n],
    )
    w0, w1, w2, w3 = (
        np.int32(weights[tap]),
        np.int32(weights[tap + 1]),
        np.int32(weights[tap + 2]),
        np.int32(weights[tap + 3]),
    )
    for i in range(n):
        total = np.int32(np.int32(a[i]) * w0 + np.int32(b[i]) * w1)
        sums[i] = np.int32(
            sums[i] + np.int32(total + np.int32(np.int32(c[i]) * w2 + np.int32(d[i]) * w3))
        )


@njit(nogil=True)
def _write_rounded(target, sums, n, bits):
    """Write fixed-point sums as bytes. The sums already include the half for rounding."""
    shift = np.int32(bits)
    for i in range(n):
        target[i] = np.uint8(min(max(np.int32(sums[i] >> shift), np.int32(0)), np.int32(255)))


@njit(nogil=True)
def _write_sum(target, source, first, pitch, count, weights, bits, offsets, sums):
    """Write the weighted sum of `count` rows of bytes of the source, rounded to bytes.

    The rows begin at `first`, `pitch` apart. `offsets` and `sums` are buffers for the offsets of
    the rows and for int32 sums.
    """
    n, num_taps = len(target), (count + 3) // 4 * 4
    for tap in range(num_taps):
        # The last row is repeated with weight 0 to complete the group of 4.
        offsets[tap] = first + min(tap, count - 1) * pitch
    if count <= 2:
        _write_two(target, source, offsets, weights, n, bits)
    elif count <= 4:
        _write_four(target, source, offsets, weights, n, bits)
    else:
        sums[:n] = 1 << (bits - 1)
        for tap in range(0, num_taps, 4):
            _add_four(sums, source, offsets, weights, tap, n)
        _write_rounded(target, sums, n, bits)


@njit(nogil=True)
def write_view(transposed, channels, pitch, box, size, bicubic, buffers, out):
    """Write one view from a transposed image.

    Row channels * x + channel of the transposed image holds column x of that channel.

    Args:
        transposed: The transposed image, flat, as `transpose` writes it.
        channels: Number of channels.
        pitch: Bytes from the start of one of its rows to the start of the next.
        box: Top, left, height, width and flip, as in `crops.Box`.
        size: Height and width of the view, in pixels.
        bicubic: Use the cubic filter instead of the triangle.
        buffers: Buffers from `allocate_buffers`.
        out: Output, flat, channels * height * width bytes.
    """
    top, left, height, width, flip = box
    view_height, view_width = size
    filtered_columns, filtered_rows, starts, counts, weights, exact, offsets, sums = buffers
    column_pitch, row_pitch = pad_to_tiles_jit(height), pad_to_tiles_jit(view_width)
    bits = compute_weights(width, view_width, bicubic, flip, starts, counts, weights, exact)
    pixel_pitch = channels * pitch
    for channel in range(channels):
        for x in range(view_width):
            first = (left + starts[x]) * pixel_pitch + channel * pitch + top
            start = (channel * row_pitch + x) * column_pitch
            column = filtered_columns[start : start + height]
            _write_sum(
                column, transposed, first, pixel_pitch, counts[x], weights[x], bits, offsets, sums
            )
    bits = compute_weights(height, view_height, bicubic, False, starts, counts, weights, exact)
    for channel in range(channels):
        columns = filtered_columns[channel * row_pitch * column_pitch :]
        transpose(columns, column_pitch, view_width, height, filtered_rows, row_pitch)
        for y in range(view_height):
            first = starts[y] * row_pitch
            start = (channel * view_height + y) * view_width
            row = out[start : start + view_width]
            _write_sum(
                row, filtered_rows, first, row_pitch, counts[y], weights[y], bits, offsets, sums
            )


@njit(nogil=True)
def write_view_without_antialias(transposed, channels, pitch, box, size, bicubic, out):
    """Write one view without antialiasing. The arguments are those of `write_view`.

    Where the filter reaches beyond the box, its weights are normalized over the pixels inside
    (TensorFlow's half_pixel_centers). For the triangle this is the same as repeating the edge.
    """
    top, left, height, width, flip = box
    rows, columns = size
    x_weights, y_weights = np.zeros((columns, 4), np.float32), np.zeros((rows, 4), np.float32)
    x_starts, y_starts = np.zeros(columns, np.int64), np.zeros(rows, np.int64)
    _compute_weights_without_antialias(width, columns, bicubic, flip, x_starts, x_weights)
    _compute_weights_without_antialias(height, rows, bicubic, False, y_starts, y_weights)
    column = np.zeros(height + 3, np.float32)  # padded for pixels of weight 0 below the box
    for channel in range(channels):
        for x in range(columns):
            column[:] = 0
            for tap in range(4):
                weight = x_weights[x, tap]
                if weight != 0:
                    start = (channels * (left + x_starts[x] + tap) + channel) * pitch + top
                    _add_weighted(column, transposed[start : start + height], weight)
            for y in range(rows):
                first = y_starts[y]
                total = column[first] * y_weights[y, 0] + column[first + 1] * y_weights[y, 1]
                total += column[first + 2] * y_weights[y, 2] + column[first + 3] * y_weights[y, 3]
                out[(channel * rows + y) * columns + x] = np.uint8(
                    min(max(total + np.float32(0.5), np.float32(0)), np.float32(255))
                )


@njit(nogil=True)
def _compute_weights_without_antialias(length, size, bicubic, is_mirrored, starts, weights):
    """Compute the first pixel on which each pixel of a view depends, and up to four weights."""
    reach = 2 if bicubic else 1
    for pixel in range(size):
        center = length / size * (pixel + 0.5)
        start = max(math.floor(center - reach + 0.5), 0)
        count = min(math.floor(center + reach + 0.5), length) - start
        row = size - 1 - pixel if is_mirrored else pixel
        starts[row] = start
        total = 0.0
        for tap in range(count):
            total += _filter(tap + start - center + 0.5, bicubic)
        for tap in range(count):
            weights[row, tap] = _filter(tap + start - center + 0.5, bicubic) / total


@njit(nogil=True)
def _add_weighted(sums, source, weight):
    """Add a weighted row of bytes to float32 sums."""
    for i in range(len(source)):
        sums[i] += np.float32(source[i]) * weight


@njit(nogil=True, cache=True)
def resize_without_antialias(transposed, channels, height, width, flip, size, bicubic, out):
    """Write a view of a whole image, as a function that can be called from Python."""
    box = (0, 0, height, width, flip)
    write_view_without_antialias(transposed, channels, height, box, size, bicubic, out)


def allocate_buffers(
    channels: int, longest_side: int, sizes: list[tuple[int, int]], bicubic: bool
) -> tuple[np.ndarray, ...]:
    """Allocate the buffers of `write_view` for one thread.

    Args:
        channels: Number of channels.
        longest_side: Longest side of all images, in pixels.
        sizes: Height and width of each view, in pixels.
        bicubic: True if any view uses the cubic filter.
    """
    longest_view_side = max(map(max, sizes))
    column_pitch, row_pitch = pad_to_tiles(longest_side), pad_to_tiles(longest_view_side)
    taps = max_taps(longest_side, min(map(min, sizes)), bicubic)
    return (
        np.zeros(channels * row_pitch * column_pitch, np.uint8),
        np.zeros(row_pitch * column_pitch, np.uint8),
        np.zeros(longest_view_side, np.int64),
        np.zeros(longest_view_side, np.int64),
        np.zeros((longest_view_side, taps), np.int16),
        np.zeros((longest_view_side, taps)),
        np.zeros(taps, np.int64),
        np.zeros(max(row_pitch, column_pitch), np.int32),
    )
