"""Chat templates are found in model folders, and transformers applies the one that was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from mergecore.chat_template import CHATML, commonest_template, folder_template, named_template, with_template
from mergecore.vocabulary import plan_vocabulary
from tests.vocabularies import save, words, write_files

HELLO = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_a_template_is_a_name_or_jinja() -> None:
    assert named_template("chatml") == CHATML
    assert named_template(HELLO) == HELLO
    for wanted in ("alpaca", "", "auto-ish"):
        with pytest.raises(ValueError, match="no chat template: expected auto, chatml, or the template's own text"):
            named_template(wanted)


@pytest.mark.parametrize("stored", ["chat_template.jinja", "tokenizer_config.json", "list", "chat_template.json"])
def test_the_commonest_template_is_found_wherever_it_is(stored: str, tmp_path: Path) -> None:
    folders = [save(tmp_path / name, words("a")) for name in ("base", "one", "two", "bare")]
    (folders[0] / "chat_template.jinja").write_text("{{ 'base' }}")
    for folder in folders[1:3]:
        if stored == "chat_template.jinja":
            (folder / stored).write_text(HELLO + "\n")
        elif stored == "list":
            named = [{"name": "tool_use", "template": "{}"}, {"name": "default", "template": HELLO + "\n"}]
            save(folder, words("a"), chat_template=named)
        else:
            (folder / stored).write_text(json.dumps({"chat_template": HELLO + "\n"}))
    assert [folder_template(folder) for folder in folders] == ["{{ 'base' }}", HELLO + "\n", HELLO + "\n", None]
    assert commonest_template(folders) == HELLO + "\n"
    assert commonest_template(folders[:2]) == "{{ 'base' }}"
    assert commonest_template(folders[3:]) is None


@pytest.mark.parametrize("changed", [False, True])
def test_transformers_applies_the_template_that_was_written(changed: bool, tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a"), chat_template="{{ 'old' }}", eos_token="a")
    near = save(tmp_path / "near", words("a", "b") if changed else words("a"))
    (base / "chat_template.json").write_text('{"chat_template": "{{ 1 }}"}')
    files = plan_vocabulary([base, near], [1, 2], base=0).files
    out = write_files(with_template(files, named_template("chatml")), tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loaded.eos_token == "a"
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert not (out / "chat_template.json").exists()
    loaded = transformers.AutoTokenizer.from_pretrained(write_files(with_template(files, HELLO), tmp_path / "hello"))
    assert loaded.apply_chat_template(MESSAGES, tokenize=False) == "user: Hi\nassistant: Ho\n"
