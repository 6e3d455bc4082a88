r"""Networks and poolings with one training recipe on GTZAN: 442 training and 197 validation clips.

    musicgenre ablate --config=ablations/gtzan_networks:arrays \
      --config.data.root=/data/gtzan_mels --workdir=runs/gtzan_networks --seeds=3

All are trained alike: random windows of 129 of the 387 frames, evaluated on three of them; band
normalisation, Adam with a cosine, batch 16, 30 epochs, no augmentation. Validation accuracy on the
arrays at the end of training, seeds 0-2, mean +- standard deviation (95 % t interval of the mean;
fault-filtered lists, nothing selected; jax 0.10.2, one CPU core, 10 to 125 s per run); the table
and its plot are in docs/results/gtzan_networks:

    conv1d_flatten        49.2 % +- 2.5 (42.9-55.5)  conv1d_layers4        48.4 % +- 1.8 (44.0-52.8)
    conv1d_mean           49.6 % +- 1.2 (46.7-52.5)  k2c1                  52.6 % +- 1.3 (49.4-55.8)
    conv1d_mean_max       47.5 % +- 1.6 (43.5-51.6)  conv2d                54.7 % +- 1.8 (50.2-59.1)
    conv1d_attention      48.9 % +- 2.3 (43.1-54.7)  resnet16              52.8 % +- 0.9 (50.6-55.0)
    conv1d_scales         47.2 % +- 1.5 (43.4-51.0)  resnet32              56.3 % +- 2.8 (49.3-63.4)
    conv1d_filters64      47.7 % +- 1.5 (43.9-51.5)  short_chunk_residual  43.7 % +- 1.3 (40.3-47.0)
    conv1d_layers2        50.6 % +- 0.8 (48.7-52.5)  crnn                  53.3 % +- 0.5 (52.0-54.6)

The other variants have not been trained: the wider ones, short_chunk without residual units or
with five layers, and musicnn, whose step takes some 20 times as long as conv2d's on a CPU. For
comparison, the recipe of configs/gtzan_modulation.py: 65.3 % +- 1.2.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from musicgenre.configs import gtzan_mels_conv1d

CONV1D = {
    "name": "conv1d",
    "module": "",
    "filters": (128, 128, 128),
    "stride": 1,
    "dense": (256,),
    "batch_norm": True,
}
# Kernels of 4 x 4 with stride 2; the final pool concatenates mean and maximum.
CONV2D = {
    "name": "conv2d",
    "module": "",
    "filters": (16, 64, 128),
    "final_pool": 0,
    "dense": (256,),
    "batch_norm": True,
}
SHORT_CHUNK = {
    "name": "short_chunk",
    "module": "",
    "filters": (16, 16, 32, 32, 32, 32, 64),
    "dense": 64,
}


def get_config(source: str = "audio") -> ConfigDict:
    """Returns narrow networks on windows of a third of a clip; `source` is "audio" or "arrays"."""
    config = gtzan_mels_conv1d.get_config(source)
    # Three windows of 129 frames (10 s) cover all 387: evaluation sees what training saw.
    config.data.crop_frames = 129
    config.data.eval_chunks = 3
    config.data.normalise = "band"
    config.model = ConfigDict(CONV1D)
    # Half the usual batch gives twice the steps for the same computation.
    config.batch_size = 16
    config.epochs = 30  # of 28 steps
    config.eval_every = 30
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    return config


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants."""
    # How the 16 remaining frames of a window are pooled.
    yield "conv1d_flatten", {}
    yield "conv1d_mean", {"model": CONV1D | {"pooling": "mean"}}
    pooled = CONV1D | {"pooling": "mean_max"}
    yield "conv1d_mean_max", {"model": pooled}
    yield "conv1d_attention", {"model": CONV1D | {"pooling": "attention"}}
    # Filters of several widths, then other numbers of filters and layers.
    yield "conv1d_scales", {"model": pooled | {"widths": (2, 4, 8, 16)}}
    yield "conv1d_filters64", {"model": pooled | {"filters": (64, 64, 64)}}
    yield "conv1d_filters256", {"model": pooled | {"filters": (256, 256, 256)}}
    yield "conv1d_layers2", {"model": pooled | {"filters": (128, 128)}}
    yield "conv1d_layers4", {"model": pooled | {"filters": (128, 128, 128, 128)}}
    yield (
        "k2c1",
        {
            "model": {
                "name": "k2c1",
                "module": "",
                "filters": (64, 64, 64, 128),
                "kernel_bands": (0, 1, 1, 1),
                "time_pools": (2, 4, 4, 4),
                "band_pools": (1, 1, 1, 1),
                "dense": (128,),
            }
        },
    )
    yield "conv2d", {"model": CONV2D}
    yield "conv2d_wide", {"model": CONV2D | {"filters": (32, 144, 256)}}
    yield "resnet16", {"model": {"name": "resnet", "module": "", "filters": 16}}
    yield "resnet32", {"model": {"name": "resnet", "module": "", "filters": 32}}
    yield "short_chunk", {"model": SHORT_CHUNK}
    yield "short_chunk_layers5", {"model": SHORT_CHUNK | {"filters": (16, 16, 32, 32, 64)}}
    residual = SHORT_CHUNK | {"residual": True}
    yield "short_chunk_residual", {"model": residual}
    yield "short_chunk_residual_layers5", {"model": residual | {"filters": (16, 16, 32, 32, 64)}}
    yield (
        "short_chunk_residual_wide",
        {"model": residual | {"filters": (32, 32, 64, 64, 64, 64, 128), "dense": 128}},
    )
    # The original's widths of 7, 128, 64 and 32 frames (0.11, 2, 1 and 0.5 s) at this hop of 78 ms.
    yield (
        "musicnn",
        {
            "model": {
                "name": "musicnn",
                "module": "",
                "timbral_filters": 8,
                "timbral_width": 2,
                "temporal_filters": 8,
                "temporal_widths": (26, 13, 7),
                "dense": 64,
            }
        },
    )
    yield (
        "crnn",
        {
            "model": {
                "name": "crnn",
                "module": "",
                "pad": 0,
                "input_norm": "none",
                "filters": (16, 32, 32, 32),
                "time_pools": (2, 2, 2, 2),
                "band_pools": (2, 4, 4, 4),
            }
        },
    )
