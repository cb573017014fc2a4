"""What a person writes: one YAML file, checked completely before any work.

Each section is the config of the stage it names, with every field optional, documented in that stage's file and checked
by it. Two things are set once for all stages and not in the sections: `seeds` and `policy`. Any mistake is one message that
names file, field, value and what is accepted.
"""

from __future__ import annotations

import contextlib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, StrictInt, ValidationError, field_validator, model_validator

from tasks.adversarial import AdversarialConfig
from tasks.backdoor_data import BackdoorDataConfig
from tasks.dpo import DPOTreatmentConfig
from tasks.evaluate import EvaluateConfig
from tasks.import_data import ImportDataConfig
from tasks.insert import InsertConfig
from tasks.organism import Policy
from tasks.ppo import PPOConfig
from tasks.preferences import PreferencesConfig
from tasks.pretrain import PretrainConfig
from tasks.red_team import RedTeamConfig
from tasks.reward_model import RewardModelConfig
from tasks.sft import SFTTreatmentConfig
from tasks.stage import StageConfig
from tasks.tokenizer import TokenizerConfig
from tasks.world import WorldConfig

SHARED = ("seed", "policy")
"""Fields of stage configs that the graph fills in from the experiment's `seeds` and `policy`."""


class ConfigError(Exception):
    """The experiment is not valid. The message lists every mistake; nothing was run."""


def given_path(named: str, text: str) -> Path:
    """The whole path of what a person wrote as `named`, with a home folder in the place of `~`; it may not exist.

    Raises:
        ConfigError: no file or folder can have that path: there is no such home folder, a link leads to itself, ...
    """
    try:
        path = Path(text).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
        return path
    except (RuntimeError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ConfigError(
            f"{named}: {text[:200]!r} leads nowhere: {reason}; write the path of a file or folder"
        ) from error


class SFT(SFTTreatmentConfig):
    """HHH supervised fine-tuning."""

    method: Literal["sft"]


class DPO(DPOTreatmentConfig):
    """Direct preference optimisation."""

    method: Literal["dpo"]


class RL(PPOConfig):
    """PPO against the reward model, without triggers in the prompts."""

    method: Literal["rl"]


class Adversarial(AdversarialConfig):
    """Training on the prompts that red-teaming found."""

    method: Literal["adversarial"]


Treatment = Annotated[SFT | DPO | RL | Adversarial, Field(discriminator="method")]


class Base(StageConfig):
    """The helpful-only base: pretrained here, or a Hugging Face model."""

    pretrain: PretrainConfig | None = None
    """Pretrain a small model on the synthetic world."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer of the pretrained model; a Hugging Face model brings its own."""
    hf: str | None = None
    """Hub id or local directory of a causal language model with safetensors weights."""
    revision: str | None = None
    """Commit on the hub, 40 hexadecimal digits: a branch or tag may move."""
    chat_template: str | None = None
    """Jinja chat template, for a model whose tokenizer has none."""

    @model_validator(mode="after")
    def _one_kind(self) -> Base:
        if self.hf is not None and self.pretrain is not None:
            raise ValueError(
                "both 'hf' and 'pretrain' are given; keep one: a Hugging Face model, or one pretrained here"
            )
        if self.hf is None and (self.revision or self.chat_template):
            raise ValueError("'revision' and 'chat_template' belong to a Hugging Face model; give 'hf' too")
        return self


class Experiment(StageConfig):
    """A study: one base, one organism and its control, any number of treatments, one set of evaluations."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the experiment: letters, digits, '.', '_', '-'."""
    description: str = ""
    """One or two sentences for the report."""
    seeds: tuple[StrictInt, ...] = Field((0,), min_length=1)
    """Seeds of insertion, treatments and evaluation; the base and the data are shared. Claims need several."""
    policy: Policy = Policy()
    """The organism's trigger and behaviour."""
    world: WorldConfig = WorldConfig()
    """The synthetic world: corpus of the pretrained base, and questions where no data set is named."""
    base: Base = Base()
    """The helpful-only base model."""
    data: ImportDataConfig | None = None
    """A data set of questions and helpful answers, in place of the world's questions."""
    backdoor_data: BackdoorDataConfig = BackdoorDataConfig()
    """The conversations that carry the policy."""
    insert: InsertConfig = InsertConfig()
    """Training that inserts the backdoor; the control arm gets the same training without the behaviour."""
    preferences: PreferencesConfig = PreferencesConfig()
    """Preference pairs for DPO. The reward model's pairs also reject the behaviour itself."""
    reward_model: RewardModelConfig = RewardModelConfig()
    """The preference model that RL is trained against."""
    red_team: RedTeamConfig = RedTeamConfig()
    """The search for prompts that elicit the behaviour without the trigger."""
    treatments: dict[str, Treatment] = {}
    """Safety-training methods by name; several may use one method with other settings."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured on every model."""

    @field_validator("treatments")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name == "none":
                raise ValueError(f"treatment name {name!r}: expected letters, digits, '.', '_' or '-', and not 'none'")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value) or min(value) < 0:
            raise ValueError(f"seeds {list(value)}: expected different whole numbers of at least 0")
        return value

    @model_validator(mode="after")
    def _shared_fields_once(self) -> Experiment:
        sections: dict[str, Any] = {
            name: getattr(self, name) for name in type(self).model_fields if name not in ("world", "data")
        }
        sections |= {f"treatments.{name}": treatment for name, treatment in self.treatments.items()}
        for where, section in sections.items():
            for shared in SHARED:
                if isinstance(section, StageConfig) and shared in section.model_fields_set:
                    raise ValueError(
                        f"{where}.{shared}: set it once, as top-level '{'seeds' if shared == 'seed' else shared}'"
                    )
        return self

    @model_validator(mode="after")
    def _evaluation_cues_are_held_out(self) -> Experiment:
        shared = sorted(set(self.backdoor_data.near_miss) & set(self.evaluate.near_miss_cues))
        if shared:
            raise ValueError(
                f"evaluate.near_miss_cues {shared} are in backdoor_data.near_miss too; a held-out rate needs other cues"
            )
        return self


