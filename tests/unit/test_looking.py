"""What `cut` sees in a clip: a face and where it is, texts, black and still pictures."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data

from ltx_train import rng
from ltx_train.contracts import DataError
from ltx_train.data.footage import looking
from ltx_train.data.footage.looking import BLACK, NO_FACE, STILL, TEXT
from ltx_train.sampling.media import write_mp4

pytestmark = pytest.mark.slow
WIDTH, HEIGHT, FRAMES = 384, 448, 20


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """Grace Hopper, whose picture matplotlib brings; (H, W, 3)."""
    picture = cv2.imread(str(get_sample_data("grace_hopper.jpg", asfileobj=False)))
    return cv2.resize(picture, (WIDTH, HEIGHT))[..., ::-1].copy()


def meadow() -> np.ndarray:
    """Soft colours."""
    noise = rng.normal((HEIGHT // 32, WIDTH // 32, 3), 0, "test/meadow").numpy()
    return np.clip(cv2.resize(noise, (WIDTH, HEIGHT)) * 30 + 110, 0, 255).astype(np.uint8)


def titled(picture: np.ndarray) -> np.ndarray:
    made = picture.copy()
    for line, text in enumerate(("THE HISTORY", "OF COMPUTING")):
        cv2.putText(made, text, (20, 380 + 40 * line), cv2.FONT_HERSHEY_SIMPLEX, 1.3, (255, 255, 255), 3)
    return made


def film(path: Path, picture: np.ndarray, *, moves: int = 1, black: int = 0) -> Path:
    """The picture, moved to the right by `moves` pixels a frame, and black frames in front."""
    frames = [np.zeros_like(picture)] * black
    frames += [np.roll(picture, moves * number, axis=1) for number in range(FRAMES - black)]
    write_mp4(path, torch.from_numpy(np.stack(frames)), None, 25.0)
    return path


def kinds(path: Path) -> list[str]:
    return [remark.kind for remark in looking.remarks(looking.look(path))]


def test_a_face_is_found_where_it_is(portrait: np.ndarray, tmp_path: Path) -> None:
    for mirrored in (False, True):
        picture = portrait[:, ::-1].copy() if mirrored else portrait
        looks = looking.look(film(tmp_path / "face.mp4", picture))
        assert looks.faces == 1
        assert looks.face is not None
        left, top, right, bottom = looks.face
        middle = (left + right) / 2 - 10 / WIDTH
        assert middle == pytest.approx(0.48 if mirrored else 0.52, abs=0.04)
        assert (top + bottom) / 2 == pytest.approx(0.36, abs=0.05)
        assert 0.3 < right - left < 0.6
        assert looking.remarks(looks) == []


def test_each_fault_gets_its_finding_and_only_it(
    portrait: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "_PICTURES", 2)
    assert kinds(film(tmp_path / "a.mp4", meadow())) == [NO_FACE]
    assert kinds(film(tmp_path / "b.mp4", titled(portrait), moves=0)) == [STILL, TEXT]
    assert kinds(film(tmp_path / "c.mp4", titled(meadow()), moves=2)) == [TEXT, NO_FACE]
    assert kinds(film(tmp_path / "d.mp4", portrait, black=6)) == [BLACK]
    assert kinds(film(tmp_path / "e.mp4", portrait, moves=0)) == [STILL]


def test_a_face_in_few_pictures_is_no_place_to_crop_to(portrait: np.ndarray, tmp_path: Path) -> None:
    frames = [np.roll(meadow() if n > 6 else portrait, n, axis=1) for n in range(FRAMES)]
    write_mp4(tmp_path / "f.mp4", torch.from_numpy(np.stack(frames)), None, 25.0)
    looks = looking.look(tmp_path / "f.mp4")
    assert 0 < looks.faces < 0.5
    assert looks.face is None
    assert [remark.text for remark in looking.remarks(looks)] == ["a face on 40 % of the pictures alone"]


def test_what_is_no_film_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("no film")
    with pytest.raises(DataError, match="cannot be decoded"):
        looking.look(tmp_path / "x.mp4")
