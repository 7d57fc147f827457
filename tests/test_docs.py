"""README and docs: snippets run as printed, commands parse, paths and links exist."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.exceptions import TyperException

from flash_indexer.cli import app
from flash_indexer.files.export import export
from flash_indexer.files.native import save_native
from flash_indexer.files.trained import save_sparse
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model
from flash_indexer.models.sparse import sparse_handle

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "flash_indexer"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Fenced code of a language, in the page's order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


PYTHON = blocks(README, "python")

TENSORS = """
import torch
from flash_indexer import causal_intervals
torch.manual_seed(0)
T, H, G, D, I, E = 24, 6, 2, 16, 4, 32
index_q = torch.randn(T, I, E, requires_grad=True)
index_k = torch.randn(T, E, requires_grad=True)
index_weights = torch.rand(T, I, requires_grad=True)
q, k = torch.randn(T, H, D), torch.randn(T, G, D)
cu_seqlens = torch.tensor([0, 9, T])
key_start, key_end = causal_intervals(cu_seqlens)
logits = torch.einsum("tgjd,sgd->tgjs", q.unflatten(1, (G, H // G)), k).flatten(1, 2) * D**-0.5
seen = (torch.arange(T) >= key_start[:, None]) & (torch.arange(T) < key_end[:, None])
lse = logits.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1)
whole = index_q, index_k, index_weights
"""
"""What the snippets of the operators leave open."""

JUDGED = """
from flash_indexer.reference import indexer_kl as definition
wide = [x.detach().double().requires_grad_() for x in whole]
expected, _ = definition(
    whole_q.double(), whole_k.double(), *wide, softmax_scale=D**-0.5, key_start=whole_start, key_end=whole_end
)
expected.backward()
torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=0)
"""

PREPARED = {
    "AutoModelForCausalLM": """
import os, torch
os.chdir(folder)
batches = [torch.arange(48).view(1, 48) % 7] * 40
""",
    "causal_intervals": TENSORS + "whole_q, whole_k, whole_start, whole_end = q, k, key_start, key_end\n",
    "context_positions": TENSORS
    + """
import os
import torch.distributed as dist
os.environ.update(environment)
dist.init_process_group("gloo")
group, rank, world_size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
from flash_indexer.parallel import context_positions
whole_q, whole_k, whole_start, whole_end = q, k, key_start, key_end
part = context_positions(T, world_size, rank)
q, k, lse = q[part], k[part], lse[part]
index_q, index_k, index_weights = (x.detach()[part].requires_grad_() for x in whole)
""",
}
"""For a snippet that holds the word: the code before it, which binds the names that the text leaves open."""

CHECKED = {
    "AutoModelForCausalLM": """
assert kl.keys() == {0, 1, 2} and set(batches[0].shape) == {1, 48}
uniform = {layer: loss.uniform_kl.item() for layer, loss in handle.losses().items()}
ratio = sum(kl.values()) / sum(uniform.values())
assert ratio < 0.5, f"KL over uniform is {ratio} after {len(batches)} steps"
assert all(x.grad is None for x in handle.indexers.parameters())
assert not any(x.grad is not None for x in model.parameters())
""",
    "causal_intervals": JUDGED
    + """
for x, y in zip(whole, wide, strict=True):
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)
""",
    "context_positions": JUDGED
    + """
loss.backward()
for x, y in zip((index_q, index_k, index_weights), wide, strict=True):
    torch.testing.assert_close(x.grad.double(), y.grad[part], rtol=1e-4, atol=1e-6)
""",
}
"""The code after it."""


def subject(snippet: str) -> str:
    """The word by which a snippet is known."""
    return next(word for word in ("AutoModelForCausalLM", "context_positions", "causal_intervals") if word in snippet)


@pytest.mark.parametrize("snippet", PYTHON, ids=subject)
def test_a_snippet_of_readme_does_what_its_text_says(tmp_path: Path, runs: Any, checkpoint: Path, snippet: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "path/to/checkpoint")
    word = subject(snippet)
    code = PREPARED[word] + snippet + CHECKED[word]
    processes = 2 if word == "context_positions" else 1
    runs.finish(runs.ranks(processes, None, tmp_path, codes=[code] * processes, folder=str(tmp_path)))


def test_the_snippets_of_the_handover_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, mla_checkpoint: Path, capsys: Any
) -> None:
    """Each from what the commands before it leave, made here from Python: the folders of the page, tiny models."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "path/to/llama-8b")
    model, tokenizer = load_model(checkpoint, dtype=torch.bfloat16)
    handle = attach(model, num_heads=8, head_dim=32)
    save_native(handle, "runs/warm/checkpoint", base_name="tiny")
    save_sparse(sparse_handle(handle, 4), "exported", tokenizer=tokenizer, base_name="tiny")
    mla, _ = load_model(mla_checkpoint, dtype=torch.float32)
    export(attach(mla, num_heads=8, head_dim=32), "exported-mla", index_topk=4, tokenizer=tokenizer)
    snippets = blocks((ROOT / "docs" / "handover.md").read_text(encoding="utf-8"), "python")
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet.replace("topk=2048", "topk=4"), "handover.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_readme_has_a_snippet_of_each_subject() -> None:
    assert sorted(map(subject, PYTHON)) == sorted(PREPARED) == sorted(CHECKED)


