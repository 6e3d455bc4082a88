"""The front end on the device: samples to features inside a jitted program, as `musicgenre.audio.features` computes them.

For a program that takes sound (`musicgenre.exchange.export`) and for training on clips that have no store. It equals
`compute_features` to 1e-3 dB where its `transform` is "rfft64", and says below how near the others come.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.signal

from musicgenre.audio.features import FeatureSpec, frame_count, mel_filters
from musicgenre.errors import UserError, did_you_mean

TRANSFORMS = ("auto", "rfft64", "rfft32", "matmul")


def features(
    samples: jax.Array, spec: FeatureSpec, *, frames: int = 0, transform: str = "auto"
) -> jax.Array:
    """Returns the features of each clip of a batch; a pure function that can be jitted, vmapped and differentiated.

    The frames are centred on multiples of the hop, with zeros beyond both ends, and a decibel's reference and the floor of
    `top_db` are each clip's own.

    Args:
      samples: float32 `[batch, samples]`, mono at the spec's rate.
      spec: the front end.
      frames: keep the first so many, which then are the clip for its reference and floor; 0 keeps all.
      transform: how a frame's spectrum is computed. The figures are the largest differences from `compute_features`: of the
        log-mels of eight real clips of 30 s, of those of the worst made-up signal, a loud chord over faint noise, and of the
        single frequencies (the kind "stft") of either.
          "rfft64": in double precision, whatever `jax_enable_x64` says. 2e-5, 2e-5 and 2e-5 dB.
          "rfft32": in single precision. 2e-4, 2e-3 and 6e-3 dB: a cell 80 dB below its frame's loudest holds the rounding of
            that one.
          "matmul": in single precision by small matrix products, for programs that lack a Fourier transform (ONNX) or double
            precision (TPU). 3e-4, 4e-3 and 7e-3 dB.
          "auto": "matmul" on a TPU, otherwise "rfft64".

    Returns:
      float32 `[batch, frames, bands]`.

    Raises:
      UserError: the transform is not known, or there are fewer frames than were asked for.
    """
    if spec.kind == "waveform":
        return frame_waveform(samples, spec.hop_length, frames=frames)
    power = stft_power(samples, spec, frames=frames, transform=transform)
    if spec.kind != "stft":
        power = _product(power, mel_filters(spec))
    scaled = compress(power, spec)
    if spec.kind != "mfcc":
        return scaled
    return _product(scaled, _cosines(spec.n_mels, spec.n_mfcc))


def stft_power(
    samples: jax.Array, spec: FeatureSpec, *, frames: int = 0, transform: str = "auto"
) -> jax.Array:
    """Returns the power spectrogram, float32 `[batch, frames, 1 + n_fft // 2]`; see `features`."""
    if transform not in TRANSFORMS:
        raise UserError(
            f"transform: {transform!r} is not known." + did_you_mean(transform, TRANSFORMS)
        )
    cut = _frames(samples, spec, _wanted(frames, frame_count(samples.shape[1], spec)))
    if transform == "auto":
        chosen: jax.Array = jax.lax.platform_dependent(
            cut, tpu=_power_matmul, default=_power_rfft64
        )
        return chosen
    return {"rfft64": _power_rfft64, "rfft32": _power_rfft32, "matmul": _power_matmul}[transform](
        cut
    )


def frame_waveform(samples: jax.Array, hop_length: int, *, frames: int = 0) -> jax.Array:
    """Returns consecutive samples, float32 `[batch, frames, hop_length]`; see `musicgenre.audio.features.frame_waveform`."""
    batch, length = samples.shape
    wanted = _wanted(frames, max(length // hop_length, 1))
    padded = jnp.pad(samples, ((0, 0), (0, max(hop_length - length, 0))))
    return padded[:, : wanted * hop_length].reshape(batch, wanted, hop_length).astype(jnp.float32)


def compress(power: jax.Array, spec: FeatureSpec) -> jax.Array:
    """Returns the power `[batch, frames, bands]` on the spec's scale; see `musicgenre.audio.features.compress`."""
    if spec.compression != "db":
        return jnp.log10(10000.0 * power + 1.0)
    floor = 1e-10
    reference = (
        power.max(axis=(1, 2), keepdims=True)
        if spec.db_ref == "max"
        else jnp.float32(float(spec.db_ref))
    )
    db = 10.0 * jnp.log10(jnp.maximum(power, floor)) - 10.0 * jnp.log10(
        jnp.maximum(reference, floor)
    )
    return jnp.maximum(db, db.max(axis=(1, 2), keepdims=True) - spec.top_db)


def _wanted(frames: int, there: int) -> int:
    if frames > there:
        raise UserError(f"{frames} frames were asked for, but the samples make {there}.")
    return frames or there


