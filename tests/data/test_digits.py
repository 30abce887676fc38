import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from lightning_edge.data import DigitsDataModule
from lightning_edge.modules import ClassificationModule


def prepared(**options):
    data = DigitsDataModule(**options)
    data.prepare_data()
    data.setup()
    return data


def images_of(*parts):
    return {image.numpy().tobytes() for part in parts for image in part.images}


def test_the_parts_hold_every_image_once():
    data = prepared()
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    # No two of the digits are equal, so that an image says where it is.
    assert len(images_of(data.train, data.validation, data.test)) == 1797


def test_the_test_images_are_the_same_for_every_seed_and_the_others_are_not():
    one, other = prepared(seed=0), prepared(seed=7, validation_fraction=0.3)
    assert torch.equal(one.test.images, other.test.images)
    assert images_of(one.validation) != images_of(prepared(seed=7).validation)
    assert torch.equal(one.validation.images, prepared(seed=0).validation.images)


def test_every_part_has_its_share_of_every_class():
    data = prepared()
    for part in (data.train, data.validation, data.test):
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert (shares - 0.1).abs().max() < 0.012


def test_images_lie_in_zero_to_one():
    images, labels = next(iter(prepared(batch_size=600).test_dataloader()))
    assert images.shape == (599, 1, 8, 8)
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_the_example_input_is_fixed_and_of_the_right_shape():
    data = DigitsDataModule()
    assert data.example_input.shape == (2, *data.input_shape)
    assert torch.equal(data.example_input, data.example_input)


def test_a_loader_before_setup_is_refused():
    with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\)"):
        DigitsDataModule().train_dataloader()


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"validation_fraction": 0.0}, {"validation_fraction": 1.0}]
)
def test_a_bad_option_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        DigitsDataModule(**options)


def test_lightning_gives_the_loaders_its_distributed_sampler(monkeypatch):
    """What a strategy of two processes does to a loader, without a second process."""
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    connector = trainer._data_connector
    monkeypatch.setattr(type(trainer._accelerator_connector), "is_distributed", property(lambda _: True))
    monkeypatch.setattr(type(trainer), "distributed_sampler_kwargs", property(lambda _: {"num_replicas": 2, "rank": 1}))
    loader = connector._prepare_dataloader(prepared().train_dataloader(), shuffle=True, mode=None)
    assert isinstance(loader.sampler, DistributedSampler)
    batches = list(loader)
    assert sum(len(labels) for _, labels in batches) == 509
    assert batches[0][0].shape == (64, 1, 8, 8)


def test_a_trainer_fits_and_tests_with_it():
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    task = ClassificationModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    trainer.fit(task, datamodule=DigitsDataModule())
    assert trainer.global_step == 16
    trainer.test(task, datamodule=DigitsDataModule(), verbose=False)
    assert 0.0 < trainer.callback_metrics["test/error"] < 0.5
