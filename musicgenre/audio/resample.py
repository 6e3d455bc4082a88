"""Sample rates, by one of two filters: soxr's "HQ", or the one that resampy calls "kaiser_best"."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

RESAMPLERS = ("soxr_hq", "kaiser_best")
# resampy 0.4's "kaiser_best": zero crossings on each side, the Kaiser window's shape, and the cutoff as a fraction of Nyquist's.
_ZEROS, _BETA, _ROLLOFF = 50, 12.984585247040012, 0.9173473712608761


def resample(samples: np.ndarray, rate: int, wanted: int, resampler: str = "soxr_hq") -> np.ndarray:
    """Returns mono samples at another rate.

    "soxr_hq" gives what `librosa.load` gives. "kaiser_best" is a sinc of 50 zero crossings on each side below a Kaiser
    window (J. O. Smith, "Digital Audio Resampling", https://ccrma.stanford.edu/~jos/resample/) with the parameters of resampy
    0.4, through which librosa resampled where the original musicnn's scores come from. resampy reads its filter off a table and
    misses this one by up to 4e-4 of full scale in white noise, 7e-5 in music. Its versions before 0.4 called a longer filter by
    this name.

    Args:
      samples: `[samples]`.
      rate: their rate in Hz.
      wanted: rate of the result in Hz.
      resampler: "soxr_hq" or "kaiser_best".

    Returns:
      float32 `[samples * wanted / rate]`: rounded up as librosa does for "soxr_hq", down as resampy does for "kaiser_best".
    """
    if rate == wanted:
        return np.ascontiguousarray(samples, np.float32)
    if resampler == "soxr_hq":
        import soxr  # takes its time to load, and most files do not need it

        resampled = soxr.resample(np.asarray(samples, np.float32), rate, wanted, quality="HQ")
        return _of_length(resampled, math.ceil(len(samples) * (wanted / rate)))
    return np.concatenate(list(_by_kaiser([samples], rate, wanted)))


def resample_stream(
    blocks: Iterable[np.ndarray], rate: int, wanted: int, resampler: str = "soxr_hq"
) -> Iterator[np.ndarray]:
    """Yields what `resample` makes of the whole, the same to the bit, without ever holding it.

    Args:
      blocks: mono samples, float32 `[any]`.
      rate: their rate in Hz.
      wanted: rate of the result in Hz.
      resampler: "soxr_hq" or "kaiser_best".

    Yields:
      float32 `[any]`.
    """
    if rate == wanted:
        yield from blocks
    elif resampler == "soxr_hq":
        yield from _by_soxr(blocks, rate, wanted)
    else:
        yield from _by_kaiser(blocks, rate, wanted)


def _by_soxr(blocks: Iterable[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    import soxr

    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
    taken = made = 0
    for block in itertools.chain(blocks, [None]):
        end = block is None
        resampled = stream.resample_chunk(
            np.zeros(0, np.float32) if block is None else block, last=end
        )
        if block is not None:
            taken += len(block)
        else:
            # librosa's length, whatever the filter's tail gives.
            resampled = _of_length(resampled, max(math.ceil(taken * (wanted / rate)) - made, 0))
        made += len(resampled)
        yield resampled


def _of_length(samples: np.ndarray, length: int) -> np.ndarray:
    """Returns samples cut or filled up with zeros."""
    return (
        samples
        if len(samples) == length
        else np.pad(samples, (0, max(length - len(samples), 0)))[:length]
    )


@functools.lru_cache(maxsize=2)
def _filter(rate: int, wanted: int) -> np.ndarray:
    """Returns the filter at the rate that is a multiple of both, float64 `[2 * half + 1]`, its centre in the middle."""
    import scipy.special

    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    # Below the lower of the two rates' Nyquist frequencies; in its zero crossings, the far end at _ZEROS.
    time = np.arange(_ZEROS * max(up, down) + 1) / max(up, down)
    half = _ROLLOFF * np.sinc(_ROLLOFF * time)
    half *= scipy.special.i0(
        _BETA * np.sqrt(np.maximum(1 - np.square(time / _ZEROS), 0))
    ) / scipy.special.i0(_BETA)
    half *= min(1.0, wanted / rate)
    return np.concatenate([half[:0:-1], half])


def _by_kaiser(blocks: Iterable[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    """Yields resampled blocks. Every `down` samples in give `up` samples out, always through the same rows of the filter.

    A block's own sums are made in the same order wherever it is cut, since it starts at such a multiple and reaches as far to
    both sides as the filter does.
    """
    import scipy.signal  # takes half a second to load

    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    kernel = _filter(rate, wanted)
    half = len(kernel) // 2
    reach = half // up + 1
    before = -(-reach // down)  # groups of `down` samples
    # A whole number of samples out comes before the filter's centre.
    kernel = np.concatenate([np.zeros(-half % down), kernel])
    delay = -(-half // down)

    # `waiting` begins `before` groups ahead of the first one that is still to be resampled.
    waiting, taken, made = np.zeros(before * down), 0, 0
    for block in blocks:
        taken += len(block)
        waiting = np.concatenate([waiting, block])
        groups = (len(waiting) - reach) // down
        if groups > before:
            resampled = scipy.signal.upfirdn(kernel, waiting[: groups * down + reach], up, down)
            resampled = resampled[delay + before * up : delay + groups * up].astype(np.float32)
            made += len(resampled)
            waiting = waiting[(groups - before) * down :]
            yield resampled
    resampled = scipy.signal.upfirdn(kernel, np.pad(waiting, (0, reach + down)), up, down)
    yield resampled[delay + before * up :][: taken * wanted // rate - made].astype(np.float32)
