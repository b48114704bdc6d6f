"""README.md and docs/*.md: their blocks run, their options and files exist, their links resolve.

A block is run unless an HTML comment right before it says why it cannot be run here:

    <!-- not run: needs a Jetson -->    the reason, in words
    <!-- file: robot.toml -->           the block is written to this file for the next blocks

The blocks of a page are one session: they run in order, in one folder. README's session starts with
a trained policy in outputs/train/my_policy (the tiny checkpoint of tests/data, with small actions).
The sessions of docs/ start where README's ends.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
# The log tells what was true on its day: options and files of then may be gone.
MANUAL = [page for page in (README, ROOT / "CONTRIBUTING.md", *DOCS) if page.name != "log.md"]
TIMEOUT_S = 300

COMMENT = re.compile(r"<!-- (not run|file): (.+) -->")
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
TEST_NAME = re.compile(r"\btest_[a-z0-9_]+(?:\.py)?(?:::test_[a-z0-9_]+)?")
ROOMS = "core|export|quantize|runtime|devices|benchmarks|tests|docs|docker"
SOURCE_FILE = re.compile(rf"(?<![\w/.-])(?:{ROOMS})/(?:[\w/-]+/(?=`)|[\w./-]+\.\w+)")
COMMAND_LINE = re.compile(r"^ *(?:\$ |smolvla-|pip |git |make |docker ).*", re.M)
INDENTED = re.compile(r"^ {4,}(?:\$ |smolvla-|pip |git |make |docker ).*", re.M)
OTHER_COMMAND = re.compile(r"[a-z][\w.-]*( |$)")


def name_of(page):
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block. marker: kind and text of the comment before it, or two empty strings."""

    place: str
    language: str
    marker: tuple[str, str]
    text: str


def blocks(page):
    found, marker, fence = [], ("", ""), None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if fence is None and line.startswith("```"):
            fence = (f"{name_of(page)}:{number}", line.removeprefix("```").strip(), [])
        elif fence is not None and line == "```":
            place, language, lines = fence
            found.append(Block(place, language, marker, "\n".join(lines) + "\n"))
            marker, fence = ("", ""), None
        elif fence is not None:
            fence[2].append(line)
        elif line.strip():
            match = COMMENT.fullmatch(line)
            marker = match.groups() if match else ("", "")
    assert fence is None, f"{fence[0]}: this block has no end"
    return found


def prose(page):
    """The text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def lines_of(block):
    """The commands of a bash block, each as a list of words, without comments."""
    joined = block.text.replace("\\\n", " ")
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        stops = [i for i, word in enumerate(words) if word in ("|", "&&", ";", ">")]
        if words:
            yield words[: stops[0]] if stops else words


# Sessions


def environment():
    """A user's, with our commands. No network; one thread, because tests share the machine."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_session(page, folder):
    for block in blocks(page):
        kind, value = block.marker
        if kind == "file":
            (folder / value).write_text(block.text)
        if kind or block.language not in ("bash", "python"):
            continue
        shell = ["bash", "-euo", "pipefail", "-c"]
        done = subprocess.run(
            [*(shell if block.language == "bash" else [sys.executable, "-c"]), block.text],
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        said = f"{block.place} exits {done.returncode}:\n{block.text}\n{done.stdout}"
        assert done.returncode == 0, said


def write_trained_policy(folder):
    """The tiny checkpoint. Its weights are random, so its actions are made small: else the jump
    limit rejects most of them, and enough in a row stop the arm."""
    shutil.copytree(TESTS / "data/tiny/checkpoint", folder)
    for path in folder.glob("policy_*.safetensors"):
        tensors = load_file(path)
        tensors["action.std"] = tensors["action.std"] * np.float32(0.1)
        save_file(tensors, path)


@pytest.fixture(scope="session")
def readme_session(tmp_path_factory):
    """The folder that README's session leaves."""
    folder = tmp_path_factory.mktemp("readme")
    write_trained_policy(folder / "outputs/train/my_policy/checkpoints/last/pretrained_model")
    run_session(README, folder)
    return folder


@pytest.mark.arm
def test_the_session_of_readme_runs(readme_session):
    assert (readme_session / "my_bundle/manifest.json").is_file()


@pytest.mark.arm
@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_the_session_of_a_page_runs_where_that_of_readme_ends(page, readme_session, tmp_path):
    folder = tmp_path / "session"
    shutil.copytree(readme_session, folder)
    run_session(page, folder)


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *DOCS], ids=name_of)
def test_every_block_runs_or_says_why_not(page):
    for block in blocks(page):
        assert block.language in ("bash", "python", "toml", "text"), (
            f"{block.place} is {block.language!r}, expected bash, python, toml or text"
        )
        if block.language == "toml":
            assert block.marker[0], f"{block.place} needs a comment <!-- file: NAME --> before it"
        if block.language == "text":
            assert not COMMAND_LINE.findall(block.text), f"{block.place} has commands: make it bash"
    assert not INDENTED.findall(prose(page)), f"{name_of(page)}: write commands in bash blocks"


