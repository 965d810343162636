"""Text of any kind, shown: harmless in a terminal, literal in Markdown, one word in a shell, without its secrets."""

from __future__ import annotations

import json
import shlex
import subprocess
import unicodedata

from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from memmcl.report import plain_text
from memmcl.text import one_line, visible
from memmcl.urls import clean, redact, secret_in

ANY = st.text(st.characters(), max_size=60)
MARKUP = st.text(st.sampled_from("ab1 \\`*_[](){}<>#+-.!|~=:@&;\"'\n\r\t/\x1b\u202e"), max_size=40)
WORD = st.text(st.sampled_from("abcXYZ012-_"), min_size=1, max_size=12)
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False, "html": True})


@given(ANY)
@example("\x1b[31m\x9b\u2028\ud800")
def test_visible_text_has_no_control_characters_and_stays(text: str) -> None:
    shown = visible(text)
    assert not [sign for sign in shown if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\t\n"]
    assert not [sign for sign in shown if unicodedata.bidirectional(sign) in ("RLO", "LRO", "RLE", "LRE", "RLI", "LRI")]
    assert visible(shown) == shown
    shown.encode()
    if text.isprintable():
        assert shown == text


@given(ANY)
def test_visible_json_is_the_same_json(text: str) -> None:
    assert json.loads(visible(json.dumps([text], ensure_ascii=False))) == [text]


def words(source: str) -> str:
    """Return the text of Markdown that is one paragraph of nothing but text."""
    tokens = MARKDOWN.parse(source)
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"], source
    (inline,) = (token for token in tokens if token.type == "inline")
    assert {child.type for child in inline.children} <= {"text", "text_special"}, source
    return "".join(child.content for child in inline.children)


@given(st.one_of(ANY, MARKUP))
@example("<img src=x onerror=alert(1)> [a](javascript:b) `c` **d** | e # f &lt; ~~g~~")
@example("1. a")
@example("---")
@example("===")
@example("    a")
@settings(max_examples=300)
def test_plain_text_is_itself_in_markdown(text: str) -> None:
    escaped = plain_text(text)
    assert "\n" not in escaped
    expected = one_line(text)
    if expected:
        assert words(escaped) == expected
        assert words(f"told by {escaped}.") == f"told by {expected}."


@given(MARKUP)
def test_plain_text_is_one_cell_of_a_table(text: str) -> None:
    escaped = plain_text(f"x{text}")
    tokens = MARKDOWN.parse(f"| a | b |\n|---|---|\n| {escaped} | 1 |\n")
    cells = [tokens[place + 1] for place, token in enumerate(tokens) if token.type == "td_open"]
    assert len(cells) == 2
    assert "".join(child.content for child in cells[0].children or ()) == one_line(f"x{text}")


@given(WORD, WORD, WORD, st.sampled_from(["sig", "X-Amz-Signature", "token", "access_token", "key", "Password"]))
def test_a_planted_secret_is_never_shown(host: str, path: str, secret: str, name: str) -> None:
    planted = f"Z{secret}Q9"
    for url in (
        f"https://{host}/{path}?a=b&{name}={planted}",
        f"https://{host}/{path}#{name}={planted}&c=d",
        f"s3://{path}:{planted}@{host}/{path}",
        f"https://{planted}@{host}",
    ):
        assert secret_in(url)
        assert planted not in clean(f"cannot open {url} ({url!r}): <{url}>")


@given(ANY)
def test_redacting_twice_is_redacting_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


def test_a_quoted_url_is_one_word_to_a_shell() -> None:
    for url in ("s3://x/$(touch planted)", "s3://x/`id`", "file:///a b;'c\"&|>d", "s3://x/$HOME"):
        said = subprocess.run(
            ["bash", "-c", f"printf %s {shlex.quote(url)}"], capture_output=True, text=True, check=True
        )
        assert said.stdout == url
