"""What a rank is told: by torchrun and the agent through the environment, by the user in a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pretrain_api import names
from pretrain_api.config import RunConfig
from pretrain_trainer.errors import BadInputError


@dataclass(frozen=True, slots=True)
class Place:
    """This process among its peers. Without torchrun it is alone; without an agent, unsupervised.

    ``generation`` grows with every new world of a job, ``round`` counts restarts within one.
    ``namespace`` is set in a cluster, where generations count from 1; elsewhere each is a new
    start by a person. ``board`` is the path of the shared memory the supervisor watches.
    ``saved_step`` is the step of a checkpoint that was committed before this generation.
    """

    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    world_size: int = 1
    board: Path | None = None
    generation: int = 0
    round: int = 0
    nonce: str = ""
    job_uid: str = ""
    namespace: str = ""
    saved_step: int | None = None

    @property
    def first_start(self) -> bool:
        """A person started this, not a recovery, so options about a beginning apply."""
        return self.round == 0 and (self.generation <= 1 or not self.namespace)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Place":
        """Read torchrun's and the agent's variables; all have defaults."""
        board = environment.get(names.ENV_BOARD)
        saved = environment.get(names.ENV_SAVED_STEP)
        return cls(
            rank=int(environment.get("RANK", 0)),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", 1)),
            world_size=int(environment.get("WORLD_SIZE", 1)),
            board=Path(board) if board else None,
            generation=int(environment.get(names.ENV_GENERATION, 0)),
            round=int(environment.get(names.ENV_ROUND, 0)),
            nonce=environment.get(names.ENV_NONCE, ""),
            job_uid=environment.get(names.ENV_JOB_UID, ""),
            namespace=environment.get(names.ENV_NAMESPACE, ""),
            saved_step=int(saved) if saved else None,
        )


def load_config(path: Path) -> RunConfig:
    """Read the run's configuration.

    Raises:
        BadInputError: naming the file, and every key that is wrong with what is wrong about it.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise BadInputError(f"{path}: can't read the configuration: {error.strerror}") from error
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise BadInputError(f"{path}: {problems}") from error
