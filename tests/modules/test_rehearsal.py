"""What is tried before the fit, and refused there with term, layer and mend."""

import copy

import pytest
import torch
import torch.nn.functional as F
from students import Net, Task, data, fit, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import ChannelPruning, DistillationModule, DistillationTerm, QuantizationAwareTraining


def hint(layers, loss="hint"):
    return {"hint": DistillationTerm(loss, layers=layers)}


class Strided(Net):
    def __init__(self, width=8):
        super().__init__(width)
        self.conv.stride = (2, 2)


@pytest.mark.parametrize("loss", ["hint", "contrastive", "squared", "cosine"])
@pytest.mark.parametrize("width", [8, 16])
def test_a_layer_that_loses_channels_is_refused_for_terms_that_are_made_for_its_width(tmp_path, loss, width):
    torch.manual_seed(0)
    student = nn.Sequential(Net(), nn.ReLU(), nn.Linear(4, 4))
    module = DistillationModule(Task(student), network(1, width), hint({"0.norm": "norm"}, loss))
    narrowing = ChannelPruning(sparsity=0.5, end_epoch=1, remove_epoch=1, round_to=2, protect_ends=False)
    with pytest.raises(ValueError, match=r"losses\['hint'\] must match layers that keep .* got \['0.norm'\].*exclude"):
        fit(module, tmp_path, narrowing, epochs=3)


@pytest.mark.parametrize("options", [{"include": ["1"], "remove_epoch": 1}, {"remove_epoch": None}])
def test_layers_that_keep_their_width_while_the_fit_goes_on_may_be_matched(tmp_path, options):
    torch.manual_seed(0)
    student = nn.Sequential(Net(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    module = DistillationModule(Task(student), network(1, 16), hint({"0.conv": "conv"}))
    narrowing = ChannelPruning(sparsity=0.5, end_epoch=1, round_to=2, protect_ends=False, **options)
    fit(module, tmp_path, narrowing, epochs=2)
    assert module.student.net[1].out_features < 8


def test_a_layer_that_hands_on_what_it_gets_is_refused_under_quantization(tmp_path):
    class Passing(Net):
        def __init__(self):
            super().__init__()
            self.same = nn.Identity()

        def forward(self, images):
            return super().forward(self.same(images))

    module = DistillationModule(Task(Passing()), Passing(), hint({"same": "same"}))
    with pytest.raises(ValueError, match=r"losses must match layers that compute something, got \['same'\]"):
        fit(module, tmp_path, QuantizationAwareTraining(start_epoch=1))


def test_features_that_cannot_be_compared_are_refused_with_term_and_layers(tmp_path):
    where = r"losses\['hint'\] must fit layer 'conv' of the student and 'conv' of the teacher: student and teacher must"
    with pytest.raises(ValueError, match=where):
        fit(DistillationModule(Task(Net()), Strided(), hint({"conv": "conv"}, "attention")), tmp_path)
    where = r"losses\['hint'\] must fit layer 'conv' .* 'fc' of the teacher: features must have equally many dimensions"
    with pytest.raises(ValueError, match=where):
        fit(DistillationModule(Task(Net()), network(1), hint({"conv": "fc"}, "cosine")), tmp_path)


def test_classes_that_differ_are_named_with_their_term(tmp_path):
    teacher = network(1)
    teacher.fc = nn.Linear(8, 10)
    with pytest.raises(ValueError, match=r"losses\['soft_targets'\] must fit what .* got \(16, 4\) and \(16, 10\)"):
        fit(DistillationModule(Task(network()), teacher), tmp_path)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, left, right):
        return self.fc(left - right)


class PairTask(Task):
    def __init__(self):
        super().__init__(Pair())

    def training_step(self, batch, batch_idx):
        return {"loss": self.net(batch[0], batch[1]).square().mean(), "batch_idx": batch_idx}


def test_a_network_of_two_inputs_asks_for_an_example(tmp_path):
    loader = DataLoader(TensorDataset(torch.randn(16, 4), torch.randn(16, 4)), 8)
    module = DistillationModule(PairTask(), Pair(), hint({"fc": "fc"}))
    with pytest.raises(
        ValueError, match="example_input_array of PairTask must be set .* be called with a batch as it is"
    ):
        fit(module, tmp_path, loader=loader)
    task = PairTask()
    task.example_input_array = (torch.zeros(2, 4), torch.zeros(2, 4))
    trainer = fit(DistillationModule(task, Pair(), hint({"fc": "fc"})), tmp_path, loader=loader)
    assert float(trainer.callback_metrics["distillation/hint"]) > 0


def test_terms_without_adapters_need_no_example(tmp_path):
    loader = DataLoader(TensorDataset(torch.randn(16, 4), torch.randn(16, 4)), 8)
    trainer = fit(DistillationModule(PairTask(), Pair(), hint({"fc": "fc"}, "similarity")), tmp_path, loader=loader)
    assert float(trainer.callback_metrics["distillation/hint"]) > 0


@pytest.mark.parametrize("loss", ["hint", "contrastive"])
def test_one_dimensional_convolutions_are_adapted_by_channels_and_positions(tmp_path, loss):
    class Signals(nn.Module):
        def __init__(self, width, stride):
            super().__init__()
            self.conv = nn.Conv1d(1, width, 3, stride=stride)
            self.fc = nn.Linear(width, 4)

        def forward(self, images):
            return self.fc(self.conv(images.flatten(2)).mean(2))

    module = DistillationModule(Task(Signals(4, 2)), Signals(6, 1), hint({"conv": "conv"}, loss))
    trainer = fit(module, tmp_path)
    assert torch.isfinite(trainer.callback_metrics["distillation/hint"])
    shapes = {tuple(weight.shape) for name, weight in module.matching.adapters.named_parameters() if "weight" in name}
    assert shapes == ({(6, 4, 1)} if loss == "hint" else {(128, 4), (128, 6)})


def encoder(seed, width=8):
    torch.manual_seed(seed)
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=True
    )


