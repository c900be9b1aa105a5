"""Every code block of README.md and docs/ runs, and the thing that runs them notices when one does not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import check_docs
import pytest

from isthmus import errors
from isthmus.broker.policy import Limits
from isthmus.cli.app import COMMANDS

#: A page's headings as GitHub names them: small letters, no punctuation, hyphens for spaces.
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
LINKED = [*check_docs.pages(), *(check_docs.ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))]


@pytest.mark.parametrize("page", check_docs.pages(), ids=lambda page: str(page.relative_to(check_docs.ROOT)))
def test_the_code_on_this_page_runs(page: Path) -> None:
    try:
        check_docs.run_page(page)
    except check_docs.PageSkipped as skipped:
        pytest.skip(str(skipped))


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(check_docs.ROOT)))
def test_every_link_of_this_page_leads_somewhere(page: Path) -> None:
    for path, heading in LINK.findall(
        re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    ):
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            headings = [
                re.sub(r"[^\w\- ]", "", found).strip() for found in HEADING.findall(target.read_text())
            ]
            assert heading in [found.lower().replace(" ", "-") for found in headings], f"{path}#{heading}"


def test_the_page_of_errors_has_every_class_and_no_other() -> None:
    page = (check_docs.ROOT / "docs/reference/errors.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(errors.__all__)


def test_the_page_of_limits_has_every_limit_of_the_policy() -> None:
    page = (check_docs.ROOT / "docs/reference/limits.md").read_text()
    listed = page.partition("## That the operator sets")[2].partition("\n## ")[0]
    names = {field.name for field in dataclasses.fields(Limits)}
    assert set(re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE)) == names


def test_the_page_of_the_command_line_has_every_command() -> None:
    page = (check_docs.ROOT / "docs/reference/cli.md").read_text()
    assert re.findall(r"^## isthmus (\w+)$", page, re.MULTILINE) == list(COMMANDS)


def write_page(directory: Path, text: str) -> Path:
    page = directory / "page.md"
    page.write_text(text)
    return page


def test_blocks_run_in_order_and_python_blocks_share_their_names(tmp_path: Path) -> None:
    page = write_page(
        tmp_path,
        """
```sh
echo 41 > number
```
```python
number = int(open("number").read())
```
1. In a list:
   ```python
   if True:
       number += 1
   ```
~~~python
assert number == 42
~~~
```sh no-run
exit 1
```
```text
this is no program
```
""",
    )
    assert check_docs.run_page(page) == 4
    assert not (tmp_path / "number").exists()


def test_a_failing_python_block_is_reported_with_the_line_of_the_page(tmp_path: Path) -> None:
    page = write_page(tmp_path, "# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(check_docs.PageFault, match=r'page\.md", line 5'):
        check_docs.run_page(page)


@pytest.mark.parametrize("command", ["false", "false | true", "echo $unset", "exit 3"])
def test_a_failing_sh_block_is_reported(tmp_path: Path, command: str) -> None:
    page = write_page(tmp_path, f"```sh\n{command}\ntrue\n```\n")
    with pytest.raises(check_docs.PageFault, match=r"page\.md:2: the sh block ended with \d"):
        check_docs.run_page(page)


@pytest.mark.parametrize("command", ["echo so far; exec sleep 60", "echo so far; sleep 60 &"])
def test_a_page_that_hangs_or_leaves_something_running_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(check_docs, "PAGE_TIMEOUT_S", 1)
    page = write_page(tmp_path, f"```sh\n{command}\n```\n")
    with pytest.raises(check_docs.PageFault, match=r"not done after 1 s\nso far"):
        check_docs.run_page(page)


def test_a_page_that_needs_what_is_not_here_is_skipped_whole(tmp_path: Path) -> None:
    page = write_page(tmp_path, "```sh\nfalse\n```\n```sh needs=sh needs=no-such-program\ntrue\n```\n")
    with pytest.raises(check_docs.PageSkipped, match="no-such-program is not installed"):
        check_docs.run_page(page)
    assert check_docs.run_page(write_page(tmp_path, "```sh needs=sh needs=bash\ntrue\n```\n")) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("text\n```python\nprint(1)\n", r"page\.md:2: this block is never closed"),
        ("```bash\nfalse\n```\n", r"page\.md:1: write 'sh', not 'bash'"),
        ("```python norun\n1 / 0\n```\n", r"page\.md:1: 'norun' is not a flag"),
    ],
)
def test_a_block_that_would_be_passed_over_by_mistake_is_reported(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(check_docs.PageFault, match=complaint):
        check_docs.run_page(write_page(tmp_path, text))
