"""From a caption to the prompt that T5 reads: append the score sentences, then clean twice.

The published Open-Sora v1.3 samples from prompts prepared this way, so anything else is text its sampler never saw. The
cleaner behaves as the one that DeepFloyd IF, PixArt and others share: it was made for captions scraped from web pages.
Its rules apply in the order of the tables below, because many act on what earlier ones left behind.
"""

import html
import re
import warnings
from urllib.parse import unquote_plus

Rule = tuple[str, str, str]
"""(why, regular expression, replacement)"""

AESTHETIC_WORDS = [(4, "terrible"), (4.5, "very poor"), (5, "poor"), (5.5, "fair"), (6, "good"), (6.5, "very good")]
"""(upper end, word): the first entry whose end lies above the score names it; from 6.5 on it is excellent."""
MOTION_WORDS = [(0.5, "very low"), (2, "low"), (5, "fair"), (10, "high"), (20, "very high")]
"""The same for motion; from 20 on it is extremely high."""

_HOST = r"[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_TYPE = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"

ADDRESSES: list[Rule] = [
    ("the placeholder of captions with names taken out", "<person>", "person"),
    (
        "web addresses: a host of a common domain, and the scheme before it",
        rf"\bhttps?:(?:/{{1,3}}|[a-zA-Z0-9%])|\b{_HOST}",
        "",
    ),
    ("the same where the scheme is mistaken for www", rf"\bwww:(?:/{{1,3}}|[a-zA-Z0-9%])|\b{_HOST}", ""),
]

# Between the two tables stands the HTML parser, which drops the tags and decodes the entities.
SYMBOLS: list[Rule] = [
    ("nicknames", r"@\w+\b", ""),
    ("East Asian strokes, enclosed and compatibility characters, hexagrams, ideographs", "[\u31c0-\u9fff]+", ""),
    (
        "every kind of dash is a hyphen, and a run of them one",
        "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    ("double quotation marks, and accents used as such", "[\u0060\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("single quotation marks", "[\u2018\u2019]", "'"),
    ("quote entities that were encoded twice", "&quot;?", ""),
    ("ampersand entities that were encoded twice", "&amp", ""),
    ("IP addresses", r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    ("article ids at the end", r"\d:\d\d\s+$", ""),
    ("a line break written as backslash and n", r"\\n", " "),
    ("short tags", r"#\d{1,3}\b", ""),
    ("long tags; four digits stay, they may be a year", r"#\d{5,}\b", ""),
    ("long numbers", r"\b\d{6,}\b", ""),
    ("file names", rf"\S+\.{_FILE_TYPE}", ""),
    ("repeated quotation marks", "[\"']{2,}", '"'),
    ("repeated full stops", r"\.{2,}", " "),
    ("punctuation that no sentence needs", r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    ("full stops standing alone", r"\s+\.\s+", " "),
]

# Between the two tables words-joined-like-this are split, broken encodings mended and the last entities decoded.
CODES: list[Rule] = [
    ("codes such as jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    ("codes such as ab12cd", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    ("codes such as 6640vc231", r"\b\d+[a-zA-Z]+\d+\b", ""),
    ("shop phrases: shipping", r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    ("shop phrases: download", r"(?:free\s)?download(?:\sfree)?", ""),
    ("shop phrases: click for, click on", r"\bclick\b\s(?:for|on)\s\w+", ""),
    ("file types, alone or followed by image", rf"\b{_FILE_TYPE}(?:\simages?)?", ""),
    ("page numbers", r"\bpage\s+\d+\b", ""),
    ("longer codes such as j2d1a2a", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (
        "sizes such as 1920x1080, with a Latin, Cyrillic or multiplication x",
        r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b",
        "",
    ),
    ("no space before a colon, one after it", r"\b\s+:\s+", ": "),
    ("a space after a comma, full stop or slash, save in numbers", r"(\D[,./])\b", r"\1 "),
    ("white space is one space", r"\s+", " "),
]

# Spaces that the table above left at an end hide the punctuation beside them, until the second cleaning.
EDGES: list[Rule] = [
    ("quotation marks around the whole", r"^[\"']([\w\W]+)[\"']$", r"\1"),
    ("stray punctuation at the beginning", r"^['_,\-:;]", ""),
    ("stray punctuation at the end", r"['_,\-:+]$", ""),
    ("a single word that begins with a full stop", r"^\.\S+$", ""),
]


def _apply(rules: list[Rule], text: str) -> str:
    for _, pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _strip_html(text: str) -> str:
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning

    with warnings.catch_warnings():  # a caption may look like a file name or an address; it is still a caption
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        return BeautifulSoup(text, "html.parser").get_text()


def clean_caption(text: str) -> str:
    """Apply the caption cleaner once; lower-cases. Not idempotent, which is why `prepare_prompt` applies it twice.

    Needs ftfy and beautifulsoup4. The strip after decoding the entities is the published Open-Sora's own: elsewhere the
    cleaner goes on with the spaces, and the rules for the edges of the text then miss.
    """
    import ftfy

    text = _apply(ADDRESSES, unquote_plus(text).strip().lower())
    text = _apply(SYMBOLS, _strip_html(text))
    if len(re.findall("[-_]", text)) > 3:
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(EDGES, _apply(CODES, text)).strip()


def _score_word(score: float | str, words: list[tuple[float, str]], highest: str) -> str:
    try:
        value = float(score)
    except ValueError:
        return str(score)
    return next((word for end, word in words if value < end), highest)


def score_suffixes(
    prompt: str, aesthetic: float | str | None, motion: float | str | None, camera_motion: str | None
) -> str:
    """The sentences to append, each with a space before it; none for a score that is None or that the prompt states.

    A number becomes the word of its range (`AESTHETIC_WORDS`, `MOTION_WORDS`); any other text is used as it is.
    """
    suffixes = ""
    if aesthetic is not None and "aesthetic score is" not in prompt:
        suffixes += f" The aesthetic score is {_score_word(aesthetic, AESTHETIC_WORDS, 'excellent')}."
    if motion is not None and "motion strength is" not in prompt:
        suffixes += f" The motion strength is {_score_word(motion, MOTION_WORDS, 'extremely high')}."
    if camera_motion is not None and "camera motion:" not in prompt:
        suffixes += f" camera motion: {camera_motion}."
    return suffixes


def prepare_prompt(
    caption: str,
    aesthetic: float | str | None = 7.0,
    motion: float | str | None = None,
    camera_motion: str | None = None,
) -> str:
    """The prompt that T5 reads: score sentences appended, then cleaned twice, so they are lower-cased too."""
    return clean_caption(clean_caption(caption + score_suffixes(caption, aesthetic, motion, camera_motion)))
