"""The pages: their links, the options that they name, and their commands.

Blocks of bash after a line `<!-- run -->` are run in a new folder, in the order of the page. A block after a line
`<!-- file: NAME -->` is written there as file NAME. Trainings end after STEPS steps. Commands of other blocks are
parsed as psmpi parses them.
"""

import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
from helpers.paths import ROOT

import psmpi
from psmpi import command
from psmpi.config import check, given_names
from psmpi.train import _parse

PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "data/README.md")),
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Beginnings of the names of pages whose commands are always run. The commands of other pages are slow tests, since the
# rest of the suite trains by every method and option. The tutorial has a test of its own.
ALWAYS = ("docs/configuration.md", "docs/data.md", "docs/own_method.md", "docs/own_layer.md")
RUN = [
    pytest.param(name, marks=[] if name.startswith(ALWAYS) else [pytest.mark.slow])
    for name in NAMES
    if "<!-- run -->" in (ROOT / name).read_text()
]
BLOCK = re.compile(r"^(?:<!-- (run|file: \S+) -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)
# Steps of a training in a block that is run.
STEPS = 50
# Options of other programs that the pages name.
OTHER_PROGRAMS = {
    "--dry-run", "--requeue", "--array", "--ntasks", "--nodes", "--ntasks-per-node", "--mem", "--cpus-per-task",
    "--gpus-per-task", "--gres", "--signal", "--mpi", "--bind-to", "--oversubscribe", "--allow-run-as-root", "--logdir",
    "--mca", "--map-by", "--use-hwthread-cpus", "--no-deps", "--strict", "--hostfile", "--host",
    "--cpu-bind", "--cpus", "--force", "--inplace", "--preserve-status", "--no-binary",
    "--wait", "--shm-size", "--kill-on-bad-exit", "--job-name", "--only-binary", "--force-reinstall",
    "--sweeps",
}  # fmt: skip


def blocks(name):
    """Mark, language and text of each block of a page."""
    return BLOCK.findall((ROOT / name).read_text())


def commands(text):
    """The commands of a block of bash, as lists of words without comments; those of a pipe are separate commands."""
    text = re.sub(r"\\\n", " ", text)
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;<>"):
                yield words
                words = []
            else:
                words.append(word)


def shortened(block):
    """A block of bash with --max-steps in its trainings; a --max-steps of the page comes later and replaces it."""
    return re.sub(r"((?:\bpsmpi[ .]|\.py )train)\b(?![^\n]*--help)", rf"\1 --max-steps {STEPS}", block)


def of_psmpi(words):
    """The words after `psmpi` in a command that starts psmpi, else None."""
    for at, word in enumerate(words):
        if word == "psmpi":
            return words[at + 1 :]
        if word == "-m" and (match := re.fullmatch(r"psmpi(?:\.(\w+))?", words[at + 1] if at + 1 < len(words) else "")):
            return [*match.groups("")[:1], *words[at + 2 :]] if match[1] else words[at + 2 :]
        if re.fullmatch(r"examples/\w+\.py", word):
            return ["train", *words[at + 1 :]] if words[at + 1 : at + 2] != ["train"] else words[at + 1 :]
    return None


def help_of(*words):
    """The text that a command prints."""
    with redirect_stdout(StringIO()) as text:
        assert command.main([*words]) == 0
    return text.getvalue()


@cache
def options_of(*words):
    """The options in the full help of a command."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", help_of(*words, "--help-all")))


@cache
def all_options():
    """The options of all commands of psmpi."""
    parsers = [(name,) for name in command.COMMANDS if name not in ("inspect", "bench")]
    for group in ("inspect", "bench"):
        parsers += [(group, name) for name in re.findall(r"^ {2,6}([a-z]+)\b", help_of(group, "--help"), re.M)]
    return set().union(*(options_of(*words) for words in parsers))


def anchors(page):
    """The anchors of the headings of a page, as Python-Markdown makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    slugs = []
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"[^\w\s-]", "", title.encode("ascii", "ignore").decode()).strip().lower()
        slugs.append(re.sub(r"[-\s]+", "-", plain))
    return set(slugs)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_pages_and_headings_that_are_there(name):
    page = ROOT / name
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name}: {target} is not there"
        assert not anchor or anchor in anchors(linked), f"{name}: {target} names no heading"


def test_the_readme_fits_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.parametrize("name", NAMES)
def test_options_that_pages_name_are_there(name):
    text = (ROOT / name).read_text()
    known = all_options() | OTHER_PROGRAMS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text))
    foreign = {
        word.partition("=")[0]
        for _, language, block in blocks(name)
        if language == "bash"
        for words in commands(block)
        if of_psmpi(words) is None
        for word in words
    }
    assert named - known - foreign == set()


@pytest.mark.parametrize("name", [name for name in NAMES if "```bash" in (ROOT / name).read_text()])
def test_commands_are_parsed(name, monkeypatch, tmp_path, capsys):
    """Options, their values, and for trainings also their combination; nothing is read, run or submitted."""
    real = command.chosen
    monkeypatch.setattr(command, "chosen", lambda *arguments: (real(*arguments), lambda: 0)[1])
    monkeypatch.chdir(tmp_path)
    for _, language, block in blocks(name):
        for words in commands(block) if language == "bash" else ():
            given = of_psmpi(words)
            if not given or given[0] not in command.COMMANDS or {"--help", "--help-all"} & set(given):
                continue
            first, *rest = given
            if first == "train" and "--resume" not in rest and not any(word.startswith("examples/") for word in words):
                if "--config" in rest:
                    at = rest.index("--config")
                    del rest[at : at + 2]
                config, _ = _parse(rest)
                check(config, given_names(rest, file=False))
            elif first == "bench":
                assert command.main(given) == 0, (given, capsys.readouterr())
            else:
                known = options_of(first, rest[0]) if first == "inspect" and rest else options_of(first)
                until = rest.index("--") if "--" in rest else len(rest)
                named = {word.partition("=")[0] for word in rest[:until] if word.startswith("--")}
                assert named <= known | {"--method"} or any(word.startswith("examples/") for word in words), given


@pytest.mark.parametrize("name", RUN)
def test_commands_run(name, tmp_path):
    """The commands of a page run in their order in one folder."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for place in ("examples", "jobs"):
        (tmp_path / place).symlink_to(ROOT / place)
    for mark, _, block in blocks(name):
        if mark.startswith("file: "):
            (tmp_path / mark[len("file: ") :]).write_text(block)
        elif mark == "run":
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", shortened(block)],
                cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert result.returncode == 0, (block, result.stdout[-3000:] + result.stderr[-3000:])


def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs of the extra docs")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    # Pages load no scripts or styles from other hosts.
    assert not re.findall(r'(?:src|href)="https?://(?!www\.mkdocs|github|readthedocs)[^"]*\.(?:js|css)"', home)


def test_the_version_is_the_same_everywhere():
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    latest = re.search(r"^## (\S+), (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert latest.groups() == (psmpi.__version__, cited["date-released"]) and cited["version"] == psmpi.__version__
