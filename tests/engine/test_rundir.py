"""Where things lie in a run directory, and when two results belong together."""

import json

import pytest
from vidtta.engine.data.clips import Clip
from vidtta.engine.errors import UserError
from vidtta.engine.files import sha256_json
from vidtta.engine.rundir import RunDirectory, check_same_settings, first_difference, read_json

SETTINGS = {"protocol": {"seed": 0, "sampler": {"steps": 30}}, "method": {"kind": "full", "lr": 1e-5}}


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path)


@pytest.fixture
def clip(tmp_path):
    return Clip("c1", tmp_path / "c1.mp4", "A ball.", 2.5)


def finished(directory, clip, settings=SETTINGS):
    keys = {"settings": sha256_json(settings)}
    result = {"clip": clip.id, "caption": clip.caption, "start": clip.start, "keys": keys, "settings": settings}
    directory.write_result("full", clip.id, result)
    return result


def refusal(directory, clip, settings=SETTINGS):
    with pytest.raises(UserError) as error:
        check_same_settings(directory, "full", clip, settings)
    return str(error.value)


def test_the_layout_is_the_one_documented(directory, tmp_path):
    assert directory.clip("full", "c1") == tmp_path / "arms/full/clips/c1"
    assert directory.reference("c1") == tmp_path / "shared/references/c1.json"
    assert directory.comparison("c1") == tmp_path / "comparisons/c1.mp4"


def test_a_result_takes_the_place_of_a_failure(directory, clip, tmp_path):
    assert directory.result("full", "c1") is None
    directory.write_failure("full", "c1", {"reason": "too short"})
    assert directory.failure("full", "c1") == {"reason": "too short"}
    result = finished(directory, clip)
    assert directory.result("full", "c1") == result
    assert directory.failure("full", "c1") is None
    assert [path.name for path in (tmp_path / "arms/full/clips/c1").iterdir()] == ["result.json"]
    directory.remove_result("full", "c1")
    directory.remove_result("full", "c1")
    assert directory.result("full", "c1") is None


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"null", b"\xff\xfe", b'{"a": \xff}'])
def test_what_is_no_json_object_counts_as_absent(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    assert read_json(tmp_path / "result.json") is None


def test_an_absent_file_and_a_folder_count_as_absent(tmp_path):
    assert read_json(tmp_path / "nothing.json") is None
    assert read_json(tmp_path) is None


def test_a_result_of_the_same_settings_is_finished(directory, clip):
    assert not check_same_settings(directory, "full", clip, SETTINGS)
    finished(directory, clip)
    assert check_same_settings(directory, "full", clip, SETTINGS)
    reordered = dict(reversed(json.loads(json.dumps(SETTINGS)).items()))
    assert check_same_settings(directory, "full", clip, reordered)


def test_a_result_of_other_settings_is_refused(directory, clip, tmp_path):
    finished(directory, clip)
    other = {**SETTINGS, "method": {"kind": "full", "lr": 1e-4}}
    assert refusal(directory, clip, other) == (
        f"{tmp_path}: the result of clip c1 in arm full was made under other settings (method.lr: was 1e-05, now 0.0001); "
        "choose another output_dir, or remove that arm's folder to make it again"
    )
    assert '(caption: was "A ball.", now "Two.")' in refusal(directory, Clip("c1", clip.path, "Two.", 2.5))
    assert "(start: was 2.5, now 0.0)" in refusal(directory, Clip("c1", clip.path, "A ball.", 0.0))


def test_a_result_without_keys_is_refused(directory, clip):
    directory.write_result("full", "c1", {"clip": "c1"})
    assert "(protocol: was null, now {" in refusal(directory, clip)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, "a.c: was 2, now 3"),
        ({"a": 1, "b": 1}, {"b": 2, "a": 2}, "a: was 1, now 2"),
        ({"a": 1}, {"a": 1, "b": [1, None]}, "b: was null, now [1, null]"),
        ({"a": 1, "b": "x"}, {"a": 1}, 'b: was "x", now null'),
        ({"a": {"b": 1}}, {"a": 5}, 'a: was {"b": 1}, now 5'),
        (1, 2, "settings: was 1, now 2"),
    ],
)
def test_the_first_difference_is_named(before, now, said):
    assert first_difference(before, now) == said
