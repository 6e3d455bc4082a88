"""From the scores of chunks to the scores of clips."""

import numpy as np

from musicgenre.errors import UserError


def average_by_clip(scores: np.ndarray, clip_index: np.ndarray, clips: int) -> np.ndarray:
    """Returns the mean score of each clip over its chunks.

    Args:
      scores: probabilities, `[chunks, classes]`.
      clip_index: the clip of each chunk, integers in `[0, clips)`, `[chunks]`; in any order.
      clips: number of clips.

    Returns:
      Mean probabilities, float64 `[clips, classes]`.

    Raises:
      UserError: shapes that do not fit, an index out of range, or a clip without a chunk.
    """
    scores, clip_index = np.asarray(scores), np.asarray(clip_index)
    if scores.ndim != 2 or clip_index.shape != scores.shape[:1]:
        raise UserError(
            f"scores must be [chunks, classes] and clip_index [chunks], but they are "
            f"{list(scores.shape)} and {list(clip_index.shape)}."
        )
    if not np.issubdtype(clip_index.dtype, np.integer):
        raise UserError(f"clip_index must hold integers, not {clip_index.dtype}.")
    if clip_index.size and not 0 <= clip_index.min() <= clip_index.max() < clips:
        raise UserError(
            f"clip_index runs from {clip_index.min()} to {clip_index.max()}, but there are {clips} clips."
        )
    chunks = np.bincount(clip_index, minlength=clips)
    if (chunks == 0).any():
        raise UserError(
            f"{(chunks == 0).sum()} of {clips} clips have no chunk, the first is clip {int(np.argmax(chunks == 0))}."
        )
    sums = np.zeros((clips, scores.shape[1]))
    np.add.at(sums, clip_index, scores)
    return sums / chunks[:, None]
