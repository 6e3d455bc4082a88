"""Write the embeddings of sound files, the network's values before its last layer.

musicgenre embed album/ --out=album.npz

The file holds `path` [files] and `embedding` float32 [files, d]. With --windows it also holds, for
every window, `window_file` (the file's row), `window_start`, `window_end` (seconds) and
`window_embedding` [windows, d].
"""

from typing import TYPE_CHECKING, Any

from absl import flags

from musicgenre.cli.files import FILES, Tally, define_model, expand, load_tagger, write_npz
from musicgenre.errors import UserError

if TYPE_CHECKING:
    from musicgenre.inference.windows import WindowScores

FLAGS = flags.FlagValues()
ARGUMENTS = FILES
define_model(FLAGS)
flags.DEFINE_string("out", None, "The .npz file to write.", FLAGS, required=True)
flags.DEFINE_bool("windows", False, "Also write the embedding of every window.", FLAGS)


def main(words: list[str]) -> int:
    """Embeds every file; returns 3 if some failed, 2 if all did."""
    if not FLAGS.out.endswith(".npz"):
        raise UserError(f"--out={FLAGS.out}: the name must end in .npz.")
    tally = Tally()
    files = expand(words, tally)
    if not files:
        return tally.exit_code()

    import numpy as np

    from musicgenre.inference.windows import no_embedding

    tagger = load_tagger(FLAGS)
    paths: list[str] = []
    embeddings: list[np.ndarray] = []
    windows: list[WindowScores] = []
    for scores in tagger.scores(files, step=tagger.model.frames, keep_windows=FLAGS.windows):
        if scores.error:
            tally.fail(scores.error)
            continue
        if scores.embedding is None or not scores.embedding.size:
            raise UserError(no_embedding(tagger.model))
        tally.done += 1
        paths.append(scores.path)
        embeddings.append(scores.embedding)
        windows += [scores.windows] if scores.windows else []
    if paths:
        arrays: dict[str, Any] = {"path": np.array(paths), "embedding": np.stack(embeddings)}
        if windows:
            counts = [len(part.starts) for part in windows]
            arrays["window_file"] = np.repeat(np.arange(len(windows)), counts)
            for name in ("start", "end", "embedding"):
                parts = [getattr(part, f"{name}s") for part in windows]
                arrays[f"window_{name}"] = np.concatenate(parts)
        write_npz(FLAGS.out, arrays)
    return tally.exit_code()
