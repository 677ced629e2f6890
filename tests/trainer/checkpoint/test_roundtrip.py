"""What was saved is what is loaded, in a world of one."""

import hashlib

import pytest
import torch

from pretrain_trainer.checkpoint.errors import CheckpointConfigError
from pretrain_trainer.checkpoint.manager import LoadReport


def test_the_newest_checkpoint_is_loaded_in_place(manager, state, same):
    saver = manager()
    saver.save(10, state(10))
    saver.save(20, state(20))

    target = state(0)
    weight = target["model"]["a.weight"]
    report = manager(generation=2).load({**target, "ledger": (ledger := torch.zeros(20).long())})

    assert report == LoadReport(20)
    assert torch.equal(weight, state(20)["model"]["a.weight"])
    assert torch.equal(ledger, torch.arange(20))
    assert target["train_state"]["step"] == 20


def test_a_report_says_what_was_committed(manager, state, tmp_path):
    report = manager(folder="ckpt").save(10, state(10))

    folder = tmp_path / "checkpoint" / "step-10"
    listed = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    assert (report.step, report.path, report.verified) == (10, "ckpt/step-10", "local")
    assert report.bytes == listed
    assert report.seconds > 0


def test_an_empty_root_starts_afresh(manager, state, same):
    target = state(3)
    assert manager().load(target) == LoadReport(None)
    assert same(target, state(3))


def test_one_step_can_be_asked_for(manager, state, same):
    saver = manager()
    for step in (10, 11, 12):
        saver.save(step, {"model": state(step)["model"]})
    target = {"model": state(0)["model"]}
    assert manager(generation=2, load_step=11, load_only=True).load(target).step == 11
    assert same(target["model"], state(11)["model"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"load_step": 10}, r"load_step starts training at step 10, but .* \(step-12, step-11\)"),
        ({"exclude_from_loading": ("train_state",)}, r"exclude_from_loading starts .* at step 0,"),
    ],
)
def test_a_start_behind_newer_checkpoints_is_refused(manager, state, same, options, sentence):
    saver = manager()
    for step in (10, 11, 12):
        saver.save(step, {"model": state(step)["model"]})
    target = {"model": state(0)["model"]}
    with pytest.raises(CheckpointConfigError, match=sentence):
        manager(generation=2, **options).load(target)
    assert same(target["model"], state(0)["model"])


def test_what_is_saved_after_going_back_is_what_was_trained_then(manager, state, same, tmp_path):
    saver = manager()
    for step in (10, 11):
        saver.save(step, {"model": state(step)["model"]})
    (tmp_path / "checkpoint" / "step-11").rename(tmp_path / "abandoned")
    again = manager(generation=2, load_step=10)
    assert again.load({"model": state(0)["model"]}).step == 10
    again.save(11, {"model": state(99)["model"]})
    target = {"model": state(0)["model"]}
    assert manager(generation=3).load(target).step == 11
    assert same(target["model"], state(99)["model"])


def test_a_step_that_is_not_there_is_refused(manager, state):
    manager().save(10, state(10))
    with pytest.raises(CheckpointConfigError, match=r"asks for step 7, but .* has step-10"):
        manager(load_step=7).load(state(10))


def test_excluded_sections_stay_as_they_are(manager, state, same):
    manager().save(10, state(10))
    target = state(3) | {"ledger": torch.zeros(10).long()}
    options = {"exclude_from_loading": ("optimizer", "train_state"), "load_only": True}
    manager(generation=2, **options).load(target)
    assert same(target["optimizer"], state(3)["optimizer"])
    assert same(target["train_state"], state(3)["train_state"])
    assert same(target["model"], state(10)["model"])


def test_the_same_step_is_not_written_twice(manager, state, same):
    first = manager().save(10, state(10))
    again = manager(generation=2).save(10, state(11))
    assert again.time == first.time
    target = state(10)
    manager(generation=3).load(target)
    assert same(target, state(10))


