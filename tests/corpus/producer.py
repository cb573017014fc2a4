"""A stage that stands for whatever made an input of the stage under test."""

from tasks.stage import StageConfig, StageContext, stage


class FileConfig(StageConfig):
    """Makes a producer differ without its output."""

    revision: int = 0


@stage("file")
def file(context: StageContext, config: FileConfig) -> None:
    """Stands for whatever made an input; never run."""
