"""The demo's inputs: three small homologous language models, trained on text that every Python installation has.

`base` learns the documentation topics of pydoc. `ft` starts from it and learns to answer questions in one narrow
format, with small weight changes. `pt` starts from it too and is trained further on the standard library's source code,
with large weight changes. All three are Qwen2 models over bytes, saved in bfloat16 with a tokenizer: to a program that
reads Hugging Face model directories nothing about them is special.

Training is a fixed number of steps with fixed seeds: on one machine, with one set of versions, it gives the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import platform
import shutil
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file

EOS = "<|endoftext|>"
EOS_ID = 256  # a byte's token id is its value, so this is the first free one
RECIPE_FILE = "demo_recipe.json"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """The shape of the three models and of what they are trained and measured on; lengths in tokens (bytes)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    window: int
    batch: int
    held_out_windows: int
    """Windows of each held-out text that `bits_per_byte` reads."""


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
    """One kind of text. No paragraph of the held-out part occurs in the training part of any text."""

    training: str
    held_out: str


FULL = Size(hidden=160, intermediate=512, layers=5, heads=4, window=256, batch=8, held_out_windows=128)
FULL_RECIPES = (
    Recipe("base", "documentation", None, steps=300, learning_rate=3e-3, seed=1),
    Recipe("ft", "questions", "base", steps=60, learning_rate=1e-4, seed=2),
    Recipe("pt", "source code", "base", steps=240, learning_rate=2e-3, seed=3),
)
QUICK = Size(hidden=32, intermediate=64, layers=2, heads=2, window=64, batch=4, held_out_windows=16)
QUICK_RECIPES = (
    Recipe("base", "documentation", None, steps=20, learning_rate=1e-2, seed=1),
    Recipe("ft", "questions", "base", steps=5, learning_rate=1e-3, seed=2),
    Recipe("pt", "source code", "base", steps=10, learning_rate=1e-2, seed=3),
)


# --- texts --------------------------------------------------------------------------------------------------------


def load_texts() -> dict[str, Text]:
    """The three texts by name. Every tenth document is held out; of questions and source code, the same modules.

    The same paragraph stands in several topics, and the same licence in several modules. So a paragraph counts only
    where it comes first, and the held-out parts come before all training parts.
    """
    modules = standard_library()
    documents = {
        "documentation": [topics[name] for name in sorted(topics)],
        "questions": [questions(name, source) for name, source in modules.items()],
        "source code": list(modules.values()),
    }
    seen: set[str] = set()

    def first_time(paragraph: str) -> bool:
        key = " ".join(paragraph.split())
        new = key not in seen
        seen.add(key)
        return new

    def join(parts: Iterable[str]) -> str:
        paragraphs = (paragraph for part in parts for paragraph in part.split("\n\n"))
        return "\n\n".join(paragraph for paragraph in paragraphs if first_time(paragraph))

    held_out = {name: join(parts[5::10]) for name, parts in documents.items()}
    training = {name: join(part for i, part in enumerate(parts) if i % 10 != 5) for name, parts in documents.items()}
    return {name: Text(training[name], held_out[name]) for name in documents}


def standard_library() -> dict[str, str]:
    """The source of the standard library's modules that are single files, by module name.

    Raises FileNotFoundError if this Python came without them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_sysconfigdata"):  # generated when Python was built
            with tokenize.open(path) as file:
                sources[path.stem] = file.read()
    if len(sources) < 50:
        raise FileNotFoundError(f"{folder} lacks the standard library's source, which the demo trains on")
    return sources


def questions(module: str, source: str) -> str:
    """One question for each documented class and function of a module; the answer begins its docstring."""
    pairs = []

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                full_name = f"{name}.{child.name}"
                documentation = ast.get_docstring(child)
                if documentation:
                    kind = "class" if isinstance(child, ast.ClassDef) else "function"
                    answer = " ".join(documentation.split("\n\n")[0].split())
                    question = f"What does the {kind} `{full_name}` do?"
                    pairs.append(f"### Instruction:\n{question}\n### Response:\n{answer}")
                visit(child, full_name)

    visit(ast.parse(source), module)
    return "\n\n".join(pairs)


# --- models -------------------------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """A byte-level BPE tokenizer without merges: token id = byte value, and one end-of-text token."""
    # The byte-level alphabet shows a printable byte as itself and the others, in order, as characters above 255.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: ord(c) for c in alphabet if ord(c) < 256}
    others = sorted(set(range(256)) - set(vocabulary.values()))
    vocabulary |= dict(zip((c for c in alphabet if ord(c) >= 256), others, strict=True))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def new_model(size: Size, seed: int) -> Any:
    """A freshly initialised Qwen2 model in float32; its embedding and its output head are separate tensors."""
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
        initializer_range=0.06,  # near 1 / sqrt(hidden): so narrow a model learns much faster than from the usual 0.02
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )
    return transformers.Qwen2ForCausalLM(config)


def load_model(folder: Path) -> Any:
    """A model directory as a user loads it; float32, because CPUs are slow at bfloat16 and the weights fit exactly."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def loss_of(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of predicting int64 `windows` [batch, length]; each starts from end-of-text."""
    inputs = torch.nn.functional.pad(windows[:, :-1], (1, 0), value=EOS_ID)
    logits = model(input_ids=inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.flatten())


