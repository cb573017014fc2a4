"""What a study's outputs cost to store: raw bytes against stored bytes, by what is shared, and what else was tried.

Two studies: the default one with its real checkpoints (of a store that has it, or run here), and one base with many LoRA,
partial and full fine-tunes, each of a few real optimizer steps. Then schemes that could go further than sharing equal
tensors, on every checkpoint of the default study and its parent: how much they save, and how fast they are on one core.

    python -m benchmarks.storage [--store URL]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from artifacts import tensors
from artifacts.store import Store
from artifacts.trees import SMALLEST_IN_PARTS
from benchmarks.table import machine, show

ROOT = Path(__file__).resolve().parent.parent
WHOLE = 1 << 60
"""A split size that no file reaches."""
KIB, MIB = 1 << 10, 1 << 20
REPEATS = 3
DELAY = 0.02
"""Seconds added to every request where the number of objects is weighed against what they share."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Raw bytes against stored bytes.")
    parser.add_argument("--store", help="a store with a finished default study; it is run when none is named")
    options = parser.parse_args(arguments if arguments is not None else sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = options.store or run_default_study(folder / "default")
        outputs = materialised(Store.open(url), folder / "outputs")
        ratios(f"Default study, {len(outputs)} outputs", outputs, outputs, folder)
        pairs = checkpoints_with_parents(Store.open(url), folder / "outputs")
        beyond_tensors(pairs)
        merged, adapted = many_fine_tunes(folder / "fine-tunes")
        ratios(f"One base and {len(merged) - 1} fine-tunes of it", merged, adapted, folder)
        part_sizes(adapted, merged, folder)


def run_default_study(folder: Path) -> str:
    """Run the default study into a store of its own."""
    store = str(folder / "store")
    command = [sys.executable, "-m", "flows.cli", "run", str(ROOT / "configs" / "default.yaml"), "--engine", "direct"]
    subprocess.run([*command, "--store", store, "-o", str(folder / "report")], cwd=ROOT, check=True)
    return store


def materialised(store: Store, folder: Path) -> list[Path]:
    """The outputs of the newest run, as folders."""
    _, _, run = next(store.runs())
    found = []
    for name, node in sorted(run["nodes"].items()):  # type: ignore[attr-defined]
        found.append(folder / name.replace("/", "+"))
        store.materialise(node["output"], found[-1])
    return found


# What is stored


@contextmanager
def cutting(split_from: int, part_from: int) -> Iterator[None]:
    """Cut files at these sizes for the length of the block."""
    before = tensors.SPLIT_FROM, tensors.PART_FROM
    tensors.SPLIT_FROM, tensors.PART_FROM = split_from, part_from
    try:
        yield
    finally:
        tensors.SPLIT_FROM, tensors.PART_FROM = before


def stored(folders: list[Path], where: Path) -> tuple[int, int]:
    """(bytes, objects) of a new store after every one of the folders was put."""
    with tempfile.TemporaryDirectory(dir=where) as name:
        store = Store.open(name)
        for folder in folders:
            store.put_tree(folder)
        sizes = [entry.size for entry in store.backend.list("v1/")]
    return sum(sizes), len(sizes)


def ratios(title: str, merged: list[Path], adapted: list[Path], where: Path) -> None:
    """Print what each scheme stores. `adapted` are the same outputs with adapters kept as adapters."""
    raw = sum(path.stat().st_size for folder in merged for path in folder.rglob("*") if path.is_file())
    files = sum(1 for folder in merged for path in folder.rglob("*") if path.is_file())
    rows = [["nothing shared", f"{raw / 1e6:.1f}", "1.000", files]]
    schemes = [("equal files once", merged, WHOLE), ("equal tensors once", merged, SMALLEST_IN_PARTS)]
    if adapted is not merged:
        schemes.append(("and adapters as adapters", adapted, SMALLEST_IN_PARTS))
    schemes.append(("as the store does it", adapted, tensors.SPLIT_FROM))
    for label, folders, split_from in schemes:
        with cutting(split_from, tensors.PART_FROM):
            size, objects = stored(folders, where)
        rows.append([label, f"{size / 1e6:.1f}", f"{size / raw:.3f}", objects])
    show(f"{title}: bytes stored ({machine()})", ["what", "MB", "stored / raw", "objects"], rows)


class Delayed:
    """A backend whose requests each take `DELAY` longer, as those to a server elsewhere do."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **keywords: Any) -> Any:
            time.sleep(DELAY)
            return found(*arguments, **keywords)

        return call


def part_sizes(adapted: list[Path], merged: list[Path], where: Path) -> None:
    """Print what the smallest part of its own costs: sharing against the number of objects and the time they take."""
    raw = sum(path.stat().st_size for folder in merged for path in folder.rglob("*") if path.is_file())
    rows = []
    for part_from in (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, WHOLE):
        split_from = WHOLE if part_from == WHOLE else SMALLEST_IN_PARTS
        with cutting(split_from, part_from), tempfile.TemporaryDirectory(dir=where) as name:
            store = Store(Delayed(Store.open(f"{name}/store").backend))  # type: ignore[arg-type]
            started = time.monotonic()
            digests = [store.put_tree(folder).digest for folder in adapted]
            put = time.monotonic() - started
            sizes = [entry.size for entry in store.backend.list("v1/")]
            started = time.monotonic()
            store.materialise(digests[0], Path(name, "back"))
            get = time.monotonic() - started
        label = "whole files" if part_from == WHOLE else f"{part_from // KIB} KiB"
        rows.append([label, f"{sum(sizes) / raw:.3f}", len(sizes), f"{put:.2f}", f"{get:.2f}"])
    head = ["smallest part", "stored / raw", "objects", "put all, s", "get the base, s"]
    show(f"Smallest part, local folder with {1000 * DELAY:.0f} ms added to each request ({machine()})", head, rows)


# One base, many fine-tunes


def many_fine_tunes(folder: Path) -> tuple[list[Path], list[Path]]:
    """A base and its fine-tunes, twice: LoRA merged into full models, and LoRA as the store keeps it."""
    from tasks.adapters import ADAPTERS, plain

    base = folder / "base"
    _fresh_base(base)
    adapted = [base]
    for number in range(8):
        adapted.append(_tuned(base, folder / f"lora-{number}", seed=number, rank=16))
    for number in range(2):
        adapted.append(_tuned(folder / f"lora-{number}", folder / f"lora-on-lora-{number}", seed=number, rank=16))
    for number in range(4):
        adapted.append(_tuned(base, folder / f"last-block-{number}", seed=number, trained=("layers.5.", "norm")))
    for number in range(2):
        adapted.append(_tuned(base, folder / f"full-{number}", seed=number, trained=("",)))
    merged = []
    for output in adapted:
        merged.append(plain(output))
        if merged[-1] != output:  # what a store of merged models would hold: those, and the newest adapter beside them
            newest = max((output / ADAPTERS).iterdir(), key=lambda path: int(path.name))
            shutil.copytree(newest, merged[-1] / "adapter")
    return merged, adapted


def _fresh_base(out: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    from tasks.models import save_model

    save_model(LlamaForCausalLM(config), tokenizer, out)


def _tuned(start: Path, out: Path, *, seed: int, rank: int = 0, trained: tuple[str, ...] = ()) -> Path:
    """The model in `start` after three AdamW steps on random tokens: by LoRA of a rank, or in the weights so named."""
    import torch

    from tasks.models import LoraSettings, apply_lora, load_model, save_model

    model, tokenizer = load_model(start)
    torch.manual_seed(seed)
    if rank:
        model = apply_lora(model, LoraSettings(rank=rank), seed)
    else:
        for name, weight in model.named_parameters():
            weight.requires_grad_(any(part in name for part in trained))
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4)
    for _ in range(3):
        tokens = torch.randint(0, model.config.vocab_size, (2, 64))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, out, start=start)
    return out


# What else was tried


def checkpoints_with_parents(store: Store, folder: Path) -> list[tuple[Path, Path]]:
    """(weights of a model, weights of the model that its training started from) for every training of the newest run."""
    _, _, run = next(store.runs())
    nodes = run["nodes"]
    weights = {}
    for name, node in sorted(nodes.items()):  # type: ignore[attr-defined]
        path = folder / name.replace("/", "+") / "model.safetensors"
        if path.is_file():
            weights[node["output"]] = path
    pairs = []
    for _, node in sorted(nodes.items()):  # type: ignore[attr-defined]
        record = store.lookup(node["stage"], node["key"])
        parent = record.payload["inputs"].get("model") if record else None
        if node["output"] in weights and parent in weights:
            pairs.append((weights[node["output"]], weights[parent]))
    return pairs


@dataclass(frozen=True)
class Scheme:
    """A reversible way to write a checkpoint in fewer bytes, its parent at hand."""

    name: str
    encode: Callable[[Any, Any], bytes]
    decode: Callable[[bytes, Any, int], Any]


def schemes() -> Iterator[Scheme]:
    """Codecs of pyarrow, alone, after a byte shuffle, and after taking the parent away."""
    import numpy
    import pyarrow

    def shuffled(data: Any) -> Any:
        return numpy.ascontiguousarray(data.view(numpy.uint8).reshape(-1, 4).T)

    def unshuffled(data: bytes) -> Any:
        planes = numpy.frombuffer(data, numpy.uint8).reshape(4, -1)
        return numpy.ascontiguousarray(planes.T).reshape(-1).view(numpy.uint32)

    for label, codec in (("zstd-1", pyarrow.Codec("zstd", 1)), ("lz4", pyarrow.Codec("lz4"))):

        def squeeze(data: Any, codec: Any = codec) -> bytes:
            return codec.compress(memoryview(data).cast("B"), asbytes=True)

        def expand(data: bytes, size: int, codec: Any = codec) -> bytes:
            return codec.decompress(data, size, asbytes=True)

        yield Scheme(
            label,
            lambda new, old, squeeze=squeeze: squeeze(new),
            lambda data, old, n, expand=expand: numpy.frombuffer(expand(data, n), numpy.uint32),
        )
        yield Scheme(
            f"byte shuffle, {label}",
            lambda new, old, squeeze=squeeze: squeeze(shuffled(new)),
            lambda data, old, n, expand=expand: unshuffled(expand(data, n)),
        )
        yield Scheme(
            f"XOR with the parent, byte shuffle, {label}",
            lambda new, old, squeeze=squeeze: squeeze(shuffled(new ^ old)),
            lambda data, old, n, expand=expand: unshuffled(expand(data, n)) ^ old,
        )
        yield Scheme(
            f"difference to the parent, byte shuffle, {label}",
            lambda new, old, squeeze=squeeze: squeeze(shuffled(_folded(new - old))),
            lambda data, old, n, expand=expand: _unfolded(unshuffled(expand(data, n))) + old,
        )


def _folded(difference: Any) -> Any:
    """Small differences of either sign as small numbers."""
    import numpy

    return (difference << numpy.uint32(1)) ^ (difference.view(numpy.int32) >> numpy.int32(31)).view(numpy.uint32)


def _unfolded(folded: Any) -> Any:
    import numpy

    return (folded >> numpy.uint32(1)) ^ (numpy.uint32(0) - (folded & numpy.uint32(1)))


def beyond_tensors(pairs: list[tuple[Path, Path]]) -> None:
    """Print what each scheme makes of every checkpoint, and its speed on one core."""
    import numpy

    def words(path: Path) -> Any:
        data = path.read_bytes()
        return numpy.frombuffer(data + bytes(-len(data) % 4), numpy.uint32)

    known = [(words(new), words(old)) for new, old in pairs]
    known = [(new, old) for new, old in known if len(new) == len(old)]
    raw = sum(new.nbytes for new, _ in known)
    rows = []
    for scheme in schemes():
        encoding, decoding = [], []
        for _ in range(REPEATS):
            started = time.perf_counter()
            coded = [scheme.encode(new, old) for new, old in known]
            encoding.append(time.perf_counter() - started)
            started = time.perf_counter()
            back = [scheme.decode(data, old, new.nbytes) for data, (new, old) in zip(coded, known, strict=True)]
            decoding.append(time.perf_counter() - started)
        if not all(numpy.array_equal(one, new) for one, (new, _) in zip(back, known, strict=True)):
            raise SystemExit(f"{scheme.name} did not give the bytes back")
        speeds = [f"{raw / median(times) / 1e6:.0f}" for times in (encoding, decoding)]
        rows.append([scheme.name, f"{sum(map(len, coded)) / raw:.3f}", *speeds])
    title = f"Weights of {len(known)} trainings, {raw / 1e6:.1f} MB: sharing equal tensors stores 1.000 of them"
    show(f"{title} ({machine()})", ["scheme", "stored / raw", "put, MB/s", "get, MB/s"], rows)


if __name__ == "__main__":
    main()
