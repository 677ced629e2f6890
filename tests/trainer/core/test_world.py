"""Which device a rank gets, and that a lost GPU never turns into slow training on the CPU."""

from pathlib import Path

import pytest
import torch

from pretrain_trainer.errors import BadInputError
from pretrain_trainer.settings import Place
from pretrain_trainer.world import choose_device, gpus_expected

TWO_OF_TWO = Place(local_rank=1, local_world_size=2)


def test_every_rank_has_a_gpu_of_its_own_or_all_have_the_cpu() -> None:
    assert choose_device(TWO_OF_TWO, usable=8, expected=True) == torch.device("cuda", 1)
    assert choose_device(TWO_OF_TWO, usable=2, expected=False) == torch.device("cuda", 1)
    assert choose_device(TWO_OF_TWO, usable=0, expected=False) == torch.device("cpu")


def test_gpus_that_can_not_be_used_are_a_failure_that_may_pass() -> None:
    with pytest.raises(RuntimeError, match="was given GPUs, but torch can't use any") as raised:
        choose_device(TWO_OF_TWO, usable=0, expected=True)
    assert not isinstance(raised.value, BadInputError)


def test_more_ranks_than_gpus_is_bad_input() -> None:
    with pytest.raises(BadInputError, match=r"workers\.processesPerWorker: 2 .* there are 1;"):
        choose_device(TWO_OF_TWO, usable=1, expected=True)


@pytest.mark.parametrize(
    ("environment", "files", "expected"),
    [
        ({}, [], False),
        ({}, ["null", "nvidiactl", "nvidia-uvm"], False),
        ({}, ["nvidia0"], True),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-8c5a2f"}, [], True),
        ({"NVIDIA_VISIBLE_DEVICES": "0,1"}, [], True),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, [], False),
        ({"NVIDIA_VISIBLE_DEVICES": "none"}, [], False),
        ({"NVIDIA_VISIBLE_DEVICES": ""}, [], False),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, [], False),  # as CUDA images have it everywhere
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, ["nvidia0"], True),  # devices injected by CDI
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], False),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["nvidia0"], False),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["nvidia0"], True),
    ],
)
def test_gpus_are_expected_where_somebody_gave_them(
    tmp_path: Path, environment: dict[str, str], files: list[str], expected: bool
) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert gpus_expected(environment, tmp_path) == expected
