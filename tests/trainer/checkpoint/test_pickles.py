"""Tables pickled by other releases of Python are read; names behind getattr are not."""

import io
import pickle
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from pretrain_trainer.checkpoint import metadata
from pretrain_trainer.checkpoint.errors import DamagedError


class ByGetattr:
    """Pickles itself as an attribute of something else."""

    def __init__(self, kind: Any, name: str) -> None:
        self.parts = (kind, name)

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return (getattr, self.parts)


def read(value: object) -> object:
    return metadata._AllowListUnpickler(io.BytesIO(pickle.dumps(value))).load()


def test_an_enums_member_may_be_pickled_as_an_attribute() -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    assert read(ByGetattr(_MEM_FORMAT_ENCODING, member.name)) is member


@pytest.mark.parametrize("kind", [pickle.Unpickler, _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST])
def test_no_other_attribute_is_reachable(kind: Any) -> None:
    with pytest.raises(DamagedError):
        read(ByGetattr(kind, "__class__"))
