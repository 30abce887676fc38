import pytest

from lightning_edge.functional.energy import estimate_energy


@pytest.mark.parametrize(("mac_type", "picojoule"), [("fp32", 4.6), ("fp16", 1.5), ("int8", 0.3)])
def test_a_multiply_accumulate_costs_what_the_table_says(mac_type, picojoule):
    estimate = estimate_energy(macs=1_000_000, weight_bytes=0, mac_type=mac_type)
    assert estimate.arithmetic_joules == pytest.approx(picojoule * 1e-6)
    assert estimate.memory_joules == 0.0
    assert f"{picojoule} pJ per {mac_type}" in estimate.method


@pytest.mark.parametrize(("memory", "picojoule"), [("dram", 640), ("sram", 5)])
def test_every_byte_of_the_weights_is_read_once(memory, picojoule):
    estimate = estimate_energy(macs=10, weight_bytes=4000, memory=memory)
    assert estimate.memory_joules == pytest.approx(picojoule * 1e-9)
    assert estimate.joules == estimate.arithmetic_joules + estimate.memory_joules
    assert f"{picojoule} pJ per 32 bits" in estimate.method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": -1}, "macs must be at least 0, got -1"),
        ({"weight_bytes": -4}, "weight_bytes must be at least 0, got -4"),
        ({"mac_type": "int4"}, r"mac_type must be one of \['fp32', 'fp16', 'int8'\], got 'int4'"),
        ({"memory": "flash"}, r"memory must be one of \['dram', 'sram'\], got 'flash'"),
        ({"memory": "sram", "weight_bytes": 32769}, "weight_bytes must be at most 32768"),
    ],
)
def test_a_bad_argument_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_energy(**{"macs": 1, "weight_bytes": 4} | options)
