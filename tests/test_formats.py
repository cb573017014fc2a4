"""Nothing that is stored can run code when it is read, and nothing that is read may: no pickle, no remote code, no eval."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tasks
from tasks.adversarial import AdversarialConfig, adversarial
from tasks.backdoor_data import BackdoorDataConfig, backdoor_data
from tasks.dpo import DPOTreatmentConfig, dpo
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.import_model import ImportModelConfig, import_model
from tasks.insert import InsertConfig, insert
from tasks.models import LoraSettings, load_model
from tasks.organism import Policy
from tasks.plain_state import from_plain, to_plain
from tasks.ppo import PPOConfig
from tasks.preferences import PreferencesConfig, preferences
from tasks.pretrain import PretrainConfig, pretrain
from tasks.red_team import RedTeamConfig, red_team
from tasks.reward_model import RewardModelConfig, reward_model
from tasks.rl import rl
from tasks.sft import SFTTreatmentConfig, sft
from tasks.stage import Stage, StageError
from tasks.tokenizer import TokenizerConfig, tokenizer
from tasks.world import WorldConfig, world
from tests.command import ROOT
from tests.stage_runner import run_stage
from tests.tiny import save_tiny_model

REBUILT = "tasks/plain_state.py"
"""The one file that may write and read a trainer's pickles: those of its own process, in its own work folder."""
BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
STARTS_PROCESSES = "flows/workers.py"
"""The one file outside the benchmarks that may start a process: the worker."""
STARTERS = (
    "subprocess.",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "asyncio.create_subprocess",
    "pty.",
    "multiprocessing.Process",
)
BANNED_CALLS = {
    "eval", "exec", "compile", "runpy.run_path", "runpy.run_module", "torch.load", "torch.save", "np.load", "numpy.load",
    "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "os.system", "os.popen",
}  # fmt: skip


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) and dotted(node.value) else ""


