"""The prompt pipeline, against worked examples: the published ones, and at least one for every rule of the cleaner."""

import warnings

import pytest
from vidtta.engine.text.prompt import clean_caption, prepare_prompt, score_suffixes


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        (
            "A beautiful waterfall, in 4K! The aesthetic score is excellent.",
            "a beautiful waterfall, in 4k! the aesthetic score is excellent.",
        ),
        ("A man rides a horse.He smiles/ laughs", "a man rides a horse. he smiles laughs"),
        ("this-is-my-cute-cat this_is_my_very_long_cat", "this is my cute cat this is my very long cat"),
        ("a%20b+c <person> walks", "a b c person walks"),
    ],
)
def test_published_examples(caption, prompt):
    assert prepare_prompt(caption, aesthetic=None) == prompt


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a cat https://example.org/watch-it on a mat", "a cat on a mat"),
        ("see http://foo.bar/x now", "see foo. bar x now"),  # an uncommon domain loses its scheme alone
        ("a cat www.example.com sleeps", "a cat sleeps"),
        ("see www:/foo.bar now", "see foo. bar now"),
        ("write to me@example.com today", "write to me today"),
        ("a <b>bold</b> cat<br/>sleeps", "a bold catsleeps"),
        ("cats &lt;3 dogs &amp; birds", "cats <3 dogs birds"),
        ("photo by @nick_12 in paris", "photo by in paris"),
        ("a 漢字 sign", "a sign"),
        ("kana あ stays", "kana あ stays"),
        ("slow\u2014motion \u2013 clip", "slow-motion - clip"),
        ("a \u201cred\u201d \u00abcar\u00bb", 'a "red" "car"'),
        ("the dog\u2019s \u2018ball\u2019 here", "the dog's 'ball' here"),
        ("a \u2018\u2018red\u2019\u2019 car", 'a "red" car'),
        ("cats &amp;amp; dogs", "cats ; dogs"),
        ("a &amp;quot;big&amp;quot; dog", "a big dog"),
        ("server 192.168.10.255 rack", "server rack"),
        ("news at 7:45\t", "news at 7:45"),  # the strip comes before the rule for article ids
        ("news at 7:45 <br>", "news at"),
        ("first\\nsecond", "first second"),
        ("shot #12 of #1234 in #12345", "shot of 1234 in"),
        ("in 2019 about 123456 people and 12345 dogs", "in 2019 about people and 12345 dogs"),
        ("frame img_0.png of clip", "frame of clip"),
        ("he said ''hello'' to me", 'he said "hello" to me'),
        ("wait... what", "wait what"),
        ("a (small) [red] {cat} | dog ~ 50% * \\ end", "a small red cat dog 50% end"),
        ("he runs . she walks", "he runs she walks"),
        ("a-b-c_d", "a-b-c_d"),  # three joints stay, four are split
        ("a-b-c-d_e", "a b c d e"),
        ("a \u00e2\u20ac\u0153cat and \uff44\uff4f\uff47s in a \ufb01eld", 'a "cat and dogs in a field'),
        ("code jc6640 and ab12cd and 6640vc231 gone", "code and and gone"),
        ("code j2d1a2a end", "code end"),
        ("worldwide free shipping of boats", "of boats"),
        ("a free download of it", "a of it"),
        ("click for more and click on here", "and"),
        ("png images of a jpg", "of a"),
        ("on page 12 a dog", "on a dog"),
        ("size 1920x1080 or 2.5\u04453 or 10\u00d720 wide", "size or or wide"),
        ("title : a cat", "title: a cat"),
        ("cats,dogs.birds and 3,000 or 3.14", "cats, dogs. birds and 3,000 or 3.14"),
        ("  a\t\n cat  ", "a cat"),
        ('"a quoted sentence"', "a quoted sentence"),
        (":a cat", "a cat"),
        ("a cat-", "a cat"),
        (".hidden", ""),
        ("", ""),
    ],
)
def test_each_rule(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_cleaning_once_is_not_enough():
    """The full stop gets its space in the first pass, and the second takes the hyphen that the space had hidden."""
    assert clean_caption("a cat- 1920x1080") == "a cat-"
    assert prepare_prompt("a cat- 1920x1080", aesthetic=None) == "a cat"


def test_spaces_are_stripped_before_the_rules_for_the_edges():
    """The bracket becomes a space; unless it is stripped in time, the stray quotation mark behind it stays."""
    assert clean_caption("('a cat") == "a cat"


def test_captions_like_locators_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clean_caption("clip/one") == "clip one"
        assert clean_caption("movie.avi") == "movie. avi"


@pytest.mark.parametrize(
    ("score", "word"),
    [
        (-1, "terrible"),
        (3.999, "terrible"),
        (4, "very poor"),
        (4.499, "very poor"),
        (4.5, "poor"),
        (4.999, "poor"),
        (5, "fair"),
        (5.499, "fair"),
        (5.5, "good"),
        (5.999, "good"),
        (6, "very good"),
        (6.499, "very good"),
        (6.5, "excellent"),
        ("7.0", "excellent"),
        ("stunning", "stunning"),
    ],
)
def test_aesthetic_words(score, word):
    assert score_suffixes("a cat", score, None, None) == f" The aesthetic score is {word}."


@pytest.mark.parametrize(
    ("score", "word"),
    [
        (0, "very low"),
        (0.499, "very low"),
        (0.5, "low"),
        (1.999, "low"),
        (2, "fair"),
        (4.999, "fair"),
        (5, "high"),
        (9.999, "high"),
        (10, "very high"),
        (19.999, "very high"),
        (20, "extremely high"),
        ("20", "extremely high"),
        ("wild", "wild"),
    ],
)
def test_motion_words(score, word):
    assert score_suffixes("a cat", None, score, None) == f" The motion strength is {word}."


def test_all_suffixes_in_order():
    expected = " The aesthetic score is fair. The motion strength is low. camera motion: pan left."
    assert score_suffixes("a cat", 5, 1, "pan left") == expected
    assert score_suffixes("a cat", None, None, None) == ""


@pytest.mark.parametrize(
    ("prompt", "scores"),
    [
        ("A cat. The aesthetic score is poor.", (7.0, None, None)),
        ("A cat, the motion strength is low.", (None, 3, None)),
        ("A cat, camera motion: tilt up.", (None, None, "pan left")),
    ],
)
def test_stated_scores_are_not_repeated(prompt, scores):
    assert score_suffixes(prompt, *scores) == ""


def test_default_prompt():
    assert prepare_prompt("A man plays the Violin") == "a man plays the violin the aesthetic score is excellent."
    assert (
        prepare_prompt("A dog.", 4.6, 12, "static")
        == "a dog. the aesthetic score is poor. the motion strength is very high. camera motion: static."
    )
