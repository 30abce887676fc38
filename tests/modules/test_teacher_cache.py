"""The teacher's outputs on disk: computed once, the same losses, never another teacher's or other data's."""

from collections import namedtuple
from unittest.mock import patch

import pytest
import torch
from students import Task, data, fit, network
from torch.utils.data import DataLoader, Dataset

from lightning_edge import DistillationModule, DistillationTerm
from lightning_edge.modules.teacher_cache import TeacherCache, row_keys, teacher_key
from lightning_edge.surgery.distillation import Call

TERMS = {
    "soft": DistillationTerm(),
    "hint": DistillationTerm("hint", layers={"conv": "conv"}),
}


class Killed(Exception):
    pass


def counting(width=16):
    """Return a teacher that remembers how many rows it has computed."""
    teacher = network(1, width)
    teacher.rows = 0

    def count(_, args):
        teacher.rows += len(args[0])

    teacher.register_forward_pre_hook(count)
    return teacher


def distilled(folder, cache, *callbacks, teacher=None, **options):
    teacher = teacher or counting()
    module = DistillationModule(Task(network()), teacher, TERMS, cache=cache)
    teacher.rows = 0
    trainer = fit(module, folder, *callbacks, **options)
    return module, trainer, teacher.rows


def test_the_losses_are_those_without_a_cache_and_every_row_is_computed_once(tmp_path):
    plain, without, _ = distilled(tmp_path / "plain", None, epochs=3)
    cached, within, rows = distilled(tmp_path / "cached", tmp_path / "cache", epochs=3)
    assert rows == 48 + 2 + 2  # two rows are tried before the fit, and once more in reverse
    for name in ("soft", "hint", "task"):
        expected = without.callback_metrics[f"distillation/{name}"]
        torch.testing.assert_close(within.callback_metrics[f"distillation/{name}"], expected, atol=1e-5, rtol=1e-5)
    for name, value in plain.student_state_dict().items():
        torch.testing.assert_close(cached.student_state_dict()[name], value, atol=1e-4, rtol=1e-4)


def test_another_run_computes_nothing(tmp_path):
    first, _, _ = distilled(tmp_path / "first", tmp_path / "cache")
    second, _, rows = distilled(tmp_path / "second", tmp_path / "cache")
    assert rows == 0
    third, _, _ = distilled(tmp_path / "third", tmp_path / "cache")
    assert all(torch.equal(value, third.state_dict()[name]) for name, value in second.state_dict().items())
    assert first.state_dict().keys() == second.state_dict().keys()


def test_a_changed_teacher_or_changed_data_are_computed_anew(tmp_path):
    distilled(tmp_path / "first", tmp_path / "cache")
    other = counting()
    with torch.no_grad():
        other.fc.bias[0] += 1e-3
    _, _, rows = distilled(tmp_path / "teacher", tmp_path / "cache", teacher=other)
    assert rows == 48 + 2 + 2
    images, labels = data().tensors
    images[:5] += 1e-6
    loader = DataLoader(torch.utils.data.TensorDataset(images, labels), 16, shuffle=True)
    _, _, rows = distilled(tmp_path / "data", tmp_path / "cache", loader=loader, epochs=1)
    assert 0 < rows <= 48 + 2 + 2


@pytest.mark.parametrize("shard_rows", [7, 4096])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, shard_rows):
    monkeypatch.setattr("lightning_edge.modules.teacher_cache._SHARD_ROWS", shard_rows)

    class Dies(Task):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 5:
                raise Killed

    options = {"epochs": 3, "limit_train_batches": 2}  # not all rows are known after the first epoch
    whole, _, _ = distilled(tmp_path / "whole", tmp_path / "one", **options)
    dies = DistillationModule(Dies(network()), counting(), TERMS, cache=tmp_path / "two")
    with pytest.raises(Killed):
        fit(dies, tmp_path / "cut", **options)
    last = tmp_path / "cut" / "epoch=1.ckpt"
    resumed, _, _ = distilled(tmp_path / "cut", tmp_path / "two", ckpt_path=last, **options)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_augmented_data_are_said_to_be_of_no_use_and_fill_no_disk(tmp_path):
    class Noisy(Dataset):
        def __len__(self):
            return 48

        def __getitem__(self, index):
            image, label = data()[index]
            return image + torch.rand(()), label

    with pytest.warns(UserWarning, match="gave none of its 48 rows in this epoch, and is not used any more"):
        distilled(tmp_path / "fit", tmp_path / "cache", loader=DataLoader(Noisy(), 16), epochs=4)
    shards = [torch.load(path, weights_only=True) for path in (tmp_path / "cache").glob("*/*.pt")]
    assert sum(len(shard["keys"]) for shard in shards) == 2 * 48


def test_two_ranks_read_each_other_s_rows_after_the_epoch(tmp_path):
    def teach(args, kwargs):
        return Call(args, kwargs, {"logits": 2 * args[0]}, {"conv": args[0] + 1})

    def never(args, kwargs):
        raise AssertionError("computed again")

    first, second = TeacherCache(tmp_path), TeacherCache(tmp_path)
    left, right = torch.rand(3, 2), torch.rand(4, 2)
    first.answer((left,), {}, teach)
    second.answer((right,), {}, teach)
    for cache in (first, second):
        cache.flush()
    for cache in (first, second):
        cache.close_epoch()
    taught = first.answer((torch.cat([right, left]),), {}, never)
    assert torch.equal(taught.output["logits"], 2 * torch.cat([right, left]))
    assert torch.equal(taught.features["conv"], torch.cat([right, left]) + 1)
    assert torch.equal(TeacherCache(tmp_path).answer((left,), {}, never).output["logits"], 2 * left)