def _frames(samples: jax.Array, spec: FeatureSpec, frames: int) -> jax.Array:
    """Returns overlapping frames, float32 `[batch, frames, n_fft]`.

    Put together from runs of one hop, of which neighbouring frames share all but one: unlike a gather it needs no table of
    indices and is a mere copy on every device.
    """
    n_fft, hop = spec.n_fft, spec.hop_length
    runs = -(-n_fft // hop)
    before = n_fft // 2
    total = (frames + runs - 1) * hop
    used = samples[:, : total - before].astype(jnp.float32)
    padded = jnp.pad(used, ((0, 0), (before, total - before - used.shape[1])))
    hops = padded.reshape(samples.shape[0], frames + runs - 1, hop)
    return jnp.concatenate([hops[:, run : run + frames] for run in range(runs)], axis=-1)[
        ..., :n_fft
    ]


# The transform in double precision has rules of its own for what JAX would otherwise do by its own rules later, where double
# precision is off again: those would silently compute in single precision, or fail.
@jax.custom_vjp
def _power_rfft64(frames: jax.Array) -> jax.Array:
    return _double_power(frames)


def _forward(frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _double_power(frames), frames


def _backward(frames: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (_double_gradient(frames, gradient),)


_power_rfft64.defvjp(_forward, _backward)


@jax.custom_batching.custom_vmap
def _double_power(frames: jax.Array) -> jax.Array:
    with jax.enable_x64(True):
        return _power(frames.astype(jnp.float64)).astype(jnp.float32)


@jax.custom_batching.custom_vmap
def _double_gradient(frames: jax.Array, gradient: jax.Array) -> jax.Array:
    with jax.enable_x64(True):
        pull = jax.vjp(_power, frames.astype(jnp.float64))[1]
        return pull(gradient.astype(jnp.float64))[0].astype(jnp.float32)


@_double_power.def_vmap
def _double_power_vmap(
    size: int, batched: Sequence[bool], frames: jax.Array
) -> tuple[jax.Array, bool]:
    return _double_power(frames), True


@_double_gradient.def_vmap
def _double_gradient_vmap(
    size: int, batched: Sequence[bool], *arrays: jax.Array
) -> tuple[jax.Array, bool]:
    filled = [
        array if there else jnp.broadcast_to(array, (size, *array.shape))
        for array, there in zip(arrays, batched, strict=True)
    ]
    return _double_gradient(*filled), True


def _power_rfft32(frames: jax.Array) -> jax.Array:
    return _power(frames)


def _power(frames: jax.Array) -> jax.Array:
    """Returns the power of frames `[..., n_fft]` in their own precision, `[..., 1 + n_fft // 2]`."""
    spectrum = jnp.fft.rfft(frames * _window(frames.shape[-1]).astype(frames.dtype))
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _power_matmul(frames: jax.Array) -> jax.Array:
    """Cooley and Tukey's first step, and the two shorter transforms that it leaves as matrix products.

    With n = inner a + b and k = c + outer d, of a transform of n_fft = outer x inner: over a, then the twiddle factors, then
    over b. For 2,048 = 64 x 32 that is a tenth of the work of one product with the whole matrix, and its sums are shorter, so
    that less is rounded.
    """
    n_fft = frames.shape[-1]
    outer, inner = _factors(n_fft)
    # No more than the frequencies up to half the rate.
    upper = -(-(n_fft // 2 + 1) // outer)
    cos, sin = _wave(outer, outer, outer)
    x = (frames * _window(n_fft).astype(np.float32)).reshape(*frames.shape[:2], outer, inner)
    # [outer, outer] times [..., outer, inner].
    real, imaginary = _product(cos, x), _product(-sin, x)
    cos, sin = _wave(outer, inner, n_fft)
    real, imaginary = real * cos + imaginary * sin, imaginary * cos - real * sin
    cos, sin = _wave(inner, upper, inner)
    # [..., outer, inner] times [inner, upper].
    real, imaginary = (
        _product(real, cos) + _product(imaginary, sin),
        _product(imaginary, cos) - _product(real, sin),
    )
    power = jnp.square(real) + jnp.square(imaginary)
    return power.swapaxes(-1, -2).reshape(*frames.shape[:2], upper * outer)[..., : n_fft // 2 + 1]


def _product(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> jax.Array:
    """Multiplies float32 as such: a GPU would otherwise round the factors to 10 bits, and a TPU to 7."""
    return jnp.matmul(jnp.asarray(a), jnp.asarray(b), precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=8)
def _window(n_fft: int) -> np.ndarray:
    """Returns the periodic Hann window, float64 `[n_fft]`."""
    window: np.ndarray = scipy.signal.get_window("hann", n_fft, fftbins=True)
    return window


def _factors(n: int) -> tuple[int, int]:
    """Returns two factors of n, as equal as can be, the larger first; n and 1 of a prime."""
    inner = next(factor for factor in range(math.isqrt(n), 0, -1) if n % factor == 0)
    return n // inner, inner


def _wave(rows: int, columns: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosine and sine of 2 pi r c / period, float32 `[rows, columns]`."""
    # Whole periods are taken away in integers, where nothing is rounded.
    angle = 2 * np.pi * (np.outer(np.arange(rows), np.arange(columns)) % period) / period
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _cosines(n_mels: int, n_mfcc: int) -> np.ndarray:
    """Returns the matrix of the orthonormal DCT-II, float32 `[n_mels, n_mfcc]`."""
    return np.ascontiguousarray(
        scipy.fft.dct(np.eye(n_mels), axis=-1, type=2, norm="ortho")[:, :n_mfcc], np.float32
    )
