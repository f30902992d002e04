"""Resize a box of a decoded image to a view in compiled code, with the arithmetic of torch.

A separable resize multiplies along x, then along y. Both passes run over consecutive bytes, 32 at
a time. For that the image is transposed once, and the result of the first pass is transposed back.
All views of an image share its decoding and the first transposition.

The arithmetic is that of torch's uint8 kernels (aten/native/cpu/UpSampleKernel.cpp, after Pillow).
The filter is the triangle or Keys' cubic with a = -0.5, widened by the scale where the image
shrinks. Weights are rounded to 16-bit fixed point, with as many fractional bits as the largest
weight allows. Sums have 32 bits. After each pass they are rounded and clamped to a byte.

`write_plain_view` resizes without antialiasing, as tf.image.resize does: the filter is never
widened, so that a pixel depends on at most 4 x 4 others however much the image shrinks. Its sums
are float32, rounded to a byte once.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ssl_pretrain.system.jit import njit

# Side in bytes of the tiles that are transposed. Rows and columns are padded to multiples of it.
TILE = 16


@njit(nogil=True)
def padded(count):
    """Return `count` rounded up to a multiple of `TILE`."""
    return (count + TILE - 1) // TILE * TILE


def most_taps(longest_side: int, size: int, bicubic: bool) -> int:
    """Return how many pixels one pixel of a view depends on along an axis, at most.

    The number is rounded up to a multiple of 4.
    """
    reach = 2 if bicubic else 1
    return -(-(2 * math.ceil(reach * max(1.0, longest_side / size)) + 1) // 4) * 4


@intrinsic
def _turn_tile(_context, source, source_pitch, target, target_pitch):
    """Transpose 16 x 16 bytes between two addresses, by interleaving registers four times."""

    def codegen(context, builder, _signature, arguments):
        source, source_pitch, target, target_pitch = arguments
        row_type = ir.VectorType(ir.IntType(8), TILE)

        def row_at(address, pitch, number):
            offset = builder.mul(pitch, ir.Constant(pitch.type, number))
            return builder.inttoptr(builder.add(address, offset), row_type.as_pointer())

        def half(number):
            first = number * TILE // 2
            lanes = [lane for k in range(TILE // 2) for lane in (first + k, TILE + first + k)]
            return ir.Constant(ir.VectorType(ir.IntType(32), TILE), lanes)

        rows = [
            builder.load(row_at(source, source_pitch, number), align=1) for number in range(TILE)
        ]
        for _ in range(4):
            rows = [
                builder.shuffle_vector(rows[k], rows[k + TILE // 2], half(side))
                for k in range(TILE // 2)
                for side in (0, 1)
            ]
        for number, row in enumerate(rows):
            builder.store(row, row_at(target, target_pitch, number), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


@njit(nogil=True)
def turn(source, source_pitch, rows, columns, target, target_pitch):
    """Transpose bytes: target[column, row] = source[row, column].

    Both arrays are flat, with rows `source_pitch` and `target_pitch` bytes apart and room for
    whole tiles at every edge.
    """
    source_at, target_at = source.ctypes.data, target.ctypes.data
    for column in range(0, columns, TILE):
        for row in range(0, rows, TILE):
            tile = source_at + row * source_pitch + column
            to = target_at + column * target_pitch + row
            # numba passes the context.
            _turn_tile(tile, source_pitch, to, target_pitch)  # type: ignore[call-arg]


@njit(nogil=True)
def _filter(x, bicubic):
    """Return the filter's value at distance x: Keys' cubic with a = -0.5, or the triangle."""
    x = abs(x)
    if not bicubic:
        return max(0.0, 1.0 - x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@njit(nogil=True)
def axis(length, size, bicubic, mirrored, starts, counts, weights, exact):
    """Compute the fixed-point weights for a resize from `length` pixels to `size` along one axis.

    Args:
        length: Pixels of the box along the axis.
        size: Pixels of the view.
        bicubic: Use the cubic filter instead of the triangle.
        mirrored: Reverse the order of the view's pixels.
        starts: Output, int64 (size,): first pixel on which each pixel of the view depends.
        counts: Output, int64 (size,): number of these pixels.
        weights: Output, int16 (size, taps): their weights in fixed point, 0 beyond the count.
        exact: Buffer for the weights, float64 (size, taps).

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
        row = size - 1 - pixel if mirrored else pixel
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
def _two(target, source, at, weights, n, bits):
    """Write the weighted sum of 2 rows of `n` bytes, which begin at `at`, rounded to bytes."""
    first, second = source[at[0] : at[0] + n], source[at[1] : at[1] + n]
    w0, w1, half, shift = (
        np.int32(weights[0]),
        np.int32(weights[1]),
        np.int32(1 << (bits - 1)),
        np.int32(bits),
    )
    for i in range(n):
        total = np.int32(np.int32(first[i]) * w0 + np.int32(np.int32(second[i]) * w1 + half))
        target[i] = np.uint8(min(max(np.int32(total >> shift), np.int32(0)), np.int32(255)))


