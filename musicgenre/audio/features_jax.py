"""The front end on the device: samples to features inside a jitted program.

For programs that take audio (`musicgenre.exchange.export`) and for training without a store. With
the transform "rfft64" it equals `musicgenre.audio.features.compute_features` to 1e-3 dB.
"""

import functools
import math
from collections.abc import Callable, Sequence

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
    """Returns the features of each clip of a batch; a pure, differentiable function.

    Frames are centred on multiples of the hop, with zeros beyond both ends. The reference of the dB
    and the floor of `top_db` are each clip's own.

    Args:
      samples: float32 `[batch, samples]`, mono at the spec's rate.
      spec: the front end.
      frames: keep the first so many, which then determine reference and floor; 0 keeps all.
      transform: how a spectrum is computed. The numbers are the largest differences from
        `compute_features`: log-mels of eight real clips of 30 s, log-mels of the worst synthetic
        signal (a loud chord over faint noise), and single frequencies ("stft") of either.
          "rfft64": in double precision, whatever `jax_enable_x64` is. 2e-5, 2e-5 and 2e-5 dB.
          "rfft32": in single precision. 2e-4, 2e-3 and 6e-3 dB: a cell 80 dB below the frame's
            loudest holds rounding errors.
          "matmul": in single precision by matrix products, for programs without a Fourier transform
            (ONNX) or double precision (TPU). 3e-4, 4e-3 and 7e-3 dB.
          "auto": "matmul" on a TPU, otherwise "rfft64".

    Returns:
      float32 `[batch, frames, bands]`.

    Raises:
      UserError: an unknown transform, or more frames than the samples make.
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
    functions: dict[str, Callable[[jax.Array], jax.Array]] = {
        "rfft64": _power_rfft64,
        "rfft32": _power,
        "matmul": _power_matmul,
    }
    power: jax.Array = (
        jax.lax.platform_dependent(cut, tpu=_power_matmul, default=_power_rfft64)
        if transform == "auto"
        else functions[transform](cut)
    )
    return power


def frame_waveform(samples: jax.Array, hop_length: int, *, frames: int = 0) -> jax.Array:
    """Returns consecutive samples, float32 `[batch, frames, hop_length]`; see `features`."""
    batch, length = samples.shape
    wanted = _wanted(frames, max(length // hop_length, 1))
    padded = jnp.pad(samples, ((0, 0), (0, max(hop_length - length, 0))))
    return padded[:, : wanted * hop_length].reshape(batch, wanted, hop_length).astype(jnp.float32)


def compress(power: jax.Array, spec: FeatureSpec) -> jax.Array:
    """Returns the power `[batch, frames, bands]` in dB or log10(10000 x + 1), by the spec."""
    if spec.compression != "db":
        return jnp.log10(10000.0 * power + 1.0)
    if spec.db_ref == "max":
        reference = power.max(axis=(1, 2), keepdims=True)
    else:
        reference = jnp.float32(float(spec.db_ref))

    def decibels(power: jax.Array) -> jax.Array:
        return 10.0 * jnp.log10(jnp.maximum(power, 1e-10))

    db = decibels(power) - decibels(reference)
    return jnp.maximum(db, db.max(axis=(1, 2), keepdims=True) - spec.top_db)


def _wanted(frames: int, available: int) -> int:
    if frames > available:
        raise UserError(f"{frames} frames were requested, but the samples make {available}.")
    return frames or available


def _frames(samples: jax.Array, spec: FeatureSpec, frames: int) -> jax.Array:
    """Returns overlapping frames, float32 `[batch, frames, n_fft]`.

    Concatenated from shifted views of hops: a plain copy on every device, without a gather.
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


# JAX would apply its own differentiation and batching rules later, outside `enable_x64`, where they
# compute in single precision or fail. Hence the custom rules.
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
        array if mapped else jnp.broadcast_to(array, (size, *array.shape))
        for array, mapped in zip(arrays, batched, strict=True)
    ]
    return _double_gradient(*filled), True


def _power(frames: jax.Array) -> jax.Array:
    """Returns the power of frames `[..., n_fft]` in their precision, `[..., 1 + n_fft // 2]`."""
    spectrum = jnp.fft.rfft(frames * _window(frames.shape[-1]).astype(frames.dtype))
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _power_matmul(frames: jax.Array) -> jax.Array:
    """Returns the power by one Cooley-Tukey step, whose two shorter transforms are matrix products.

    With n = inner a + b, k = c + outer d and n_fft = outer x inner: the transform over a, the
    twiddle factors, the transform over b. For 2,048 = 64 x 32 this takes a tenth of the work of the
    full matrix, and its shorter sums round less.
    """
    n_fft = frames.shape[-1]
    outer, inner = _factors(n_fft)
    # Only the frequencies up to half the rate.
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
    """Multiplies in full float32; by default a GPU rounds the factors to 10 bits and a TPU to 7."""
    return jnp.matmul(jnp.asarray(a), jnp.asarray(b), precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=8)
def _window(n_fft: int) -> np.ndarray:
    """Returns the periodic Hann window, float64 `[n_fft]`."""
    window: np.ndarray = scipy.signal.get_window("hann", n_fft, fftbins=True)
    return window


def _factors(n: int) -> tuple[int, int]:
    """Returns the two most equal factors of n, the larger first."""
    inner = next(factor for factor in range(math.isqrt(n), 0, -1) if n % factor == 0)
    return n // inner, inner


def _wave(rows: int, columns: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosine and sine of 2 pi r c / period, float32 `[rows, columns]`."""
    # Integer arithmetic removes complete periods without rounding.
    angle = 2 * np.pi * (np.outer(np.arange(rows), np.arange(columns)) % period) / period
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _cosines(n_mels: int, n_mfcc: int) -> np.ndarray:
    """Returns the matrix of the orthonormal DCT-II, float32 `[n_mels, n_mfcc]`."""
    return np.ascontiguousarray(
        scipy.fft.dct(np.eye(n_mels), axis=-1, type=2, norm="ortho")[:, :n_mfcc], np.float32
    )