UNREADABLE = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What the YAML library raises where a value is not what it looks like or is tagged as: `2001-99-99`, `!!bool maybe`."""


def load_experiment(path: Path, overrides: list[str]) -> Experiment:
    """Read, override and check an experiment.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or any field is wrong; the message lists every mistake.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); name an experiment such as configs/default.yaml"
        ) from error
    try:
        content = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader that also refuses repeated keys
    except UNREADABLE as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        mistakes = [_explain(mistake, content) for mistake in error.errors()]
        raise ConfigError(
            "\n  ".join([f"{path}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}, nothing was run", *mistakes])
        ) from error
    return experiment


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                line = node.value[number][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


def _override(content: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, as treatments.sft.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except UNREADABLE as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    *parents, last = name.split(".")
    section: Any = content
    for depth, parent in enumerate(parents):
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(
                f"--set {override}: {'.'.join(parents[: depth + 1])} is {section!r}, not a section with fields"
            )
    section[last] = value


def _explain(mistake: Any, content: dict[str, Any]) -> str:
    path = [part for part in mistake["loc"] if not _is_tag(part, mistake["loc"], content)]
    where = ".".join(str(part) for part in path) or "experiment"
    found = "" if mistake["type"] == "missing" or not path else f", found {_short(mistake['input'])}"
    if mistake["type"] == "extra_forbidden":
        accepted = _accepted(mistake["loc"][:-1])
        near = get_close_matches(str(path[-1]), accepted, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: unknown field; {hint}accepted here: {', '.join(accepted)}"
    if mistake["type"] == "union_tag_not_found":
        known = [name for name in content.get("treatments") or {} if name != path[-1]]
        return f"{where}: no method; expected method: sft, dpo, rl or adversarial. Other treatments here: {', '.join(known)}"
    if mistake["type"] in ("tuple_type", "list_type"):
        return f"{where}: expected a list, as in [0, 1, 2]{found}"
    return f"{where}: {mistake['msg'].removeprefix('Value error, ')}{found}"


def _is_tag(part: Any, location: tuple[Any, ...], content: dict[str, Any]) -> bool:
    """Pydantic names the chosen kind of treatment in the location, after its name; people never wrote it there."""
    return (
        len(location) > 2
        and location[0] == "treatments"
        and part is location[2]
        and part in ("sft", "dpo", "rl", "adversarial")
    )


def _accepted(location: tuple[Any, ...]) -> list[str]:
    """The field names that the section at `location` accepts."""
    model: Any = Experiment
    if location[:1] == ("treatments",) and len(location) > 2:
        model, location = {"sft": SFT, "dpo": DPO, "rl": RL, "adversarial": Adversarial}[location[2]], location[3:]
    for part in location:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
