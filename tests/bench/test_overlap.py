"""The bench of overlapped clips on a small network: the same bits both ways, and without OpenCV and PyAV, too."""

import json

import pytest
from vidtta.bench import overlap


@pytest.mark.parametrize("packages", [True, False], ids=["OpenCV and PyAV", "neither"])
def test_the_same_bits_both_ways(tmp_path, monkeypatch, packages):
    monkeypatch.setattr(overlap, "HAS_FLOW", packages)
    monkeypatch.setattr(overlap, "HAS_VIDEO", packages)
    monkeypatch.setattr(overlap, "make_deterministic", lambda: None)
    out = tmp_path / "rows.json"
    assert overlap.main(["--check", "--clips=2", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert [row["overlapped"] for row in found["rows"]] == [False, True, True, False]
    assert all(len(row["clips"]) == 2 for row in found["rows"])
    first = found["rows"][0]["clips"]
    assert first[0]["latents"] != first[1]["latents"] and first[0]["sample"] > 0
    assert ("flow_error_farneback" in first[0]["scores"]) == packages
    assert found["compared"]["same_bits"] is True and found["compared"]["clips_an_hour"]["ratio"] > 0
    found["rows"][1]["clips"][0]["latents"] = "others"
    assert overlap.compare(found["rows"])["same_bits"] is False
