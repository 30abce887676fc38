"""What an inference would cost in 45 nm silicon: an estimate from operation and byte counts, not a measurement."""

from dataclasses import dataclass
from typing import Literal

MacType = Literal["fp32", "fp16", "int8"]
Memory = Literal["dram", "sram"]

# Picojoule. M. Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm, 0.9 V; the fp32 and memory figures are also
# in table I of Han et al., "EIE", ISCA 2016 (arXiv:1602.01528). Integer products are summed in 32 bits.
INT32_ADD_PJ = 0.1
INT8_MULTIPLY_PJ = 0.2
FP16_ADD_PJ = 0.4
FP16_MULTIPLY_PJ = 1.1
FP32_ADD_PJ = 0.9
FP32_MULTIPLY_PJ = 3.7
SRAM_32_BIT_PJ = 5.0
DRAM_32_BIT_PJ = 640.0

SRAM_BYTES = 32 * 1024

_MAC_PJ: dict[MacType, float] = {
    "fp32": FP32_MULTIPLY_PJ + FP32_ADD_PJ,
    "fp16": FP16_MULTIPLY_PJ + FP16_ADD_PJ,
    "int8": INT8_MULTIPLY_PJ + INT32_ADD_PJ,
}
_READ_PJ: dict[Memory, float] = {"dram": DRAM_32_BIT_PJ, "sram": SRAM_32_BIT_PJ}
_PLACE: dict[Memory, str] = {"dram": "DRAM", "sram": "a 32 KB SRAM"}


@dataclass(frozen=True)
class EnergyEstimate:
    """Joules of one inference, and in ``method`` how they were obtained."""

    arithmetic_joules: float
    memory_joules: float
    method: str

    @property
    def joules(self) -> float:
        """Arithmetic and memory together."""
        return self.arithmetic_joules + self.memory_joules


def estimate_energy(
    *, macs: int, weight_bytes: int, mac_type: MacType = "fp32", memory: Memory = "dram"
) -> EnergyEstimate:
    """Estimate the energy of one inference by the 45 nm table of Horowitz (ISSCC 2014).

    The rule: every multiply-accumulate costs one multiplication and one addition, and every byte of the weights is read
    once per inference. Activations, control and leakage are left out, so it compares networks and is no figure of a
    device. Weights come from DRAM unless the caller says that they stay in a small SRAM, 128 times cheaper.

    Args:
        macs: Multiply-accumulates of one inference.
        weight_bytes: Bytes of the weights as they lie in memory.
        mac_type: Number format of the products; ``"int8"`` sums in 32 bits.
        memory: Where the weights are read from.

    Raises:
        ValueError: If a count is negative, a name is unknown, or the weights do not fit into the SRAM.

    >>> round(estimate_energy(macs=1000, weight_bytes=4000).joules * 1e9, 1)
    644.6
    """
    if macs < 0:
        raise ValueError(f"macs must be at least 0, got {macs}")
    if weight_bytes < 0:
        raise ValueError(f"weight_bytes must be at least 0, got {weight_bytes}")
    if mac_type not in _MAC_PJ:
        raise ValueError(f"mac_type must be one of {list(_MAC_PJ)}, got {mac_type!r}")
    if memory not in _READ_PJ:
        raise ValueError(f"memory must be one of {list(_READ_PJ)}, got {memory!r}")
    if memory == "sram" and weight_bytes > SRAM_BYTES:
        raise ValueError(f"weight_bytes must be at most {SRAM_BYTES} for memory='sram', got {weight_bytes}")
    mac, read = _MAC_PJ[mac_type], _READ_PJ[memory]
    return EnergyEstimate(
        arithmetic_joules=macs * mac * 1e-12,
        memory_joules=weight_bytes / 4 * read * 1e-12,
        method=(
            f"estimated, 45 nm (Horowitz 2014): {mac:.1f} pJ per {mac_type} multiply-accumulate, every weight byte read"
            f" once per inference from {_PLACE[memory]} at {read:.0f} pJ per 32 bits; activations not counted"
        ),
    )
