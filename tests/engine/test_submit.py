"""`vidtta submit` against commands that stand in for Slurm's: what it asks of them. Real ones are in tests/slurm."""

import os
import shlex

import pytest
from vidtta.engine import cli
from vidtta.engine.cluster.place import Place, share_compile_cache, this_place
from vidtta.engine.errors import UserError

from .tiny_run import one_sentence

STANDIN = """#!/bin/sh
echo "$(basename $0)" "$@" >> {log}
case $(basename $0) in
sbatch)
  n=$(($(cat {count}) + 1)); echo $n > {count}
  [ $n != "{refused}" ] || {{ echo 'no such partition' >&2; exit 1; }}
  echo $((100 + n)) ;;
scontrol) case "$*" in "show config") echo 'MaxArraySize            = 11' ;; *) [ "$3" != 404 ] || exit 1; echo JobId ;; esac ;;
squeue) echo '{queued}' ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Call it with what the queue holds and which sbatch is refused; returns a function that gives the calls so far."""

    def install(queued="", refused=""):
        log, count, folder = tmp_path / "log", tmp_path / "count", tmp_path / "bin"
        log.touch()
        count.write_text("0")
        folder.mkdir()
        for name in ("sbatch", "scontrol", "squeue", "scancel"):
            text = STANDIN.format(log=log, count=count, queued=queued, refused=refused)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return lambda name: [shlex.split(line)[1:] for line in log.read_text().splitlines() if line.startswith(name)]

    return install


def demo(tmp_path, *words, limit=100):
    words = words or ("--hours", "1", "--seconds-a-clip", "180")
    return ["submit", "demo", *words, f"output_dir={tmp_path}/run", f"data.limit={limit}"]


def options(call):
    return dict(word.removeprefix("--").partition("=")[::2] for word in call if word.startswith("--"))


def test_an_array_its_comparison_and_report(tmp_path, stand_in, capsys):
    calls = stand_in()
    assert cli.main([*demo(tmp_path), "--sbatch=--partition=gpu", "--at-once=3", "--gpus=2"]) == 0
    array, compare, report = calls("sbatch")
    name = options(array)["job-name"]
    assert options(array) == {
        "parsable": "",
        "job-name": name,
        "array": "0-2%3",
        "time": "2:20:00",
        "ntasks": "2",
        "output": f"{tmp_path}/run/logs/%A_%a.out",
        "partition": "gpu",
    }
    assert name.startswith("vidtta-run-")
    assert array[-5:-2] == [array[-5], "demo", "40"] and array[-5].endswith("slurm/run.sbatch")
    assert array[-2:] == [f"output_dir={tmp_path}/run", "data.limit=100"]
    for job, kind in ((compare, "compare"), (report, "report")):
        assert options(job)["dependency"] == "afterok:101"
        assert options(job)["kill-on-invalid-dep"] == "yes"
        assert options(job)["job-name"] == name
        assert job[-1] == f"{tmp_path}/run" and job[-2].endswith(f"slurm/{kind}.sbatch")
    assert (tmp_path / "run/logs").is_dir()
    said = capsys.readouterr().out
    assert "submitted: array 101 compare 102 report 103" in said
    assert f"watch: vidtta status {tmp_path}/run" in said


def test_the_largest_array_counts(tmp_path, stand_in):
    calls = stand_in()
    assert cli.main(demo(tmp_path, "--hours=1", "--seconds-a-clip=3600")) == 0
    assert options(calls("sbatch")[0])["array"] == "0-9"
    assert calls("sbatch")[0][-3] == "10"


def test_stages_follow_one_another(tmp_path, stand_in, capsys):
    calls = stand_in()
    recipe = tmp_path / "next.yaml"
    recipe.write_text(f"base: demo\noutput_dir: {tmp_path}/next\n")
    first = tmp_path / "first.yaml"
    first.write_text(f"base: demo\noutput_dir: {tmp_path}/first\n")
    assert cli.main(["submit", str(first), "--then", str(recipe), "--after", "77", "--allow-failed"]) == 0
    jobs = [options(call) for call in calls("sbatch")]
    assert [job["dependency"] for job in jobs] == ["afterok:77", *["afterok:101"] * 3, *["afterok:104"] * 2]
    assert [job.get("export") for job in jobs] == ["ALL,VIDTTA_ALLOW_FAILED=1", None, None] * 2
    assert cli.main(["submit", str(first), "--after", "404"]) == 2
    assert (
        one_sentence(capsys) == "error: --after was 404, a job that Slurm does not know, so it would hold nothing back"
    )
    assert cli.main(["submit", str(first), "--then", str(recipe), f"output_dir={tmp_path}/one"]) == 2
    assert one_sentence(capsys).startswith("error: two stages have the same output_dir")
    assert len(calls("sbatch")) == 6


