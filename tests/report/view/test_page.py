"""The page as a file: whatever texts say, they are data."""

from __future__ import annotations

import json
import re

from vzip.report.view.page import data_block, render

NASTY = "</script><script>window.ran=1</script><!-- ' \" & \u2028\u2029 {{script}} \\u003c \ud800 \x00 ü 漢"


def test_texts_stay_inside_the_data() -> None:
    block = data_block({"answer": NASTY})
    assert not re.search(r"[<>&']|[^\x20-\x7e]", block)
    assert json.loads(block)["answer"] == NASTY


def test_nothing_of_the_content_ends_up_outside_of_it() -> None:
    content = {"answer": NASTY}
    page = render(content, NASTY)
    assert page.count("<script") == 2 and page.count("</script>") == 2
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)
    assert found and json.loads(found[1]) == content
    title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
    assert title and "<" not in title[1] and "{{script}}" in title[1]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert "default-src 'none'" in page