def train(model: Any, text: str, recipe: Recipe, size: Size, log: Log) -> None:
    """Train `model` in place with AdamW; the learning rate warms up over a tenth of the steps, then falls to 0."""
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    random = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, recipe.steps // 10)

    def rate(step: int) -> float:
        falling = math.pi * max(0, step - warm_up) / max(1, recipe.steps - warm_up)
        return min((step + 1) / warm_up, (1 + math.cos(falling)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    began = time.monotonic()
    model.train()
    for step in range(1, recipe.steps + 1):
        starts = torch.randint(len(tokens) - size.window, (size.batch,), generator=random).tolist()
        loss = loss_of(model, torch.stack([tokens[start : start + size.window] for start in starts]).long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == recipe.steps or step % max(1, recipe.steps // 6) == 0:
            bits = loss.item() / math.log(2)
            seconds = time.monotonic() - began
            log(f"  {recipe.name}: step {step} of {recipe.steps}, {bits:.2f} bits per byte, {seconds:.0f} s")
    model.eval()


def train_models(
    folder: Path, size: Size, recipes: Iterable[Recipe], texts: dict[str, Text], log: Log
) -> dict[str, Path]:
    """Train the models into `folder`/NAME, in order, and return their directories by name.

    A model whose recorded recipe is the one asked for (texts, versions and threads too) is kept as it is. Raises
    FileExistsError if a folder of that name holds something else than a model of the demo.
    """
    made: dict[str, Path] = {}
    records: dict[str, dict[str, Any]] = {}
    for recipe in recipes:
        target = folder / recipe.name
        text = texts[recipe.text].training
        record = {
            **asdict(recipe),
            "start": records[recipe.start] if recipe.start else None,
            "size": asdict(size),
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "threads": torch.get_num_threads(),
            "versions": [platform.machine(), platform.python_version(), torch.__version__, transformers.__version__],
        }
        made[recipe.name], records[recipe.name] = target, record
        if target.exists() and not (target / RECIPE_FILE).exists():
            raise FileExistsError(f"{target} is not a model of the demo; choose another folder")
        if target.exists() and json.loads((target / RECIPE_FILE).read_text()) == record:
            log(f"  {recipe.name}: already trained, in {target}")
            continue
        origin = f"from {recipe.start}" if recipe.start else "from scratch"
        log(f"  {recipe.name}: {origin}, on {len(text):,} characters of {recipe.text}")
        model = load_model(made[recipe.start]) if recipe.start else new_model(size, recipe.seed)
        train(model, text, recipe, size, log)
        _save(model, record, target)
    return made


def _save(model: Any, record: dict[str, Any], target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    for stale in (partial, target):
        shutil.rmtree(stale, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    byte_tokenizer().save_pretrained(partial)
    (partial / RECIPE_FILE).write_text(json.dumps(record, indent=1))
    partial.rename(target)


# --- measures -----------------------------------------------------------------------------------------------------


def relative_change(model: Path, base: Path) -> float:
    """|model - base| / |base| over all weights (Euclidean norms)."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (model, base))
    change = sum((ours[name].double() - theirs[name].double()).square().sum().item() for name in theirs)
    return math.sqrt(change / sum(tensor.double().square().sum().item() for tensor in theirs.values()))


@torch.no_grad()
def bits_per_byte(folder: Path, texts: dict[str, Text], size: Size) -> dict[str, float]:
    """How well the model in `folder`, loaded as any Hugging Face model is, predicts each held-out text.

    Windows lie evenly over the text and are predicted whole, each from nothing but end-of-text. Raises ValueError if
    the directory's tokenizer does not give one token per byte or a result is not finite.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = load_model(folder)
    measured = {}
    for name, text in texts.items():
        tokens = torch.tensor(tokenizer.encode(text.held_out, add_special_tokens=False))
        size_in_bytes = len(text.held_out.encode())
        if len(tokens) != size_in_bytes:
            raise ValueError(f"{folder}: its tokenizer made {len(tokens)} tokens of {size_in_bytes} bytes")
        starts = torch.linspace(0, len(tokens) - size.window, size.held_out_windows).long().tolist()
        windows = torch.stack([tokens[start : start + size.window] for start in starts])
        nats = sum(loss_of(model, batch).item() * len(batch) for batch in windows.split(16)) / len(windows)
        measured[name] = nats / math.log(2)
        if not math.isfinite(measured[name]):
            raise ValueError(f"{folder}: {measured[name]} bits per byte on {name}")
    return measured