def test_a_value_that_is_no_tensor_is_refused_before_anything_is_written(manager, state, tmp_path):
    with pytest.raises(TypeError, match=r"train_state\.step is a int: .* only tensors"):
        manager().save(10, {**state(10), "train_state": {"step": 10}})
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert not any("step" in name for name in names)


def test_another_model_is_refused_by_name(manager, state):
    manager().save(10, state(10))
    other = state(10)
    other["model"]["b.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointConfigError, match=r"no tensor model\.b\.weight"):
        manager(generation=2).load(other)


def test_another_shape_is_refused_and_nothing_was_filled(manager, state, same):
    manager().save(10, state(10))
    other = state(3) | {"ledger": torch.zeros(11).long()}
    with pytest.raises(CheckpointConfigError, match=r"ledger has the shape \[10\] there"):
        manager(generation=2).load(other)
    assert same(other["model"], state(3)["model"])


def test_another_fingerprint_is_refused_unless_its_section_is_excluded(manager, state):
    manager(fingerprint={"data_loader": "aaa"}).save(10, state(10))
    changed = {"generation": 2, "fingerprint": {"data_loader": "bbb"}}
    with pytest.raises(CheckpointConfigError, match="made with another data_loader"):
        manager(**changed).load(state(10))
    assert manager(**changed, exclude_from_loading=("dataloader",)).load(state(10)).step == 10


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_odd_tensors_survive(manager, same, kind):
    tensors = {
        "scalar": torch.ones((), dtype=kind),
        "empty": torch.ones(0, 3, dtype=kind),
        "transposed": torch.arange(6).reshape(2, 3).to(kind).t(),
        "slice": torch.arange(100).to(kind)[10:20],
        "large": torch.arange(5000).to(kind),
    }
    manager().save(1, {"odd": tensors})
    target = {key: torch.zeros_like(value) for key, value in tensors.items()}
    manager(generation=2).load({"odd": target})
    assert same(target, tensors)


def test_only_what_was_asked_for_is_stored_of_a_slice(manager, tmp_path):
    manager().save(1, {"model": {"slice": torch.zeros(1_000_000)[:10]}})
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint/step-1").iterdir())
    assert size < 10_000


def test_the_last_save_holds_bare_weights_in_the_export_format(manager, state):
    saver = manager(last_save_model_only=True, export_dtype="bfloat16")
    saver.save(10, state(10))
    saver.save(20, state(20), last=True)

    target = state(0)
    report = manager(generation=2).load(target)

    assert (report.step, report.complete) == (20, True)
    expected = state(20)["model"]["a.weight"].bfloat16().float()
    assert torch.equal(target["model"]["a.weight"], expected)
    assert target["train_state"]["step"] == 0


def test_the_nonce_is_not_written_anywhere(manager, state, tmp_path):
    manager(nonce="open-sesame").save(10, state(10))
    for path in tmp_path.rglob("*"):
        assert "open-sesame" not in path.name
        assert path.is_dir() or b"open-sesame" not in path.read_bytes()


def test_the_digest_names_the_algorithm_we_say():
    from pretrain_trainer.checkpoint.files import digest

    assert digest(b"x") == hashlib.blake2b(b"x", digest_size=32).hexdigest()


def test_the_digest_of_a_checkpoint_does_not_depend_on_what_is_read_together(
    manager, state, tmp_path, monkeypatch
):
    from pretrain_trainer.checkpoint import digest, tensors

    reads = []
    read = tensors.read
    monkeypatch.setattr(tensors, "read", lambda *args: reads.append(args) or read(*args))
    manager().save(10, state(10))
    found = []
    for size in (2**28, 64, 1):
        monkeypatch.setattr(digest, "BATCH_BYTES", size)
        reads.clear()
        found.append((digest.digests(tmp_path / "checkpoint" / "step-10"), len(reads)))
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][1] == len(found[0][0])  # a section at a time
    assert found[0][1] < found[2][1]
