import numpy as np
import pytest
import soundfile

from musicgenre.datasets.synthetic import STYLES, load_synthetic, render_clip
from musicgenre.errors import UserError


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    return load_synthetic(root, seed=3, clips_per_style=5, seconds=1.0)


def test_every_style_is_in_every_split_and_no_artist_in_two(rendered):
    assert rendered.synthetic and len(rendered.clips) == 50
    assert rendered.label_names == tuple(sorted(STYLES))
    for split in ("train", "valid", "test"):
        assert {clip.labels[0] for clip in rendered.clips if clip.split == split} == set(STYLES)
    pairs = {(clip.group, clip.split) for clip in rendered.clips}
    assert len(pairs) == len({group for group, _ in pairs})


def test_files_are_real_sound_of_the_stated_length(rendered):
    for clip in rendered.clips:
        samples, rate = soundfile.read(clip.path, always_2d=True)
        assert abs(len(samples) / rate - 1.0) < 0.06
        assert 0.01 < np.abs(samples).max() < 1.0
    assert len({clip.path.suffix for clip in rendered.clips}) > 1


def test_a_deleted_file_comes_back_the_same_and_nothing_else_changes(rendered):
    times = {clip.path: clip.path.stat().st_mtime_ns for clip in rendered.clips}
    victim = next(clip.path for clip in rendered.clips if clip.path.suffix == ".wav")
    content = victim.read_bytes()
    victim.unlink()
    again = load_synthetic(rendered.root, seed=3, clips_per_style=5, seconds=1.0)
    assert again == rendered and victim.read_bytes() == content
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path != victim)


def test_the_seed_and_the_index_decide():
    style = next(iter(STYLES))
    one = render_clip(style, 0, 1.0)
    np.testing.assert_array_equal(one, render_clip(style, 0, 1.0))
    assert one.dtype == np.float32 and one.shape == (22050,)
    assert not np.array_equal(one, render_clip(style, 1, 1.0))
    assert not np.array_equal(one, render_clip(style, 0, 1.0, index=1))


def test_other_parameters_or_foreign_files_are_refused(rendered, tmp_path):
    with pytest.raises(UserError, match="was rendered with seed 3, not 4"):
        load_synthetic(rendered.root, seed=4, clips_per_style=5, seconds=1.0)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_synthetic(tmp_path, seed=3, clips_per_style=5, seconds=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