def test_a_shard_is_whole_or_not_there(tmp_path, monkeypatch):
    cache, rows = TeacherCache(tmp_path), torch.rand(3, 2)
    cache.answer((rows,), {}, lambda args, kwargs: Call(args, kwargs, args[0], {}))
    real = torch.save

    def dies(shard, path):
        real(shard, path)
        path.write_bytes(path.read_bytes()[:100])
        raise Killed

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        cache.flush()
    assert not list(tmp_path.glob("*.pt"))
    assert (
        TeacherCache(tmp_path).answer((rows,), {}, lambda args, kwargs: Call(args, kwargs, -args[0], {})).output[0, 0]
        < 0
    )


def test_a_teacher_without_a_row_for_each_row_is_refused(tmp_path):
    rows = torch.rand(3, 2)
    for output in (rows.flatten(), rows.sum(), {"logits": rows, "count": 3}):
        with pytest.raises(
            ValueError, match="cache must be None for a teacher that does not give tensors with one row"
        ):
            TeacherCache(tmp_path).answer(
                (rows,), {}, lambda args, kwargs, output=output: Call(args, kwargs, output, {})
            )


def test_a_teacher_whose_rows_depend_on_each_other_is_refused(tmp_path):
    rows = torch.rand(4, 2)
    for teach in (
        lambda args, kwargs: Call(args, kwargs, args[0].cumsum(0), {}),  # time comes first
        lambda args, kwargs: Call(args, kwargs, args[1] @ args[0], {}),  # a graph
    ):
        with pytest.raises(ValueError, match="cache must be None for a teacher that gives other rows .* another order"):
            TeacherCache(tmp_path).answer((rows, torch.rand(4, 4)), {}, teach)
    assert not list(tmp_path.iterdir())


def test_a_shard_that_cannot_be_read_is_named_and_computed_again(tmp_path):
    rows = torch.rand(3, 2)
    cache = TeacherCache(tmp_path)
    cache.answer((rows,), {}, lambda args, kwargs: Call(args, kwargs, args[0], {}))
    cache.flush()
    (shard,) = tmp_path.glob("*.pt")
    for left in (0, 100):
        shard.write_bytes(shard.read_bytes()[:left])
        with pytest.warns(UserWarning, match=f"cache must hold whole files, got .*{shard.name}, which cannot be read"):
            again = TeacherCache(tmp_path)
        assert torch.equal(
            again.answer((rows,), {}, lambda args, kwargs: Call(args, kwargs, -args[0], {})).output, -rows
        )


def test_a_cache_that_cannot_be_kept_is_refused(tmp_path):
    Pair = namedtuple("Pair", "logits")
    with pytest.raises(ValueError, match="cache must be None for a teacher that gives a Pair, .* return a tensor"):
        TeacherCache(tmp_path).answer(
            (torch.rand(3, 2),), {}, lambda args, kwargs: Call(args, kwargs, Pair(args[0]), {})
        )
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "deep" / "cache"):
        with pytest.raises(ValueError, match="cache must be a folder, got .*, where .*file' is a file"):
            DistillationModule(Task(), network(), cache=cache)
    with patch("os.access", return_value=False), pytest.raises(ValueError, match="cache must be a folder that can be"):
        DistillationModule(Task(), network(), cache=tmp_path / "new")


def test_two_precisions_have_rows_of_their_own(tmp_path):
    distilled(tmp_path / "first", tmp_path / "cache")
    _, _, rows = distilled(tmp_path / "second", tmp_path / "cache", precision="bf16-mixed")
    assert rows > 0


def test_rows_are_told_apart_by_every_input():
    rows, mask = torch.zeros(2, 3), torch.tensor([[True], [False]])
    plain = row_keys((rows,), {})
    assert plain[0] == plain[1]
    masked = row_keys((rows,), {"mask": mask})
    assert len({*plain, *masked}) == 3
    assert row_keys((rows,), {"mask": mask[1]})[0] not in {*plain, *masked}
    assert row_keys((rows,), {"scale": 2})[0] != row_keys((rows,), {"scale": 3})[0]
    assert row_keys((rows.int(),), {})[0] != plain[0]
    assert row_keys((rows.view(2, 1, 3),), {})[0] != plain[0]


def test_teachers_are_told_apart_by_weights_layers_and_settings():
    teacher, other = network(1), network(1)
    other.conv.dilation = (2, 2)
    scaled, masked = network(1), network(1)
    scaled.scale = 2.0
    masked.register_buffer("mask", torch.ones(1), persistent=False)
    keys = [
        teacher_key(teacher, [], precision=None),
        teacher_key(network(2), [], precision=None),
        teacher_key(teacher, ["conv"], precision=None),
        teacher_key(teacher, [], precision="bf16"),
        teacher_key(other, [], precision=None),
        teacher_key(scaled, [], precision=None),
        teacher_key(masked, [], precision=None),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == teacher_key(network(1), [], precision=None)