# Names


@pytest.fixture(scope="module")
def commands():
    """smolvla-NAME -> its command as click sees it."""
    found = {}
    for entry in distribution("smolvla-edge").entry_points:
        if entry.group == "console_scripts":
            app = importlib.import_module(entry.module).app
            found[entry.name] = typer.main.get_command(app)
    return found


def options(command):
    """The options in the help of a command and of its subcommands."""
    names = {name for p in command.params if not getattr(p, "hidden", False) for name in p.opts}
    for sub in getattr(command, "commands", {}).values():
        names |= options(sub)
    return names | {"--help"}


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_every_command_line_of_a_block_is_accepted(page, commands):
    for block in blocks(page):
        if block.language != "bash":
            continue
        for name, *arguments in lines_of(block):
            if not name.startswith("smolvla-"):
                continue
            assert name in commands, f"{block.place}: there is no command {name}"
            command = commands[name]
            if hasattr(command, "commands"):
                assert arguments[0] in command.commands, f"{block.place}: no {name} {arguments[0]}"
                command = command.commands[arguments.pop(0)]
            try:
                command.make_context(name, arguments)
            except Exception as error:
                pytest.fail(f"{block.place}: {name} {shlex.join(arguments)}: {error}")


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_every_option_in_the_text_is_in_a_help(page, commands):
    every = {option for command in commands.values() for option in options(command)}
    for code in INLINE_CODE.findall(prose(page)):
        name, *rest = code.split()
        if name in commands:
            command = commands[name]
            command = getattr(command, "commands", {}).get(rest[0] if rest else "", command)
            known, where = options(command), name
        elif OTHER_COMMAND.match(code):
            continue  # pip, docker, ...
        else:
            known, where = every, "any command"
        unknown = set(OPTION.findall(code)) - known
        assert not unknown, f"{name_of(page)}: `{code}`: {unknown} is not an option of {where}"


def headings(page):
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *DOCS], ids=name_of)
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link} leads nowhere"
        if anchor:
            assert anchor in headings(target), f"{name_of(page)}: {link} has no such heading"


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_every_file_and_test_that_is_named_exists(page):
    code = " ".join(INLINE_CODE.findall(prose(page)))
    named = SOURCE_FILE.findall(page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{name_of(page)} names files that are not there: {missing}"
    for name in TEST_NAME.findall(code):
        file, _, function = name.partition("::")
        paths = list(TESTS.rglob(f"{file.removesuffix('.py')}.py"))
        assert paths, f"{name_of(page)} names {name}, there is no such test file"
        if function:
            sources = "".join(path.read_text() for path in paths)
            assert f"def {function}(" in sources, f"{name_of(page)}: there is no {name}"


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_every_make_target_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:`|^|&& )make ([a-z][a-z-]*)", page.read_text(), re.M)
    missing = [name for name in named if not re.search(rf"^{name}:", makefile, re.M)]
    assert not missing, f"{name_of(page)} names make targets that are not there: {missing}"


def test_the_table_of_readme_holds_the_numbers_of_the_results():
    results = ROOT / "benchmarks/results"
    latency = json.loads((results / "latency-two-core-epyc.json").read_text())
    runners = {runner["name"]: runner for runner in latency["runners"]}
    ratios = {(ratio["runner"], ratio["against"]): ratio["p50"] for ratio in latency["ratios"]}
    for precision, target in (("fp32", "cpu"), ("fp16", "portable"), ("int8", "cpu")):
        name = f"bundles/full-{precision}-{target}"
        accuracy = json.loads((results / f"accuracy-{precision}-{target}.json").read_text())
        (row,) = re.findall(rf"^\| {precision} \|(.*)\|$", README.read_text(), re.M)
        ms, disk_mb, error, against_float32, against_bfloat16 = (float(x) for x in row.split("|"))
        assert ms == round(runners[name]["chunk_ms"]["p50"])
        assert disk_mb == round(runners[name]["start"]["disk_mb"])
        assert error == float(f"{accuracy['comparisons'][0]['worst']:.2g}")
        assert against_float32 == round(ratios[name, "LeRobot float32"], 2)
        assert against_bfloat16 == round(ratios[name, "LeRobot bfloat16"], 2)
    for name in ("LeRobot float32", "LeRobot bfloat16"):
        assert f"| {name} | {runners[name]['chunk_ms']['p50']:.0f} |" in README.read_text()


def test_readme_is_one_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 10_000