def commands() -> Iterator[str]:
    """Lines of bash in all pages, and inline code that begins with the command's name; without placeholders."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in blocks(text, "bash"):
            yield from (line for line in block.replace("\\\n", " ").splitlines() if line.split("#")[0].strip())
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        yield from (code.replace("\n", " ") for code in re.findall(r"(?<!`)`(flash-indexer [^`]+)`", prose))


def check(line: str) -> None:
    """Parses one command down to its options; raises TyperException, SystemExit or AssertionError where it can't."""
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, arguments = Path(words[0]).name, words[1:]
    if program == "flash-indexer":
        check_command_line(arguments)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(arguments)
        check_module(options.training_script, options.training_script_args, options.module)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch"
        options = launch_command_parser().parse_args(arguments[1:])
        check_module(options.training_script, options.training_script_args, options.module)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(word for word in arguments if "=" not in word) <= set(targets), line
    elif program == "python":
        assert arguments[0] == "-m" or (ROOT / arguments[0]).is_file(), line
    elif program == "pip":
        check_extras(arguments)
    else:
        assert program in ("pre-commit", "source"), f"no rule for {line}"


def check_module(name: str, arguments: list[str], is_module: bool) -> None:
    if is_module:
        assert name == "flash_indexer"
        check_command_line(arguments)
    else:
        assert (ROOT / name).is_file()


@functools.cache
def command_group() -> Any:
    return typer.main.get_command(app)


def check_command_line(arguments: list[str]) -> None:
    """As typer would, but for running it."""
    group = command_group()
    name, *rest = arguments
    assert name in group.commands, f"no command {name}"
    command = group.commands[name]
    if (
        name in ("warmup", "sparse", "check", "evaluate", "export") and "--out" not in rest
    ):  # prose may leave the folder out
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, arguments
    else:
        command.make_context(name, rest)


def check_extras(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for names in re.findall(r"\[(.*?)\]", " ".join(arguments)):
        assert set(names.split(",")) <= set(extras), f"no extra {names}"


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_printed_command_parses(line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "flash-indexer warmup --out runs/mine --no-such-option 3",
        "flash-indexer warmup --no-such-option",
        "flash-indexer warmup --out runs/mine --steps many",
        "flash-indexer warm-up --out runs/mine",
        "torchrun --nproc-per-node 8 -m flash_indexer warmup --cp 2 --shards 3 --out runs/mine ...",
        "torchrun --no-such-option 8 -m flash_indexer warmup --out runs/mine",
        "accelerate launch --no-such-option 8 -m flash_indexer warmup --out runs/mine",
        "make no-such-target",
        "pip install '.[no-such-extra]'",
        "python benchmarks/no_such_file.py",
    ],
)
def test_a_wrong_command_does_not(line: str) -> None:
    with pytest.raises((TyperException, SystemExit, AssertionError)):
        check(line)


def section(page: str, title: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def paths(text: str) -> list[str]:
    """Inline code of tables that names a file or a folder."""
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return sorted({code for code in re.findall(r"`([\w./-]+)`", rows) if re.search(r"\w(/|\.(py|md|cuh))$", code)})


@pytest.mark.parametrize(("page", "title"), [("README.md", "Layout"), ("CONTRIBUTING.md", "Where things are")])
def test_every_path_of_a_layout_table_exists(page: str, title: str) -> None:
    named = [path for path in paths(section(page, title)) if "NAME" not in path]
    assert len(named) > 10

    def exists(path: str) -> bool:
        at_top = (ROOT / path).exists() or (SOURCE / path).exists()
        inner = path.rstrip("/")
        return at_top or ("/" not in inner and any(SOURCE.rglob(inner)))  # a name within the row's folder

    assert [path for path in named if not exists(path)] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_folder_of_the_package_has_a_line(page: str) -> None:
    title = "Layout" if page == "README.md" else "Where things are"
    text = section(page, title)
    folders = [path.parent.name for path in SOURCE.glob("*/__init__.py")]
    assert [name for name in folders if f"`{name}/`" not in text] == []


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            lost.append(target)
    assert lost == []
