"""Tokenizer folders from elsewhere: those of transformers 5 load, nothing of them runs, no link leads out of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from megatron_depthattn.hf.tokenizer import load_fast_tokenizer

TEXT = "w1 <|tool|> w2 w3</s>"
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit\n"


def write_folder(folder: Path, config: dict[str, object] | None = None) -> Path:
    """A word-level tokenizer.json, and a tokenizer_config.json as transformers 5.24 writes it."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)} | {"[UNK]": 9}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>", AddedToken("<|tool|>", lstrip=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    saved = {
        "backend": "tokenizers",
        "eos_token": "</s>",
        "extra_special_tokens": ["<|tool|>"],
        "is_local": True,
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "TokenizersBackend",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(saved | (config or {})))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def test_a_tokenizer_saved_by_transformers_5_loads(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "saved")
    tokenizer = load_fast_tokenizer(folder)
    assert tokenizer.encode(TEXT) == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert tokenizer.eos_token_id == 10
    assert tokenizer.additional_special_tokens == ["<|tool|>"]
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert load_fast_tokenizer(folder / "tokenizer.json").eos_token_id == 10  # the file with its folder's config
    tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode(TEXT) == tokenizer.encode(TEXT)


NAMES_CODE: dict[str, tuple[str, dict[str, object]]] = {
    "list": ("tokenizer_config.json", {"auto_map": ["mine.Mine", None]}),
    "class": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}),
    "known class": (
        "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}},
    ),
    "model": ("config.json", {"model_type": "mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}),
}


@pytest.mark.parametrize("case", NAMES_CODE)
def test_code_of_a_folder_is_named_and_never_run(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, config = NAMES_CODE[case]
    write_folder(tmp_path, config if file == "tokenizer_config.json" else None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(ValueError, match=r"\.json names code of its own \(auto_map .*\), which is never run: remove"):
        load_fast_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_class_is_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`AutoTokenizer` would take any attribute of transformers, and this one asks whether to run the folder's code."""
    write_folder(tmp_path, {"tokenizer_class": "AutoProcessor", "processor_class": "Mine"})
    processor = {"auto_map": {"AutoProcessor": "mine.Mine"}, "processor_class": "Mine"}
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps(processor))
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    assert load_fast_tokenizer(tmp_path).encode("w1") == [1]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="does not know its class \\('AutoProcessor'"):
        load_fast_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def link(folder: Path, name: str) -> None:
    target = folder.parent / "elsewhere" / name
    target.parent.mkdir(exist_ok=True)
    if (folder / name).exists():
        (folder / name).rename(target)
    else:
        target.write_text("secret")
    (folder / name).symlink_to(target)


OUTSIDE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer": (lambda f: link(f, "tokenizer.json"), "'tokenizer.json' is a link out of the folder"),
    "template": (lambda f: link(f, "chat_template.jinja"), "'chat_template.jinja' is a link out of"),
    "templates": (lambda f: link(f, "additional_chat_templates"), "'additional_chat_templates' is a link out of"),
    "a file in the map": (
        lambda f: (f / "special_tokens_map.json").write_text('{"eos_token": "</s>", "vocab_file": "/etc/passwd"}'),
        "special_tokens_map.json names 'vocab_file', which is no special token: remove it there",
    ),
    "a descriptor": (lambda f: write_folder(f, {"vocab_file": 0}), r"\(vocab_file 0\)"),
    "another config": (lambda f: (f / "config.json").write_text('{"configuration_files": []}'), "configuration_files"),
    "layers": (
        lambda f: (f / "config.json").write_text('{"model_type": "qwen3", "num_hidden_layers": 1000000000}'),
        "num_hidden_layers=1000000000 is more than 10000",
    ),
    "a file by its path": (lambda f: write_folder(f, {"vocab_file": "/etc/passwd"}), r"\(vocab_file '/etc/passwd'\)"),
    "an argument": (lambda f: write_folder(f, {"init_inputs": ["vocab"]}), r"\(init_inputs \['vocab'\]\)"),
    "a version": (
        lambda f: write_folder(f, {"fast_tokenizer_files": ["../tokenizer.1.json"]}),
        "fast_tokenizer_files '../tokenizer.1.json'",
    ),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_nothing_outside_of_a_folder_is_read(case: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    change, message = OUTSIDE[case]
    change(folder)
    with pytest.raises(ValueError, match=f"^tokenizer {folder} does not load: .*{message}"):
        load_fast_tokenizer(folder)


def test_links_of_the_hub_s_cache_and_of_what_is_not_read_are_no_matter(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "models--a--b" / "snapshots" / "0123")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(Path("..", "..", "blobs", str(i)))
    for name in ("model.safetensors", "model.safetensors.index.json", "README.md", "runs"):
        (folder / name).symlink_to("/mnt/weights")
    (tmp_path / "mine").symlink_to(folder)
    for given in (folder, tmp_path / "mine"):  # a link that the user names is the user's
        assert load_fast_tokenizer(given).eos_token == "</s>"
