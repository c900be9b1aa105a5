"""Every code block of README.md and docs/ runs, and the thing that runs them notices when one does not."""

from __future__ import annotations

from pathlib import Path

import check_docs
import pytest


@pytest.mark.parametrize("page", check_docs.pages(), ids=lambda page: str(page.relative_to(check_docs.ROOT)))
def test_the_code_on_this_page_runs(page: Path) -> None:
    try:
        check_docs.run_page(page)
    except check_docs.PageSkipped as skipped:
        pytest.skip(str(skipped))


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
