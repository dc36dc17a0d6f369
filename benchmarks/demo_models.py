"""The demo's inputs: three small homologous language models, trained on text that every Python installation has.

`base` learns the documentation topics of pydoc. `ft` starts from it and learns one narrow format, the Unicode character
table, with small weight changes. `pt` starts from it too and is trained further on the standard library's source code,
with large weight changes. All three are Qwen2 models over bytes, saved in bfloat16 with a tokenizer, so that nothing
about them is special to a program that reads Hugging Face model directories.

Training is a fixed number of steps with fixed seeds: on one machine and one set of versions it gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import sysconfig
import time
import tokenize
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

EOS = "<|endoftext|>"
EOS_ID = 256  # a byte's token id is its value, so this is the first free one
RECIPE_FILE = "demo_recipe.json"


@dataclass(frozen=True)
class Size:
    """The shape of the three models and of a training batch; lengths in tokens (bytes)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    window: int
    batch: int
    held_out_windows: int  # per text, for `bits_per_byte`


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: on which text, from which model (None: from scratch), for how many steps."""

    name: str
    text: str
    start: str | None
    steps: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Text:
    """One kind of text, split so that no paragraph of the held-out part occurs in any training part."""

    training: bytes
    held_out: bytes


FULL = Size(hidden=160, intermediate=512, layers=5, heads=4, window=256, batch=8, held_out_windows=128)
FULL_RECIPES = (
    Recipe("base", "documentation", None, steps=300, learning_rate=3e-3, seed=1),
    Recipe("ft", "Unicode table", "base", steps=60, learning_rate=1e-4, seed=2),
    Recipe("pt", "source code", "base", steps=240, learning_rate=2e-3, seed=3),
)
QUICK = Size(hidden=32, intermediate=64, layers=2, heads=2, window=64, batch=4, held_out_windows=8)
QUICK_RECIPES = (
    Recipe("base", "documentation", None, steps=20, learning_rate=1e-2, seed=1),
    Recipe("ft", "Unicode table", "base", steps=5, learning_rate=1e-3, seed=2),
    Recipe("pt", "source code", "base", steps=10, learning_rate=1e-2, seed=3),
)


def documentation() -> Iterator[str]:
    """The topics of `help("TOPIC")`: chapters of the language reference, one document each."""
    for name in sorted(topics):
        yield topics[name]


def unicode_table(block: int = 64) -> Iterator[str]:
    """The Unicode character table in the layout of UnicodeData.txt, `block` code points to a document.

    Characters whose name holds only their number (CJK ideographs, Hangul syllables) are left out.
    """
    for first in range(0, 0x20000, block):
        lines = []
        for code in range(first, first + block):
            name = unicodedata.name(chr(code), "")
            if name and not name.startswith(("CJK ", "HANGUL SYLLABLE ")):
                c = chr(code)
                fields = (f"{code:04X}", name, unicodedata.category(c), str(unicodedata.combining(c)),
                          unicodedata.bidirectional(c), unicodedata.decomposition(c))
                lines.append(";".join(fields))
        if lines:
            yield "\n".join(lines)


def source_code() -> Iterator[str]:
    """The modules of the standard library that are single files, as their authors wrote them."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if not path.name.startswith("_sysconfigdata"):  # generated when Python was built
            with tokenize.open(path) as file:
                yield file.read()


def load_texts() -> dict[str, Text]:
    """The three texts by name. Every tenth document is held out.

    The same paragraph stands in several topics, and licences in several modules. A held-out paragraph is therefore
    dropped wherever it comes again, in the training parts of all three texts too.
    """
    documents = {
        "documentation": list(documentation()),
        "Unicode table": list(unicode_table()),
        "source code": list(source_code()),
    }
    seen: set[str] = set()

    def first_time(paragraph: str) -> bool:
        key = " ".join(paragraph.split())
        new = key not in seen
        seen.add(key)
        return new

    def join(parts: Iterable[str]) -> bytes:
        paragraphs = (paragraph for part in parts for paragraph in part.split("\n\n"))
        return "\n\n".join(paragraph for paragraph in paragraphs if first_time(paragraph)).encode()

    held_out = {name: join(parts[5::10]) for name, parts in documents.items()}
    training = {name: join(p for i, p in enumerate(parts) if i % 10 != 5) for name, parts in documents.items()}
    return {name: Text(training[name], held_out[name]) for name in documents}


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without merges: token id = byte value, and one end-of-text token."""
    # The byte-level alphabet shows a printable byte as itself and the others, in order, as characters above 255.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(c) for c in alphabet if ord(c) < 256}
    others = [b for b in range(256) if b not in printable]
    vocabulary = {chr(b): b for b in printable} | dict(zip((c for c in alphabet if ord(c) >= 256), others, strict=True))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def new_model(size: Size, seed: int) -> Any:
    """A freshly initialised Qwen2 model in float32; embedding and output head are separate tensors."""
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=EOS_ID + 1,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        max_position_embeddings=size.window,
        tie_word_embeddings=False,
        initializer_range=0.06,  # about 1 / sqrt(hidden): learns much faster than the 0.02 of larger models
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )
    return transformers.Qwen2ForCausalLM(config)


def batches(text: bytes, size: Size, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """`steps` batches of random windows of the text, int64 [batch, window + 1]; the first column is end-of-text."""
    data = np.frombuffer(text, dtype=np.uint8)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        starts = random.integers(0, len(data) - size.window, size.batch)
        windows = np.stack([data[start : start + size.window] for start in starts])
        yield torch.nn.functional.pad(torch.from_numpy(windows).long(), (1, 0), value=EOS_ID)


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every byte after the first column, in nats."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(model: Any, text: bytes, recipe: Recipe, size: Size, log: Callable[[str], None]) -> None:
    """Train `model` in place with AdamW; the learning rate warms up over a tenth of the steps, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, recipe.steps // 10)
    began = time.monotonic()
    model.train()
    for step, tokens in enumerate(batches(text, size, recipe.steps, recipe.seed)):
        progress = max(0.0, (step - warm_up) / (recipe.steps - warm_up))
        rate = recipe.learning_rate * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done == recipe.steps or done % max(1, recipe.steps // 5) == 0:
            seconds = time.monotonic() - began
            log(f"  {recipe.name}: step {done} of {recipe.steps}, {loss.item() / math.log(2):.2f} bits per byte, {seconds:.0f} s")
    model.eval()
