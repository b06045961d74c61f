"""A saved predictor: what its features see, and which files are refused."""

import json
import pickle

import numpy as np
import pytest
from vidtta.engine.errors import UserError
from vidtta.engine.files import sha256_json
from vidtta.engine.predictor import NUMBERS, Fitted, Predictor, frame_features, load_predictor, save_predictor

PLAIN = Predictor([0.0] * 5, [1.0, 2.0, 1.0, 1.0, 1.0], ["a"], [1.0, 0.5, 0.0, 0.0, 0.0, 3.0], 0.25, 1.0, 0.0)


def test_features_of_still_and_moving_pictures():
    picture = np.random.default_rng(0).integers(0, 255, (3, 32, 48), dtype=np.uint8)
    still = frame_features(np.stack([picture] * 3))
    moving = frame_features(np.stack([np.roll(picture, 3 * k, axis=2) for k in range(3)]))
    assert still["similarity"] == pytest.approx(1) and still["flow"] < 0.01
    assert moving["similarity"] < 0.9 and moving["flow"] > still["flow"]
    assert frame_features(np.full((2, 3, 32, 48), 7, np.uint8))["edges"] == 0


def test_flow_is_in_pixels_of_the_full_picture():
    """On smooth waves that move 4 pixels a frame, at a size whose flow is found on a smaller picture."""
    y, x = np.mgrid[:240, :320]
    frames = [127 + 60 * np.sin((x - 4 * k) / 6) + 40 * np.sin(y / 6) for k in range(3)]
    video = np.stack([np.stack([picture.astype(np.uint8)] * 3) for picture in frames])
    assert frame_features(video)["flow"] == pytest.approx(4, rel=0.1)


def test_what_is_saved_predicts_the_same(tmp_path):
    path = tmp_path / "p.json"
    save_predictor(path, Fitted(PLAIN, "lora", {"method": {"kind": "lora"}}, ["v"], ["g"]))
    fitted, digest = load_predictor(path)
    row = dict.fromkeys(NUMBERS, 0.0) | {"flow": 2.0, "edges": 4.0, "class": "a"}
    assert fitted.predictor == PLAIN and len(digest) == 64
    assert fitted.predictor.predict([row, row | {"class": "b"}]).tolist() == [
        6.25,
        3.25,
    ]  # 2 + 0.5 * 4 / 2 + 0.25 (+ 3)


class _Runs:
    """What a pickle would do to whoever reads it."""

    def __reduce__(self):
        return (pytest.fail, ("reading a predictor ran code",))


def _rehashed(value):
    value = {key: item for key, item in value.items() if key != "sha256"}
    return json.dumps(value | {"sha256": sha256_json(value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: pickle.dumps(_Runs()), "is not JSON, so it is no predictor"),
        (lambda v: "[1]", "is no predictor"),
        (lambda v: json.dumps(v | {"schema": 1}), "has schema 1 and the features"),
        (lambda v: json.dumps(v | {"numbers": ["flow"]}), "and the features ['flow'], where schema 2 with"),
        (lambda v: json.dumps(v | {"arm": "x"}), "does not have the hash it was written with"),
        (lambda v: _rehashed(v | {"predictor": v["predictor"] | {"weights": [1.0]}}), "ValueError: 1 weights"),
        (lambda v: _rehashed(v | {"predictor": v["predictor"] | {"more": 1}}), "ValueError: keys ['more']"),
        (lambda v: _rehashed(v | {"predictor": v["predictor"] | {"slope": "nan"}}), "a number is not finite"),
        (lambda v: _rehashed({k: i for k, i in v.items() if k != "videos"}), "KeyError: 'videos'"),
    ],
)
def test_what_is_no_predictor_is_refused_in_one_sentence(tmp_path, change, message):
    path = tmp_path / "p.json"
    save_predictor(path, Fitted(PLAIN, "lora", {}, [], []))
    changed = change(json.loads(path.read_text()))
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(UserError) as found:
        load_predictor(path)
    text = str(found.value)
    assert text.startswith(f"{path}: ") and message in text and "vidtta adaptive" in text and "\n" not in text


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)"):
        load_predictor(tmp_path / "p.json")
