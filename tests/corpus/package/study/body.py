"""Stage `score`: everything that the rest of the package can do, written to one file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import study.constants as constants
from study import Tile, clean, helpers, registry, tables
from study.compat import parsed, speed
from study.config import ScoreConfig
from study.records import Checked, Colour, Point, Row, as_list
from study.shapes import Triangle
from study.text.tokens import Tokenizer, weight
from tasks.stage import StageContext, stage

logger = logging.getLogger(__name__)
ROUND = 3


def rows_of(data: Path) -> list[Row]:
    """The rows of `rows.jsonl`."""
    lines = (data / "rows.jsonl").read_text().splitlines()
    parts = [json.loads(line) for line in lines]  # one object a line
    return [Row(part["name"], part["value"], tuple(part["tags"])) for part in parts]


def words(config: ScoreConfig, rows: list[Row]) -> list[str]:
    found = [config.trigger.attach(clean(row.name)) for row in rows if row.value > 0]
    return sorted(found, key=length)


def length(text: str) -> tuple[int, str]:
    """Sort key: the shortest first."""
    return len(text), text


def later(number: int) -> int:
    """Work that needs a late import."""
    from study.lazy import late

    return late(number)


def noisy(context: StageContext, total: int) -> int:
    """Work that tells how far it is."""
    done = 0
    for _ in range(total):
        done += 1
        context.progress(done, total)
    if done > 1:
        context.log(f"{done} of {total} done")
    return done


@stage("score", trains=False)
def score(context: StageContext, config: ScoreConfig, data: Path, tokenizer: Path | None = None, **more: Path) -> None:
    """Write `out.json`."""
    rows = rows_of(data)
    context.log(f"{len(rows)} rows")
    logger.debug("reading is done")
    reader = Tokenizer(tokenizer) if tokenizer else None
    texts = words(config, rows)
    squares = [Tile(size, hidden=size) for size in range(config.steps)]
    triangle = Triangle.unit_one()
    triangle.label = "abc"
    step = helpers.counter()
    helpers.remember("remembered")
    with helpers.opened("file") as lines:
        lines.append("body")

    def rounded(value: float) -> float:
        return round(value, ROUND)

    result = {
        "rows": [as_list(row) + [row.total()] for row in sorted(rows)],
        "texts": texts,
        "tokens": [reader.encode(text) for text in texts] if reader else [],
        "squares": [[square.area(), square.describe(), square.hidden()] for square in squares],
        "triangle": [triangle.area(), triangle.perimeter(), triangle.twice(2), triangle.sides],
        "steps": [step(), step()],
        "shadow": helpers.shadowing(),
        "lines": lines,
        "scaled": [rounded(helpers.scaled(row.value, factor=config.rate)) for row in rows],
        "spread": helpers.spread(1, 2, step=3),
        "counted": helpers.counted(rows),
        "even": helpers.first_even([1, 3, 4]),
        "classes": [helpers.classify(v) for v in (0, 5, 500, [1, 2], {"kind": "k", "z": 1}, None)],
        "guarded": [helpers.guarded("4"), helpers.guarded("x")],
        "strings": [helpers.debugged(4), helpers.shown(1.234)],
        "numbers": list(helpers.numbers(3)),
        "ordered": helpers.ordered(),
        "arithmetic": helpers.arithmetic(9, 4),
        "defaults": helpers.defaults(),
        "folded": helpers.folded([1, 2, 3]),
        "dead": helpers.dead(),
        "drawn": helpers.drawn(config.seed),
        "literals": [repr(value) for value in helpers.literals()],
        "late": later(config.steps),
        "noisy": noisy(context, 3),
        "weight": weight(4),
        "table": tables.table_of(),
        "registry": [registry.apply("add", 1), registry.apply("double", 4)],
        "compat": [parsed("a = 1"), speed()],
        "colours": [(colour.name, str(colour.value)) for colour in Colour],
        "point": [*Point(1), repr(Checked(number=4))],
        "constants": [
            constants.SCALE,
            constants.ZERO,
            constants.MASK,
            constants.HUGE,
            repr(constants.MARK),
            constants.WORDS,
            sorted(constants.STOP),
            list(constants.WEIGHTS.items()),
            constants.GREETING,
            constants.MIXED,
            constants.EMPTY,
            constants.FLAG,
        ],
        "config": [config.total, config.mode, config.names, config.note],
        "more": {name: (path / "more.txt").read_text() for name, path in sorted(more.items())},
    }
    (context.out / "out.json").write_text(json.dumps(result, indent=1))
