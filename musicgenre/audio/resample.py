"""Sample rate conversion by one of two filters: soxr's "HQ" or resampy's "kaiser_best"."""

import functools
import math
from collections.abc import Iterable, Iterator

import numpy as np

RESAMPLERS = ("soxr_hq", "kaiser_best")
# resampy 0.4's "kaiser_best": zero crossings per side, the Kaiser window's beta, and the cutoff as
# a fraction of the Nyquist frequency.
_ZEROS, _BETA, _ROLLOFF = 50, 12.984585247040012, 0.9173473712608761


def resample(samples: np.ndarray, rate: int, wanted: int, resampler: str = "soxr_hq") -> np.ndarray:
    """Returns mono samples at another rate.

    "soxr_hq" equals `librosa.load`. "kaiser_best" is a sinc with 50 zero crossings per side under a
    Kaiser window (J. O. Smith, "Digital Audio Resampling",
    https://ccrma.stanford.edu/~jos/resample/) with the parameters of resampy 0.4, which librosa
    used when the original musicnn's scores were computed. resampy interpolates its filter from a
    table and differs from this one by up to 4e-4 of full scale in white noise, 7e-5 in music.

    Args:
      samples: `[samples]`.
      rate: their rate in Hz.
      wanted: rate of the result in Hz.
      resampler: "soxr_hq" or "kaiser_best".

    Returns:
      float32 `[samples * wanted / rate]`, rounded up for "soxr_hq" (as in librosa) and down for
      "kaiser_best" (as in resampy).
    """
    blocks = [np.asarray(samples, np.float32)]
    return np.concatenate(list(resample_stream(blocks, rate, wanted, resampler)))


def resample_stream(
    blocks: Iterable[np.ndarray], rate: int, wanted: int, resampler: str = "soxr_hq"
) -> Iterator[np.ndarray]:
    """Yields `resample` of the concatenated blocks, float32 `[any]`, bit for bit."""
    if rate == wanted:
        return iter(blocks)
    return (_by_soxr if resampler == "soxr_hq" else _by_kaiser)(blocks, rate, wanted)


def _by_soxr(blocks: Iterable[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    import soxr  # slow to import, and most files do not need it

    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
    taken = made = 0
    for block in blocks:
        resampled = stream.resample_chunk(block)
        taken, made = taken + len(block), made + len(resampled)
        yield resampled
    rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    # The total has librosa's length, whatever the length of the filter's tail.
    missing = max(math.ceil(taken * (wanted / rate)) - made, 0)
    yield np.pad(rest, (0, max(missing - len(rest), 0)))[:missing]


@functools.lru_cache(maxsize=2)
def _filter(rate: int, wanted: int) -> np.ndarray:
    """Returns the filter at the least common multiple of both rates, float64 `[2 * half + 1]`."""
    import scipy.special

    divisor = math.gcd(rate, wanted)
    longer = max(rate, wanted) // divisor
    time = np.arange(_ZEROS * longer + 1) / longer  # in zero crossings
    half = _ROLLOFF * np.sinc(_ROLLOFF * time)
    argument = _BETA * np.sqrt(np.maximum(1 - np.square(time / _ZEROS), 0))
    half *= scipy.special.i0(argument) / scipy.special.i0(_BETA)
    half *= min(1.0, wanted / rate)
    return np.concatenate([half[:0:-1], half])


def _by_kaiser(blocks: Iterable[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    """Yields resampled blocks; every `down` input samples give `up` output samples.

    A block starts at a multiple of `down` and includes the filter's reach on both sides, so its
    sums are made in the same order wherever the input is divided.
    """
    import scipy.signal  # takes half a second to import

    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    kernel = _filter(rate, wanted)
    half = len(kernel) // 2
    reach = half // up + 1
    before, delay = -(-reach // down), -(-half // down)  # in groups of `down` samples
    # The filter's centre falls on an output sample.
    kernel = np.pad(kernel, (-half % down, 0))

    # `waiting` begins `before` groups ahead of the next group to resample.
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
