"""tools/generate.py on an exported folder, against a loop that keeps no cache."""

import io
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_depthattn.cli.generate import main
from megatron_depthattn.data.tokenizer import train_bpe
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM
from tests.e2e.commands import must_succeed, python
from tests.e2e.exported import edit_json, error_of, export

PROMPT = "def épsilon(x):\n    return "


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(iter([("some words of a text, and 火山 more of them; " * 9 + PROMPT).encode()] * 9), 320)


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model"
    export(path, tokenizer)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> DepthAttnForCausalLM:
    return DepthAttnForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return shutil.copytree(folder, tmp_path / "model")


@torch.no_grad()
def greedy(model: DepthAttnForCausalLM, ids: Sequence[int], count: int) -> list[int]:
    """New tokens, each from a pass over everything before it."""
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] == 0:  # EOS
            break
    return tokens[len(ids) :]


def generated(capsys: pytest.CaptureFixture, folder: Path, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["--model", str(folder), *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_greedy_text_is_the_prompt_and_what_a_loop_without_cache_finds(folder, model, tokenizer):
    command = ["tools/generate.py", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", "24"]
    result = must_succeed(python(*command, "--device", "cpu"))
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    new = greedy(model, ids, 24)
    assert len(set(new)) > 8, "a model that repeats itself shows nothing"
    assert result.stdout == PROMPT + tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert result.stderr == ""


def test_the_prompt_can_come_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    piped = generated(capsys, folder, "--prompt", "-", "--max-new-tokens", 8)
    assert piped == generated(capsys, folder, "--prompt", PROMPT, "--max-new-tokens", 8)


@pytest.mark.parametrize("place", ["--prompt", "standard input"])
def test_a_prompt_that_is_not_utf_8(folder, capsys, monkeypatch, place):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    given = "-" if place == "standard input" else os.fsdecode(b"caf\xe9")
    complaint = error_of(main, capsys, "--model", folder, "--prompt", given)
    assert complaint.startswith(f"error: {place}") and "is not UTF-8 (" in complaint


def test_a_terminal_obeys_nothing_of_the_text(folder, capsys, monkeypatch):
    """A title, a cleared screen, text that runs backwards; a file or a pipe gets the text as it is."""
    prompt = "a\x1b]0;title\x07\x1b[2J\u202eb"
    options = ("--prompt", prompt, "--max-new-tokens", 2)
    assert generated(capsys, folder, *options).startswith(prompt)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert generated(capsys, folder, *options).startswith(r"a\x1b]0;title\x07\x1b[2J\u202eb")


def test_seeds_reproduce_and_differ(folder, capsys):
    options = ("--prompt", PROMPT, "--max-new-tokens", 20, "--temperature", 1.5)
    zero, again, one = (generated(capsys, folder, *options, "--seed", seed) for seed in (0, 0, 1))
    assert zero == again != one
    assert all(text.startswith(PROMPT) for text in (zero, one))


def test_the_likeliest_token_alone_is_greedy(folder, capsys):
    options = ("--prompt", PROMPT, "--max-new-tokens", 20)
    plain = generated(capsys, folder, *options)
    assert plain == generated(capsys, folder, *options, "--temperature", 5, "--top-k", 1)
    assert plain == generated(capsys, folder, *options, "--temperature", 5, "--top-p", 1e-6)
    assert plain != generated(capsys, folder, *options, "--temperature", 5)


def test_sampling_follows_the_models_probabilities(folder, model, tokenizer, capsys):
    """Of 60 first tokens about as many are the likeliest as its probability says."""
    ids = torch.tensor([tokenizer.encode(PROMPT, add_special_tokens=False)])
    with torch.no_grad():
        probability = model(ids).logits[0, -1].softmax(-1).max().item()
    options = ("--prompt", PROMPT, "--max-new-tokens", 1, "--dtype", "fp32")
    likeliest = generated(capsys, folder, *options)
    texts = [generated(capsys, folder, *options, "--temperature", 1, "--seed", seed) for seed in range(60)]
    hits = sum(text == likeliest for text in texts)
    assert 0.05 < probability < 0.95
    assert abs(hits - 60 * probability) < 4 * math.sqrt(60 * probability * (1 - probability))


def test_the_folders_own_sampling_settings_are_not_used_but_its_end_of_text_is(own_folder, model, tokenizer, capsys):
    new = greedy(model, tokenizer.encode(PROMPT, add_special_tokens=False), 24)
    edit_json(own_folder / "generation_config.json", do_sample=True, temperature=9.0, repetition_penalty=3.0)
    text = generated(capsys, own_folder, "--prompt", PROMPT, "--max-new-tokens", 24)
    assert text == PROMPT + tokenizer.decode(new, skip_special_tokens=True) + "\n"
    stop = next(i for i, token in enumerate(new) if i >= 3 and token not in new[:i])
    edit_json(own_folder / "generation_config.json", eos_token_id=new[stop])
    text = generated(capsys, own_folder, "--prompt", PROMPT, "--max-new-tokens", 24)
    assert text == PROMPT + tokenizer.decode(new[: stop + 1], skip_special_tokens=True) + "\n"


def test_show_depth_is_the_recursion_done_by_hand(folder, model, tokenizer, capsys):
    """Layers 1 to 3 read 0, (0, 1) and (0, 2): their values unrolled, head by head."""
    new = greedy(model, tokenizer.encode(PROMPT, add_special_tokens=False), 5)
    ids = [*tokenizer.encode(PROMPT, add_special_tokens=False), *new]
    with torch.no_grad():
        _, one, two, three = model(torch.tensor([ids]), output_depth_weights=True).depth_weights
    plain = generated(capsys, folder, "--prompt", PROMPT, "--max-new-tokens", 5)
    reported = generated(capsys, folder, "--prompt", PROMPT, "--max-new-tokens", 5, "--show-depth", 3)
    assert reported.startswith(plain)
    rows = [line.split("│")[1:-1] for line in reported.removeprefix(plain).splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["1", "2", "3"] * 3
    assert [repr(tokenizer.decode(i)) in row[0] for i, row in zip(ids[-3:], rows[::3], strict=True)] == [True] * 3
    for number, row in enumerate(rows):
        a, b, c = (w[0, :, len(ids) - 3 + number // 3] for w in (one, two, three))  # [heads, n + 1]
        of_1 = [a[:, 0], a[:, 1]]
        of_2 = [b[:, 0] + b[:, 1] * a[:, 0], b[:, 1] * a[:, 1], b[:, 2]]
        of_3 = [c[:, 0] + c[:, 1] * of_2[0], c[:, 1] * of_2[1], c[:, 1] * of_2[2], c[:, 2]]
        expected = [of_1, of_2, of_3][number % 3]
        direct = [a, b, c][number % 3].mean(dim=0).tolist()
        sources = [["0"], ["0", "1"], ["0", "2"]][number % 3]
        assert shares_of(row[2]) == pytest.approx(dict(zip([*sources, "itself"], direct, strict=True)), abs=0.006)
        assert shares_of(row[3]) == pytest.approx({str(i): float(s.mean()) for i, s in enumerate(expected)}, abs=0.006)


def shares_of(cell: str) -> dict[str, float]:
    return {name: float(share) for name, share in (pair.split(":") for pair in cell.split())}


def test_show_depth_shows_tokens_as_they_are(tmp_path, capsys):
    """Tokens that rich would take for markup, or a terminal obey."""
    tokenizer, tokens = train_bpe(iter([PROMPT.encode()] * 9), 300), ["[/INST]", "[bold]", ":rocket:", "\x1b[2J"]
    tokenizer.add_tokens(tokens)
    export(tmp_path, tokenizer)
    for token in tokens:
        shown = generated(capsys, tmp_path, "--prompt", token, "--max-new-tokens", 1, "--show-depth")
        assert f"│ 0 {token!r} " in shown


def test_show_depth_wants_a_model_with_depth_attention(tokenizer, tmp_path, capsys):
    export(tmp_path, tokenizer, use_depth_attention=False)
    complaint = error_of(main, capsys, "--model", tmp_path, "--prompt", "a", "--max-new-tokens", 1, "--show-depth")
    assert "--show-depth: no layer of this model (model_type 'depthattn') attends over depth" in complaint


def test_bf16(folder, capsys):
    assert generated(capsys, folder, "--prompt", PROMPT, "--max-new-tokens", 4, "--dtype", "bf16").startswith(PROMPT)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--prompt", ""], "the prompt is empty: give --prompt some text to continue"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: set at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0: set 0"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan: set 0"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "0"], "--top-p 0.0: set a number in (0, 1]"),
        (["--prompt", "a", "--temperature", "1", "--top-k", "-1"], "--top-k -1: set at least 1, or 0"),
        (["--prompt", "a", "--top-k", "3"], "set --temperature above 0 as well"),
        (["--prompt", "a", "--show-depth", "0"], "--show-depth 0: set at least 1 token"),
        (["--prompt", "a", "--device", "tpu9"], "device 'tpu9' cannot be used here"),
        (
            ["--prompt", "a", "--max-new-tokens", "64"],
            "the prompt's 1 tokens and 64 new ones are more than the model's 64 positions (max_position_embeddings)",
        ),
    ],
)
def test_generate_refuses(options, complaint, folder, capsys):
    assert complaint in error_of(main, capsys, "--model", folder, *options)


def test_a_full_context_is_no_refusal(folder, capsys):
    assert generated(capsys, folder, "--prompt", "a", "--max-new-tokens", 63).startswith("a")


def test_generate_rejects_folders_that_are_no_model(own_folder, tmp_path, capsys):
    options = ("--prompt", "a", "--max-new-tokens", 2)
    assert "does not exist" in error_of(main, capsys, "--model", tmp_path / "nowhere", *options)
    assert "has no config.json" in error_of(main, capsys, "--model", tmp_path, *options)
    for file in own_folder.glob("tokenizer*"):
        file.unlink()
    (own_folder / "special_tokens_map.json").unlink(missing_ok=True)
    complaint = error_of(main, capsys, "--model", own_folder, *options)
    assert f"tokenizer {own_folder} does not load: there is no tokenizer.json" in complaint


def test_generate_rejects_another_models_tokenizer(tokenizer, tmp_path, capsys):
    export(tmp_path, tokenizer, vocab_size=100)
    complaint = error_of(main, capsys, "--model", tmp_path, "--prompt", PROMPT, "--max-new-tokens", 2)
    largest = max(tokenizer.encode(PROMPT, add_special_tokens=False))
    assert f"the prompt has token {largest} and the model's vocab_size is 100: the tokenizer in the folder" in complaint
