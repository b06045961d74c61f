"""`vidtta prepare` from end to end, on small videos: what is written, and what is refused."""

import csv
import dataclasses
import fcntl
import os
from pathlib import Path

import pytest
import torch
from vidtta.engine.data.clips import Data, list_clips
from vidtta.engine.data.video import read_window
from vidtta.engine.errors import UserError
from vidtta.engine.files import sha256_file
from vidtta.engine.prepare import run as module
from vidtta.engine.prepare.run import prepare

from .prepare_sources import (
    CLIPS,
    SMALL,
    contents,
    make_source,
    refusal,
    run,
    tree,
    write_archive,
    write_ucf101,
    write_video,
)

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

GOOD = {name for name, pictures in CLIPS.items() if pictures >= 10}
SHORT = "too short: it yields 3 frames at 24 fps from 0 s, and 6 are needed; take a longer clip or an earlier start"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "UCF-101")


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def table(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    """What an undisturbed run makes; not to be written to."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert run(source, out)[0] == 0
    return out


def test_manifest_rejects_and_files(prepared, source):
    assert {path.stem for path in (prepared / "clips").iterdir()} == GOOD
    assert sorted(path.name for path in prepared.iterdir()) == [
        *("captions.txt", "clips", "manifest.csv", "prepare.json", "rejects.csv", "state"),
    ]
    rows = {row["id"]: row for row in table(prepared / "manifest.csv")}
    assert rows.keys() == GOOD
    row = rows["v_HandStandPushups_g05_c01"]
    hashes = row.pop("frames_sha256"), row.pop("source_sha256")
    assert row == {
        "path": "clips/v_HandStandPushups_g05_c01.mp4",
        "id": "v_HandStandPushups_g05_c01",
        "caption": "A person does push-ups in a handstand.",
        "start": "0",
        "class": "HandstandPushups",
        "group": "g05",
        "split1": "train",
        "split2": "",
        "split3": "",
        "source": "HandstandPushups/v_HandStandPushups_g05_c01.avi",
        "source_start": "0.0",
        "source_size": "32x24",
        "frames": "6",
        "fps": "24",
        "size": "32x24",
        "conditioning_frames": "3",
        "bars": "0 0 0 0",
    }
    assert hashes[1] == sha256_file(source / row["source"])
    assert [tuple(reject.values()) for reject in table(prepared / "rejects.csv")] == [
        ("holiday.avi", "", "", "not named as UCF-101 names its clips (v_CLASS_g01_c01.avi)"),
        ("Archery/v_Archery_g01_c02.avi", "v_Archery_g01_c02", "Archery", SHORT),
        (
            "Biking/v_Biking_g03_c02.avi",
            "v_Biking_g03_c02",
            "Biking",
            "not a readable video (Invalid data found when processing input); fetch it again, or leave it out",
        ),
    ]


def test_a_recipe_reads_what_was_prepared(prepared, source):
    clips = list_clips(Data(clips=str(prepared / "manifest.csv")), Path())
    assert {clip.id: clip.caption for clip in clips}["v_Archery_g02_c01"] == (
        "A person draws a bow and shoots an arrow at a target."
    )
    assert [clip.meta["class"] for clip in clips[:3]] != ["Archery"] * 2  # every beginning is spread over classes
    assert {clip.meta["class"] for clip in clips[:3]} == {"Archery", "Biking", "HandstandPushups"}
    for clip in clips:
        size = {"frames": 6, "fps": 24, "height": 24, "width": 32}
        ours, original = read_window(clip.path, **size), read_window(source / clip.meta["source"], **size)
        assert torch.equal(ours, original)


@pytest.mark.parametrize("suffix", [".rar", ".zip", ".tar", ".tar.gz"])
def test_an_archive_gives_the_same_as_its_folder(suffix, source, prepared, tmp_path):
    archive = write_archive(tmp_path / f"UCF101{suffix}", contents(source))
    status, files = run(archive, tmp_path / "out")
    assert status == 0
    expected = tree(prepared)
    same = [name for name in expected if name not in ("prepare.json", "manifest.csv", "rejects.csv")]
    assert {name: files.pop(name) for name in same} == {name: expected.pop(name) for name in same}
    for name in ("manifest.csv", "rejects.csv"):
        assert files[name].replace(b"UCF-101/", b"") == expected[name]


def test_the_count_is_exact_and_a_smaller_sample_begins_a_larger(source, tmp_path):
    chosen = []
    for count in (1, 3, 5):
        run(source, tmp_path / str(count), small(count=count))
        rejected = [row["id"] for row in table(tmp_path / str(count) / "rejects.csv") if row["id"]]
        chosen.append({row["id"] for row in table(tmp_path / str(count) / "manifest.csv")} | set(rejected))
    assert [len(names) for names in chosen] == [1, 3, 5]
    assert chosen[0] < chosen[1] < chosen[2]


def test_rejected_clips_are_replaced_on_request(source, tmp_path):
    # Three of six clips, one a class; two of them cannot be read under some seed.
    seed = next(s for s in range(99) if _first(source, s) >= {"v_Archery_g01_c02", "v_Biking_g03_c02"})
    run(source, tmp_path / "as it is", small(count=3, seed=seed))
    assert [row["class"] for row in table(tmp_path / "as it is" / "manifest.csv")] == ["HandstandPushups"]
    status, files = run(source, tmp_path / "out", small(count=3, seed=seed, replace=True))
    rows = table(tmp_path / "out" / "manifest.csv")
    assert status == 0 and {row["class"] for row in rows} == {"Archery", "Biking", "HandstandPushups"}
    assert len(table(tmp_path / "out" / "rejects.csv")) == 3
    assert run(source, tmp_path / "out", small(count=3, seed=seed, replace=True)) == (0, files)
    run(source, tmp_path / "more", small(count=6, replace=True))
    assert {row["id"] for row in table(tmp_path / "more" / "manifest.csv")} == GOOD


def _first(source, seed):
    found = module.open_source("ucf101", source)
    return {clip.id for clip in module.in_order(found.candidates, seed)[:3]}


def test_an_edited_caption_reaches_the_manifest_and_stays(source, tmp_path):
    run(source, tmp_path / "out")
    captions = tmp_path / "out" / "captions.txt"
    captions.write_text(captions.read_text().replace("A person rides a bicycle.", "Someone cycles."))
    _, files = run(source, tmp_path / "out")
    assert b"Someone cycles." in files["captions.txt"]
    assert {row["caption"] for row in table(tmp_path / "out" / "manifest.csv") if row["class"] == "Biking"} == {
        "Someone cycles."
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"count": 3}, "count None, not 3"),
        ({"width": 40}, "width 32, not 40"),
        ({"fps": 25.0}, "fps 24.0, not 25.0"),
        ({"aspect": "pad"}, "aspect crop, not pad"),
        ({"replace": True}, "replace False, not True"),
    ],
    ids=str,
)
def test_another_setting_is_refused(changes, named, source, prepared):
    before = tree(prepared)
    assert refusal(source, prepared, small(**changes)) == (
        f"{prepared} was prepared with {named}; give that again or another folder as --out"
    )
    assert tree(prepared) == before


def test_another_source_is_refused(source, prepared, tmp_path):
    other = write_ucf101(tmp_path / "other", {"v_Archery_g01_c01": 10})
    message = refusal(other, prepared)
    assert message.startswith(f"{prepared} was prepared with source 6 videos, SHA-256 of names and sizes ")
    assert ", not 1 videos, SHA-256 of names and sizes " in message


def test_folders_of_others_are_left_alone(source, prepared, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / ".tmp-0123456789ab-x").write_text("x")
    assert refusal(source, tmp_path) == f"{tmp_path} holds other files (thesis.tex); give a new folder as --out"
    assert len(list(tmp_path.iterdir())) == 2
    within = source / "Archery" / "out"
    assert refusal(source, within) == f"{within} lies within the source {source}; give a folder elsewhere as --out"
    assert not within.exists()
    handle = os.open(prepared, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert refusal(source, prepared) == f"another vidtta prepare is at work in {prepared}; wait for it to end"
    os.close(handle)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder; give the videos' folder or archive"),
        (
            lambda path: write_video(path / "holiday.avi"),
            "holds no video named v_CLASS_g01_c01.avi; give UCF-101's archive or folder",
        ),
    ],
    ids=["missing", "others"],
)
def test_a_source_without_clips_is_refused(make, message, tmp_path):
    make(tmp_path / "source")
    assert refusal(tmp_path / "source", tmp_path / "out") == f"{tmp_path / 'source'}: {message}"


def test_nothing_prepared_is_a_failure(tmp_path, capsys):
    source = write_ucf101(tmp_path / "source", {"v_Archery_g01_c01": 2, "v_Archery_g01_c02": -1})
    status, files = run(source, tmp_path / "out")
    assert status == 1
    assert files["manifest.csv"].count(b"\n") == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"prepared 0, rejected 2 (see {tmp_path / 'out'}/rejects.csv)"


def test_of_two_clips_with_one_name_the_first_path_is_taken(tmp_path):
    source = write_ucf101(tmp_path / "source", {"v_Archery_g01_c01": 10})
    write_video(source / "copy" / "v_archery_g01_c01.avi")
    run(source, tmp_path / "out")
    assert [row["source"] for row in table(tmp_path / "out" / "manifest.csv")] == ["Archery/v_Archery_g01_c01.avi"]
    assert [row["reason"] for row in table(tmp_path / "out" / "rejects.csv")] == [
        "a second clip of this name, beside Archery/v_Archery_g01_c01.avi"
    ]


def test_members_that_cannot_be_unpacked_are_rejects(source, tmp_path):
    archive = write_archive(tmp_path / "a.zip", [*contents(source), ("../v_Biking_g09_c01.avi", b"x")])
    content = bytearray(archive.read_bytes())
    content[content.index(b"v_Archery_g02_c01.avi") + 1500] ^= 1
    archive.write_bytes(content)
    status, files = run(archive, tmp_path / "out")
    assert status == 0
    reasons = {row["source"]: row["reason"] for row in table(tmp_path / "out" / "rejects.csv")}
    assert reasons["../v_Biking_g09_c01.avi"] == "its path leads out of the archive"
    assert reasons["UCF-101/Archery/v_Archery_g02_c01.avi"].startswith("damaged in the archive (ZIP ")
    assert run(archive, tmp_path / "out") == (0, files)


def test_lists_are_found_beside_an_archive_or_where_they_are_said_to_be(source, tmp_path):
    videos = [(name, content) for name, content in contents(source) if name.endswith(".avi")]
    archive = write_archive(tmp_path / "a.tar", videos)
    lists = [(f"ucfTrainTestlist/{path.name}", path.read_bytes()) for path in (source / "lists").iterdir()]

    def splits(**options):
        return {clip for clip, of in module.open_source("ucf101", archive, **options).splits.items() if of}

    assert splits() == set()
    with pytest.raises(UserError, match=r"^splits: .* holds no trainlist01.txt and the like; give the folder or zip"):
        splits(splits=tmp_path)
    other = write_archive(tmp_path / "lists.zip", lists)
    assert (
        splits(splits=other) == splits(splits=source) == splits(splits=source / "lists") == {n.lower() for n in CLIPS}
    )
    assert splits() == set()
    other.rename(tmp_path / "UCF101TrainTestSplits-RecognitionTask.zip")
    assert splits() == {name.lower() for name in CLIPS}


def test_any_folder_of_videos(tmp_path):
    for name in ("b/man-surfing.avi", "a/Drei Männer.avi"):
        write_video(tmp_path / "videos" / name)
    write_video(tmp_path / "videos" / "short.avi", pictures=2)
    out = tmp_path / "out"
    assert prepare("folder", tmp_path / "videos", out, SMALL, workers=1) == 0
    rows = table(out / "manifest.csv")
    assert [(row["source"], row["caption"], row["class"], row["group"]) for row in rows] == [
        ("a/Drei Männer.avi", "Drei Manner.", "", ""),
        ("b/man-surfing.avi", "Man surfing.", "", ""),
    ]
    assert [row["source"] for row in table(out / "rejects.csv")] == ["short.avi"]
    assert len(list_clips(Data(clips=str(out / "manifest.csv")), Path())) == 2
    prepare("folder", tmp_path / "videos", tmp_path / "one", small(count=1), workers=1)
    assert len(tree(tmp_path / "one" / "state")) == 1
    archive = write_archive(tmp_path / "a.tar", [])
    assert refusal(archive, tmp_path / "two", kind="folder") == f"{archive}: not a folder; give a folder of videos"


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
def test_real_clips(tmp_path):
    settings = dataclasses.replace(SMALL, height=48, width=64, frames=45, conditioning_frames=22, count=5)
    assert run(SHARED / "ucf101", tmp_path / "out", settings)[0] == 0
    rows = table(tmp_path / "out" / "manifest.csv")
    assert len(rows) == 5 == len({row["class"] for row in rows})
    assert {row["split1"] for row in rows} <= {"train", "test"} and {row["source_size"] for row in rows} == {"320x240"}
