"""The list of clips: folders, manifests, ids, captions, hashes, and the shipped clips."""

import csv
import dataclasses
from pathlib import Path, PurePath

import pytest
from vidtta.engine.data.captions import caption_for, read_captions
from vidtta.engine.data.clips import Clip, Data, clip_hash, list_clips
from vidtta.engine.errors import UserError

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "clips"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder `clips` in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    return tmp_path / "clips"


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def ids(clips="clips", **data):
    return [clip.id for clip in list_clips(Data(clips=str(clips), **data), Path("/nowhere"))]


def refusal(clips="clips", **data):
    with pytest.raises(UserError) as error:
        ids(clips, **data)
    return str(error.value).replace(str(Path.cwd()) + "/", "")


def manifest(folder, text):
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return folder / "list.csv"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 100}, "height is 100; it must be a positive multiple of 8"),
        ({"width": 0}, "width is 0; it must be a positive multiple of 8"),
        ({"width": -16}, "width is -16; it must be a positive multiple of 8"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"clips": ""}, "clips is empty; give a folder of videos or a .csv manifest"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Data(**{"clips": "x", **settings})


def test_settings_default_to_the_protocol():
    assert dataclasses.asdict(Data(clips="x")) == {
        "clips": "x",
        "captions": "",
        "height": 480,
        "width": 640,
        "limit": None,
    }


def test_a_folder_is_listed_at_any_depth_in_byte_order(folder):
    put(folder, "b.mp4", "a/z.MKV", "a.avi", "Z.mov", "a/notes.txt", "a/._z.mp4", ".hidden/x.mp4", "deep/er/y.webm")
    assert ids() == ["Z", "a", "a-z", "b", "deep-er-y"]  # "a.avi" before "a/z.MKV": '.' comes before '/'
    assert ids(limit=2) == ["Z", "a"]
    clip = list_clips(Data(clips="clips"), Path("/nowhere"))[2]
    assert clip == Clip("a-z", folder / "a" / "z.MKV", "Z.")


def test_the_working_directory_goes_before_the_recipes_folder(folder, tmp_path):
    put(folder, "here.mp4")
    put(tmp_path / "recipes" / "clips", "there.mp4")
    put(tmp_path / "recipes" / "only", "beside.mp4")
    assert [c.id for c in list_clips(Data(clips="clips"), tmp_path / "recipes")] == ["here"]
    assert [c.id for c in list_clips(Data(clips="only"), tmp_path / "recipes")] == ["beside"]
    assert ids(folder) == ["here"]


def test_lists_that_hold_nothing(folder):
    (folder / "notes.txt").touch()
    assert refusal() == (
        "data.clips: no video lies below clips; known suffixes are .avi, .m4v, .mkv, .mov, .mp4, .mpeg, .mpg, .webm"
    )
    assert refusal("none") == "data.clips is 'none', but there is no none nor /nowhere/none; give a path that exists"
    assert refusal("clips/notes.txt").startswith("data.clips is the file clips/notes.txt; give a folder")
    assert refusal("embedded:none").startswith("data.clips is 'embedded:none', which vidtta does not hold")
    assert refusal("embedded:../tests").startswith("data.clips is 'embedded:../tests', which vidtta does not hold")


def test_ids_are_safe_stable_and_unique(folder):
    put(folder, "man surfing.mp4", "man_surfing.mp4", "a.b.mp4", "x" * 150 + ".mp4", "naïve.mp4")
    found = ids()
    assert found[0] == "a.b"
    assert found[1].startswith("man_surfing-")
    assert len(found[1]) == len("man_surfing-") + 8
    assert found[2] == "man_surfing"
    assert found[3].startswith("na_ve-")
    assert len(found[4]) == 120
    (folder / "man_surfing.mp4").unlink()
    assert found[1] in ids(), "an id must not depend on the other clips"
    put(folder, "a.b.avi")
    assert refusal() == "clips/a.b.mp4: both it and clips/a.b.avi get the id 'a.b'; rename one"


