import pytest
import torch
from torch import nn

from lightning_edge import export
from lightning_edge.export.byte_budget import constant_bytes, share_weights_within_, share_within
from lightning_edge.surgery.sharing import ShareReport

IMAGES = torch.zeros(2, 3, 8, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.Flatten(), nn.Linear(768, 10))


@pytest.mark.parametrize("channel_scale", [False, True])
@torch.no_grad()
def test_weights_are_shared_as_finely_as_the_file_allows(tmp_path, channel_scale):
    shared, options = network(), {"max_bytes": 10_000, "channel_scale": channel_scale}
    report, rate = share_weights_within_(shared, example_inputs=(IMAGES,), **options)
    assert 9700 <= export(shared, tmp_path / "net.edge", example_inputs=(IMAGES,)).stat().st_size <= 10_000
    assert rate > 0.0
    squares = [(a - b).square().sum() for a, b in zip(shared.parameters(), network().parameters(), strict=True)]
    assert report.inertia == pytest.approx(float(sum(squares)), rel=1e-4)


def test_a_budget_out_of_reach_leaves_the_weights_as_they_were():
    net = network()
    with pytest.raises(ValueError, match="max_bytes must be at least .*, got 99: the smallest file"):
        share_weights_within_(net, max_bytes=99, example_inputs=(IMAGES,))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), network().parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 0}, "max_bytes must be a whole number >= 1, got 0"),
        ({"max_bytes": 9000, "include": ["fc*"]}, r"got 'fc\*', which matches none"),
        ({"max_bytes": 9000, "clusters": 300, "channel_scale": True}, "clusters must be at most 256 with channel"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        share_weights_within_(network(), example_inputs=(IMAGES,), **options)


class Sizes:
    """A network whose records take ``sizes(rate)`` bytes, and its file a little less and 500 more."""

    def __init__(self, sizes):
        self.sizes, self.rate, self.files = sizes, None, 0

    def within(self, max_bytes, **options):
        seams = {"share": self.share, "record_bytes": self.record_bytes, "file_bytes": self.file_bytes}
        return share_within(max_bytes, **seams, **options)[1]

    def share(self, rate):
        self.rate = rate
        return ShareReport((), {}, {})

    def record_bytes(self, report):
        return int(self.sizes(self.rate))

    def file_bytes(self):
        self.files += 1
        return int(self.sizes(self.rate) * 0.93) + 500


@pytest.mark.parametrize("max_bytes", [2000, 4000, 9000])
def test_a_budget_is_met_and_used(max_bytes):
    fake = Sizes(lambda rate: 10_000 / (1 + 20 * rate))
    assert fake.within(max_bytes) == fake.rate
    assert fake.files <= 5
    assert 0.99 * max_bytes <= fake.file_bytes() <= max_bytes


def test_a_budget_that_is_large_enough_costs_nothing():
    fake = Sizes(lambda rate: 10_000 / (1 + 20 * rate))
    assert fake.within(9900, spare=100) == 0.0
    assert fake.within(9899, spare=100) > 0.0


def test_a_budget_between_two_sizes_takes_the_smaller():
    fake = Sizes(lambda rate: 6000 if rate < 0.1 else 3000)
    assert fake.within(5000) == fake.rate == pytest.approx(0.1, rel=0.01)


def test_a_file_that_jumps_where_its_records_do_not_is_met_too():
    fake = Sizes(lambda rate: 10_000 / (1 + 20 * rate))
    fake.file_bytes = lambda: 6000 if fake.rate < 0.07 else 3000
    assert 0.07 <= fake.within(4000) < 0.5


def test_a_budget_out_of_reach_names_the_smallest_file():
    fake = Sizes(lambda rate: 10_000 / (1 + min(rate, 1)))
    with pytest.raises(ValueError, match=r"max_bytes must be at least 5,160, got 600: the smallest .* has 5,150 bytes"):
        fake.within(600, spare=10)


def test_files_that_grow_at_large_rates_are_not_taken_for_the_smallest():
    fake = Sizes(lambda rate: 10_000 / (1 + min(rate, 1)))
    fake.file_bytes = lambda: 3000 if 1 < fake.rate < 5 else 6000
    assert 1 < fake.within(3500) < 5
    with pytest.raises(ValueError, match="the smallest file that sharing reached has 3,000 bytes"):
        fake.within(1000)


def test_constants_are_found_in_any_memory_format():
    network = nn.Sequential(nn.Conv2d(3, 16, 3)).to(memory_format=torch.channels_last)
    nn.init.ones_(network[0].bias)
    assert constant_bytes(network, {}) == 2 * 16
