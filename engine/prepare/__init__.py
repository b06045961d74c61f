"""`vidtta prepare`: clips of one size, rate and length, with a manifest, from UCF-101 or any folder of videos.

Read in this order: run.py (the whole path), sources.py and archive.py (what there is), sampling.py (which are taken),
convert.py and storage.py (one clip), output.py (what lies on disk).
"""