@njit(nogil=True)
def _four(target, source, at, weights, n, bits):
    """Write the weighted sum of 4 rows of `n` bytes, which begin at `at`, rounded to bytes."""
    a, b, c, d = (
        source[at[0] : at[0] + n],
        source[at[1] : at[1] + n],
        source[at[2] : at[2] + n],
        source[at[3] : at[3] + n],
    )
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
def _add_four(sums, source, at, weights, tap, n):
    """Add the weighted sum of 4 rows, from number `tap` on, to `sums`, without rounding."""
    a, b = source[at[tap] : at[tap] + n], source[at[tap + 1] : at[tap + 1] + n]
    c, d = source[at[tap + 2] : at[tap + 2] + n], source[at[tap + 3] : at[tap + 3] + n]
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
def _rounded(target, sums, n, bits):
    """Write fixed-point sums as bytes. The half that rounding needs is already in them."""
    shift = np.int32(bits)
    for i in range(n):
        target[i] = np.uint8(min(max(np.int32(sums[i] >> shift), np.int32(0)), np.int32(255)))


@njit(nogil=True)
def _blend(target, source, first, pitch, count, weights, n, bits, at, sums):
    """Write the weighted sum of `count` rows of `n` bytes of source, rounded to bytes.

    The rows begin at `first`, `pitch` apart. `at` and `sums` are buffers for the beginnings and
    for int32 sums.
    """
    groups = (count + 3) // 4 * 4
    for tap in range(groups):
        # Rows that fill up a group of 4 have weight 0.
        at[tap] = first + min(tap, count - 1) * pitch
    if count <= 2:
        _two(target, source, at, weights, n, bits)
    elif count <= 4:
        _four(target, source, at, weights, n, bits)
    else:
        sums[:n] = 1 << (bits - 1)
        for tap in range(0, groups, 4):
            _add_four(sums, source, at, weights, tap, n)
        _rounded(target, sums, n, bits)


@njit(nogil=True)
def write_view(turned, pitch, box, size, bicubic, room, out):
    """Write one view from a transposed image, whose row 3 * x + channel is a column of the image.

    Args:
        turned: The transposed image as `turn` writes it, flat.
        pitch: Bytes between its rows.
        box: Top, left, height, width and flip, as in `crops.Box`.
        size: Side of the view, in pixels.
        bicubic: Use the cubic filter instead of the triangle.
        room: Buffers from `room_for`.
        out: Output, flat, 3 * size * size bytes.
    """
    top, left, height, width, flip = box
    middle, back, starts, counts, weights, exact, at, sums = room
    bits = axis(width, size, bicubic, flip, starts, counts, weights, exact)
    wide, tall = padded(size), padded(height)
    for channel in range(3):
        for x in range(size):
            first = (3 * (left + starts[x]) + channel) * pitch + top
            place = (channel * wide + x) * tall
            _blend(
                middle[place : place + height],
                turned,
                first,
                3 * pitch,
                counts[x],
                weights[x],
                height,
                bits,
                at,
                sums,
            )
    bits = axis(height, size, bicubic, False, starts, counts, weights, exact)
    for channel in range(3):
        turn(middle[channel * wide * tall :], tall, size, height, back, wide)
        for y in range(size):
            place = (channel * size + y) * size
            _blend(
                out[place : place + size],
                back,
                starts[y] * wide,
                wide,
                counts[y],
                weights[y],
                size,
                bits,
                at,
                sums,
            )


