r"""Networks and their ends, one training for all, on the real GTZAN arrays: 442 clips to train on, 197 to validate.

python experiments/ablate.py --config=configs/ablations/gtzan_networks.py --workdir=runs/gtzan_networks --seeds=3

RESULTS
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import gtzan_mels_conv1d

CONV1D = {"name": "conv1d", "module": "", "filters": (128, 128, 128), "stride": 1, "dense": (256,), "batch_norm": True}
# Squares of 4 at every second position; the pool over all frames and bands is the maximum beside the mean.
CONV2D = {"name": "conv2d", "module": "", "filters": (16, 64, 128), "final_pool": 0, "dense": (256,), "batch_norm": True}
SHORT_CHUNK = {"name": "short_chunk", "module": "", "filters": (16, 16, 32, 32, 32, 32, 64), "dense": 64}


def get_config() -> ConfigDict:
    """Returns what the variants change: narrow networks trained on random crops of a third of a clip."""
    config = gtzan_mels_conv1d.get_config()
    # Three chunks of 129 frames (10 s) are all 387 of a clip, so that scores see what the training saw.
    config.data.crop_frames = 129
    config.data.eval_chunks = 3
    config.data.normalise = "band"
    config.model = ConfigDict(CONV1D)
    # Half the usual batch: twice the steps for the same computation.
    config.batch_size = 16
    config.epochs = 30  # of 28 steps
    config.eval_every = 30
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    return config


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants."""
    # What becomes of the 16 frames that are left of a crop.
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
    yield "short_chunk_residual_wide", {"model": residual | {"filters": (32, 32, 64, 64, 64, 64, 128), "dense": 128}}
    # The original's 7 frames, and 128, 64 and 32, are 0.11 s and 2, 1 and 0.5 s: so long are these at this hop of 78 ms.
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