class Padded(Task):
    """The last tokens of each sequence are padding."""

    def __init__(self, net):
        super().__init__(net)
        self.example_input_array = torch.zeros(2, 6, 8)

    def training_step(self, batch, batch_idx):
        padding = torch.arange(6).expand(len(batch[0]), 6) >= 4
        return {"loss": self.net(batch[0], src_key_padding_mask=padding).square().mean(), "batch_idx": batch_idx}


def test_a_teacher_with_padding_goes_through_all_its_layers(tmp_path):
    teacher, tokens = encoder(1), torch.randn(8, 6, 8)
    terms = {"hint": DistillationTerm("hint", layers={"layers.1": "layers.1"}), "out": DistillationTerm("squared")}
    module = DistillationModule(Padded(encoder(0)), teacher, terms)
    trainer = fit(module, tmp_path, loader=DataLoader(TensorDataset(tokens), 8), epochs=1)
    before = encoder(0)
    mask = torch.arange(6).expand(8, 6) >= 4
    expected = F.mse_loss(before(tokens, src_key_padding_mask=mask), teacher.train()(tokens, src_key_padding_mask=mask))
    assert float(trainer.callback_metrics["distillation/out"]) == pytest.approx(expected.item(), rel=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_hints_need_no_output_that_is_a_tensor(tmp_path):
    class Named(Net):
        def forward(self, images):
            return {"logits": super().forward(images)}

    class NamedTask(Task):
        def training_step(self, *args):
            (images, labels), batch_idx = args
            return {"loss": F.cross_entropy(self.net(images)["logits"], labels), "batch_idx": batch_idx}

        def validation_step(self, batch):
            self.log("val/loss", F.cross_entropy(self.net(batch[0])["logits"], batch[1]))

    trainer = fit(DistillationModule(NamedTask(Named()), Named(), hint({"conv": "conv"})), tmp_path)
    assert float(trainer.callback_metrics["distillation/hint"]) > 0
    with pytest.raises(ValueError, match="output must give a tensor to be matched, got a dict: give output_adapter"):
        fit(DistillationModule(NamedTask(Named()), Named()), tmp_path)


def test_padded_tokens_are_left_out_by_an_adapter_that_sees_the_batch(tmp_path):
    def kept(output, batch):
        return output[batch[1] >= 0]

    class Tagger(Task):
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)
            return {"loss": loss, "batch_idx": batch_idx}

    tokens, tags = torch.randn(8, 5, 3), torch.randint(0, 4, (8, 5))
    tags[:, 3:] = -100
    terms = {"soft": DistillationTerm(), "label": DistillationTerm("decoupled")}
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 4), nn.Linear(3, 4)
    options = {"output_adapter": kept, "labels": lambda batch: batch[1][batch[1] >= 0]}
    values = []
    for noise in (0.0, 100.0):
        shifted = tokens.clone()
        shifted[:, 3:] += noise
        module = DistillationModule(Tagger(nn.Sequential(copy.deepcopy(student))), teacher, terms, **options)
        trainer = fit(module, tmp_path, loader=DataLoader(TensorDataset(shifted, tags), 8), max_steps=1)
        values.append([float(trainer.callback_metrics[f"distillation/{name}"]) for name in terms])
    assert values[0] == values[1]
    module = DistillationModule(Tagger(nn.Sequential(student)), teacher, terms, output_adapter=kept)
    with pytest.raises(ValueError, match=r"losses\['label'\] must fit what output_adapter and labels .* flatten the"):
        fit(module, tmp_path, loader=DataLoader(TensorDataset(tokens, tags), 8))
    with pytest.raises(ValueError, match=r"output_adapter must not take the batch for losses\['view'\]"):
        DistillationModule(Task(), network(), {"view": DistillationTerm("contrastive")}, output_adapter=kept)


def test_a_rehearsal_draws_no_random_numbers(tmp_path):
    soft = {"soft": DistillationTerm(weight=0.9)}
    trained = []
    for terms in (soft, soft | {"none": DistillationTerm("hint", weight=1e-30, layers={"conv": "conv"})}):
        module = DistillationModule(Task(network()), network(1), terms)
        fit(module, tmp_path, epochs=1)
        trained.append(module.student_state_dict()["conv.weight"])
    assert torch.equal(*trained)


def test_a_rehearsal_leaves_the_loader_s_own_generator_alone(tmp_path):
    soft = {"soft": DistillationTerm(weight=0.9)}
    trained = []
    for terms in (soft, soft | {"none": DistillationTerm("hint", weight=1e-30, layers={"conv": "conv"})}):
        loader = DataLoader(data(), 16, shuffle=True, generator=torch.Generator().manual_seed(3))
        module = DistillationModule(Task(network()), network(1), terms)
        fit(module, tmp_path, epochs=1, loader=loader)
        trained.append(module.student_state_dict()["conv.weight"])
    assert torch.equal(*trained)


def test_a_rehearsal_sees_what_the_hooks_make_of_a_batch(tmp_path):
    class Bytes(Task):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].float() / 255, batch[1]

    images = torch.randint(0, 255, (32, 1, 6, 6), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, torch.randint(0, 4, (32,))), 16)
    trainer = fit(DistillationModule(Bytes(network()), network(1, 16), hint({"conv": "conv"})), tmp_path, loader=loader)
    assert torch.isfinite(trainer.callback_metrics["distillation/hint"])