@pytest.mark.parametrize("target", ["outside.mp4", "outside"])
def test_links_that_leave_the_folder_are_refused(folder, tmp_path, target):
    put(tmp_path, "outside.mp4", "outside/x.mp4")
    put(folder, "a.mp4")
    (folder / "b.mp4").symlink_to(folder / "a.mp4")
    assert ids() == ["a", "b"]
    link = folder / target
    link.symlink_to(tmp_path / target)
    assert refusal() == f"clips/{target}: a link that leaves clips; copy the video there, or list it in a manifest"


def test_a_manifest_in_its_own_order(folder, tmp_path):
    put(folder, "sub/b.mp4")
    text = (
        "\ufeffid,path,start,caption,scene\n"
        'second,sub/b.mp4,1.5,"Rain, then sun.",7\n'
        ",sub/b.mp4,,,\n"
        "\n"
        f"abs,{tmp_path}/else.mp4,0,,8\n"
    )
    clips = list_clips(Data(clips=str(manifest(folder, text))), Path("/nowhere"))
    assert clips == [
        Clip("second", folder / "sub" / "b.mp4", "Rain, then sun.", 1.5, {"scene": "7"}),
        Clip("sub-b", folder / "sub" / "b.mp4", "B.", 0.0, {"scene": ""}),
        Clip("abs", tmp_path / "else.mp4", "Else.", 0.0, {"scene": "8"}),  # not there: that shows when it is read
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,id\na.mp4,a\n", "line 1: the columns are file, id; name each once in the first line, `path` among them"),
        ("path,path\na.mp4,a\n", "line 1: the columns are path, path; name each once"),
        ("", "line 1: the columns are missing; name each once"),
        ("path\n", "no clip is listed; add a row below the column names"),
        ("path,id\na.mp4,x\nb.mp4,x\n", "line 3: a second clip with the id 'x'; give each row its own in a column id"),
        ("path\na.mp4\na.mp4\n", "line 3: a second clip with the id 'a'; give each row its own in a column id"),
        ("path\n../a.mp4\n", "line 2: path '../a.mp4' leaves clips; move the video there or write its absolute path"),
        ("path,id\n,x\n", "line 2: path is empty; give a video file"),
        ("path,start\na.mp4,soon\n", "line 2: start is 'soon'; it must be a number of seconds, 0 or more"),
        ("path,start\na.mp4,-1\n", "line 2: start is '-1'; it must be a number of seconds, 0 or more"),
        ("path,start\na.mp4,nan\n", "line 2: start is 'nan'; it must be a number of seconds, 0 or more"),
        ("path,start\na.mp4,inf\n", "line 2: start is 'inf'; it must be a number of seconds, 0 or more"),
        ("path,id\na.mp4,../x\n", "line 2: id is '../x'; at most 120 of letters, digits"),
        ("path,id\na.mp4,..\n", "line 2: id is '..'; at most 120 of letters, digits"),
        ("path,caption\na.mp4,one, two\n", "line 2: not 2 fields as in the first line; quote commas in text"),
        ("path,caption\na.mp4\n", "line 2: not 2 fields as in the first line; quote commas in text"),
        ('path\n"a.mp4\n', "not a manifest that can be read (unexpected end of data); give a UTF-8 CSV file"),
    ],
)
def test_manifests_that_are_wrong(folder, text, message):
    found = refusal(manifest(folder, text))
    assert found.startswith((f"clips/list.csv, {message}", f"clips/list.csv: {message}")), found


def test_a_manifest_in_another_encoding(folder):
    (folder / "list.csv").write_bytes(b"path\nna\xefve.mp4\n")
    assert refusal("clips/list.csv").startswith("clips/list.csv: not a manifest that can be read ('utf-8' codec")


