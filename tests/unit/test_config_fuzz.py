"""Whatever a config holds, reading it gives a config or one line that says what is wrong."""

import os
import string
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_depthattn.config import RunConfig, config_keys, load_config, save_config, validate
from megatron_depthattn.config.load import leaf_types

EXAMPLES = int(os.environ.get("DEPTHATTN_FUZZ", "60"))
"""Inputs of every test; `DEPTHATTN_FUZZ=5000` looks longer."""
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="DEPTHATTN_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"))]
STRING_KEYS = [key for key, kind in leaf_types(RunConfig).items() if kind is str or kind == str | None]
ODD = st.sampled_from(
    [
        *("${run.dir}", "${oc.env:HOME}", "${", "~", "~/x", "null", "nan", ".inf", "1e400", "-0", "010", "1:30", "???"),
        *("[", "{}", "*a", "&a [*a]", "---", " #", ": ", "!!python/object:os.system x", "\0", "\x1b[2J", "\u2028"),
        *("9" * 5000, "0x" + "f" * 5000),
    ]
)
TEXT = st.one_of(
    st.text(max_size=30), ODD, st.lists(ODD, max_size=3).map("".join), st.integers().map(str), st.floats().map(str)
)
LOOKS_ODD = (
    *("runs/lr #1", "a: b", "0x10", "1e3", "3", "true", "'quoted'", "[a", "{b}", "???", "a=b", " a ", "-", "*x", "&y"),
    *("!!int 3", "# c", "%d", "a~/b"),
)
KEYS = st.one_of(st.sampled_from(config_keys()), st.text(string.ascii_lowercase + "._[]0", max_size=20))


def outcome(path: Path, overrides: Sequence[str] = ()) -> RunConfig | None:
    """The config that was read, or None after one line that says why not."""
    config = None
    try:
        config = load_config(path, overrides)
        validate(config, 1)
    except ValueError as error:
        line = str(error)
    else:
        return config
    assert line.isprintable() and len(line) < 1000, line
    return config


@FUZZ
@given(arguments=st.lists(st.tuples(KEYS, TEXT), max_size=4))
def test_any_command_line(tmp_path, arguments):
    (tmp_path / "base.yaml").write_text("run: {dir: out}")
    config = outcome(tmp_path / "base.yaml", [f"{key}={text}" for key, text in arguments])
    if config is not None:
        save_config(config, tmp_path / "saved.yaml")
        again = load_config(tmp_path / "saved.yaml")
        assert again == config or "nan" in repr(config)


@FUZZ
@given(
    key=st.sampled_from(STRING_KEYS),
    text=st.sampled_from(LOOKS_ODD) | st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])),
)
def test_any_text_of_a_string_key(tmp_path, key, text):
    """What was typed is what is meant, and what is read back from the saved config."""
    (tmp_path / "base.yaml").write_text("run: {dir: out}")
    if "${" in text or text.startswith("~") or text in ("", "null"):
        return
    config = outcome(tmp_path / "base.yaml", [f"{key}={text}"])
    assert config is not None
    assert reduce(getattr, key.split("."), config) == text
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@FUZZ
@given(
    start=st.sampled_from([*SHIPPED, b""]),
    cuts=st.lists(
        st.tuples(st.integers(0, 3000), st.integers(0, 40), st.one_of(st.binary(max_size=8), TEXT)), max_size=4
    ),
)
def test_any_file(tmp_path, start, cuts):
    """A shipped config with pieces of it replaced, and any few bytes."""
    content = start
    for position, length, put in cuts:
        piece = put if isinstance(put, bytes) else put.encode("utf-8", "surrogatepass")
        content = content[:position] + piece + content[position + length :]
    (tmp_path / "odd.yaml").write_bytes(content)
    outcome(tmp_path / "odd.yaml")


@pytest.mark.parametrize("text", ["[" * 10_000, "a: " * 5000, "${" * 500 + "}" * 500, "a: [1, {b: " * 3000])
def test_deep_nesting(tmp_path, text):
    (tmp_path / "deep.yaml").write_text(f"run: {text}")
    with pytest.raises(ValueError, match=r"deep\.yaml"):
        load_config(tmp_path / "deep.yaml")