def test_queued_jobs_of_the_same_run_are_waited_for(tmp_path, stand_in, capsys):
    calls = stand_in(queued="55")
    assert cli.main(demo(tmp_path)) == 0
    assert options(calls("sbatch")[0])["dependency"] == "afterany:55"
    name = options(calls("sbatch")[0])["job-name"]
    assert ["--me", "--noheader", "--name", name, "--format", "%F"] in calls("squeue")
    assert "jobs 55 of this run are still queued" in capsys.readouterr().out


def test_what_was_submitted_is_cancelled_where_a_later_one_is_refused(tmp_path, stand_in, capsys):
    calls = stand_in(refused="3")
    assert cli.main(demo(tmp_path)) == 2
    assert calls("scancel") == [["101", "102"]]
    assert one_sentence(capsys).startswith("error: sbatch refused: no such partition; ")


def test_a_dry_run_submits_nothing_and_needs_no_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main([*demo(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n  sbatch --job-name=vidtta-run-") == 3
    assert (
        "100 clips, 100 unfinished, 180.0 s a clip (as given)" in said
        and "5 tasks of 20 clips, about 60 min each" in said
    )
    assert list(tmp_path.iterdir()) == []
    assert cli.main(demo(tmp_path)) == 2
    assert one_sentence(capsys).startswith("error: scontrol is not here; submit from a login node")
    assert cli.main([*demo(tmp_path, "--hours=1"), "--dry-run"]) == 0
    assert "600.0 s a clip (assumed: run one clip to measure it, or give --seconds-a-clip)" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--hours=0", "--gpus=0", "--at-once=x", "--seconds-a-clip=nan"])
def test_options_that_cannot_be(tmp_path, capsys, word):
    with pytest.raises(SystemExit):
        cli.main(demo(tmp_path, word))
    assert "above 0" in capsys.readouterr().err


def test_places():
    srun = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert this_place({}) == Place()
    assert this_place(srun) == Place(3, 8, 1)
    assert (
        this_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}) == Place()
    )  # batch script, no srun
    assert this_place(srun | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}) == Place(1, 2, 1)
    for wrong in ({"SLURM_PROCID": "8"}, {"SLURM_PROCID": "x"}, {"SLURM_LOCALID": "-1"}):
        with pytest.raises(UserError, match="which is no task of a job"):
            this_place(srun | wrong)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
def test_shares_make_the_whole(world):
    items = list(range(13))
    shares = [Place(rank, world).share(items) for rank in range(world)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_compile_cache_is_a_folder_a_host_and_only_in_jobs(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "TORCHINDUCTOR_CACHE_DIR", "VIDTTA_COMPILE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    share_compile_cache(tmp_path)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("VIDTTA_COMPILE_CACHE", str(tmp_path / "named"))
    share_compile_cache(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/named/{os.uname().nodename}/inductor"
    for name in ("VIDTTA_COMPILE_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    share_compile_cache(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/shared/compiled/{os.uname().nodename}/inductor"
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_clips_that_start_from_each_other_stay_in_one_task(tmp_path, stand_in, capsys):
    """Weights carry over through stretches of the list, which ranges do not cut."""
    calls = stand_in()
    naive = ["submit", "01_naive_full_finetune.demo", "--hours", "1", "--seconds-a-clip", "180"]
    words = [*naive, f"output_dir={tmp_path}/run", "data.limit=100", "placebos=[]"]
    for reset, expected in (("7", ["0-4", "21"]), ("never", ["0", "100"])):
        assert cli.main([*words, f"adaptation.reset={reset}"]) == 0
        *_, array = [call for call in calls("sbatch") if any(word.startswith("--array") for word in call)]
        assert [option.partition("=")[2] for option in array if option.startswith("--array")] == [expected[0]]
        assert array[array.index("01_naive_full_finetune.demo") + 1] == expected[1]
    capsys.readouterr()
    assert cli.main([*words, "adaptation.reset=never", "--gpus", "2"]) == 2
    assert "adaptation.reset is never" in (said := one_sentence(capsys)) and "--gpus 2 would cut through that" in said