@pytest.mark.parametrize(
    ("path", "caption"),
    [
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "A person is doing: apply eye makeup."),
        ("v_YoYo_g25_c03.avi", "A person is doing: yo yo."),
        ("man-surfing.mp4", "Man surfing."),
        ("a/Dog_runs.on--beach.mp4", "Dog runs on beach."),
        ("--.mp4", ""),
    ],
)
def test_captions_made_from_names(path, caption):
    assert caption_for("id", PurePath(path), {}) == caption


def test_the_most_particular_name_gives_the_caption(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text(
        "Biking: A person cycles.\n\nBiking-v_Biking_g01_c04: At 9: one rides off.\nv_Biking_g05_c02\tTwo: riders.\n"
        "v_Biking_g10_c02.avi: Three riders.\nsurf: Waves.\n",
        encoding="utf-8",
    )
    captions = read_captions(file)
    for name, expected in (
        ("Biking/v_Biking_g01_c04.avi", "At 9: one rides off."),
        ("Biking/v_Biking_g05_c02.avi", "Two: riders."),
        ("Biking/v_Biking_g10_c02.avi", "Three riders."),
        ("Biking/v_Biking_g20_c01.avi", "A person cycles."),
        ("all/v_Biking_g20_c01.avi", "A person cycles."),
        ("surf/001.mp4", "Waves."),
    ):
        path = PurePath(name)
        assert caption_for(f"{path.parent}-{path.stem}", path, captions) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: x\njust words\n", "captions.txt, line 2: 'just words' is not a name, a tab or ': ', and a caption"),
        ("a:\n", "captions.txt, line 1: 'a:' is not a name, a tab or ': ', and a caption"),
        ("a: x\na: y\n", "captions.txt, line 2: a second caption for 'a'; keep one of them"),
        ("else: x\n", "data.captions: captions.txt names no clip of clips; name clips as 'a'"),
    ],
)
def test_captions_that_are_wrong(folder, tmp_path, text, message):
    put(folder, "a.mp4")
    (tmp_path / "captions.txt").write_text(text)
    assert refusal(captions="captions.txt") == message


def test_a_rows_own_caption_goes_before_the_file(folder, tmp_path):
    (tmp_path / "captions.txt").write_text("a: from the file\nb: from the file\n")
    rows = manifest(folder, "path,caption\na.mp4,from the row\nb.mp4,\n")
    clips = list_clips(Data(clips=str(rows), captions="captions.txt"), Path("/nowhere"))
    assert [clip.caption for clip in clips] == ["from the row", "from the file"]


def test_the_hash_is_of_the_content_and_the_start(folder):
    put(folder, "a.mp4", "b.mp4")
    a = Clip("a", folder / "a.mp4", "one")
    assert clip_hash(a) == clip_hash(dataclasses.replace(a, id="z", caption="two"))
    assert clip_hash(a) != clip_hash(dataclasses.replace(a, start=0.5))
    assert clip_hash(a) != clip_hash(dataclasses.replace(a, path=folder / "b.mp4"))
    assert len(clip_hash(a)) == 64
    with pytest.raises(UserError, match=r"none.mp4: cannot be read \(No such file or directory\)"):
        clip_hash(Clip("n", folder / "none.mp4", ""))


def test_the_shipped_clips():
    clips = list_clips(Data(clips="embedded:clips/clips.csv"), Path("/nowhere"))
    assert [(clip.id, clip.path, clip.start) for clip in clips] == [
        ("baseball-bunt", SHIPPED / "baseball.mp4", 0.0),
        ("basketball-free-throw", SHIPPED / "basketball.mp4", 2.4),
        ("baseball-runner", SHIPPED / "baseball.mp4", 3.3),
        ("basketball-run", SHIPPED / "basketball.mp4", 4.6),
    ]
    with (SHIPPED / "clips.csv").open(newline="") as handle:
        assert [clip.caption for clip in clips] == [row["caption"] for row in csv.DictReader(handle)]
    assert ids("embedded:clips") == ["baseball", "basketball"]