@njit(nogil=True)
def write_plain_view(turned, pitch, box, size, bicubic, out):
    """Write one view without antialiasing. The arguments are those of `write_view`.

    Where the filter reaches over the edge of the box, the pixels that exist share its weight
    (TensorFlow's half_pixel_centers). For the triangle this is the same as repeating the edge.
    """
    top, left, height, width, flip = box
    along_x, along_y = np.zeros((size, 4), np.float32), np.zeros((size, 4), np.float32)
    first_x, first_y = np.zeros(size, np.int64), np.zeros(size, np.int64)
    _plain_axis(width, size, bicubic, flip, first_x, along_x)
    _plain_axis(height, size, bicubic, False, first_y, along_y)
    column = np.zeros(height + 3, np.float32)  # padded for pixels of weight 0 below the box
    for channel in range(3):
        for x in range(size):
            column[:] = 0
            for tap in range(4):
                weight = along_x[x, tap]
                if weight != 0:
                    place = (3 * (left + first_x[x] + tap) + channel) * pitch + top
                    _add_weighted(column, turned[place : place + height], weight)
            for y in range(size):
                at = first_y[y]
                total = column[at] * along_y[y, 0] + column[at + 1] * along_y[y, 1]
                total += column[at + 2] * along_y[y, 2] + column[at + 3] * along_y[y, 3]
                out[(channel * size + y) * size + x] = np.uint8(
                    min(max(total + np.float32(0.5), np.float32(0)), np.float32(255))
                )


@njit(nogil=True)
def _plain_axis(length, size, bicubic, mirrored, first, weights):
    """Compute the first pixel that each pixel of a view depends on, and four weights."""
    reach = 2 if bicubic else 1
    for pixel in range(size):
        center = length / size * (pixel + 0.5)
        start = max(math.floor(center - reach + 0.5), 0)
        count = min(math.floor(center + reach + 0.5), length) - start
        row = size - 1 - pixel if mirrored else pixel
        first[row] = start
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
def write_plain_cut(turned, height, width, flip, size, bicubic, out):
    """Call `write_plain_view` on a whole image, for callers that are not compiled."""
    write_plain_view(turned, height, (0, 0, height, width, flip), size, bicubic, out)


def room_for(longest_side: int, sizes: list[int], bicubic: bool) -> tuple[np.ndarray, ...]:
    """Allocate the buffers of `write_view` for one thread.

    Args:
        longest_side: Longest side of all images, in pixels.
        sizes: Sizes of the views.
        bicubic: Any view uses the cubic filter.
    """
    wide, tall = -(-max(sizes) // TILE) * TILE, -(-longest_side // TILE) * TILE
    taps = max(most_taps(longest_side, size, bicubic) for size in sizes)
    longest = max(wide, tall)
    return (
        np.zeros(3 * wide * tall, np.uint8),
        np.zeros(wide * tall, np.uint8),
        np.zeros(max(sizes), np.int64),
        np.zeros(max(sizes), np.int64),
        np.zeros((max(sizes), taps), np.int16),
        np.zeros((max(sizes), taps)),
        np.zeros(taps, np.int64),
        np.zeros(longest, np.int32),
    )
