"""The front end on the device: samples to features inside a jitted program.

For programs that take audio (`musicgenre.exchange.export`) and for training without a store. With
the transform "rfft64" it equals `musicgenre.audio.features.compute_features` to 1e-3 dB.
"""

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
      transform: how a spectrum is computed, with the largest difference from `compute_features` in
        log-mels of eight real clips and of the worst synthetic signal:
          "rfft64": in double precision, even without `jax_enable_x64`; 2e-5 and 2e-5 dB.
          "rfft32": in single precision; 2e-4 and 2e-3 dB.
          "matmul": in single precision by matrix products, for programs without a Fourier transform
            (ONNX) or double precision (TPU); 3e-4 and 4e-3 dB.
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
    cosines = scipy.fft.dct(np.eye(spec.n_mels), norm="ortho")[:, : spec.n_mfcc]
    return _product(scaled, cosines.astype(np.float32))


def stft_power(
    samples: jax.Array, spec: FeatureSpec, *, frames: int = 0, transform: str = "auto"
) -> jax.Array:
    """Returns the power spectrogram, float32 `[batch, frames, 1 + n_fft // 2]`; see `features`."""
    if transform not in TRANSFORMS:
        hint = did_you_mean(transform, TRANSFORMS)
        raise UserError(f"transform: {transform!r} is not known.{hint}")
    cut = _frames(samples, spec, _wanted(frames, frame_count(samples.shape[1], spec)))
    if transform == "auto":
        auto: jax.Array = jax.lax.platform_dependent(cut, tpu=_power_matmul, default=_power_rfft64)
        return auto
    powers: dict[str, Callable[[jax.Array], jax.Array]] = {
        "rfft64": _power_rfft64,
        "rfft32": _power,
        "matmul": _power_matmul,
    }
    return powers[transform](cut)


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
    own = spec.db_ref == "max"
    reference = power.max(axis=(1, 2), keepdims=True) if own else jnp.float32(float(spec.db_ref))
    db, zero = (10.0 * jnp.log10(jnp.maximum(x, 1e-10)) for x in (power, reference))
    db = db - zero
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
    runs, before = -(-n_fft // hop), n_fft // 2
    total = (frames + runs - 1) * hop
    used = samples[:, : total - before].astype(jnp.float32)
    padded = jnp.pad(used, ((0, 0), (before, total - before - used.shape[1])))
    hops = padded.reshape(samples.shape[0], frames + runs - 1, hop)
    shifted = [hops[:, run : run + frames] for run in range(runs)]
    return jnp.concatenate(shifted, axis=-1)[..., :n_fft]


def _power(frames: jax.Array) -> jax.Array:
    """Returns the power of frames `[..., n_fft]` in their precision, `[..., 1 + n_fft // 2]`."""
    window = scipy.signal.get_window("hann", frames.shape[-1])
    spectrum = jnp.fft.rfft(frames * window.astype(frames.dtype))
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _in_double(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Runs a function of float32 arrays in double precision.

    JAX would apply its own batching rule outside `enable_x64`, where it fails; hence this one.
    """

    @jax.custom_batching.custom_vmap
    def run(*arrays: jax.Array) -> jax.Array:
        with jax.enable_x64(True):
            return function(*(x.astype(jnp.float64) for x in arrays)).astype(jnp.float32)

    @run.def_vmap
    def _(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        pairs = zip(arrays, batched, strict=True)
        return run(*(x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in pairs)), True

    return run


_power_double = _in_double(_power)
_gradient_double = _in_double(lambda frames, gradient: jax.vjp(_power, frames)[1](gradient)[0])
# JAX's own derivative would be computed in single precision.
_power_rfft64 = jax.custom_vjp(_power_double)
_power_rfft64.defvjp(
    lambda frames: (_power_double(frames), frames),
    lambda frames, gradient: (_gradient_double(frames, gradient),),
)


def _power_matmul(frames: jax.Array) -> jax.Array:
    """Returns the power by one Cooley-Tukey step, whose two shorter transforms are matrix products.

    With n = inner a + b, k = c + outer d and n_fft = outer x inner: the transform over a, the
    twiddle factors, the transform over b. For 2,048 = 64 x 32 this takes a tenth of the work of the
    full matrix, and its shorter sums round less.
    """
    n_fft = frames.shape[-1]
    inner = next(factor for factor in range(math.isqrt(n_fft), 0, -1) if n_fft % factor == 0)
    outer, bins = n_fft // inner, n_fft // 2 + 1
    upper = -(-bins // outer)  # only the frequencies up to half the rate
    window = scipy.signal.get_window("hann", n_fft).astype(np.float32)
    x = (frames * window).reshape(*frames.shape[:2], outer, inner)
    cos, sin = _wave(outer, outer, outer)
    real, imaginary = _product(cos, x), _product(-sin, x)
    cos, sin = _wave(outer, inner, n_fft)
    real, imaginary = real * cos + imaginary * sin, imaginary * cos - real * sin
    cos, sin = _wave(inner, upper, inner)
    real, imaginary = (
        _product(real, cos) + _product(imaginary, sin),
        _product(imaginary, cos) - _product(real, sin),
    )
    power = jnp.square(real) + jnp.square(imaginary)
    return power.swapaxes(-1, -2).reshape(*frames.shape[:2], upper * outer)[..., :bins]


def _product(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> jax.Array:
    """Multiplies in full float32; by default a GPU rounds the factors to 10 bits and a TPU to 7."""
    return jnp.matmul(jnp.asarray(a), jnp.asarray(b), precision=jax.lax.Precision.HIGHEST)


def _wave(rows: int, columns: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosine and sine of 2 pi r c / period, float32 `[rows, columns]`."""
    # Integer arithmetic removes complete periods without rounding.
    angle = 2 * np.pi * (np.outer(np.arange(rows), np.arange(columns)) % period) / period
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