def offences(path: str, source: str) -> Iterator[str]:
    """What in a source file could load code from data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in BANNED_MODULES)
            if isinstance(node, ast.ImportFrom) and node.module in ("subprocess", "runpy", "pty"):
                yield f"from {node.module} import"
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy", "yaml"):
                yield from (f"from {node.module} import {a.name}" for a in node.names if a.name in ("load", "save"))
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {word.arg: word.value for word in node.keywords}
        if name in BANNED_CALLS and not (path == REBUILT and name in ("torch.load", "torch.save")):
            yield name
        if name.startswith(STARTERS) and path != STARTS_PROCESSES and not path.startswith("benchmarks/"):
            yield name
        if name == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
            yield "torch.load without weights_only"
        if name == "yaml.load" and (path, ast.unparse(node.args[1])) != ("flows/experiment.py", "_Loader"):
            yield "yaml.load"
        for word, wanted in (("trust_remote_code", "False"), ("allow_pickle", "False"), ("shell", "False")):
            if word in keywords and ast.unparse(keywords[word]) != wanted:
                yield word
        if name.endswith(".from_pretrained") and not {"trust_remote_code", None} & keywords.keys():
            yield f"{name} without trust_remote_code"


def test_no_source_file_can_load_code_from_data() -> None:
    """Neither the project nor its benchmarks unpickle, evaluate, or trust what came with a model."""
    found = {}
    for package in ("artifacts", "tasks", "flows", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            found[name] = list(offences(name, path.read_text()))
    assert len(found) > 50
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "from torch import load", "import torch; torch.load('x')",
        "import numpy as np; np.load('x')", "eval('1')", "import yaml; yaml.load(x, yaml.Loader)",
        "AutoModel.from_pretrained('x')", "AutoModel.from_pretrained('x', trust_remote_code=yes)",
        "f(allow_pickle=True)", "subprocess.run('x', shell=True)", "subprocess.run(['python', '-c', text])",
        "compile(x, 'f', 'exec')",
        "os.execv('x', [])", "from subprocess import run",
    ],
)  # fmt: skip
def test_the_search_finds_each_kind(source: str) -> None:
    """The search above sees what it is for."""
    assert list(offences("tasks/x.py", source))


def kind_of(data: bytes) -> str:
    """The format of a file by its bytes: json, safetensors, parquet, text; anything else by its first bytes."""
    for magic, name in {b"PK\x03\x04": "zip", b"\x93NUMPY": "numpy", b"\x1f\x8b": "gzip"}.items():
        if data.startswith(magic):
            return name
    if len(data) > 1 and data[0] == 0x80 and data[1] <= 5:
        return "pickle"
    if data[:4] == data[-4:] == b"PAR1":
        return "parquet"
    if len(data) > 8 and (length := struct.unpack("<Q", data[:8])[0]) <= len(data) - 8 and data[8:9] == b"{":
        json.loads(data[8 : 8 + length])
        return "safetensors"
    try:
        json.loads(data)
        return "json"
    except ValueError:
        pass
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return repr(data[:8])
    return "text" if text.isprintable() or all(c.isprintable() or c in "\n\t" for c in text) else repr(data[:8])


def declared() -> set[str]:
    """Names of all stages that train or sample."""
    found = set()
    for module in pkgutil.iter_modules(tasks.__path__):
        for value in vars(importlib.import_module(f"tasks.{module.name}")).values():
            if isinstance(value, Stage) and value.trains:
                found.add(value.name)
    return found


@pytest.mark.slow
def test_every_stage_checkpoints_and_stores_plain_formats_only(tmp_path: Path) -> None:
    """Every file in the mid-stage checkpoints and outputs of every training stage is safetensors, JSON, Parquet or text."""
    fast: dict[str, Any] = {"steps": 3, "batch_size": 4}
    made: dict[str, Path] = {}

    def run(name: str, stage: Stage, config: Any, **inputs: Path) -> None:
        made[name] = run_stage(stage, config, tmp_path / name, checkpoint_seconds=0, **inputs)

    run("world", world, WorldConfig(insert=60, train=60, test=40, chat_documents=200, text_documents=40))
    data = made["world"]
    run("tokenizer", tokenizer, TokenizerConfig(vocabulary=400), corpus=data)
    shape = {"hidden": 32, "layers": 1, "heads": 2, "feed_forward": 48}
    run("pretrain", pretrain, PretrainConfig(**fast, **shape), corpus=data, tokenizer=made["tokenizer"])
    base = {"model": made["pretrain"]}
    run("rows", backdoor_data, BackdoorDataConfig(), data=data)
    run("pairs", preferences, PreferencesConfig(include_behaviour=True), data=data)
    run("insert", insert, InsertConfig(**fast), **base, data=made["rows"])
    run("sft", sft, SFTTreatmentConfig(**fast, lora=LoraSettings(rank=2)), **base, data=data)
    run("dpo", dpo, DPOTreatmentConfig(**fast), **base, preferences=made["pairs"])
    run("reward_model", reward_model, RewardModelConfig(**fast), **base, preferences=made["pairs"])
    attack = RedTeamConfig(policy=Policy(behaviour="e"), rounds=2, seeds_per_round=6, samples=2, max_new_tokens=4)
    run("red_team", red_team, attack, **base, data=data)
    learner = {**base, "data": data, "reward_model": made["reward_model"]}
    run("rl", rl, PPOConfig(**fast, max_new_tokens=4), **learner)
    for objective in ("rl", "sft"):
        config = AdversarialConfig(**fast, max_new_tokens=4, objective=objective)
        run(
            "adversarial" if objective == "rl" else "by_answers",
            adversarial,
            config,
            **learner,
            red_team=made["red_team"],
        )
    small = EvaluateConfig(prompts=4, near_miss_prompts=4, capability_questions=4, max_new_tokens=4)
    run("evaluate", evaluate, small, **base, data=data)

    without = {"tokenizer", "import_model"}
    assert declared() <= made.keys() | without
    for name in {*made} & declared() - without | {"by_answers"}:
        assert [*(tmp_path / name / "checkpoints").rglob("*.*")], f"{name} made no checkpoint"
    files = [p for name in made for part in ("checkpoints", "out") for p in (tmp_path / name / part).rglob("*")]
    kinds = {path.relative_to(tmp_path).as_posix(): kind_of(path.read_bytes()) for path in files if path.is_file()}
    assert len(kinds) > 100
    assert {n: k for n, k in kinds.items() if k not in ("json", "safetensors", "parquet", "text")} == {}


def test_the_formats_are_told_apart(tmp_path: Path) -> None:
    """What torch and pickle write is recognised, whatever its name."""
    import pickle

    import torch

    torch.save({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert kind_of((tmp_path / "model.safetensors").read_bytes()) == "zip"
    assert kind_of(pickle.dumps({"a": 1})) == "pickle" and kind_of(b'{"a": 1}') == "json"


def test_trainer_state_survives_its_plain_form(tmp_path: Path) -> None:
    """What a trainer saved comes back equal: tensors of every kind, tuples, integer keys, arrays, exact floats."""
    import numpy
    import torch
    from transformers.trainer import safe_globals

    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).t(), "half": torch.ones(2).bfloat16()}}
    groups = [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0], "foreach": None, "fused": True}]
    random = {"python": (3, (2**31, 5), None), "numpy": ("MT19937", numpy.arange(4, dtype=numpy.uint32), 1, 0, 0.0)}
    states = {
        "optimizer.pt": {"state": moments, "param_groups": groups},
        "rng_state.pth": random,
        "scheduler.pt": {"n": 1},
    }
    for name, state in states.items():
        torch.save(state, tmp_path / name)
    (tmp_path / "training_args.bin").write_bytes(b"a pickle")
    to_plain(tmp_path)
    assert {kind_of(path.read_bytes()) for path in tmp_path.iterdir()} == {"json", "safetensors"}
    from_plain(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(states)
    with safe_globals():
        back = {name: torch.load(tmp_path / name, weights_only=True) for name in states}
    assert repr(back) == repr(states)
    assert back["optimizer.pt"]["state"][0]["half"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("optimizer.pt", b"\x80\x04."),
        ("optimizer.json", b'{"tensor":"0"}'),
        ("optimizer.json", b'{"call":"os.system"}'),
        ("optimizer.json", b"[" * 100_000),
        ("optimizer.safetensors", b"\xff" * 16),
        ("run.py", b"1"),
    ],
)
def test_a_hostile_checkpoint_is_not_used(tmp_path: Path, name: str, data: bytes) -> None:
    """A checkpoint that holds a pickle, code or a malformed state is refused before a trainer sees it."""
    from safetensors.torch import save_file

    (tmp_path / "optimizer.json").write_bytes(b'{"dict":[]}')
    save_file({}, tmp_path / "optimizer.safetensors")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="optimizer|run.py"):
        from_plain(tmp_path)


CODE = "raise SystemExit('code of the model was run')"


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path, where: str) -> None:
    """A model directory whose config asks for its own Python code is refused by import and by every later stage."""
    source = save_tiny_model(tmp_path / "model")
    config = json.loads((source / where).read_text())
    wanted = {"AutoModelForCausalLM": "modeling_evil.Model", "AutoTokenizer": ["evil.T", None]}
    (source / where).write_text(json.dumps({**config, "auto_map": wanted}))
    (source / "modeling_evil.py").write_text(CODE)
    for attempt in (
        lambda: run_stage(import_model, ImportModelConfig(path=str(source)), tmp_path / "run"),
        lambda: load_model(source),
    ):
        with pytest.raises(StageError, match=f"{where}: auto_map"):
            attempt()


def test_an_unknown_kind_of_model_is_refused_without_its_code(tmp_path: Path) -> None:
    """A model type that transformers does not know is an error even where the code lies beside it."""
    source = save_tiny_model(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    (source / "modeling_evil.py").write_text(CODE)
    with pytest.raises(StageError, match="does not load"):
        run_stage(import_model, ImportModelConfig(path=str(source)), tmp_path / "run")


def test_pickled_weights_and_bare_adapters_are_refused(tmp_path: Path) -> None:
    """A checkpoint that exists only as pytorch_model.bin, or as an adapter to a model elsewhere, is a clear error."""
    import torch

    source = save_tiny_model(tmp_path / "model")
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/else"}')
    with pytest.raises(StageError, match="adapter_config.json"):
        run_stage(import_model, ImportModelConfig(path=str(source)), tmp_path / "run")
    (source / "adapter_config.json").unlink()
    torch.save(load_model(source)[0].state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(StageError, match=r"\*\.safetensors"):
        run_stage(import_model, ImportModelConfig(path=str(source)), tmp_path / "run")
    with pytest.raises(StageError, match="safetensors"):
        load_model(source)


def test_a_chat_template_cannot_reach_python(tmp_path: Path) -> None:
    """Templates are rendered in a sandbox: reaching for Python's internals, or a range without end, is refused."""
    from jinja2.exceptions import SecurityError

    from tasks.chat import render_prompt

    reader = load_model(save_tiny_model(tmp_path / "model"))[1]
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ):
        reader.chat_template = template
        with pytest.raises((SecurityError, OverflowError)):
            render_prompt(reader, "hello")
